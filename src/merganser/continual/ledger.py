"""The ledger: everything about a fold but its sums, in one small JSON file whose replacement is the commit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merganser.checkpoints import base_and_adapter, local_path, open_source
from merganser.checkpoints.writer import sync, write_json
from merganser.continual.roles import Role
from merganser.errors import RefError, StateError
from merganser.types import Source

LEDGER_NAME = "ledger.json"
BASE_NAME = "base.json"
FORMAT: Literal["merganser-fold-1"] = "merganser-fold-1"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, revalidate_instances="always")


Record = TypeVar("Record", bound=_Strict)


class Contributor(_Strict):
    """One expert that is in the state.

    Attributes:
        name: what commands call it.
        ref: where it was read from.
        digest: sha256 over its tensors; an expert must match it to be removed.
        weight: factor of its change.
        norm: Frobenius norm of weight times change, over matrices and vectors.
        ignore: patterns of tensor names left out.
        rename: prefixes replaced, as OLD=NEW.
        nonfinite: whether NaN and infinity in it were counted as no change.
    """

    name: str
    ref: str
    digest: str
    weight: float
    norm: float
    ignore: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    nonfinite: bool = False


class Ledger(_Strict):
    """What a fold is and who is in it.

    Attributes:
        method: name in the table.
        settings: the method's settings, given at init.
        slots: which sums the state holds for 2-D weights.
        float64: whether arithmetic is in float64 whatever the checkpoints hold.
        sums_dtype: type of the sums on disk, "F32" or "F64".
        base_ref: the base, as an absolute path where it is local.
        base_digest: sha256 over the base's tensors.
        contributors: the experts, in order of arrival.
        generation: how many changes the state has seen.
        sums: folder of the current sums; None while there are none.
        merged_norm: Frobenius norm of a sequential method's state, over matrices and vectors.
    """

    format: Literal["merganser-fold-1"] = FORMAT
    version: str
    method: str
    settings: dict[str, float | int | str]
    slots: tuple[str, ...]
    float64: bool
    sums_dtype: Literal["F32", "F64"]
    base_ref: str
    base_digest: str
    contributors: tuple[Contributor, ...] = ()
    generation: int = Field(default=0, ge=0)
    sums: str | None = Field(default=None, pattern=r"^sums-\d{5,}$")
    merged_norm: float = 0.0


class BaseRecord(_Strict):
    """What the state remembers of its base, written once.

    Attributes:
        tensors: sha256 of every tensor.
        roles: role of every tensor.
        shapes: shape of every tensor.
    """

    tensors: dict[str, str]
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]

    @model_validator(mode="after")
    def _same_names(self) -> BaseRecord:
        if not list(self.tensors) == list(self.roles) == list(self.shapes):
            raise ValueError("tensors, roles and shapes name different tensors")
        return self


def read_ledger(state: Path) -> Ledger:
    """Read and check a state's ledger.

    Raises:
        StateError: If the folder is no state, or its ledger is damaged or of another version.
    """
    return _read(state, LEDGER_NAME, Ledger)


def read_base_record(state: Path) -> BaseRecord:
    """Read and check what a state remembers of its base.

    Raises:
        StateError: If it is missing or damaged.
    """
    return _read(state, BASE_NAME, BaseRecord)


def _read(state: Path, file: str, kind: type[Record]) -> Record:
    path = local_path(str(state)) / file
    if not path.is_file():
        what = "does not exist" if not state.exists() else f"is not a fold's state: it has no {file}"
        raise StateError(f"{state} {what}", f"merganser fold init BASE {state}")
    try:
        return kind.model_validate(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise StateError(f"{path} is damaged or of another version: {error}") from error


def write_record(folder: Path, file: str, record: _Strict) -> None:
    """Write a record beside its old version, flush it, and replace that in one step."""
    beside = folder / f".{file}.new"
    write_json(beside, record.model_dump(mode="json"))
    sync(beside)
    os.replace(beside, folder / file)
    sync(folder)


def absolute_ref(ref: str) -> str:
    """A local reference made independent of the working directory; hub references as they are."""
    base, adapter = base_and_adapter(ref)
    if base is not None:
        return f"{absolute_ref(base)}+{absolute_ref(adapter)}"
    path, separator, key = ref.partition("::")
    local = local_path(path)
    return f"{os.path.abspath(local)}{separator}{key}" if local.exists() else ref


def short_name(ref: str) -> str:
    """What to call a model by default: the last part of its reference, without a file's suffix.

    >>> short_name("/models/digits-tuned"), short_name("/models/a.safetensors"), short_name("hf:org/name@v2")
    ('digits-tuned', 'a', 'name@v2')
    """
    path = Path(base_and_adapter(ref)[1])
    return path.stem if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") else path.name


def open_base(state: Path, ledger: Ledger, record: BaseRecord, elsewhere: str | Path | None = None) -> Source:
    """Open the base, from where the ledger says or from `elsewhere` if it has moved.

    Raises:
        StateError: If it is gone, or has other tensors than at init.
    """
    ref = absolute_ref(str(elsewhere)) if elsewhere is not None else ledger.base_ref
    try:
        source = open_source(ref)
    except RefError as error:
        raise StateError(
            f"the base of {state} is not at {ref}", "if it has moved, name the place with --base"
        ) from error
    if {name: info.shape for name, info in source.infos.items()} != record.shapes:
        raise StateError(f"{ref} has other tensors than the base of {state}", "name the right place with --base")
    return source

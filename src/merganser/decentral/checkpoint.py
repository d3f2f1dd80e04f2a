"""Checkpoints of one agent: whole or not there, the newest two kept, and the one before where the newest is damaged.

A file `NUMBER.safetensors` holds tensors, and in its metadata what else there is to remember, as JSON, with the sha256
of both. It is written beside, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.checkpoints.safetensors_file import SafetensorsFile
from merganser.decentral.durable import write
from merganser.decentral.words import RunConfig
from merganser.errors import CheckpointError, MerganserError, StateError
from merganser.numerics import DTYPE_NAMES, raw_bytes

#: How many are kept.
KEPT = 2
_STARTS = "starts"


@dataclass(frozen=True)
class Checkpoint:
    """What is kept.

    Attributes:
        tensors: by name.
        content: JSON.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, number: int, kept: Checkpoint) -> Path:
    """Write a checkpoint, and remove those that are older than the newest two.

    Args:
        folder: of one agent; made if it is not there.
        number: of the step that is done.
        kept: what to write.

    Raises:
        OutputError: If it cannot be written; those that were there are as they were.
    """
    path = _path(folder, number)
    write(path, _packed(kept))
    for old in numbers(folder)[:-KEPT]:
        _path(folder, old).unlink(missing_ok=True)
    return path


def numbers(folder: Path) -> list[int]:
    """Numbers of the checkpoints that are there, sound or not, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdecimal())


def load(folder: Path, number: int) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        StateError: If it is damaged, or not there.
    """
    path = _path(folder, number)
    try:
        file = SafetensorsFile(path, str(path))
        tensors = {name: file.read(name) for name in file.infos}
        if _digest(file.metadata["content"], tensors) != file.metadata["digest"]:
            raise CheckpointError(f"{path}: its digest is that of other bytes")
        return Checkpoint(tensors, json.loads(file.metadata["content"]))
    except (MerganserError, KeyError, ValueError) as error:
        raise StateError(
            f"checkpoint {path} cannot be used: {error}", "remove it to go on from the one before"
        ) from error


def sound(folder: Path) -> list[int]:
    """Numbers of the checkpoints that can be read, ascending."""
    found = []
    for number in numbers(folder):
        try:
            load(folder, number)
        except StateError:
            continue
        found.append(number)
    return found


def forget(folder: Path, after: int) -> None:
    """Remove checkpoints of later steps: they are of a run that is not gone on with."""
    for number in numbers(folder):
        if number > after:
            _path(folder, number).unlink(missing_ok=True)


def started(folder: Path) -> int:
    """Count one more start of an agent: how many there were before.

    Raises:
        OutputError: If it cannot be written down.
    """
    path = folder / _STARTS
    try:
        before = int(path.read_text("ascii"))
    except (OSError, ValueError):
        before = 0
    write(path, str(before + 1).encode())
    return before


def key_of(config: RunConfig) -> str:
    """What a checkpoint must have been made with to be gone on from: all of a configuration but its deadline."""
    content = config.model_dump(mode="json", exclude={"deadline_s"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _packed(kept: Checkpoint) -> bytes:
    header: dict[str, Any] = {}
    parts, end = [], 0
    for name, x in sorted(kept.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        parts.append(raw_bytes(x))
    content = json.dumps(kept.content, sort_keys=True)
    header["__metadata__"] = {"content": content, "digest": _digest(content, kept.tensors)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(content.encode())
    for name, x in sorted(tensors.items()):
        found.update(json.dumps([name, DTYPE_NAMES[x.dtype], list(x.shape)]).encode())
        found.update(raw_bytes(x))
    return found.hexdigest()

"""A partly merged network on disk: a folder whose `config.json` tells how to build it, and exported programs."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from merganser.align.blocks import blocked
from merganser.align.wider import Record, filled, rewidened
from merganser.checkpoints import open_source
from merganser.checkpoints.writer import CheckpointWriter, write_json
from merganser.errors import (
    ExtraTensorError,
    MerganserError,
    MissingTensorError,
    NonFiniteError,
    OutputError,
    ParameterError,
    RefError,
    and_more,
)
from merganser.numerics import DTYPE_NAMES, all_finite
from merganser.symmetry.record import Output, evaluating, tensors_of
from merganser.types import TensorInfo
from merganser.version import __version__

#: What `config.json` calls such a folder.
KIND = "merganser-partial"


@dataclass(frozen=True)
class Partial:
    """What `config.json` tells.

    Attributes:
        model: what the network was made of, as the command line names it.
        record: how it was laid out.
        blocks: whether layers are three products.
    """

    model: str
    record: Record
    blocks: bool

    def built(self, network: nn.Module) -> nn.Module:
        """The network, with weights that mean nothing yet.

        Args:
            network: that `model` names; it is left as it is.

        Raises:
            ParameterError: If it is another network.
        """
        wide = rewidened(network, self.record)
        return blocked(wide, self.record) if self.blocks else wide


def save_partial(
    target: Path,
    network: nn.Module,
    partial: Partial,
    receipt: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a partly merged network, whole or not at all.

    Args:
        target: folder to make.
        network: as `Partial.built` gives it.
        partial: how to build it again.
        receipt: how it was made.
        overwrite: replace a folder that was made here.

    Raises:
        ParameterError: If the network holds something that such a file cannot.
        OutputError: If it cannot be written.
    """
    state = network.state_dict()
    for name, x in state.items():
        if not isinstance(x, Tensor) or x.is_meta or x.layout != torch.strided or x.dtype not in DTYPE_NAMES:
            what = f"{x.dtype}, {x.layout}, {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ParameterError(f"{name} of the network cannot be stored: it is {what}")
    tensors, aliases = _once(state)
    infos = {name: TensorInfo(tuple(x.shape), DTYPE_NAMES[x.dtype]) for name, x in tensors.items()}
    config = {
        "model_type": KIND,
        "model": partial.model,
        "blocks": partial.blocks,
        "layout": partial.record.as_json(),
    }
    with CheckpointWriter(target, infos, aliases=aliases, overwrite=overwrite) as writer:
        for name, x in tensors.items():
            writer.put(name, x.contiguous())
        try:
            write_json(writer.folder / "config.json", config)
        except OSError as error:
            raise OutputError(f"{target} cannot be written: {error}") from error
        writer.commit({"merganser": __version__, **receipt, "outputs": writer.digests()})


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, those that are one and the same by their first name alone, and their other names."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    known: dict[Any, str] = {}
    for name, x in state.items():
        place = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride())
        first = known.setdefault(place, name) if x.numel() else name
        if first == name:
            tensors[name] = x
        else:
            aliases[name] = first
    return tensors, aliases


def read_partial(folder: Path) -> Partial:
    """How to build the network of a folder.

    Raises:
        RefError: If the folder has no readable configuration.
        ParameterError: If that is none of a partly merged network.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RefError(f"{path} does not tell which network this is: {error}") from error
    if not isinstance(content, dict) or content.get("model_type") != KIND:
        raise ParameterError(f"{folder} holds no partly merged network", "merganser pleas writes one")
    model, blocks = content.get("model"), content.get("blocks")
    if not isinstance(model, str) or not isinstance(blocks, bool):
        raise ParameterError(f'{path} lacks a "model" that is text, or "blocks" that is true or false')
    try:
        return Partial(model, Record.from_json(content.get("layout")), blocks)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error.message}") from error


def load_partial(folder: Path, network: nn.Module) -> nn.Module:
    """The network of a folder, in evaluation mode.

    Args:
        folder: that `save_partial` wrote.
        network: that its `model` names, with any weights; it is left as it is.

    Raises:
        RefError: If the folder has no readable configuration.
        ParameterError: If it is of another kind, or of another network.
        MissingTensorError: If a tensor is missing.
        ExtraTensorError: If there is one that the network has not.
        ShapeError: If one has another shape than the layout says.
        NonFiniteError: If one holds NaN or infinity, and the network's own is another: masks may.
    """
    built = read_partial(folder).built(network)
    source = open_source(folder)
    stored = {**{name: name for name in source.infos}, **source.aliases}
    own = built.state_dict()
    if more := [name for name in stored if name not in own]:
        raise ExtraTensorError(f"{folder} has {more[0]}{and_more(more)}, and the network has not", "name its network")
    state: dict[str, Tensor] = {}
    for name, x in own.items():
        if name not in stored:
            raise MissingTensorError(f"{folder} lacks {name}", "is it whole?")
        state[name] = source.read(stored[name])
        if not all_finite(state[name]) and not torch.equal(state[name], x.to("cpu", state[name].dtype)):
            raise NonFiniteError(f"{name} of {folder} holds NaN or infinity")
    return filled(built, state).eval()


# programs


def _only(network: nn.Module, output: Output | None) -> nn.Module:
    """A network that gives nothing but tensors, in evaluation mode; its inputs have the names that they had."""

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
            found = tensors_of(self.network(*args, **kwargs), output)
            return found[0] if len(found) == 1 else tuple(found)

    signature = inspect.signature(type(network).forward)
    setattr(Only.forward, "__signature__", signature)  # noqa: B010
    return Only().eval()


def export_program(
    network: nn.Module,
    path: Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: Output | None = None,
    any_batch: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a network as a program of torch.export (`.pt2`), which runs without this package.

    Args:
        network: dense or in blocks; exported in evaluation mode, and left as it is.
        path: file to write.
        args: positional inputs to trace with.
        kwargs: named inputs.
        output: what of the result to give; by default all its tensors, in order.
        any_batch: whether axis 0 of the inputs may be of any size; those given must then hold two examples or more.
        overwrite: replace a file that is there.

    Raises:
        OutputError: If the file is there, or cannot be written.
        ParameterError: If the network cannot be exported.
    """
    check_new(path, overwrite=overwrite)
    program = _exported(torch.export.export, network, args, kwargs, output, any_batch)
    _write(path, lambda beside: torch.export.save(program, beside))


def export_onnx(
    network: nn.Module,
    path: Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: Output | None = None,
    any_batch: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a network as ONNX, by packages `onnx` and `onnxscript`; arguments as for `export_program`.

    Raises:
        MerganserError: If a package is not installed.
        OutputError: If the file is there, or cannot be written.
        ParameterError: If the network cannot be exported.
    """
    check_onnx()
    check_new(path, overwrite=overwrite)
    export = functools.partial(torch.onnx.export, dynamo=True, verbose=False)
    program = _exported(export, network, args, kwargs, output, any_batch)
    _write(path, lambda beside: program.save(str(beside)))


def check_onnx() -> None:
    """Refuse to go on without the packages that ONNX takes.

    Raises:
        MerganserError: If one is not installed.
    """
    if lacking := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise MerganserError(f"ONNX needs {' and '.join(lacking)}", f"pip install {' '.join(lacking)}")


def _exported(
    export: Callable[..., Any],
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    output: Output | None,
    any_batch: bool,
) -> Any:
    with evaluating(network), torch.no_grad(), _in_silence():
        try:
            named = inspect.signature(network.forward).bind(*args, **(kwargs or {})).arguments
            sizes = tree_map(_any_first, named) if any_batch else None
            return export(_only(network, output), tuple(args), kwargs=dict(kwargs or {}), dynamic_shapes=sizes)
        except Exception as error:  # the exporters raise errors of many kinds
            first = str(error).partition("\n")[0]
            raise ParameterError(f"the network cannot be exported: {type(error).__name__}: {first}") from error


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without the warnings of what exporters do among themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _any_first(x: Any) -> Any:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) and x.ndim else None


def check_new(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that is there, or a folder.

    Raises:
        OutputError: If there is one.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", "choose another name")


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then rename it; first those that it refers to, as large ONNX files do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
            beside = Path(folder) / path.name
            write(beside)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == beside):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error

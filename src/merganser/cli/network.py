"""Where a command may write a network, and writing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from merganser.types import Source


def check_out(out: Path, refs: Sequence[str], model: str | None, *, overwrite: bool) -> None:
    """Refuse a folder that is there, or that holds, or lies in, what is read.

    Raises:
        OutputError: If that is so.
    """
    from merganser.checkpoints.overlap import refuse_overlap
    from merganser.errors import OutputError

    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists", "name another folder, or add --overwrite")
    refuse_overlap(out, [*refs, *([model] if model and Path(model).is_dir() else [])])


def write_network(network: nn.Module, out: Path, like: Source, receipt: dict[str, Any], *, overwrite: bool) -> None:
    """Write a network as a checkpoint folder, in names and types of another one, with the files that stand beside it.

    Raises:
        OutputError: If it cannot be written.
        NonFiniteError: If a value is too large for its type.
    """
    from merganser.checkpoints.writer import CheckpointWriter
    from merganser.cli.stored import stored_names
    from merganser.numerics import DTYPE_NAMES, narrowed
    from merganser.types import TensorInfo
    from merganser.version import __version__

    tensors, names = {}, stored_names(network, like)
    for known, x in network.state_dict().items():
        name = names.get(known, known)
        info = like.infos.get(name)
        tensors[name] = narrowed(x, info.dtype, name) if info and x.is_floating_point() else x
        tensors[name] = tensors[name].detach().contiguous()
    infos = {name: TensorInfo(tuple(x.shape), DTYPE_NAMES[x.dtype]) for name, x in tensors.items()}
    with CheckpointWriter(out, infos, overwrite=overwrite) as writer:
        for name, x in tensors.items():
            writer.put(name, x)
        writer.commit({"merganser": __version__, **receipt, "outputs": writer.digests()}, like.companions())

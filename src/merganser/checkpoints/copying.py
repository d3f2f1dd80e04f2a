"""Write any source anew as a safetensors folder, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.checkpoints import open_source
from merganser.checkpoints.overlap import refuse_overlap
from merganser.checkpoints.views import cast, prefix_replaced
from merganser.checkpoints.writer import CheckpointWriter
from merganser.errors import ParameterError
from merganser.types import Source
from merganser.version import __version__


def renamed_by(source: Source, renamings: Sequence[str]) -> Source:
    """A source with prefixes replaced, each written OLD=NEW.

    Raises:
        ParameterError: If a renaming is not OLD=NEW, or fits no name.
    """
    for renaming in renamings:
        old, equals, new = renaming.partition("=")
        if not equals:
            raise ParameterError(f"renaming is {renaming!r}; it is written OLD=NEW")
        source = prefix_replaced(source, old, new)
    return source


def copy_checkpoint(
    ref: str,
    out: Path,
    *,
    dtype: str | None = None,
    rename: Sequence[str] = (),
    shard_bytes: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write what `ref` names as a safetensors folder.

    Args:
        ref: any reference; adapters are applied to their base.
        out: folder to make.
        dtype: of floating tensors; by default as they are.
        rename: prefixes to replace, each as "OLD=NEW".
        shard_bytes: size in bytes at which the next file is begun.
        overwrite: replace a folder that is there.
        progress: called as (bytes done, bytes in all).

    Raises:
        MerganserError: If the source cannot be read or the folder not be written; then nothing is there.
    """
    source = renamed_by(open_source(ref), rename)
    source = cast(source, dtype) if dtype else source
    refuse_overlap(out, [ref])
    receipt = {"source": ref, "dtype": dtype, "rename": list(rename)}
    write_source(source, out, receipt, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress)


def write_source(
    source: Source,
    out: Path,
    receipt: Mapping[str, Any],
    *,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a source as a safetensors folder, tensor by tensor.

    Args:
        source: what is written.
        out: folder to make.
        receipt: what its receipt says beside versions and digests.
        shard_bytes: size in bytes at which the next file is begun.
        overwrite: replace a folder that is there.
        progress: called as (bytes done, bytes in all).

    Raises:
        MerganserError: If the source cannot be read or the folder not be written; then nothing is there.
    """
    total, done = sum(info.nbytes for info in source.infos.values()), 0
    with CheckpointWriter(
        out, source.infos, aliases=source.aliases, shard_bytes=shard_bytes, overwrite=overwrite
    ) as writer:
        for name, info in source.infos.items():
            writer.put(name, source.read(name))
            done += info.nbytes
            if progress is not None:
                progress(done, total)
        writer.commit({"merganser": __version__, **receipt, "outputs": writer.digests()}, source.companions())

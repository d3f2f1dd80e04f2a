"""`merganser inspect` and `merganser convert`: look at a checkpoint, or write it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merganser.cli.show import console, progress_bar, size


def inspect(
    ref: Annotated[str, typer.Argument(help="A checkpoint: folder, file, hub id, BASE+ADAPTER.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Print what a checkpoint holds, from its headers: types, sizes, tied tensors, and how a fold would treat them."""
    from rich.table import Table
    from rich.text import Text

    from merganser.checkpoints import open_source
    from merganser.continual.roles import assign_roles, count_roles

    source = open_source(ref)
    roles = assign_roles(source)
    out = console()
    total = sum(info.numel for info in source.infos.values())
    summary = f": {len(source.infos)} tensors, {total:,} parameters, {size(_bytes(source))}"
    out.print(Text.assemble((ref, "bold"), summary))
    out.print(f"types  {', '.join(sorted({info.dtype for info in source.infos.values()}))}")
    out.print(f"roles  {', '.join(f'{n} {role}' for role, n in count_roles(roles).items())}")
    for alias, name in source.aliases.items():
        out.print(f"tied   {alias} = {name}")
    if tensors:
        table = Table("tensor", "shape", "type", "role", box=None)
        for name, info in source.infos.items():
            table.add_row(name, str(info.shape), info.dtype, roles[name])
        out.print(table)


def convert(
    ref: Annotated[str, typer.Argument(help="A checkpoint: folder, file, hub id, BASE+ADAPTER.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="F32, BF16, F16 or F64 for floating tensors.")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW", help="Replace a prefix of names.")] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Begin the next file at this size in bytes.")] = 5_000_000_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Write a checkpoint as safetensors: from torch files, in another type, with an adapter applied, renamed."""
    from merganser.checkpoints.copying import copy_checkpoint

    with progress_bar("writing") as progress:
        copy_checkpoint(
            ref, out, dtype=dtype, rename=rename or (), shard_bytes=shard_bytes, overwrite=overwrite, progress=progress
        )
    console().print(f"{out}: written")


def _bytes(source: object) -> int:
    return sum(info.nbytes for info in source.infos.values())  # type: ignore[attr-defined]

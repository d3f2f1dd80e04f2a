"""`merganser merge` and `merganser plan`: one model from several, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.show import console, progress_bar

if TYPE_CHECKING:
    from merganser.merging.merged import Merged

RecipeFile = Annotated[Path, typer.Argument(help="A YAML file, in our language or in mergekit's.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Warn of unknown keys, which mergekit ignores.")]
Memory = Annotated[int, typer.Option(help="MB that the merge may take beside what Python takes; larger chunks.")]


def merge(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    lenient: Lenient = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted merge of the same recipe left.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that was made here.")] = False,
    threads: Annotated[int | None, typer.Option(help="Tensors at a time; all processors by default.")] = None,
    shard_bytes: Annotated[int, typer.Option(help="Bytes at which the next file is begun.")] = 5_000_000_000,
) -> None:
    """Merge several models into one, tensor by tensor, in constant memory.

    The recipe names a method (`merganser methods` lists them), the models and the settings:

        method: ties
        base: path/to/base
        models:
        - model: path/to/math
          weight: 0.6
          density: 0.4
        - path/to/code

    Recipes written for mergekit-yaml are understood as they are. `merganser plan RECIPE` shows what would be done.
    """
    from merganser.merging.run import run

    merged = _planned(recipe, lenient)
    with progress_bar("merging") as progress:
        run(
            merged,
            out,
            shard_bytes=shard_bytes,
            threads=threads,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    console().print(f"wrote {out}", soft_wrap=True)


def plan(recipe: RecipeFile, lenient: Lenient = False) -> None:
    """Show what a recipe would do: tensors by kind, output size and peak memory; only headers are read."""
    from rich.table import Table

    from merganser.continual.stream import default_threads
    from merganser.merging.run import job_bytes

    merged = _planned(recipe, lenient)
    planned = merged.plan
    table = Table("role", "tensors", "bytes", box=None)
    for role in dict.fromkeys(t.role for t in planned.tensors.values()):
        tensors = [t for t in planned.tensors.values() if t.role == role]
        table.add_row(role, str(len(tensors)), f"{sum(t.info.nbytes for t in tensors):,}")
    out = console()
    out.print(f"{planned.recipe.method} ({planned.recipe.dialect}) of {', '.join(planned.recipe.refs)}", soft_wrap=True)
    out.print(table)
    peak = sum(sorted((job_bytes(merged, n) for n in planned.tensors), reverse=True)[: default_threads()])
    out.print(f"output {planned.output_bytes:,} bytes; at most {peak:,} bytes of memory beside Python and torch")
    for stack, count in planned.layers.items():
        out.print(f"{count} layers {stack}*")


def _planned(recipe: Path, lenient: bool) -> Merged:
    from merganser.merging.native import read_recipes
    from merganser.merging.run import plan_recipes

    recipes, warnings = read_recipes(recipe, lenient=lenient)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    return plan_recipes(recipes)

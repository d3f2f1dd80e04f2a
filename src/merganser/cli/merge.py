"""`merganser merge` and `merganser plan`: one model from several, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merganser.cli.clusters import Ray, ShardBytes, Workers, refuse_workers
from merganser.cli.show import console, progress_bar

if TYPE_CHECKING:
    from merganser.merging.adapter_plan import AdapterMerge
    from merganser.merging.merged import Merged
    from merganser.merging.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(help="A YAML file, in our language or in mergekit's.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Warn of unknown keys, which mergekit ignores.")]
Memory = Annotated[
    int | None, typer.Option(min=1, metavar="MB", help="Memory that it may take beside Python and torch.")
]


def merge(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    lenient: Lenient = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted merge of the same recipe left.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that was made here.")] = False,
    threads: Annotated[int | None, typer.Option(help="Tensors at a time; all processors by default.")] = None,
    memory: Memory = None,
    digests: Annotated[
        bool,
        typer.Option(
            help="Put the sha256 of every tensor that is read into the receipt; hashing is half the work of a mean."
        ),
    ] = True,
    shard_bytes: ShardBytes = 5_000_000_000,
    ray: Ray = None,
    workers: Workers = None,
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

    With `adapter: {rank: 16}` (or `keep`) the models are LoRA adapters, merged with each other, and so is the output.

    Recipes written for mergekit-yaml are understood as they are. `merganser plan RECIPE` shows what would be done.
    """
    from merganser.merging.adapter_plan import AdapterMerge
    from merganser.merging.run import plan_any, run

    refuse_workers(workers, ray)
    recipes = _read(recipe, lenient)
    memory_bytes = None if memory is None else memory * 1_000_000
    options: dict[str, Any] = {"shard_bytes": shard_bytes, "resume": resume, "overwrite": overwrite}
    if ray is not None:
        from merganser.merging.cluster import merge_on, refuse
        from merganser.merging.cluster_ray import connected
        from merganser.merging.cluster_tasks import Limits

        limits = Limits(workers=workers, threads=threads, memory_bytes=memory_bytes)
        refuse(recipes, out, overwrite=overwrite)  # before any process is begun
        with connected(ray, workers=workers, threads=threads) as tasks, progress_bar("merging") as progress:
            merge_on(tasks, recipes, out, limits=limits, digests=digests, progress=progress, **options)
        console().print(f"wrote {out}", soft_wrap=True)
        return
    merged = plan_any(recipes, digests=digests)
    with progress_bar("merging") as progress:
        run(merged, out, threads=threads, memory_bytes=memory_bytes, progress=progress, **options)
    console().print(f"wrote {out}", soft_wrap=True)
    if isinstance(merged, AdapterMerge):
        _print_errors(out)


def plan(recipe: RecipeFile, lenient: Lenient = False) -> None:
    """Show what a recipe would do: tensors by kind, output size and peak memory; only headers are read."""
    from rich.table import Table

    from merganser.continual.stream import default_threads
    from merganser.merging.adapter_plan import AdapterMerge
    from merganser.merging.run import peak_bytes

    merged = _planned(recipe, lenient)
    if isinstance(merged, AdapterMerge):
        _print_adapters(merged)
        return
    planned = merged.plan
    table = Table("role", "tensors", "bytes", box=None)
    for role in dict.fromkeys(t.role for t in planned.tensors.values()):
        tensors = [t for t in planned.tensors.values() if t.role == role]
        table.add_row(role, str(len(tensors)), f"{sum(t.info.nbytes for t in tensors):,}")
    out = console()
    out.print(f"{planned.recipe.method} ({planned.recipe.dialect}) of {', '.join(planned.recipe.refs)}", soft_wrap=True)
    out.print(table)
    peak = peak_bytes(merged, default_threads())
    out.print(f"output {planned.output_bytes:,} bytes; at most {peak:,} bytes of memory beside Python and torch")
    for stack, count in planned.layers.items():
        out.print(f"{count} layers {stack}*")


def _print_adapters(merge: AdapterMerge) -> None:
    from rich.table import Table

    from merganser.continual.stream import default_threads
    from merganser.merging.adapter_out import infos_of
    from merganser.merging.run import peak_bytes

    out, recipe = console(), merge.recipe
    out.print(f"{recipe.method} ({recipe.dialect}) of {', '.join(a.ref for a in merge.adapters)}", soft_wrap=True)
    table = Table("changed", "tensors", "ranks in", "rank out", box=None)
    for kind in dict.fromkeys(t.kind for t in merge.targets.values()):
        targets = [t for t in merge.targets.values() if t.kind == kind]
        limits, ranks = {t.limit for t in targets}, {merge.ranks.get(t.name, 0) for t in targets}
        shown = (f"{min(x)} to {max(x)}" if len(x) > 1 else str(max(x)) for x in (limits, ranks))
        word = {"core": "low rank", "bias": "bias of B", "whole": "whole"}[kind]
        table.add_row(word, str(len(targets)), *(shown if kind == "core" else ("", "")))
    out.print(table)
    peak = peak_bytes(merge, default_threads())
    size = sum(info.nbytes for info in infos_of(merge).values())
    out.print(f"output {size:,} bytes; at most {peak:,} bytes of memory beside Python and torch")


def _print_errors(out: Path) -> None:
    import json

    from merganser.checkpoints.writer import RECEIPT_NAME

    found = json.loads((out / RECEIPT_NAME).read_text("utf-8"))["adapter"]
    name, worst = max(found["weights"].items(), key=lambda item: item[1]["truncation_error"])
    console().print(
        f"truncation error {found['truncation_error']:.3g}; the largest of a weight {worst['truncation_error']:.3g}, "
        f"at {name}",
        soft_wrap=True,
    )


def _planned(recipe: Path, lenient: bool) -> Merged | AdapterMerge:
    from merganser.merging.run import plan_any

    return plan_any(_read(recipe, lenient))


def _read(recipe: Path, lenient: bool) -> tuple[Recipe, ...]:
    from merganser.merging.native import read_recipes

    recipes, warnings = read_recipes(recipe, lenient=lenient)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    return recipes

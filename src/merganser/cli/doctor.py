"""`merganser doctor`: what speaks against a recipe, before anything is merged."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merganser.cli.diff import check_file, number, shown, write_file
from merganser.cli.show import console, counted, progress_bar

if TYPE_CHECKING:
    from merganser.merging.doctor import Examination

#: Pairs, and findings of one kind, that are printed; the file of --json holds all.
PAIRS = 12
FINDINGS = 3


def doctor(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, in our language or in mergekit's.")],
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Warn of unknown keys, which mergekit ignores.")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Look at so many layers of each stack only, evenly spread.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Tensors at a time; all processors by default.")] = None,
) -> None:
    """Examine the models of a recipe before merging them, and say what to do about what is found.

    It looks for changes of very different size, models that are equal, opposing signs, shared input directions,
    interfering singular vectors, densities that keep next to nothing, changes that the output's type rounds away, NaN,
    and configs that differ. Exit code 0: nothing found; 1: warnings; 2: the recipe cannot be merged.
    """
    from merganser.merging.doctor import examine, gravest
    from merganser.merging.native import read_recipes
    from merganser.merging.run import plan_recipes

    recipes, warnings = read_recipes(recipe, lenient=lenient)
    if json is not None:
        check_file(json, [str(recipe), *(ref for one in recipes for ref in (*one.refs, *one.statistics))])
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    merged = plan_recipes(recipes, digests=False)
    with progress_bar("reading") as progress:
        found = examine(merged, layers=layers, threads=threads, progress=progress)
    if json is not None:
        write_file(json, json_.dumps([numbers(one) for one in found], indent=1, allow_nan=False).encode() + b"\n")
    for one in found:
        _print(one)
    if json is not None:
        console().print(f"{json}: written")
    if code := gravest(found):
        raise typer.Exit(code)


def numbers(one: Examination) -> dict[str, Any]:
    """Everything that was found of a recipe, as JSON holds it."""
    conflicts = one.conflicts
    return {
        "recipe": one.name,
        "method": one.method,
        "tensors": conflicts.tensors,
        "findings": [
            {
                "kind": f.kind,
                "message": f.message,
                "advice": f.advice,
                "models": list(f.models),
                "figures": {name: number(value) for name, value in f.figures.items()},
                "fatal": f.fatal,
            }
            for f in one.findings
        ],
        "notes": list(one.notes),
        "models": {
            label: {
                "norm": number(m.norm),
                "weighted_norm": number(m.weighted),
                "base_norm": number(m.base),
                "changed": m.changed,
                "below_resolution": m.lost,
            }
            for label, m in conflicts.models.items()
        },
        "pairs": [
            {
                "models": list(labels),
                "equal": p.equal,
                "cosine": number(p.cosine),
                "opposing": number(p.opposing),
                "overlap": number(p.overlap),
                "overlap_chance": number(p.chance),
            }
            for labels, p in conflicts.pairs.items()
        ],
        "layers": {
            name: {
                "overlap": [{"models": list(pair), "overlap": x} for pair, x in layer.overlap.items()],
                "left": layer.left,
                "right": layer.right,
                "left_share": layer.left_share,
                "right_share": layer.right_share,
                "left_chance": layer.left_chance,
                "right_chance": layer.right_chance,
            }
            for name, layer in conflicts.layers.items()
        },
    }


def _print(one: Examination) -> None:
    from rich.table import Table

    from merganser.merging.doctor import mean_interference

    out, conflicts = console(), one.conflicts
    models = counted(len(conflicts.models), "model")
    out.print(f"{one.name}: {one.method} of {models}, {counted(conflicts.tensors, 'tensor')}", soft_wrap=True)
    if any(m.base for m in conflicts.models.values()):
        table = Table("model", "norm of the change", "weighted", "relative", "below resolution", box=None)
        for label, m in conflicts.models.items():
            lost = f"{m.lost / m.changed:.1%}" if m.changed else "-"
            table.add_row(label, shown(m.norm), shown(m.weighted), shown(m.norm / m.base if m.base else None), lost)
        out.print(table)
        table = Table("pair", "cosine", "opposing", "overlap", "chance", box=None)
        pairs = sorted(conflicts.pairs.items(), key=lambda item: -(item[1].opposing or 0.0))
        for labels, p in pairs[:PAIRS]:
            figures = (shown(x, ".3f") for x in (p.cosine, p.opposing, p.overlap, p.chance))
            table.add_row(" & ".join(labels), *figures)
        if pairs:
            out.print(table)
        if len(pairs) > PAIRS:
            out.print(f"{PAIRS} of {counted(len(pairs), 'pair')}; --json writes all")
    if conflicts.layers:
        means = mean_interference(conflicts.layers)
        out.print(
            f"interference over {counted(len(conflicts.layers), 'linear weight')}: ||U^T U - I|| {means['left']:.3g}, "
            f"||V^T V - I|| {means['right']:.3g}; shares {means['left_share']:.2f} and {means['right_share']:.2f}, "
            f"chance {means['left_chance']:.2f} and {means['right_chance']:.2f}",
            soft_wrap=True,
        )
    for note in one.notes:
        out.print(f"note: {note}", soft_wrap=True)
    for kind in dict.fromkeys(finding.kind for finding in one.findings):
        findings = [finding for finding in one.findings if finding.kind == kind]
        for finding in findings[:FINDINGS]:
            word = "error" if finding.fatal else "warning"
            out.print(f"{word} [{kind}]: {finding.message}\n  do: {finding.advice}", soft_wrap=True)
        if len(findings) > FINDINGS:
            out.print(f"and {len(findings) - FINDINGS} more [{kind}]; --json writes all")
    if not one.findings:
        out.print("healthy: nothing found")

"""`merganser diff`: what changed from one model to another."""

from __future__ import annotations

import json as json_
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merganser.cli.show import console, counted, progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merganser.merging.difference import Change, Difference, Summary


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="The first model: folder, file, hub id, BASE+ADAPTER.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second model; an adapter is applied to A.")],
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw a bar a layer, as PNG.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the most changed tensors to print.")] = 20,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="PATTERN", help="Leave tensors out, such as 'lm_head.*'.")
    ] = None,
    rank: Annotated[
        bool, typer.Option("--rank/--no-rank", help="Measure effective ranks, which takes longest.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="Tensors at a time; all processors by default.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Show what changed from A to B, by tensor and by layer.

    Of every tensor: the norm of the change, the same over the norm in A, the cosine of the two, the largest entry of
    the change, and for linear weights the effective rank of the change: exp(-sum p ln p), where p are the squared
    singular values over their sum. A change of r equally strong directions has r.

    merganser diff path/to/base path/to/tuned --plot diff.png
    """
    for path in filter(None, (plot, json)):
        check_file(path, [a, b])
    if plot is not None:
        from merganser.report import blank_figure

        blank_figure(1, 1)  # says that matplotlib is missing before anything is read
    from merganser.checkpoints import open_source
    from merganser.merging.difference import difference

    first = open_source(a)
    second = open_source(b, base=first)
    with progress_bar("reading", quiet=quiet) as progress:
        found = difference(first, second, ignore=ignore or (), rank=rank, threads=threads, progress=progress)
    if plot is not None:
        write_file(plot, _bars(found))
    if json is not None:
        write_file(json, json_.dumps(_numbers(found), indent=1, allow_nan=False).encode() + b"\n")
    if not quiet:
        _print(found, top)
        for path in filter(None, (plot, json)):
            console().print(f"{path}: written")


def check_file(path: Path, inputs: Sequence[str]) -> None:
    """Refuse a file that cannot be written or is read, before any work.

    Args:
        path: of the file.
        inputs: references and files that the command reads.

    Raises:
        OutputError: If it is a folder, its folder is not there, or it is or lies within what is read.
    """
    from merganser.checkpoints.overlap import refuse_overlap
    from merganser.errors import OutputError

    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "no such folder"))
    refuse_overlap(path, inputs)


def write_file(path: Path, content: bytes) -> None:
    """Write a file of results.

    Raises:
        OutputError: If the disk does not take it.
    """
    from merganser.errors import OutputError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def number(value: float | None) -> float | None:
    """A number as JSON can hold it: null for NaN and infinity."""
    return value if value is not None and isfinite(value) else None


def shown(value: float | None, digits: str = ".3g") -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or value != value else format(value, digits)


def _numbers(found: Difference) -> dict[str, Any]:
    return {
        "a": found.a,
        "b": found.b,
        "total": _of_layer(found.total()),
        "layers": {layer.name: _of_layer(layer) for layer in found.layers()},
        "tensors": {change.name: _of_tensor(change) for change in found.changes},
        "only_in_a": list(found.only_a),
        "only_in_b": list(found.only_b),
    }


def _of_layer(layer: Summary) -> dict[str, Any]:
    return {
        "tensors": layer.tensors,
        "norm": number(layer.norm),
        "relative": number(layer.relative),
        "cosine": number(layer.cosine),
        "largest": number(layer.largest),
        "effective_rank": number(layer.effective_rank),
    }


def _of_tensor(change: Change) -> dict[str, Any]:
    return {
        "shape": list(change.info.shape),
        "norm": number(change.norm),
        "relative": number(change.relative),
        "cosine": number(change.cosine),
        "largest": number(change.largest),
        "effective_rank": number(change.effective_rank),
        "changed": change.changed,
        "nonfinite_in_a": change.nonfinite[0],
        "nonfinite_in_b": change.nonfinite[1],
    }


def _print(found: Difference, top: int) -> None:
    from rich.table import Table

    out = console()
    changed = sum(bool(change.changed) for change in found.changes)
    total = found.total()
    out.print(
        f"{changed} of {counted(len(found.changes), 'tensor')} changed from {found.a} to {found.b}: "
        f"norm {shown(total.norm)}, relative {shown(total.relative)}, cosine {shown(total.cosine, '.6f')}",
        soft_wrap=True,
    )
    for change in found.changes:
        if any(change.nonfinite):
            a, b = change.nonfinite
            out.print(f"NaN or infinity in {change.name}: {a} of A's values, {b} of B's", soft_wrap=True)
    for names, ref in ((found.only_a, found.a), (found.only_b, found.b)):
        for name in names:
            out.print(f"only in {ref}: {name}", soft_wrap=True)
    head = ("norm", "relative", "cosine", "largest", "rank")
    if rows := found.most_changed(top):
        table = Table("most changed", "shape", *head, box=None)
        for change in rows:
            table.add_row(change.name, str(change.info.shape), *_cells(change))
        out.print(table)
    if changed:
        table = Table("layer", "tensors", *head[:-1], "mean rank", box=None)
        for layer in found.layers():
            table.add_row(layer.name, str(layer.tensors), *_cells(layer))
        out.print(table)


def _cells(row: Change | Summary) -> list[str]:
    return [
        shown(row.norm),
        shown(row.relative),
        shown(row.cosine, ".6f"),
        shown(row.largest),
        shown(row.effective_rank, ".1f"),
    ]


def _bars(found: Difference) -> bytes:
    """A bar a layer: how long its change is beside what it was."""
    from merganser.report import INK, PALETTE, blank_figure, png_of, quiet_axes

    layers = found.layers()
    figure = blank_figure(min(24.0, max(5.0, 1.2 + 0.26 * len(layers))), 4.2)
    axes = figure.add_subplot()
    stacks = list(dict.fromkeys(_stack(layer.name) for layer in layers))
    heights = [layer.relative if isfinite(layer.relative) else 0.0 for layer in layers]
    colors = [PALETTE[stacks.index(_stack(layer.name)) % len(PALETTE)] for layer in layers]
    axes.bar(range(len(layers)), heights, color=colors, width=0.8)
    every = 1 + len(layers) // 90
    axes.set_xticks(range(0, len(layers), every), labels=_labels(layers)[::every], rotation=90, fontsize=8)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylabel("norm of the change / norm in A", color=INK)
    quiet_axes(axes)
    axes.set_axisbelow(True)
    figure.tight_layout(pad=0.5)
    return png_of(figure)


def _stack(layer: str) -> str:
    """What numbered layers share; "" for what lies outside them."""
    stem, _, index = layer.rpartition(".")
    return stem if index.isdigit() else ""


def _labels(layers: Sequence[Summary]) -> list[str]:
    """The ends of the layers' names, which fit below bars."""
    return [layer.name if len(layer.name) <= 24 else f"…{layer.name[-23:]}" for layer in layers]

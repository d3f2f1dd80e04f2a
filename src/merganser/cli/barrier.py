"""`merganser barrier`: is there a ridge between two networks?"""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merganser.cli.files import check_file
from merganser.cli.show import console, counted, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from merganser.align.activations import Batch
    from merganser.align.barrier import Line


def barrier(
    one: Annotated[str, typer.Argument(metavar="ONE", help="The checkpoint at t = 0.")],
    others: Annotated[list[str], typer.Argument(metavar="OTHER...", help="One or more at t = 1, a line each.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="What they are weights of: a folder with a config.json, FILE.pt2, or code: FILE:NAME.",
        ),
    ],
    labelled: Annotated[
        str,
        typer.Option(metavar="FILE:NAME", help="Code that gives pairs of a batch of inputs and its classes."),
    ],
    points: Annotated[int, typer.Option(min=3, help="Places on a line, both ends among them; an odd number.")] = 11,
    reset: Annotated[bool, typer.Option("--reset", help="Measure BatchNorm anew at every place.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the lines, as PNG.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a FILE that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Judge networks on the straight line from ONE to each OTHER.

    Where the loss rises between them, their mean is no good, and no average of them is. `merganser align` often takes
    the ridge away; give both, before and after, to see it.

    merganser barrier a.pt b.pt aligned-b --model nets.py:resnet20 --labelled nets.py:labelled --plot barrier.png
    """
    from merganser.align.barrier import loss_line
    from merganser.checkpoints import open_source
    from merganser.cli.subject import loaded, running, subject
    from merganser.errors import OutputError, ParameterError

    if points % 2 == 0:
        raise ParameterError(f"--points is {points}: no place is in the middle", f"--points {points + 1}")
    if twice := next((other for i, other in enumerate(others) if other in others[:i]), None):
        raise ParameterError(f"{twice} is given twice", "name every OTHER once")
    for path, own in ((plot, None), (json, _lines)):
        if path is not None:
            check_file(path, [one, *others, model, labelled], overwrite=overwrite, own=own)
    if plot is not None and json is not None and plot.resolve() == json.resolve():
        raise OutputError(f"{plot} cannot be both the plot and the numbers", "name two files")
    given = labelled_of(labelled)
    it = subject(model, None, given[0][0])
    first = loaded(it.network, open_source(one))
    lines: dict[str, Line] = {}
    for other in others:
        second = loaded(it.network, open_source(other))
        with progress_bar(other, quiet=quiet, unit="places") as progress, running(model):
            lines[other] = loss_line(
                first, first.state_dict(), second.state_dict(), given, points=points, reset=reset, progress=progress
            )
    if plot is not None:
        from merganser.report import line_png

        stems = [Path(other).stem for other in lines]
        names = {other: stem if stems.count(stem) == 1 else other for other, stem in zip(lines, stems, strict=True)}
        curves = {names[other]: (line.places, line.losses) for other, line in lines.items()}
        plot.write_bytes(line_png(curves, x_label=f"t, from {Path(one).stem}", y_label="cross entropy, nats"))
    if json is not None:
        json.write_text(json_.dumps({other: _numbers(line) for other, line in lines.items()}, indent=1) + "\n", "utf-8")
    if not quiet:
        _print(lines, plot)


def labelled_of(name: str) -> list[tuple[Batch, Tensor]]:
    """What `path/file.py:name` gives, as batches and their classes.

    Raises:
        RefError: If there is no such file or name.
        ParameterError: If what it gives is no such list.
    """
    import torch

    from merganser.cli.subject import as_batch, given_by
    from merganser.errors import ParameterError

    found: list[tuple[Batch, Tensor]] = []
    for pair in given_by(name):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], torch.Tensor)):
            raise ParameterError(f"{name} gives a {type(pair).__name__}; it must give pairs of inputs and classes")
        if pair[1].is_floating_point() or pair[1].is_complex():
            raise ParameterError(f"{name} gives classes of {pair[1].dtype}; they are whole numbers", "classes.long()")
        found.append((as_batch(name, pair[0]), pair[1]))
    if not found:
        raise ParameterError(f"{name} gives no batch")
    return found


def _lines(content: object) -> bool:
    """Whether JSON is what this command writes."""
    wanted = {"t", "loss", "accuracy", "items", "barrier", "at"}
    lines = list(content.values()) if isinstance(content, dict) else []
    return bool(lines) and all(isinstance(line, dict) and line.keys() == wanted for line in lines)


def _numbers(line: Line) -> dict[str, Any]:
    height, place = line.barrier
    return {
        "t": line.places,
        "loss": line.losses,
        "accuracy": line.accuracies,
        "items": line.items,
        "barrier": height,
        "at": place,
    }


def _print(lines: dict[str, Line], plot: Path | None) -> None:
    from rich.table import Table

    out = console()
    table = Table("to", "loss at the ends", "in the middle", "accuracy there", "barrier", "at t", box=None)
    for other, line in lines.items():
        middle = len(line.places) // 2
        height, place = line.barrier
        table.add_row(
            other,
            f"{line.losses[0]:.3f}, {line.losses[-1]:.3f}",
            f"{line.losses[middle]:.3f}",
            f"{line.accuracies[middle]:.1f} %",
            f"{height:.3f}",
            f"{place:.2f}",
        )
    out.print(table)
    out.print(f"{counted(next(iter(lines.values())).items, 'example')}; cross entropy in nats")
    if plot is not None:
        out.print(f"{plot}: written")

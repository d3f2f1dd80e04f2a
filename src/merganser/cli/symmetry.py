"""`merganser symmetry`: which orders of a network's units leave it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.files import check_file
from merganser.cli.show import console, counted

if TYPE_CHECKING:
    from merganser.cli.subject import Subject
    from merganser.symmetry import Symmetries

app = typer.Typer(help="Permutation symmetries of any network, found by tracing one run of it.", no_args_is_help=True)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a config.json, a program of torch.export (FILE.pt2), or code that gives a network: "
        "package.module:name, path/file.py:name.",
    ),
]
Input = Annotated[
    str | None, typer.Option("--input", metavar="2,3,32,32", help="Shape of one input, where MODEL gives none.")
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="See in float64 that random orders leave the output as it is.")
]


@app.command()
def show(
    model: Model,
    shape: Input = None,
    check: Check = True,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write them to a file as well.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="List every axis that cannot move, and why.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a FILE that is there and holds no symmetries.")
    ] = False,
) -> None:
    """Print the groups of units that may change places, what share of the parameters they move, and what is fixed.

    Weights are not needed: what may move is a matter of the network alone. The command runs the code of MODEL.

    merganser symmetry show path/to/checkpoint
    merganser symmetry show my_networks.py:resnet20 --input 2,3,32,32 --json resnet20.json
    """
    if json is not None:
        check_file(json, [model], overwrite=overwrite, own=_symmetries)
    found = traced(model, shape, check=check)
    _print(found, pinned=pinned)
    if json is not None:
        json.write_text(found.spec.to_json() + "\n", "utf-8")
        console().print(f"{json}: written")
    if found.unsound:
        raise typer.Exit(1)


def traced(model: str, shape: str | None, *, check: bool = True) -> Symmetries:
    """The symmetries of what MODEL names.

    Raises:
        MerganserError: If it names nothing that can be run.
    """
    from merganser.cli.subject import subject

    return found_in(model, subject(model, shape_of(shape)), check=check)


def shape_of(shape: str | None) -> tuple[int, ...] | None:
    """Sizes written as 2,3,32,32.

    Raises:
        ParameterError: If it is no shape.
    """
    from merganser.errors import ParameterError

    try:
        sizes = tuple(int(n) for n in shape.split(",")) if shape else None
    except ValueError as error:
        raise ParameterError(f"--input is {shape!r}; it is a shape such as 2,3,32,32") from error
    if sizes and min(sizes) < 1:
        raise ParameterError(f"--input is {shape!r}; sizes are at least 1")
    return sizes


def found_in(model: str, it: Subject, *, check: bool = True) -> Symmetries:
    """The symmetries of a subject.

    Raises:
        ParameterError: If it cannot be run.
    """
    from merganser.cli.subject import line_of
    from merganser.errors import MerganserError, ParameterError
    from merganser.symmetry import symmetries

    try:
        return symmetries(it.network, it.args, it.kwargs, output=it.output, check=check)
    except MerganserError:
        raise
    except Exception as error:  # whatever the code of a network does
        said = str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
        raise ParameterError(
            f"{model} cannot be run on these inputs: {said}{line_of(error)}", "give others with --input"
        ) from error


def _symmetries(content: object) -> bool:
    """Whether JSON is what `show` writes."""
    return isinstance(content, dict) and {"groups", "axes", "roles", "pinned"} <= content.keys()


def _print(found: Symmetries, *, pinned: bool) -> None:
    from collections import Counter

    from rich.table import Table

    spec, out = found.spec, console()
    table = Table("group", "units", "", "moves", box=None, pad_edge=False)
    for name, group in spec.groups.items():
        members = [f"{tensor}[{axis}]" for tensor, axis in spec.members(name)]
        more = f" and {len(members) - 2} more" if len(members) > 2 else ""
        place = "fixed" if group.fixed else f"within {group.within}" if group.within else ""
        table.add_row(name, str(group.size), place, ", ".join(members[:2]) + more)
    out.print(table)
    sound = "self-check passed" if found.checked else "not checked"
    if found.unsound:
        sound = f"the self-check refused {len(found.unsound)}"
    count = sum(not group.fixed for group in spec.groups.values())
    moves = "1 group moves" if count == 1 else f"{count} groups move"
    out.print(f"{moves} {found.coverage:.1%} of the parameters; {sound}")
    for name in found.unsound:
        out.print(f"refused by the self-check: {name}")
    for op in found.unknown:
        out.print(f"no rule for {op}: what it met is fixed")
    for name in found.unused:
        out.print(f"not used in this run, and fixed: {name}")
    if pinned:
        for place, why in spec.pinned.items():
            out.print(f"{place}: {why}")
    else:
        for why, count in Counter(spec.pinned.values()).most_common(5):
            out.print(f"fixed  {counted(count, 'axis')}: {why}")

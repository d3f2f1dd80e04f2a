"""`merganser align`: bring a checkpoint into the order of units of another."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from merganser.cli.show import console, progress_bar
from merganser.cli.symmetry import Input, traced


class Alike(str, Enum):
    """How units are compared."""

    frobenius = "frobenius"
    pearson = "pearson"


def align(
    stays: Annotated[str, typer.Argument(metavar="STAYS", help="The checkpoint whose order counts.")],
    moves: Annotated[str, typer.Argument(metavar="MOVES", help="The one that is brought into that order.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make: MOVES in the other order, as good as before.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What both are weights of; default: STAYS, if it has a config.json."),
    ] = None,
    symmetry: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Symmetries from `merganser symmetry show --json`, instead.")
    ] = None,
    shape: Input = None,
    similarity: Annotated[
        Alike, typer.Option(help="frobenius: inner products; pearson: correlations, blind to size.")
    ] = Alike.frobenius,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which groups are taken.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Permute the units of MOVES so that its weights are as near as possible to those of STAYS.

    Networks that started apart hold the same things in other places; merge them after this. The function of MOVES does
    not change. Only weights are looked at.

    merganser align models/a models/b aligned-b
    merganser align a.pt b.pt aligned-b --model my_networks.py:resnet20 --input 2,3,32,32
    """
    from merganser.align.aligning import Reordered
    from merganser.align.aligning import align as find
    from merganser.checkpoints import open_source
    from merganser.checkpoints.copying import write_source
    from merganser.checkpoints.overlap import refuse_overlap
    from merganser.errors import OutputError, ParameterError, RefError
    from merganser.symmetry import Spec

    if model is not None and symmetry is not None:
        raise ParameterError("--model and --symmetry both say what may move", "give one of them")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists", "name another folder, or add --overwrite")
    refuse_overlap(out, [stays, moves])
    one, two = open_source(stays), open_source(moves)
    if symmetry is not None:
        if not symmetry.is_file():
            raise RefError(f"{symmetry} does not exist", "merganser symmetry show MODEL --json FILE")
        try:
            spec = Spec.from_json(symmetry.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ParameterError(f"{symmetry} is no file of symmetries: {error}") from error
    else:
        traces = traced(model or stays, shape)
        spec = traces.spec
        for name in traces.unsound:
            console().print(f"refused by the self-check, and left as it is: {name}")
    with progress_bar("matching", quiet=quiet, unit="groups") as progress:
        found = find(spec, one, two, similarity=similarity.value, seed=seed, progress=progress)
    receipt = {
        "stays": stays,
        "moves": moves,
        "similarity": similarity.value,
        "seed": seed,
        "sweeps": found.matched.sweeps,
        "settled": found.matched.settled,
        "distance_before": found.before,
        "distance_after": found.after,
        "orders": {name: order.tolist() for name, order in found.matched.orders.items()},
    }
    with progress_bar("writing", quiet=quiet) as progress:
        write_source(Reordered(two, spec, found.matched.orders), out, receipt, overwrite=overwrite, progress=progress)
    if not quiet:
        distance = f"distance {found.before:.4g} -> {found.after:.4g}"
        console().print(f"{found.matched.sweeps} sweeps over {len(spec.groups)} groups: {distance}")
        console().print(f"{out}: written")

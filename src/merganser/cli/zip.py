"""`merganser zip`: one network from several that started apart, by joining their units."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merganser.cli.given import refuse_unused
from merganser.cli.inputs import Data, Examples, PixelScale, refuse_two, with_inputs
from merganser.cli.network import check_out, write_network
from merganser.cli.show import console, counted
from merganser.cli.symmetry import Input, found_in, shape_of


def zip_(
    ctx: typer.Context,
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Two or more, of one architecture and size.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="What they are weights of: a folder with a config.json, FILE.pt2, or code: FILE:NAME.",
        ),
    ],
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME", help="Code that gives batches of inputs of all tasks; labels are not needed."
        ),
    ] = None,
    data: Data = None,
    examples: Examples = 1000,
    scale: PixelScale = None,
    shape: Input = None,
    repeat: Annotated[
        float,
        typer.Option(help="Discount of units that were joined before, in (0, 1]; 1 joins whatever is most alike."),
    ] = 0.5,
    within: Annotated[
        float, typer.Option(help="Share of a network's joins that may be between its own units, in [0, 1].")
    ] = 1.0,
    balance: Annotated[
        float, typer.Option(help="Share of the weights in what is alike, in [0, 1]; 0 is ZipIt, above it MuDSC.")
    ] = 0.0,
    repairs: Annotated[
        bool, typer.Option("--repair", help="Without BatchNorm: give layers their parents' means and deviations back.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which groups are taken.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Correlate the units of several networks on data, join those that are most alike, and write one network.

    Unlike `merganser align`, units of one network may be joined with each other, which leaves room for those that the
    other network lacks. The command runs the code that MODEL and --batches name.

    merganser zip a.pt b.pt --model nets.py:resnet20 --batches nets.py:batches --out zipped
    """
    from merganser.align.zipping import zip_networks
    from merganser.checkpoints import open_source
    from merganser.cli.batches import check_batches
    from merganser.cli.subject import loaded, running
    from merganser.errors import ParameterError

    refuse_two(ctx, batches, data)
    if batches is None and not data:
        raise ParameterError("there are no inputs to run the networks on", "--batches FILE:NAME, or --data DIR")
    if batches is not None:
        refuse_unused(ctx, ("shape",), "has no use with --batches, which are of some shape", "leave it out")
    check_out(out, [*checkpoints, *map(str, data or ())], model, overwrite=overwrite)
    sources = [open_source(ref) for ref in checkpoints]
    it, inputs = with_inputs(model, shape_of(shape), batches, data, examples, scale)
    assert inputs is not None
    check_batches(inputs)
    networks = [loaded(it.network, source) for source in sources]
    found = found_in(model, it)
    with running(model):
        merged = zip_networks(
            found, networks, inputs, repeat=repeat, within=within, balance=balance, repairs=repairs, seed=seed
        )
    settings = {"repeat": repeat, "within": within, "balance": balance, "repair": repairs, "seed": seed}
    write_network(merged, out, sources[0], {"zipped": checkpoints, **settings}, overwrite=overwrite)
    if not quiet:
        groups = sum(not g.fixed for g in found.spec.groups.values())
        said = (counted(len(checkpoints), "network"), counted(groups, "group"), counted(len(inputs), "batch"))
        console().print(", ".join(said))
        console().print(f"{out}: written")

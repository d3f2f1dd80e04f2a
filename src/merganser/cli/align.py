"""`merganser align`: bring a checkpoint into the order of units of another."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.given import refuse_unused, was_given
from merganser.cli.inputs import Data, Examples, PixelScale, refuse_two, with_inputs
from merganser.cli.network import check_out
from merganser.cli.show import console, counted, progress_bar
from merganser.cli.symmetry import Input, found_in, shape_of

if TYPE_CHECKING:
    from merganser.align.activations import ActivationCosts


class Alike(str, Enum):
    """How units are compared."""

    frobenius = "frobenius"
    pearson = "pearson"


class Method(str, Enum):
    """What units are compared by."""

    weight = "weight"
    activation = "activation"
    dual = "dual"
    zip = "zip"


def align(
    ctx: typer.Context,
    stays: Annotated[str, typer.Argument(metavar="STAYS", help="The checkpoint whose order counts.")],
    moves: Annotated[str, typer.Argument(metavar="MOVES", help="The one that is brought into that order.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make: MOVES in the other order, as good as before.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What both are weights of: a folder with a config.json, FILE.pt2, or code: FILE:NAME; default: STAYS, "
            "if it has a config.json.",
        ),
    ] = None,
    symmetry: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Symmetries from `merganser symmetry show --json`, instead.")
    ] = None,
    shape: Input = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="weight: weights alone, as Git Re-Basin; activation: what units do, on --batches or --data; dual: "
            "both, as MuDSC; zip: what merganser zip does. Default: dual where there are inputs, else weight."
        ),
    ] = None,
    similarity: Annotated[
        Alike, typer.Option(help="frobenius: inner products; pearson: correlations, blind to size.")
    ] = Alike.frobenius,
    batches: Annotated[
        str | None,
        typer.Option(metavar="FILE:NAME", help="Code that gives batches of inputs: compare what units do, too."),
    ] = None,
    data: Data = None,
    examples: Examples = 1000,
    scale: PixelScale = None,
    balance: Annotated[
        float, typer.Option(help="With inputs: share of the weights, in [0, 1]; 0 looks at activations alone.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which groups are taken.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Permute the units of MOVES so that its weights are as near as possible to those of STAYS.

    Networks that started apart hold the same things in other places; merge them after this. The function of MOVES does
    not change. Only weights are looked at, and with --batches or --data also what the units do.

    merganser align models/a models/b aligned-b
    merganser align a.pt b.pt aligned-b --model my_networks.py:resnet20 --input 2,3,32,32
    """
    from merganser.align.activations import activation_costs
    from merganser.align.aligning import Reordered
    from merganser.align.aligning import align as find
    from merganser.checkpoints import open_source
    from merganser.checkpoints.copying import write_source
    from merganser.checkpoints.views import renamed
    from merganser.cli.batches import check_batches
    from merganser.cli.stored import shown_as, stored_names
    from merganser.cli.subject import loaded, running
    from merganser.cli.zip import zip_
    from merganser.errors import ParameterError, RefError
    from merganser.symmetry import Spec

    inputs_there = batches is not None or bool(data)
    refuse_two(ctx, batches, data)
    if symmetry is not None and (model is not None or inputs_there):
        what = "--model" if model is not None else "--batches" if batches is not None else "--data"
        raise ParameterError(f"{what} needs a network to run, and --symmetry brings none", "leave --symmetry out")
    if symmetry is not None:
        refuse_unused(ctx, ("shape",), "is for a network to run, and --symmetry brings none", "leave one of both out")
    balance = _balance(ctx, method, balance, inputs_there=inputs_there)
    if not inputs_there:
        refuse_unused(ctx, ("balance",), "weighs weights against what units do", "give --batches FILE:NAME, too")
    else:
        refuse_unused(ctx, ("similarity",), "is for weights alone; with inputs it is pearson", "leave it out")
    if batches is not None:
        refuse_unused(ctx, ("shape",), "has no use with --batches, which are of some shape", "leave it out")
    if method is Method.zip:
        zip_(
            ctx,
            [stays, moves],
            out,
            model or stays,
            batches,
            data,
            examples,
            scale,
            shape,
            balance=balance,
            seed=seed,
            overwrite=overwrite,
            quiet=quiet,
        )
        return
    check_out(out, [stays, moves, *map(str, data or ())], model, overwrite=overwrite)
    one, two = open_source(stays), open_source(moves)
    names: dict[str, str] = {}  # of the network's tensors in MOVES, where it calls them otherwise
    seen: ActivationCosts | None = None
    if symmetry is not None:
        if not symmetry.is_file():
            raise RefError(f"{symmetry} does not exist", "merganser symmetry show MODEL --json FILE")
        try:
            spec = Spec.from_json(symmetry.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ParameterError(f"{symmetry} is no file of symmetries: {error}") from error
    else:
        it, inputs = with_inputs(model or stays, shape_of(shape), batches, data, examples, scale)
        check_batches(inputs or [])
        traces = found_in(model or stays, it)
        spec = traces.spec
        names = stored_names(it.network, two)
        one, two = shown_as(it.network, one), shown_as(it.network, two)
        if inputs:
            first, second = loaded(it.network, one), loaded(it.network, two)
            with running(model or stays):
                seen = activation_costs(traces, first, second, inputs)
        for name in traces.unsound:
            console().print(f"refused by the self-check, and left as it is: {name}")
    with progress_bar("matching", quiet=quiet, unit="groups") as progress:
        found = find(
            spec,
            one,
            two,
            similarity=similarity.value,
            activations=seen,
            balance=balance,
            seed=seed,
            progress=progress,
        )
    receipt = {
        "stays": stays,
        "moves": moves,
        "similarity": "pearson" if inputs_there else similarity.value,
        "batches": batches or list(map(str, data or ())) or None,
        "balance": balance if inputs_there else None,
        "seed": seed,
        "sweeps": found.matched.sweeps,
        "settled": found.matched.settled,
        "distance_before": found.before,
        "distance_after": found.after,
        "orders": {name: order.tolist() for name, order in found.matched.orders.items()},
    }
    with progress_bar("writing", quiet=quiet) as progress:
        moved = renamed(Reordered(two, spec, found.matched.orders), lambda name: names.get(name, name))
        write_source(moved, out, receipt, overwrite=overwrite, progress=progress)
    if not quiet:
        distance = f"distance {found.before:.4g} -> {found.after:.4g}"
        console().print(
            f"{counted(found.matched.sweeps, 'sweep')} over {counted(len(spec.groups), 'group')}: {distance}"
        )
        console().print(f"{out}: written")


def _balance(ctx: typer.Context, method: Method | None, balance: float, *, inputs_there: bool) -> float:
    """Share of the weights, by the method that was asked for.

    Raises:
        ParameterError: If the method does not go with what was given.
    """
    from merganser.errors import ParameterError

    if method is Method.weight and inputs_there:
        raise ParameterError("--method weight looks at weights alone", "leave --batches and --data out")
    if method in (Method.activation, Method.dual, Method.zip) and not inputs_there:
        raise ParameterError(
            f"--method {method.value} looks at what units do", "give --batches FILE:NAME or --data DIR"
        )
    if method is Method.zip:
        return balance if was_given(ctx, "balance") else 0.0
    if method is Method.activation:
        refuse_unused(ctx, ("balance",), "has no use with --method activation", "--method dual weighs weights, too")
        return 0.0
    return balance

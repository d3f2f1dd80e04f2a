"""`merganser meet`: several networks in one order of units that none of them sets, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merganser.cli.given import refuse_unused
from merganser.cli.network import check_out, write_network
from merganser.cli.show import console, counted, progress_bar
from merganser.cli.symmetry import Input

if TYPE_CHECKING:
    from torch import nn


class Method(str, Enum):
    """How a common order is found."""

    c2m3 = "c2m3"
    merge_many = "merge-many"
    star = "star"


def meet(
    ctx: typer.Context,
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Two or more, of one architecture and size.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make: the mean of all.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What they are weights of; default: the first, if it has a config.json."),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="c2m3: all at once, none is the reference; merge-many: each in turn to the mean of the others; "
            "star: each to the first."
        ),
    ] = Method.c2m3,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME",
            help="Code that gives batches of inputs: measure BatchNorm anew, or, without it, repair every layer.",
        ),
    ] = None,
    starts: Annotated[int, typer.Option(min=1, help="c2m3: how often to begin; the best counts.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of random starts and of the order of networks and groups.")] = 0,
    shape: Input = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Bring several networks that started apart into one order of units, and write their mean.

    For two, and to keep them apart, use `merganser align`. Only weights are looked at. The means of units that differ
    vary less than they did; with --batches that is set right, which is worth much.

    merganser meet a.pt b.pt c.pt --model nets.py:resnet20 --batches nets.py:batches --out together
    """
    from merganser.align.many import mean_of, merge_many, star
    from merganser.align.universe import universe
    from merganser.checkpoints import open_source
    from merganser.cli.batches import check_batches
    from merganser.cli.subject import batches_of, loaded, running, subject
    from merganser.cli.symmetry import found_in, shape_of
    from merganser.errors import ParameterError

    if len(checkpoints) < 2:
        raise ParameterError(f"{counted(len(checkpoints), 'checkpoint')}; a common order takes two or more")
    if method is not Method.c2m3:
        refuse_unused(ctx, ("starts",), f"is for --method c2m3; {method.value} begins once", "leave it out")
    if batches is not None:
        refuse_unused(ctx, ("shape",), "has no use with --batches, which are of some shape", "leave it out")
    check_out(out, checkpoints, model, overwrite=overwrite)
    sources = [open_source(ref) for ref in checkpoints]
    inputs = batches_of(batches) if batches is not None else []
    check_batches(inputs, alike=False)
    it = subject(model or checkpoints[0], shape_of(shape), inputs[0] if inputs else None)
    found = found_in(model or checkpoints[0], it)
    networks = [loaded(it.network, source) for source in sources]
    states = [network.state_dict() for network in networks]
    with progress_bar("matching", quiet=quiet, unit="starts") as progress:
        if method is Method.c2m3:
            orders = universe(found.spec, states, starts=starts, seed=seed, progress=progress).orders
        else:
            orders = (star if method is Method.star else merge_many)(found.spec, states, seed=seed)
    mean = mean_of(found.spec, states, orders)
    for network, order in zip(networks, orders, strict=True):
        network.load_state_dict({n: found.spec.apply(order, n, x) for n, x in network.state_dict().items()})
    merged = networks[0]
    with running(model or checkpoints[0]):
        said = _renormed(merged, mean, networks, inputs)
    receipt = {
        "checkpoints": checkpoints,
        "method": method.value,
        "starts": starts if method is Method.c2m3 else None,
        "seed": seed,
        "batches": batches,
    }
    write_network(merged, out, sources[0], receipt, overwrite=overwrite)
    if not quiet:
        for name in found.unsound:
            console().print(f"refused by the self-check, and left as it is: {name}")
        groups = sum(not g.fixed for g in found.spec.groups.values())
        console().print(f"{counted(len(networks), 'network')}, {counted(groups, 'group')}; {said}")
        console().print(f"{out}: written")


def _renormed(merged: nn.Module, mean: dict[str, Any], parents: Sequence[nn.Module], inputs: Sequence[Any]) -> str:
    """Load the mean, and set statistics right where there are inputs; what was done, in words."""
    from merganser.align.renorm import layer_statistics, repair, reset_batch_norm

    targets = [layer_statistics(parent, inputs) for parent in parents] if inputs else []
    merged.load_state_dict(mean)
    if not inputs:
        return "statistics as they are"
    if layers := reset_batch_norm(merged, inputs):
        return f"{counted(layers, 'BatchNorm')} measured anew"
    return f"{counted(repair(merged, targets, inputs), 'layer')} repaired"

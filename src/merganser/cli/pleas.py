"""`merganser pleas`: one network from two that started apart, merged in part under a budget."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from merganser.cli.given import refuse_unused
from merganser.cli.inputs import Data, Examples, PixelScale, with_inputs
from merganser.cli.network import check_out
from merganser.cli.partial import BUDGETS
from merganser.cli.show import console, progress_bar
from merganser.cli.symmetry import Input


class Counts(str, Enum):
    """What a budget counts."""

    flops = "flops"
    parameters = "parameters"


class Way(str, Enum):
    """How layers are refitted."""

    sequence = "sequence"
    layers = "layers"
    none = "none"


class Target(str, Enum):
    """What a layer shall give."""

    averaged = "averaged"
    separate = "separate"
    mixed = "mixed"


class Match(str, Enum):
    """How units are paired."""

    activations = "activations"
    weights = "weights"


def pleas(
    ctx: typer.Context,
    one: Annotated[str, typer.Argument(metavar="A", help="A checkpoint; its order of units is kept.")],
    two: Annotated[str, typer.Argument(metavar="B", help="Another, of the same architecture.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What they are weights of; default: A, if it has a config.json."),
    ] = None,
    other_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What B is weights of, where its head has other labels.")
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME", help="Code that gives batches of inputs of both tasks; labels are not needed."
        ),
    ] = None,
    data: Data = None,
    examples: Examples = 1000,
    noise: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Without data: so many inputs of noise, as near to the data as BatchNorm knows it."
        ),
    ] = None,
    scale: PixelScale = None,
    shape: Input = None,
    budget: Annotated[float, typer.Option(help="Size of the network in sizes of one of both, in [1, 2].")] = 1.2,
    measure: Annotated[Counts, typer.Option(help="What the budget counts.")] = Counts.flops,
    multiple: Annotated[int, typer.Option(min=1, help="Channels that are kept apart at a time.")] = 1,
    apart: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="A head whose outputs stay apart: A's, then B's; repeat it."),
    ] = None,
    way: Annotated[
        Way,
        typer.Option(
            help="sequence: refit layers from front to back; layers: each by itself; none: the block average."
        ),
    ] = Way.sequence,
    target: Annotated[Target, typer.Option(help="With --way layers: what a layer shall give.")] = Target.averaged,
    share: Annotated[
        float, typer.Option(help="Of B in what is merged; 1/N, as 0.3333, where A is N - 1 networks merged already.")
    ] = 0.5,
    ridge: Annotated[
        float, typer.Option(help="Pull to the block average, in mean squares of a layer's inputs.")
    ] = 1e-3,
    match: Annotated[Match, typer.Option(help="What units are paired by.")] = Match.activations,
    recalibrate: Annotated[
        bool,
        typer.Option("--recalibrate/--no-recalibrate", help="Measure BatchNorm of A and B on the batches first."),
    ] = True,
    few: Annotated[
        bool, typer.Option("--few", help="Refit layers that have fewer rows of inputs than entries, too.")
    ] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Keep layers whole, zeros and all; the budget counts these.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE.pt2", help="Write a program of torch.export as well.")
    ] = None,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE", help="Write ONNX as well.")] = None,
    curve: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Merge under several budgets: a plot (.png) or table (.md).")
    ] = None,
    budgets: Annotated[str, typer.Option(metavar="1,1.5,2", help="Those of the curve and the preview.")] = BUDGETS,
    labelled: Annotated[
        str | None,
        typer.Option(metavar="FILE:NAME", help="Code that gives pairs of inputs and classes: count right answers."),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME", help="Code that gives pairs of inputs and classes: fit the last layer to these, too."
        ),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Say what can be split and what it would cost, and write nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of matching, and of the rows that layers are fitted to.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Merge the pairs of units that are most alike, keep the others apart as far as a budget goes, and refit.

    At a budget of 1 the network is as large as A, at 2 it holds both whole and gives the mean of what they give. Layers
    are refitted by least squares to what A and B do on the inputs. OUT can be a MODEL of other commands.

    merganser pleas a.pt b.pt merged --model nets.py:resnet20 --batches nets.py:batches --budget 1.2
    """
    from dataclasses import replace

    from merganser.align.partial import Pair, PartlyMerged, Settings
    from merganser.align.sequence import Sampling
    from merganser.checkpoints import open_source
    from merganser.cli.barrier import labelled_of
    from merganser.cli.batches import check_batches
    from merganser.cli.budgets import Row, curve_file, row, show, show_preview
    from merganser.cli.partial import (
        Files,
        both,
        budgets_of,
        check_budget,
        check_inputs,
        check_least,
        chosen,
        item_type_of,
        least,
    )
    from merganser.cli.partial import write as write_all
    from merganser.cli.probes import Probes
    from merganser.cli.subject import running
    from merganser.cli.surrogates import Surrogates, surrogates_of
    from merganser.cli.symmetry import found_in, shape_of
    from merganser.errors import ParameterError

    settings = Settings(
        way=way.value,
        target=target.value,
        share=share,
        ridge=ridge,
        measure=measure.value,
        multiple=multiple,
        match=match.value,
        recalibrate=recalibrate and not preview,
        heads=tuple(apart or ()),
        sampling=Sampling(seed=seed),
        seed=seed,
        dense=dense,
    )
    check_budget(budget)
    wanted = budgets_of(budgets) if curve is not None or preview else []
    if target is not Target.averaged and way is not Way.layers:
        raise ParameterError(f"--target {target.value} is for layers that are refitted by themselves", "--way layers")
    check_inputs(batches, data or (), noise, recalibrate=recalibrate)
    if not data:
        refuse_unused(ctx, ("examples", "scale"), "is for pictures", "leave it out, or give --data DIR")
    if batches is not None:
        refuse_unused(ctx, ("shape",), "has no use with --batches, which are of some shape", "leave it out")
    if curve is None and not preview:
        refuse_unused(ctx, ("budgets",), "is for a curve or a preview", "--curve FILE, --preview, or --budget for one")
    if not preview:
        check_out(
            out, [one, two, *map(str, data or ()), *([other_model] if other_model else [])], model, overwrite=overwrite
        )
        files = Files(out, export, onnx, curve, overwrite)
    sources = open_source(one), open_source(two)
    named = model or one
    second = other_model or model or (two if (Path(two) / "config.json").is_file() else one)
    given = labelled_of(labelled) if labelled is not None else None
    probes = Probes(probe, labelled_of(probe), ridge) if probe is not None else None
    kind = item_type_of(sources[0])
    surrogates: Surrogates | None = None

    def finished(made: PartlyMerged) -> PartlyMerged:
        made = made if surrogates is None else surrogates.finished(pair, made)
        return made if probes is None else probes.finished(pair, made)

    def rowed(made: PartlyMerged, size: float) -> Row:
        return row(pair, made, size, kind, given, judged=finished(made).network if given else None)

    with running(named), progress_bar("measuring and fitting", quiet=quiet or preview, unit="steps") as progress:
        it, inputs = with_inputs(named, shape_of(shape), batches, data, examples, scale)
        check_batches(inputs or [])
        networks = both(it, named, second, sources, inputs[0] if inputs else (it.args, it.kwargs), settings.heads)
        if noise is not None:
            surrogates = surrogates_of((it.args, it.kwargs), networks, noise, seed)
            inputs = surrogates.batches
        assert inputs
        it = replace(it, args=tuple(inputs[0][0]), kwargs=inputs[0][1])
        found = found_in(named, it)
        pair = Pair(found, *networks, inputs, output=it.output, settings=settings, progress=progress)
        wanted = list(dict.fromkeys(max(b, least(pair)) for b in wanted))
        if preview:
            show_preview(pair, wanted, kind)
            return
        check_least(pair, budget)
        splits = chosen(pair, [budget, *wanted], few=few)
        made = pair.laid_out(splits[budget])
        rows = {b: rowed(made if b == budget else pair.laid_out(splits[b]), b) for b in sorted(splits)}
    receipt = {
        "pleas": [one, two],
        "model": named,
        "other_model": second if second != named else None,
        "batches": batches or list(map(str, data or ())),
        "surrogates": surrogates and surrogates.receipt(),
        "probe": probes and probes.receipt(),
        "budget": budget,
        "measure": measure.value,
        "multiple": multiple,
        "way": way.value,
        "target": target.value,
        "share": share,
        "ridge": ridge,
        "match": match.value,
        "recalibrate": recalibrate,
        "seed": seed,
    }
    write_all(pair, finished(made), kind, files, named, receipt)
    if curve is not None:
        curve.write_bytes(curve_file([r for b, r in rows.items() if b in wanted], curve))
    if not quiet:
        for name in found.unsound:
            console().print(f"refused by the self-check, and left as it is: {name}")
        show(pair, made, list(rows.values()))
        if surrogates is not None:
            console().print(surrogates.words())
        if probes is not None:
            console().print(probes.words())
        for path in filter(None, (out, export, onnx, curve)):
            console().print(f"{path}: written")

"""What `merganser pleas` asks for before it works, and what it writes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from merganser.align.activations import Batch
    from merganser.align.layout import Split, Splits
    from merganser.align.partial import Pair, PartlyMerged
    from merganser.cli.subject import Subject
    from merganser.types import Source

#: Budgets of a curve.
BUDGETS = "1,1.2,1.55,1.8,2"


def budgets_of(text: str) -> list[float]:
    """Budgets written with commas, ascending.

    Raises:
        ParameterError: If one is no number, or out of range.

    >>> budgets_of("2,1.5")
    [1.5, 2.0]
    """
    from merganser.errors import ParameterError

    try:
        found = sorted({float(x) for x in text.split(",")})
    except ValueError as error:
        raise ParameterError(f"--budgets is {text!r}; it is numbers with commas, as {BUDGETS}") from error
    for budget in found:
        check_budget(budget)
    return found


def check_budget(budget: float) -> None:
    """Refuse a budget that no network can have.

    Raises:
        ParameterError: If it is not in [1, 2].
    """
    from merganser.errors import ParameterError

    if not 1 <= budget <= 2:
        raise ParameterError(
            f"a budget of {budget:g} is not in [1, 2]; it is in sizes of one network",
            "1 is as large as one of both, 2 holds both whole",
        )


@dataclass(frozen=True)
class Files:
    """What is written.

    Attributes:
        out: folder.
        export: program of torch.export.
        onnx: ONNX.
        curve: plot or table.
        overwrite: replace what is there.

    Raises:
        OutputError: If a place is taken or lies in the folder, or its name does not tell what it is.
        MerganserError: If a package is missing.
    """

    out: Path
    export: Path | None = None
    onnx: Path | None = None
    curve: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what could not be written when all is done."""
        from merganser.align.partial_file import check_new, check_onnx
        from merganser.checkpoints.writer import RECEIPT_NAME
        from merganser.errors import OutputError

        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / RECEIPT_NAME).is_file():
            raise OutputError(f"{self.out} holds no {RECEIPT_NAME}: it was not made here", "remove it yourself")
        for path in filter(None, (self.export, self.onnx, self.curve)):
            check_new(path, overwrite=self.overwrite)
            if path.resolve().is_relative_to(self.out.resolve()):
                raise OutputError(f"{path} lies in {self.out}, which is written as a whole", "name a place beside it")
            if not path.parent.is_dir():
                raise OutputError(f"{path} cannot be written: {path.parent} is no folder")
        if self.export is not None and self.export.suffix != ".pt2":
            raise OutputError(f"{self.export} is no name of a program of torch.export", "FILE.pt2")
        if self.curve is not None and self.curve.suffix not in (".png", ".md"):
            raise OutputError(f"{self.curve} is neither a plot nor a table", "FILE.png or FILE.md")
        if self.onnx is not None:
            check_onnx()
        if self.curve is not None and self.curve.suffix == ".png":
            from merganser.report import blank_figure

            blank_figure(1, 1)


def both(
    it: Subject, model: str, other: str, sources: tuple[Source, Source], batch: Batch, heads: Sequence[str]
) -> tuple[nn.Module, nn.Module]:
    """Networks A and B with their weights.

    Args:
        it: what A is weights of.
        model: its name.
        other: name of what B is weights of.
        sources: weights.
        batch: inputs of both.
        heads: layers whose outputs stay apart.

    Raises:
        ShapeError: If the networks are of different architectures, or of different labels in a head.
        MerganserError: As `subject` and `loaded`.
    """
    from merganser.cli.subject import loaded, subject
    from merganser.errors import ShapeError

    first = loaded(it.network, sources[0])
    second = it.network if other == model else subject(other, None, batch).network
    head = _last_linear(first)
    try:
        second = loaded(second, sources[1])
    except ShapeError as error:
        labels = other == model and error.message.startswith(f"{head}.")
        hint = f"if it has other labels, name its network and the head: --other-model MODEL --apart {head}"
        raise ShapeError(error.message, hint if labels else "is it of this architecture?") from error
    shapes = [{name: tuple(x.shape) for name, x in network.state_dict().items()} for network in (first, second)]
    for name in [n for n in shapes[0] if n not in shapes[1]] + [n for n in shapes[1] if n not in shapes[0]]:
        who = "A" if name in shapes[0] else "B"
        raise ShapeError(f"only {who} has {name}", "both must be of one architecture; `merganser diff` compares them")
    differ = [n for n, shape in shapes[0].items() if shape != shapes[1][n]]
    here = [n for n in differ if n.rpartition(".")[0] not in heads]
    if here:
        only_head = {n.rpartition(".")[0] for n in here} == {head}
        raise ShapeError(
            f"{here[0]} is {shapes[0][here[0]]} in A and {shapes[1][here[0]]} in B",
            f"their labels differ: keep the outputs of both with --apart {head}"
            if only_head
            else "both must be of one architecture, but for heads that stay apart (--apart LAYER)",
        )
    return first, second


def _last_linear(network: nn.Module) -> str:
    from torch import nn

    return next((name for name, m in reversed(list(network.named_modules())) if isinstance(m, nn.Linear)), "LAYER")


def check_inputs(batches: str | None, data: Sequence[Path], noise: int | None, *, recalibrate: bool) -> None:
    """Refuse inputs from nowhere, or from more than one place.

    Raises:
        ParameterError: If that is so, or BatchNorm is to stay as it is in spite of noise.
    """
    from merganser.errors import ParameterError

    given = [name for name, it in (("--batches", batches), ("--data", data), ("--noise", noise)) if it]
    if len(given) != 1:
        raise ParameterError(
            f"inputs come from one place, and {' and '.join(given)} are given"
            if given
            else "inputs to compare and fit by are needed",
            "--batches FILE:NAME, or --data DIR, or, where there is no data, --noise N",
        )
    if noise and not recalibrate:
        raise ParameterError(
            "with --noise, BatchNorm is measured on noise and carried over to the data", "leave --no-recalibrate out"
        )


def least(pair: Pair) -> float:
    """The budget that a network with nothing apart needs: above 1 where both networks' outputs are kept."""
    return max(1.0, pair.cost.constant / pair.cost.original)


def check_least(pair: Pair, budget: float) -> None:
    """Refuse a budget that not even the network with nothing apart has.

    Raises:
        ParameterError: Says which budget there must be.
    """
    from merganser.errors import ParameterError

    lowest = least(pair)
    if budget < lowest * (1 - 1e-12):
        raise ParameterError(
            f"a budget of {budget:g} is too small: with the outputs of both, the network costs {lowest:.4f} of one",
            f"--budget {math.ceil(lowest * 1e4) / 1e4:g} or more",
        )


def chosen(pair: Pair, budgets: Sequence[float], *, few: bool) -> dict[float, Mapping[str, Split]]:
    """Which units stay apart under each budget.

    Args:
        pair: both networks.
        budgets: in sizes of one network.
        few: whether layers may be fitted to fewer rows than they have entries.

    Raises:
        ParameterError: If that is not so, and a layer would be.
    """
    fitted = pair.settings.way != "none" and not few
    if fitted:
        check_rows(pair, {})  # before anything is measured
    splits = {budget: pair.splits(budget) for budget in dict.fromkeys(budgets)}
    for some in splits.values() if fitted else ():
        check_rows(pair, some)
    return dict(splits)


def check_rows(pair: Pair, splits: Splits) -> None:
    """Refuse to fit layers to fewer rows of inputs than they have entries.

    Raises:
        ParameterError: If that is so: which layer, how many rows it has, and how many it needs.
    """
    from merganser.align.layout import Side
    from merganser.align.ran import examples, layers_run
    from merganser.align.refit import fit_of
    from merganser.errors import ParameterError

    seen, many = layers_run(pair.one, pair.batches[0]), sum(map(examples, pair.batches))
    short: list[tuple[int, str, int, int]] = []
    for layer in seen.layers:
        weight = pair.a[f"{layer}.weight"]
        fit = fit_of(pair.found.spec, layer, weight, weight, splits, pair.settings.heads)
        if isinstance(fit, str):
            continue
        whole = bool((fit.rows.side == Side.BOTH).any())
        read = fit.taps * (len(fit.columns) if whole else int((fit.columns.side != Side.SECOND).sum()))
        has, needs = many * seen.places[layer], read + 1
        if has < needs:
            short.append((math.ceil(needs / seen.places[layer]), layer, has, needs))
    if short:
        wanted, layer, has, needs = max(short)
        others = f"; so have {len(short) - 1} others" if len(short) > 1 else ""
        raise ParameterError(
            f"{layer} has too few rows of inputs for a stable solve, {has:,}, and needs {needs:,}{others}",
            f"give {wanted:,} examples or more (these are {many:,}), or --way none; "
            "with --few the ridge decides what they leave open",
        )


def item_type_of(source: Source) -> str | None:
    """The one type of a checkpoint's floating tensors; None where there are several."""
    from merganser.numerics import TORCH_DTYPES

    kinds = {
        i.dtype for i in source.infos.values() if i.dtype in TORCH_DTYPES and TORCH_DTYPES[i.dtype].is_floating_point
    }
    return kinds.pop() if len(kinds) == 1 else None


def weight_bytes(pair: Pair, splits: Splits, kind: str | None) -> int:
    """Bytes of all tensors of the network with these splits.

    Args:
        pair: both networks.
        splits: of groups.
        kind: type of floating tensors; by default that of each of A's.
    """
    from merganser.align.layout import wider_spec
    from merganser.types import ITEM_BYTES

    item = ITEM_BYTES[kind] if kind is not None else None
    shapes = wider_spec(pair.found.spec, splits).shapes()
    named = dict(pair.one.named_parameters(remove_duplicate=False))
    total = pair.costs(splits).parameters * (item or next(iter(named.values())).element_size())
    for name, x in pair.one.state_dict().items():
        if name not in named:
            each = item if item and x.is_floating_point() else x.element_size()
            total += math.prod(shapes.get(name, tuple(x.shape))) * each
    return total


def write(
    pair: Pair, made: PartlyMerged, kind: str | None, files: Files, model: str, receipt: Mapping[str, Any]
) -> None:
    """Write folder and programs: all of them, or none.

    Args:
        pair: both networks.
        made: the network of both.
        kind: type of floating tensors in the folder.
        files: where.
        model: what both are weights of.
        receipt: how it was made, besides what `made` and `pair` tell.

    Raises:
        OutputError: If they cannot be written.
        ParameterError: If the network cannot be exported.
    """
    from merganser.align.partial_file import Partial, export_onnx, export_program, save_partial

    network = made.network if pair.settings.dense else made.blocks()
    full = {
        **receipt,
        "costs": vars(made.costs),
        "apart": {group: list(split.apart) for group, split in made.splits.items()},
        "orders": {name: order.tolist() for name, order in pair.orders.items()},
        "residuals": made.refitted.residuals,
        "kept": made.refitted.kept,
    }
    written: list[Path] = []
    try:
        for path, export in ((files.export, export_program), (files.onnx, export_onnx)):
            if path is not None:
                _exported(export, network, path, pair, overwrite=files.overwrite)
                written.append(path)
        partial = Partial(model, made.record, not pair.settings.dense)
        save_partial(files.out, _in_type(network, kind), partial, full, overwrite=files.overwrite)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _exported(export: Any, network: nn.Module, path: Path, pair: Pair, *, overwrite: bool) -> None:
    """Export for any number of examples, or, where that cannot be, for as many as a batch has."""
    from merganser.errors import ParameterError

    with contextlib.suppress(ParameterError):
        export(network, path, *pair.few, output=pair.output, any_batch=True, overwrite=overwrite)
        return
    export(network, path, *pair.batches[0], output=pair.output, overwrite=overwrite)


def _in_type(network: nn.Module, kind: str | None) -> nn.Module:
    """A network whose floating tensors are of a type, as far as their values fit."""
    from merganser.numerics import TORCH_DTYPES, narrowed

    if kind is None:
        return network
    for name, x in network.state_dict().items():
        if x.is_floating_point():
            narrowed(x, kind, name)
    return network.to(TORCH_DTYPES[kind])

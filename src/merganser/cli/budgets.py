"""What networks of several budgets cost and how near they are to both of theirs, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merganser.cli.partial import weight_bytes
from merganser.cli.show import console, counted, size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merganser.align.activations import Batch
    from merganser.align.layout import Split, Splits
    from merganser.align.partial import Pair, PartlyMerged


@dataclass(frozen=True)
class Row:
    """A network of a budget.

    Attributes:
        budget: in sizes of one network.
        flops: of one example, in those of one network.
        parameters: in those of one network.
        bytes: of its weights.
        apart: pairs of units that are kept apart.
        error: squared distance of its outputs from the parents', as a share of their variance.
        right: share of right answers.
    """

    budget: float
    flops: float
    parameters: float
    bytes: int
    apart: int
    error: float
    right: float | None = None


def row(
    pair: Pair,
    made: PartlyMerged,
    budget: float,
    kind: str | None,
    labelled: Sequence[tuple[Batch, Tensor]] | None = None,
    judged: nn.Module | None = None,
) -> Row:
    """What a network of a budget costs, and how good it is.

    Args:
        pair: both networks.
        made: the network of both.
        budget: its budget.
        kind: type of its floating tensors.
        labelled: inputs and classes to judge it by.
        judged: the network as it is written, where that is another one.
    """
    from merganser.align.barrier import mean_loss

    costs = made.costs
    return Row(
        budget,
        costs.flops / costs.parent_flops if costs.parent_flops else 1.0,
        costs.parameters / costs.parent_parameters,
        weight_bytes(pair, made.splits, kind),
        sum(len(split.apart) for split in made.splits.values()),
        output_error(pair, made.network),
        mean_loss(judged or made.network, labelled)[1] if labelled else None,
    )


def output_error(pair: Pair, network: nn.Module) -> float:
    """Squared distance of a network's outputs from the mean of its parents', as a share of that mean's variance.

    Where the outputs of both stay apart, they are compared with A's and then B's.
    """
    import torch

    from merganser.symmetry.record import tensors_of

    missed, wanted, share = 0.0, [], pair.settings.share
    with torch.no_grad():
        for args, kwargs in pair.batches:
            results = (tensors_of(n(*args, **kwargs), pair.output) for n in (pair.one, pair.two, network))
            rows = []
            for a, b, y in zip(*results, strict=True):
                if not y.is_floating_point():
                    continue
                mean = (1 - share) * a + share * b if a.shape == b.shape == y.shape else torch.cat([a, b], -1)
                missed += float((y.double() - mean).square().sum())
                rows.append(mean.double().reshape(len(mean), -1))
            wanted.append(torch.cat(rows, 1))
    every = torch.cat(wanted)
    spread = float((every - every.mean(0)).square().sum())
    return missed / spread if spread > 0 else 0.0


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A table: header, and rows."""
    header = ["budget", "FLOPs", "parameters", "bytes", "pairs apart", "output error", "right"]
    table = []
    for r in rows:
        line = [f"{r.budget:.4g}", f"{r.flops:.3f}", f"{r.parameters:.3f}", size(r.bytes), f"{r.apart:,}"]
        table.append([*line, f"{r.error:.4f}", *([f"{100 * r.right:.1f} %"] if r.right is not None else [])])
    return header[: len(table[0])], table


def curve_file(rows: Sequence[Row], path: Path) -> bytes:
    """The curve of budgets: a plot, or a table in Markdown, as the name of the file says."""
    if path.suffix == ".png":
        return _curve_png(rows)
    header, table = cells(rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *table)).encode()


def _curve_png(rows: Sequence[Row]) -> bytes:
    from merganser.report import INK, PALETTE, blank_figure, png_of, quiet_axes

    figure = blank_figure(6.2, 4.0)
    axes = figure.add_axes((0.12, 0.13, 0.84, 0.83))
    judged = rows[0].right is not None
    values = [100 * (r.right or 0.0) if judged else r.error for r in rows]
    axes.plot([r.flops for r in rows], values, color=PALETTE[0], marker="o", markersize=5, linewidth=1.8)
    axes.set_xlabel("FLOPs, in those of one network", color=INK)
    axes.set_ylabel("right answers, %" if judged else "output error, share of the variance", color=INK)
    quiet_axes(axes)
    return png_of(figure)


def alike(pair: Pair, budget: float) -> dict[str, Split]:
    """Splits within a budget in which all groups keep about the same share of their units apart."""
    import numpy as np

    from merganser.align.budget import ROUNDING, step_of
    from merganser.align.layout import Split

    spec, cost = pair.found.spec, pair.cost
    sizes = {group: spec.groups[group].size for group in pair.groups}
    steps = {group: max(1, step_of(spec, group, pair.settings.multiple)) for group in sizes}

    def counts(share: float) -> dict[str, int]:
        return {g: n if share == 1 else int(share * n) // steps[g] * steps[g] for g, n in sizes.items()}

    def fits(share: float) -> bool:
        apart = np.array(list(counts(share).values()), dtype=float)
        return cost.at(apart) <= budget * cost.original * (1 + ROUNDING)

    low, high = (1.0, 1.0) if fits(1.0) else (0.0, 1.0)
    for _ in range(40 if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {group: Split(sizes[group], tuple(range(count))) for group, count in counts(low).items() if count}


def widths(pair: Pair, splits: Splits) -> str:
    """Widths of the groups that can be split, in their order; those of one size and one width together."""
    seen: dict[tuple[int, int], int] = {}
    for group in pair.groups:
        n = pair.found.spec.groups[group].size
        pairing = n, splits[group].width if group in splits else n
        seen[pairing] = seen.get(pairing, 0) + 1
    return ", ".join(f"{old} -> {new}" + (f" ({times} x)" if times > 1 else "") for (old, new), times in seen.items())


def show_preview(pair: Pair, budgets: Sequence[float], kind: str | None) -> None:
    """Print which groups can be split, why others cannot, and what networks of some budgets would cost."""
    from rich.table import Table

    out, spec = console(), pair.found.spec
    groups = Table("group", "units", "can be split", box=None, pad_edge=False)
    for name, reason in pair.reasons.items():
        groups.add_row(name, str(spec.groups[name].size), "yes" if reason is None else f"no: {reason}")
    out.print(groups)
    for name in pair.found.unsound:
        out.print(f"refused by the self-check, and merged whole: {name}")
    table = Table("budget", "FLOPs", "parameters", "bytes", "widths", box=None, pad_edge=False)
    for budget in budgets:
        splits = alike(pair, budget)
        costs = pair.costs(splits)
        table.add_row(
            f"{budget:.4g}",
            f"{costs.flops:,}",
            f"{costs.parameters:,}",
            size(weight_bytes(pair, splits, kind)),
            widths(pair, splits) or "none",
        )
    out.print(table)
    out.print(
        "widths are those of equal shares; which pairs stay apart is chosen by what A and B do. Nothing is written."
    )


def show(pair: Pair, made: PartlyMerged, rows: Sequence[Row]) -> None:
    """Print what was made."""
    from rich.table import Table

    from merganser.align.ran import examples

    out, fits = console(), made.refitted
    many = sum(map(examples, pair.batches))
    out.print(f"{len(pair.groups)} of {counted(len(pair.reasons), 'group')} can be split; {counted(many, 'example')}")
    header, lines = cells(rows)
    table = Table(*header, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    out.print(table)
    worthless = pair.worthless if any(row.budget > 1 for row in rows) else []
    if worthless:
        out.print(
            f"nothing is gained by keeping units of {', '.join(worthless)} apart, so none are: the networks are alike "
            "there, or no layer takes them in (products of functions are not measured)"
        )
    if made.splits:
        out.print(f"widths: {widths(pair, made.splits)}")
    if fits.residuals:
        mean = sum(fits.residuals.values()) / len(fits.residuals)
        worst = max(fits.residuals, key=lambda name: fits.residuals[name])
        out.print(
            f"{counted(len(fits.residuals), 'layer')} refitted; not met: {mean:.3f} of the variance on average, "
            f"{fits.residuals[worst]:.3f} in {worst}"
        )
    for layer, why in fits.kept.items():
        out.print(f"{layer} is left as it was merged: {why}")

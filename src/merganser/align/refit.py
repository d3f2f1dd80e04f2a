"""Least squares for the layers of a network that two were merged into, from what both do on the same inputs.

For a layer with inputs x and outputs y = W x + b in networks A and B, in one order of units, the merged layer takes in
and shall give, place by place

    averaged    x = (x_A + x_B) / 2 where units are merged, x_A and x_B where they are apart; y likewise
    separate    A's rows and B's rows one below the other: x = x_k, y = y_k; the other's own units are 0
    mixed       x as averaged without the other's own units, y = y_A in A's rows, y_B in B's

    W = argmin sum |W x - y|^2 + lambda |W - W_0|^2        W_0: the block average,  lambda = ridge mean(diag(x x^T))

with the blocks that a split makes zero left at zero; where B counts for a share s, means are those of 1 - s of A and s
of B. Rows that read everything and A's rows share one Cholesky factor: with columns as [merged | A | B] A's problem is
a leading block. `separate` without a split is RegMean in one order.

Source: Nasery et al. 2024, arXiv:2407.02447, section 3.2 (PLeaS), there by gradient descent; Jin et al. 2023,
arXiv:2212.09849, eq. 1 (RegMean).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from merganser.align.layout import Layout, Places, Side, Splits, head_axis, head_of, layout
from merganser.align.moments import Joint
from merganser.align.normal import Normal, solve
from merganser.align.orientation import inputs_first, matrix_of, weight_of
from merganser.errors import NonFiniteError, ParameterError, ShapeError
from merganser.numerics import all_finite, product
from merganser.symmetry import Spec

Target = Literal["averaged", "separate", "mixed"]
Tensors = Mapping[str, Tensor]
#: Entries whose moments are laid out at once: those of a large layer take as much memory as all its moments.
BLOCK = 512


@dataclass(frozen=True)
class Refitted:
    """What refitting did.

    Attributes:
        tensors: new weights and biases, by name.
        residuals: by layer: share of the targets' variance that is not met, 0 to about 1.
        kept: layers that were left as they are, and why.
    """

    tensors: dict[str, Tensor]
    residuals: dict[str, float]
    kept: dict[str, str] = field(default_factory=dict)

    def __or__(self, more: Refitted) -> Refitted:
        """What both did."""
        return Refitted(self.tensors | more.tensors, self.residuals | more.residuals, self.kept | more.kept)


@dataclass(frozen=True)
class Fit:
    """Where one layer's outputs and inputs stand in the merged network.

    Attributes:
        rows: places of the outputs.
        columns: places of the inputs.
        taps: entries of a row for every input place: 1, or those of a kernel.
        turned: whether the weight has its inputs first.
        share: of B where units are merged.
    """

    rows: Places
    columns: Places
    taps: int
    turned: bool = False
    share: float = 0.5

    @property
    def entries(self) -> Places:
        """Places of all entries of a row."""
        index = self.columns.index[:, None] * self.taps + torch.arange(self.taps)
        return Places(index.reshape(-1), self.columns.side.repeat_interleave(self.taps))

    def blend(self, a: Tensor, b: Tensor) -> Tensor:
        """Outputs of both networks, (n, out) each, as the merged layer shall give them."""
        side = self.rows.side
        first = _safe(a, self.rows.index, side == Side.SECOND)
        second = _safe(b, self.rows.index, side == Side.FIRST)
        of_first, of_second = shares(side, self.share)
        blended: Tensor = of_first.to(a) * first + of_second.to(b) * second
        return blended


def shares(side: Tensor, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """How much A and B count in places of some sides, B for `share` where both do."""
    table = torch.tensor([[1 - share, 1.0, 0.0], [share, 0.0, 1.0]], dtype=torch.float64)
    return table[0][side.long()], table[1][side.long()]


def _safe(x: Tensor, index: Tensor, absent: Tensor) -> Tensor:
    """Columns of x; some column where there is none."""
    return x.index_select(1, torch.where(absent, 0, index).to(x.device))


def fit_of(
    spec: Spec,
    layer: str,
    a: Tensor,
    b: Tensor,
    splits: Splits,
    apart_heads: Collection[str] = (),
    share: float = 0.5,
) -> Fit | str:
    """Where a layer's outputs and inputs stand, or why it cannot be refitted.

    Args:
        spec: symmetries.
        layer: its name; its weight has outputs along axis 0 and inputs along axis 1, or, with two axes, turned.
        a: its weight in network A.
        b: its weight in network B.
        splits: of groups.
        apart_heads: layers whose outputs stay apart.
        share: of B where units are merged.
    """
    name = f"{layer}.weight"
    if {name, f"{layer}.bias"} & {*spec.tied, *spec.tied.values()}:
        return "its weight or bias is another tensor too"
    if name not in spec.axes:
        return "its weight has no axes in the symmetries"
    turned = inputs_first(spec, name)
    made, read = (1, 0) if turned else (0, 1)
    head = (a.shape[made], b.shape[made]) if head_of(name, apart_heads) is not None else None
    if head is not None and head_axis(spec, name) != made:
        return f"its outputs are not along axis {made}"
    laid: Layout = layout(spec, name, splits, head)
    if laid.rows not in (None, made) or laid.columns not in (None, read) or any(p.apart for p in laid.axes[2:]):
        return f"its outputs are not along axis {made}, or its inputs not along axis {read}"
    return Fit(laid.axes[made], laid.axes[read], prod(a.shape[2:]), turned, share)


def refit(
    spec: Spec,
    a: Tensors,
    b: Tensors,
    state: Tensors,
    moments: MutableMapping[str, Joint],
    splits: Splits,
    *,
    ridge: float = 1e-3,
    target: Target = "averaged",
    free: Collection[str] = (),
    apart_heads: Collection[str] = (),
    share: float = 0.5,
    spent: bool = False,
) -> Refitted:
    """Refit layers one by one, each to what it shall give on what its parents take in.

    Args:
        spec: symmetries of both networks.
        a: tensors of network A.
        b: tensors of network B, in A's order.
        state: tensors of the merged network, as `layout.widened` gives them.
        moments: of what the layers take in, both in A's order (`moments.joint_moments`).
        splits: of groups.
        ridge: pull to the block average, in [0, inf).
        target: what a layer shall give.
        free: layers without a bias whose outputs a norm centres, such as those before BatchNorm.
        apart_heads: layers whose outputs stay apart.
        share: of B where units are merged, with the target "averaged".
        spent: take each layer's moments out of `moments`, so that their memory is free for its solution.

    Raises:
        ParameterError: If the ridge or the target is out of range, or has no shares.
        ShapeError: If moments are of another layer.
        NonFiniteError: If a weight or bias is NaN or infinite.
    """
    if target not in _VIEWS:
        raise ParameterError(f"target is {target!r}; it is {', '.join(_VIEWS)}")
    check_share(share, target)
    done = Refitted({}, {})
    for layer in list(moments):
        joint = moments.pop(layer) if spent else moments[layer]
        name = f"{layer}.weight"
        fit = fit_of(spec, layer, a[name], b[name], splits, apart_heads, share)
        if isinstance(fit, str):
            done.kept[layer] = fit
            continue
        if not all(all_finite(n[x]) for n in (a, b) for x in (name, f"{layer}.bias") if x in n):
            raise NonFiniteError(f"{layer} has NaN or infinity among its weights", "see what was saved of the networks")
        normal = _normal(layer, joint, fit, (a, b), target)
        del joint
        bias = f"{layer}.bias" in state
        normal = normal.centred() if bias or layer in free else normal
        prior = matrix_of(state[name], turned=fit.turned)
        sides = fit.rows.side, fit.entries.side
        weight = solve(normal, prior, *sides, ridge)
        done.residuals[layer] = normal.residual(weight, sides)
        done.tensors[name] = weight_of(weight, state[name], turned=fit.turned)
        if bias:
            offset = (normal.targets - weight @ normal.inputs) / normal.count
            done.tensors[f"{layer}.bias"] = offset.to(state[f"{layer}.bias"])
    return done


def check_share(share: float, target: Target = "averaged") -> None:
    """Refuse a share of B that is none, or that a target does not know.

    Raises:
        ParameterError: If that is so.
    """
    if not 0 < share < 1:
        raise ParameterError(f"share is {share}; it is B's part of what is merged, above 0 and below 1")
    if share != 0.5 and target != "averaged":
        raise ParameterError(f"with the target {target} both networks count alike", "share 0.5, or target averaged")


#: Per view of the data: share of x_A and x_B in merged inputs, which own inputs are seen, and whose outputs are wanted.
_VIEWS: Mapping[Target, tuple[tuple[float, float, tuple[Side, ...], float, float], ...]] = {
    "averaged": ((0.5, 0.5, (Side.FIRST, Side.SECOND), 0.5, 0.5),),
    "separate": ((1.0, 0.0, (Side.FIRST,), 1.0, 0.0), (0.0, 1.0, (Side.SECOND,), 0.0, 1.0)),
    "mixed": ((0.5, 0.5, (Side.FIRST,), 1.0, 0.0), (0.5, 0.5, (Side.SECOND,), 0.0, 1.0)),
}


def _coefficients(side: Tensor, first: float, second: float, seen: tuple[Side, ...]) -> tuple[Tensor, Tensor]:
    own = float(Side.FIRST in seen), float(Side.SECOND in seen)
    table = torch.tensor([[first, own[0], 0.0], [second, 0.0, own[1]]], dtype=torch.float64)
    return table[0][side.long()], table[1][side.long()]


def _normal(layer: str, joint: Joint, fit: Fit, networks: tuple[Tensors, Tensors], target: Target) -> Normal:
    """Normal equations from moments alone."""
    name, f = f"{layer}.weight", joint.entries
    weights = [matrix_of(n[name], turned=fit.turned) for n in networks]
    biases = [n[f"{layer}.bias"].detach().double().cpu() if f"{layer}.bias" in n else w.new_zeros(len(w))
              for n, w in zip(networks, weights, strict=True)]  # fmt: skip
    if any(w.shape[1] != f for w in weights):
        raise ShapeError(f"{name} takes in {weights[0].shape[1]} entries, and its moments are those of {f}")
    entries, rows = fit.entries, fit.rows
    normal = Normal.empty(len(entries), len(rows))
    at_a, at_b = (torch.where(entries.side == other, 0, entries.index) for other in (Side.SECOND, Side.FIRST))
    views = _VIEWS[target]
    if target == "averaged":
        views = ((1 - fit.share, fit.share, views[0][2], 1 - fit.share, fit.share),)
    for first, second, seen, out_first, out_second in views:
        of_a, of_b = _coefficients(entries.side, first, second, seen)
        to_a, to_b = _coefficients(rows.side, out_first, out_second, seen)
        made = torch.zeros(len(rows), 2 * f + 1, dtype=torch.float64)  # targets from [x_A; x_B; 1]
        row_a, row_b = (torch.where(rows.side == other, 0, rows.index) for other in (Side.SECOND, Side.FIRST))
        made[:, :f], made[:, f:-1] = to_a[:, None] * weights[0][row_a], to_b[:, None] * weights[1][row_b]
        made[:, -1] = to_a * biases[0][row_a] + to_b * biases[1][row_b]
        ahead = product(joint.gram, made.T)  # of [x_A; x_B; 1] with the targets
        for part in torch.split(torch.arange(len(entries)), BLOCK):
            here, there = at_a[part], f + at_b[part]
            first_share, second_share = of_a[part, None], of_b[part, None]
            read = first_share * joint.gram[here] + second_share * joint.gram[there]
            normal.gram[part] += of_a * read[:, at_a] + of_b * read[:, f + at_b]  # read: (n, 2f + 1)
            normal.cross[part] += first_share * ahead[here] + second_share * ahead[there]
            normal.inputs[part] += read[:, -1]
        normal.targets += ahead[-1]
        normal.squares += float((ahead * made.T).sum())
        normal.count += joint.count
    return normal

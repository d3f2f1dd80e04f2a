"""What it costs to merge a pair of units, without labels: from second moments of what the layers that read it take in.

For a layer y = W x of networks A and B, with d = x_A - x_B, m = (x_A + x_B) / 2 and V = (W_A - W_B) / 4:

    (y_A + y_B) / 2 = (W_A + W_B) / 2 m + V d             what the merged layer is to give, and what is not the mean's
    pair u          |V_u d_u|^2                           error of the mean where u is merged and all others are apart
    group g         min_W |V d - W m|^2 - min_{W, U} |V d - W m - U d_g|^2
                                                          what least squares lose where g is merged and not apart

Mean squares over rows, without what is constant, which a bias or BatchNorm behind takes up. A pair's value in a layer
is its share of the first, times the second, over the mean square of (y_A + y_B) / 2; values add up over layers. Where B
counts for a share s other than 1 / 2, means are those of 1 - s of A and s of B, and V = s (1 - s) (W_A - W_B).

Least squares by n rows with p entries are off by more on other rows: theirs are taken times (n + p) / (n - p), and the
mean's own error in their place where that is less (Akaike 1969, final prediction error).

Nasery et al. 2024, arXiv:2407.02447, weighs groups by accuracies of networks that merge one group, or all but one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from merganser.align.moments import Joint
from merganser.align.orientation import inputs_first, matrix_of
from merganser.align.triangles import cholesky
from merganser.errors import MissingTensorError, ParameterError, ShapeError
from merganser.numerics import product
from merganser.symmetry import Spec
from merganser.symmetry.spec import groups_in


def values(
    spec: Spec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    moments: Mapping[str, Joint],
    groups: Iterable[str],
    *,
    ridge: float = 1e-4,
) -> dict[str, Tensor]:
    """What is gained by keeping each pair of a group apart, the worst pair first, as `unit_values` gives it.

    Raises:
        ParameterError: As `unit_values`; so are the others.
        MissingTensorError: See there.
        ShapeError: See there.
    """
    found = unit_values(spec, a, b, moments, groups, ridge=ridge)
    return {group: gains.sort(descending=True, stable=True).values for group, gains in found.items()}


def unit_values(
    spec: Spec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    moments: Mapping[str, Joint],
    groups: Iterable[str],
    *,
    ridge: float = 1e-4,
    share: float = 0.5,
) -> dict[str, Tensor]:
    """What is gained by keeping each pair of a group apart, by its number.

    Args:
        spec: symmetries of both networks.
        a: tensors of the one.
        b: tensors of the other, in the order of the one.
        moments: of what layers take in, by the layer's name, both networks in that order; each is looked up once.
        groups: to look at, none of which lies within another.
        ridge: what least squares are held to the mean by, as a share of the mean variance of their entries.
        share: of B in what is merged, in (0, 1).

    Returns:
        float64, shape (size,), not below 0; zeros where none of the layers reads a group.

    Raises:
        ParameterError: If a group is unknown or lies within one, or the ridge is not above 0.
        MissingTensorError: If a layer has no weight in a, b or the symmetries.
        ShapeError: If moments are those of another layer.
    """
    if not ridge > 0:
        raise ParameterError(f"ridge is {ridge}; it is a share above 0")
    found: dict[str, Tensor] = {}
    for group in groups:
        if group not in spec.groups or spec.groups[group].within is not None:
            raise ParameterError(f"{group!r} is no group that has units of its own")
        found[group] = torch.zeros(spec.groups[group].size, dtype=torch.float64)
    for name in moments:
        weight = f"{name}.weight"
        if lacking := [where for where, has in (("A", a), ("B", b), ("the spec", spec.axes)) if weight not in has]:
            raise MissingTensorError(f"{lacking[0]} lacks {weight}, and there are moments of {name}")
        turned = inputs_first(spec, weight)
        part = spec.axes[weight][0 if turned else 1]
        read = [group for group in dict.fromkeys(groups_in(part)) if group in found]
        if not read:
            continue
        joint = moments[name]
        taps = a[weight][0, 0].numel()
        first, second = (matrix_of(network[weight], turned=turned) for network in (a, b))
        if first.shape[1] != joint.entries:
            raise ShapeError(f"{weight} takes in {first.shape[1]} entries, and its moments have {joint.entries}")
        owned = {group: _entries(spec.places_in(part, group), taps) for group in read}
        for group, gains in _gains(joint, (first, second), owned, ridge, share).items():
            found[group] += gains
    return found


def kept_apart(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], heads: Iterable[str], share: float = 0.5
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors to value pairs by where the outputs of both networks' heads stay apart.

    A head is to give [y_A; y_B], which is the mean of both for weights [W_A / (1 - s); 0] and [0; W_B / s].
    """
    first, second = dict(a), dict(b)
    for name in (f"{head}.weight" for head in heads):
        x, y = a[name].detach(), b[name].detach()
        first[name] = torch.cat([x / (1 - share), y.new_zeros(y.shape)])
        second[name] = torch.cat([x.new_zeros(x.shape), y / share])
    return first, second


def _entries(places: Tensor, taps: int) -> Tensor:
    """Entries that belong to each unit, shape (units, entries a unit), from the unit of every column, or -1."""
    columns = places.argsort(stable=True)[int((places < 0).sum()) :].reshape(int(places.max()) + 1, -1)
    return (columns[:, :, None] * taps + torch.arange(taps)).reshape(len(columns), -1)


def _gains(
    joint: Joint, weights: tuple[Tensor, Tensor], owned: Mapping[str, Tensor], ridge: float, share: float
) -> dict[str, Tensor]:
    """Values of the pairs of all groups that a layer reads, in that layer."""
    first, second = weights
    off, mean = share * (1 - share) * (first - second), (1 - share) * first + share * second
    merged, mixed, differ = _covariances(joint, share)
    ahead = product(mixed, off.T)  # of m with V d
    error = float((product(off, differ) * off).sum())
    total = float((product(mean, merged) * mean).sum()) + 2 * float((mean * ahead.T).sum()) + error
    nothing = {group: torch.zeros(len(units), dtype=torch.float64) for group, units in owned.items()}
    if error <= 0 or total <= 0:
        return nothing
    more = any(units.numel() < len(merged) for units in owned.values())
    together = _fitted(merged.clone() if more else merged, ahead, error, joint.count, ridge)
    gains = {}
    for group, units in owned.items():
        alone = _alone(off, differ, units)
        lost = together - _apart(merged, mixed, differ, off, units.reshape(-1), joint.count, ridge)
        whole = float(alone.sum())
        gains[group] = alone * (max(lost, 0.0) / total / whole) if whole > 0 else nothing[group]
    return gains


def _covariances(joint: Joint, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of m with itself, of m with d, and of d with itself: each of shape (f, f)."""
    aa, ab, bb, n = joint.aa, joint.ab, joint.bb, joint.count
    rest = 1 - share
    m, d = rest * joint.mean_a + share * joint.mean_b, joint.mean_a - joint.mean_b
    merged = (ab + ab.T).mul_(rest * share).add_(aa, alpha=rest**2).add_(bb, alpha=share**2)
    mixed = (rest * aa).sub_(ab, alpha=rest).add_(ab.T, alpha=share).sub_(bb, alpha=share)
    differ = (aa - ab).sub_(ab.T).add_(bb)  # each without a matrix beside it
    for x, left, right in ((merged, m, m), (mixed, m, d), (differ, d, d)):
        x.div_(n).addr_(left, right, alpha=-1)
    return merged, mixed, differ


def _alone(off: Tensor, differ: Tensor, units: Tensor) -> Tensor:
    """Mean square of V_u d_u for every unit, shape (units,)."""
    inner = differ[units[:, :, None], units[:, None, :]]
    weights = off[:, units].movedim(1, 0)  # units, outputs, entries
    return ((weights @ inner) * weights).sum((1, 2)).clamp(min=0)


def _apart(
    merged: Tensor, mixed: Tensor, differ: Tensor, off: Tensor, apart: Tensor, count: int, ridge: float
) -> float:
    """What least squares leave of V d where d of some entries may be used as well."""
    if len(apart) == len(merged):
        return 0.0
    rest = off.clone()
    rest[:, apart] = 0
    error = float((product(rest, differ) * rest).sum())
    if error <= 0:
        return 0.0
    f = len(merged)
    both = merged.new_empty(f + len(apart), f + len(apart))
    both[:f, :f], both[:f, f:] = merged, mixed[:, apart]
    both[f:, :f], both[f:, f:] = both[:f, f:].T, differ[apart[:, None], apart]
    ahead = torch.cat([product(mixed, rest.T), product(differ[apart], rest.T)])
    return _fitted(both, ahead, error, count, ridge)


def _fitted(inputs: Tensor, ahead: Tensor, error: float, count: int, ridge: float) -> float:
    """What least squares are expected to leave of a target on other rows.

    Args:
        inputs: covariance of the entries, shape (p, p); written to.
        ahead: of the entries with the target, shape (p, outputs).
        error: mean square of the target, which is left where nothing is fitted.
        count: rows.
        ridge: share of the mean variance.
    """
    entries = len(inputs) + 1  # and a constant
    scale = float(inputs.diagonal().mean())
    if count <= entries or scale <= 0:
        return error
    inputs.diagonal().add_(ridge * scale)
    factor = cholesky(inputs)
    if factor is None:  # what varies is below the rounding of what does not
        return error
    explained = torch.linalg.solve_triangular(factor, ahead, upper=False).square().sum()
    left = max(error - float(explained), 0.0)
    return min(error, left * (count + entries) / (count - entries))

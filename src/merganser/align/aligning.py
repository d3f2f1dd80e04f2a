"""Bring a checkpoint into the order of units of another: match, and show it as one more source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from merganser.align.activations import ActivationCosts
from merganser.align.costs import Costs, DualCosts, Similarity, WeightCosts
from merganser.align.match import Matched, Progress, match
from merganser.errors import MissingTensorError
from merganser.numerics import sum_of_squares
from merganser.symmetry import Orders, Spec
from merganser.types import Source, TensorInfo


@dataclass(frozen=True)
class Aligned:
    """What aligning did.

    Attributes:
        matched: orders, and how they were found.
        before: Frobenius norm of the difference of the two, over tensors that may move.
        after: the same, after.
    """

    matched: Matched
    before: float
    after: float


def align(
    spec: Spec,
    stays: Source,
    moves: Source,
    *,
    similarity: Similarity = "frobenius",
    activations: ActivationCosts | None = None,
    balance: float = 0.5,
    sweeps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Aligned:
    """Find the order of one checkpoint's units that is nearest to another's.

    Both are held in memory while it runs.

    Args:
        spec: symmetries of both.
        stays: the reference.
        moves: what is brought into its order.
        similarity: "frobenius" is Git Re-Basin's, whose ascent never lowers the inner product of the two; "pearson"
            does not see how large a unit's weights are.
        activations: what the two do on the same inputs; weights are then compared by Pearson.
        balance: share of the weights where there are activations, in [0, 1]; 0 looks at activations alone.
        sweeps: at most; it ends before when one changes nothing.
        seed: of the order of groups in a sweep.
        progress: called as (groups done, groups of a sweep).

    Raises:
        ShapeError: If a checkpoint has other shapes than the symmetries say.
        MissingTensorError: If one has a tensor that may move, and the other has not.
    """
    a, b = _tensors(spec, stays), _tensors(spec, moves)
    for name in a.keys() ^ b.keys():
        lacks = moves if name in a else stays
        raise MissingTensorError(f"{lacks.ref} lacks {name}, which the other has")
    costs: Costs = WeightCosts(spec, a, b, similarity)
    start = None
    if activations is not None:
        start = match(spec, activations, sweeps=sweeps, seed=seed, progress=progress).orders
        costs = DualCosts(WeightCosts(spec, a, b, "pearson"), activations, balance)
    matched = match(spec, costs, start=start, sweeps=sweeps, seed=seed, progress=progress)
    before, after = (
        sum(sum_of_squares(a[n].double() - spec.apply(orders, n, b[n]).double()) for n in a) ** 0.5
        for orders in (spec.identity(), matched.orders)
    )
    return Aligned(matched, before, after)


def _tensors(spec: Spec, source: Source) -> dict[str, Tensor]:
    """Tensors that may move, by the network's names."""
    names = fitting(spec, source)
    return {name: source.read(stored) for name, stored in names.items() if spec.moves(name) and name not in spec.tied}


def fitting(spec: Spec, source: Source) -> dict[str, str]:
    """The network's name of every tensor -> the one that it is stored under, where it is stored.

    Raises:
        ShapeError: If a tensor has another shape than the symmetries say.
        MissingTensorError: If a tensor that may move is not there.
    """
    stored = {**{name: name for name in source.infos}, **source.aliases}
    found: dict[str, str] = {}
    for name in spec.axes:
        place = stored.get(name) or stored.get(spec.tied.get(name, ""))
        if place is not None:
            found[name] = place
        elif spec.moves(name):
            raise MissingTensorError(
                f"{source.ref} lacks {name}, which may move", "the symmetries are those of another network"
            )
    spec.check({name: source.infos[place].shape for name, place in found.items()}, ref=source.ref)
    return found


class Reordered:
    """A source with its units in another order; base of what merges see of an aligned checkpoint.

    Args:
        source: what is shown.
        spec: its symmetries.
        orders: for every new place the old one.
    """

    def __init__(self, source: Source, spec: Spec, orders: Orders) -> None:
        self._source, self._spec, self._orders = source, spec, orders
        self._names = {stored: name for name, stored in reversed(fitting(spec, source).items())}
        self.ref = source.ref
        self.infos: Mapping[str, TensorInfo] = source.infos
        self.aliases: Mapping[str, str] = source.aliases
        self.identity: str | None = None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or rows of it as they are in the new order."""
        x = self._source.read(name)
        known = self._names.get(name)
        if known is not None and self._spec.moves(known):
            x = self._spec.apply(self._orders, known, x)
        return x if rows is None else x[rows[0] : rows[1]]

    def companions(self) -> Sequence[Path]:
        """The files beside the source."""
        return self._source.companions()

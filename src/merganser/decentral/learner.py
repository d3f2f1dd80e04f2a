"""What an agent trains: a model with its data, as the rounds see it.

`TorchLearner` is one for networks and pictures; anything with these methods is another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from merganser.symmetry import Orders

#: A model: its tensors by name.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Memory:
    """What a learner remembers beside its weights: enough to go on with the same bits.

    Attributes:
        tensors: such as moments of the optimizer.
        content: JSON, such as the number of batches that it has seen.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """How one model is brought into the order of units of another.

    Attributes:
        orders: for every new place of every group the old one.
        fixed: by group, the share of units that stay where they are.
        correlation: by group, the mean similarity of units that come to stand at one place, in [-1, 1].
    """

    orders: Orders
    fixed: Mapping[str, float]
    correlation: Mapping[str, float]


class Aligner(Protocol):
    """Compares units, and moves them."""

    def match(self, stays: Tensors, moves: Sequence[Tensors]) -> list[Match]:
        """How each of some models is brought into the order of one."""
        ...

    def moved(self, orders: Orders, model: Tensors) -> dict[str, Tensor]:
        """A model with its units in another order; its function is the same."""
        ...


class Learner(Protocol):
    """A model with its data. It draws nothing that its seed and its memory do not determine."""

    def state(self) -> dict[str, Tensor]:
        """A copy of weights and buffers."""
        ...

    def load(self, state: Tensors) -> None:
        """Take over weights and buffers."""
        ...

    def batches(self, epochs: float) -> int:
        """How many batches so many passes over its data are; at least 1 where epochs is above 0."""
        ...

    def train(self, batches: int) -> float:
        """Take so many steps from where it stands; the mean loss."""
        ...

    def new_round(self) -> None:
        """A round begins: an optimizer that is not kept is made anew."""
        ...

    def recalibrate(self) -> int:
        """Take statistics of BatchNorm again on its own data; how many layers have some."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Numbers on test data, such as accuracy and loss."""
        ...

    def export(self) -> Memory:
        """What `restore` needs beside the weights, copied."""
        ...

    def restore(self, memory: Memory) -> None:
        """Go on from where `export` was called."""
        ...

    def aligner(self) -> Aligner | None:
        """What compares units by its own data, or by shared ones that were declared; None where nothing can."""
        ...

    def reorder(self, orders: Orders) -> None:
        """Put its own units in another order, and what the optimizer remembers of them; its function stays."""
        ...

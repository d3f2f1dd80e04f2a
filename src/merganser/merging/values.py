"""What a setting of a recipe is worth for one tensor: a number, a gradient over layers, or a choice by tensor name.

    0.5                                     everywhere
    [0.2, 0.8]                              a gradient: piecewise linear from the first layer (0.2) to the last (0.8)
    [{filter: mlp, value: 0.3}, 0.7]        0.3 where the tensor's name contains "mlp", else 0.7

At layer i of L a gradient of n values is read at (n - 1) i / (L - 1); a single layer reads the last value. Tensors
outside all layers (embeddings, final norm, head) read the first, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers; numbers are interpolated, anything else is chosen.

    Attributes:
        values: from the first layer to the last; at least one.
    """

    values: tuple[Scalar, ...]

    def at(self, depth: float) -> Scalar:
        """Value at a depth.

        Args:
            depth: 0 at the first layer, 1 at the last.

        >>> Gradient((0.0, 1.0, 0.0)).at(0.75)
        0.5
        """
        position = depth * (len(self.values) - 1)
        if abs(position - round(position)) < 1e-9:  # depth is a quotient that was rounded
            position = float(round(position))
        left = min(int(position), len(self.values) - 1)
        one, other = self.values[left], self.values[min(left + 1, len(self.values) - 1)]
        if _is_number(one) and _is_number(other):
            share = position - left
            return float(one) if share == 0 else float(one) * (1 - share) + float(other) * share
        return one


@dataclass(frozen=True, slots=True)
class Choice:
    """The first of several values whose filter is contained in the tensor's name.

    Attributes:
        cases: (filter, value) in order; the filter "*" fits every name.
    """

    cases: tuple[tuple[str, Scalar | Gradient], ...]

    def of(self, name: str) -> Scalar | Gradient | None:
        """Value for a tensor, None where no filter fits.

        >>> Choice((("mlp", 0.3), ("*", 0.7))).of("layers.0.mlp.weight")
        0.3
        """
        return next((value for fragment, value in self.cases if fragment == "*" or fragment in name), None)


Value = Scalar | Gradient | Choice


def resolve(levels: Sequence[Value | None], name: str, depth: float) -> Scalar | None:
    """Value of a setting for one tensor: from the first level that has one for it.

    Args:
        levels: the setting as given at each level, the most particular first; None where it is not given.
        name: of the tensor.
        depth: 0 at the first layer, 1 at the last.

    >>> resolve([Choice((("mlp", 0.3),)), Gradient((0.0, 1.0))], "layers.1.attn", 0.5)
    0.5
    """
    for value in levels:
        chosen = value.of(name) if isinstance(value, Choice) else value
        if chosen is not None:
            return chosen.at(depth) if isinstance(chosen, Gradient) else chosen
    return None


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mapped(value: Value, change: Callable[[Scalar], Scalar]) -> Value:
    """A value with every number of it changed.

    >>> mapped(Gradient((0, 1)), bool)
    Gradient(values=(False, True))
    """
    if isinstance(value, Choice):
        return Choice(tuple((fragment, _mapped(inner, change)) for fragment, inner in value.cases))
    return _mapped(value, change)


def _mapped(value: Scalar | Gradient, change: Callable[[Scalar], Scalar]) -> Scalar | Gradient:
    return Gradient(tuple(change(v) for v in value.values)) if isinstance(value, Gradient) else change(value)

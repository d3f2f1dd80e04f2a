"""Shares of a tensor: how many entries they are, and the changes thinned to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import per_model


def shares_of(name: str, value: float | Sequence[float], models: int) -> list[float]:
    """One share a model.

    Raises:
        ParameterError: If one is outside (0, 1].

    >>> shares_of("density", 0.2, 2)
    [0.2, 0.2]
    """
    shares = per_model(value, models)
    for share in shares:
        if not 0 < share <= 1:
            raise ParameterError(f"{name} is {share}; it is a fraction in (0, 1], not a percentage")
    return shares


def entries(share: float, n: int, count: str) -> int:
    """How many of n entries a share is.

    Args:
        share: in [0, 1].
        n: entries of the tensor.
        count: "round" for the nearest whole number, "floor" for the one below.

    Raises:
        ParameterError: If `count` is neither.

    >>> entries(0.25, 7, "round"), entries(0.25, 7, "floor")
    (2, 1)
    """
    if count not in ("round", "floor"):
        raise ParameterError(f"count is {count!r}; it is 'round' or 'floor'")
    return round(share * n) if count == "round" else int(share * n)


def magnitude(d: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """|d| of every model: what most methods rank by.

    >>> magnitude(torch.tensor([[-2.0, 1.0]]))
    tensor([[2., 1.]])
    """
    return d.abs() if isinstance(d, Tensor) else [d_k.abs() for d_k in d]


def less(x: Tensor, than: Tensor | float, *, out: Tensor) -> Tensor:
    """Where x is less, as truth values; on a CPU by numpy, which finds them several times faster than torch.

    >>> less(torch.tensor([1.0, 2.0]), 1.5, out=torch.empty(2, dtype=torch.bool))
    tensor([ True, False])
    """
    if x.device.type != "cpu":
        return torch.lt(x, than, out=out)
    np.less(x.numpy(), than.numpy() if isinstance(than, Tensor) else than, out=out.numpy())
    return out


def kept(d: Tensor | Sequence[Tensor], keep: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each change with zeros where it is not kept, one after another in the same buffer.

    A mask of 0.0 and 1.0, which `keep` may be too, and a product are many times faster than torch.where.

    >>> [x.tolist() for x in kept(torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]]))]
    [[2.0, 0.0]]
    """
    buffer = torch.empty_like(d[0])
    for d_k, keep_k in zip(d, keep, strict=False):
        mask = keep_k if keep_k.dtype == buffer.dtype else torch.ne(keep_k.view(torch.uint8), 0, out=buffer)
        yield torch.mul(mask, d_k, out=buffer)


def factors_of(
    rescale: str, stretch: Tensor | Sequence[float] | None, models: int, *, choices: Sequence[str]
) -> list[float]:
    """What each thinned change is multiplied by: its stretch for "l1", else 1.

    Raises:
        ParameterError: If `rescale` is none of the choices, or the stretch is missing or not finite.

    >>> factors_of("none", None, 2, choices=("none", "l1"))
    [1.0, 1.0]
    """
    if rescale not in choices:
        raise ParameterError(f"rescale is {rescale!r}; it is one of {', '.join(map(repr, choices))}")
    if rescale != "l1":
        return [1.0] * models
    if stretch is None:
        raise ParameterError("rescale is 'l1', and the norms of the changes were not measured")
    return per_model(stretch.tolist() if isinstance(stretch, Tensor) else stretch, models)

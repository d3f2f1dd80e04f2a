"""Plain Python in float64, written from the equations: what the tests of joint methods compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

#: What a checkpoint may hold, large enough that every cut of `CUTS` matters somewhere.
SHAPES = [(), (1,), (0, 4), (16, 1), (5, 8), (4, 3, 3, 3)]
BOTH_DTYPES = [torch.float32, torch.float64]
CUTS = (1, 3, 7, 16, 37)

Stack = list[list[float]]


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise, uniform on [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def flat(stack: Tensor) -> Stack:
    """The models of a stack as lists."""
    return [x.double().reshape(-1).tolist() for x in stack]


def tensor(values: Sequence[float], shape: Sequence[int]) -> Tensor:
    """A list as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64).reshape(tuple(shape))


def keep_of(score: Tensor, ranks: Sequence[tuple[int, int]]) -> Tensor:
    """What a caller brings as `keep`: the entries of each score with one of its ranks; ties by index."""
    masks = []
    for values, (start, stop) in zip(flat(score), ranks, strict=True):
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        chosen = set(order[start:stop])
        masks.append(torch.tensor([i in chosen for i in range(len(values))], dtype=torch.bool))
    return torch.stack(masks).reshape(score.shape)


def masked(d: Stack, keep: Sequence[Sequence[bool]]) -> Stack:
    """Zeros where not kept."""
    return [[v if m else 0.0 for v, m in zip(x, mask, strict=True)] for x, mask in zip(d, keep, strict=True)]


def plain_sum(x: Stack, weight: Sequence[float], *, scale: float = 1.0, normalize: bool = False) -> list[float]:
    """Weighted sum, entry by entry."""
    divisor = sum(weight) if normalize else 1.0
    return [
        scale * sum(w * v for w, v in zip(weight, column, strict=True)) / divisor for column in zip(*x, strict=True)
    ]


def plain_election(
    x: Stack,
    weight: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    cancelled: str = "none",
    weighted_vote: bool = True,
) -> list[float]:
    """Sum or mean of those whose sign is the elected one, entry by entry."""
    merged = []
    for column in zip(*x, strict=True):
        y = [w * v for w, v in zip(weight, column, strict=True)]
        vote = sum(y if weighted_vote else column)
        sign = (vote > 0) - (vote < 0) or (1 if cancelled == "plus" else 0)
        agree = [(v, abs(w)) for v, w in zip(y, weight, strict=True) if v * sign > 0]
        divisor = sum(w for _, w in agree) if normalize else 1.0
        merged.append(scale * sum(v for v, _ in agree) / divisor if agree else 0.0)
    return merged


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Shape and dtype are right, and the numbers are those of the loops up to the rounding of the dtype."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def check_elementwise(function: Callable[..., Tensor], stacks: dict[str, Tensor], **given: Any) -> None:
    """Any part of the entries gives the same bits, as a stack or as a list of models; and no input is written to."""
    before = {name: stack.clone() for name, stack in stacks.items()}
    whole = function(**stacks, **given)
    entries = {name: stack.reshape(stack.shape[0], -1) for name, stack in stacks.items()}
    n = prod(whole.shape)
    for size in CUTS:
        for as_list in (False, True):
            parts = []
            for start in range(0, n, size):
                part = {name: stack[:, start : start + size] for name, stack in entries.items()}
                parts.append(function(**{k: list(v) if as_list else v for k, v in part.items()}, **given))
            if parts:
                assert torch.equal(torch.cat(parts).reshape(whole.shape), whole)
    function(**stacks, **given).fill_(3)
    assert all(torch.equal(stacks[name], before[name]) for name in stacks)


def check_rows(function: Callable[..., Tensor], stacks: dict[str, Tensor], **given: Any) -> None:
    """The rows of axis 0 in any groups give the same bits, as a stack or as a list; and no input is written to."""
    before = {name: stack.clone() for name, stack in stacks.items()}
    whole = function(**stacks, **given)
    for size in CUTS:
        for as_list in (False, True):
            parts = []
            for start in range(0, whole.shape[0], size):
                part = {name: stack[:, start : start + size] for name, stack in stacks.items()}
                parts.append(function(**{k: list(v) if as_list else v for k, v in part.items()}, **given))
            if parts:
                assert torch.equal(torch.cat(parts), whole)
    function(**stacks, **given).fill_(3)
    assert all(torch.equal(stacks[name], before[name]) for name in stacks)

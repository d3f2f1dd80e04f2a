"""Operations of a program that are whole layers, as modules without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Given = Mapping[str, Any]
Maker = Callable[[Given, Tensor, int], "nn.Module | None"]

#: Arguments that a layer has of its own.
PARAMETERS, STATISTICS, COUNT = ("weight", "bias"), ("running_mean", "running_var"), "num_batches_tracked"


def layer_of(op: str, given: Given, tensors: Mapping[str, Tensor], rank: int) -> nn.Module | None:
    """The layer that an operation is, on `meta`; None where it is none, or reads other tensors than the layer has.

    Args:
        op: name of the operation, without overload.
        given: its arguments; where they are tensors of the layer, their names in it.
        tensors: all that the layer has.
        rank: axes of what it takes in.
    """
    own = {n for n in (*PARAMETERS, *STATISTICS) if given.get(n) is not None}
    if op not in MAKERS or "weight" not in own or own != set(tensors) - {COUNT}:
        return None
    if any(given[n] != n or isinstance(tensors[n], nn.Parameter) != (n in PARAMETERS) for n in own):
        return None
    return MAKERS[op](given, tensors["weight"], rank)


def _linear(given: Given, weight: Tensor, rank: int) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=given["bias"] is not None, device="meta")


def _convolution(given: Given, weight: Tensor, rank: int) -> nn.Module | None:
    if given.get("transposed"):
        return None
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
    padding, groups = given["padding"], given["groups"]
    return kind(  # type: ignore[no-any-return]
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_each(given["stride"], weight.ndim - 2),
        padding=padding if isinstance(padding, str) else _each(padding, weight.ndim - 2),
        dilation=_each(given["dilation"], weight.ndim - 2),
        groups=groups,
        bias=given["bias"] is not None,
        device="meta",
    )


def _each(sizes: Any, axes: int) -> tuple[int, ...]:
    """A size for every axis; one for all of them may be written once."""
    found = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return found * axes if len(found) == 1 else found


def _batch_norm(given: Given, weight: Tensor, rank: int) -> nn.Module | None:
    kinds: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if rank not in kinds or any(given[n] is None for n in (*PARAMETERS, *STATISTICS)):
        return None
    return kinds[rank](len(weight), eps=given["eps"], momentum=given["momentum"], device="meta")  # type: ignore[no-any-return]


def _layer_norm(given: Given, weight: Tensor, rank: int) -> nn.Module:
    return nn.LayerNorm(tuple(weight.shape), eps=given["eps"], bias=given["bias"] is not None, device="meta")


def _group_norm(given: Given, weight: Tensor, rank: int) -> nn.Module | None:
    if given["bias"] is None:
        return None
    return nn.GroupNorm(given["num_groups"], len(weight), eps=given["eps"], device="meta")


def _embedding(given: Given, weight: Tensor, rank: int) -> nn.Module | None:
    if given["scale_grad_by_freq"] or given["sparse"]:
        return None
    row = given["padding_idx"]
    return nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=None if row < 0 else row, device="meta")


MAKERS: dict[str, Maker] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
}

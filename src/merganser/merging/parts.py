"""What a merge does with one chunk of one tensor before and after the method's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.continual.roles import literal
from merganser.errors import DtypeError, NonFiniteError
from merganser.merging.held import Rows
from merganser.merging.plan import Piece, TensorPlan
from merganser.merging.ranking import Ranked, Span
from merganser.merging.recipe import Recipe
from merganser.noise import uniform
from merganser.numerics import all_finite, compute_dtype, narrowed
from merganser.types import Source


@dataclass
class Measured:
    """What was measured of one whole tensor.

    Attributes:
        brought: figures that the function asks for.
        ranks: for each model (or for all at once) which entries are kept; None where the function does not ask.
        position: row that must be asked for next, since ranks are given out in order.
        masks: by rows, the masks of all models that were drawn while `stretch` was measured, as bits.
    """

    brought: dict[str, Any]
    ranks: list[Ranked | None] | None = None
    position: int = 0
    masks: dict[tuple[int, int] | None, list[Any]] = field(default_factory=dict)


def refuse_nonfinite(piece: Piece, x: Tensor) -> None:
    """Refuse NaN and infinity in what was read of a model.

    Raises:
        NonFiniteError: Names the tensor and the model.
    """
    if not all_finite(x):
        raise NonFiniteError(f"{piece.name} of {piece.ref} holds NaN or infinity", "leave the model out")


def copied(name: str, tensor: TensorPlan, read: Callable[[Piece], Tensor]) -> Tensor:
    """Some of a tensor that is not merged: the base's, or the first model's.

    Raises:
        DtypeError: If it must be equal in all models and is not.
    """
    lead = tensor.base or tensor.models[0]
    value = read(lead)
    if tensor.role == "exact":
        for piece in tensor.models:
            if not torch.equal(read(piece), value):
                raise DtypeError(
                    f"{name} holds integers that differ between {lead.ref} and {piece.ref}",
                    f"keep: ['{literal(name)}'] takes those of {lead.ref}",
                )
    return narrowed(value, tensor.info.dtype, name)


def noise_of(recipe: Recipe, name: str, tensor: TensorPlan, rows: Rows) -> list[Tensor]:
    """Noise of some rows, of each model: a model's own wherever it stands."""
    shape = tensor.info.shape
    wide, (start, stop) = prod(shape[1:]), rows if rows is not None else (0, tensor.info.rows)
    part = (stop - start, *shape[1:]) if shape else ()
    refs = [recipe.written.get(model.ref, model.ref) for model in tensor.models]
    return [uniform(recipe.seed, ref, name, start * wide, stop * wide).reshape(part) for ref in refs]


def widened(stored: list[Tensor], *, based: bool, changes: bool) -> tuple[list[Tensor], Tensor | None]:
    """What was read, in the type of the arithmetic: models, or models minus the base, and the base.

    Args:
        stored: the models' and behind them, if `based`, the base's.
        based: whether there is a base.
        changes: whether to subtract it.
    """
    double = any(x.dtype == torch.float64 for x in stored)
    dtype = torch.float64 if double else compute_dtype(stored[0].dtype)
    models, base = (stored[:-1], stored[-1].to(dtype)) if based else (stored, None)
    if not changes or base is None:
        return [x.to(dtype) for x in models], base
    return [x.to(dtype) - base if x.dtype == dtype else x.to(dtype).sub_(base) for x in models], base


def score_bytes(tensor: TensorPlan, sources: Mapping[str, Source]) -> int:
    """Bytes of one score for every entry, in the type of the arithmetic."""
    double = any(sources[p.ref].infos[p.name].dtype == "F64" for p in tensor.pieces)
    return (8 if double else 4) * prod(tensor.info.shape)


def kept_of(measured: Measured, scores: Sequence[Tensor]) -> list[Tensor]:
    """For each model, or for all at once, 1 where the next entries are kept, else 0."""
    assert measured.ranks is not None
    return [
        torch.zeros_like(score) if ranks is None else ranks.mask(score)
        for ranks, score in zip(measured.ranks, scores, strict=True)
    ]


def spans_of(
    ranks: Callable[[int, Mapping[str, Any]], Span],
    numel: int,
    given: Mapping[str, Any],
    models: int,
    differing: Callable[[], Sequence[int]],
) -> list[Span]:
    """Ranks [start, stop) that are kept, of each model.

    Args:
        ranks: of the method.
        numel: entries of the tensor.
        given: settings; tuples where they differ from model to model.
        models: how many masks there are.
        differing: how many entries of each have a score above 0; asked for where a share of those counts.
    """
    spans = []
    counted: Sequence[int] = ()
    for k in range(models):
        own = {n: (v[k] if isinstance(v, tuple) else v) for n, v in given.items()}
        span = ranks(numel, own)
        if given.get("among") == "differing" and span != (0, numel):  # a share of some, where it is not all
            counted = counted or differing()
            span = ranks(counted[k], own)
        assert 0 <= span[0] <= span[1] <= numel
        spans.append(span)
    return spans


def mean_of(stack: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Running statistics of several models: the mean weighted by the sizes of the weights, whatever the method.

    >>> mean_of([torch.tensor([1.0]), torch.tensor([4.0])], [2.0, -1.0])
    tensor([2.])
    """
    sizes = [abs(w) for w in weight]
    total = sum(sizes)
    if not total:
        sizes, total = [1.0] * len(stack), float(len(stack))
    merged = stack[0] * (sizes[0] / total)
    for x, size in zip(stack[1:], sizes[1:], strict=True):
        merged.add_(x, alpha=size / total)
    return merged


def packed(masks: Tensor) -> list[Any]:
    """Masks of several models as bits, an eighth of their room."""
    return [np.packbits(mask.numpy()) for mask in masks]


def unpacked(bits: Sequence[Any], shape: Sequence[int]) -> Iterator[Tensor]:
    """The masks again, one after another.

    >>> [mask.tolist() for mask in unpacked(packed(torch.tensor([[True, False]])), (2,))]
    [[True, False]]
    """
    for some in bits:
        yield torch.from_numpy(np.unpackbits(some, count=prod(shape))).view(torch.bool).reshape(tuple(shape))


def seen(x: Tensor, tensor: TensorPlan) -> Tensor:
    """A tensor as a rule for matrices sees it: (out, in)."""
    flat = x.flatten(1)
    return flat.T.contiguous() if tensor.role == "transposed" else flat


def restored(x: Tensor, tensor: TensorPlan) -> Tensor:
    """The inverse of `seen`."""
    return (x.T if tensor.role == "transposed" else x).reshape(tensor.info.shape)

"""The spectrum of a matrix, from the float64 Gram matrix of its short side; the long side goes by in blocks."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from merganser.numerics import gram_of_rows, product

if TYPE_CHECKING:
    from jaxtyping import Float

#: Elements of one block in float64.
BLOCK_ELEMENTS = 1 << 22
#: Singular values below this share of the largest are rounding of the stored models, and not directions.
LIVE = 1e-4


def short_gram(x: Float[Tensor, "m n"]) -> Float[Tensor, "p p"]:
    """The product x x^T, or x^T x where that is smaller, in float64.

    >>> short_gram(torch.tensor([[1.0, 2.0, 2.0]]))
    tensor([[9.]], dtype=torch.float64)
    """
    short = _short(x)
    gram = torch.zeros(short.shape[0], short.shape[0], dtype=torch.float64)
    for block in _blocks(short):
        gram += gram_of_rows(block.double())
    return gram


def effective_rank(gram: Float[Tensor, "p p"]) -> float:
    """How many directions a change spreads over: exp(-sum_i p_i ln p_i), p_i = s_i^2 / sum_j s_j^2; 0 for zeros.

    It is r where r singular values are equal and the others 0. Roy and Vetterli (2007) take s_i for s_i^2.

    Args:
        gram: whose eigenvalues are the squared singular values s_i^2.

    >>> effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    2.0
    """
    energy = np.linalg.eigvalsh(gram.double().numpy()).clip(min=0)
    if not energy.any():
        return 0.0
    shares = energy / energy.sum()
    shares = shares[shares > 0]
    return exp(-float((shares * np.log(shares)).sum()))


def leading(x: Float[Tensor, "m n"], count: int) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"]]:
    """The `count` leading left and right singular vectors, in float64, or fewer where the matrix has no more.

    Args:
        x: the matrix.
        count: how many.

    >>> left, right = leading(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), 2)
    >>> left.abs().tolist(), right.abs().tolist()
    ([[0.0], [1.0]], [[0.0], [1.0]])
    """
    short = _short(x)
    energy, vectors = map(torch.from_numpy, np.linalg.eigh(short_gram(x).numpy()))
    s = energy.flip(0)[:count].clamp(min=0).sqrt()
    live = s > LIVE * s[:1]
    near = vectors.flip(1)[:, :count][:, live].contiguous()
    far = torch.cat([product(block.double().T, near) for block in _blocks(short)]) / s[live]
    return (near, far) if short is x else (far, near)


def _short(x: Tensor) -> Tensor:
    return x if x.shape[0] <= x.shape[1] else x.T


def _blocks(short: Tensor) -> tuple[Tensor, ...]:
    return torch.split(short, max(1, BLOCK_ELEMENTS // max(1, short.shape[0])), dim=1)

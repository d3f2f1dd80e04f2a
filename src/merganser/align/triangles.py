"""Large symmetric matrices in place: sums of products, the other triangle, and Cholesky factors.

A matrix of second moments of a 3x3 convolution over 512 channels of two networks takes 680 MB. BLAS and LAPACK work on
one of its triangles where it lies; torch's own products and factors make one or two matrices beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def add_products(gram: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the lower triangle of a matrix, in place: half the products, and no matrix beside it.

    Args:
        gram: float64, contiguous, shape (f, f).
        rows: float64, contiguous, shape (n, f).
    """
    from scipy.linalg.blas import dsyrk

    if len(rows):
        whole: Any = gram.numpy()
        added = dsyrk(1.0, rows.numpy().T, beta=1.0, c=whole.T, overwrite_c=1)
        assert np.shares_memory(added, whole)


def mirrored(gram: Tensor, block: int = 1024) -> Tensor:
    """A matrix whose upper triangle is set to its lower one, in place."""
    for start in range(0, len(gram), block):
        stop = start + block
        gram[:start, start:stop] = gram[start:stop, :start].T
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return gram


def taken(gram: Tensor, places: Tensor, block: int = 256) -> Tensor:
    """Some rows and the same columns of a matrix, with little memory beside the result."""
    found = gram.new_empty(len(places), len(places))
    for start in range(0, len(places), block):
        found[start : start + block] = gram[places[start : start + block]].index_select(1, places)
    return found


def cholesky(gram: Tensor) -> Tensor | None:
    """Lower Cholesky factor in the memory of a symmetric matrix, of which only the upper triangle is read.

    Args:
        gram: float64, on a CPU; written to if it is contiguous.

    Returns:
        Shape (n, n), a view with its columns along memory and zeros above; None where there is no factor.
    """
    from scipy.linalg.lapack import dpotrf

    if not len(gram):
        return gram
    whole: Any = gram.contiguous().numpy()
    factor, failed = dpotrf(whole.T, lower=1, clean=1, overwrite_a=1)
    return None if failed else torch.from_numpy(factor)


def solved(factor: Tensor, right: Tensor) -> Tensor:
    """What a matrix with a lower Cholesky factor takes to the right sides.

    By LAPACK as scipy has it: on AMD's processors in two thirds of the time that torch's (MKL) takes.

    Args:
        factor: float64, shape (n, n).
        right: float64, shape (n, r).

    Returns:
        Shape (n, r).
    """
    from scipy.linalg.lapack import dpotrs

    if not right.numel():
        return right.clone()
    found, _ = dpotrs(factor.numpy(), right.numpy(), lower=1)
    return torch.from_numpy(found)

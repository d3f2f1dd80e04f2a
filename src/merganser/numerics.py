"""Arithmetic that every room shares: dtypes, accumulation, packing, Gram-based factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.errors import NonFiniteError, ParameterError
from merganser.lapack import eigen_in_place

#: safetensors dtype name -> torch dtype.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
#: torch dtype -> safetensors dtype name.
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def compute_dtype(stored: torch.dtype, *, float64: bool = False) -> torch.dtype:
    """The type to do arithmetic in: float32, or float64 where asked for or where the tensor is float64."""
    return torch.float64 if float64 or stored == torch.float64 else torch.float32


def narrowed(x: Tensor, dtype: str, name: str) -> Tensor:
    """Cast to a type by its safetensors name.

    Raises:
        NonFiniteError: If a finite value becomes infinite.
    """
    cast = x.to(TORCH_DTYPES[dtype])
    if cast is x or not cast.is_floating_point() or all_finite(cast):
        return cast
    if not torch.equal(torch.isfinite(cast), torch.isfinite(x)):
        raise NonFiniteError(f"{name} overflows {dtype}", "choose a wider type: --dtype BF16 or F32")
    return cast


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite: the least and the largest are finite, and NaN where there is one.

    >>> all_finite(torch.tensor([1.0, -2.0])), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if not x.numel() or not x.is_floating_point():
        return True
    least, most = x.detach().aminmax()  # one pass at the memory's pace; torch.isfinite takes thirty times as long
    return isfinite(least.item()) and isfinite(most.item())


def raw_bytes(x: Tensor) -> memoryview:
    r"""The bytes of a CPU tensor in memory order, without a copy where it is contiguous.

    >>> bytes(raw_bytes(torch.tensor([1, 2], dtype=torch.uint8)))
    b'\x01\x02'
    """
    array: Any = x.contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else b""
    return memoryview(array)


def per_model(value: float | Sequence[float], models: int) -> list[float]:
    """One number a model from a number for all or from a sequence.

    Raises:
        ParameterError: If the sequence has another length.

    >>> per_model(0.5, 2)
    [0.5, 0.5]
    """
    if isinstance(value, (int, float)):
        return [float(value)] * models
    if len(value) != models:
        raise ParameterError(f"{len(value)} values are given for {models} models")
    return [float(v) for v in value]


def sum_of_squares(x: Tensor) -> float:
    """Sum of x**2, added in float64 by blocks, so that no float64 copy of the whole is made.

    >>> sum_of_squares(torch.tensor([3.0, 4.0]))
    25.0
    """
    blocks = (block.double() for block in torch.split(x.reshape(-1), 1 << 16))
    return fsum(float(torch.dot(block, block)) for block in blocks)


def singular_tolerance(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Share of the largest singular value below which a direction is rounding and not data.

    Rounding every entry of an m x n matrix moves its singular values by at most
    eps/2 * (sqrt(m) + sqrt(n)) / sqrt(max(m, n)) * s_1 <= eps * s_1; 8 eps leaves room. The float64 route
    of a float64 SVD loses max(m, n) eps instead.
    """
    if dtype == torch.float64:
        return max(shape) * torch.finfo(torch.float64).eps
    return 8 * torch.finfo(torch.float32).eps


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product, on a CPU by numpy: on AMD's processors its BLAS is a tenth to a fifth faster than torch's (MKL).

    Args:
        a: shape (m, k).
        b: shape (k, n), of the same dtype.

    Returns:
        Shape (m, n).
    """
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64):
        return a @ b
    made = a.new_empty(a.shape[0], b.shape[1])  # by torch, which takes large tensors in huge pages: fewer page faults
    np.matmul(a.detach().numpy(), b.detach().numpy(), out=made.numpy())
    return made


def gram_of_rows(x: Tensor) -> Tensor:
    """Product x x^T, exactly symmetric. On a CPU by numpy, which does half the work (syrk).

    Args:
        x: shape (m, n).

    Returns:
        Shape (m, m).

    >>> gram_of_rows(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]])
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        rows: Any = (x if x.T.is_contiguous() else x.contiguous()).detach().numpy()
        made = x.new_empty(x.shape[0], x.shape[0])
        np.matmul(rows, rows.T, out=made.numpy())
        return made
    g = x @ x.T
    return g.tril() + g.tril(-1).T


def eigen_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of x x^T, largest first, and eigenvectors.

    On a CPU by scipy, in place: on AMD's processors its LAPACK is a fifth faster than torch's, and numpy copies twice.

    Args:
        x: shape (m, n), float64.

    Returns:
        Shapes (m,) and (m, m), a column each.
    """
    negative = gram_of_rows(x).neg_()  # so that the smallest eigenvalue of it, which LAPACK puts first, is the largest
    if x.device.type == "cpu":
        values = eigen_in_place(negative)
        return values.neg_(), negative.T
    values, vectors = torch.linalg.eigh(negative)
    return values.neg_(), vectors


def pack_symmetric(g: Tensor) -> Tensor:
    """Store a symmetric n x n matrix in half the room.

    With h = ceil(n/2), row i of the result holds G[i, i:h] of the upper left triangle behind
    G[h+i, h:h+i+1] of the lower right one, and then the h x h block in the upper right corner.

    Args:
        g: symmetric, shape (n, n).

    Returns:
        Shape (h, 2 h + 1).

    >>> pack_symmetric(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([[3., 1., 2.]])
    """
    n = g.shape[0]
    h = (n + 1) // 2
    if n != 2 * h:
        g = torch.nn.functional.pad(g, (0, 1, 0, 1))
    packed = g.new_empty(h, 2 * h + 1)
    packed[:, 1 : h + 1] = g[:h, :h].triu()
    packed[:, 0] = 0
    packed[:, :h] += g[h:, h:].tril()
    packed[:, h + 1 :] = g[:h, h:]
    return packed


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Undo `pack_symmetric`.

    Args:
        packed: shape (h, 2 h + 1) with h = ceil(n/2).
        n: order of the matrix.

    Returns:
        Shape (n, n), exactly symmetric.
    """
    h = packed.shape[0]
    g = packed.new_empty(2 * h, 2 * h)
    upper = packed[:, 1 : h + 1].triu()
    g[:h, :h] = upper + upper.triu(1).T
    lower = packed[:, :h].tril()
    g[h:, h:] = lower + lower.tril(-1).T
    g[:h, h:] = packed[:, h + 1 :]
    g[h:, :h] = packed[:, h + 1 :].T
    return g[:n, :n]


def live_factors(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of x that are above rounding, strongest first: x = U diag(s) V^T up to that.

    float64 takes an economy SVD. float32 takes eigenvectors of the float64 Gram matrix of the short side, which
    is faster and is sound for s / s_1 down to 1e-8, below the tolerance.

    Args:
        x: shape (m, n), float32 or float64; may be empty.

    Returns:
        U of shape (m, r), s of shape (r,), V of shape (n, r), all float64; r = 0 for zeros.
    """
    tall = x if x.shape[0] >= x.shape[1] else x.T
    if x.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(tall, full_matrices=False)
        v = vh.T
    else:
        tall = tall.double()
        _, v = eigen_of_rows(tall.T)
        u = tall @ v
        s = torch.linalg.vector_norm(u, dim=0)
        u = u / s.clamp(min=torch.finfo(s.dtype).tiny)
    live = s > singular_tolerance((x.shape[0], x.shape[1]), x.dtype) * s[:1]
    u, s, v = u[:, live], s[live], v[:, live]
    return (u, s, v) if x.shape[0] >= x.shape[1] else (v, s, u)

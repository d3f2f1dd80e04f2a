"""LAPACK's symmetric eigensolver in place, outside of Python's lock, and how many threads linear algebra takes.

numpy copies the matrix on its way in and the vectors on their way out, scipy's own wrapper keeps the lock, and both
take their workspace in small pages: a tenth of the time of a matrix of order 768. scipy offers LAPACK to Cython as
plain C functions; here one of them is called. Where it was built with other integers, numpy's solver is.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Of C: a workspace of more numbers, from order 32,767 on, has no length that LAPACK could be told.
LARGEST_INT = 2**31 - 1


def eigen_in_place(g: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix, smallest first; its rows become the eigenvectors.

    Args:
        g: shape (n, n), float64, contiguous, on a CPU, exactly symmetric.

    Returns:
        Shape (n,).

    Raises:
        LinAlgError: If LAPACK does not converge.

    >>> g = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> eigen_in_place(g), g.abs()
    (tensor([1., 2.], dtype=torch.float64), tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64))
    """
    n, solve = g.shape[0], _dsyevd()
    room = 1 + 6 * n + 2 * n * n
    if solve is None or room > LARGEST_INT:
        found = np.linalg.eigh(g.numpy())
        g.copy_(torch.from_numpy(found.eigenvectors).T)
        return torch.from_numpy(found.eigenvalues)
    values = g.new_empty(n)
    work = g.new_empty(room)
    integers = torch.empty(3 + 5 * n, dtype=torch.int32)
    order, leading, length, integer_length, failed = (
        ctypes.c_int(value) for value in (n, max(1, n), room, len(integers), 0)
    )
    by_reference = ctypes.byref
    solve(
        b"V",
        b"L",
        by_reference(order),
        g.data_ptr(),
        by_reference(leading),
        values.data_ptr(),
        work.data_ptr(),
        by_reference(length),
        integers.data_ptr(),
        by_reference(integer_length),
        by_reference(failed),
    )
    if failed.value:
        raise np.linalg.LinAlgError(f"the eigenvalues of a matrix of order {n} were not found (NaN or infinity?)")
    return values


@cache
def _dsyevd() -> Callable[..., None] | None:
    """The C function; Cython names its capsule by the signature. None if its integers are wider than C's."""
    from scipy.linalg import cython_lapack

    _pools.cache_clear()  # it brought a pool of its own
    for limits in _limited[:1]:  # the outermost, which ends last and gives it its threads back then
        limits.enter_context(_pools().limit(limits=1))
    capsule = cython_lapack.__pyx_capi__["dsyevd"]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = name_of(capsule)
    arguments = [ctypes.c_void_p] * 11
    if (signature.count(b" *"), signature.count(b"int *")) != (11, 6):  # LAPACK built with 64-bit integers
        return None
    return ctypes.CFUNCTYPE(None, *arguments)(pointer_of(capsule, signature))


#: Contexts of `single_threaded` that are open, the outermost first; of one thread, the others wait.
_limited: list[ExitStack] = []
_turn = threading.RLock()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Linear algebra on one thread, torch's, numpy's and scipy's, even if that is loaded meanwhile; then as before.

    The number is the whole process's: of two threads that ask for it, the second waits until the first is done.
    """
    with _turn, ExitStack() as limits:
        before = torch.get_num_threads()
        limits.callback(torch.set_num_threads, before)
        torch.set_num_threads(1)
        limits.enter_context(_pools().limit(limits=1))
        _limited.append(limits)
        try:
            yield
        finally:
            _limited.remove(limits)


@cache
def _pools() -> Any:
    """Of all algebra that is loaded; looked for once, since an interrupt while it is looked for would be lost."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()

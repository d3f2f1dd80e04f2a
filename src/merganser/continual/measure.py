"""Read two models side by side, tensor by tensor: the change, its norm, and a digest of every byte that was read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum, inf, sqrt
from typing import Any

import torch
from torch import Tensor

from merganser.continual.roles import Role, quoted
from merganser.continual.stream import chunks
from merganser.errors import NonFiniteError
from merganser.numerics import all_finite, compute_dtype, raw_bytes, sum_of_squares
from merganser.types import Source, TensorInfo


@dataclass(frozen=True)
class Read:
    """What was seen of one tensor of one model, once all of it went by.

    Attributes:
        digest: sha256 of its bytes.
        squares: sums of squares of its values, or of its change.
    """

    digest: str
    squares: tuple[float, ...]


@dataclass
class Reading:
    """What was seen of one tensor of one model while it went by.

    Attributes:
        hash: sha256 of its bytes.
        squares: sums of squares of its values, or of its change, one a chunk.
    """

    hash: Any = field(default_factory=hashlib.sha256)
    squares: list[float] = field(default_factory=list)

    def ended(self) -> Read:
        """All of it, as another process may be told."""
        return Read(self.hash.hexdigest(), tuple(self.squares))


def read_base(
    base: Source, name: str, rows: tuple[int, int] | None, reading: Reading, *, float64: bool, device: str
) -> Tensor:
    """A tensor of the base, or some rows of it, in the type of the arithmetic.

    Args:
        base: the base.
        name: of the tensor.
        rows: [start, stop) of axis 0, in order of the calls; None for all.
        reading: grows by what is read.
        float64: whatever the file holds.
        device: where the result is.
    """
    stored = base.read(name, rows)
    reading.hash.update(raw_bytes(stored))
    old = stored.to(device, compute_dtype(stored.dtype, float64=float64))
    reading.squares.append(sum_of_squares(old))
    return old


def change(
    expert: Source,
    stored: str,
    rows: tuple[int, int] | None,
    old: Tensor,
    reading: Reading,
    *,
    name: str,
    allow_nonfinite: bool,
) -> Tensor:
    """Expert minus base: a whole tensor, or some rows of it.

    Args:
        expert: the expert.
        stored: name of the tensor there.
        rows: [start, stop) of axis 0, in order of the calls; None for all.
        old: the same of the base, by `read_base`; float64 where the arithmetic is to be.
        reading: grows by what is read of the expert; its squares are the change's.
        name: of the tensor in the base.
        allow_nonfinite: count NaN and infinity as no change.

    Raises:
        NonFiniteError: If the expert holds NaN or infinity there, and that is not allowed; or if the difference of
            finite values overflows.
    """
    new = expert.read(stored, rows)
    reading.hash.update(raw_bytes(new))
    d = torch.sub(new.to(old.device, compute_dtype(new.dtype, float64=old.dtype == torch.float64)), old)
    del new
    square = sum_of_squares(d)
    if not (square < inf or all_finite(d)):
        if bool((~d.isfinite() & expert.read(stored, rows).to(d.device).isfinite()).any()):
            one_of = str(d.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"the change of {name} in {expert.ref} is beyond {one_of}, though its values are not",
                f"leave it out with --ignore {quoted(name)}"
                + ("" if one_of == "float64" else ", or begin a fold with --float64"),
            )
        if not allow_nonfinite:
            raise NonFiniteError(
                f"{name} of {expert.ref} holds NaN or infinity",
                "leave the expert out, or count such entries as unchanged with --allow-nonfinite",
            )
        d = torch.nan_to_num(d, nan=0.0, posinf=0.0, neginf=0.0)
        square = sum_of_squares(d)
    reading.squares.append(square)
    return d


def equal(base: Source, expert: Source, name: str, stored: str, reading: Reading) -> bool:
    """Whether an integer or boolean tensor is the same in both."""
    one, other = base.read(name), expert.read(stored)
    reading.hash.update(raw_bytes(other))
    return bool(torch.equal(one, other))


def tensor_digest(source: Source, name: str) -> str:
    """sha256 of one tensor's bytes, read chunk by chunk."""
    info = source.infos[name]
    hashed = hashlib.sha256()
    for rows in chunks(info.shape):
        hashed.update(raw_bytes(source.read(name, rows if info.shape else None)))
    return hashed.hexdigest()


def base_digest(base: Source, name: str, role: Role) -> str:
    """sha256 of one tensor of a base, which must be finite where it is to be merged.

    Raises:
        NonFiniteError: If it is not.
    """
    info = base.infos[name]
    hashed = hashlib.sha256()
    for rows in chunks(info.shape):
        x = base.read(name, rows if info.shape else None)
        if role not in ("exact", "fixed") and not all_finite(x):
            raise NonFiniteError(
                f"{name} of the base {base.ref} holds NaN or infinity", f"--freeze {quoted(name)} keeps it"
            )
        hashed.update(raw_bytes(x))
    return hashed.hexdigest()


def model_digest(infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """One sha256 over the names, types, shapes and digests of a model's tensors, in the order of their names."""
    lines = (f"{n}\t{infos[n].dtype}\t{list(infos[n].shape)}\t{digests[n]}\n" for n in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def norm(squares: list[float]) -> float:
    """Root of a sum of sums of squares, exact in any order; infinity where the sum is beyond float64.

    >>> norm([9.0, 16.0]), norm([1e308, 1e308])
    (5.0, inf)
    """
    try:
        return sqrt(fsum(squares))
    except OverflowError:  # of finite squares
        return inf

"""A checkpoint that is only a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from merganser.numerics import DTYPE_NAMES
from merganser.types import TensorInfo


class MemorySource:
    """A Source over tensors in memory."""

    identity: str | None = None

    def __init__(self, ref: str, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None) -> None:
        self.ref, self._tensors = ref, dict(sorted(tensors.items()))
        self.infos = {n: TensorInfo(tuple(x.shape), DTYPE_NAMES[x.dtype]) for n, x in self._tensors.items()}
        self.aliases: Mapping[str, str] = aliases or {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        x = self._tensors[name]
        return x[rows[0] : rows[1]] if rows is not None and x.dim() else x

    def companions(self) -> Sequence[Path]:
        return ()

"""A source that keeps a digest of every tensor while it is read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.numerics import raw_bytes
from merganser.types import Source, TensorInfo


class Digested:
    """Another source, and the sha256 of each of its tensors that was read once from its first row to its last.

    Args:
        source: what is read.

    Attributes:
        in_lines: names of the tensors that can be read by lines.
    """

    def __init__(self, source: Source) -> None:
        self._source: Any = source
        self.ref, self.identity = source.ref, source.identity
        self.infos: Mapping[str, TensorInfo] = source.infos
        self.aliases: Mapping[str, str] = source.aliases
        self.in_lines: Collection[str] = source.infos if hasattr(source, "read_lines") else ()
        self._lock = threading.Lock()
        self._read: dict[str, tuple[Any, int]] = {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or rows of it; what follows on what was read before enters the digest."""
        value: Tensor = self._source.read(name, rows)
        return self._noted(name, value, rows)

    def read_lines(self, name: str, lines: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or lines of it, of which `in_lines` says that they can be; likewise."""
        value: Tensor = self._source.read_lines(name, lines)
        return self._noted(name, value, lines)

    def _noted(self, name: str, value: Tensor, part: tuple[int, int] | None) -> Tensor:
        start = part[0] * (value.numel() // max(1, len(value))) if part is not None and part[0] else 0
        with self._lock:
            hashed, position = self._read.get(name, (None, 0))
            due = start == position and (value.numel() > 0 or not self.infos[name].numel)
            if due:
                hashed = hashed or hashlib.sha256()
                self._read[name] = (hashed, -1)  # nobody else goes on with it meanwhile
        if due:
            hashed.update(raw_bytes(value))
            self._read[name] = (hashed, start + value.numel())
        return value

    def companions(self) -> Sequence[Path]:
        """The files beside the source."""
        companions: Sequence[Path] = self._source.companions()
        return companions

    def digests(self) -> dict[str, str]:
        """Digests of the tensors that were read whole, by name."""
        return {n: h.hexdigest() for n, (h, stop) in sorted(self._read.items()) if stop == self.infos[n].numel}

"""A source that keeps a digest of every tensor while it is read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.numerics import raw_bytes
from merganser.types import Source, TensorInfo


class Digested:
    """Another source, and the sha256 of each of its tensors that was read once from its first row to its last.

    Args:
        source: what is read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.ref, self.identity = source.ref, source.identity
        self.infos: Mapping[str, TensorInfo] = source.infos
        self.aliases: Mapping[str, str] = source.aliases
        self._lock = threading.Lock()
        self._read: dict[str, tuple[Any, int]] = {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or rows of it; what follows on what was read before enters the digest."""
        value = self._source.read(name, rows)
        start, stop = rows if rows is not None else (0, self.infos[name].rows)
        with self._lock:
            hashed, position = self._read.get(name, (None, 0))
            due = start == position and (stop > start or not self.infos[name].rows)
            if due:
                hashed = hashed or hashlib.sha256()
                self._read[name] = (hashed, -1)  # nobody else goes on with it meanwhile
        if due:
            hashed.update(raw_bytes(value))
            self._read[name] = (hashed, stop)
        return value

    def companions(self) -> Sequence[Path]:
        """The files beside the source."""
        return self._source.companions()

    def digests(self) -> dict[str, str]:
        """Digests of the tensors that were read whole, by name."""
        return {n: h.hexdigest() for n, (h, stop) in sorted(self._read.items()) if stop == self.infos[n].rows}

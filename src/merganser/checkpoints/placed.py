"""Tensors written to their places in files that are there already, whole or by rows, each with its digest.

The files may be another process's, on a file system that both see: it laid them out, and takes over the digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.errors import OutputError
from merganser.numerics import narrowed, raw_bytes
from merganser.types import TensorInfo


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor go.

    Attributes:
        info: its header.
        file: name of the file.
        offset: of its first byte there.
    """

    info: TensorInfo
    file: str
    offset: int


class PlacedWriter:
    """Writes tensors to their places, in any order and from any thread; rows of one tensor come in order.

    Args:
        folder: where the files are.
        target: what the folder becomes, for errors.
        places: by name.
    """

    def __init__(self, folder: Path, target: Path, places: Mapping[str, Place]) -> None:
        self.folder, self.target, self.places = folder, target, places
        self._hashes: dict[str, Any] = {name: hashlib.sha256() for name in places}
        self._written = dict.fromkeys(places, 0)
        self._known: dict[str, str] = {}

    def put(self, name: str, tensor: Tensor, start_row: int = 0) -> int:
        """Write a tensor, or the rows of it from `start_row` on; lines along its last axis are counted likewise.

        Returns:
            How many bytes were written.

        Raises:
            OutputError: If the disk is full.
            NonFiniteError: If a finite value does not fit the tensor's type.
        """
        place = self.places[name]
        info = place.info
        data = raw_bytes(narrowed(tensor.detach(), info.dtype, name).cpu())
        offset = start_row * (len(data) // max(1, len(tensor))) if start_row else 0
        if offset != self._written[name] or offset + len(data) > info.nbytes:
            raise ValueError(f"{name}: bytes [{offset}, {offset + len(data)}) do not follow {self._written[name]}")
        try:
            with (self.folder / place.file).open("r+b", buffering=0) as file:
                file.seek(place.offset + offset)
                done = 0
                while done < len(data):
                    done += file.write(data[done:]) or 0
        except OSError as error:
            raise OutputError(f"{self.target} cannot be written: {error.strerror}") from error
        self._hashes[name].update(data)
        self._written[name] = offset + len(data)
        return len(data)

    def take(self, name: str, digest: str) -> None:
        """Count a tensor as written: another process put it there, and this is the sha256 of its bytes."""
        self._known[name], self._written[name] = digest, self.places[name].info.nbytes

    def is_whole(self, name: str) -> bool:
        """Whether all of a tensor is written."""
        return self._written[name] == self.places[name].info.nbytes

    def is_begun(self, name: str) -> bool:
        """Whether anything of a tensor is written."""
        return self._written[name] > 0

    def digest(self, name: str) -> str:
        """sha256 of a tensor's bytes, as far as they are written."""
        return self._known.get(name) or self._hashes[name].hexdigest()

    def digests(self) -> dict[str, str]:
        """sha256 of every tensor's bytes, by name."""
        return {name: self.digest(name) for name in self.places}

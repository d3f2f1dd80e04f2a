"""One safetensors file: header checked before any tensor is read, tensors and row slices on demand.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the data that the header's offsets tile.
Reads copy exactly the bytes asked for into fresh memory, so nothing of the file stays mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from merganser.errors import CheckpointError, DtypeError
from merganser.numerics import TORCH_DTYPES
from merganser.types import ITEM_BYTES, TensorInfo

MAX_HEADER_BYTES = 100_000_000
#: What stands in place of a file that Git LFS has not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
#: Largest size of an axis or a file that anything can address.
MAX_COUNT = 2**63 - 1


class SafetensorsFile:
    """A Source over one file.

    Args:
        path: the file.
        ref: the reference as the user wrote it.

    Raises:
        CheckpointError: If the file is truncated, or its header is not sound JSON, lies about sizes, or has
            offsets that overlap, leave holes or run past the end.
        DtypeError: If a tensor has a type that cannot be read, such as a packed 4-bit one.
    """

    identity: str | None = None

    def __init__(self, path: Path, ref: str) -> None:
        self.path, self.ref = path, ref
        try:
            with path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                header, self._data_start = _read_header(file, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{path}: __metadata__ is not a map of strings")
        self.metadata: Mapping[str, str] = metadata
        self._spans = _check_spans(header, self._stamp[0] - self._data_start, path)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(header[name]["shape"]), header[name]["dtype"]) for name in sorted(header)
        }
        self.aliases: Mapping[str, str] = {
            alias: name
            for alias, name in sorted(metadata.items())
            if name in self.infos and alias not in self.infos and alias != "format"
        }

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Copy one tensor, or rows [start, stop) of it, out of the file.

        Raises:
            CheckpointError: If the file changed or ended since its header was read.
            IndexError: If the tensor has no such rows.
        """
        return self._part(name, self.infos[name].shape, rows)

    def read_lines(self, name: str, lines: tuple[int, int] | None = None) -> Tensor:
        """Copy one tensor, or some of its lines along the last axis, out of the file.

        Args:
            name: of a tensor with two axes at least.
            lines: [start, stop) in row-major order; all where there is none.

        Returns:
            Shape (lines, last axis).

        Raises:
            CheckpointError: If the file changed or ended since its header was read.
            IndexError: If the tensor has no such lines.
        """
        shape = self.infos[name].shape
        return self._part(name, (prod(shape[:-1]), shape[-1]), lines)

    def _part(self, name: str, shape: tuple[int, ...], rows: tuple[int, int] | None) -> Tensor:
        begin, end = self._spans[name]
        if rows is not None and shape:
            if not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise IndexError(f"{self.path}: {name} has {shape[0]} rows, not {rows}")
            row_bytes = (end - begin) // shape[0] if shape[0] else 0
            begin, end = begin + rows[0] * row_bytes, begin + rows[1] * row_bytes
            shape = (rows[1] - rows[0], *shape[1:])
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(data.numpy().data, self._data_start + begin, name)
        return data.view(TORCH_DTYPES[self.infos[name].dtype]).reshape(shape)

    def _fill(self, view: memoryview, position: int, name: str) -> None:
        """Read bytes from a place in the file on."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _stamp(descriptor) != self._stamp:
                    raise CheckpointError(f"{self.path} changed while it was being read", "run the command again")
                done = 0
                while done < len(view):
                    got = os.preadv(descriptor, [view[done:]], position + done)
                    if not got:
                        raise CheckpointError(f"{self.path} ends inside {name}")
                    done += got
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error.strerror}") from error

    def companions(self) -> Sequence[Path]:
        """A bare file brings no others."""
        return ()


def _stamp(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_header(file: Any, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path} has {len(prefix)} bytes; a safetensors file starts with 8 bytes of length")
    length = int.from_bytes(prefix, "little")
    size = os.fstat(file.fileno()).st_size
    if prefix == LFS_POINTER[:8]:
        raise CheckpointError(f"{path} is Git LFS's pointer to a file and not the file", "git lfs pull, in its folder")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes in a file of {size}",
            "the file is truncated, or is not a safetensors file; fetch it again",
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_sound_pairs, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not sound JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return header, 8 + length


def _sound_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{short(name)} stands twice")
        found[name] = value
    "".join([*found, *(v for v in found.values() if isinstance(v, str))]).encode()  # an escape may be half a character
    return found


def _parse_int(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # no sign stands before a count


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numel(shape: list[int], name: str, path: Path) -> int:
    """Product of a shape, given up on where it passes what can be addressed."""
    count = 1
    for size in shape:
        count *= size
        if max(size, count) > MAX_COUNT:
            raise CheckpointError(f"{path}: {name} has shape {short(shape)}, which is more than any file holds")
    return count


def _check_spans(header: dict[str, Any], data_bytes: int, path: Path) -> dict[str, tuple[int, int]]:
    """Offsets of every tensor, once they are known to tile the data exactly."""
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise CheckpointError(f"{path}: {name} has dtype {short(dtype)}")
        if dtype not in ITEM_BYTES:
            raise DtypeError(f"{path}: {name} has dtype {short(dtype)}, which cannot be read", "dequantise it first")
        if not isinstance(shape, list) or not all(map(_natural, shape)):
            raise CheckpointError(f"{path}: {name} has shape {short(shape)}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
            raise CheckpointError(f"{path}: {name} has data_offsets {short(offsets)}")
        begin, end = offsets
        nbytes = _numel(shape, name, path) * ITEM_BYTES[dtype]
        if end - begin != nbytes:
            raise CheckpointError(
                f"{path}: {name} is {dtype} {short(tuple(shape))} = {nbytes} bytes, and its offsets span {end - begin}"
            )
        spans[name] = (begin, end)
    position, previous = 0, "the header"
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise CheckpointError(f"{path}: {name} at [{begin}, {end}) {what} {previous}")
        position, previous = end, name
    if position != data_bytes:
        raise CheckpointError(
            f"{path} holds {data_bytes} bytes of data where the header speaks of {position}",
            "the file is truncated or damaged; fetch it again",
        )
    return spans

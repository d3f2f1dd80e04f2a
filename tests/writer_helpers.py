"""Checkpoints that are written for tests, and what is in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.checkpoints.writer import CheckpointWriter
from merganser.numerics import DTYPE_NAMES
from merganser.types import TensorInfo


def infos_of(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in tensors.items()}


def write(target: Path, tensors: dict[str, Tensor], **options: Any) -> dict[str, str]:
    """Write a checkpoint; returns the digests."""
    with CheckpointWriter(target, infos_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        writer.commit({"outputs": writer.digests()})
    return writer.digests()


def content_of(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder by name; None where there is no folder."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

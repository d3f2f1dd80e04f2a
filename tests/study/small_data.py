"""Small data sets, written as other libraries write them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import save_file

from merganser.study.words import Task

Split = tuple[np.ndarray, Sequence[int]]


def task_of(data: Mapping[str, Any], head: Mapping[str, Any] | None = None, **others: Any) -> Task:
    """A task as a YAML node would say it."""
    head = head or {"kind": "linear"}
    return TypeAdapter(Task).validate_python({"data": dict(data), "head": dict(head), **others})


def packed(file: str, head: Mapping[str, Any] | None = None, **others: Any) -> Task:
    """A task over a packed file."""
    return task_of({"kind": "packed", "file": file}, head, **others)


def write_npz(path: Path, splits: Mapping[str, Split], classes: Sequence[str]) -> None:
    """Raw uint8 pictures."""
    arrays: dict[str, np.ndarray] = {"classes": np.array(classes)}
    for split, (x, y) in splits.items():
        arrays |= {f"x_{split}": x, f"y_{split}": np.array(y, dtype=np.int64)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def write_encoded(
    path: Path, splits: Mapping[str, tuple[Sequence[bytes], Sequence[int]]], names: Sequence[str]
) -> None:
    """Encoded pictures, one after another, and where each begins."""
    arrays: dict[str, np.ndarray] = {"classes": np.array(names)}
    for split, (files, y) in splits.items():
        arrays[f"bytes_{split}"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"offsets_{split}"] = np.cumsum([0, *map(len, files)])
        arrays[f"y_{split}"] = np.array(y, dtype=np.int64)
    np.savez(path, **arrays)


def encoded(picture: np.ndarray, kind: str) -> bytes:
    """A picture as pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format=kind)
    return file.getvalue()


def bars(count: int, seed: int = 0, size: int = 4) -> Split:
    """Noisy pictures with a bright left (class 0) or right (class 1) half; anything can learn them."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 2).tolist()
    x = rng.integers(0, 60, (count, size, size), dtype=np.uint8)
    for picture, label in zip(x, labels, strict=True):
        half = slice(size // 2, None) if label else slice(None, size // 2)
        picture[:, half] += 180
    return x, labels


def bar_task(folder: Path, name: str = "bars", *, train: int = 40, seed: int = 0, width: int = 6) -> Task:
    """Bars in `folder`/NAME.npz, and a head of two prototypes at right angles."""
    write_npz(folder / f"{name}.npz", {"train": bars(train, seed), "test": bars(10, seed + 50)}, ["left", "right"])
    head = folder / f"{name}-head.safetensors"
    save_file({"prototypes": torch.eye(2, width)}, head)
    return packed(name, {"kind": "prototypes", "file": str(head), "scale": 10.0})

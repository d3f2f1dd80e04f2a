"""Small models as dictionaries of tensors, and folders that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merganser.continual.ledger import read_ledger

#: One tensor of every kind that a fold treats in its own way: name -> (shape, dtype).
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "wide.weight": ((6, 20), torch.float32),
    "wide.bias": ((6,), torch.float32),
    "tall.weight": ((20, 6), torch.float32),
    "square.weight": ((12, 12), torch.float32),
    "large.weight": ((40, 36), torch.float32),
    "row.weight": ((1, 7), torch.float32),
    "column.weight": ((7, 1), torch.float32),
    "conv.weight": ((4, 3, 3, 3), torch.float32),
    "norm.weight": ((12,), torch.float32),
    "embed_tokens.weight": ((30, 8), torch.float32),
    "scale": ((), torch.float32),
    "empty.weight": ((0, 4), torch.float32),
    "bf16.weight": ((8, 5), torch.bfloat16),
    "fp16.weight": ((5, 8), torch.float16),
    "f64.weight": ((9, 4), torch.float64),
    "bn.running_mean": ((4,), torch.float32),
    "bn.running_var": ((4,), torch.float32),
    "bn.num_batches_tracked": ((), torch.int64),
    "position_ids": ((1, 8), torch.int64),
}
MATRICES = (
    "wide.weight",
    "tall.weight",
    "square.weight",
    "large.weight",
    "row.weight",
    "column.weight",
    "conv.weight",
    "empty.weight",
    "bf16.weight",
    "fp16.weight",
    "f64.weight",
)
VECTORS = ("wide.bias", "norm.weight", "embed_tokens.weight", "scale")
STATISTICS = ("bn.running_mean", "bn.running_var")

Model = dict[str, Tensor]
Arrays = dict[str, np.ndarray]


def make_base(seed: int = 0, *, dtype: torch.dtype | None = None, names: tuple[str, ...] = tuple(SHAPES)) -> Model:
    """A base with one tensor of every kind, or of `names`; floating tensors in `dtype` if it is given."""
    generator = torch.Generator().manual_seed(seed)
    model = {}
    for name in names:
        shape, own = SHAPES[name]
        if own == torch.int64:
            model[name] = torch.arange(8).reshape(shape) if shape else torch.tensor(100)
        else:
            model[name] = (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype or own)
    return model


def tune(base: Mapping[str, Tensor], seed: int, size: float = 0.1) -> Model:
    """An expert: every floating tensor moved by `size` at random, counters advanced, other integers the same."""
    generator = torch.Generator().manual_seed(1000 + seed)
    expert = {}
    for name, x in base.items():
        if x.is_floating_point():
            noise = size * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            expert[name] = (x.double() + noise).to(x.dtype)
        else:
            expert[name] = x + seed if name.endswith("num_batches_tracked") else x.clone()
    return expert


def save(model: Mapping[str, Tensor], folder: Path, config: Mapping[str, object] | None = None) -> Path:
    """Write a folder as other libraries do."""
    folder.mkdir(parents=True)
    save_file(dict(model), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def save_family(
    folder: Path, experts: int, *, dtype: torch.dtype | None = None, names: tuple[str, ...] = tuple(SHAPES)
) -> list[Path]:
    """Write a base and experts 1, 2, ... of it; the base comes first."""
    base = make_base(dtype=dtype, names=names)
    models = [base, *(tune(base, seed) for seed in range(1, experts + 1))]
    return [save(model, folder / (f"expert-{i:02d}" if i else "base")) for i, model in enumerate(models)]


def load(folder: Path) -> Model:
    """All tensors of a folder, read by another library than ours."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def load_sums(state: Path) -> Model:
    """The sums of a state, by slot and name; empty before the first expert."""
    sums = read_ledger(state).sums
    return load(state / sums) if sums else {}


def arrays(model: Mapping[str, Tensor]) -> Arrays:
    """Floating tensors as float64 arrays."""
    return {name: x.double().numpy() for name, x in model.items() if x.is_floating_point()}


def change(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Arrays:
    """Model minus base in float64."""
    ours, theirs = arrays(model), arrays(base)
    return {name: ours[name] - theirs[name] for name in theirs}


def as_matrix(x: np.ndarray) -> np.ndarray:
    """(out, in * kernel)."""
    return x.reshape(x.shape[0], int(np.prod(x.shape[1:])))


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """||x - y|| / ||y||, and ||x|| where y is zero."""
    size = float(np.linalg.norm(y))
    return float(np.linalg.norm(np.asarray(x) - np.asarray(y))) / (size or 1.0)


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by relative path; folders too."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }

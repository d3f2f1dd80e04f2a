"""Small models, sound and unsound, and what the doctor says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.merging.doctor import Examination, Finding, examine
from merganser.merging.merged import Merged
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_recipes
from support import save

Model = dict[str, Tensor]
SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    "model.layers.0.mlp.weight": (48, 32),
    "model.layers.0.norm.weight": (64,),
    "model.layers.1.mlp.weight": (32, 48),
    "model.layers.1.norm.weight": (64,),
    "model.layers.2.mlp.weight": (48, 48),
}


def noise(seed: int, size: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plus(model: Model, change: Model, factor: float = 1.0) -> Model:
    return {name: x + factor * change[name] if name in change else x for name, x in model.items()}


def planned(
    root: Path,
    models: Mapping[str, Model],
    *,
    method: str = "task_arithmetic",
    base: str | None = "base",
    settings: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: str | None = None,
    configs: Mapping[str, Mapping[str, object]] | None = None,
) -> Merged:
    """A merge of all models but the base, planned; folders that are there are used as they are."""
    folders = {name: root / name for name in models}
    for name, folder in folders.items():
        if not folder.exists():
            save(models[name], folder, (configs or {}).get(name))
    inputs = tuple(Input(str(f), settings=(own or {}).get(n, {})) for n, f in folders.items() if n != base)
    given = Input(str(folders[base])) if base is not None else None
    return plan_recipes([Recipe(method, (Slice(inputs),), base=given, settings=settings or {}, dtype=dtype)])


BASE = noise(0)
A, B, C = (noise(seed, 0.1) for seed in (1, 2, 3))


def healthy() -> dict[str, Model]:
    return {"base": dict(BASE), "a": plus(BASE, A), "b": plus(BASE, B), "c": plus(BASE, C)}


def examined(root: Path, models: Mapping[str, Model], **options: Any) -> Examination:
    (one,) = examine(planned(root, models, **options))
    return one


def kinds(one: Examination) -> list[str]:
    return [finding.kind for finding in one.findings]


def only(one: Examination, kind: str) -> Finding:
    assert kinds(one) == [kind]
    return one.findings[0]


def short(finding: Finding) -> tuple[str, ...]:
    return tuple(Path(label).name for label in finding.models)

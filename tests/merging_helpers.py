"""Recipes made in code, their merges, and refusals that write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_recipes, run
from support import load


def recipe(method: str, models: list[Path], base: Path | None = None, **options: Any) -> Recipe:
    """A recipe over whole models."""
    inputs = tuple(Input(str(m), settings=options.get("each", {}).get(m.name, {})) for m in models)
    others = {name: value for name, value in options.items() if name != "each"}
    return Recipe(method, (Slice(inputs),), Input(str(base)) if base is not None else None, text="test", **others)


def merged(
    out: Path, *recipes: Recipe, chunk_elements: int = 1 << 18, threads: int = 1, **options: Any
) -> dict[str, Any]:
    return load(run(plan_recipes(recipes, chunk_elements=chunk_elements), out, threads=threads, **options))


def layered(layers: int, seed: int) -> dict[str, torch.Tensor]:
    """A small model with numbered layers."""
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("attn", "mlp")]
    return {name: torch.randn(4, 3, generator=generator) for name in names}


def refused(kind: type[Exception], out: Path, *recipes: Recipe) -> str:
    with pytest.raises(kind) as caught:
        merged(out, *recipes)
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if "partial" in p.name]
    return str(caught.value)

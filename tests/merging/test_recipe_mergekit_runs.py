"""Recipes as people write them for mergekit, run: where one says nothing, or nothing of a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merganser.errors import ParameterError
from merganser.merging.run import plan_recipes, run
from merging_helpers import layered
from recipe_support import read
from support import load, save

METHODS = ("ties", "task_arithmetic", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs_ties")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [save(layered(3, seed), tmp_path / name) for seed, name in enumerate(("base", "a", "b"))]


def rising(method: str, models: list[Path], base: Path | None = None) -> str:
    """Weights that rise from 0 in all models: they are 0 in the first layer, and in what is in no layer."""
    listed = "".join(f"- {{model: {m}, parameters: {{weight: [0, 1]}}}}\n" for m in models)
    based = f"base_model: {base}\n" if base is not None else ""
    return f"merge_method: {method}\n{based}parameters: {{normalize: true}}\nmodels:\n{listed}"


@pytest.mark.parametrize("method", METHODS)
def test_what_no_model_has_a_weight_for_stays_the_base_s(method: str, folders: list[Path], tmp_path: Path) -> None:
    recipes, _ = read(tmp_path, rising(method, folders[1:], folders[0]))
    found, base = load(run(plan_recipes(recipes), tmp_path / "out", threads=1)), load(folders[0])
    moved = [name for name, x in found.items() if not torch.equal(x, base[name])]
    assert moved == [f"model.layers.{i}.{part}.weight" for i in (1, 2) for part in ("attn", "mlp")]


def test_a_mean_without_any_weight_is_refused(folders: list[Path], tmp_path: Path) -> None:
    recipes, _ = read(tmp_path, rising("linear", folders[1:]))
    with pytest.raises(ParameterError, match=r"the weights \[0\.0, 0\.0\] add up to 0"):
        plan_recipes(recipes)

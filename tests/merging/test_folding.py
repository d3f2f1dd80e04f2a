"""A continual method in a recipe has the factor on the whole change that its export has, whoever measures it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.continual import Fold
from merganser.merging.folding import Figures, factor, unmeasured
from merganser.merging.run import plan_recipes, run
from merging_helpers import merged, recipe
from support import load, save, save_family, tree

NAMES = ("large.weight", "norm.weight", "conv.weight", "position_ids")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("models"), 3, names=NAMES)


def size(model: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    """Norm of the change over matrices and vectors, in float64."""
    floats = [n for n in base if base[n].is_floating_point()]
    return sum(float((model[n].double() - base[n].double()).square().sum()) for n in floats) ** 0.5


def test_opcm_gives_the_whole_change_the_mean_norm_of_the_models_changes(family: list[Path], tmp_path: Path) -> None:
    base, *experts = map(load, family)
    found = merged(tmp_path / "out", recipe("opcm", family[1:], family[0]))
    assert size(found, base) == pytest.approx(sum(size(x, base) for x in experts) / 3, rel=1e-5)


def test_a_model_of_no_weight_does_not_count(family: list[Path], tmp_path: Path) -> None:
    nothing: dict[str, Any] = {family[2].name: {"weight": 0.0}}
    with_it = merged(tmp_path / "with", recipe("opcm", family[1:], family[0], each=nothing))
    base, expert = load(family[0]), [load(family[1]), load(family[3])]
    assert size(with_it, base) == pytest.approx(sum(size(x, base) for x in expert) / 2, rel=1e-5)
    without = merged(tmp_path / "without", recipe("opcm", [family[1], family[3]], family[0]))
    for name, x in without.items():
        torch.testing.assert_close(with_it[name], x, rtol=1e-5, atol=1e-6)


def test_the_factor_is_measured_by_the_run_or_at_the_first_tensor_that_is_read_to_the_same_bits(
    family: list[Path], tmp_path: Path
) -> None:
    one = recipe("opcm", family[1:], family[0])
    by_run = load(run(plan_recipes([one]), tmp_path / "out", threads=2))
    read = plan_recipes([one], chunk_elements=7)
    names = [*read.infos]
    random.Random(0).shuffle(names)
    for name in names:
        assert torch.equal(read.read(name), by_run[name]), name
    assert unmeasured(read) == []


def test_a_stage_has_its_own_factor(family: list[Path], tmp_path: Path) -> None:
    stage = recipe("opcm", family[1:3], family[0], name="first")
    found = merged(tmp_path / "out", stage, recipe("opcm", [Path("first"), family[3]], family[0]))
    fold = Fold.init(family[0], tmp_path / "one", "opcm", threads=1)
    fold.add_all(family[1:3], threads=1)
    first = fold.export(tmp_path / "first")
    fold = Fold.init(family[0], tmp_path / "two", "opcm", threads=1)
    fold.add_all([first, family[3]], threads=1)
    for name, x in load(fold.export(tmp_path / "second")).items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6)
    plan = plan_recipes([stage, recipe("linear", [Path("first"), family[3]])])
    assert [one.plan.recipe.name for one in unmeasured(plan)] == ["first"]


def test_progress_counts_both_passes(family: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = plan_recipes([recipe("opcm", family[1:], family[0])])
    run(plan, tmp_path / "out", threads=1, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (2 * plan.plan.output_bytes,) * 2


def test_nothing_merged_has_no_factor(family: list[Path], tmp_path: Path) -> None:
    plan = plan_recipes([recipe("opcm", [family[0]], family[0])])
    assert factor(plan, {"a": Figures(0.0, (0.0,)), "ids": Figures()}) == 1
    out = run(plan, tmp_path / "out", threads=1)
    assert tree(out)["model.safetensors"] == tree(family[0])["model.safetensors"]


@pytest.mark.parametrize("last", [0, 1])
def test_one_model_in_float64_makes_the_sums_float64_whatever_comes_last(tmp_path: Path, last: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(4, 3, generator=generator)}
    models = [
        {"weight": base["weight"] + 1e-3 * torch.randn(4, 3, generator=generator)},
        {"weight": base["weight"].double() + 1e-3 * torch.randn(4, 3, generator=generator, dtype=torch.float64)},
    ]
    folders = [save(model, tmp_path / name) for model, name in ((base, "base"), *zip(models, "ab", strict=True))]
    found = merged(tmp_path / "out", recipe("mean", [folders[2 - last], folders[1 + last]], folders[0]))["weight"]
    torch.testing.assert_close(found, sum(x["weight"].double() for x in models) / 2, rtol=1e-14, atol=1e-14)

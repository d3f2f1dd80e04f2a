"""Weights that a continual method cannot take are refused by the plan, with the tensor and the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from merganser.errors import ParameterError
from merganser.merging.recipe import Recipe
from merganser.merging.run import plan_recipes
from merganser.merging.values import Choice
from merging_helpers import merged, recipe
from support import change, load, save_family

#: A matrix to every method, one that is too thin for factors, and a vector.
NAMES = ("large.weight", "wide.weight", "norm.weight")


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    return save_family(tmp_path / "models", 2, names=NAMES)


def weighed(method: str, family: list[Path], one: object, two: object, keep: tuple[str, ...] = ()) -> Recipe:
    each = {"expert-01": {"weight": one}, "expert-02": {"weight": two}}
    return recipe(method, family[1:], family[0], each=each, keep=keep)


def message(one: Recipe) -> str:
    with pytest.raises(ParameterError) as caught:
        plan_recipes([one])
    return caught.value.message


@pytest.mark.parametrize("method", ["gram", "gram_anchored"])
def test_a_negative_weight_is_refused_with_its_model_where_grams_are_summed(method: str, family: list[Path]) -> None:
    wrong = f"large.weight: the weight of {family[2]} is -0.1; {method} takes none below 0"
    assert message(weighed(method, family, 1.0, -0.1)) == wrong
    ahead = weighed(method, family, 1.0, Choice((("norm", -0.5), ("*", 1.0))))
    assert f"norm.weight: the weight of {family[2]} is -0.5" in message(ahead)
    plan_recipes([weighed(method, family, 1.0, 0.0)])


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (-1.0, 0.5)])
def test_a_sum_of_weights_that_is_not_above_0_is_refused_where_it_divides(
    weights: tuple[float, float], family: list[Path]
) -> None:
    told = f"{weights[0]} of {family[1]}, {weights[1]} of {family[2]}"
    first = {"mean": "large.weight", "average": "large.weight", "iso_c": "norm.weight", "tsv_m": "norm.weight"}
    for method, name in first.items():
        wrong = f"{name}: the weights add up to {sum(weights)}, and {method} needs a sum above 0: {told}"
        assert message(weighed(method, family, *weights)) == wrong
    thin = weighed("tsv_m", family, *weights, keep=("norm.weight",))
    assert message(thin).startswith("wide.weight: the weights add up to")


def test_weights_of_any_sum_are_taken_where_nothing_divides_by_it(family: list[Path], tmp_path: Path) -> None:
    base, one, two = (load(f) for f in family)
    found = merged(tmp_path / "out", weighed("task_arithmetic", family, 1.0, -1.0))
    for name, d in change(one, base).items():
        expected = base[name].double().numpy() + d - change(two, base)[name]
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=1e-6, atol=1e-6)
    for method in ("iso_c", "tsv_m"):
        plan_recipes([weighed(method, family, 1.0, -1.0, keep=("norm.weight", "wide.weight"))])
    for method in ("opcm", "dop", "nufilt", "magmax"):
        plan_recipes([weighed(method, family, 0.0, 0.0)])

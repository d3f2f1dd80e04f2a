"""Lists of one entry a layer in config.json follow the layers, from whichever model these come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.errors import ParameterError
from merganser.merging import companions
from merganser.merging.layers import Place, place_of
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_recipes, run
from merging_helpers import layered, recipe
from support import save

THREE, FIVE = ["s", "full", "s"], ["s", "s", "full", "s", "full"]


def model(folder: Path, kinds: list[str] | None, layers: int, **more: Any) -> Path:
    config: dict[str, Any] = {"num_hidden_layers": layers} | ({} if kinds is None else {"layer_types": kinds})
    return save(layered(layers, layers), folder, config | more)


def stack(*parts: tuple[Path, int, int], **options: Any) -> Recipe:
    return Recipe("passthrough", tuple(Slice((Input(str(f), (a, b)),)) for f, a, b in parts), text="", **options)


def config_of(out: Path, *recipes: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run(plan_recipes(recipes), out) / "config.json").read_text())
    return config


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return model(tmp_path / "three", THREE, 3)


@pytest.fixture
def five(tmp_path: Path) -> Path:
    return model(tmp_path / "five", FIVE, 5)


def test_every_layer_brings_its_own_kind(three: Path, five: Path, tmp_path: Path) -> None:
    deeper = config_of(tmp_path / "deeper", stack((three, 0, 2), (five, 2, 5)))
    assert deeper == {"num_hidden_layers": 5, "layer_types": ["s", "full", "full", "s", "full"]}
    as_deep = config_of(tmp_path / "as_deep", stack((five, 0, 1), (three, 1, 3)))
    assert as_deep == {"num_hidden_layers": 3, "layer_types": ["s", "full", "s"]}


def test_another_order_of_as_many_layers_orders_their_kinds(three: Path, tmp_path: Path) -> None:
    found = config_of(tmp_path / "out", stack((three, 1, 3), (three, 0, 1)))
    assert found == {"num_hidden_layers": 3, "layer_types": ["full", "s", "s"]}


def test_layers_of_as_deep_a_model_bring_its_kinds(three: Path, tmp_path: Path) -> None:
    other = model(tmp_path / "other", ["a", "b", "c"], 3)
    found = config_of(tmp_path / "out", stack((three, 0, 1), (other, 1, 3)))
    assert found["layer_types"] == ["s", "b", "c"]


def test_a_slice_of_two_models_has_the_kinds_of_the_donor(three: Path, five: Path, tmp_path: Path) -> None:
    parts = (Slice((Input(str(five), (1, 3)), Input(str(three), (0, 2)))),)
    one = Recipe("linear", parts, Input(str(three)), settings={"weight": 1.0}, dialect="mergekit", text="")
    assert config_of(tmp_path / "out", one)["layer_types"] == ["s", "full"]


def test_kinds_within_the_config_of_a_tower_follow_too(tmp_path: Path) -> None:
    folders = [
        save(layered(n, n), tmp_path / f"m{n}", {"text_config": {"num_hidden_layers": n, "layer_types": kinds}})
        for n, kinds in ((3, THREE), (5, FIVE))
    ]
    found = config_of(tmp_path / "out", stack((folders[0], 0, 1), (folders[1], 1, 3)))
    assert found["text_config"] == {"num_hidden_layers": 3, "layer_types": ["s", "s", "full"]}


def test_kinds_of_an_earlier_stage_are_as_that_stage_writes_them(three: Path, five: Path, tmp_path: Path) -> None:
    first = stack((five, 0, 1), (five, 2, 5), name="first")  # s, full, s, full
    second = stack((three, 0, 1), (Path("first"), 1, 4))
    assert config_of(tmp_path / "out", first, second)["layer_types"] == ["s", "full", "s", "full"]


def test_a_list_that_models_of_other_depths_share_is_none_of_layers(tmp_path: Path) -> None:
    folders = [model(tmp_path / f"m{n}", None, n, mrope_section=[8, 12, 12]) for n in (3, 5)]
    found = config_of(tmp_path / "out", stack((folders[0], 0, 1), (folders[1], 1, 2)))
    assert found == {"num_hidden_layers": 2, "mrope_section": [8, 12, 12]}


@pytest.mark.parametrize(("kinds", "has"), [(None, "no such list"), (["s"], "a list of 1")])
def test_kinds_that_a_model_does_not_tell_are_refused_before_a_tensor_is_read(
    kinds: list[str] | None, has: str, three: Path, tmp_path: Path
) -> None:
    other = model(tmp_path / "other", kinds, 5)
    with pytest.raises(ParameterError) as caught:
        plan_recipes([stack((three, 0, 2), (other, 2, 5))])
    where = f"for the 5 layers of {other}, which give model.layers.2 of the output"
    assert f"layer_types of config.json has one entry a layer in {three} and {has} {where}" in caught.value.message
    assert str(caught.value.hint).startswith(f"write layer_types into the config.json of {other}")
    plan_recipes([stack((other, 2, 5), (other, 0, 1))])  # nothing is asked of a config that tells of no layers


def test_a_config_that_nothing_is_made_of_is_not_asked(three: Path, tmp_path: Path) -> None:
    silent = model(tmp_path / "silent", None, 5)
    first = stack((three, 0, 2), (silent, 2, 5), name="first")  # refused as an output of its own
    base = model(tmp_path / "base", FIVE, 5)
    second = Recipe("task_arithmetic", (Slice((Input("first"),)),), Input(str(base)), text="")
    assert config_of(tmp_path / "out", first, second)["layer_types"] == FIVE


def test_tensors_that_are_kept_do_not_decide_the_kinds_of_layers(three: Path, tmp_path: Path) -> None:
    silent = model(tmp_path / "silent", None, 3)
    for keep in ("*.attn.weight", "*.mlp.weight"):
        pair = (Slice((Input(str(silent)), Input(str(three)))),)
        one = Recipe("linear", pair, Input(str(three)), settings={"weight": 1.0}, dialect="mergekit", keep=(keep,))
        assert config_of(tmp_path / keep[2:5], one)["layer_types"] == THREE


def test_numbers_that_no_tensor_has_are_no_other_depth(tmp_path: Path) -> None:
    """As in a sequence of modules some of which have no weights."""
    tensors = {f"features.{i}.weight": torch.ones(2, 2) for i in (1, 2, 5)}
    config = {"depth": 6, "widths": [1, 2, 3, 4, 5, 6]}
    folders = [save(tensors, tmp_path / f"m{i}", config) for i in range(2)]
    assert config_of(tmp_path / "out", recipe("linear", folders)) == config


def mixed(folder: Path, dense: set[int], layers: int, **config: Any) -> Path:
    """A model with experts in all layers but those that are dense."""
    tensors = layered(layers, layers)
    for i in set(range(layers)) - dense:
        tensors[f"model.layers.{i}.mlp.experts.0.weight"] = tensors.pop(f"model.layers.{i}.mlp.weight")
    return save(tensors, folder, {"num_hidden_layers": layers, **config})


@pytest.mark.parametrize("key", ["mlp_only_layers", "attn_layer_indices", "moe_layers"])
def test_lists_of_the_numbers_of_layers_get_those_of_the_output(key: str, tmp_path: Path) -> None:
    one = mixed(tmp_path / "one", {0, 2}, 3, **{key: [0, 2, 1][: 2 + (key == "moe_layers")]})
    two = mixed(tmp_path / "two", {1}, 2, **{key: [1]})
    found = config_of(tmp_path / "out", stack((one, 0, 3), (two, 0, 2), (one, 2, 3)))
    expected = [0, 1, 2, 4, 5] if key == "moe_layers" else [0, 2, 4, 5]
    assert found == {"num_hidden_layers": 6, key: expected}


def test_a_layer_of_another_kind_than_the_config_has_in_its_place_is_refused(tmp_path: Path) -> None:
    one = mixed(tmp_path / "one", {0}, 3, first_k_dense_replace=1)
    with pytest.raises(ParameterError) as caught:
        plan_recipes([stack((one, 0, 2), (one, 0, 3))])
    assert caught.value.message == (
        f"model.layers.2 of the output would be model.layers.0 of {one}, which has no mlp.experts.0.weight; "
        f"config.json of {one} has layers of several kinds, and one with it there"
    )
    assert config_of(tmp_path / "out", stack((one, 0, 3), (one, 1, 3)))["num_hidden_layers"] == 5


def test_what_a_layer_has_more_than_its_place_asks_for_is_no_gap(tmp_path: Path) -> None:
    """As the first layer of T5, which holds the biases of all."""
    tensors = layered(2, 0) | {"model.layers.0.bias": torch.ones(3)}
    one = save(tensors, tmp_path / "one", {"num_hidden_layers": 2})
    assert config_of(tmp_path / "out", stack((one, 0, 2), (one, 0, 2))) == {"num_hidden_layers": 4}
    with pytest.raises(ParameterError, match=r"which has no bias; config\.json"):
        plan_recipes([stack((one, 1, 2), (one, 0, 2))])


def test_names_are_looked_at_in_proportion_to_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(count: int) -> int:
        looks = 0

        def counted(name: str) -> Place | None:
            nonlocal looks
            looks += 1
            return place_of(name)

        merged = plan_recipes((stack((model(tmp_path / str(count), None, count), 0, count)),))
        with monkeypatch.context() as patch:
            patch.setattr(companions, "place_of", counted)
            run(merged, tmp_path / f"out-{count}")
        return looks

    few = looked_at(40)
    assert few >= 40
    assert looked_at(160) <= 4.4 * few

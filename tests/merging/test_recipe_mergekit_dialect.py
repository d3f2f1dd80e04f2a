"""mergekit's YAML: bases, order, words without effect, and the defaults that it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merganser.merging.dialect import DIALECT_DEFAULTS, FOR_ALL, PER_MODEL
from merganser.merging.recipe import Input
from merganser.merging.values import Gradient
from merganser.methods.joint import MERGES
from recipe_support import read, read_one, weights


def test_models_keep_their_order_and_may_repeat(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: linear
        models: [{model: z}, {model: a}, {model: z}, {model: m}]
        parameters: {weight: 1}
        """,
    )
    assert [i.ref for i in recipe.slices[0].inputs] == ["z", "a", "z", "m"]
    assert recipe.refs == ("z", "a", "m")


# the base, method by method


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("method", "parameters", "others", "inputs"),
    [
        ("ties", "weight: 1", ["a"], ["a"]),
        ("sce", "select_topk: 0.5", ["a"], ["a"]),
        ("ram", "epsilon: 1e-4", ["a"], ["a"]),
        ("model_stock", "filter_wise: true", ["a", "b"], ["a", "b"]),
        ("slerp", "t: 0.5", ["a"], ["a"]),
        ("nearswap", "t: 0.5", ["a"], ["a"]),
        ("arcee_fusion", "", ["a"], ["a"]),
        ("nuslerp", "weight: 1", ["a", "b"], ["a", "b"]),
        ("multislerp", "weight: 1", ["a", "b"], ["a", "b"]),
    ],
)
def test_a_base_that_is_no_model(
    tmp_path: Path, method: str, parameters: str, others: list[str], inputs: list[str], listed: bool
) -> None:
    models = ", ".join(f"{{model: {m}}}" for m in (["base", *others] if listed else others))
    recipe = read_one(
        tmp_path,
        f"{{merge_method: {method}, base_model: base, models: [{models}], parameters: {{{parameters}}}}}",
    )
    assert recipe.base == Input("base")
    assert [i.ref for i in recipe.slices[0].inputs] == inputs
    assert recipe.method == (f"{method}_delta" if method in ("nuslerp", "multislerp") else method)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_spheres_without_a_base(tmp_path: Path, method: str) -> None:
    weight = "" if method == "karcher" else "parameters: {weight: 1}"
    recipe = read_one(tmp_path, f"merge_method: {method}\nmodels: [{{model: a}}, {{model: b}}]\n{weight}")
    assert recipe.method == method
    assert recipe.base is None


def test_the_base_of_linear_is_one_more_model(tmp_path: Path) -> None:
    (recipe,), warnings = read(
        tmp_path,
        "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}",
    )
    assert [i.ref for i in recipe.slices[0].inputs] == ["a", "b", "base"]
    assert recipe.base == Input("base")
    assert warnings == ("line 2: base_model: linear takes it as one more model",)
    recipe = read_one(
        tmp_path,
        "merge_method: linear\nbase_model: a\nmodels: [{model: b}, {model: a}]\nparameters: {weight: 1}",
    )
    assert [i.ref for i in recipe.slices[0].inputs] == ["b", "a"]


def test_parameters_of_a_base_have_no_effect(tmp_path: Path) -> None:
    _, warnings = read(
        tmp_path,
        """
        merge_method: ties
        base_model: base
        models:
          - {model: base, parameters: {weight: 0.5}}
          - {model: a, parameters: {weight: 0.5}}
        """,
    )
    assert warnings == ("line 5: models[0]: is the base, so its parameters have no effect, in mergekit neither",)


def test_a_slice_may_have_a_base_of_its_own(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 1}
        slices:
          - sources: [{model: other, layer_range: [2, 4]}, {model: a, layer_range: [0, 2]}]
            base_model: other
        """,
    )
    assert recipe.slices[0].base == Input("other", (2, 4))
    assert [i.ref for i in recipe.slices[0].inputs] == ["a"]


# what mergekit ignores


def test_unknown_keys_are_warnings_if_lenient(tmp_path: Path) -> None:
    (recipe,), warnings = read(
        tmp_path,
        """
        merge_method: ties
        base_model: base
        tokeniser_source: union
        normalize: false
        models:
          - {model: a, wieght: 1, parameters: {weight: 1, denisty: 0.5}}
        parameters: {normalise: false}
        """,
        lenient=True,
    )
    assert warnings == (
        "line 4: tokeniser_source: unknown; did you mean tokenizer_source? (it has no effect)",
        "line 5: normalize: has no effect here, in mergekit neither; it belongs under parameters",
        "line 7: models[0].wieght: unknown; known: model, parameters (it has no effect)",
        "line 7: models[0].parameters.denisty: unknown; did you mean density? (it has no effect)",
        "line 8: parameters.normalise: unknown; did you mean normalize? (it has no effect)",
    )
    assert recipe.slices[0].inputs == (Input("a", None, {"weight": 1}),)
    assert recipe.settings["normalize"] is True
    assert recipe.vocabulary is None


@pytest.mark.parametrize(
    ("method", "place", "word"),
    [
        ("task_arithmetic", "models[0].parameters", "density"),
        ("task_arithmetic", "parameters", "rescale"),
        ("task_arithmetic", "parameters", "int8_mask"),
        ("ties", "parameters", "consensus_method"),
        ("ties", "parameters", "t"),
        ("ties", "models[0].parameters", "normalize"),
        ("sce", "models[0].parameters", "weight"),
        ("sce", "parameters", "normalize"),
    ],
)
def test_words_without_effect_are_warned_of(tmp_path: Path, method: str, place: str, word: str) -> None:
    weight = "" if method == "sce" else "weight: 1"
    own = f"{word}: 1" if place.startswith("models") else ""
    shared = ", ".join(filter(None, [weight, f"{word}: 1" if place == "parameters" else ""]))
    (recipe,), warnings = read(
        tmp_path,
        f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a, parameters: {{{own}}}}}]\n"
        f"parameters: {{{shared}}}",
    )
    assert warnings == (f"line {3 if own else 4}: {place}.{word}: has no effect here, in mergekit neither",)
    assert recipe.slices[0].inputs == (Input("a"),)
    assert set(recipe.settings) - set(DIALECT_DEFAULTS[method]) <= {"weight"}


def test_residual_weight_of_a_slice_has_no_effect(tmp_path: Path) -> None:
    _, warnings = read(
        tmp_path,
        """
        merge_method: passthrough
        slices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 0.5}]
        """,
    )
    assert warnings == ("line 3: slices[0].residual_weight: has no effect here, in mergekit neither",)


def test_words_of_old_are_warned_of_wherever_they_stand(tmp_path: Path) -> None:
    _, warnings = read(
        tmp_path,
        """
        merge_method: passthrough
        embed_slerp: true
        models: [{model: a, residual_weight: 1}]
        """,
    )
    assert warnings == (
        "line 3: embed_slerp: has no effect here, in mergekit neither",
        "line 4: models[0].residual_weight: has no effect here, in mergekit neither",
    )


def test_a_model_may_be_named_without_a_mapping(tmp_path: Path) -> None:
    recipe = read_one(tmp_path, "{merge_method: linear, models: [a, b], parameters: {weight: 1}}")
    assert recipe.slices[0].inputs == (Input("a"), Input("b"))


# the tables


def test_tables_speak_of_the_same_methods() -> None:
    assert set(FOR_ALL) <= set(DIALECT_DEFAULTS)
    assert set(PER_MODEL) <= set(DIALECT_DEFAULTS)
    assert set(DIALECT_DEFAULTS) <= set(MERGES)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {"normalize": True}),
        ("task_arithmetic", {"normalize": False, "scale": 1.0}),
        ("ties", {"normalize": True, "scale": 1.0, "density": 1.0, "rescale": "none", "cancelled": "plus"}),
        ("dare_linear", {"normalize": False, "rescale": "l1", "density": 1.0}),
        ("dare_ties", {"normalize": False, "rescale": "l1", "density": 1.0}),
        ("della", {"normalize": True, "rescale": "l1", "epsilon": 0.3, "row": "last"}),
        ("della_linear", {"normalize": False, "rescale": "l1", "epsilon": 0.3}),
        ("breadcrumbs", {"normalize": False, "gamma": 0.01, "rescale": "none"}),
        ("sce", {"select_topk": 1.0}),
        ("karcher", {"max_iter": 10, "tol": 1e-5}),
        ("ramplus_tl", {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
        ("model_stock", {"filter_wise": False}),
        ("multislerp", {"normalize": True}),
        ("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": False}),
        ("slerp", {"lerp_above": 0.9995}),
    ],
)
def test_defaults_are_those_of_mergekit(tmp_path: Path, method: str, settings: dict[str, object]) -> None:
    based = method not in ("linear", "karcher", "multislerp", "nuslerp")
    models = "[{model: a}]" if method == "slerp" else "[{model: a}, {model: b}]"
    weight = "weight: 1" if "weight" in PER_MODEL.get(method, ()) else "t: 0.5" if method == "slerp" else ""
    recipe = read_one(
        tmp_path,
        f"merge_method: {method}\n{'base_model: base' if based else ''}\nmodels: {models}\nparameters: {{{weight}}}",
    )
    assert {name: recipe.settings[name] for name in settings} == settings


def test_epsilon_of_della_is_half_the_range_of_chances(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: della
        base_model: base
        models: [{model: a, parameters: {weight: 1, density: 0.5, epsilon: [0.1, 0.2]}}]
        """,
    )
    assert recipe.slices[0].inputs[0].settings["epsilon"] == Gradient((0.2, 0.4))


def test_a_method_of_ours_may_stand_in_its_language(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: tsv_m
        base_model: base
        models: [{model: a}, {model: b, parameters: {weight: 0.5}}]
        parameters: {alpha: 0.9}
        """,
    )
    assert recipe.method == "tsv_m"
    assert recipe.settings == {"alpha": 0.9, "weight": 1.0}
    assert weights(recipe) == [None, 0.5]


def test_models_weigh_the_same_where_mergekit_knows_no_weight(tmp_path: Path) -> None:
    recipe = read_one(tmp_path, "merge_method: karcher\nmodels: [{model: a}, {model: b}]")
    assert recipe.settings["weight"] == 1.0


def test_a_guard_against_dividing_by_zero_has_no_effect(tmp_path: Path) -> None:
    text = "merge_method: multislerp\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, eps: 1e-9}\n"
    (recipe,), warnings = read(tmp_path, text)
    assert warnings == ("line 3: parameters.eps: has no effect here: norms are divided by as they are",)
    assert "eps" not in recipe.settings
    assert read_one(tmp_path, text.replace("1e-9", "1e-8")) == replace(recipe, text=text.replace("1e-9", "1e-8"))

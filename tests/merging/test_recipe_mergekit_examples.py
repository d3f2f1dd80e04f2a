"""mergekit's YAML: the recipes that people write, each read as what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from merganser.merging.recipe import Input, Vocabulary
from merganser.merging.values import Choice, Gradient
from recipe_support import read, read_one, weights

# the recipes that people write


def test_slerp_by_parts_of_the_layer(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        slices:
          - sources:
              - model: org/chat
                layer_range: [0, 32]
              - model: org/code
                layer_range: [0, 32]
        merge_method: slerp
        base_model: org/chat
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
        """,
    )
    (one,) = recipe.slices
    assert recipe.method == "slerp"
    assert recipe.dialect == "mergekit"
    assert recipe.dtype == "BF16"
    assert recipe.base == Input("org/chat")
    assert one.base == Input("org/chat", (0, 32))
    assert one.inputs == (Input("org/code", (0, 32)),)
    assert recipe.settings["t"] == Choice(
        (
            ("self_attn", Gradient((0, 0.5, 0.3, 0.7, 1))),
            ("mlp", Gradient((1, 0.5, 0.7, 0.3, 0))),
            ("*", 0.5),
        )
    )
    assert recipe.refs == ("org/chat", "org/code")


def test_ties_with_the_base_among_the_models(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        models:
          - model: org/base
          - model: org/a
            parameters: {density: 0.5, weight: 0.5}
          - model: org/b
            parameters: {density: [1, 0.7, 0.1], weight: [0, 0.3, 0.7, 1]}
        merge_method: ties
        base_model: org/base
        parameters: {normalize: true, lambda: 0.9}
        dtype: float16
        """,
    )
    (one,) = recipe.slices
    assert recipe.base == Input("org/base")
    assert one.base is None
    assert one.inputs == (
        Input("org/a", None, {"density": 0.5, "weight": 0.5}),
        Input("org/b", None, {"density": Gradient((1, 0.7, 0.1)), "weight": Gradient((0, 0.3, 0.7, 1))}),
    )
    assert recipe.settings["scale"] == 0.9
    assert recipe.settings["normalize"] is True


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della", "della_linear"])
def test_thinned_task_vectors(tmp_path: Path, method: str) -> None:
    (recipe,), warnings = read(
        tmp_path,
        f"""
        merge_method: {method}
        base_model: org/base
        models:
          - {{model: org/a, parameters: {{weight: 0.4, density: 0.53}}}}
          - {{model: org/b, parameters: {{weight: 0.3, density: 0.53}}}}
        parameters: {{int8_mask: true}}
        dtype: bfloat16
        tokenizer_source: union
        """,
    )
    assert warnings == ("line 7: parameters.int8_mask: has no effect here, in mergekit neither",)
    assert recipe.settings["rescale"] == "l1"
    assert recipe.settings["normalize"] is (method == "della")
    assert weights(recipe) == [0.4, 0.3]
    assert recipe.vocabulary == Vocabulary("union")


def test_breadcrumbs(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: breadcrumbs_ties
        base_model: org/base
        models:
          - {model: org/a, parameters: {weight: 1, density: 0.9, gamma: 0.02}}
          - {model: org/b, parameters: {weight: 1}}
        """,
    )
    assert recipe.slices[0].inputs[0].settings == {"weight": 1, "density": 0.9, "gamma": 0.02}
    assert (recipe.settings["density"], recipe.settings["gamma"], recipe.settings["normalize"]) == (1.0, 0.01, False)


def test_linear_has_no_base(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        models:
          - {model: org/a, parameters: {weight: 1.0}}
          - {model: org/b, parameters: {weight: 0.3}}
        merge_method: linear
        dtype: float16
        """,
    )
    assert recipe.base is None
    assert recipe.settings == {"normalize": True}
    assert weights(recipe) == [1.0, 0.3]


def test_stacked_layers(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 24]}]
          - sources: [{model: org/b, layer_range: [8, 32]}]
          - sources: [{model: org/a, layer_range: [32, 32]}]
        merge_method: passthrough
        dtype: float16
        """,
    )
    assert [s.inputs for s in recipe.slices] == [
        (Input("org/a", (0, 24)),),
        (Input("org/b", (8, 32)),),
        (Input("org/a", (32, 32)),),
    ]
    assert all(s.base is None for s in recipe.slices)


def test_scaled_passthrough(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 8]}]
          - sources:
              - model: org/a
                layer_range: [4, 8]
                parameters:
                  scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
        merge_method: passthrough
        """,
    )
    assert recipe.slices[1].inputs[0].settings == {
        "factor": Choice((("o_proj", 0.0), ("down_proj", 0.0), ("*", 1.0))),
    }
    assert recipe.settings == {"factor": 1.0}


def test_model_stock(tmp_path: Path) -> None:
    (recipe,), warnings = read(
        tmp_path,
        """
        models:
          - model: org/a
            parameters: {weight: 0.5}
          - model: org/b
        merge_method: model_stock
        base_model: org/base
        parameters: {filter_wise: false, normalize: true}
        dtype: bfloat16
        """,
    )
    assert warnings == (
        "line 4: models[0].parameters.weight: has no effect here, in mergekit neither",
        "line 8: parameters.normalize: has no effect here, in mergekit neither",
    )
    assert recipe.slices[0].inputs == (Input("org/a"), Input("org/b"))
    assert "normalize" not in recipe.settings


def test_task_arithmetic_over_slices(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        slices:
          - sources:
              - {model: org/base, layer_range: [0, 12]}
              - {model: org/a, layer_range: [0, 12], parameters: {weight: 0.5}}
            parameters: {lambda: 0.5}
          - sources:
              - {model: org/a, layer_range: [12, 24], parameters: {weight: 1}}
        merge_method: task_arithmetic
        base_model: org/base
        """,
    )
    first, second = recipe.slices
    assert first.settings == {"scale": 0.5}
    assert first.base == Input("org/base", (0, 12))
    assert second.base == Input("org/base", (12, 24))  # not listed: its layers are those of the models
    assert [s.inputs[0].layers for s in recipe.slices] == [(0, 12), (12, 24)]

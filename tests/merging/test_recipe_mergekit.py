"""mergekit's YAML: every shape that it has, and the recipes that people write."""

from __future__ import annotations

from pathlib import Path

import pytest

from merganser.merging.dialect import DIALECT_DEFAULTS, FOR_ALL, PER_MODEL
from merganser.merging.recipe import Input, Token, Vocabulary
from merganser.merging.values import Choice, Gradient
from merganser.methods.joint import MERGES
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


# the shapes of the language


def test_every_level_of_precedence_keeps_its_own(tmp_path: Path) -> None:
    (recipe,), warnings = read(
        tmp_path,
        """
        merge_method: ties
        base_model: org/base
        parameters: {weight: 0.1, density: 0.1}
        modules:
          text_decoder:
            parameters: {weight: 0.2, lambda: 0.2}
            slices:
              - sources:
                  - {model: org/base, layer_range: [0, 4]}
                  - {model: org/a, layer_range: [0, 4], parameters: {weight: 0.4}}
                parameters: {weight: 0.3}
          vision_tower:
            models:
              - {model: org/a}
        """,
    )
    text, vision = recipe.slices
    assert (recipe.settings["weight"], recipe.settings["density"]) == (0.1, 0.1)
    assert text.module_settings == {"weight": 0.2, "scale": 0.2}
    assert text.settings == {"weight": 0.3}
    assert text.inputs[0].settings == {"weight": 0.4}
    assert (text.module, vision.module) == ("text_decoder.", "vision_tower.")
    assert vision.module_settings == {}
    assert vision.inputs == (Input("org/a"),)
    assert warnings == (
        "line 6: modules.text_decoder: is taken for the tensors whose names begin with text_decoder.",
        "line 13: modules.vision_tower: is taken for the tensors whose names begin with vision_tower.",
    )


def test_the_default_module_is_everything(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: linear
        modules: {default: {models: [{model: org/a}, {model: org/b}]}}
        parameters: {weight: 1}
        """,
    )
    assert [s.module for s in recipe.slices] == [""]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("1", 1),
        ("'0.5'", 0.5),
        ("1e-1", 0.1),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("[0.2, 0.8]", Gradient((0.2, 0.8))),
        ("[0.2]", Gradient((0.2,))),
        ("{filter: mlp, value: 0.5}", Choice((("mlp", 0.5),))),
        ("{value: 0.5}", Choice((("*", 0.5),))),
        ("[{filter: mlp, value: [0, 1]}, 0.7]", Choice((("mlp", Gradient((0, 1))), ("*", 0.7)))),
        ("[{filter: mlp, value: 1}, {filter: '*', value: 0}]", Choice((("mlp", 1), ("*", 0)))),
        ("[{filter: a.b, value: 1}, {filter: ~, value: 0}]", Choice((("a.b", 1), ("*", 0)))),
    ],
)
def test_forms_of_a_value(tmp_path: Path, text: str, value: object) -> None:
    recipe = read_one(
        tmp_path,
        f"""
        merge_method: linear
        models: [{{model: org/a, parameters: {{weight: {text}}}}}]
        """,
    )
    assert weights(recipe) == [value]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("0", False), ("0.0", False), ("no", False)])
def test_forms_of_a_truth_value(tmp_path: Path, text: str, value: bool) -> None:
    recipe = read_one(
        tmp_path,
        f"""
        merge_method: linear
        models: [{{model: org/a}}]
        parameters: {{weight: 1, normalize: {text}}}
        """,
    )
    assert recipe.settings["normalize"] is value


def test_a_truth_value_over_layers(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: dare_ties
        base_model: org/base
        models: [{model: org/a}]
        parameters: {weight: 1, rescale: [true, false], normalize: [{filter: mlp, value: true}]}
        """,
    )
    assert recipe.settings["rescale"] == Gradient(("l1", "none"))
    # mergekit's default is what no filter fits
    assert recipe.settings["normalize"] == Choice((("mlp", True), ("*", False)))


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("org/a", "org/a"),
        ("org/a@v1.0", "org/a@v1.0"),
        ("org/a@v1+org/lora@main", "org/a@v1+org/lora@main"),
        ("{model: {path: org/a}}", "org/a"),
        ("{model: {path: org/a, revision: abc}}", "org/a@abc"),
        ("{model: {path: org/a, revision: abc}, lora: {path: org/lora}}", "org/a@abc+org/lora"),
        ("{model: org/a, lora: {path: org/lora, revision: v2}}", "org/a+org/lora@v2"),
    ],
)
def test_forms_of_a_reference(tmp_path: Path, text: str, ref: str) -> None:
    recipe = read_one(
        tmp_path,
        f"""
        merge_method: task_arithmetic
        base_model: {text}
        models: [{{model: org/b, parameters: {{weight: 1}}}}, {{model: {text}}}]
        tokenizer: {{source: {text}}}
        """,
    )
    assert recipe.base == Input(ref)
    assert recipe.refs == (ref, "org/b")
    assert recipe.slices[0].inputs == (Input("org/b", None, {"weight": 1}),)
    assert recipe.vocabulary == Vocabulary(ref)


def test_an_architecture_need_not_be_named(tmp_path: Path) -> None:
    (recipe,), warnings = read(
        tmp_path,
        """
        merge_method: passthrough
        models: [{model: {model: {path: org/a}, override_architecture: LlamaForCausalLM}}]
        """,
    )
    assert recipe.refs == ("org/a",)
    assert warnings == (
        "line 3: models[0].model.override_architecture: has no effect: "
        "names and shapes are taken from the files themselves",
    )


def test_tokenizer_section(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        merge_method: linear
        models: [{model: org/a}, {model: org/b}]
        parameters: {weight: 1}
        tokenizer:
          source: org/b
          pad_to_multiple_of: 64
          tokens:
            <|im_start|>: {source: org/b}
            <|im_end|>: {source: {model: {path: org/a}}, force: true}
            "[UNK]": {source: {kind: zero}}
            <s>: {source: {kind: model_token, model: org/a, token: "<bos>"}}
            </s>: {source: {kind: model_token, model: org/a, token_id: 2}, force: true}
        """,
    )
    assert recipe.vocabulary == Vocabulary(
        "org/b",
        {
            "<|im_start|>": Token("model", "org/b"),
            "<|im_end|>": Token("model", "org/a", force=True),
            "[UNK]": Token("zero"),
            "<s>": Token("token", "org/a", "<bos>"),
            "</s>": Token("token", "org/a", 2, force=True),
        },
        64,
    )


def test_a_tokenizer_without_source_is_the_union(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        "{merge_method: linear, models: [{model: org/a, parameters: {weight: 1}}], tokenizer: {pad_to_multiple_of: 8}}",
    )
    assert recipe.vocabulary == Vocabulary("union", {}, 8)


def test_the_base_of_a_vocabulary_without_base_is_the_first_model(tmp_path: Path) -> None:
    (recipe,), warnings = read(
        tmp_path,
        """
        merge_method: passthrough
        slices:
          - sources: [{model: org/a, layer_range: [0, 4]}]
          - sources: [{model: org/b, layer_range: [2, 4]}]
        tokenizer_source: base
        """,
    )
    assert recipe.vocabulary == Vocabulary("org/a")
    assert warnings == (
        "line 6: tokenizer_source: there is no base_model; this takes the first model, and mergekit takes any",
    )


@pytest.mark.parametrize(
    ("keys", "dtype", "warned"),
    [
        ("dtype: bfloat16", "BF16", False),
        ("dtype: torch.float16", "F16", False),
        ("out_dtype: float32", "F32", False),
        ("dtype: float32\nout_dtype: bfloat16", "BF16", False),
        ("dtype: bfloat16\nout_dtype: float32", "F32", True),
        ("dtype: float64\nout_dtype: float32", "F32", True),
        ("dtype: null", None, False),
    ],
)
def test_type_of_the_output(tmp_path: Path, keys: str, dtype: str | None, warned: bool) -> None:
    (recipe,), warnings = read(tmp_path, f"merge_method: passthrough\nmodels: [{{model: org/a}}]\n{keys}\n")
    assert recipe.dtype == dtype
    assert bool(warnings) is warned
    assert all(w.startswith("line 3: dtype: has no effect: arithmetic is in float32") for w in warnings)


@pytest.mark.parametrize(
    ("text", "begins"), [("auto", "auto"), ("'{{ messages }}'", "{{ messages }}"), ("chatml", "{% for message in")]
)
def test_chat_template(tmp_path: Path, text: str, begins: str) -> None:
    recipe = read_one(tmp_path, f"merge_method: passthrough\nmodels: [{{model: org/a}}]\nchat_template: {text}\n")
    assert recipe.chat_template is not None
    assert recipe.chat_template.startswith(begins)


def test_documents_run_in_the_order_of_their_use(tmp_path: Path) -> None:
    recipes, warnings = read(
        tmp_path,
        """
        merge_method: ties
        base_model: org/base
        models:
          - {model: second, parameters: {weight: 1}}
          - {model: first+org/lora, parameters: {weight: 1}}
        ---
        name: second
        merge_method: slerp
        base_model: first
        models: [{model: org/b}]
        parameters: {t: 0.5}
        ---
        name: first
        merge_method: linear
        models: [{model: org/a}, {model: org/b}]
        parameters: {weight: 0.5}
        ---
        """,
    )
    assert warnings == ()
    assert [r.name for r in recipes] == ["first", "second", None]
    assert recipes[2].refs == ("org/base", "second", "first+org/lora")
    assert recipes[0].text.startswith("name: first\nmerge_method: linear")
    assert "ties" not in recipes[0].text


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

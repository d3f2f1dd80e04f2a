"""mergekit's YAML: every shape that it has, and the recipes that people write."""

from __future__ import annotations

from pathlib import Path

import pytest

from merganser.merging.recipe import Input, Token, Vocabulary
from merganser.merging.values import Choice, Gradient
from recipe_support import read, read_one, refused, weights

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


@pytest.mark.parametrize("key", ["tokenizer_source: SOURCE", "tokenizer: {source: SOURCE}"])
def test_older_recipes_write_a_model_that_gives_the_vocabulary_with_a_prefix(tmp_path: Path, key: str) -> None:
    (tmp_path / "b").mkdir()
    weight = "parameters: {weight: 1}"
    for ref in ("org/a", "b"):
        text = f"merge_method: linear\n{weight}\nmodels: [{{model: org/a}}, {{model: b}}]\n{key}"
        recipe = read_one(tmp_path, text.replace("SOURCE", f"model:{ref}"))
        assert recipe.vocabulary == Vocabulary(recipe.refs[("org/a", "b").index(ref)])
    named = f"merge_method: linear\n{weight}\nmodels: [{{model: 'model:a'}}, {{model: a}}]\ntokenizer_source: model:a"
    assert read_one(tmp_path, named).vocabulary == Vocabulary("model:a")
    message = refused(tmp_path, f"merge_method: linear\n{weight}\nmodels: [{{model: a}}]\ntokenizer_source: model:c")
    assert "line 4: tokenizer_source: 'c' is none of union, base, intersection and no model of this recipe" in message


def test_keep_is_a_key_of_ours_for_one_pattern_or_several(tmp_path: Path) -> None:
    text = "{merge_method: passthrough, models: [{model: org/a}], keep: KEEP}"
    assert read_one(tmp_path, text.replace("KEEP", "'*.bias'")).keep == ("*.bias",)
    assert read_one(tmp_path, text.replace("KEEP", "['*.bias', head.*]")).keep == ("*.bias", "head.*")


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
          - {model: first, parameters: {weight: 1}}
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
    assert recipes[2].refs == ("org/base", "second", "first")
    assert recipes[0].text.startswith("name: first\nmerge_method: linear")
    assert "ties" not in recipes[0].text

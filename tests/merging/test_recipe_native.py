"""Our language of recipes."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from merganser.merging.checking import Words, check_method
from merganser.merging.native import read_recipes
from merganser.merging.recipe import Input, Recipe, Slice, Token, Vocabulary
from merganser.merging.values import Choice, Gradient
from recipe_support import read, read_one, weights


def test_a_whole_recipe(tmp_path: Path) -> None:
    text = """\
method: ties
base: org/base
models:
  - org/maths
  - {model: org/code, weight: 0.5, density: [0.2, 0.8]}
settings: {density: 0.2, scale: [{filter: mlp, value: 0.5}, 1.0]}
post: [{lines: {alpha: 0.5, beta: 1}}, {svc: {alpha: 0.125}}, subspace_boosting]
dtype: bfloat16
seed: 7
name: both
vocabulary: union
chat_template: auto
keep: [vision_tower.*]
"""
    assert read_one(tmp_path, text) == Recipe(
        method="ties",
        slices=(
            Slice((Input("org/maths"), Input("org/code", None, {"weight": 0.5, "density": Gradient((0.2, 0.8))}))),
        ),
        base=Input("org/base"),
        settings={"density": 0.2, "scale": Choice((("mlp", 0.5), ("*", 1.0)))},
        post=(("lines", {"alpha": 0.5, "beta": 1}), ("svc", {"alpha": 0.125}), ("subspace_boosting", {})),
        dtype="BF16",
        dialect="paper",
        seed=7,
        name="both",
        vocabulary=Vocabulary("union"),
        chat_template="auto",
        keep=("vision_tower.*",),
        text=text,
    )


def test_the_shortest_recipe(tmp_path: Path) -> None:
    text = "{method: linear, models: [a, b]}"
    assert read_one(tmp_path, text) == Recipe("linear", (Slice((Input("a"), Input("b"))),), text=text)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *((w, "BF16") for w in ("bfloat16", "BF16", "bf16", "torch.bfloat16")),
        *((w, "F16") for w in ("float16", "F16", "fp16", "half", "torch.float16")),
        *((w, "F32") for w in ("float32", "F32", "fp32", "float")),
        *((w, "F64") for w in ("float64", "F64", "double")),
    ],
)
def test_types_by_any_name(tmp_path: Path, word: str, name: str) -> None:
    assert read_one(tmp_path, f"{{method: linear, models: [a, b], dtype: {word}}}").dtype == name


def test_slices(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        method: task_arithmetic
        base: org/base
        slices:
          - models: [{model: a, layers: [0, 8]}, {model: b, layers: [0, 8], weight: 0.5}]
          - models: [{model: a, layers: [4, 8]}, {model: b, layers: [8, 12]}]
            base: {model: org/base, layers: [8, 12]}
            settings: {scale: 0.5}
          - models: [{model: a, layers: [8, 8]}]
            base: other
        """,
    )
    first, second, third = recipe.slices
    assert first == Slice((Input("a", (0, 8)), Input("b", (0, 8), {"weight": 0.5})), Input("org/base", (0, 8)))
    assert second == Slice((Input("a", (4, 8)), Input("b", (8, 12))), Input("org/base", (8, 12)), {"scale": 0.5})
    assert third == Slice((Input("a", (8, 8)),), Input("other", (8, 8)))


def test_stacked_slices_have_no_base(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        method: passthrough
        slices:
          - models: [{model: a, layers: [0, 2]}]
          - models: [{model: b, layers: [1, 2]}]
        """,
    )
    assert [s.base for s in recipe.slices] == [None, None]


@pytest.mark.parametrize(
    ("text", "vocabulary"),
    [
        ("base", Vocabulary("base")),
        ("intersection", Vocabulary("intersection")),
        ("b", Vocabulary("b")),
        ("{source: b, pad_to_multiple_of: 8}", Vocabulary("b", {}, 8)),
        ("{source: union, tokens: {<s>: b}}", Vocabulary("union", {"<s>": Token("model", "b")})),
        ("{source: union, tokens: {<s>: {kind: zero}}}", Vocabulary("union", {"<s>": Token("zero")})),
        (
            "{source: union, tokens: {<s>: {model: b, force: true}}}",
            Vocabulary("union", {"<s>": Token("model", "b", force=True)}),
        ),
        (
            "{source: union, tokens: {<s>: {model: b, token: <bos>}}}",
            Vocabulary("union", {"<s>": Token("token", "b", "<bos>")}),
        ),
        (
            "{source: union, tokens: {<s>: {kind: token, model: a, token: 17}}}",
            Vocabulary("union", {"<s>": Token("token", "a", 17)}),
        ),
    ],
)
def test_vocabularies(tmp_path: Path, text: str, vocabulary: Vocabulary) -> None:
    recipe = read_one(tmp_path, f"{{method: ties, base: a, models: [b], vocabulary: {text}}}")
    assert recipe.vocabulary == vocabulary


def test_one_pattern_may_stand_alone(tmp_path: Path) -> None:
    assert read_one(tmp_path, "{method: linear, models: [a, b], keep: 'vision.*'}").keep == ("vision.*",)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_makes_it_the_method_of_changes(tmp_path: Path, method: str) -> None:
    assert read_one(tmp_path, f"{{method: {method}, models: [a, b]}}").method == method
    assert read_one(tmp_path, f"{{method: {method}, base: c, models: [a, b]}}").method == f"{method}_delta"


def test_the_dialect_brings_its_defaults(tmp_path: Path) -> None:
    ours = read_one(tmp_path, "{method: dare_ties, base: a, models: [b]}")
    theirs = read_one(tmp_path, "{method: dare_ties, base: a, models: [b], dialect: mergekit}")
    assert ours.settings == {}
    assert theirs.settings["rescale"] == "l1"
    assert theirs.settings["normalize"] is False


def test_a_continual_method(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path, "{method: opcm, base: a, models: [b, {model: c, weight: 2}], settings: {alpha: 0.4, diagonal: keep}}"
    )
    assert recipe.settings == {"alpha": 0.4, "diagonal": "keep"}
    assert weights(recipe) == [None, 2]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("alpaca", "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Response:\n"),
        ("mistral", "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>"),
    ],
)
def test_templates_by_name(tmp_path: Path, name: str, text: str) -> None:
    template = read_one(tmp_path, f"{{method: linear, models: [a, b], chat_template: {name}}}").chat_template
    assert template is not None
    found = jinja2.Template(template, keep_trailing_newline=True)
    assert found.render(messages=CHAT, bos_token="<s>", eos_token="</s>", add_generation_prompt=True) == text


# references


def test_paths_are_looked_for_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("recipes/models/a", "recipes/lora", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "recipes/all.pt").touch()
    (tmp_path / "recipes/recipe.yaml").write_text(
        "method: linear\n"
        "models: [models/a, org/a, all.pt::model, models/a+lora, org/a@v1+lora, hf:models/a, ../elsewhere, ~/a, /b]\n"
    )
    monkeypatch.chdir(tmp_path)
    ((recipe,), _) = read_recipes(Path("recipes/recipe.yaml"))
    assert recipe.refs == (
        "recipes/models/a",
        "org/a",
        "recipes/all.pt::model",
        "recipes/models/a+recipes/lora",
        "org/a@v1+recipes/lora",
        "hf:models/a",
        "recipes/../elsewhere",
        "~/a",
        "/b",
    )


def test_the_name_of_a_recipe_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    text = "{method: linear, name: first, models: [a, b]}\n---\n{method: linear, models: [first, b]}"
    recipes, _ = read(tmp_path, text)
    assert recipes[1].refs == ("first", "b")


def test_a_name_that_no_file_can_have_is_left_as_it_is(tmp_path: Path) -> None:
    long = "x" * 5000
    assert read_one(tmp_path, f"{{method: linear, models: ['{long}', b]}}").refs == (long, "b")


# several recipes in one file


def test_recipes_keep_the_order_of_the_file_where_they_can(tmp_path: Path) -> None:
    recipes, _ = read(
        tmp_path,
        """
        {method: linear, models: [d, x]}
        ---
        {method: linear, name: d, models: [c, b]}
        ---
        {method: linear, name: a, models: [x, y]}
        ---
        {method: linear, name: b, models: [x, y]}
        ---
        {method: linear, name: c, models: [a, y]}
        """,
    )
    assert [r.name for r in recipes] == ["a", "b", "c", "d", None]


def test_languages_may_be_mixed(tmp_path: Path) -> None:
    recipes, _ = read(
        tmp_path,
        """
        {merge_method: linear, models: [{model: ours, parameters: {weight: 1}}]}
        ---
        {method: linear, name: ours, models: [x, y]}
        """,
    )
    assert [(r.name, r.dialect) for r in recipes] == [("ours", "paper"), (None, "mergekit")]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    recipes, _ = read(tmp_path, "---\n# nothing\n---\n{method: linear, models: [x, y]}\n---\n")
    assert len(recipes) == 1


# YAML


def test_anchors_and_merge_keys_are_written_out(tmp_path: Path) -> None:
    recipe = read_one(
        tmp_path,
        """
        method: ties
        base: a
        models:
          - &one {model: b, weight: 0.5, density: &d [0.1, 0.9]}
          - {<<: *one, model: c}
          - {model: d, density: *d}
          - {<<: [{weight: 1}, *one], model: e}
        """,
    )
    assert [i.ref for i in recipe.slices[0].inputs] == ["b", "c", "d", "e"]
    assert weights(recipe) == [0.5, 0.5, None, 1]
    assert [i.settings["density"] for i in recipe.slices[0].inputs] == [Gradient((0.1, 0.9))] * 4


def test_a_byte_order_mark_and_other_scripts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("\ufeffmethod: linear\nmodels: [größe, b]\n".encode())
    ((recipe,), _) = read_recipes(path)
    assert recipe.refs == ("größe", "b")


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    assert read_one(tmp_path, "{method: karcher, models: [a, b], settings: {tol: 1e-6}}").settings == {"tol": 1e-6}


def test_what_looks_like_a_date_is_text(tmp_path: Path) -> None:
    assert read_one(tmp_path, "{method: linear, models: [2024-01-01, b]}").refs == ("2024-01-01", "b")


def test_an_entry_behind_one_for_every_tensor_is_never_used(tmp_path: Path) -> None:
    _, warnings = read(tmp_path, "method: linear\nmodels:\n- {model: a, weight: [0.5, {filter: mlp, value: 1}]}\n- b\n")
    assert warnings == ("line 3: models[0].weight[1]: is never used: an entry above it fits every tensor",)


# the check by itself


def test_a_recipe_made_in_python_is_checked_too() -> None:
    models = (Input("b", None, {"weight": float("nan")}), Input("c", None, {"scale": 1.0}))
    recipe = Recipe("ties", (Slice(models),), settings={"density": Gradient((0.1, float("inf")))})
    assert check_method(recipe) == [
        "base: missing; ties needs what changes are taken against",
        "settings.density: inf is not finite",
        "models[0].weight: nan is not finite",
        "models[1].scale: is one for all models; write it under settings",
    ]


def test_a_number_that_python_does_not_write_is_refused() -> None:
    recipe = Recipe("linear", (Slice((Input("b", None, {"weight": 10**5000}),)),))
    assert check_method(recipe) == ["models[0].weight: a number of thousands of digits is not finite"]


def test_a_check_speaks_the_words_of_its_language() -> None:
    recipe = Recipe("ties", (Slice((Input("b", (0, 1), {"scale": 1.0}),)),), settings={"densty": 1})
    assert check_method(
        recipe, Words("merge_method", "base_model", "parameters", "parameters", {"scale": "lambda"})
    ) == [
        "base_model: missing; ties needs what changes are taken against",
        "parameters.densty: unknown; did you mean density?",
        "slices[0].models[0].parameters.lambda: is one for all models; write it under parameters",
    ]


def test_a_sound_recipe_has_no_faults() -> None:
    assert check_method(Recipe("ties", (Slice((Input("b"),)),), base=Input("a"), settings={"density": 0.5})) == []

"""Bad recipes in mergekit's language: everything that is wrong is said at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from merganser.errors import ParameterError, RefError
from merganser.merging.documents import MAX_BYTES, MAX_VALUES
from merganser.merging.native import read_recipes
from recipe_support import refused

MERGEKIT = [
    (
        "merge_method: tise\nmodels: [{model: a}]",
        "line 1: merge_method: 'tise' is unknown; did you mean ties?",
    ),
    (
        "merge_method: linear\ntokeniser_source: union\nmodels: [{model: a, parameters: {weight: 1}}]",
        "line 2: tokeniser_source: unknown; did you mean tokenizer_source?",
    ),
    (
        "merge_method: linear\nmethod: ties\nmodels: [{model: a, parameters: {weight: 1}}]",
        "line 2: method: unknown; did you mean merge_method?",
    ),
    (
        "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1, denisty: 1}}]",
        "line 3: models[0].parameters.denisty: unknown; did you mean density?",
    ),
    (
        "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {scale: 1}",
        "line 4: parameters.scale: has no effect in mergekit, which calls it lambda",
    ),
    (
        "merge_method: ties\nbase_model: b\nmodels: [{model: a, weight: 1}]\nparameters: {weight: 1}",
        "line 3: models[0].weight: has no effect here, in mergekit neither; it belongs under parameters",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]",
        "line 2: models[0]: weight is missing; in mergekit linear has no default: parameters: {weight: 1.0}",
    ),
    (
        "merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]",
        "line 2: base_model: linear takes it as one more model, and it has no weight; "
        "list it under models with a weight, or leave it out",
    ),
    (
        "merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]",
        "line 1: base_model: missing; ties needs what changes are taken against",
    ),
    (
        "merge_method: slerp\nbase_model: b\nmodels: [{model: a, parameters: {t: 0.5}}]",
        "line 1: parameters: t is missing; slerp needs it",
    ),
    (
        "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\nparameters: {t: 0.5}",
        "line 3: models: slerp merges one model beside the base, and here it is 2",
    ),
    (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 0.5}",
        "line 3: models: slerp merges one model beside the base, and here it is 0",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}, {model: b}]",
        "line 2: models: passthrough merges one model, and here it is 2",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\nslices: []",
        "line 1: give exactly one of models, slices and modules; here it is models and slices",
    ),
    (
        "merge_method: passthrough",
        "line 1: give exactly one of models, slices and modules; here it is none of them",
    ),
    (
        "merge_method: passthrough\nslices: [{sources: [{model: a}]}]",
        "line 2: slices[0].sources[0]: layer_range is missing: [first, end]",
    ),
    (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}], layer_range: [0, 2]}]",
        "line 2: slices[0].layer_range: unknown; known: sources, base_model, parameters",
    ),
    (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\n"
        "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]",
        "line 4: slices[0]: has ranges of 2 and 3 layers; those of one slice must be of one length",
    ),
    (
        "merge_method: ties\nbase_model: a\nparameters: {weight: 1}\n"
        "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}, "
        "{model: b, layer_range: [0, 2]}]}]",
        "line 4: slices[0].sources[1]: names the base a second time; ties takes it once",
    ),
    (
        "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: .nan}}]",
        "line 3: models[0].parameters.weight: nan is not finite",
    ),
    (
        "merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {weight: abc}}]",
        "line 3: models[1].parameters.weight: must be a number, and is text 'abc'",
    ),
    (
        "merge_method: dare_ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n"
        "parameters: {rescale: 0.5}",
        "line 4: parameters.rescale: must be true or false, and is a number 0.5",
    ),
    (
        "merge_method: multislerp\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, eps: 0.1}",
        "line 3: parameters.eps: our multislerp cannot do this; leave it out",
    ),
    (
        "name: one\nmerge_method: passthrough\nmodels: [{model: a}]\n---\n"
        "merge_method: passthrough\nmodels: [{model: a+one}]",
        "line 5: 'a+one': one is a recipe of this file, and no adapter",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\ndtype: int64",
        "line 3: dtype: 'int64' is no floating type that models are stored in; "
        "known: bfloat16, float16, float32, float64",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer_source: union\ntokenizer: {source: union}",
        "line 3: tokenizer_source: give tokenizer_source or tokenizer, not both",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer: {source: union, tokens: {x: {source: b}}}",
        "line 3: tokenizer.tokens.x.source: 'b' is no model of this recipe",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\n"
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
        "line 3: tokenizer.tokens.x.source: give token or token_id",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: {model: {path: a, revison: b}}}]",
        "line 2: models[0].model.model.revison: unknown; did you mean revision?",
    ),
    (
        "merge_method: linear\nparameters: {weight: 1}\n"
        "modules: {text: {models: [{model: a}], parameters: {nrmalize: 1}}}",
        "line 3: modules.text.parameters.nrmalize: unknown; did you mean normalize?",
    ),
    (
        "merge_method: linear\nmodules: {text: {models: [{model: a, parameters: {weight: .inf}}]}}",
        "line 2: modules.text.models[0].parameters.weight: inf is not finite",
    ),
    ("merge_method:\nmodels: [{model: a}]", "line 1: merge_method is empty"),
    (
        "merge_method: passthrough\nmodules: {text: {parameters: {scale: 1}}}",
        "line 2: modules.text: give exactly one of models and slices; here it is none of them",
    ),
    ("merge_method: passthrough\nslices: [{parameters: {scale: 1}}]", "line 2: slices[0]: sources is missing"),
    (
        "merge_method: passthrough\nslices: [{sources: [a]}]",
        "line 2: slices[0].sources[0]: must be {model: ..., layer_range: [first, end]}",
    ),
    ("merge_method: passthrough\nmodels: [{parameters: {scale: 1}}]", "line 2: models[0]: model is missing"),
    ("merge_method: passthrough\nmodels: [{model: {lora: b}}]", "line 2: models[0].model: model is missing"),
    (
        "merge_method: passthrough\nmodels: [{model: {model: {revision: b}}}]",
        "line 2: models[0].model.model: path is missing",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {force: true}}}",
        "line 3: tokenizer.tokens.x: source is missing",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {source: {token_id: 1}}}}",
        "line 3: tokenizer.tokens.x.source: model is missing",
    ),
]


@pytest.mark.parametrize(("text", "message"), MERGEKIT, ids=[message[:70] for _, message in MERGEKIT])
def test_a_bad_recipe_of_mergekit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text) == f"recipe.yaml: {message}"


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    text = """
        method: ties
        bas: a
        models:
          - b
          - {model: c, weight: .nan, denisty: 0.2}
        settings: {scale: [], normalize: maybe}
        dtype: int4
        ---
        name: two
        merge_method: slerp
        models: [{model: b}]
        parameters: {tt: 0.5}
        """
    assert refused(tmp_path, text).split("\n") == [
        "recipe.yaml has 10 problems",
        "  line 2: base: missing; ties needs what changes are taken against",
        "  line 3: bas: unknown; did you mean base?",
        "  line 6: models[1].weight: nan is not finite",
        "  line 6: models[1].denisty: unknown; did you mean density?",
        "  line 7: settings.scale: must be a value, or a list of values from the first layer to the last, and is empty",
        "  line 7: settings.normalize: must be true or false, and is text 'maybe'",
        "  line 8: dtype: 'int4' is no floating type that models are stored in; "
        "known: bfloat16, float16, float32, float64",
        "  line 10: base_model: missing; slerp needs the first of its two models",
        "  line 13: parameters.tt: unknown; did you mean t?",
        "  line 13: parameters: t is missing; slerp needs it",
    ]


def test_lenient_forgives_nothing_that_mergekit_would_not(tmp_path: Path) -> None:
    text = "merge_method: tise\nnonsense: 1\nmodels: [{model: a}]"
    assert (
        refused(tmp_path, text, lenient=True)
        == "recipe.yaml: line 1: merge_method: 'tise' is unknown; did you mean ties?"
    )
    text = "method: ties\nbase: a\nmodels: [b]\nsetings: {}"
    assert refused(tmp_path, text, lenient=True) == "recipe.yaml: line 4: setings: unknown; did you mean settings?"


# files that are no recipes


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RefError, match=r"none\.yaml does not exist$"):
        read_recipes(tmp_path / "none.yaml")
    with pytest.raises(RefError, match="is a folder, and a recipe is a file"):
        read_recipes(tmp_path)
    with pytest.raises(RefError, match="cannot be read"):
        read_recipes(tmp_path / "x\0y")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"method: \xff\xfe")
    with pytest.raises(ParameterError, match="byte 8 is not UTF-8; a recipe is text"):
        read_recipes(path)
    path.write_bytes(b"method: \x07")
    with pytest.raises(ParameterError, match="not YAML: unacceptable character"):
        read_recipes(path)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    assert refused(tmp_path, "#" * (MAX_BYTES + 1)) == f"recipe.yaml: larger than {MAX_BYTES} bytes; a recipe is not"


@pytest.mark.parametrize("text", ["[" * 5_000, "a: " + "{a: " * 5_000, "- " * 5_000])
def test_nesting_without_end(tmp_path: Path, text: str) -> None:
    limit = sys.getrecursionlimit()
    assert refused(tmp_path, text) == "recipe.yaml: lists and mappings are nested too deeply"
    assert sys.getrecursionlimit() == limit


def test_aliases_that_multiply(tmp_path: Path) -> None:
    lists = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    expected = f"recipe.yaml: more than {MAX_VALUES} values, or aliases that multiply to that"
    assert refused(tmp_path, "a0: &a0 [x]\n" + lists) == expected
    merges = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
    assert refused(tmp_path, "a0: &a0 {x: 1}\n" + merges) == expected


@pytest.mark.parametrize("text", ["method: linear\nmodels: &m [*m]", "method: linear\nmodels: [&m {model: *m}]"])
def test_a_value_that_holds_itself(tmp_path: Path, text: str) -> None:
    assert "holds itself" in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9" * 5000, f"'{'9' * 76}... is no number"),
        ("0b_", "'0b_' is no number"),
        ("!!int x", "'x' is no number"),
        ("!!float x", "'x' is no number"),
        ("!!bool x", "'x' is no truth value"),
        ("!!binary x", "the tag 'binary' is not understood"),
        ("!mine x", "the tag '!mine' is not understood"),
        ("0b", "must be a number, and is text '0b'"),
        ("=", "must be a number, and is text '='"),
    ],
)
def test_odd_values_are_refused_plainly(tmp_path: Path, value: str, message: str) -> None:
    found = refused(tmp_path, f"method: linear\nmodels:\n- model: a\n  weight: {value}\n")
    assert found == f"recipe.yaml: line 4: models[0].weight: {message}"


def test_values_are_counted_while_they_are_read(tmp_path: Path) -> None:
    expected = f"recipe.yaml: more than {MAX_VALUES} values, or aliases that multiply to that"
    assert refused(tmp_path, "- a\n" * (MAX_VALUES + 1)) == expected


def test_what_a_file_holds_cannot_steer_the_terminal(tmp_path: Path) -> None:
    message = refused(tmp_path, 'method: "\\e[31mred"\n"a\\e[2Jb": 1\nmodels: [a]\n')
    assert "\x1b" not in message
    assert "\\x1b[2J" in message

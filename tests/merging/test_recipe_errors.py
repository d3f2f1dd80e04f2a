"""Bad recipes: everything that is wrong is said at once, each with its line and place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from merganser.errors import ParameterError, RefError
from merganser.merging.native import read_recipes
from merganser.merging.reading import MAX_BYTES, MAX_VALUES
from recipe_support import refused

TIES = "method: ties\nbase: a\n"
LINEAR = "method: linear\n"

NATIVE = [
    # keys
    ("method: tise\nbase: a\nmodels: [b]", "line 1: method: 'tise' is unknown; did you mean ties?"),
    (TIES + "models: [b]\nsetings: {}", "line 4: setings: unknown; did you mean settings?"),
    (TIES + "models: [{model: b, denisty: 1}]", "line 3: models[0].denisty: unknown; did you mean density?"),
    (TIES + "models: [b]\nsettings: {densty: 1}", "line 4: settings.densty: unknown; did you mean density?"),
    (TIES + "models: [{model: b, lamda: 1}]", "line 3: models[0].lamda: unknown; known: density, weight"),
    (
        TIES + "models: [{model: b, scale: 1}]",
        "line 3: models[0].scale: is one for all models; write it under settings",
    ),
    (TIES + "models: [b]\ndensity: 1", "line 4: density: settings of the method stand under settings: {density: ...}"),
    ("base_model: a\n" + TIES + "models: [b]", "line 1: base_model: is called base in this language"),
    (
        TIES + "models: [{model: b, parameters: {weight: 1}}]",
        "line 3: models[0].parameters: settings of a model stand directly beside it",
    ),
    (TIES + "models: [b]\nmodels: [c]", "line 4: models: given twice; the first is in line 3"),
    (TIES + "models: [b]\n1: 2", "line 4: 1: a key must be text; put it in quotes"),
    ("base: a\nmodels: [b]", "line 1: method is missing"),
    (TIES, "line 1: models is missing"),
    (TIES + "models: [b]\nslices: []", "line 1: give models or slices, not both"),
    # the base
    ("method: ties\nmodels: [b]", "line 1: base: missing; ties needs what changes are taken against"),
    ("method: slerp\nmodels: [b]\nsettings: {t: 1}", "line 1: base: missing; slerp needs the first of its two models"),
    (
        LINEAR + "base: a\nmodels: [b, c]",
        "line 2: base: linear takes no base; list it among the models, or leave it out",
    ),
    (TIES + "models: [b, a]", "line 3: models[1]: is the base itself, so its change is zero; leave it out here"),
    (
        "method: slerp\nbase: a\nmodels: [a]\nsettings: {t: 1}",
        "line 3: models[0]: is the base, which slerp takes as its first model; leave it out here",
    ),
    ("method: opcm\nmodels: [b]", "line 1: base: missing; opcm needs what changes are taken against"),
    # numbers of models
    (
        "method: slerp\nbase: a\nmodels: [b, c]\nsettings: {t: 1}",
        "line 3: models: slerp merges one model beside the base, and here it is 2",
    ),
    ("method: karcher\nmodels: [b]", "line 2: models: karcher merges 2 or more models, and here it is 1"),
    ("method: nuslerp\nmodels: [a, b, c]", "line 2: models: nuslerp merges 2 models, and here it is 3"),
    (LINEAR + "models: []", "line 2: models: must be a list of models, and is empty"),
    # values
    (LINEAR + "models: [{model: b, weight: .nan}]", "line 2: models[0].weight: nan is not finite"),
    (LINEAR + "models: [{model: b, weight: [0, -.inf]}]", "line 2: models[0].weight: -inf is not finite"),
    (LINEAR + "models: [{model: b, weight: 1e400}]", "line 2: models[0].weight: inf is not finite"),
    (
        LINEAR + f"models: [{{model: b, weight: 1{'0' * 400}}}]",
        f"line 2: models[0].weight: 1{'0' * 76}... is not finite",
    ),
    (LINEAR + "models: [{model: b, weight: '1'}]", "line 2: models[0].weight: must be a number, and is text '1'"),
    (LINEAR + "models: [{model: b, weight: }]", "line 2: models[0].weight: is empty"),
    (
        LINEAR + "models: [{model: b, weight: []}]",
        "line 2: models[0].weight: must be a value, or a list of values from the first layer to the last, and is empty",
    ),
    (
        LINEAR + "models: [{model: b, weight: [1, true]}]",
        "line 2: models[0].weight: is a gradient of a number and a truth value; its values must be of one kind",
    ),
    (
        LINEAR + "models: [{model: b, weight: [[1, 2], 3]}]",
        "line 2: models[0].weight[0]: is a list in a list; a gradient is a list of single values",
    ),
    (
        LINEAR + "models: [{model: b, weight: {filter: mlp}}]",
        "line 2: models[0].weight: a filter needs a value",
    ),
    (
        LINEAR + "models: [{model: b, weight: {filter: '', value: 1}}]",
        "line 2: models[0].weight.filter: must be a part of the names of tensors, and is text ''",
    ),
    (
        LINEAR + "models: [{model: b, weight: {filter: a, value: {value: 1}}}]",
        "line 2: models[0].weight.value: is a filter in a filter; a value is a number, or a list of numbers",
    ),
    (
        LINEAR + "models: [{model: b, weight: {filter: a, valeu: 1, value: 2}}]",
        "line 2: models[0].weight.valeu: unknown; did you mean value?",
    ),
    (
        LINEAR + "models: [b]\nsettings: {normalize: 1}",
        "line 3: settings.normalize: must be true or false, and is a number 1",
    ),
    (
        "method: karcher\nmodels: [a, b]\nsettings: {max_iter: 1.5}",
        "line 3: settings.max_iter: must be a whole number, and is a number 1.5",
    ),
    (
        "method: karcher\nmodels: [a, b]\nsettings: {max_iter: [1, 20]}",
        "line 3: settings.max_iter: is a whole number, which cannot run over layers",
    ),
    (
        "method: dare_ties\nbase: a\nmodels: [b]\nsettings: {rescale: true}",
        "line 4: settings.rescale: must be text, and is a truth value true",
    ),
    ("method: slerp\nbase: a\nmodels: [b]", "line 1: settings: t is missing; slerp needs it"),
    (
        "method: model_stock\nbase: a\nmodels: [b, {model: c, weight: 1}]",
        "line 3: models[1].weight: model_stock takes no weights",
    ),
    # slices
    (
        LINEAR + "slices:\n- models: [{model: a, layers: [0, 4]}, {model: b, layers: [0, 5]}]",
        "line 3: slices[0]: has ranges of 4 and 5 layers; those of one slice must be of one length",
    ),
    (LINEAR + "slices:\n- models: [{model: a}]", "line 3: slices[0].models[0]: layers is missing: [first, end]"),
    (
        LINEAR + "slices:\n- models: [a]",
        "line 3: slices[0].models[0]: needs layers: {model: ..., layers: [first, end]}",
    ),
    (
        LINEAR + "slices:\n- models: [{model: a, layers: [4, 0]}]",
        "line 3: slices[0].models[0].layers: [4, 0) is no range of layers: 0 <= first <= end",
    ),
    (
        LINEAR + "slices:\n- models: [{model: a, layers: 4}]",
        "line 3: slices[0].models[0].layers: must be two whole numbers [first, end)",
    ),
    (
        TIES + "slices:\n- models: [{model: b, layers: [0, 4]}, {model: c, layers: [4, 8]}]",
        "line 4: slices[0]: takes different layers of its models, so it must say which layers of the base a these are",
    ),
    (
        LINEAR + "slices:\n- modles: [a]\n  models: [{model: a, layers: [0, 1]}]",
        "line 3: slices[0].modles: unknown; did you mean models?",
    ),
    (
        LINEAR + "models: [{model: a, layers: [0, 1]}]",
        "line 2: models[0].layers: belongs into slices; models are taken whole",
    ),
    (
        TIES + "slices:\n- models: [{model: b, layers: [0, 4]}]\n  settings: {scael: 1}",
        "line 5: slices[0].settings.scael: unknown; did you mean scale?",
    ),
    # everything else
    (
        LINEAR + "models: [b]\ndtype: int8",
        "line 3: dtype: 'int8' is no floating type that models are stored in; "
        "known: bfloat16, float16, float32, float64",
    ),
    (LINEAR + "models: [b]\ndialect: megrekit", "line 3: dialect: 'megrekit' is unknown; did you mean mergekit?"),
    (LINEAR + "models: [b]\nseed: -1", "line 3: seed: must be a whole number from 0 on, and is a number -1"),
    (LINEAR + "models: [b]\nseed: true", "line 3: seed: must be a whole number from 0 on, and is a truth value true"),
    (
        LINEAR + "models: [1.5]",
        "line 2: models[0]: must be a model, and is a number 1.5; put it in quotes if it is meant",
    ),
    (LINEAR + "models: [{weight: 1}]", "line 2: models[0]: model is missing"),
    (LINEAR + "models: b", "line 2: models: must be a list of models, and is text 'b'"),
    (LINEAR + "models: [b]\nsettings: [1]", "line 3: settings: must be settings by name, and is a list"),
    (
        LINEAR + "models: [b]\npost: [{a: {}, b: {}}]",
        "line 3: post[0]: must be a name, or one name with its settings: {name: {setting: value}}",
    ),
    (
        "method: linear\nmodels: [a, b]\npost: [svc]",
        "line 3: post: linear merges whole models, so there is no change to process; "
        "choose a method of changes, such as task_arithmetic",
    ),
    ("method: mean\nbase: a\nmodels: [b]\npost: [{svc: {alpha: .nan}}]", "line 4: post.svc.alpha: nan is not finite"),
    (
        LINEAR + "models: [b]\nkeep: [1]",
        "line 3: keep[0]: must be a pattern of names, and is a number 1; put it in quotes if it is meant",
    ),
    (
        LINEAR + "models: [b]\nvocabulary: unoin",
        "line 3: vocabulary: 'unoin' is none of union, base, intersection and no model of this recipe",
    ),
    (LINEAR + "models: [b]\nvocabulary: base", "line 3: vocabulary: the recipe has no base; name one of the models"),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, tokens: {<s>: c}}",
        "line 3: vocabulary.tokens.<s>: 'c' is no model of this recipe",
    ),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, pad_to_multiple_of: 0}",
        "line 3: vocabulary.pad_to_multiple_of: must be a whole number from 1 on, and is a number 0",
    ),
    (
        LINEAR + "models: [b]\nchat_template: chatlm",
        "line 3: chat_template: 'chatlm' is no template and none of auto, chatml, llama3, alpaca, mistral, exaone; "
        "write the template itself",
    ),
    (
        LINEAR + "models: [b]\nname: ../x",
        "line 3: name: '../x' may hold letters, digits, dots, hyphens and underscores, "
        "and begins with a letter or a digit",
    ),
    (LINEAR + "slices: [{settings: {}}]", "line 2: slices[0]: models is missing"),
    (
        LINEAR + "slices: [{models: [{model: a, layer_range: [0, 1], layers: [0, 1]}]}]",
        "line 2: slices[0].models[0].layer_range: is called layers in this language",
    ),
    ("method: ties\nbase: {revision: x, model: a}\nmodels: [b]", "line 2: base.revision: unknown; known: model"),
    ("method: ties\nbase: {model: }\nmodels: [b]", "line 2: base: model is missing"),
    (LINEAR + "models: [b]\nvocabulary: {pad_to_multiple_of: 8}", "line 3: vocabulary: source is missing"),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, tokens: {x: {kind: zero, model: b}}}",
        "line 3: vocabulary.tokens.x: zero takes no model and no token",
    ),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, tokens: {x: {force: true}}}",
        "line 3: vocabulary.tokens.x: model is missing",
    ),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, tokens: {x: {kind: token, model: b}}}",
        "line 3: vocabulary.tokens.x: token is missing",
    ),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, tokens: {x: {kind: model, model: b, token: y}}}",
        "line 3: vocabulary.tokens.x: a row of another token is kind: token",
    ),
    (
        LINEAR + "models: [b]\nvocabulary: {source: union, tokens: {x: {model: b, force: 1}}}",
        "line 3: vocabulary.tokens.x.force: must be true or false, and is a number 1",
    ),
    (LINEAR + "models: [~]", "line 2: models[0]: must be a model, and is empty"),
    (LINEAR + "models: {a: b}", "line 2: models: must be a list of models, and is a mapping"),
    # several recipes
    (
        LINEAR + "models: [x]\nname: x",
        "line 1: the recipe x uses its own output",
    ),
    (
        LINEAR
        + "models: [y]\nname: x\n---\n"
        + LINEAR
        + "models: [z]\nname: y\n---\n"
        + LINEAR
        + "models: [x]\nname: z",
        "line 1: recipes use each other in a circle: x -> y -> z -> x",
    ),
    (
        LINEAR + "models: [a]\nname: x\n---\n" + LINEAR + "models: [b]\nname: x",
        "line 7: name: 'x' is taken by the recipe in line 1",
    ),
    (
        LINEAR + "models: [a]\n---\n" + LINEAR + "models: [b]",
        "line 4: name is missing; only one recipe of a file, the last to run, may have none",
    ),
    # no recipe at all
    ("", "holds no recipe"),
    ("{}", "line 1: holds no recipe"),
    ("- a\n- b", "line 1: must be a mapping, from method to models, and is a list"),
    ("just text", "line 1: must be a mapping, from method to models, and is text 'just text'"),
    (
        "base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]",
        "line 1: is a file of mergekit-moe, which makes a mixture of experts rather than merge weights; "
        "write a recipe: method, base, models",
    ),
    ("method: [", "line 1: not YAML: expected the node content, but found '<stream end>'"),
    ("method: linear\n\tmodels: [a]", "line 2: not YAML: found character '\\t' that cannot start any token"),
    (LINEAR + "models: [*b]", "line 2: not YAML: found undefined alias 'b'"),
    (
        LINEAR + "models: [!!python/object:os.system b]",
        "line 2: models[0]: the tag 'python/object:os.system' is not understood",
    ),
]


@pytest.mark.parametrize(("text", "message"), NATIVE, ids=[message[:70] for _, message in NATIVE])
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text) == f"recipe.yaml: {message}"


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

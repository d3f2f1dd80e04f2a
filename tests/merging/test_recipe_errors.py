"""Bad recipes: everything that is wrong is said at once, each with its line and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe_support import refused

TIES = "method: ties\nbase: a\n"
LINEAR = "method: linear\n"

NATIVE = [
    # keys
    ("method: tise\nbase: a\nmodels: [b]", "line 1: method: 'tise' is unknown; did you mean ties?"),
    ("method: TIES\nbase: a\nmodels: [b]", "line 1: method: 'TIES' is unknown; did you mean ties?"),
    (TIES + "models: [b]\nsettings: {DENSITY: 1}", "line 4: settings.DENSITY: unknown; did you mean density?"),
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

"""No tensor of a model drops out of slices or modules unless the recipe says so; the rest goes where it belongs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from adapter_helpers import pair, written
from merganser.errors import ExtraTensorError, MerganserError, ParameterError, TensorError
from merganser.merging.native import read_recipes
from merganser.merging.run import merge, plan_recipes
from merging_helpers import layered
from support import Model, load, save


def translator(encoder: int, decoder: int, seed: int) -> Model:
    """Names as T5 has them: two stacks, and two tensors that belong to neither."""
    generator = torch.Generator().manual_seed(seed)
    names = ["shared.weight", "lm_head.weight", "encoder.final.weight", "decoder.final.weight"]
    names += [f"encoder.block.{i}.q.weight" for i in range(encoder)]
    names += [f"decoder.block.{i}.q.weight" for i in range(decoder)]
    return {name: torch.randn(3, 4, generator=generator) for name in names}


@pytest.fixture
def translators(tmp_path: Path) -> list[Model]:
    models = [translator(3, 4, seed) for seed in (1, 2)]
    config = {"num_layers": 3, "num_decoder_layers": 4}
    for number, model in enumerate(models):
        save(model, tmp_path / f"m{number}", config)
    return models


def run(tmp_path: Path, text: str) -> Model:
    (tmp_path / "recipe.yaml").write_text(dedent(text))
    return load(merge(tmp_path / "recipe.yaml", tmp_path / "out", overwrite=True))


def plan_refused(kind: type[MerganserError], tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(dedent(text))
    with pytest.raises(kind) as caught:
        plan_recipes(read_recipes(tmp_path / "recipe.yaml")[0])
    return str(caught.value).replace(f"{tmp_path}/", "")


ENCODER_AND_DECODER = """
    merge_method: passthrough
    modules:
      encoder:
        slices:
          - sources: [{model: m0, layer_range: [0, 2]}]
          - sources: [{model: m1, layer_range: [1, 3]}]
      decoder:
        models: [{model: m1}]
    """


@pytest.mark.usefixtures("translators")
def test_tensors_in_no_module_are_refused_by_number_and_name(tmp_path: Path) -> None:
    message = plan_refused(ParameterError, tmp_path, ENCODER_AND_DECODER)
    first, hint = message.splitlines()
    assert first == "lm_head.weight (and 1 more) of m0 is in no module: encoder., decoder."
    assert "add a module default, which takes what no other does" in hint
    assert "keep: ['lm_head.weight', 'shared.weight'] takes it from m0" in hint
    half = "merge_method: passthrough\nmodules: {encoder: {models: [{model: m0}]}}\n"
    assert "decoder.block.0.q.weight (and 6 more) of m0" in plan_refused(ParameterError, tmp_path, half)


def test_a_default_module_takes_what_no_other_does(translators: list[Model], tmp_path: Path) -> None:
    found = run(tmp_path, ENCODER_AND_DECODER + "  default: {models: [{model: m0}]}\n")
    one, two = translators
    expected = {n: two[n] for n in two if n.startswith("decoder.")}
    for out, (model, layer) in enumerate([(one, 0), (one, 1), (two, 1), (two, 2)]):
        expected[f"encoder.block.{out}.q.weight"] = model[f"encoder.block.{layer}.q.weight"]
    expected["encoder.final.weight"] = two["encoder.final.weight"]  # the last slice's
    expected |= {n: one[n] for n in ("shared.weight", "lm_head.weight")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"num_layers": 4, "num_decoder_layers": 4}


def test_keep_takes_what_is_in_no_module_from_the_donor(translators: list[Model], tmp_path: Path) -> None:
    text = """
        merge_method: task_arithmetic
        base_model: m0
        modules: {encoder: {models: [{model: m1, parameters: {weight: 0.5}}]}}
        keep: [shared.weight, lm_head.*, decoder.*]
        """
    one, two = translators
    found = run(tmp_path, text)
    assert found.keys() == one.keys()
    for name, x in found.items():
        expected = (one[name].double() + two[name].double()) / 2 if name.startswith("encoder.") else one[name].double()
        torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_tensor_in_no_module_of_a_later_model_is_refused_or_left_out(
    translators: list[Model], tmp_path: Path
) -> None:
    save(translators[1] | {"visual.weight": torch.ones(2)}, tmp_path / "m2")
    text = """
        merge_method: linear
        parameters: {weight: 1}
        modules:
          encoder: {models: [{model: m0}, {model: m2}]}
          decoder: {models: [{model: m0}, {model: m2}]}
          shared: {models: [{model: m0}, {model: m2}]}
          lm_head: {models: [{model: m0}]}
        """
    message = plan_refused(ParameterError, tmp_path, text)
    assert "visual.weight of m2 is in no module" in message
    assert "keep: ['visual.weight'] leaves it out" in message
    assert run(tmp_path, dedent(text) + "keep: visual.weight\n").keys() == translators[0].keys()


@pytest.mark.usefixtures("translators")
def test_a_module_that_fits_no_tensor_is_refused(tmp_path: Path) -> None:
    text = """
        merge_method: passthrough
        modules: {text_encoder: {models: [{model: m0}]}, default: {models: [{model: m0}]}}
        """
    assert "no tensor is in module text_encoder." in plan_refused(ParameterError, tmp_path, text)


def test_layers_of_a_module_are_counted_within_it(tmp_path: Path) -> None:
    save(translator(3, 4, 1), tmp_path / "m0")
    text = """
        merge_method: passthrough
        modules:
          encoder: {slices: [{sources: [{model: m0, layer_range: [0, 4]}]}]}
          default: {models: [{model: m0}]}
        """
    assert "layer_range [0, 4) of m0: it has 3 layers" in plan_refused(ParameterError, tmp_path, text)


def test_following_a_hint_leaves_out_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    """A pattern is taken as it is printed."""
    model = {"a.weight": torch.ones(2, 2), "b[0].weight": torch.ones(2), "b0.weight": torch.ones(2)}
    save({n: x for n, x in model.items() if "[" not in n}, tmp_path / "m0")
    save({n: 3 * x for n, x in model.items()}, tmp_path / "m1")
    for order, expected in ((("m0", "m1"), {"a.weight", "b0.weight"}), (("m1", "m0"), set(model))):
        text = f"method: linear\nmodels: [{', '.join(order)}]\n"
        hint = plan_refused(TensorError, tmp_path, text).splitlines()[1]
        (keep,) = re.findall(r"keep: \[.*\]", hint)
        found = run(tmp_path, f"{text}{keep}\n")
        assert set(found) == expected
        assert float(found["b0.weight"][0]) == 2.0


def test_della_names_the_epsilon_of_mergekit_s_recipe(tmp_path: Path) -> None:
    for number in range(2):
        save({"a.weight": torch.full((2, 2), float(number))}, tmp_path / f"m{number}")
    text = """
        merge_method: della
        base_model: m0
        models: [{model: m1, parameters: {weight: 1, density: 0.1}}]
        """
    assert "mergekit's language epsilon is epsilon/2, here 0.15)" in plan_refused(ParameterError, tmp_path, text)


# slices


def slices(*inputs: str, more: str = "", method: str = "linear") -> str:
    return f"method: {method}\nslices:\n  - models: [{', '.join(inputs)}]\n{more}"


@pytest.fixture
def stacks(tmp_path: Path) -> list[Model]:
    models = [layered(3, seed) for seed in (1, 2)]
    for number, model in enumerate(models):
        save(model, tmp_path / f"m{number}")
    return models


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ("model.layers.1.attn.bias", "model.layers.*.attn.bias"),
        ("model.visual.weight", "model.visual.weight"),
        ("model.embed_positions.weight", "model.embed_positions.weight"),
        ("other.0.weight", "other.*.weight"),
    ],
)
def test_a_tensor_that_the_lead_of_a_slice_lacks_is_refused_or_left_out(
    extra: str, pattern: str, stacks: list[Model], tmp_path: Path
) -> None:
    save(stacks[1] | {extra: torch.ones(2)}, tmp_path / "m2")
    text = slices("{model: m0, layers: [0, 3]}", "{model: m2, layers: [0, 3]}")
    message = plan_refused(ExtraTensorError, tmp_path, text)
    assert f"{extra} is in m2 and not in m0" in message
    assert f"leave it out with keep: ['{pattern}']" in message
    found = run(tmp_path, f"{text}keep: ['{pattern}']\n")
    assert found.keys() == stacks[0].keys()
    for name, x in found.items():
        torch.testing.assert_close(x, (stacks[0][name] + stacks[1][name]) / 2)


def test_layers_outside_of_the_ranges_may_differ(stacks: list[Model], tmp_path: Path) -> None:
    save(stacks[1] | {"model.layers.0.attn.bias": torch.ones(2)}, tmp_path / "m2")
    found = run(tmp_path, slices("{model: m0, layers: [0, 2]}", "{model: m2, layers: [1, 3]}"))
    expected = (stacks[0]["model.layers.0.mlp.weight"] + stacks[1]["model.layers.1.mlp.weight"]) / 2
    torch.testing.assert_close(found["model.layers.0.mlp.weight"], expected)
    shifted = slices("{model: m0, layers: [0, 2]}", "{model: m2, layers: [0, 2]}")
    assert "model.layers.0.attn.bias is in m2" in plan_refused(ExtraTensorError, tmp_path, shifted)


def test_the_ends_that_count_are_those_of_the_first_and_the_last_slice(stacks: list[Model], tmp_path: Path) -> None:
    save(stacks[0] | {"model.late.weight": torch.ones(2)}, tmp_path / "late")
    save(stacks[0] | {"model.embed_types.weight": torch.ones(2)}, tmp_path / "early")
    cases: list[tuple[str, str, str]] = [
        ("late", "m1", "model.late.weight is in late and not in m1"),
        ("m1", "late", ""),
        ("early", "m1", ""),
        ("m1", "early", "model.embed_types.weight is in early and not in m1"),
    ]
    for one, two, message in cases:
        more = f"  - models: [{{model: {two}, layers: [1, 3]}}]\n"
        text = slices(f"{{model: {one}, layers: [0, 1]}}", more=more, method="passthrough")
        if message:
            assert message in plan_refused(ExtraTensorError, tmp_path, text)
        else:
            assert len(run(tmp_path, text)) == len(stacks[0]) + 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_head_that_one_model_of_a_slice_stores_apart_is_merged(order: tuple[int, int], tmp_path: Path) -> None:
    one, two = layered(2, 1), layered(2, 2)
    tied: dict[str, Any] = {"tie_word_embeddings": True, "num_hidden_layers": 2}
    save({n: x for n, x in one.items() if n != "lm_head.weight"}, tmp_path / "m0", tied)
    save(two, tmp_path / "m1", tied | {"tie_word_embeddings": False})
    first, second = (f"{{model: m{i}, layers: [0, 2]}}" for i in order)
    found = run(tmp_path, slices(first, second))
    expected = (one["model.embed_tokens.weight"] + two["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("shape", ["models", "slices"])
def test_a_base_with_its_adapter_may_lead(shape: str, tmp_path: Path) -> None:
    names = ("a", "b")
    models = [layered(2, seed) for seed in range(2)]
    for name, model in zip(names, models, strict=True):
        save(model, tmp_path / name)
    update = pair("model.layers.1.mlp", 4, 3)
    written(tmp_path / "lora", update, target_modules=["mlp"])
    listed = {
        "models": "models: [{model: a+lora, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.3}}]",
        "slices": "slices: [{sources: [{model: a+lora, layer_range: [0, 2], parameters: {weight: 0.7}}, "
        "{model: b, layer_range: [0, 2], parameters: {weight: 0.3}}]}]",
    }
    found = run(tmp_path, f"merge_method: linear\n{listed[shape]}\n")
    adapted = {name: x.double() for name, x in models[0].items()}
    up, down = update["model.layers.1.mlp.lora_B.weight"], update["model.layers.1.mlp.lora_A.weight"]
    adapted["model.layers.1.mlp.weight"] += (up @ down).double()
    for name, x in found.items():
        torch.testing.assert_close(x.double(), 0.7 * adapted[name] + 0.3 * models[1][name], rtol=1e-6, atol=1e-5)


def test_lines_counts_the_layers_of_the_output_and_not_those_of_a_slice(tmp_path: Path) -> None:
    base, one = layered(4, 1), layered(4, 2)
    for name, model in (("base", base), ("one", one)):
        save(model, tmp_path / name)
    found = run(
        tmp_path,
        """
        method: task_arithmetic
        base: base
        slices:
          - models: [{model: one, layers: [0, 2]}]
          - models: [{model: one, layers: [2, 4]}]
        post: [{lines: {alpha: 0.0, beta: 3.0}}]
        """,
    )
    for i in range(4):
        name = f"model.layers.{i}.mlp.weight"
        torch.testing.assert_close(found[name], base[name] + i * (one[name] - base[name]))

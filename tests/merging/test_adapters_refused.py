"""Adapters that cannot be merged: refused by name, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapter_helpers import LINEAR, merge, pair, two, written
from merganser.errors import AdapterError, MerganserError, NonFiniteError, ParameterError, RefError, ShapeError
from merganser.merging.native import read_recipes
from merganser.merging.run import plan_any, plan_recipes, run
from recipe_support import refused


def error_of(folder: Path, text: str, kind: type[MerganserError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        merge(folder, text)
    assert not (folder / "out").exists()
    return str(caught.value).replace(f"{folder}/", "")


def test_different_bases_are_refused_unless_the_recipe_says_which(tmp_path: Path) -> None:
    two(tmp_path, base_model_name_or_path="org/other")
    assert error_of(tmp_path, LINEAR) == (
        "the adapters were trained on different bases: a0 on org/base; a1 on org/other\n"
        "hint: if these are one model, say which: base: PATH"
    )
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        save_file({"q.weight": torch.zeros(6, 5)}, tmp_path / name / "model.safetensors")
    text = "method: linear\nbase: base\nmodels: [a0, other+a1]\nadapter: {rank: 2}\n"
    assert error_of(tmp_path, text) == (
        "the adapters are on different bases: the recipe says base; other+a1 says other\n"
        "hint: an adapter fits only the base that it was trained on"
    )
    merge(tmp_path, f"base: base\n{LINEAR}")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )


def test_dora_is_refused_with_what_to_do(tmp_path: Path) -> None:
    two(tmp_path, use_dora=True)
    assert error_of(tmp_path, LINEAR) == (
        "a1 is a DoRA, which rescales the base's weights by their norms\n"
        "hint: merge whole models: leave adapter out, and write BASE+ADAPTER for each"
    )


def test_target_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    two(tmp_path)
    written(tmp_path / "a1", pair("k", 6, 5), target_modules=["k"])
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.zeros(6, 5)}, tmp_path / "base" / "model.safetensors")
    assert error_of(tmp_path, f"base: base\n{LINEAR}").startswith("a1: module k of the adapter is not in base\nhint: ")


def test_rank_above_that_of_all_adapters_is_refused(tmp_path: Path) -> None:
    two(tmp_path)
    assert error_of(tmp_path, LINEAR.replace("rank: 2", "rank: 5"), ParameterError) == (
        "adapter.rank is 5, and no weight's merged change has a rank above 4\nhint: rank: keep cuts nothing off"
    )


def test_model_among_adapters_is_refused(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.zeros(6, 5)}, tmp_path / "base" / "model.safetensors")
    text = "method: linear\nmodels: [a0, base]\nadapter: {rank: 2}\n"
    assert error_of(tmp_path, text, RefError) == (
        "base is no adapter: it holds no adapter_config.json\n"
        "hint: a recipe with adapter merges adapters alone; to merge whole models, leave adapter out"
    )
    missing = "method: linear\nmodels: [a0, a3]\nadapter: {rank: 2}\n"
    assert "a3 does not exist" in error_of(tmp_path, missing, RefError)
    file = "method: linear\nmodels: [a0, base/model.safetensors]\nadapter: {rank: 2}\n"
    assert "base/model.safetensors is a file\nhint: an adapter is a folder" in error_of(tmp_path, file, RefError)


def test_shapes_tasks_names_and_kinds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    two(tmp_path, task_type="CAUSAL_LM")
    written(tmp_path / "a0", pair("q", 6, 5), target_modules=["q"], task_type="SEQ_CLS")
    assert error_of(tmp_path, LINEAR).startswith("the adapters are for different tasks: a0: SEQ_CLS; a1: CAUSAL_LM")
    written(tmp_path / "a0", pair("q", 7, 5), target_modules=["q"])
    assert error_of(tmp_path, LINEAR, ShapeError) == "the change of q.weight is (7, 5) in a0, and (6, 5) in a1"
    written(tmp_path / "a0", {**pair("k", 6, 5), "q.weight": torch.ones(6, 5)}, target_modules=["k"])
    assert error_of(tmp_path, LINEAR).startswith("a0 and a1 change q.weight in different ways: as a whole, by a LoRA")
    written(tmp_path / "a0", {**pair("q", 6, 5), "q.weight": torch.ones(6, 5)}, target_modules=["q"])
    assert error_of(tmp_path, LINEAR) == (
        "a0 holds q.weight as a whole beside a LoRA of it\nhint: say base: PATH, to see whether it is the same"
    )
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.zeros(6, 5)}, tmp_path / "base" / "model.safetensors")
    assert error_of(tmp_path, f"base: base\n{LINEAR}").startswith("a0 trains q.weight as a whole and by a LoRA as well")
    written(tmp_path / "a0", pair("inner.q", 6, 5), target_modules=["q"])
    assert error_of(tmp_path, f"base: base\n{LINEAR}").startswith("q.weight is called inner.q in a0, and q in a1")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    two(tmp_path)
    bad = pair("q", 6, 5)
    bad["q.lora_B.weight"][2, 1] = float("nan")
    written(tmp_path / "a1", bad, target_modules=["q"])
    assert error_of(tmp_path, LINEAR, NonFiniteError) == (
        "base_model.model.q.lora_B.weight of a1 holds NaN or infinity\nhint: leave the adapter out"
    )


def test_another_recipe_s_output_is_no_adapter(tmp_path: Path) -> None:
    two(tmp_path)
    text = f"name: first\n{LINEAR}---\n{LINEAR.replace('a1', 'first')}"
    assert error_of(tmp_path, text, ParameterError).startswith("first is a recipe of this file, and adapters are")
    text = f"name: first\n{LINEAR}---\nmethod: linear\nmodels: [first, a1]\n"
    assert error_of(tmp_path, text, ParameterError).startswith("first merges adapters with each other, which only")
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    with pytest.raises(ParameterError, match="the recipe merges adapters with each other"):
        plan_recipes(read_recipes(tmp_path / "recipe.yaml")[0])


WORDS = [
    (
        "adapter: 16",
        "line 3: adapter: must be a mapping with the rank of the output: {rank: 16}, or {rank: keep}, and is a number",
    ),
    ("adapter: {}", "line 3: adapter: rank is missing: a whole number, or keep for no truncation"),
    ("adapter: {rank: 0}", "line 3: adapter.rank: must be a whole number from 1 on, and is a number 0"),
    ("adapter: {rank: 2.5}", "line 3: adapter.rank: must be a whole number from 1 on, and is a number 2.5"),
    (
        "adapter: {rank: full}",
        "line 3: adapter.rank: must be a whole number from 1 on, or keep for no truncation, and is 'full'",
    ),
    ("adapter: {rang: 2}", "recipe.yaml has 2 problems\n  line 3: adapter.rang: unknown; did you mean rank?"),
    ("adapter: {rank: 2}\nvocabulary: union", "line 4: vocabulary: belongs to whole models; adapters share that"),
    ("adapter: {rank: 2}\nchat_template: auto", "line 4: chat_template: belongs to whole models; adapters share"),
]


@pytest.mark.parametrize(("line", "message"), WORDS)
def test_words_of_the_recipe_are_checked(line: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, f"method: linear\nmodels: [a0, a1]\n{line}\n")


def test_method_that_no_adapter_can_have_is_refused(tmp_path: Path) -> None:
    text = "models: [a0, a1]\nadapter: {rank: 2}\nmethod: "
    assert refused(tmp_path, text + "regmean").endswith(
        "line 3: method: regmean needs statistics of whole models, and adapters have none"
    )
    sliced = "method: passthrough\nslices:\n- models: [{model: a0, layers: [0, 1]}]\nadapter: {rank: 2}\n"
    assert "slices: belong to whole models; list the adapters under models" in refused(tmp_path, sliced)
    assert "models: slerp merges 2 models, and here it is 1" in refused(
        tmp_path, "method: slerp\nmodels: [a0]\nsettings: {t: 1}\nadapter: {rank: 2}\n"
    )
    assert "models: the same adapter twice; slerp needs two" in refused(
        tmp_path, "method: slerp\nmodels: [a0, a0]\nsettings: {t: 1}\nadapter: {rank: 2}\n"
    )


# whole or not there


def test_output_inside_an_input_is_refused(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    planned = plan_any(read_recipes(tmp_path / "recipe.yaml")[0])
    with pytest.raises(MerganserError, match="lies within what is read"):
        run(planned, tmp_path / "a0" / "out")
    assert not (tmp_path / "a0" / "out").exists()


def test_following_a_hint_leaves_out_a_whole_tensor_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    two(tmp_path)
    written(tmp_path / "a0", {**pair("q", 6, 5), "h[0].weight": torch.ones(6)}, target_modules=["q"])
    message = error_of(tmp_path, LINEAR)
    assert message.startswith("h[0].weight is held as a whole by some adapters, and not by a1")
    assert "keep: ['h[[]0].weight'] leaves it out" in message
    merge(tmp_path, f"{LINEAR}keep: ['h[[]0].weight']\n")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()

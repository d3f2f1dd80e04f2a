"""What the doctor finds in files: NaN, configurations, and recipes that feed on others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from doctor_helpers import BASE, SHAPES, A, examined, healthy, kinds, noise, only, planned, plus, short
from merganser.errors import RefError
from merganser.merging.conflicts import measure
from merganser.merging.doctor import examine, gravest, mean_interference
from merganser.merging.merged import Merged
from merganser.merging.recipe import Input, Recipe, Slice, Vocabulary
from merganser.merging.run import plan_recipes
from support import save
from vocabulary_helpers import family_at

# NaN


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["base", "b"])
def test_nan_and_infinity_are_fatal_and_named(tmp_path: Path, value: float, where: str) -> None:
    models = healthy()
    models[where] = {name: x.clone() for name, x in models[where].items()}
    models[where]["model.layers.1.mlp.weight"][2, 3] = value
    models[where]["model.layers.2.mlp.weight"][:2, 3] = value
    one = examined(tmp_path, models)
    finding = only(one, "nonfinite")
    assert short(finding) == (where,)
    assert finding.fatal
    assert finding.figures == {"entries": 3, "tensors": 2}
    assert finding.message.endswith(
        f"{where} holds 3 values that are NaN or infinite, in 2 tensors; the first is model.layers.1.mlp.weight"
    )
    assert gravest([one]) == 2
    assert all(math.isfinite(m.norm) for m in one.conflicts.models.values())


# configs

CONFIG = {"model_type": "llama", "hidden_size": 32, "rope_theta": 1e4, "vocab_size": 40, "torch_dtype": "float32"}


def test_configs_that_give_weights_another_meaning_are_told_key_by_key(tmp_path: Path) -> None:
    configs: dict[str, dict[str, object]] = {name: {**CONFIG} for name in ("base", "a", "b", "c")}
    configs["b"] |= {"rope_theta": 1e6, "torch_dtype": "bfloat16"}
    configs["c"]["text_config"] = {"num_attention_heads": 4, "rope_scaling": {"factor": 8.0}}
    configs["a"]["text_config"] = {"num_attention_heads": 8}
    one = examined(tmp_path, healthy(), configs=configs)
    assert kinds(one) == ["config", "config"]
    rope, heads = one.findings
    assert rope.message == (
        "rope_theta differs between the models' configs: "
        f"10000.0 in {tmp_path / 'base'}, {tmp_path / 'a'}, {tmp_path / 'c'}; 1000000.0 in {tmp_path / 'b'}"
    )
    assert rope.advice.startswith(f"the output gets that of {tmp_path / 'base'}; ")
    assert heads.message.startswith("text_config.num_attention_heads differs")
    assert short(heads) == ("a", "c")
    assert gravest([one]) == 1


def test_configs_that_differ_in_what_weights_do_not_mean_or_are_not_there_are_no_matter(tmp_path: Path) -> None:
    configs = {"base": CONFIG, "a": CONFIG | {"torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": False}}
    merged = planned(tmp_path, healthy(), configs=configs)
    (tmp_path / "b" / "config.json").write_text("not json")
    (one,) = examine(merged)
    assert one.findings == ()


def test_vocabularies_may_differ_where_the_recipe_maps_them(tmp_path: Path) -> None:
    merged = planned(tmp_path, healthy(), configs={"base": CONFIG, "a": CONFIG | {"vocab_size": 41}})
    assert kinds(examine(merged)[0]) == ["config"]
    merged.plan = replace(merged.plan, recipe=replace(merged.plan.recipe, vocabulary=Vocabulary("base")))
    assert kinds(examine(merged)[0]) == []


# recipes that use each other


def test_a_merge_that_feeds_another_is_examined_before_it(tmp_path: Path) -> None:
    models = healthy() | {"d": plus(BASE, noise(4, 0.1), 20.0)}
    for name, model in models.items():
        save(model, tmp_path / name)
    at = {name: Input(str(tmp_path / name)) for name in models}
    inner = Recipe("task_arithmetic", (Slice((at["a"], at["d"])),), base=at["base"], name="inner")
    outer = Recipe("task_arithmetic", (Slice((Input("inner"), at["b"])),), base=at["base"])
    first, last = examine(plan_recipes([inner, outer]))
    assert [first.name, kinds(first)] == ["inner", ["norms"]]
    assert kinds(last) == ["norms"]
    whole = sum((plus(A, noise(4, 0.1), 20.0)[n].double().square().sum() for n in SHAPES), torch.tensor(0.0))
    assert last.conflicts.models["inner"].norm == pytest.approx(float(whole.sqrt()), rel=1e-5)


def test_a_merge_that_feeds_another_is_read_whole_and_its_measures_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, model in healthy().items():
        save(model, tmp_path / name)
    at = {name: Input(str(tmp_path / name)) for name in ("base", "a", "b", "c")}
    inner = Recipe("ties", (Slice((at["a"], at["c"])),), base=at["base"], name="inner")
    outer = Recipe("task_arithmetic", (Slice((Input("inner"), at["b"])),), base=at["base"])
    merged = plan_recipes([inner, outer])
    seen: list[tuple[str, tuple[int, int] | None]] = []
    inside: list[str] = []
    read = Merged.read

    def recorded(self: Merged, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        if not inside:
            seen.append((name, rows))
        inside.append(name)
        try:
            return read(self, name, rows)
        finally:
            inside.pop()

    monkeypatch.setattr(Merged, "read", recorded)
    examine(merged, threads=1)
    assert {rows for _, rows in seen} == {None}
    assert {name for name, _ in seen} == set(SHAPES)
    stage = merged.plan.sources["inner"]
    assert isinstance(stage, Merged)
    assert stage._measured == {}


def test_what_feeds_on_a_merge_that_is_refused_is_not_examined(tmp_path: Path) -> None:
    models = healthy()
    models["a"] = {name: x * math.nan for name, x in BASE.items()}
    for name, model in models.items():
        save(model, tmp_path / name)
    at = {name: Input(str(tmp_path / name)) for name in models}
    inner = Recipe("task_arithmetic", (Slice((at["a"], at["c"])),), base=at["base"], name="inner")
    outer = Recipe("task_arithmetic", (Slice((Input("inner"), at["b"])),), base=at["base"])
    found = examine(plan_recipes([inner, outer]))
    assert [(one.name, kinds(one)) for one in found] == [("inner", ["nonfinite"])]


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    save(BASE, tmp_path / "base")
    recipe = Recipe("task_arithmetic", (Slice((Input(str(tmp_path / "bse")),)),), base=Input(str(tmp_path / "base")))
    with pytest.raises(RefError, match="bse does not exist"):
        plan_recipes([recipe])


def test_means_are_over_layers(tmp_path: Path) -> None:
    found = measure(planned(tmp_path, healthy())).layers
    means = mean_interference(found)
    assert means["left"] == pytest.approx(sum(layer.left for layer in found.values()) / 3)
    assert json.dumps(means)


def test_a_recipe_that_is_seen_through_another_vocabulary_is_examined_too(tmp_path: Path) -> None:
    base, more = (Input(str(folder)) for name, folder in family_at(tmp_path).items() if name in ("base", "more"))
    one = Recipe("task_arithmetic", (Slice((more,)),), base=base, vocabulary=Vocabulary("union"), name="one")
    two = replace(one, slices=(Slice((Input("one"),)),), vocabulary=Vocabulary("base"), name=None)
    assert [stage.name for stage in examine(plan_recipes([one, two]))] == ["one", "the merge"]

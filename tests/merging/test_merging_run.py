"""A merge is what its equation says, in any chunks and threads, whole or not there, and goes on after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merganser.errors import (
    DtypeError,
    ExtraTensorError,
    MissingTensorError,
    NonFiniteError,
    ParameterError,
    ShapeError,
)
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_any, plan_recipes, run
from merganser.merging.values import Choice, Gradient
from merging_helpers import layered, merged, recipe, refused
from support import arrays, change, load, make_base, save, save_family, tune


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    return save_family(tmp_path / "models", 3)


def test_linear_is_the_weighted_mean_of_a_float64_loop(family: list[Path], tmp_path: Path) -> None:
    weights = {"expert-01": 0.5, "expert-02": 0.25, "expert-03": 2.0}
    found = merged(tmp_path / "out", recipe("linear", family[1:], each={n: {"weight": w} for n, w in weights.items()}))
    models = [load(f) for f in family[1:]]
    for name, x in arrays(found).items():
        sizes = list(weights.values())
        expected = sum(w * arrays(m)[name] for w, m in zip(sizes, models, strict=True)) / sum(sizes)
        ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(found[name].dtype, 1e-6)
        np.testing.assert_allclose(x, expected, rtol=ulp, atol=1e-7, err_msg=name)
    assert torch.equal(found["position_ids"], models[0]["position_ids"])
    assert found.keys() == models[0].keys()


def test_output_keeps_the_types_of_the_models_and_the_files_beside_them(tmp_path: Path) -> None:
    base = make_base()
    config = {"model_type": "bert", "num_hidden_layers": 2, "torch_dtype": "float32"}
    folders = [save(tune(base, i), tmp_path / f"m{i}", config) for i in range(2)]
    found = merged(tmp_path / "out", recipe("linear", folders))
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in base.items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    found = merged(tmp_path / "half", recipe("linear", folders, dtype="BF16"))
    assert {x.dtype for x in found.values() if x.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "mean", "gram"])
def test_same_bits_in_any_chunks_and_threads_and_processes(method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    base = {"a.weight": torch.randn(300, 700, generator=generator), "b.bias": torch.randn(200_000, generator=generator)}
    folders = [save(m, tmp_path / f"m{i}") for i, m in enumerate([base, *(tune(base, s) for s in (1, 2))])]
    settings = {"density": 0.3} if method in ("ties", "dare_linear") else {}
    one = recipe(method, folders[1:], folders[0], settings=settings)
    whole = merged(tmp_path / "whole", one, chunk_elements=1 << 30)
    for number, (elements, threads) in enumerate([(1, 1), (1 << 17, 3), (1 << 16, 2)]):
        found = merged(tmp_path / f"out{number}", one, chunk_elements=elements, threads=threads)
        assert all(torch.equal(found[n].view(torch.int32), whole[n].view(torch.int32)) for n in whole), elements


def test_ties_is_that_of_a_float64_loop(family: list[Path], tmp_path: Path) -> None:
    found = merged(tmp_path / "out", recipe("ties", family[1:], family[0], settings={"density": 0.4, "scale": 0.7}))
    base, models = load(family[0]), [load(f) for f in family[1:]]
    for name in ("wide.weight", "embed_tokens.weight", "conv.weight", "norm.weight", "scale", "f64.weight"):
        deltas = [change(m, base)[name].reshape(-1) for m in models]
        kept = []
        for d in deltas:
            k = max(1, round(0.4 * d.size))
            order = sorted(range(d.size), key=lambda i, d=d: (-abs(np.float32(d[i])), i))[:k]
            kept.append(np.array([d[i] if i in order else 0.0 for i in range(d.size)]))
        merged_change = np.zeros_like(deltas[0])
        for i in range(deltas[0].size):
            vote = sum(d[i] for d in kept)
            agreeing = [d[i] for d in kept if d[i] * vote > 0]
            merged_change[i] = 0.7 * sum(agreeing) / len(agreeing) if agreeing else 0.0
        expected = arrays(base)[name] + merged_change.reshape(base[name].shape)
        np.testing.assert_allclose(arrays(found)[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_statistics_are_averaged_and_counters_are_the_base_s_whatever_the_method(
    family: list[Path], tmp_path: Path
) -> None:
    found = merged(tmp_path / "out", recipe("task_arithmetic", family[1:], family[0], settings={"scale": 5.0}))
    models = [load(f) for f in family[1:]]
    for name in ("bn.running_mean", "bn.running_var"):
        expected = np.mean([arrays(m)[name] for m in models], axis=0)
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=1e-6)
    assert torch.equal(found["bn.num_batches_tracked"], load(family[0])["bn.num_batches_tracked"])


@pytest.mark.parametrize("method", ["mean", "gram", "iso_c", "tsv_m", "opcm"])
def test_continual_method_in_a_recipe_is_its_fold(method: str, tmp_path: Path) -> None:
    from merganser.continual import Fold

    family = save_family(tmp_path / "models", 3, names=("large.weight", "norm.weight", "conv.weight"))
    fold = Fold.init(family[0], tmp_path / "state", method, threads=1)
    fold.add_all(family[1:], threads=1)
    expected = load(fold.export(tmp_path / "folded"))
    found = merged(tmp_path / "out", recipe(method, family[1:], family[0]))
    for name in expected:
        np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-6)


def test_gradient_runs_over_the_layers_and_is_at_its_start_outside_them(tmp_path: Path) -> None:
    models = [layered(5, seed) for seed in (1, 2)]
    folders = [save(m, tmp_path / f"m{i}") for i, m in enumerate(models)]
    weight = Choice((("mlp", Gradient((0.0, 1.0))), ("*", Gradient((0.0, 1.0, 0.5)))))
    one = recipe(
        "linear", folders, each={"m0": {"weight": 1.0}, "m1": {"weight": weight}}, settings={"normalize": False}
    )
    found = merged(tmp_path / "out", one)
    for name, x in found.items():
        if ".layers." in name:
            t = int(name.split(".")[2]) / 4
            share = t if "mlp" in name else (2 * t if t <= 0.5 else 1.5 - t)
        else:
            share = 0.0
        expected = models[0][name].double() + share * models[1][name].double()
        np.testing.assert_allclose(x.double().numpy(), expected.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_slices_stack_layers_and_the_last_one_gives_the_head(tmp_path: Path) -> None:
    models = [layered(4, seed) for seed in (1, 2)]
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "max_window_layers": 4}
    folders = [save(m, tmp_path / f"m{i}", config) for i, m in enumerate(models)]

    def part(i: int, lo: int, hi: int) -> Slice:
        return Slice((Input(str(folders[i]), (lo, hi)),))

    one = Recipe("passthrough", (part(0, 0, 3), part(1, 1, 4), part(0, 4, 4)), text="")
    found = merged(tmp_path / "out", one)
    sources = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    for out, (model, layer) in enumerate(sources):
        for rest in ("attn", "mlp"):
            expected = models[model][f"model.layers.{layer}.{rest}.weight"]
            assert torch.equal(found[f"model.layers.{out}.{rest}.weight"], expected)
    assert len(found) == 15
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], models[0][name])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 6
    assert written["layer_types"] == ["a", "b", "c", "b", "c", "d"]


def test_merge_of_a_merge_needs_no_disk_between(family: list[Path], tmp_path: Path) -> None:
    first = recipe("linear", family[1:3], name="half", dtype="F32")
    second = recipe("ties", [Path("half"), family[3]], family[0], settings={"density": 0.5})
    found = merged(tmp_path / "out", first, second, chunk_elements=1)
    merged(tmp_path / "half", first)
    apart = recipe("ties", [tmp_path / "half", family[3]], family[0], settings={"density": 0.5})
    expected = merged(tmp_path / "apart", apart)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in expected.items()}
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    receipt = json.loads((tmp_path / "out" / "merganser.json").read_text())
    assert set(receipt["inputs"]) == {str(f) for f in family}


def tied(model: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """A folder whose lm_head is tied to the embeddings."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    kept = {n: x for n, x in model.items() if n != "lm_head.weight"}
    metadata = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    save_file(kept, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    return folder


def test_tied_embeddings_stay_tied_and_one_untied_model_unties_them(tmp_path: Path) -> None:
    one, two = layered(1, 1), layered(1, 2)
    folders = [tied(one, tmp_path / "one"), tied(two, tmp_path / "two")]
    found = merged(tmp_path / "both", recipe("linear", folders))
    assert "lm_head.weight" not in found
    assert json.loads((tmp_path / "both" / "config.json").read_text())["tie_word_embeddings"] is True
    free = save(two, tmp_path / "free")
    found = merged(tmp_path / "mixed", recipe("linear", [folders[0], free]))
    expected = (one["model.embed_tokens.weight"] + two["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], expected)
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["tie_word_embeddings"] is False


def test_noise_follows_the_model_and_not_its_place(family: list[Path], tmp_path: Path) -> None:
    settings = {"density": 0.5}
    first = merged(tmp_path / "a", recipe("dare_linear", [family[1], family[2]], family[0], settings=settings))
    second = merged(tmp_path / "b", recipe("dare_linear", [family[2], family[1]], family[0], settings=settings))
    other = merged(tmp_path / "c", recipe("dare_linear", family[1:3], family[0], settings=settings, seed=1))
    for name in ("large.weight", "norm.weight"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(first["large.weight"], other["large.weight"])


def test_models_that_do_not_fit_are_refused_by_name(family: list[Path], tmp_path: Path) -> None:
    base = load(family[0])
    fewer = save({n: x for n, x in base.items() if n != "wide.bias"}, tmp_path / "fewer")
    more = save(base | {"extra": torch.ones(2)}, tmp_path / "more")
    other = save(base | {"wide.bias": torch.ones(7)}, tmp_path / "other")
    whole = save(base | {"wide.bias": torch.ones(6, dtype=torch.int64)}, tmp_path / "whole")
    ids = save(base | {"position_ids": torch.ones(1, 8, dtype=torch.int64)}, tmp_path / "ids")
    out = tmp_path / "out"
    assert "wide.bias is in" in refused(MissingTensorError, out, recipe("linear", [family[1], fewer]))
    assert "extra is in" in refused(ExtraTensorError, out, recipe("linear", [family[1], more]))
    message = refused(ShapeError, out, recipe("linear", [family[1], family[2], other]))
    assert f"wide.bias has 2 shapes: (6,) in {family[1]}, {family[2]}; (7,) in {other}" in message
    assert "wide.bias is F32, I64" in refused(DtypeError, out, recipe("linear", [family[1], whole]))
    assert "position_ids holds integers that differ" in refused(DtypeError, out, recipe("linear", [family[1], ids]))
    found = merged(out, recipe("linear", [family[1], more], keep=("extra",)))
    assert "extra" not in found


def test_nan_is_named_and_overflow_too(family: list[Path], tmp_path: Path) -> None:
    model = load(family[1])
    model["large.weight"][3, 4] = float("nan")
    bad = save(model, tmp_path / "bad")
    message = refused(NonFiniteError, tmp_path / "out", recipe("linear", [family[2], bad]))
    assert f"large.weight of {bad} holds NaN" in message
    huge = recipe("task_arithmetic", family[1:], family[0], settings={"scale": 1e30}, dtype="F16")
    assert "overflows F16" in refused(NonFiniteError, tmp_path / "out", huge)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"settings": {"density": 1.5}}, "density is 1.5"),
        ("dare_ties", {"settings": {"density": Gradient((0.5, 0.0))}}, "density is 0"),
        ("linear", {"each": {"expert-01": {"weight": -1.0}}}, "add up to 0"),
        ("task_arithmetic", {"post": (("subspace_boosting", {"beta": 7}),)}, "beta is 7"),
        ("gram", {"settings": {"eps": -1.0}}, "eps is -1"),
        ("iso_cts", {"settings": {"common_space_fraction": 3}}, "is 3"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_the_plan(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    models = [save(layered(3, seed), tmp_path / f"expert-0{seed}") for seed in (0, 1, 2)]
    one = recipe(method, models[1:], None if method == "linear" else models[0], **options)
    with pytest.raises(ParameterError, match=message) as caught:
        plan_recipes([one])
    assert ".weight: " in caught.value.message


def test_memory_that_is_too_small_is_refused_before_any_work(family: list[Path], tmp_path: Path) -> None:
    one = recipe("iso_cts", family[1:], family[0])
    with pytest.raises(ParameterError, match=r"alone takes about [\d,]+ bytes with iso_cts, and 1,000 are allowed"):
        merged(tmp_path / "out", one, memory_bytes=1000)
    assert not (tmp_path / "out").exists()
    assert merged(tmp_path / "out", one, threads=8, memory_bytes=4_000_000).keys() == load(family[0]).keys()


@pytest.mark.parametrize(
    "method", ["linear", "sce", "arcee_fusion", "gram", "star", "iso_c", "opcm", "ties", "karcher"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_of_any_model_is_refused_by_every_kind_of_method(method: str, value: float, tmp_path: Path) -> None:
    family = save_family(tmp_path / "models", 2, names=("wide.weight", "norm.weight"))
    model = load(family[1])
    model["wide.weight"][2, 3] = value
    bad = save(model, tmp_path / "bad")
    others = [] if method == "arcee_fusion" else [family[2]]
    base = None if method in ("linear", "karcher") else family[0]
    message = refused(NonFiniteError, tmp_path / "out", recipe(method, [bad, *others], base))
    assert f"wide.weight of {bad} holds NaN or infinity" in message


def test_a_stage_is_computed_once_for_the_chunks_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.methods.joint import MERGES

    generator = torch.Generator().manual_seed(0)
    folders = [save({"a.weight": torch.randn(300, 700, generator=generator)}, tmp_path / f"m{i}") for i in range(3)]
    calls = []
    row = MERGES["star"]

    def counted(d: Any, **options: Any) -> torch.Tensor:
        calls.extend([1] if d[0].numel() else [])  # the plan tries settings on empty tensors
        return row.function(d, **options)

    counted.__wrapped__ = row.function  # type: ignore[attr-defined]
    monkeypatch.setitem(MERGES, "star", replace(row, function=counted))
    one = recipe("star", folders[1:], folders[0], name="s")
    two = recipe("ties", [Path("s"), folders[1]], folders[0], settings={"density": 0.4})
    merged(tmp_path / "out", one, two, chunk_elements=1)
    assert len(calls) == 1


def test_noise_is_the_recipe_s_wherever_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.merging.run import merge

    (tmp_path / "d").mkdir()
    save_family(tmp_path / "d" / "m", 2, names=("wide.weight", "norm.weight"))
    text = "method: dare_linear\nbase: m/base\nmodels: [m/expert-01, m/expert-02]\n"
    (tmp_path / "d" / "r.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    one = load(merge("d/r.yaml", "one"))
    monkeypatch.chdir(tmp_path / "d")
    two = load(merge("r.yaml", "../two"))
    three = load(merge(tmp_path / "d" / "r.yaml", "../three"))
    assert all(torch.equal(one[n], two[n]) and torch.equal(one[n], three[n]) for n in one)


def test_receipt_has_no_digests_of_inputs_where_none_are_asked_for_and_the_weights_are_the_same(
    family: list[Path], tmp_path: Path
) -> None:
    recipes = [recipe("ties", family[1:], family[0])]
    run(plan_any(recipes), tmp_path / "with")
    run(plan_any(recipes, digests=False), tmp_path / "without")
    assert (tmp_path / "with/model.safetensors").read_bytes() == (tmp_path / "without/model.safetensors").read_bytes()
    receipts = [json.loads((tmp_path / out / "merganser.json").read_text()) for out in ("with", "without")]
    assert receipts[0]["outputs"] == receipts[1]["outputs"]
    tensors = [[source["tensors"] for source in receipt["inputs"].values()] for receipt in receipts]
    assert all(tensors[0])
    assert tensors[1] == [{}] * len(family)

"""What the doctor measures against plain loops; every warning fires on a made case, and not on its healthy twin."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser.errors import ParameterError, RefError
from merganser.merging import conflicts as module
from merganser.merging.conflicts import half_unit, measure
from merganser.merging.doctor import Examination, Finding, examine, gravest, mean_interference
from merganser.merging.merged import Merged
from merganser.merging.recipe import Input, Recipe, Slice, Vocabulary
from merganser.merging.run import plan_recipes
from merganser.methods.joint import MERGES, Joint
from merganser.methods.joint._keep import magnitude
from merganser.methods.joint.linear import linear
from merganser.methods.joint.task_arithmetic import task_arithmetic
from merganser.methods.joint.ties import ties, ties_ranks
from support import save

Model = dict[str, Tensor]
SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    "model.layers.0.mlp.weight": (48, 32),
    "model.layers.0.norm.weight": (64,),
    "model.layers.1.mlp.weight": (32, 48),
    "model.layers.1.norm.weight": (64,),
    "model.layers.2.mlp.weight": (48, 48),
}


def noise(seed: int, size: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plus(model: Model, change: Model, factor: float = 1.0) -> Model:
    return {name: x + factor * change[name] if name in change else x for name, x in model.items()}


def planned(
    root: Path,
    models: Mapping[str, Model],
    *,
    method: str = "task_arithmetic",
    base: str | None = "base",
    settings: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: str | None = None,
    configs: Mapping[str, Mapping[str, object]] | None = None,
) -> Merged:
    """A merge of all models but the base, planned; folders that are there are used as they are."""
    folders = {name: root / name for name in models}
    for name, folder in folders.items():
        if not folder.exists():
            save(models[name], folder, (configs or {}).get(name))
    inputs = tuple(Input(str(f), settings=(own or {}).get(n, {})) for n, f in folders.items() if n != base)
    given = Input(str(folders[base])) if base is not None else None
    return plan_recipes([Recipe(method, (Slice(inputs),), base=given, settings=settings or {}, dtype=dtype)])


def examined(root: Path, models: Mapping[str, Model], **options: Any) -> Examination:
    (one,) = examine(planned(root, models, **options))
    return one


def kinds(one: Examination) -> list[str]:
    return [finding.kind for finding in one.findings]


def only(one: Examination, kind: str) -> Finding:
    assert kinds(one) == [kind]
    return one.findings[0]


def short(finding: Finding) -> tuple[str, ...]:
    return tuple(Path(label).name for label in finding.models)


BASE = noise(0)
A, B, C = (noise(seed, 0.1) for seed in (1, 2, 3))


def healthy() -> dict[str, Model]:
    return {"base": dict(BASE), "a": plus(BASE, A), "b": plus(BASE, B), "c": plus(BASE, C)}


def test_unrelated_changes_of_one_size_are_healthy(tmp_path: Path) -> None:
    one = examined(tmp_path, healthy())
    assert (one.findings, one.notes) == ((), ())
    assert gravest([one]) == 0


# what is measured


def test_figures_of_models_and_pairs_are_those_of_plain_loops(tmp_path: Path) -> None:
    models, weights = healthy(), {"a": 0.5, "b": -2.0, "c": 1.0}
    merged = planned(tmp_path, models, own={name: {"weight": w} for name, w in weights.items()})
    found = measure(merged)
    flat = {
        name: [
            float(v) for tensor in SHAPES for v in (models[name][tensor].double() - BASE[tensor].double()).reshape(-1)
        ]
        for name in weights
    }
    base = math.sqrt(math.fsum(float(v) ** 2 for x in BASE.values() for v in x.reshape(-1)))
    for name, w in weights.items():
        norm = math.sqrt(math.fsum(v * v for v in flat[name]))
        figures = found.models[str(tmp_path / name)]
        assert figures.norm == pytest.approx(norm, rel=1e-12)
        assert figures.weighted == pytest.approx(abs(w) * norm, rel=1e-12)
        assert figures.base == pytest.approx(base, rel=1e-12)
        assert figures.changed == sum(v != 0 for v in flat[name])
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        products = [weights[one] * p * weights[other] * q for p, q in zip(flat[one], flat[other], strict=True)]
        against = math.fsum(-v for v in products if v < 0) / math.fsum(abs(v) for v in products)
        inner = math.fsum(p * q for p, q in zip(flat[one], flat[other], strict=True))
        size = math.sqrt(math.fsum(v * v for v in flat[one]) * math.fsum(v * v for v in flat[other]))
        pair = found.pairs[str(tmp_path / one), str(tmp_path / other)]
        assert pair.opposing == pytest.approx(against, rel=1e-12)
        assert pair.cosine == pytest.approx(inner / size, rel=1e-9)
        assert not pair.equal


def test_subspaces_of_every_linear_weight_are_those_of_full_svds(tmp_path: Path) -> None:
    models = healthy()
    found = measure(planned(tmp_path, models))
    matrices = [name for name in SHAPES if name.endswith("mlp.weight")]
    assert list(found.layers) == matrices
    overlaps = {pair: [] for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
    for tensor in matrices:
        m, n = SHAPES[tensor]
        layer, share, few = found.layers[tensor], min(m, n) // 3, round(n / 16)
        d = {name: models[name][tensor].double().numpy() - BASE[tensor].double().numpy() for name in "abc"}
        factors = {name: np.linalg.svd(x) for name, x in d.items()}
        for pair, seen in overlaps.items():
            first, second = (factors[name][2][:few] for name in pair)
            overlap = float(np.linalg.norm(first @ second.T) ** 2) / few
            labels = (str(tmp_path / pair[0]), str(tmp_path / pair[1]))
            assert layer.overlap[labels] == pytest.approx(overlap, rel=1e-4)
            assert layer.chance[labels] == few / n
            seen.append(overlap)
        u = np.concatenate([x[0][:, :share] for x in factors.values()], axis=1)
        v = np.concatenate([x[2][:share].T for x in factors.values()], axis=1)
        left, right = (np.linalg.norm(x.T @ x - np.eye(3 * share)) for x in (u, v))
        assert (layer.left, layer.right) == pytest.approx((left, right), rel=1e-4)
        assert layer.left_share == pytest.approx(left**2 / (6 * share), rel=1e-4)
        assert layer.right_share == pytest.approx(right**2 / (6 * share), rel=1e-4)
        assert (layer.left_chance, layer.right_chance) == pytest.approx((share / m, share / n))
    for pair, seen in overlaps.items():
        labels = (str(tmp_path / pair[0]), str(tmp_path / pair[1]))
        assert found.pairs[labels].overlap == pytest.approx(np.mean(seen), rel=1e-4)


def test_weights_that_are_stored_in_by_out_are_measured_as_out_by_in(tmp_path: Path) -> None:
    names = ("h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias")
    plain = {names[0]: (48, 32), names[1]: (48,)}
    models = {name: noise(seed, 1.0, plain) for seed, name in enumerate(("base", "a", "b"))}
    turned = {name: {names[0]: x[names[0]].T.contiguous(), names[1]: x[names[1]]} for name, x in models.items()}
    one, other = (measure(planned(tmp_path / n, m)).layers[names[0]] for n, m in (("1", models), ("2", turned)))
    assert (other.left, other.right) == pytest.approx((one.left, one.right))
    assert list(other.overlap.values()) == pytest.approx(list(one.overlap.values()))
    assert one.left_chance == other.left_chance == 16 / 48


def test_a_kernel_is_measured_as_out_by_all_else(tmp_path: Path) -> None:
    models = {name: noise(seed, 1.0, {"conv.weight": (12, 2, 3, 3)}) for seed, name in enumerate(("base", "a", "b"))}
    flat = {name: {"conv.weight": x["conv.weight"].reshape(12, 18)} for name, x in models.items()}
    one, other = (measure(planned(tmp_path / n, m)).layers["conv.weight"] for n, m in (("1", models), ("2", flat)))
    assert (one.left, one.right) == (other.left, other.right)


def test_shares_are_one_for_equal_subspaces_and_zero_for_orthogonal_ones(tmp_path: Path) -> None:
    zero = torch.zeros(8, 8)
    one, same, other = zero.clone(), zero.clone(), zero.clone()
    one[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    same[:4, :4] = torch.diag(torch.tensor([1.0, 2.0, 4.0, 3.0]))
    other[4:, 4:] = one[:4, :4]
    name = "x.weight"
    alike = measure(planned(tmp_path / "1", {"base": {name: zero}, "a": {name: one}, "b": {name: same}})).layers[name]
    assert (alike.left_share, alike.right_share) == pytest.approx((1, 1))
    assert alike.left == pytest.approx(math.sqrt(2 * 4))
    apart = measure(planned(tmp_path / "2", {"base": {name: zero}, "a": {name: one}, "b": {name: other}})).layers[name]
    assert (apart.left, apart.right, apart.left_share) == pytest.approx((0, 0, 0), abs=1e-12)
    assert list(apart.overlap.values()) == pytest.approx([0])
    assert list(alike.chance.values()) == [1 / 8]


def test_figures_do_not_depend_on_chunks_or_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a.weight": (300, 500), "b.bias": (200_001,), "c": (), "d.weight": (0, 4)}
    base = noise(5, shapes=shapes)
    models = {"base": base, "a": plus(base, noise(6, 0.1, shapes)), "b": plus(base, noise(7, 0.1, shapes))}
    first = examine(planned(tmp_path, models), threads=1)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert examine(planned(tmp_path, models), threads=3) == first


def test_layers_can_be_sampled(tmp_path: Path) -> None:
    merged = planned(tmp_path, healthy())
    counts = {layers: measure(merged, layers=layers).tensors for layers in (1, 2, 3, 9)}
    assert counts == {1: 3, 2: 4, 3: 6, 9: 6}
    assert list(measure(merged, layers=2).layers) == ["model.layers.0.mlp.weight", "model.layers.2.mlp.weight"]
    (one,) = examine(merged, layers=1)
    assert one.notes == ("3 of 6 tensors were measured",)
    with pytest.raises(ParameterError, match="layers is 0; it is at least 1"):
        measure(merged, layers=0)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_half_a_unit_is_the_edge_of_what_rounding_keeps(dtype: str, torch_dtype: torch.dtype) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).abs().to(torch_dtype)
    x = torch.cat([x, torch.tensor([1e-6, 0.0], dtype=torch_dtype)]).double()
    half = half_unit(x, dtype)
    assert torch.equal((x + 0.99 * half).to(torch_dtype).double(), x)
    assert not bool(((x + 1.01 * half).to(torch_dtype).double() == x).any())


# norms


def test_changes_of_very_different_size_are_told_with_weights_that_even_them_out(tmp_path: Path) -> None:
    models = healthy() | {"b": plus(BASE, B, 10.0)}
    finding = only(examined(tmp_path, models), "norms")
    assert 9 < finding.figures["ratio"] < 11
    assert "10." in finding.message or "9." in finding.message
    assert finding.advice.startswith("if that is not meant, give weights that even them out: ")
    weights = {
        Path(p.rpartition(" ")[0]).name: float(p.rpartition(" ")[2])
        for p in finding.advice.partition(": ")[2].split(", ")
    }
    assert list(weights) == ["a", "b", "c"]
    assert sum(weights.values()) == pytest.approx(3, rel=1e-2)
    evened = examined(tmp_path, models, own={name: {"weight": w} for name, w in weights.items()})
    assert evened.findings == ()
    norms = [m.weighted for m in evened.conflicts.models.values()]
    assert max(norms) / min(norms) == pytest.approx(1, abs=0.02)


def test_weights_that_make_changes_uneven_are_told_too_and_three_times_is_no_matter(tmp_path: Path) -> None:
    assert kinds(examined(tmp_path, healthy(), own={"a": {"weight": 5.0}})) == ["norms"]
    assert examined(tmp_path, healthy(), own={"a": {"weight": 3.0}}).findings == ()


def test_running_statistics_are_outside_all_norms_and_looked_at_for_nan(tmp_path: Path) -> None:
    models = healthy()
    for k, model in enumerate(models.values()):
        model["bn.running_mean"] = torch.full((70,), 1e3**k)
    models["base"] = {**BASE, "bn.running_mean": torch.ones(70)}
    assert examined(tmp_path / "1", models).findings == ()
    models["c"]["bn.running_mean"] = torch.full((70,), math.inf)
    assert only(examined(tmp_path / "2", models), "nonfinite").figures["entries"] == 70


# equal models


def test_a_model_equal_to_the_base_is_told_and_one_changed_entry_is_enough_to_differ(tmp_path: Path) -> None:
    models = healthy()
    finding = only(examined(tmp_path / "1", models | {"b": BASE}), "equal")
    assert short(finding) == ("b",)
    assert finding.message.endswith("b is equal to the base in all tensors that were measured (6)")
    touched = {name: x.clone() for name, x in BASE.items()}
    touched["model.layers.1.norm.weight"][3] += 1e-3
    assert "equal" not in kinds(examined(tmp_path / "2", models | {"b": touched}))


@pytest.mark.parametrize("base", ["base", None])
def test_two_equal_models_are_told(tmp_path: Path, base: str | None) -> None:
    models = healthy()
    if base is None:
        del models["base"]
    options = {"base": base, "method": "task_arithmetic" if base else "linear"}
    one = examined(tmp_path / "1", models | {"c": models["a"]}, **options)
    equal = [finding for finding in one.findings if finding.kind == "equal"]
    assert [short(finding) for finding in equal] == [("a", "c")]
    assert "overlap" not in kinds(one)  # it would say the same again
    assert "equal" not in kinds(examined(tmp_path / "2", models, **options))


def test_a_model_that_is_listed_twice_is_told(tmp_path: Path) -> None:
    for name, model in healthy().items():
        save(model, tmp_path / name)
    twice = Slice(tuple(Input(str(tmp_path / name)) for name in ("a", "b", "a")))
    recipe = Recipe("task_arithmetic", (twice,), base=Input(str(tmp_path / "base")))
    (one,) = examine(plan_recipes([recipe]))
    equal = [finding for finding in one.findings if finding.kind == "equal"]
    assert [finding.models for finding in equal] == [(str(tmp_path / "a"), f"{tmp_path / 'a'} (2)")]


def test_without_a_base_changes_are_not_judged_and_that_is_said(tmp_path: Path) -> None:
    models = {"a": BASE, "b": plus(BASE, B, -9.0)}
    one = examined(tmp_path, models, base=None, method="linear")
    assert one.findings == ()
    assert len(one.notes) == 1
    assert one.notes[0].startswith("there is no base, so changes were not compared")


def test_a_base_that_counts_as_a_model_is_not_told_to_be_equal_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MERGES, "between", Joint(linear, "as slerp", base_is_model=True))  # type: ignore[arg-type]
    one = examined(tmp_path, {"base": BASE, "a": plus(BASE, A)}, method="between")
    assert [Path(label).name for label in one.conflicts.models] == ["a"]
    assert one.findings == ()


# signs


def test_opposing_signs_are_told_for_the_pair_and_not_for_the_others(tmp_path: Path) -> None:
    models = healthy() | {"b": plus(plus(BASE, A, -0.7), B, 0.7)}
    one = examined(tmp_path, models)
    finding = next(f for f in one.findings if f.kind == "signs")
    assert short(finding) == ("a", "b")
    assert sum(f.kind == "signs" for f in one.findings) == 1
    assert finding.figures["opposing"] > 0.75
    assert finding.figures["cosine"] == pytest.approx(-0.7, abs=0.05)
    assert "use ties" in finding.advice


def test_the_same_changes_with_the_same_signs_are_not_told_and_a_negative_weight_counts(tmp_path: Path) -> None:
    models = healthy() | {"b": plus(plus(BASE, A, 0.7), B, 0.7)}
    assert "signs" not in kinds(examined(tmp_path, models))
    assert "signs" in kinds(examined(tmp_path, models, own={"b": {"weight": -1.0}}))


# subspaces


def low_rank(left: Tensor, right: Tensor) -> Model:
    return {"x.weight": left @ right.T}


def test_shared_leading_input_directions_are_told_and_apart_ones_are_not(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    left = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0]
    base = {"x.weight": torch.zeros(96, 64)}
    strong = torch.cat([torch.full((4,), 2.0), torch.ones(28)]).diag()
    one = low_rank(left[:, :32] @ strong, q[:, :32])
    for number, (columns, found) in enumerate(
        ((list(range(4)) + list(range(36, 64)), True), (list(range(32, 64)), False))
    ):
        other = low_rank(left[:, 32:64] @ strong, q[:, columns])
        examination = examined(tmp_path / str(number), {"base": base, "a": one, "b": other})
        if not found:
            assert examination.findings == ()
            continue
        finding = only(examination, "overlap")
        assert short(finding) == ("a", "b")
        assert finding.figures == {"overlap": pytest.approx(1), "chance": 4 / 64}
        assert "use tsv_m, iso_c or gram" in finding.advice
        assert "most in x.weight: 1.00" in finding.message


def test_interfering_singular_vectors_are_told_in_the_mean_over_layers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    spectrum = torch.diag(torch.cat([torch.linspace(2, 1, 16), torch.zeros(16)]))
    base = {"x.weight": torch.zeros(32, 32)}
    models = {"base": base, "a": {"x.weight": q @ spectrum @ q.T}, "b": {"x.weight": q @ spectrum.square() @ q.T}}
    one = examined(tmp_path / "1", models)
    finding = next(f for f in one.findings if f.kind == "interference")
    assert finding.figures["left"] == pytest.approx(math.sqrt(2 * 16), rel=1e-5)
    assert finding.figures["left_share"] == pytest.approx(1, rel=1e-5)
    assert finding.figures["left_chance"] == pytest.approx(0.5)
    assert "||U^T U - I|| is 5.66" in finding.message
    apart = {"x.weight": q.flip(1) @ spectrum @ q.flip(1).T}
    assert examined(tmp_path / "2", models | {"b": apart}).findings == ()


# density


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_a_density_that_keeps_next_to_nothing_is_told_by_tensor(tmp_path: Path, method: str) -> None:
    one = examined(tmp_path, healthy(), method=method, settings={"density": 0.5}, own={"b": {"density": 0.05}})
    finding = only(one, "density")
    assert short(finding) == ("b",)
    assert finding.figures["tensors"] == 2
    assert finding.figures["entries"] == 64
    assert finding.figures["kept"] == pytest.approx(3.2, abs=0.21)
    assert finding.advice.startswith("raise the density there, to 0.12 or more")
    assert examined(tmp_path, healthy(), method=method, settings={"density": 0.5}).findings == ()


def test_tensors_of_a_few_entries_do_not_count(tmp_path: Path) -> None:
    shapes = {"x.weight": (32, 32), "x.bias": (32,), "scale": ()}
    base = noise(0, shapes=shapes)
    models = {"base": base, "a": plus(base, noise(1, 0.1, shapes)), "b": plus(base, noise(2, 0.1, shapes))}
    assert examined(tmp_path, models, method="ties", settings={"density": 0.1}).findings == ()


@pytest.mark.parametrize(("kept", "told"), [(7, True), (8, False)])
def test_eight_entries_are_enough(tmp_path: Path, kept: int, told: bool) -> None:
    one = examined(tmp_path, healthy(), method="ties", settings={"density": kept / 64})
    assert kinds(one) == ["density"] * (3 if told else 0)


def test_tensors_that_a_method_does_not_thin_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Joint(ties, "as ties", score=magnitude, ranks=ties_ranks, vector=task_arithmetic, per_model=("density",))
    monkeypatch.setitem(MERGES, "thin", row)  # type: ignore[arg-type]
    models = {name: noise(seed, 1.0, {"x.bias": (64,)}) for seed, name in enumerate(("base", "a"))}
    assert examined(tmp_path / "1", models, method="thin", settings={"density": 0.05}).findings == ()
    square = {name: {"x.weight": x["x.bias"].reshape(8, 8)} for name, x in models.items()}
    only(examined(tmp_path / "2", square, method="thin", settings={"density": 0.05}), "density")


# resolution


def test_changes_below_the_outputs_resolution_are_told(tmp_path: Path) -> None:
    base = {"x.weight": torch.full((16, 16), 1.5)}
    steps = torch.linspace(-1, 1, 256).reshape(16, 16)
    models = {"base": base, "a": {"x.weight": base["x.weight"] + 2**-7 * steps}}
    finding = only(examined(tmp_path, models, dtype="BF16"), "resolution")
    assert short(finding) == ("a",)
    expected = float((steps.abs() < 0.5).double().mean())  # half a unit at 1.5 is 2^-8
    assert finding.figures["share"] == pytest.approx(expected, abs=0.01)
    assert "50% of the entries" in finding.message
    assert "dtype: float32" in finding.advice
    assert examined(tmp_path, models, dtype="F32").findings == ()
    assert examined(tmp_path, models).findings == ()


def test_models_that_are_stored_coarse_changed_by_whole_units(tmp_path: Path) -> None:
    base = {name: x.bfloat16() for name, x in BASE.items()}
    tuned = {name: (x.float() + 0.001 * A[name]).bfloat16() for name, x in base.items()}
    one = examined(tmp_path, {"base": base, "a": tuned})
    assert one.findings == ()
    assert next(iter(one.conflicts.models.values())).changed > 0


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

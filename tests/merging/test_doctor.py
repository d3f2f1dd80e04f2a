"""What the doctor measures against plain loops; every warning fires on a made case, and not on its healthy twin."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from doctor_helpers import BASE, A, B, Model, examined, healthy, kinds, noise, only, plus, short
from merganser.merging.doctor import examine, gravest
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_recipes
from merganser.methods.joint import MERGES, Joint
from merganser.methods.joint._keep import magnitude
from merganser.methods.joint.linear import linear
from merganser.methods.joint.task_arithmetic import task_arithmetic
from merganser.methods.joint.ties import ties, ties_ranks
from support import save


def test_unrelated_changes_of_one_size_are_healthy(tmp_path: Path) -> None:
    one = examined(tmp_path, healthy())
    assert (one.findings, one.notes) == ((), ())
    assert gravest([one]) == 0


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

"""The core loses nothing, the cut costs what the singular values say, and some rules do not see the frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapter_helpers import written
from memory_source import MemorySource
from merganser.merging.adapter_plan import AdapterMerge, plan_adapters
from merganser.merging.core_space import core_of, factors_of, frame_of, span
from merganser.merging.lookup import merge_names, rules_of
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import AdapterOut, Input, Recipe, Slice

Change = tuple[Tensor, Tensor, float]


def changes(ranks: Sequence[int], m: int = 31, n: int = 23, seed: int = 0) -> list[Change]:
    """Random changes (B, A, s) of some ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator), 0.5 + k)
        for k, r in enumerate(ranks)
    ]


def dense(change: Change) -> np.ndarray:
    """s B A by a loop."""
    up, down, scaling = change[0].double().numpy(), change[1].double().numpy(), change[2]
    found = np.zeros((up.shape[0], down.shape[1]))
    for k in range(up.shape[1]):
        for i in range(up.shape[0]):
            found[i] += scaling * up[i, k] * down[k]
    return found


def cores(given: Sequence[Change]) -> tuple[list[Tensor], Any]:
    frame = frame_of([up for up, _, _ in given], [down for _, down, _ in given])
    return [core_of(*change, frame) for change in given], frame


def whole(core: Tensor, frame: Any) -> np.ndarray:
    return (frame.u @ core @ frame.v.T).numpy()


@pytest.mark.parametrize("ranks", [(4,), (4, 4), (1, 5, 3), (20, 20)])
def test_core_loses_nothing(ranks: tuple[int, ...]) -> None:
    given = changes(ranks)
    found, frame = cores(given)
    assert frame.u.shape[1] == min(31, sum(ranks))
    assert frame.v.shape[1] == min(23, sum(ranks))
    for basis in (frame.u, frame.v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-13)
    for core, change in zip(found, given, strict=True):
        expected = dense(change)
        np.testing.assert_allclose(whole(core, frame), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_frame_is_as_large_as_what_the_changes_span() -> None:
    (up, down, _), *_ = changes([3])
    up, down = up.double(), down.double()
    turn = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = [(up, down, 1.0), (up @ turn, down, 2.0), (torch.zeros_like(up), turn @ down, 1.0)]
    found, frame = cores(given)
    assert (frame.u.shape[1], frame.v.shape[1]) == (3, 3)
    for core, change in zip(found, given, strict=True):
        np.testing.assert_allclose(whole(core, frame), dense(change), rtol=0, atol=1e-10)
    assert not found[2].any()


def test_small_adapter_beside_a_large_one_is_kept() -> None:
    (up, down, _), (tiny, other, _) = changes([2, 2])
    given = [(up * 1e6, down, 1.0), (tiny * 1e-9, other * 1e9, 1.0)]
    found, frame = cores(given)
    np.testing.assert_allclose(whole(found[1], frame), dense(given[1]), rtol=0, atol=1e-10)


def test_zero_changes_have_a_frame_of_one_direction() -> None:
    found = span(torch.zeros(5, 4))
    assert found.shape == (5, 1)
    assert float(found.norm()) == pytest.approx(1)


def test_frame_is_that_of_the_stacked_factors_singular_vectors() -> None:
    given = changes([3, 2])
    _, frame = cores(given)
    stack = torch.cat([up for up, _, _ in given], dim=1).double()
    energy = (frame.u.T @ stack).square().sum(1).sqrt()
    torch.testing.assert_close(energy, torch.linalg.svdvals(stack), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_truncation_error_is_that_of_the_singular_values(rank: int) -> None:
    given = changes([4, 5])
    found, frame = cores(given)
    total = sum(dense(change) for change in given)
    factors = factors_of(found[0] + found[1], frame, rank)
    sigma = np.linalg.svd(total, compute_uv=False)
    assert factors.error == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()), abs=1e-12)
    left = total - (factors.up @ factors.down).numpy()
    assert np.linalg.norm(left) / np.linalg.norm(total) == pytest.approx(factors.error, abs=1e-12)
    np.testing.assert_allclose(factors.up.norm(dim=0).numpy() ** 2, sigma[:rank], rtol=1e-10)
    np.testing.assert_allclose(factors.down.norm(dim=1).numpy() ** 2, sigma[:rank], rtol=1e-10)


def test_rank_above_the_core_s_is_filled_with_zeros() -> None:
    given = changes([2])
    found, frame = cores(given)
    factors = factors_of(found[0], frame, 5)
    assert (factors.up.shape, factors.down.shape, factors.error) == ((31, 5), (5, 23), 0.0)
    assert not factors.up[:, 2:].any()
    np.testing.assert_allclose((factors.up @ factors.down).numpy(), dense(given[0]), rtol=0, atol=1e-12)


def on_whole(method: str, given: Sequence[Change], settings: dict[str, Any], post: tuple[Any, ...] = ()) -> np.ndarray:
    """A method of the table on dense changes, over a base of zeros; slerp takes the first for its base."""
    rules, names = rules_of(method), [f"m{k}" for k in range(len(given))]
    sources = {
        name: MemorySource(name, {"q.weight": torch.from_numpy(dense(change))})
        for name, change in zip(names, given, strict=True)
    }
    sources["base"] = MemorySource("base", {"q.weight": torch.zeros(48, 36, dtype=torch.float64)})
    inputs = [Input(name, settings=WEIGHTED[k] if rules.weighted else {}) for k, name in enumerate(names)]
    base = inputs.pop(0) if rules.base_is_model else Input("base") if rules.needs_base else None
    recipe = Recipe(method, (Slice(tuple(inputs)),), base, settings=settings, post=post)
    return Merged(make_plan(recipe, sources)).read("q.weight").numpy()


def in_core(
    folder: Path, method: str, given: Sequence[Change], settings: dict[str, Any], post: tuple[Any, ...] = ()
) -> np.ndarray:
    """The same on adapters; one of rank 0 leaves the weight alone."""
    folder.mkdir(exist_ok=True)
    inputs = []
    for k, (up, down, scaling) in enumerate(given):
        name, rank = ("q" if up.shape[1] else "other"), max(1, up.shape[1])
        a, b = (down, up) if up.shape[1] else (torch.zeros(1, 5), torch.zeros(5, 1))
        tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        written(folder / f"m{k}", tensors, r=rank, lora_alpha=scaling * rank, target_modules=[name])
        inputs.append(Input(str(folder / f"m{k}"), settings=WEIGHTED[k] if rules_of(method).weighted else {}))
    recipe = Recipe(method, (Slice(tuple(inputs)),), settings=settings, post=post, adapter=AdapterOut())
    factors, _ = plan_adapters(recipe).factors("q.weight")
    return (factors.up @ factors.down).numpy()


WEIGHTED = [{"weight": 1.0}, {"weight": 2.0}, {"weight": 0.5}]
RANKS = [(4, 4), (2, 5), (3, 5, 0)]

#: Rules that see inner products and singular values only, and those that take the number of directions from the size,
#: with the settings that make up for it: in the core of `p` directions, and in the whole weight of 36.
SAME: dict[str, Callable[[int], tuple[dict[str, Any], dict[str, Any]]]] = {
    "linear": lambda p: ({}, {}),
    "task_arithmetic": lambda p: ({"scale": 0.7}, {"scale": 0.7}),
    "mean": lambda p: ({}, {}),
    "average": lambda p: ({}, {}),
    "slerp": lambda p: ({"t": 0.3}, {"t": 0.3}),
    "nuslerp": lambda p: ({}, {}),
    "nuslerp_delta": lambda p: ({}, {}),
    "multislerp": lambda p: ({}, {}),
    "multislerp_delta": lambda p: ({}, {}),
    "karcher": lambda p: ({}, {}),
    "model_stock": lambda p: ({"negative": True}, {"negative": True}),
    "star": lambda p: ({}, {}),
    "tsv_m": lambda p: ({}, {}),
    "dc": lambda p: ({"density": 1.0}, {"density": 1.0}),
    "cart": lambda p: ({"rank": 3 / p}, {"rank": 3 / 36}),
    "iso_c": lambda p: ({"scale": 1.5}, {"scale": 1.5 * 36 / p}),
    "gram": lambda p: ({"eps": 0.01 * p / 36}, {"eps": 0.01}),
}


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("method", SAME)
def test_rule_gives_in_the_core_what_it_gives_on_the_whole_change(
    method: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    most = rules_of(method).models[1]
    given = changes(ranks if most is None else ranks[:2], 48, 36)
    small, large = SAME[method](len(given) * max(ranks))
    expected = on_whole(method, given, large)
    assert np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(in_core(tmp_path, method, given, small) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("post", [("svc", {}), ("lines", {"alpha": 0.5, "beta": 1.0}), ("subspace_boosting", {})])
def test_post_processor_gives_in_the_core_what_it_gives_on_the_whole_change(post: Any, tmp_path: Path) -> None:
    given = changes((2, 5), 48, 36)
    expected = on_whole("task_arithmetic", given, {}, (post,))
    found = in_core(tmp_path, "task_arithmetic", given, {}, (post,))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_weight_too_thin_for_factors_is_merged_as_a_whole_model_s(tmp_path: Path) -> None:
    given = [(up[:, :2], down, scaling) for up, down, scaling in changes((2, 2), 48, 36)]
    thin = [(up, down[:, :20], scaling) for up, down, scaling in given]
    for one in (given, thin):
        expected = sum(w["weight"] * dense(change) for w, change in zip(WEIGHTED, one, strict=False)) / 3
        found = in_core(tmp_path, "tsv_m", one, {})
        assert (np.linalg.norm(found - expected) < 1e-5) == (one is thin)


@pytest.mark.parametrize("name", [n for n in merge_names() if not rules_of(n).measured])
def test_nothing_is_merged_beside_the_frame(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores are filled up with zeros for some rules; what these make of the zeros is cut off."""
    seen = []

    def merged(self: AdapterMerge, name: str, cores: Sequence[Tensor]) -> Tensor:
        found = original(self, name, cores)
        live = max(int(x.any(1).sum()) for x in cores), max(int(x.any(0).sum()) for x in cores)
        seen.append(float(found[live[0] :].abs().sum() + found[:, live[1] :].abs().sum()) / float(found.abs().sum()))
        return found

    original = AdapterMerge._merged
    monkeypatch.setattr(AdapterMerge, "_merged", merged)
    rules = rules_of(name)
    count = 3 if rules.models[1] is None else rules.models[1] + rules.base_is_model
    given = changes((2, 5, 0)[:count], 48, 36)
    in_core(tmp_path, name, given, dict.fromkeys(rules.required, 0.3))
    assert seen
    assert max(seen) < 1e-9


@pytest.mark.parametrize("method", ["ties", "magmax", "breadcrumbs", "dare_linear"])
def test_rule_of_single_entries_acts_on_those_of_the_core(method: str, tmp_path: Path) -> None:
    given = changes((4, 4), 48, 36)
    expected, found = on_whole(method, given, {}), in_core(tmp_path, method, given, {})
    assert np.linalg.norm(found - expected) > 0.05 * np.linalg.norm(expected)
    if method == "magmax":
        (one, other), frame = cores(given)
        largest = torch.where(one.abs() >= 2 * other.abs(), one, 2 * other)
        np.testing.assert_allclose(found, whole(largest, frame), rtol=0, atol=1e-5)


def test_same_change_in_other_factors_is_the_same_for_an_invariant_rule(tmp_path: Path) -> None:
    given = changes((3, 4), 48, 36)
    turn = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    up, down = given[0][0].double() @ turn, torch.linalg.solve(turn, given[0][1].double())
    one = in_core(tmp_path / "a", "karcher", given, {})
    other = in_core(tmp_path / "b", "karcher", [(up, down, given[0][2]), given[1]], {})
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)

"""The core loses nothing, the cut costs what the singular values say, and some rules do not see the frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_source import MemorySource
from merganser.merging.core_space import core_of, factors_of, frame_of, span
from merganser.merging.lookup import rules_of
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import Input, Recipe, Slice

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


def merged(method: str, given: Sequence[Tensor], settings: dict[str, Any], post: tuple[Any, ...] = ()) -> Tensor:
    """A method of the table on changes, over a base of zeros; slerp takes the first for its base."""
    rules = rules_of(method)
    sources = {f"m{k}": MemorySource(f"m{k}", {"fc.weight": x}) for k, x in enumerate(given)}
    sources["base"] = MemorySource("base", {"fc.weight": torch.zeros_like(given[0])})
    inputs = [Input(f"m{k}", settings={"weight": 1.0 + k} if rules.weighted else {}) for k in range(len(given))]
    base = inputs.pop(0) if rules.base_is_model else Input("base") if rules.needs_base else None
    recipe = Recipe(method, (Slice(tuple(inputs)),), base, settings=settings, post=post)
    return Merged(make_plan(recipe, sources)).read("fc.weight")


#: Rules that see inner products and singular values only, and those that count directions, with what makes up for it.
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("task_arithmetic", {"scale": 0.7}, {"scale": 0.7}),
    ("mean", {}, {}),
    ("slerp", {"t": 0.3}, {"t": 0.3}),
    ("nuslerp", {}, {}),
    ("nuslerp_delta", {}, {}),
    ("multislerp", {}, {}),
    ("multislerp_delta", {}, {}),
    ("karcher", {}, {}),
    ("model_stock", {}, {}),
    ("star", {}, {}),
    ("tsv_m", {}, {}),
    ("iso_c", {"scale": 1.5}, {"scale": 1.5 * 23 / 8}),
    ("gram", {"eps": 0.01 * 8 / 23}, {"eps": 0.01}),
]


@pytest.mark.parametrize(("method", "in_core", "in_whole"), SAME, ids=[row[0] for row in SAME])
def test_rule_gives_in_the_core_what_it_gives_on_the_whole_change(
    method: str, in_core: dict[str, Any], in_whole: dict[str, Any]
) -> None:
    given = changes([4, 4])
    found, frame = cores(given)
    expected = merged(method, [torch.from_numpy(dense(c)) for c in given], in_whole).numpy()
    difference = whole(merged(method, found, in_core), frame) - expected
    assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "post", [("svc", {}), ("lines", {"alpha": 0.5, "beta": 1.0}), ("subspace_boosting", {})], ids=lambda p: p[0]
)
def test_post_processor_gives_in_the_core_what_it_gives_on_the_whole_change(post: Any) -> None:
    given = changes([4, 4])
    found, frame = cores(given)
    args = ("task_arithmetic", {"scale": 0.7}, (post,))
    expected = merged(args[0], [torch.from_numpy(dense(c)) for c in given], args[1], args[2]).numpy()
    difference = whole(merged(args[0], found, args[1], args[2]), frame) - expected
    assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["ties", "magmax", "breadcrumbs", "dare_linear"])
def test_rule_of_single_entries_acts_on_those_of_the_core(method: str) -> None:
    given = changes([4, 4])
    found, frame = cores(given)
    on_whole = merged(method, [torch.from_numpy(dense(c)) for c in given], {}).numpy()
    in_core = whole(merged(method, found, {}), frame)
    assert np.linalg.norm(in_core - on_whole) > 0.05 * np.linalg.norm(on_whole)
    if method == "magmax":
        weighted = [found[0], 2.0 * found[1]]
        expected = torch.where(weighted[0].abs() >= weighted[1].abs(), *weighted)
        np.testing.assert_allclose(in_core, whole(expected, frame), rtol=0, atol=1e-10)


def test_same_change_in_other_factors_is_the_same_for_an_invariant_rule() -> None:
    given = changes([3, 4])
    turn = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    up, down = given[0][0].double() @ turn, torch.linalg.solve(turn, given[0][1].double())
    one, frame = cores(given)
    other, turned = cores([(up, down, given[0][2]), given[1]])
    np.testing.assert_allclose(
        whole(merged("karcher", one, {}), frame), whole(merged("karcher", other, {}), turned), rtol=0, atol=1e-9
    )

"""OPCM as published, written as a plain float64 loop over whole models with full SVDs, against the fold."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.methods.opcm import opcm
from support import (
    MATRICES,
    STATISTICS,
    Arrays,
    arrays,
    as_matrix,
    change,
    distance,
    load,
    load_sums,
    make_base,
    save,
    save_family,
    tree,
    tune,
)

EXPERTS = 5


def clean(u: np.ndarray, tau: np.ndarray, alpha: float, diagonal: str) -> np.ndarray:
    """The published projection: full factors, both zeroings written into P, P turned back."""
    if not u.any():
        return tau
    left, s, right = np.linalg.svd(u, full_matrices=True)
    p = len(s)
    k = p if alpha >= 1 else sum(1 for i in range(p) if sum(s[: i + 1]) / sum(s) <= alpha)
    P = left.T @ tau @ right.T
    if diagonal == "drop":
        for i in range(p):
            P[i, i] = 0
    P[:k, :k] = 0
    return left @ P @ right


def whole_norm(model: Arrays) -> float:
    return math.sqrt(math.fsum(float(np.sum(x * x)) for name, x in model.items() if name not in STATISTICS))


def published(changes: list[Arrays], alpha: float, diagonal: str) -> Arrays:
    """Normalised state D and scalar lambda; running statistics are averaged and stand outside of all norms."""
    D, lam, norms = dict(changes[0]), 1.0, [whole_norm(changes[0])]
    for t, taus in enumerate(changes[1:], 2):
        norms.append(whole_norm(taus))
        mean = sum(norms) / t
        for name, tau in taus.items():
            if name in STATISTICS:
                D[name] = ((t - 1) * D[name] + tau) / t
            elif name in MATRICES and tau.size:
                cleaned = clean(as_matrix(D[name]), as_matrix(tau), alpha, diagonal)
                D[name] = lam * D[name] + cleaned.reshape(tau.shape)
            else:
                D[name] = lam * D[name] + tau
        before = whole_norm(D)
        D = {name: x if name in STATISTICS else x * (mean / before) for name, x in D.items()}
        lam = before / mean
    return D


def fold_all(family: list[Path], folder: Path, **options: object) -> Fold:
    fold = Fold.init(family[0], folder / "state", "opcm", threads=1, **options)
    for expert in family[1:]:
        fold.add(expert, threads=1)
    return fold


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("mixed"), EXPERTS)


@pytest.fixture(scope="module")
def family64(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("double"), EXPERTS, dtype=torch.float64)


@pytest.mark.parametrize("diagonal", ["drop", "keep"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_fold_equals_the_published_loop_to_1e_5_in_float32(
    family: list[Path], tmp_path: Path, alpha: float, diagonal: str
) -> None:
    base = load(family[0])
    expected = published([change(load(e), base) for e in family[1:]], alpha, diagonal)
    fold = fold_all(family, tmp_path, alpha=alpha, diagonal=diagonal)
    found = change(load(fold.export(tmp_path / "out", dtype="F64")), base)
    assert set(found) == set(expected)
    for name in expected:
        assert distance(found[name], expected[name]) <= 1e-5, name


@pytest.mark.parametrize("diagonal", ["drop", "keep"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_fold_equals_the_published_loop_to_1e_10_in_float64(
    family: list[Path], tmp_path: Path, alpha: float, diagonal: str
) -> None:
    base = load(family[0])
    expected = published([change(load(e), base) for e in family[1:]], alpha, diagonal)
    fold = fold_all(family, tmp_path, alpha=alpha, diagonal=diagonal, float64=True)
    found = change(load(fold.export(tmp_path / "out", dtype="F64")), base)
    assert set(found) == set(expected)
    for name in expected:
        assert distance(found[name], expected[name]) <= 1e-10, name


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.25]])
def test_merged_change_has_the_mean_norm_of_the_weighted_changes(
    family64: list[Path], tmp_path: Path, weights: list[float]
) -> None:
    base = load(family64[0])
    fold = Fold.init(family64[0], tmp_path / "state", "opcm", float64=True)
    norms = []
    for expert, weight in zip(family64[1:], weights, strict=False):
        fold.add(expert, weight=weight)
        norms.append(weight * whole_norm(change(load(expert), base)))
        found = change(load(fold.export(tmp_path / "out", overwrite=True)), base)
        assert whole_norm(found) == pytest.approx(sum(norms) / len(norms), rel=1e-10)
        assert [c.norm for c in fold.ledger.contributors] == pytest.approx(norms, rel=1e-12)


def test_counters_integers_and_the_config_are_the_base_s(family: list[Path], tmp_path: Path) -> None:
    base = load(family[0])
    merged = load(fold_all(family, tmp_path).export(tmp_path / "out"))
    assert {n: x.dtype for n, x in merged.items()} == {n: x.dtype for n, x in base.items()}
    assert {n: x.shape for n, x in merged.items()} == {n: x.shape for n, x in base.items()}
    for name in ("bn.num_batches_tracked", "position_ids"):
        assert torch.equal(merged[name], base[name])


def test_every_cleaned_change_is_orthogonal_to_the_sum_before_it(family64: list[Path], tmp_path: Path) -> None:
    base = load(family64[0])
    fold = Fold.init(family64[0], tmp_path / "state", "opcm", float64=True)
    before: Arrays = {}
    for expert in family64[1:]:
        fold.add(expert)
        tau, after = change(load(expert), base), arrays(load_sums(fold.path))
        for name in MATRICES:
            if before and tau[name].size:
                u, cleaned = before[f"d/{name}"], after[f"d/{name}"] - before[f"d/{name}"]
                assert cleaned.any() or min(u.shape) == 1
                inner = abs(float(np.sum(u * cleaned)))
                assert inner <= 1e-10 * np.linalg.norm(u) * np.linalg.norm(tau[name]), name
        before = after


def test_fold_leaves_base_and_experts_as_they_are(tmp_path: Path) -> None:
    family = save_family(tmp_path / "models", 2)
    before = tree(tmp_path / "models")
    fold_all(family, tmp_path).export(tmp_path / "out")
    assert tree(tmp_path / "models") == before


def test_continuing_in_another_object_equals_going_on(family: list[Path], tmp_path: Path) -> None:
    fold = fold_all(family, tmp_path / "one")
    Fold.init(family[0], tmp_path / "two" / "state", "opcm")
    for expert in family[1:]:
        Fold(tmp_path / "two" / "state").add(expert)
    again = Fold(tmp_path / "two" / "state")
    assert {n: x.tolist() for n, x in load_sums(fold.path).items()} == {
        n: x.tolist() for n, x in load_sums(again.path).items()
    }
    assert again.ledger == fold.ledger


def test_layer_that_first_experts_left_alone_takes_the_later_change_whole(tmp_path: Path) -> None:
    names = ("wide.weight", "square.weight")
    base = make_base(names=names, dtype=torch.float64)
    first, second = tune(base, 1), tune(base, 2)
    first["wide.weight"] = base["wide.weight"].clone()
    family = [save(m, tmp_path / n) for m, n in ((base, "base"), (first, "first"), (second, "second"))]
    fold = fold_all(family, tmp_path, float64=True)
    sums = arrays(load_sums(fold.path))
    assert distance(sums["d/wide.weight"], change(second, base)["wide.weight"]) <= 1e-15


def test_expert_equal_to_the_base_merges_to_the_base(tmp_path: Path) -> None:
    base = make_base()
    save(base, tmp_path / "base")
    save(base, tmp_path / "same")
    fold = Fold.init(tmp_path / "base", tmp_path / "state", "opcm")
    assert fold.add(tmp_path / "same").norm == 0
    merged = load(fold.export(tmp_path / "out"))
    assert all(torch.equal(merged[name], base[name]) for name in base)


# The rule for one matrix.


def spectrum(m: int, n: int, s: np.ndarray, seed: int) -> torch.Tensor:
    """A float64 m x n matrix with those singular values."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((m, m)))[0]
    right = np.linalg.qr(generator.standard_normal((n, n)))[0]
    p = len(s)
    return torch.from_numpy(left[:, :p] @ np.diag(s) @ right[:, :p].T)


def noise(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n)))


SIZES = [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1), (1, 1)]


@pytest.mark.parametrize("diagonal", ["drop", "keep"])
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_rule_equals_full_factors(m: int, n: int, alpha: float, diagonal: str) -> None:
    u, tau = noise(m, n, 1), noise(m, n, 2)
    expected = u.numpy() + clean(u.numpy(), tau.numpy(), alpha, diagonal)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = opcm(u.to(dtype), tau.to(dtype), alpha=alpha, diagonal=diagonal)
        assert found.dtype == dtype
        assert distance(found.double().numpy(), expected) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(12, 30), (5, 200), (1, 9)])
def test_wide_is_the_transpose_of_tall(m: int, n: int, dtype: torch.dtype) -> None:
    u, tau = noise(m, n, 3).to(dtype), noise(m, n, 4).to(dtype)
    tall = opcm(u.T.contiguous(), tau.T.contiguous())
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert distance(opcm(u, tau).double().numpy(), tall.T.double().numpy()) <= tolerance


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lowest", [1e-3, 1e-5, 1e-7, 1e-9])
def test_change_stays_orthogonal_on_ill_conditioned_sums(lowest: float, alpha: float) -> None:
    u = spectrum(40, 24, np.logspace(0, math.log10(lowest), 24), 5)
    tau = noise(40, 24, 6)
    size = float(u.norm() * tau.norm())
    cleaned = opcm(u, tau, alpha=alpha) - u
    assert abs(float((u * cleaned).sum())) <= 1e-10 * size
    u32, tau32 = u.float(), tau.float()
    cleaned32 = opcm(u32, tau32, alpha=alpha).double() - u32.double()
    # Directions below 8 eps of the strongest stay in; what they carry is that small too.
    assert abs(float((u32.double() * cleaned32).sum())) <= 1e-6 * size


@pytest.mark.parametrize("diagonal", ["drop", "keep"])
def test_cleaned_change_is_never_longer_than_the_change(diagonal: str) -> None:
    # A Gram matrix squared in float32 loses the weak directions: the result then grows by orders of magnitude.
    u = spectrum(40, 24, np.logspace(0, -7, 24), 7)
    tau = noise(40, 24, 8)
    for dtype in (torch.float32, torch.float64):
        cleaned = opcm(u.to(dtype), tau.to(dtype), diagonal=diagonal).double() - u.to(dtype).double()
        assert 0 < cleaned.norm() <= tau.norm() * (1 + 1e-6)


@pytest.mark.parametrize("diagonal", ["drop", "keep"])
@pytest.mark.parametrize(("m", "n"), [(48, 20), (20, 48), (24, 24)])
def test_gram_route_equals_svd_route_on_float32_data(m: int, n: int, diagonal: str) -> None:
    u = spectrum(m, n, np.logspace(0, -4, min(m, n)), 9).float()
    tau = noise(m, n, 10).float()
    gram = opcm(u, tau, diagonal=diagonal).double()
    svd = opcm(u.double(), tau.double(), diagonal=diagonal)
    assert distance(gram.numpy(), svd.numpy()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rank_one_sum_loses_only_its_own_direction(alpha: float, dtype: torch.dtype) -> None:
    # Whatever alpha is, drop takes out <a b^T, d> a b^T for unit a and b, and nothing else: the other directions
    # of a rank-one sum are rounding.
    a, b = noise(14, 1, 11), noise(9, 1, 12)
    a, b = a / a.norm(), b / b.norm()
    u, tau = (3 * a @ b.T).to(dtype), noise(14, 9, 13).to(dtype)
    expected = u.double() + tau.double() - (a.T @ tau.double() @ b) * (a @ b.T)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert distance(opcm(u, tau, alpha=alpha).double().numpy(), expected.numpy()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_sum_gives_the_same_after_a_rounding_of_its_entries(dtype: torch.dtype) -> None:
    u = (noise(30, 4, 14) @ noise(4, 18, 15)).to(dtype)
    tau = noise(30, 18, 16).to(dtype)
    rounded = u * (1 + torch.finfo(dtype).eps * torch.sign(noise(30, 18, 17).to(dtype)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert distance(opcm(rounded, tau).double().numpy(), opcm(u, tau).double().numpy()) <= tolerance


def test_rank_one_change_and_zero_change_are_taken() -> None:
    u = noise(10, 8, 18)
    assert torch.equal(opcm(u, torch.zeros_like(u)), u)
    assert torch.equal(opcm(torch.zeros_like(u), u), u)
    thin = noise(10, 1, 19) @ noise(1, 8, 20)
    assert distance(opcm(u, thin).numpy(), u.numpy() + clean(u.numpy(), thin.numpy(), 0.5, "drop")) <= 1e-12


def test_alpha_0_drop_removes_the_diagonal_alone_and_keep_removes_nothing() -> None:
    u, tau = noise(10, 8, 21), noise(10, 8, 22)
    assert distance(opcm(u, tau, alpha=0, diagonal="keep").numpy(), (u + tau).numpy()) <= 1e-14
    left, _, right = np.linalg.svd(u.numpy(), full_matrices=False)
    coefficients = np.einsum("mi,mn,in->i", left, tau.numpy(), right)
    expected = u.numpy() + tau.numpy() - left @ np.diag(coefficients) @ right
    assert distance(opcm(u, tau, alpha=0).numpy(), expected) <= 1e-13


def test_alpha_1_leaves_only_what_lies_outside_of_both_spans() -> None:
    u, tau = noise(10, 6, 23), noise(10, 6, 24)
    left = np.linalg.svd(u.numpy(), full_matrices=False)[0]
    expected = u.numpy() + tau.numpy() - left @ (left.T @ tau.numpy())
    for diagonal in ("drop", "keep"):
        assert distance(opcm(u, tau, alpha=1, diagonal=diagonal).numpy(), expected) <= 1e-13


def test_the_value_that_crosses_alpha_is_not_in_the_block() -> None:
    # Shares 0.5, 0.8, 1: alpha 0.6 blocks one direction, 0.8 two.
    u = torch.diag(torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64))
    tau = torch.ones(3, 3, dtype=torch.float64)
    one = torch.tensor([[5.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    assert torch.allclose(opcm(u, tau, alpha=0.6, diagonal="keep"), one, rtol=0, atol=1e-14)
    two = torch.tensor([[5.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    assert torch.allclose(opcm(u, tau, alpha=0.81, diagonal="keep"), two, rtol=0, atol=1e-14)


def test_ledger_holds_the_norm_of_the_unnormalised_sum(family64: list[Path], tmp_path: Path) -> None:
    fold = fold_all(family64, tmp_path, float64=True)
    sums = {n.removeprefix("d/"): x for n, x in arrays(load_sums(fold.path)).items() if n[0] == "d"}
    assert read_ledger(fold.path).merged_norm == pytest.approx(whole_norm(sums), rel=1e-13)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.nufilt import nufilt

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3), (20, 6), (6, 20)]
RANKS = {"rank_merged": 0.5, "rank_new": 0.25}


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(seed, n):
    return torch.linalg.qr(noise(seed, n, n)).Q


def top_directions(x, rank):
    _, s, vt = np.linalg.svd(x)
    count = min(max(1, round(rank * x.shape[1])), int((s > 1e-6 * s[0]).sum()) if s[0] > 0 else 0)
    return vt[:count].T


def dense_formula(merged, d, rank_merged, rank_new, rho):
    merged, d = merged.double().numpy(), d.double().numpy()
    vp, vn = top_directions(merged, rank_merged), top_directions(d, rank_new)
    eye = np.eye(d.shape[1])
    repair = d @ vp @ vp.T @ vn - merged @ vn
    y = repair @ vn.T @ np.linalg.inv(vn @ vn.T + vp @ vp.T + rho * eye)
    return torch.from_numpy(merged + d @ (eye - vp @ vp.T) + y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rank_merged", "rank_new", "rho"), [(1 / 6, 1 / 96, 1e-2), (0.5, 0.25, 1e-3), (1.0, 1.0, 0.1)]
)
def test_nufilt_equals_its_formula_with_a_dense_inverse(shape, dtype, rank_merged, rank_new, rho):
    merged, d = noise(0, *shape, dtype=dtype), noise(1, *shape, dtype=dtype)
    out = nufilt(merged, d, t=2, rank_merged=rank_merged, rank_new=rank_new, rho=rho)
    expected = dense_formula(merged, d, rank_merged, rank_new, rho)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert float((out.double() - expected).norm()) <= tolerance * float(expected.norm())


def test_the_repair_minimises_its_least_squares():
    merged, d, rho = noise(0, 6, 8), noise(1, 6, 8), 1e-2
    vp, vn = (torch.from_numpy(top_directions(x.numpy(), r)) for x, r in ((merged, 0.5), (d, 0.25)))
    y = nufilt(merged, d, t=2, rho=rho, **RANKS) - merged - d + d @ vp @ vp.T
    y.requires_grad_()
    target = (d @ vp @ vp.T - merged) @ vn
    loss = (y @ vn - target).square().sum() + (y @ vp).square().sum() + rho * y.square().sum()
    (gradient,) = torch.autograd.grad(loss, y)
    assert float(gradient.abs().max()) <= 1e-12 * float(target.norm())


def test_the_gain_of_the_repair_is_bounded():
    merged = noise(0, 6, 8)
    d = merged + 1e-4 * noise(1, 6, 8)
    vp, vn = (torch.from_numpy(top_directions(x.numpy(), 0.25)) for x in (merged, d))
    y = nufilt(merged, d, t=2, rank_merged=0.25, rank_new=0.25) - merged - d + d @ vp @ vp.T
    target = (d @ vp @ vp.T - merged) @ vn
    assert float(torch.linalg.matrix_norm(y, 2)) <= 5 * float(torch.linalg.matrix_norm(target, 2))


def test_separate_input_directions_are_both_kept():
    r = rotation(0, 8)
    merged, d = noise(1, 5, 2) @ r[:2], noise(2, 5, 2) @ r[2:4]
    out = nufilt(merged, d, t=2, **RANKS)
    torch.testing.assert_close(out, merged + d, rtol=0, atol=1e-12)


def test_the_old_merge_still_acts_on_its_top_directions():
    merged, d = noise(0, 5, 8), noise(1, 5, 8)
    d -= d @ np.linalg.pinv(merged) @ merged  # d sees nothing that the merge sees
    vp = torch.from_numpy(top_directions(merged.numpy(), 0.5))
    torch.testing.assert_close(nufilt(merged, d, t=2, **RANKS) @ vp, merged @ vp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_change_on_nothing_or_of_nothing_is_added(shape, dtype):
    d = noise(0, *shape, dtype=dtype)
    zero = torch.zeros_like(d)
    assert torch.equal(nufilt(zero, d, t=1), d)
    assert torch.equal(nufilt(zero, d, t=2), d)
    assert torch.equal(nufilt(d, zero, t=2), d)
    assert torch.equal(nufilt(zero, zero, t=2), zero)


def test_only_directions_above_rounding_count():
    merged, d = noise(0, 6, 1) @ noise(1, 1, 9), noise(2, 6, 1) @ noise(3, 1, 9)
    expected = dense_formula(merged, d, 1 / 9, 1 / 9, 1e-2)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        out = nufilt(merged.to(dtype), d.to(dtype), t=2, rank_merged=0.9, rank_new=0.9)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), m=st.integers(1, 7), n=st.integers(1, 7), factor=st.sampled_from([-64.0, 1e-6, 3.0]))
def test_nufilt_commutes_with_scaling_and_rotation(seed, m, n, factor):
    merged, d = noise(seed, m, n), noise(seed + 1, m, n)
    q, r = rotation(seed + 2, m), rotation(seed + 3, n)
    out = nufilt(merged, d, t=2, **RANKS)
    close = {"rtol": 1e-7, "atol": 1e-8}
    torch.testing.assert_close(nufilt(factor * merged, factor * d, t=2, **RANKS) / factor, out, **close)
    torch.testing.assert_close(nufilt(q @ merged @ r, q @ d @ r, t=2, **RANKS), q @ out @ r, **close)


def test_nufilt_leaves_its_inputs_alone():
    merged, d = noise(0, 3, 4), noise(1, 3, 4)
    before = merged.clone(), d.clone()
    for t in (1, 2):
        nufilt(merged, d, t=t).zero_()
    assert torch.equal(merged, before[0])
    assert torch.equal(d, before[1])


@pytest.mark.parametrize("name", ["rank_merged", "rank_new"])
@pytest.mark.parametrize("rank", [0.0, -0.5, 32, float("nan")])
def test_a_rank_that_is_no_fraction_is_refused(name, rank):
    with pytest.raises(ParameterError, match=rf"{name} is .*fraction of the input width in \(0, 1\], not a count"):
        nufilt(torch.ones(2, 2), torch.ones(2, 2), t=1, **{name: rank})


@pytest.mark.parametrize("rho", [0.0, -1e-2, float("inf"), float("nan")])
def test_rho_outside_its_range_is_refused(rho):
    with pytest.raises(ParameterError, match=r"rho is .*finite number above 0"):
        nufilt(torch.ones(2, 2), torch.ones(2, 2), t=1, rho=rho)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.dop import dop

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3), (2, 9)]


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(seed, n):
    return torch.linalg.qr(noise(seed, n, n)).Q


def low_rank(seed, m, n, rank):
    return noise(seed, m, rank) @ noise(seed + 50, rank, n)


def objective(x, merged, d, alpha):
    def loss(old):
        return ((old.T @ (x - old)) ** 2).sum() + ((x - old) @ old.T).square().sum()

    return alpha * loss(merged) + (1 - alpha) * loss(d)


def ridge(merged, d, alpha, eps):
    m, n = d.shape
    return eps * (alpha * merged.square().sum() + (1 - alpha) * d.square().sum()) * (1 / m + 1 / n)


def kronecker_solution(merged, d, alpha, eps):
    m, n = d.shape
    pairs = ((alpha, merged), (1 - alpha, d))
    A = sum(w * x @ x.T for w, x in pairs)
    B = sum(w * x.T @ x for w, x in pairs)
    C = 2 * sum(w * x @ x.T @ x for w, x in pairs)
    rho = ridge(merged, d, alpha, eps)
    prior = alpha * merged + (1 - alpha) * d
    system = torch.kron(A, torch.eye(n).double()) + torch.kron(torch.eye(m).double(), B)
    system += rho * torch.eye(m * n).double()
    return torch.linalg.solve(system, (C + rho * prior).reshape(-1)).reshape(m, n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "eps"), [(0.8, 1e-3), (0.3, 1e-6), (0.0, 1e-2), (1.0, 1e-2)])
def test_dop_solves_its_normal_equations(shape, alpha, eps):
    merged, d = noise(0, *shape), noise(1, *shape)
    out = dop(merged, d, t=2, alpha=alpha, eps=eps)
    expected = kronecker_solution(merged, d, alpha, eps)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), m=st.integers(1, 6), n=st.integers(1, 6), alpha=st.floats(0, 1))
def test_gradient_of_the_objective_is_zero_at_the_result(seed, m, n, alpha):
    merged, d = noise(seed, m, n), noise(seed + 1, m, n)
    x = dop(merged, d, t=2, alpha=alpha).requires_grad_()
    prior = alpha * merged + (1 - alpha) * d
    value = objective(x, merged, d, alpha) + ridge(merged, d, alpha, 1e-3) * (x - prior).square().sum()
    (gradient,) = torch.autograd.grad(value, x)
    size = (merged.norm() + d.norm()) ** 3
    assert float(gradient.norm()) <= 1e-11 * float(size)


def test_default_ridge_hardly_raises_the_objective():
    p = 8
    spectrum = torch.arange(1, p + 1, dtype=torch.float64) ** -1.0
    merged, d = (rotation(i, p) * spectrum @ rotation(i + 2, p) for i in range(2))
    best = objective(kronecker_solution(merged, d, 0.8, 1e-10), merged, d, 0.8)
    reached = objective(dop(merged, d, t=2), merged, d, 0.8)
    prior = objective(0.8 * merged + 0.2 * d, merged, d, 0.8)
    assert best <= reached <= best * (1 + 1e-5) < prior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changes_in_separate_directions_are_added(dtype):
    q, r = rotation(0, 6), rotation(1, 8)
    merged, d = q[:, :2] @ r[:2], 3 * q[:, 2:4] @ r[2:4]
    out = dop(merged.to(dtype), d.to(dtype), t=2, eps=1e-9)
    torch.testing.assert_close(out.double(), merged + d, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_change_and_a_copy_are_taken_as_they_are(shape):
    d = noise(0, *shape)
    assert torch.equal(dop(torch.zeros_like(d), d, t=1), d)
    torch.testing.assert_close(dop(d, d, t=2), d, rtol=0, atol=1e-14)


def test_alpha_one_keeps_the_old_and_alpha_zero_takes_the_new():
    merged, d = noise(0, 4, 6), noise(1, 4, 6)
    torch.testing.assert_close(dop(merged, d, t=2, alpha=1), merged, rtol=0, atol=1e-14)
    torch.testing.assert_close(dop(merged, d, t=2, alpha=0), d, rtol=0, atol=1e-14)


def test_rank_deficient_changes_stay_in_their_span():
    merged, d = low_rank(0, 12, 9, 2), low_rank(1, 12, 9, 1)
    out = dop(merged, d, t=2)
    torch.testing.assert_close(out, kronecker_solution(merged, d, 0.8, 1e-3), rtol=1e-8, atol=1e-8)
    columns = torch.linalg.qr(torch.cat([merged[:, :2], d[:, :1]], dim=1)).Q
    assert float((out - columns @ columns.T @ out).norm()) <= 1e-12 * float(out.norm())


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dop_of_zeros_is_zero(shape, dtype):
    out = dop(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), t=2)
    assert torch.equal(out, torch.zeros(shape, dtype=dtype))
    assert out.dtype == dtype


def test_a_zero_change_shrinks_nothing_but_by_the_ridge():
    merged, zero = noise(0, 5, 4), torch.zeros(5, 4).double()
    for pair, alpha in (((merged, zero), 0.8), ((zero, merged), 0.2)):
        out = dop(*pair, t=2, alpha=alpha)
        torch.testing.assert_close(out, kronecker_solution(*pair, alpha, 1e-3), rtol=1e-9, atol=1e-10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), m=st.integers(1, 7), n=st.integers(1, 7), factor=st.sampled_from([-64.0, 1e-6, 3.0]))
def test_dop_commutes_with_scaling_transposition_and_rotation(seed, m, n, factor):
    merged, d = noise(seed, m, n), noise(seed + 1, m, n)
    q, r = rotation(seed + 2, m), rotation(seed + 3, n)
    out = dop(merged, d, t=2)
    torch.testing.assert_close(dop(factor * merged, factor * d, t=2) / factor, out, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dop(merged.T, d.T, t=2).T, out, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dop(q @ merged @ r, q @ d @ r, t=2), q @ out @ r, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [*SHAPES, (20, 6), (6, 20)])
@pytest.mark.parametrize("rank", [1, 100])
def test_float32_agrees_with_float64(shape, rank):
    m, n = shape
    merged, d = (low_rank(i, m, n, min(rank, m, n)).float() for i in range(2))
    out = dop(merged, d, t=2)
    expected = kronecker_solution(merged.double(), d.double(), 0.8, 1e-3)
    assert out.dtype == torch.float32
    assert float((out.double() - expected).norm()) <= 1e-6 * float(expected.norm())


def test_dop_leaves_its_inputs_alone():
    merged, d = noise(0, 3, 4), noise(1, 3, 4)
    before = merged.clone(), d.clone()
    for t in (1, 2):
        dop(merged, d, t=t).zero_()
    assert torch.equal(merged, before[0])
    assert torch.equal(d, before[1])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ParameterError, match=r"alpha is .*weight in \[0, 1\]"):
        dop(torch.ones(2, 2), torch.ones(2, 2), t=1, alpha=alpha)


@pytest.mark.parametrize("eps", [0.0, -1e-3, float("inf"), float("nan")])
def test_eps_outside_its_range_is_refused(eps):
    with pytest.raises(ParameterError, match=r"eps is .*finite number above 0"):
        dop(torch.ones(2, 2), torch.ones(2, 2), t=1, eps=eps)

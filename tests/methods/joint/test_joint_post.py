"""Post-processors of a merged change: subspace_boosting, svc, lines."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.joint.post_lines import lines
from merganser.methods.joint.post_subspace_boosting import subspace_boosting
from merganser.methods.joint.post_svc import svc

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])
SHAPES = [(0, 4), (4, 0), (1, 1), (16, 1), (1, 16), (5, 8), (8, 5)]
SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=25)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gap(out, expected):
    expected = torch.as_tensor(expected)
    return float((out.double() - expected).norm() / expected.norm())


def boosted_by_loops(d, beta):
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    c = next(c for c in range(len(s)) if sum(s[: c + 1]) >= beta * sum(s))
    return sum(max(s[j], s[c]) * np.outer(u[:, j], vt[j]) for j in range(len(s)))


def svc_by_loops(merged, changes, alpha):
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    out = np.zeros_like(merged)
    for r in range(len(s)):
        a = [sum(u[i, r] * merged[i, j] for i in range(len(merged))) for j in range(merged.shape[1])]
        counted = 0.0
        for d in changes:
            a_i = [sum(u[i, r] * d[i, j] for i in range(len(d))) for j in range(d.shape[1])]
            own = sum(p * q for p, q in zip(a, a_i, strict=True)) / sum(q * q for q in a_i)
            counted += max(alpha, own)
        out += len(changes) / counted * s[r] * np.outer(u[:, r], vt[r])
    return out


#: Every post-processor, called with a merged change and the changes.
CALLS = {
    "subspace_boosting": lambda merged, d: subspace_boosting(merged, beta=0.3),
    "svc": svc,
    "lines": lambda merged, d: lines(merged, depth=0.5, alpha=0.2, beta=0.6),
}
EVERY = pytest.mark.parametrize("post", CALLS.values(), ids=CALLS)


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BOTH
def test_every_shape_gives_a_finite_matrix_and_leaves_its_arguments_alone(post, shape, dtype):
    d = [noise(k, *shape, dtype=dtype) for k in range(3)]
    merged = d[0] + d[1] + d[2]
    before = [x.clone() for x in (merged, *d)]
    out = post(merged, d)
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)
    assert torch.isfinite(out).all()
    assert out.numel() == 0 or out.data_ptr() != merged.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip((merged, *d), before, strict=True))


@EVERY
@BOTH
def test_zeros_stay_zeros(post, dtype):
    zeros, d = torch.zeros(5, 8, dtype=dtype), noise(0, 2, 5, 8, dtype=dtype)
    assert torch.equal(post(zeros, d), zeros)
    assert torch.equal(post(zeros, torch.zeros_like(d)), zeros)


@EVERY
@FEW
@given(seed=SEEDS, exponent=st.integers(-40, 40))
def test_scaling_merge_and_changes_scales_the_result(post, seed, exponent):
    d, factor = noise(seed, 2, 5, 7).float(), 2.0**exponent
    torch.testing.assert_close(
        post(d.sum(0) * factor, d * factor), factor * post(d.sum(0), d), rtol=1e-4, atol=1e-5 * factor
    )


@EVERY
@BOTH
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
def test_directions_below_rounding_stay_below_rounding(post, shape, dtype):
    exact = [noise(10 * k, shape[0], 2) @ noise(10 * k + 1, 2, shape[1]) for k in range(2)]
    out = post(sum(exact).to(dtype), [x.to(dtype) for x in exact]).double()
    s = torch.linalg.svdvals(out)
    assert float(s[4] / s[0]) < (1e-6 if dtype == torch.float32 else 1e-13)
    assert float(s[3] / s[0]) > 1e-3


# subspace_boosting


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.8])
@pytest.mark.parametrize("shape", [(10, 16), (16, 10)], ids=str)
def test_boosting_equals_loops(shape, beta, dtype):
    d = noise(1, *shape, dtype=dtype)
    expected = boosted_by_loops(d.double().numpy(), beta)
    assert gap(subspace_boosting(d, beta=beta), expected) < (1e-5 if dtype == torch.float32 else 1e-10)


@BOTH
def test_boosting_nothing_changes_no_bit(dtype):
    d = noise(2, 6, 9, dtype=dtype)
    assert torch.equal(subspace_boosting(d, beta=1.0), d)


@FEW
@given(seed=SEEDS, beta=st.floats(0, 1))
def test_boosting_lowers_no_singular_value_and_raises_none_above_the_first(seed, beta):
    d = noise(seed, 6, 9)
    before, after = torch.linalg.svdvals(d), torch.linalg.svdvals(subspace_boosting(d, beta=beta))
    assert torch.all(after >= before * (1 - 1e-9))
    assert float(after[0]) == pytest.approx(float(before[0]))


@FEW
@given(seed=SEEDS, beta=st.floats(0, 1))
def test_boosting_twice_moves_no_value_that_stayed(seed, beta):
    d = noise(seed, 6, 9)
    once = torch.linalg.svdvals(subspace_boosting(d, beta=beta))
    before = torch.linalg.svdvals(d)
    c = int((before.cumsum(0) < beta * (1 - 1e-12) * before.sum()).sum())
    torch.testing.assert_close(once[: c + 1], before[: c + 1], rtol=1e-9, atol=0)
    torch.testing.assert_close(once[c:], before[c].expand(6 - c), rtol=1e-9, atol=0)


# svc


@BOTH
@pytest.mark.parametrize("alpha", [None, 0.05, 1.0])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
def test_svc_equals_loops(shape, alpha, dtype):
    d = noise(3, 3, *shape, dtype=dtype)
    merged = 0.4 * d.sum(0)
    expected = svc_by_loops(merged.double().numpy(), list(d.double().numpy()), alpha or 1 / 3)
    assert gap(svc(merged, d, alpha=alpha), expected) < (1e-5 if dtype == torch.float32 else 1e-10)


@BOTH
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.6])
def test_svc_undoes_what_copies_have_added_up(factor, dtype):
    one = noise(4, 6, 9, dtype=dtype)
    torch.testing.assert_close(svc(factor * one, [one] * 3), one, rtol=1e-4, atol=1e-5)


def test_svc_of_changes_that_share_nothing_strengthens_each():
    """s is 1 for the own direction and 0, hence alpha, for the K - 1 others."""
    d = torch.zeros(2, 3, 4, dtype=torch.float64)
    d[0, 0, 0], d[1, 1, 1] = 2.0, 3.0
    torch.testing.assert_close(svc(d.sum(0), d), d.sum(0) * 2 / 1.5)
    torch.testing.assert_close(svc(d.sum(0), d, alpha=1.0), d.sum(0))


@BOTH
def test_a_response_of_the_size_of_rounding_does_not_decide(dtype):
    """Of a model that has nothing along u_r, noise would give any s, however large."""
    q, p = (torch.linalg.qr(noise(seed, n, n)).Q for seed, n in ((5, 12), (6, 15)))
    strength = torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64)
    d = torch.stack([q[:, :3] * strength @ p[:, :3].T, q[:, 3:6] * (strength - 0.5) @ p[:, 3:6].T])
    out = svc(d.sum(0).to(dtype), d.to(dtype))
    assert gap(out, d.sum(0) * 2 / (1 + 0.5)) < (1e-5 if dtype == torch.float32 else 1e-10)


@FEW
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_svc_does_not_know_the_order(seed, order):
    d = noise(seed, 3, 5, 7)
    torch.testing.assert_close(svc(d.sum(0), d[order]), svc(d.sum(0), d), rtol=1e-7, atol=1e-10)


def test_svc_takes_a_stack_or_a_list():
    d = noise(8, 3, 5, 7)
    assert torch.equal(svc(d.sum(0), d), svc(d.sum(0), list(d)))


# lines


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize(("depth", "factor"), [(0.0, 0.25), (0.5, 0.75), (1.0, 1.25)])
def test_lines_scales_by_depth(shape, depth, factor, dtype):
    d = noise(9, *shape, dtype=dtype)
    assert torch.equal(lines(d, depth=depth, alpha=0.25, beta=1.0), d * factor)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: subspace_boosting(d, beta=1.5), "beta is 1.5"),
        (lambda d: subspace_boosting(d, beta=-0.1), "beta is -0.1"),
        (lambda d: svc(d, [d], alpha=0.0), "alpha is 0"),
        (lambda d: svc(d, [d], alpha=float("nan")), "alpha is nan"),
        (lambda d: lines(d, depth=3, alpha=1, beta=0), "depth is 3"),
        (lambda d: lines(d, depth=0.5, alpha=float("inf"), beta=0), "alpha is inf"),
        (lambda d: lines(d, depth=0.5, alpha=1, beta=float("nan")), "beta is nan"),
    ],
)
def test_settings_out_of_range_are_refused(call, words):
    with pytest.raises(ParameterError, match=words):
        call(noise(0, 4, 5))

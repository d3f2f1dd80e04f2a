import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.tsv_m import tsv_m, tsv_m_fold

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3), (24, 10), (10, 24)]


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(seed, n):
    return torch.linalg.qr(noise(seed, n, n)).Q


def fold(changes):
    (m, n), dtype = changes[0].shape, changes[0].dtype
    p = min(m, n)
    state = torch.zeros(m, p, dtype=dtype), torch.zeros(p, dtype=dtype), torch.zeros(n, p, dtype=dtype)
    for t, d in enumerate(changes, start=1):
        state = tsv_m_fold(*state, d, t=t)
    return state


def joint(changes, alpha=1.0):
    k = min(changes[0].shape) // len(changes)
    parts = [np.linalg.svd(d.double().numpy(), full_matrices=False) for d in changes]
    sides = [np.hstack([u[:, :k] for u, _, _ in parts]), np.hstack([vt[:k].T for _, _, vt in parts])]
    sigma = np.hstack([s[:k] for _, s, _ in parts])
    white = [p @ qt for p, _, qt in (np.linalg.svd(x, full_matrices=False) for x in sides)]
    return torch.from_numpy(alpha * white[0] * sigma @ white[1].T)


def gap(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_nested_tsv_m_equals_joint(shape, dtype, count):
    count = min(count, *shape)
    changes = [noise(i, *shape, dtype=dtype) for i in range(count)]
    out = tsv_m(*fold(changes), alpha=0.7)
    assert out.dtype == dtype
    assert out.shape == torch.Size(shape)
    assert gap(out, joint(changes, alpha=0.7)) <= (1e-5 if dtype == torch.float32 else 1e-10)


def test_every_arrival_of_a_long_sequence_equals_joint():
    changes = [noise(i, 13, 17) for i in range(13)]
    for t in range(1, 14):
        assert gap(tsv_m(*fold(changes[:t])), joint(changes[:t])) <= 1e-10


def test_state_holds_equal_blocks_in_order_of_arrival():
    changes = [noise(i, 11, 8) for i in range(3)]
    u, s, v = fold(changes)
    assert (u.shape, s.shape, v.shape) == ((11, 8), (8,), (8, 8))
    for i, d in enumerate(changes):
        a, sigma, bt = np.linalg.svd(d.numpy(), full_matrices=False)
        block = slice(2 * i, 2 * i + 2)
        np.testing.assert_allclose(s[block].numpy(), sigma[:2], rtol=1e-12)
        product = (u[:, block] * s[block] @ v[:, block].T).numpy()
        np.testing.assert_allclose(product, a[:, :2] * sigma[:2] @ bt[:2], atol=1e-12)
    assert not any(x[..., 6:].any() for x in (u, s, v))


def test_order_of_arrival_does_not_matter():
    changes = [noise(i, 9, 12) for i in range(4)]
    torch.testing.assert_close(tsv_m(*fold(changes)), tsv_m(*fold(changes[::-1])), rtol=0, atol=1e-12)


def test_one_expert_is_given_back():
    d = noise(0, 6, 4)
    torch.testing.assert_close(tsv_m(*fold([d])), d, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_of_low_rank_in_separate_directions_are_added(dtype):
    q, r = rotation(0, 9), rotation(1, 12)
    changes = [(3.0 * q[:, i : i + 1] @ r[i : i + 1]).to(dtype) for i in range(3)]
    torch.testing.assert_close(tsv_m(*fold(changes)), sum(changes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_experts_give_one_of_them_cut_to_its_share(dtype):
    d = noise(0, 6, 8, dtype=dtype)
    u, s, vt = np.linalg.svd(d.double().numpy(), full_matrices=False)
    assert gap(tsv_m(*fold([d, d])), torch.from_numpy(u[:, :3] * s[:3] @ vt[:3])) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_that_changed_nothing_only_takes_room(dtype):
    d = noise(0, 6, 8, dtype=dtype)
    u, s, vt = np.linalg.svd(d.double().numpy(), full_matrices=False)
    expected = torch.from_numpy(u[:, :3] * s[:3] @ vt[:3])
    zero = torch.zeros_like(d)
    assert gap(tsv_m(*fold([d, zero])), expected) <= 1e-6
    assert gap(tsv_m(*fold([zero, d])), expected) <= 1e-6


def test_directions_below_rounding_do_not_reach_the_whitening():
    # Rank 1 of room for 4: the other triplets of an SVD routine are arbitrary, and must not matter.
    changes = [noise(i, 8, 1) @ noise(i + 9, 1, 10) for i in range(2)]
    rank_one = [np.linalg.svd(d.numpy(), full_matrices=False) for d in changes]
    sides = [np.hstack([u[:, :1] for u, _, _ in rank_one]), np.hstack([vt[:1].T for _, _, vt in rank_one])]
    white = [p @ qt for p, _, qt in (np.linalg.svd(x, full_matrices=False) for x in sides)]
    expected = torch.from_numpy(white[0] * np.hstack([s[:1] for _, s, _ in rank_one]) @ white[1].T)
    assert gap(tsv_m(*fold(changes)), expected) <= 1e-12
    assert gap(tsv_m(*fold([d.float() for d in changes])), expected) <= 1e-5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), m=st.integers(3, 8), n=st.integers(3, 8), factor=st.sampled_from([-64.0, 1e-6, 3.0]))
def test_tsv_m_commutes_with_scaling_transposition_and_rotation(seed, m, n, factor):
    changes = [noise(seed + i, m, n) for i in range(3)]
    q, r = rotation(seed + 5, m), rotation(seed + 6, n)
    out = tsv_m(*fold(changes))
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(tsv_m(*fold([factor * d for d in changes])) / factor, out, **close)
    torch.testing.assert_close(tsv_m(*fold([d.T for d in changes])).T, out, **close)
    torch.testing.assert_close(tsv_m(*fold([q @ d @ r for d in changes])), q @ out @ r, **close)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tsv_m_of_zeros_is_zero(shape, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    out = tsv_m(*fold([zero] * max(1, min(*shape, 3))))
    assert out.dtype == dtype
    assert torch.equal(out, zero)


def test_an_empty_matrix_holds_any_number_of_experts():
    assert tsv_m(*fold([torch.zeros(0, 4)] * 3)).shape == (0, 4)


def test_fold_and_finaliser_leave_their_inputs_alone():
    state, d = fold([noise(0, 4, 5)]), noise(1, 4, 5)
    before = [x.clone() for x in (*state, d)]
    for out in (*tsv_m_fold(*state, d, t=2), tsv_m(*state)):
        out.zero_()
    assert all(torch.equal(x, y) for x, y in zip((*state, d), before, strict=True))


def test_more_experts_than_the_matrix_holds_are_refused():
    changes = [noise(i, 3, 7) for i in range(4)]
    state = fold(changes[:3])
    with pytest.raises(ParameterError, match=r"t is 4; this matrix of shape \(3, 7\) holds at most 3 experts"):
        tsv_m_fold(*state, changes[3], t=4)
    with pytest.raises(ParameterError, match=r"t is 0; .* so t is in \[1, 3\]"):
        tsv_m_fold(*state, changes[3], t=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ParameterError, match=r"alpha is .*finite number above 0"):
        tsv_m(torch.ones(2, 1), torch.ones(1), torch.ones(1, 1), alpha=alpha)

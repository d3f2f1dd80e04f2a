"""Rules for matrices that go through the singular directions of each change: iso_cts, star, cart, dc."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.iso_c import iso_c
from merganser.methods.joint._spectrum import whitened
from merganser.methods.joint.cart import cart
from merganser.methods.joint.dc import dc
from merganser.methods.joint.iso_cts import iso_cts
from merganser.methods.joint.star import star
from spectral_helpers import BOTH, bound, gap, noise, polar, svd

METHODS = {"iso_cts": iso_cts, "star": star, "cart": cart, "dc": dc}
SHAPES = [(0, 4), (4, 0), (1, 1), (16, 1), (1, 16), (5, 8), (8, 5), (24, 10)]
EVERY = pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=25)


def low_rank(seed, m, n, rank):
    return noise(seed, m, rank) @ noise(seed + 1, rank, n)


def iso_cts_by_numpy(d, scale, fraction):
    models, (m, n) = len(d), d[0].shape
    p = min(m, n)
    own = round((p - int(p * fraction)) / models)
    u, s, vt = (f[..., :] for f in svd(sum(d)))
    common = p - own * models
    lefts, sigmas, rights = [u[:, :common]], list(s[:common]), [vt[:common].T]
    for d_k in d:
        u_k, s_k, vt_k = svd(d_k - lefts[0] @ lefts[0].T @ d_k)
        lefts.append(u_k[:, :own])
        sigmas.extend(s_k[:own])
        rights.append(vt_k[:own].T)
    assert len(sigmas) == p
    return scale * sum(sigmas) / p * polar(lefts) @ polar(rights).T


def star_by_numpy(d, eta):
    total = np.zeros_like(d[0])
    for d_k in d:
        u, s, vt = svd(d_k)
        r = next(r for r in range(1, len(s) + 1) if sum(s[:r]) >= eta * sum(s))
        for j in range(r):
            total += s[j] * sum(s) / sum(s[:r]) * np.outer(u[:, j], vt[j]) / len(d)
    return total


def cart_by_numpy(d, scale, r):
    mean = sum(d) / len(d)
    total = mean.copy()
    for d_k in d:
        u, s, vt = svd(d_k - mean)
        total += scale * sum(s[j] * np.outer(u[:, j], vt[j]) for j in range(r))
    return total


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 3, 12])
@BOTH
def test_every_shape_gives_a_finite_matrix_and_leaves_the_changes_alone(merge, shape, models, dtype):
    d = [noise(k, *shape, dtype=dtype) for k in range(models)]
    before = [x.clone() for x in d]
    out = merge(d, weight=[1.0] * models)
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)
    assert torch.isfinite(out).all()
    assert out.numel() == 0 or out.abs().max() > 0
    assert all(torch.equal(x, y) for x, y in zip(d, before, strict=True))


@EVERY
@BOTH
def test_zeros_give_zeros_and_a_zero_change_is_no_trouble(merge, dtype):
    d = noise(0, 3, 6, 9, dtype=dtype)
    assert torch.equal(merge(torch.zeros_like(d), weight=[1.0] * 3), torch.zeros(6, 9, dtype=dtype))
    d[1] = 0
    out = merge(d, weight=[1.0] * 3)
    assert torch.isfinite(out).all()
    assert out.abs().max() > 0


@EVERY
@BOTH
def test_a_stack_and_a_list_are_one_and_weights_multiply_the_changes(merge, dtype):
    d = noise(3, 3, 7, 10, dtype=dtype)
    w = [0.5, 2.0, -1.0]
    out = merge(d, weight=torch.tensor(w))
    assert torch.equal(out, merge(list(d), weight=w))
    weighted = merge(torch.stack([x * f for x, f in zip(d, w, strict=True)]), weight=[1.0] * 3)
    torch.testing.assert_close(out, weighted, rtol=1e-5, atol=1e-6)


@EVERY
@FEW
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_the_order_of_the_models_does_not_matter(merge, seed, order):
    d, w = noise(seed, 3, 6, 8), torch.tensor([1.0, 0.5, 2.0])
    torch.testing.assert_close(merge(d[order], weight=w[order]), merge(d, weight=w), rtol=1e-6, atol=1e-8)


@EVERY
@FEW
@given(seed=SEEDS, exponent=st.integers(-40, 40))
def test_scaling_every_change_scales_the_merge(merge, seed, exponent):
    d, factor = noise(seed, 2, 6, 5).float(), 2.0**exponent
    torch.testing.assert_close(
        merge(d * factor, weight=[1, 1]), factor * merge(d, weight=[1, 1]), rtol=1e-4, atol=1e-5 * factor
    )


@EVERY
@FEW
@given(seed=SEEDS)
def test_rotating_inputs_and_outputs_rotates_the_merge(merge, seed):
    d, q, r = noise(seed, 3, 6, 7), *(torch.linalg.qr(noise(seed + k, n, n)).Q for k, n in ((1, 6), (2, 7)))
    torch.testing.assert_close(merge(q @ d @ r, weight=[1] * 3), q @ merge(d, weight=[1] * 3) @ r, rtol=1e-6, atol=1e-8)


@EVERY
@BOTH
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
def test_directions_below_rounding_do_not_blow_up(merge, shape, dtype):
    """Changes of rank 2: whatever stands beside them in the merge has the size of rounding."""
    exact = [low_rank(10 * k, *shape, 2) for k in range(3)]
    out = merge([x.to(dtype) for x in exact], weight=[1.0] * 3).double()
    u, s, _ = torch.linalg.svd(torch.cat(exact, dim=1), full_matrices=False)
    left = u[:, : int((s > 1e-9 * s[0]).sum())]
    _, s, vh = torch.linalg.svd(torch.cat(exact, dim=0), full_matrices=False)
    right = vh[: int((s > 1e-9 * s[0]).sum())].T
    inside = left @ (left.T @ out @ right) @ right.T
    assert float((out - inside).norm() / out.norm()) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert int(torch.linalg.matrix_rank(out, rtol=1e-4)) <= 6


@EVERY
@BOTH
def test_noise_of_the_size_of_rounding_hardly_moves_the_merge(merge, dtype):
    eps = torch.finfo(dtype).eps
    d = torch.stack([low_rank(10 * k, 20, 16, 3) for k in range(2)])
    moved = d + 0.5 * eps * d.abs().amax() * noise(5, 2, 20, 16).clamp(-1, 1)
    out, near = (merge(x.to(dtype), weight=[1.0, 1.0]) for x in (d, moved))
    assert gap(near, out.double()) < 1e4 * eps


# iso_cts


@BOTH
@pytest.mark.parametrize("shape", [(10, 24), (24, 10), (12, 12)], ids=str)
@pytest.mark.parametrize(("models", "fraction"), [(2, 0.8), (3, 0.5), (2, 0.0), (4, 0.3)])
def test_iso_cts_equals_numpy(shape, models, fraction, dtype):
    d = noise(20, models, *shape, dtype=dtype)
    out = iso_cts(d, weight=[1] * models, scale=1.3, common_space_fraction=fraction)
    assert gap(out, iso_cts_by_numpy(list(d.double().numpy()), 1.3, fraction)) < bound(dtype)


@BOTH
@pytest.mark.parametrize(("models", "fraction"), [(3, 1.0), (20, 0.8), (1, 1.0)])
def test_without_room_for_own_directions_iso_cts_is_iso_c(models, fraction, dtype):
    d = noise(21, models, 8, 11, dtype=dtype)
    out = iso_cts(d, weight=[1] * models, scale=1.2, common_space_fraction=fraction)
    torch.testing.assert_close(out, iso_c(d.sum(0), scale=1.2), rtol=1e-4, atol=1e-5)


def test_iso_cts_never_gives_away_more_directions_than_there_are():
    d = noise(22, 9, 5, 5)
    out = iso_cts(d, weight=[1] * 9, common_space_fraction=0.0)
    torch.testing.assert_close(out, iso_c(d.sum(0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iso_cts_of_full_rank_is_isotropic(dtype):
    s = torch.linalg.svdvals(iso_cts(noise(23, 3, 20, 15, dtype=dtype), weight=[1] * 3).double())
    torch.testing.assert_close(s, s.mean().expand(15), rtol=1e-5, atol=0)


# star


@BOTH
@pytest.mark.parametrize("shape", [(10, 24), (24, 10)], ids=str)
@pytest.mark.parametrize("eta", [0.05, 0.4, 0.9, 1.0])
def test_star_equals_numpy(shape, eta, dtype):
    d = noise(30, 3, *shape, dtype=dtype)
    assert gap(star(d, weight=[1] * 3, eta=eta), star_by_numpy(list(d.double().numpy()), eta)) < bound(dtype)


@FEW
@given(seed=SEEDS, eta=st.floats(0.01, 1))
def test_star_keeps_the_nuclear_norm_of_one_change(seed, eta):
    d = noise(seed, 1, 6, 9)
    nuclear = torch.linalg.matrix_norm(star(d, weight=[1], eta=eta), "nuc")
    torch.testing.assert_close(nuclear, torch.linalg.matrix_norm(d[0], "nuc"), rtol=1e-9, atol=0)


@BOTH
def test_star_of_everything_is_the_mean(dtype):
    d = noise(31, 4, 6, 9, dtype=dtype)
    torch.testing.assert_close(star(d, weight=[1] * 4, eta=1.0), d.mean(0), rtol=1e-5, atol=1e-6)


def test_star_meets_a_share_at_equality():
    d = torch.diag(torch.full((10,), 0.7, dtype=torch.float64))[None]
    for kept in range(1, 11):
        assert int(torch.linalg.matrix_rank(star(d, weight=[1], eta=kept / 10))) == kept


def test_star_takes_one_share_a_model():
    d = noise(32, 2, 5, 5)
    both = star(d, weight=[1, 1], eta=[0.3, 0.8])
    alone = [star(d[k : k + 1], weight=[1], eta=e) for k, e in enumerate((0.3, 0.8))]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


# cart


@BOTH
@pytest.mark.parametrize("shape", [(10, 25), (25, 10)], ids=str)
@pytest.mark.parametrize(("rank", "r"), [(0.08, 1), (0.3, 3), (0.7, 7)])
def test_cart_equals_numpy(shape, rank, r, dtype):
    d = noise(40, 4, *shape, dtype=dtype)
    out = cart(d, weight=[1] * 4, scale=0.6, rank=rank)
    assert gap(out, cart_by_numpy(list(d.double().numpy()), 0.6, r)) < bound(dtype)


@BOTH
@pytest.mark.parametrize("setting", [{"rank": 1.0}, {"scale": 0.0}], ids=str)
def test_cart_of_everything_or_nothing_is_the_mean(setting, dtype):
    d = noise(41, 4, 6, 9, dtype=dtype)
    torch.testing.assert_close(cart(d, weight=[1] * 4, **setting), d.mean(0), rtol=1e-5, atol=1e-6)


@BOTH
def test_cart_of_copies_is_one_of_them(dtype):
    d = noise(42, 6, 9, dtype=dtype).expand(3, 6, 9)
    torch.testing.assert_close(cart(d, weight=[1] * 3), d[0], rtol=1e-6, atol=1e-7)


# all


@BOTH
def test_whitened_columns_are_orthonormal_and_the_nearest(dtype):
    b = torch.nn.functional.normalize(noise(60, 9, 5), dim=0)
    w = whitened([b[:, :2], b[:, 2:]], dtype)
    torch.testing.assert_close(w.T @ w, torch.eye(5).double(), rtol=0, atol=1e-5)
    p, _, qt = svd(b)
    torch.testing.assert_close(w, torch.as_tensor(p @ qt), rtol=1e-5, atol=1e-5)


def test_whitening_two_equal_columns_shares_the_direction():
    b = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(whitened([b, b], torch.float64), torch.tensor([[1.0, 1.0], [0, 0]]).double() / 2**0.5)


def test_columns_that_differ_by_rounding_share_the_direction_too():
    b = torch.nn.functional.normalize(noise(61, 9, 1), dim=0)
    near = b + 1e-8 * noise(62, 9, 1)
    torch.testing.assert_close(whitened([b, near], torch.float32), torch.cat([b, b], dim=1) / 2**0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("merge", "setting", "words"),
    [
        (iso_cts, {"scale": 0.0}, "scale is 0"),
        (iso_cts, {"scale": float("inf")}, "scale is inf"),
        (iso_cts, {"common_space_fraction": 80}, "common_space_fraction is 80"),
        (star, {"eta": 40.0}, "eta is 40.0; .* not a percentage"),
        (star, {"eta": 0.0}, "eta is 0"),
        (star, {"eta": [0.4, 0.4, 0.4]}, "3 values are given for 2 models"),
        (cart, {"rank": 8.0}, "rank is 8"),
        (cart, {"rank": 0.0}, "rank is 0"),
        (cart, {"scale": float("nan")}, "scale is nan"),
        (dc, {"density": 20.0}, "density is 20.0; .* not a percentage"),
        (dc, {"density": 0.0}, "density is 0"),
        (dc, {"smoothing": "avg"}, "smoothing is 'avg'"),
        (dc, {"rho": 0.5}, "rho is 0.5"),
        (dc, {"scale": -1.0}, "scale is -1"),
    ],
)
def test_settings_out_of_range_are_refused(merge, setting, words):
    with pytest.raises(ParameterError, match=words):
        merge(noise(0, 2, 4, 5), weight=[1, 1], **setting)


@EVERY
@pytest.mark.parametrize("weight", [[1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_no_numbers_are_refused(merge, weight):
    with pytest.raises(ParameterError, match=r"weight is|values are given"):
        merge(noise(0, 2, 4, 5), weight=weight)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.iso_c import iso_c

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3), (30, 8), (8, 30)]


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(seed, n):
    return torch.linalg.qr(noise(seed, n, n)).Q


def by_full_svd(s, scale, rank):
    u, sigma, vt = np.linalg.svd(s.double().numpy(), full_matrices=False)
    return torch.from_numpy(scale * sigma.mean() * u[:, :rank] @ vt[:rank])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iso_c_equals_a_full_svd(shape, dtype):
    s = noise(0, *shape, dtype=dtype)
    out = iso_c(s, scale=1.3)
    expected = by_full_svd(s, 1.3, min(shape))
    assert out.dtype == dtype
    assert out.shape == s.shape
    tolerance = 2e-7 if dtype == torch.float32 else 1e-13
    assert float((out.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("decay", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
def test_gram_route_of_float32_agrees_with_the_svd_of_float64(shape, decay):
    m, n = shape
    spectrum = torch.arange(1, 13, dtype=torch.float64) ** -decay
    s = (rotation(0, m)[:, :12] * spectrum @ rotation(1, n)[:12]).float()
    exact = iso_c(s.double())
    assert float((iso_c(s).double() - exact).norm()) <= 1e-6 * float(exact.norm())


def test_all_singular_values_become_scale_times_their_mean():
    s = noise(0, 6, 9)
    sigma = np.linalg.svd(iso_c(s, scale=1.5).numpy(), compute_uv=False)
    expected = 1.5 * np.linalg.svd(s.numpy(), compute_uv=False).mean()
    np.testing.assert_allclose(sigma, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10, 6), (6, 10), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3])
def test_directions_without_energy_stay_empty(shape, dtype, rank):
    m, n = shape
    s = (noise(0, m, rank) @ noise(1, rank, n)).to(dtype)
    expected = by_full_svd(s, 1.5, rank)
    out = iso_c(s).double()
    assert float((out - expected).norm()) <= (1e-6 if dtype == torch.float32 else 1e-12) * float(expected.norm())
    assert np.linalg.matrix_rank(out.numpy(), tol=1e-4 * float(out.norm())) == rank


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iso_c_of_zeros_is_zero(shape, dtype):
    out = iso_c(torch.zeros(shape, dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out, torch.zeros(shape, dtype=dtype))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), m=st.integers(1, 7), n=st.integers(1, 7), factor=st.sampled_from([-64.0, 1e-6, 3.0]))
def test_iso_c_commutes_with_scaling_transposition_and_rotation(seed, m, n, factor):
    s, q, r = noise(seed, m, n), rotation(seed + 1, m), rotation(seed + 2, n)
    out = iso_c(s)
    close = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(iso_c(factor * s) / factor, out, **close)
    torch.testing.assert_close(iso_c(s.T).T, out, **close)
    torch.testing.assert_close(iso_c(q @ s @ r), q @ out @ r, **close)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_float32_of_any_size_keeps_its_directions(size):
    s = noise(0, 5, 9, dtype=torch.float32)
    torch.testing.assert_close(iso_c(s * size) / size, iso_c(s), rtol=1e-4, atol=1e-5)


def test_iso_c_leaves_its_input_alone():
    s = noise(0, 3, 4)
    before = s.clone()
    iso_c(s).zero_()
    assert torch.equal(s, before)


@pytest.mark.parametrize("scale", [0.0, -1.5, float("inf"), float("nan")])
def test_scale_outside_its_range_is_refused(scale):
    with pytest.raises(ParameterError, match=r"scale is .*finite number above 0"):
        iso_c(torch.ones(2, 2), scale=scale)

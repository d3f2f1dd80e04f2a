"""DC-Merge and whitening: by loops, and in the cases that are known."""

import numpy as np
import pytest
import torch

from merganser.methods.joint.dc import dc
from spectral_helpers import BOTH, bound, gap, noise, polar, svd


def dc_by_loops(d, smoothing, rho, density, scale):
    models, r = len(d), min(d[0].shape) // len(d)
    parts = [svd(d_k) for d_k in d]
    strengths = []
    for _, s, _ in parts:
        kept = s[:r]
        if smoothing == "average":
            kept = np.full(r, kept.sum() / r)
        elif smoothing == "linear":
            line = np.linspace(min(rho, kept[0] / kept[-1]), 1, r)
            kept = kept.sum() * line / line.sum()
        strengths.append(kept)
    frame_u = polar([u[:, :r] for u, _, _ in parts])
    frame_v = polar([vt[:r].T for _, _, vt in parts])
    inside = []
    for (u, _, vt), s in zip(parts, strengths, strict=True):
        m_k = frame_u.T @ (u[:, :r] * s @ vt[:r]) @ frame_v
        count = max(r, int(density * m_k.size))
        least = sorted(abs(m_k).ravel())[-count]
        inside.append([[v if abs(v) >= least else 0.0 for v in row] for row in m_k])
    merged = np.zeros((models * r, models * r))
    for i in range(models * r):
        for j in range(models * r):
            values = [m_k[i][j] for m_k in inside]
            agreeing = [v for v in values if v * sum(values) > 0]
            if i // r == j // r and agreeing:
                merged[i, j] = sum(agreeing) / len(agreeing)
    return scale * frame_u @ merged @ frame_v.T


# dc


@BOTH
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize("smoothing", ["average", "linear", "none"])
@pytest.mark.parametrize(("models", "density"), [(2, 0.1), (3, 1e-3), (4, 1.0)])
def test_dc_equals_loops(shape, smoothing, models, density, dtype):
    d = noise(50, models, *shape, dtype=dtype)
    out = dc(d, weight=[1] * models, smoothing=smoothing, rho=1.5, density=density, scale=0.8)
    expected = dc_by_loops(list(d.double().numpy()), smoothing, 1.5, density, 0.8)
    assert gap(out, expected) < 5 * bound(dtype)


@BOTH
def test_dc_of_one_model_without_smoothing_is_that_model(dtype):
    d = noise(51, 1, 6, 9, dtype=dtype)
    torch.testing.assert_close(dc(d, weight=[1], smoothing="none"), d[0], rtol=1e-4, atol=1e-5)


def test_dc_of_changes_that_share_no_direction_is_their_sum():
    d = torch.zeros(2, 4, 6, dtype=torch.float64)
    d[0, 0, 0], d[0, 1, 1], d[1, 2, 2], d[1, 3, 3] = 3.0, 2.0, 5.0, -1.0
    torch.testing.assert_close(dc(d, weight=[1, 1], smoothing="none"), d.sum(0))
    torch.testing.assert_close(
        dc(d, weight=[1, 1]).diagonal(), torch.tensor([2.5, 2.5, 3.0, -3.0], dtype=torch.float64)
    )
    torch.testing.assert_close(dc(d, weight=[1, 1], smoothing="linear", rho=1.0), dc(d, weight=[1, 1]))


@BOTH
@pytest.mark.parametrize("models", [2, 3, 5])
def test_dc_of_copies_is_a_share_of_what_each_keeps(models, dtype):
    """All entries of M_k are equal; rounding must not choose among them, or the merge would be nothing."""
    d = noise(53, 10, 8, dtype=dtype)
    u, s, vh = torch.linalg.svd(d.double(), full_matrices=False)
    r = 8 // models
    expected = s[:r].mean() * u[:, :r] @ vh[:r] / models
    torch.testing.assert_close(dc([d] * models, weight=[1] * models).double(), expected, rtol=1e-4, atol=1e-5)


def test_linear_smoothing_never_steepens_a_spectrum():
    d = torch.diag(torch.tensor([3.0, 2.5, 2.0], dtype=torch.float64))[None]
    torch.testing.assert_close(dc(d, weight=[1], smoothing="linear", rho=100.0, density=1.0), d[0])


def test_dc_keeps_as_many_entries_as_a_change_has_directions():
    """A share of a thousandth of 8 x 8 would be none of them."""
    s = torch.linalg.svdvals(dc(noise(52, 2, 8, 8), weight=[1, 1]))
    assert int((s > 1e-9).sum()) == 8

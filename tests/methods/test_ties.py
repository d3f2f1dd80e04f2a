import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.ties import ties

SHAPES = [(), (1,), (0, 4), (16, 1), (3, 5), (2, 3, 4)]


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trimmed(values, density):
    k = max(1, round(density * len(values)))
    kept = set(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])
    return [v if i in kept else 0.0 for i, v in enumerate(values)]


def plain_loops(merged, d, scale, density):
    old = merged.double().reshape(-1).tolist()
    a, b = trimmed(old, density), trimmed(d.double().reshape(-1).tolist(), density)
    out = []
    for before, x, y in zip(old, a, b, strict=True):
        vote = x + y
        agree = [z for z in (x, y) if z * vote > 0]
        out.append(before + scale * (sum(agree) / len(agree) if agree else 0.0))
    return torch.tensor(out, dtype=torch.float64).reshape(merged.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_equals_plain_loops(shape, density, dtype):
    merged, d = noise(0, *shape, dtype=dtype), noise(1, *shape, dtype=dtype)
    out = ties(merged, d, t=2, scale=0.3, density=density)
    assert out.shape == d.shape
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(out.double(), plain_loops(merged, d, 0.3, density), rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12),
    density=st.floats(0.01, 1.0),
)
def test_ties_equals_plain_loops_where_magnitudes_are_tied(values, density):
    merged, d = torch.tensor(values, dtype=torch.float64).T
    expected = plain_loops(merged, d, 0.5, density)
    torch.testing.assert_close(ties(merged, d, t=3, scale=0.5, density=density), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_change_is_scaled_and_not_trimmed(shape):
    d = noise(0, *shape)
    assert torch.equal(ties(torch.zeros_like(d), d, t=1, scale=0.25), 0.25 * d)


def test_density_keeps_exactly_its_share():
    d = noise(0, 10, 10)
    for density, kept in ((0.2, 20), (0.07, 7), (0.123, 12), (1e-6, 1), (1.0, 100)):
        assert int(ties(torch.zeros_like(d), d, t=2, density=density).count_nonzero()) == kept


def test_equal_magnitudes_are_kept_by_index():
    d = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5])
    out = ties(torch.zeros(5), d, t=2, scale=1.0, density=0.4)
    assert torch.equal(out, torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]))


def test_votes_that_cancel_add_nothing():
    merged = torch.tensor([2.0, -1.0])
    assert torch.equal(ties(merged, -merged, t=2, density=1.0), merged)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_ties_scales_with_the_changes(seed, factor):
    merged, d = noise(seed, 13), noise(seed + 1, 13)
    assert torch.equal(ties(factor * merged, factor * d, t=2), factor * ties(merged, d, t=2))


def test_ties_reads_transposed_tensors_in_their_own_order():
    merged, d = noise(0, 3, 5).T, noise(1, 3, 5).T
    assert torch.equal(ties(merged, d, t=2), ties(merged.contiguous(), d.contiguous(), t=2))


def test_ties_of_zeros_is_zero():
    zero = torch.zeros(4, 4)
    assert torch.equal(ties(zero, zero, t=2), zero)


def test_ties_leaves_its_inputs_alone():
    merged, d = noise(0, 5), noise(1, 5)
    before = merged.clone(), d.clone()
    for density in (0.2, 1.0):
        ties(merged, d, t=2, density=density).zero_()
    ties(merged, d, t=1, scale=1.0).zero_()
    assert torch.equal(merged, before[0])
    assert torch.equal(d, before[1])


@pytest.mark.parametrize("density", [0.0, -0.1, 20, float("nan")])
def test_density_outside_its_range_is_refused(density):
    with pytest.raises(ParameterError, match=r"density is .*fraction in \(0, 1\], not a percentage"):
        ties(torch.zeros(2), torch.ones(2), t=1, density=density)


@pytest.mark.parametrize("scale", [0.0, -0.3, float("inf"), float("nan")])
def test_scale_outside_its_range_is_refused(scale):
    with pytest.raises(ParameterError, match=r"scale is .*finite number above 0"):
        ties(torch.zeros(2), torch.ones(2), t=1, scale=scale)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import (
    BOTH_DTYPES,
    SHAPES,
    check_elementwise,
    close,
    flat,
    masked,
    noise,
    plain_election,
    plain_sum,
    tensor,
    uniform,
)

from merganser.errors import ParameterError
from merganser.methods.joint.dare import dare_linear, dare_mask, dare_ties

WEIGHT = [0.7, 1.0, 0.4]
DENSITIES = (0.5, 1.0, 0.3)


def plain_dare(d, u, density, rescale="share"):
    keep = [[v < p for v in row] for row, p in zip(flat(u), density, strict=True)]
    rows = masked(flat(d), keep)
    if rescale == "share":
        return [[v / p for v in row] for row, p in zip(rows, density, strict=True)]
    if rescale == "l1":
        norms = [(sum(map(abs, old)), sum(map(abs, new))) for old, new in zip(flat(d), rows, strict=True)]
        return [[v * old / new if new else 0.0 for v in row] for row, (old, new) in zip(rows, norms, strict=True)]
    return rows


def stretch_of(d, mask):
    size = [x.abs() for x in d]
    factors = [float(x.sum() / (x * m).sum()) if (x * m).any() else 1.0 for x, m in zip(size, mask, strict=True)]
    return torch.tensor(factors, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", ["share", "l1", "none"])
def test_dare_equals_plain_loops(shape, dtype, normalize, rescale):
    d, u = noise(0, 3, *shape, dtype=dtype), uniform(1, 3, *shape)
    settings = {"normalize": normalize, "scale": 0.6}
    rows = plain_dare(d, u, DENSITIES, rescale)
    stretch = stretch_of(d.double(), dare_mask(u, density=DENSITIES))
    given_ = {"weight": WEIGHT, "u": u, "density": DENSITIES, "rescale": rescale, "stretch": stretch}
    close(dare_linear(d, **given_, **settings), tensor(plain_sum(rows, WEIGHT, **settings), shape), dtype)
    close(dare_ties(d, **given_, **settings), tensor(plain_election(rows, WEIGHT, **settings), shape), dtype)


def test_dare_is_unbiased():
    d = torch.tensor([[1.0, -2.0, 3.0]]).repeat_interleave(20000, dim=1)
    out = dare_linear(d, weight=[1.0], u=uniform(0, *d.shape), density=0.3).reshape(3, -1)
    # The mean of 20000 draws of 1/p Bernoulli(p) has a standard deviation of sqrt((1 - p) / p / 20000) = 0.011.
    torch.testing.assert_close(out.mean(1), torch.tensor([1.0, -2.0, 3.0]), rtol=0.05, atol=0)
    assert abs(float((out != 0).double().mean()) - 0.3) < 0.01


def test_rescale_divides_by_the_share_and_does_not_match_a_norm():
    d, u = torch.tensor([[2.0, 4.0, 6.0]]), torch.tensor([[0.1, 0.9, 0.9]])
    assert torch.equal(dare_linear(d, weight=[1.0], u=u, density=0.5), torch.tensor([4.0, 0.0, 0.0]))
    stretch = torch.tensor([6.0])
    out = dare_linear(d, weight=[1.0], u=u, density=0.5, rescale="l1", stretch=stretch)
    assert torch.equal(out, torch.tensor([12.0, 0.0, 0.0]))
    assert torch.equal(dare_linear(d, weight=[1.0], u=u, density=0.5, rescale="none"), torch.tensor([2.0, 0.0, 0.0]))


def test_whole_density_drops_nothing():
    d = noise(0, 2, 30, dtype=torch.float32)
    u = torch.full((2, 30), 1 - 2**-24)
    assert torch.equal(dare_linear(d, weight=[1.0, 1.0], u=u, density=1.0), d[0] + d[1])


def test_mask_is_where_the_result_is_not_zero():
    d, u = noise(0, 1, 300), uniform(1, 1, 300)
    for density in (0.1, 0.7):
        out = dare_linear(d, weight=[1.0], u=u, density=density)
        assert torch.equal(dare_mask(u, density=density)[0], out != 0)


@pytest.mark.parametrize("function", [dare_linear, dare_ties])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_dare_is_elementwise_bit_for_bit(function, dtype, normalize):
    stacks = {"d": noise(0, 3, 41, 9, dtype=dtype), "u": uniform(1, 3, 41, 9, dtype=torch.float32)}
    check_elementwise(function, stacks, weight=WEIGHT, density=DENSITIES, normalize=normalize, scale=0.3)
    stretch = [2.1, 1.0, 3.3]
    check_elementwise(function, stacks, weight=WEIGHT, density=DENSITIES, rescale="l1", stretch=stretch)


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_dare_scales_with_the_changes(seed, factor):
    d, u = noise(seed, 3, 13), uniform(seed, 3, 13)
    for function in (dare_linear, dare_ties):
        assert torch.equal(function(factor * d, weight=WEIGHT, u=u), factor * function(d, weight=WEIGHT, u=u))


@given(seed=st.integers(0, 999))
def test_dare_does_not_depend_on_the_order_of_models(seed):
    d, u, weight = noise(seed, 3, 13), uniform(seed, 3, 13), torch.tensor(WEIGHT)
    order = [2, 0, 1]
    for function in (dare_linear, dare_ties):
        out = function(d[order], weight=weight[order], u=u[order])
        torch.testing.assert_close(out, function(d, weight=weight, u=u), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", [dare_linear, dare_ties])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 20}, r"density is 20.0; it is a fraction in \(0, 1\]"),
        ({"density": 0}, "density is 0.0; it is a fraction"),
        ({"density": float("nan")}, "density is nan; it is a fraction"),
        ({"density": (0.5, 0.5, 0.5)}, "3 values are given for 2 models"),
        ({"rescale": "l2"}, "rescale is 'l2'; it is one of 'share', 'l1', 'none'"),
        ({"rescale": "l1"}, "norms of the changes were not measured"),
        ({"scale": float("inf")}, "scale is inf; it is a finite number"),
        ({"weight": [0.0, 0.0], "normalize": True}, "add up to 0"),
        ({"weight": [float("nan"), 0.0]}, "weight is nan; it is a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(function, settings, message):
    with pytest.raises(ParameterError, match=message):
        function(noise(0, 2, 3), **({"weight": [1.0, 1.0], "u": uniform(0, 2, 3)} | settings))


def test_dare_ties_refuses_an_unknown_way_to_count_cancelled_votes():
    with pytest.raises(ParameterError, match="cancelled is 'minus'"):
        dare_ties(noise(0, 2, 3), weight=[1.0, 1.0], u=uniform(0, 2, 3), cancelled="minus")
    d, u = torch.tensor([[2.0], [-2.0]]), torch.zeros(2, 1)
    assert torch.equal(dare_ties(d, weight=[1.0, 1.0], u=u, cancelled="plus"), torch.tensor([4.0]))
    assert torch.equal(dare_ties(d, weight=[1.0, 1.0], u=u), torch.tensor([0.0]))

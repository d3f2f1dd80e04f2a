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
    keep_of,
    masked,
    noise,
    plain_election,
    plain_sum,
    tensor,
)

from merganser.errors import ParameterError
from merganser.methods.joint._keep import magnitude
from merganser.methods.joint.breadcrumbs import breadcrumbs, breadcrumbs_ranks, breadcrumbs_ties

WEIGHT = [0.7, 1.0, 0.4]
DENSITIES, GAMMAS = (0.5, 0.9, 0.3), (0.25, 0.0, 0.01)


def keep_middle(d, density, gamma, count="round"):
    settings = [
        {"density": p, "gamma": g, "count": count, "excess": "refuse"} for p, g in zip(density, gamma, strict=True)
    ]
    return keep_of(magnitude(d), [breadcrumbs_ranks(d[0].numel(), s) for s in settings])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_breadcrumbs_equal_plain_loops(shape, dtype, normalize):
    d = noise(0, 3, *shape, dtype=dtype)
    keep = keep_middle(d, DENSITIES, GAMMAS)
    rows = masked(flat(d), flat(keep))
    settings = {"normalize": normalize, "scale": 0.6}
    given_ = {"weight": WEIGHT, "keep": keep, "density": DENSITIES, "gamma": GAMMAS}
    close(breadcrumbs(d, **given_, **settings), tensor(plain_sum(rows, WEIGHT, **settings), shape), dtype)
    close(breadcrumbs_ties(d, **given_, **settings), tensor(plain_election(rows, WEIGHT, **settings), shape), dtype)


@pytest.mark.parametrize(
    ("n", "density", "gamma", "count", "ranks"),
    [
        (1000, 0.9, 0.01, "round", (10, 910)),
        (1000, 0.9, 0.0, "round", (0, 900)),
        (100, 0.9, 0.01, "round", (1, 91)),
        (50, 0.9, 0.01, "round", (0, 45)),
        (5, 0.9, 0.01, "round", (0, 4)),
        (1, 0.9, 0.01, "round", (0, 1)),
        (1, 0.1, 0.9, "round", (0, 1)),
        (0, 0.9, 0.01, "round", (0, 0)),
        (7, 0.25, 0.25, "round", (2, 4)),
        (7, 0.25, 0.25, "floor", (1, 2)),
        (10, 0.95, 0.05, "round", (0, 10)),
        (100, 1.0, 0.0, "floor", (0, 100)),
    ],
)
def test_the_middle_is_kept_also_of_tiny_tensors_and_at_gamma_0(n, density, gamma, count, ranks):
    assert breadcrumbs_ranks(n, {"density": density, "gamma": gamma, "count": count, "excess": "refuse"}) == ranks


@given(
    n=st.integers(1, 300),
    density=st.floats(0.01, 0.99),
    part=st.floats(0, 1),
    count=st.sampled_from(["round", "floor"]),
)
def test_no_tensor_is_erased_and_no_rank_lies_outside(n, density, part, count):
    start, stop = breadcrumbs_ranks(
        n, {"density": density, "gamma": part * (1 - density), "count": count, "excess": "refuse"}
    )
    assert 0 <= start < stop <= n


def test_largest_and_smallest_are_dropped():
    d = torch.tensor([[0.1, -9.0, 3.0, 1.0, -2.0, 0.2, 0.3, 0.4, -4.0, 8.0]])
    keep = keep_middle(d, [0.4], [0.2])
    out = breadcrumbs(d, weight=[1.0], keep=keep, density=0.4, gamma=0.2)
    assert torch.equal(out, torch.tensor([0.0, 0.0, 3.0, 1.0, -2.0, 0.0, 0.0, 0.0, -4.0, 0.0]))


def test_l1_gives_each_thinned_change_the_norm_it_had():
    d = noise(0, 1, 40)
    keep = keep_middle(d, [0.5], [0.1])
    stretch = d.abs().sum(1) / (d * keep).abs().sum(1)
    for function, factor in ((breadcrumbs, 0.3), (breadcrumbs_ties, 1.0)):
        out = function(d, weight=[0.3], keep=keep, rescale="l1", stretch=stretch)
        torch.testing.assert_close(out.abs().sum(), factor * d.abs().sum())


@pytest.mark.parametrize("function", [breadcrumbs, breadcrumbs_ties])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_breadcrumbs_are_elementwise_bit_for_bit(function, dtype):
    d = noise(0, 3, 41, 9, dtype=dtype)
    stacks = {"d": d, "keep": keep_middle(d, DENSITIES, GAMMAS)}
    check_elementwise(function, stacks, weight=WEIGHT, scale=0.3)
    check_elementwise(function, stacks, weight=WEIGHT, normalize=True, rescale="l1", stretch=[2.1, 1.0, 3.3])


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_breadcrumbs_scale_with_the_changes(seed, factor):
    d = noise(seed, 3, 13)
    given_ = {"weight": WEIGHT, "keep": keep_middle(d, DENSITIES, GAMMAS)}
    for function in (breadcrumbs, breadcrumbs_ties):
        assert torch.equal(function(factor * d, **given_), factor * function(d, **given_))


@given(seed=st.integers(0, 999))
def test_breadcrumbs_do_not_depend_on_the_order_of_models(seed):
    d, weight, order = noise(seed, 3, 13), torch.tensor(WEIGHT), [2, 0, 1]
    keep = keep_middle(d, DENSITIES, GAMMAS)
    for function in (breadcrumbs, breadcrumbs_ties):
        out = function(d[order], weight=weight[order], keep=keep[order])
        torch.testing.assert_close(out, function(d, weight=weight, keep=keep), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", [breadcrumbs, breadcrumbs_ties])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 20}, r"density is 20.0; it is a fraction in \(0, 1\]"),
        ({"density": (0.5, 0.0)}, "density is 0.0; it is a fraction"),
        ({"gamma": -0.1}, r"gamma is -0.1; it is a fraction in \[0, 1\), not a percentage"),
        ({"gamma": 1}, "gamma is 1.0; it is a fraction"),
        ({"gamma": float("nan")}, "gamma is nan; it is a fraction"),
        ({"density": 0.95, "gamma": 0.1}, "gamma is 0.1 at density 0.95; what is kept and what is dropped exceed"),
        ({"excess": "gamma"}, "excess is 'gamma'; it is 'refuse' or 'density'"),
        ({"count": "ceil"}, "count is 'ceil'; it is 'round' or 'floor'"),
        ({"rescale": "share"}, "rescale is 'share'; it is one of 'none', 'l1'"),
        ({"rescale": "l1"}, "norms of the changes were not measured"),
        ({"scale": float("inf")}, "scale is inf; it is a finite number"),
        ({"weight": [0.0, 0.0], "normalize": True}, "add up to 0"),
    ],
)
def test_settings_out_of_range_are_refused(function, settings, message):
    keep = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ParameterError, match=message):
        function(noise(0, 2, 3), **({"weight": [1.0, 1.0], "keep": keep} | settings))


@pytest.mark.parametrize("settings", [{"density": 20, "gamma": 0.0}, {"density": 0.9, "gamma": 0.2}])
def test_ranks_of_settings_out_of_range_are_refused(settings):
    with pytest.raises(ParameterError, match=r"density is 20.0|gamma is 0.2 at density 0.9"):
        breadcrumbs_ranks(10, settings | {"count": "round", "excess": "refuse"})


@pytest.mark.parametrize(
    ("n", "density", "gamma", "ranks"),
    [(100, 1.0, 0.01, (0, 100)), (100, 0.9, 0.3, (10, 100)), (100, 0.9, 0.05, (5, 95))],
)
def test_density_comes_first_where_it_is_told_to(n, density, gamma, ranks):
    settings = {"density": density, "gamma": gamma, "count": "floor", "excess": "density"}
    assert breadcrumbs_ranks(n, settings) == ranks
    d, keep = noise(0, 1, n), torch.ones(1, n, dtype=torch.bool)
    assert torch.equal(breadcrumbs(d, weight=[1.0], keep=keep, **settings), d[0])


def test_breadcrumbs_ties_counts_cancelled_votes_as_it_is_told():
    d, keep = torch.tensor([[2.0], [-2.0]]), torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(breadcrumbs_ties(d, weight=[1.0, 1.0], keep=keep, cancelled="plus"), torch.tensor([2.0]))
    assert torch.equal(breadcrumbs_ties(d, weight=[1.0, 1.0], keep=keep), torch.tensor([0.0]))

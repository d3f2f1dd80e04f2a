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
    tensor,
)

from merganser.errors import ParameterError
from merganser.methods.joint._keep import magnitude
from merganser.methods.joint.ties import ties, ties_ranks


def keep_top(d, density, count="round"):
    densities = density if isinstance(density, tuple) else (density,) * len(d)
    n = d[0].numel()
    return keep_of(magnitude(d), [ties_ranks(n, {"density": p, "count": count}) for p in densities])


def expected_ties(d, weight, keep, **settings):
    return tensor(plain_election(masked(flat(d), flat(keep)), weight, **settings), d.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("density", [0.01, 0.2, (0.5, 1.0, 0.3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_equals_plain_loops(shape, dtype, density, normalize):
    d = noise(0, 3, *shape, dtype=dtype)
    weight = [0.7, 1.0, 0.4]
    keep = keep_top(d, density)
    out = ties(d, weight=weight, keep=keep, density=density, normalize=normalize, scale=0.6)
    close(out, expected_ties(d, weight, keep, normalize=normalize, scale=0.6), dtype)


@given(
    values=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=12),
    density=st.floats(0.01, 1.0),
    cancelled=st.sampled_from(["none", "plus"]),
    normalize=st.booleans(),
)
def test_ties_equals_plain_loops_where_magnitudes_and_votes_are_tied(values, density, cancelled, normalize):
    d = torch.tensor(values, dtype=torch.float64).T
    weight, keep = [1.0, 2.0, -1.0], keep_top(d, density)
    out = ties(d, weight=weight, keep=keep, density=density, cancelled=cancelled, normalize=normalize)
    expected = expected_ties(d, weight, keep, cancelled=cancelled, normalize=normalize)
    torch.testing.assert_close(out, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("n", "density", "count", "kept"),
    [
        (100, 0.2, "round", 20),
        (100, 1.0, "round", 100),
        (7, 0.25, "round", 2),
        (7, 0.25, "floor", 1),
        (100, 1e-6, "round", 1),
        (3, 0.2, "floor", 1),
        (1, 0.2, "floor", 1),
        (0, 0.2, "round", 0),
    ],
)
def test_density_keeps_its_share_and_at_least_one_entry(n, density, count, kept):
    assert ties_ranks(n, {"density": density, "count": count}) == (0, kept)


def test_a_share_of_20_is_refused_and_is_not_20_percent():
    d = noise(0, 2, 10)
    with pytest.raises(ParameterError, match=r"density is 20.0; it is a fraction in \(0, 1\], not a percentage"):
        ties_ranks(10, {"density": 20, "count": "round"})
    with pytest.raises(ParameterError, match=r"density is 20.0; it is a fraction"):
        ties(d, weight=[1.0, 1.0], keep=torch.ones(2, 10, dtype=torch.bool), density=20)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), (0.5, 0.0)])
def test_density_outside_its_range_is_refused(density):
    with pytest.raises(ParameterError, match=r"density is .*fraction in \(0, 1\]"):
        ties(noise(0, 2, 3), weight=[1.0, 1.0], keep=torch.ones(2, 3, dtype=torch.bool), density=density)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": "ceil"}, "count is 'ceil'; it is 'round' or 'floor'"),
        ({"cancelled": "minus"}, "cancelled is 'minus'; it is 'none' or 'plus'"),
        ({"rescale": "share"}, "rescale is 'share'; it is one of 'none', 'l1'"),
        ({"rescale": "l1"}, "norms of the changes were not measured"),
        ({"scale": float("nan")}, "scale is nan; it is a finite number"),
        ({"density": (0.5,)}, "1 values are given for 2 models"),
        ({"weight": [0.0, 0.0]}, "add up to 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    d, keep = noise(0, 2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ParameterError, match=message):
        ties(d, **({"weight": [1.0, 1.0], "keep": keep} | settings))


def test_votes_that_cancel_add_nothing_or_count_as_plus():
    d, keep = torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(ties(d, weight=[1.0, 1.0], keep=keep), torch.zeros(2))
    assert torch.equal(ties(d, weight=[1.0, 1.0], keep=keep, cancelled="plus"), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_lone_model_of_negative_weight_is_subtracted(normalize):
    d, keep = noise(0, 1, 9), torch.ones(1, 9, dtype=torch.bool)
    out = ties(d, weight=[-0.5], keep=keep, normalize=normalize)
    torch.testing.assert_close(out, -d[0] if normalize else -0.5 * d[0], rtol=1e-15, atol=0)


def test_weights_that_cancel_among_those_who_agree_do_not_divide_by_zero():
    d, keep = torch.tensor([[2.0], [-3.0]]), torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(ties(d, weight=[1.0, -1.0], keep=keep), torch.tensor([2.5]))


def test_magnitudes_of_a_list_are_those_of_the_stack():
    d = noise(0, 2, 5)
    assert torch.equal(torch.stack(magnitude(list(d))), magnitude(d))
    assert torch.equal(magnitude(d), torch.maximum(d, -d))


def test_copies_give_the_trimmed_copy():
    d = noise(0, 40)
    keep = keep_top(d[None], 0.2).expand(3, 40)
    out = ties([d] * 3, weight=[1.0] * 3, keep=keep)
    torch.testing.assert_close(out, torch.where(keep[0], d, 0), rtol=1e-15, atol=0)


def test_l1_gives_each_trimmed_change_the_norm_it_had():
    d = noise(0, 1, 40)
    keep = keep_top(d, 0.2)
    stretch = d.abs().sum(1) / (d * keep).abs().sum(1)
    out = ties(d, weight=[0.3], keep=keep, rescale="l1", stretch=stretch)
    torch.testing.assert_close(out.abs().sum(), d.abs().sum())
    assert torch.equal(out != 0, keep[0])


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_elementwise_bit_for_bit(dtype, normalize):
    d = noise(0, 4, 41, 9, dtype=dtype)
    check_elementwise(
        ties, {"d": d, "keep": keep_top(d, 0.3)}, weight=[0.1, 0.7, 0.3, 2.0], normalize=normalize, scale=0.3
    )


@given(seed=st.integers(0, 999))
def test_ties_does_not_depend_on_the_order_of_models(seed):
    d = noise(seed, 3, 13)
    order = [2, 0, 1]
    keep, weight = keep_top(d, 0.5), torch.tensor([1.0, 0.5, 2.0])
    out = ties(d[order], weight=weight[order], keep=keep[order])
    torch.testing.assert_close(out, ties(d, weight=weight, keep=keep), rtol=1e-14, atol=0)


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_ties_scales_with_the_changes(seed, factor):
    d = noise(seed, 3, 13)
    keep = keep_top(d, 0.5)
    assert torch.equal(keep_top(factor * d, 0.5), keep)
    given_ = {"weight": [1.0, 0.5, 2.0], "keep": keep}
    assert torch.equal(ties(factor * d, **given_), factor * ties(d, **given_))


def test_ties_reads_transposed_tensors():
    d, keep = noise(0, 2, 5, 8), noise(1, 2, 5, 8) > 0
    straight = ties(d, weight=[1.0, 1.0], keep=keep)
    assert torch.equal(ties([x.T for x in d], weight=[1.0, 1.0], keep=[x.T for x in keep]), straight.T)


def test_a_change_that_is_rescaled_to_nothing_has_no_share():
    d = torch.tensor([[2.0, -3.0], [4.0, 5.0]], dtype=torch.float64)
    keep = torch.ones(2, 2, dtype=torch.bool)
    out = ties(d, weight=[1.0, 1.0], keep=keep, stretch=[0.0, 1.0], density=1.0, rescale="l1")
    assert out.tolist() == [4.0, 5.0]  # and not half of them

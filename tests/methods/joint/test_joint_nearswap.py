import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import BOTH_DTYPES, SHAPES, check_elementwise, close, flat, noise, tensor

from merganser.errors import ParameterError
from merganser.methods.joint.nearswap import nearswap


def plain_nearswap(x, t):
    merged = []
    for base, other in zip(*flat(x), strict=True):
        s = min(t / abs(other - base), 1.0) if other != base else 1.0
        merged.append(s * other + (1 - s) * base)
    return tensor(merged, x.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("t", [0.0, 0.01, 0.7, 100.0])
def test_nearswap_equals_plain_loops(shape, dtype, t):
    x = noise(0, 2, *shape, dtype=dtype)
    close(nearswap(x, t=t), plain_nearswap(x, t), dtype)


@given(
    values=st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=1, max_size=12),
    t=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_nearswap_equals_plain_loops_where_models_agree(values, t):
    x = torch.tensor(values, dtype=torch.float64).T
    torch.testing.assert_close(nearswap(x, t=t), plain_nearswap(x, t), rtol=1e-15, atol=1e-15)


def test_what_is_near_is_the_other_model_bit_for_bit():
    x = torch.tensor([[1e8, 1.0, 0.1], [1.0, 1.0 + 1e-6, 0.3]])
    assert torch.equal(nearswap(x, t=1e9), x[1])
    assert torch.equal(nearswap(x, t=0.0), x[0])


@given(seed=st.integers(0, 999), t=st.floats(0, 3))
def test_no_entry_moves_farther_than_t_or_beyond_the_other_model(seed, t):
    x = noise(seed, 2, 20)
    moved = (nearswap(x, t=t) - x[0]).abs()
    assert bool((moved <= t + 1e-12).all())
    assert bool((moved <= (x[1] - x[0]).abs() + 1e-12).all())


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_nearswap_is_elementwise_bit_for_bit(dtype):
    check_elementwise(nearswap, {"x": noise(0, 2, 41, 9, dtype=dtype)}, t=0.5)


@pytest.mark.parametrize("t", [-1.0, float("nan"), float("inf")])
def test_t_outside_its_range_is_refused(t):
    with pytest.raises(ParameterError, match=r"t is (-1.0|nan|inf); it is a finite number, not negative"):
        nearswap(noise(0, 2, 3), t=t)


@pytest.mark.parametrize("models", [1, 3])
def test_nearswap_takes_two_models(models):
    with pytest.raises(ParameterError, match=f"the base and one other model; there are {models}"):
        nearswap(noise(0, models, 3), t=1.0)

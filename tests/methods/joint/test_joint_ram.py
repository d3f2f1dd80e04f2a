import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import BOTH_DTYPES, SHAPES, check_elementwise, close, flat, noise, tensor

from merganser.errors import ParameterError
from merganser.methods.joint.ram import ram, ramplus_tl


def sparse(seed, *shape, dtype=torch.float64):
    """Changes of which most are too small to count."""
    return torch.where(noise(seed + 1, *shape) > 0.3, noise(seed, *shape), 1e-7).to(dtype)


def plain_ram(d, epsilon, r=0.0, alpha=0.0):
    rows = flat(d)
    changers = [sum(abs(v) > epsilon for v in column) for column in zip(*rows, strict=True)]
    factors = []
    for row in rows:
        shared = sum(abs(v) > epsilon and n > 1 for v, n in zip(row, changers, strict=True))
        unique = sum(abs(v) > epsilon and n == 1 for v, n in zip(row, changers, strict=True))
        factors.append(1 + r * min(max(shared / unique, 0), alpha) if unique else 1.0)
    merged = []
    for column, n in zip(zip(*rows, strict=True), changers, strict=True):
        changed = [(v, f) for v, f in zip(column, factors, strict=True) if abs(v) > epsilon]
        merged.append(sum(v * (f if n == 1 else 1.0) for v, f in changed) / max(n, 1))
    return tensor(merged, d.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("models", [1, 2, 4])
def test_ram_equals_plain_loops(shape, dtype, models):
    d = sparse(0, models, *shape, dtype=dtype)
    close(ram(d), plain_ram(d, 1e-5), dtype)
    close(ram(d, epsilon=0.5), plain_ram(d, 0.5), dtype)
    close(ramplus_tl(d), plain_ram(d, 1e-5, 0.1, 0.2), dtype)
    close(ramplus_tl(d, epsilon=0.5, r=2.0, alpha=9.0), plain_ram(d, 0.5, 2.0, 9.0), dtype)


@given(
    values=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=12), epsilon=st.sampled_from([0.0, 1.0])
)
def test_ram_equals_plain_loops_where_a_change_is_on_the_edge(values, epsilon):
    d = torch.tensor(values, dtype=torch.float64).T
    torch.testing.assert_close(ram(d, epsilon=epsilon), plain_ram(d, epsilon), rtol=1e-15, atol=0)
    plus = ramplus_tl(d, epsilon=epsilon, r=0.5, alpha=1.0)
    torch.testing.assert_close(plus, plain_ram(d, epsilon, 0.5, 1.0), rtol=1e-15, atol=0)


def test_only_what_one_model_changed_is_enlarged():
    d = torch.tensor([[2.0, 3.0, 0.0, 1.0], [4.0, 0.0, 0.0, 0.0]])
    assert torch.equal(ram(d), torch.tensor([3.0, 3.0, 0.0, 1.0]))
    # Model 0 shares 1 entry and has 2 alone: its ratio is 1/2, and at most alpha.
    assert torch.equal(ramplus_tl(d, r=1.0, alpha=9.0), torch.tensor([3.0, 4.5, 0.0, 1.5]))
    assert torch.equal(ramplus_tl(d, r=1.0, alpha=0.25), torch.tensor([3.0, 3.75, 0.0, 1.25]))


def test_small_changes_are_dropped_and_copies_kept():
    assert torch.equal(ram(torch.full((2, 3), 9e-6)), torch.zeros(3))
    d = sparse(0, 40)
    copy = torch.where(d.abs() > 1e-5, d, 0)
    for function in (ram, ramplus_tl):
        torch.testing.assert_close(function(d.expand(3, 40)), copy, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_ram_is_elementwise_bit_for_bit(dtype):
    check_elementwise(ram, {"d": sparse(0, 3, 41, 9, dtype=dtype)})


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_ramplus_takes_lists_and_leaves_inputs_alone(dtype):
    d = sparse(0, 3, 41, 9, dtype=dtype)
    before = d.clone()
    assert torch.equal(ramplus_tl(list(d)), ramplus_tl(d))
    assert torch.equal(d, before)


@given(seed=st.integers(0, 999))
def test_ram_does_not_depend_on_the_order_of_models(seed):
    d = sparse(seed, 3, 13)
    for function in (ram, ramplus_tl):
        torch.testing.assert_close(function(d[[2, 0, 1]]), function(d), rtol=1e-14, atol=1e-16)
        assert torch.equal(function(-4 * d, epsilon=4e-5), -4 * function(d))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_settings_out_of_range_are_refused(value):
    for name in ("epsilon", "r", "alpha"):
        with pytest.raises(ParameterError, match=rf"{name} is (-1.0|nan|inf); it is a finite number, not negative"):
            ramplus_tl(noise(0, 2, 3), **{name: value})
    with pytest.raises(ParameterError, match="epsilon is"):
        ram(noise(0, 2, 3), epsilon=value)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.methods.running import running_mean, running_sum

SHAPES = [(), (1,), (0, 4), (16, 1), (3, 5)]


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_rules_equal_the_mean_and_sum_of_all(shape, dtype):
    changes = [noise(i, *shape, dtype=dtype) for i in range(5)]
    mean = total = torch.zeros(shape, dtype=dtype)
    for t, d in enumerate(changes, start=1):
        mean, total = running_mean(mean, d, t=t), running_sum(total, d)
    expected = [sum(entries) for entries in zip(*(d.double().reshape(-1).tolist() for d in changes), strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(shape)
    assert mean.shape == total.shape == torch.Size(shape)
    assert mean.dtype == total.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(total.double(), expected, **tolerance)
    torch.testing.assert_close(mean.double(), expected / 5, **tolerance)


def test_first_arrival_is_taken_as_it_is():
    d = noise(0, 4, 3)
    assert torch.equal(running_mean(torch.zeros_like(d), d, t=1), d)
    assert torch.equal(running_sum(torch.zeros_like(d), d), d)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), t=st.integers(1, 20), power=st.integers(-20, 20))
def test_running_rules_scale_with_the_changes(seed, t, power):
    merged, d, c = noise(seed, 7), noise(seed + 1, 7), 2.0**power
    assert torch.equal(running_mean(c * merged, c * d, t=t), c * running_mean(merged, d, t=t))
    assert torch.equal(running_sum(c * merged, c * d), c * running_sum(merged, d))


def test_a_mean_of_copies_is_the_copy():
    d = noise(0, 6)
    assert torch.equal(running_mean(d, d, t=3), d)


@pytest.mark.parametrize("rule", [lambda m, d: running_mean(m, d, t=2), running_sum])
def test_running_rules_leave_their_inputs_alone(rule):
    merged, d = noise(0, 5), noise(1, 5)
    before = merged.clone(), d.clone()
    out = rule(merged, d)
    out.zero_()
    assert torch.equal(merged, before[0])
    assert torch.equal(d, before[1])

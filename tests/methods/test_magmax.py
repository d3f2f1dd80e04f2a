import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.methods.magmax import magmax


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fold(changes):
    merged = torch.zeros_like(changes[0])
    for d in changes:
        merged = magmax(merged, d)
    return merged


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (16, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_magmax_equals_the_joint_argmax(shape, dtype):
    changes = [noise(i, *shape, dtype=dtype) for i in range(4)]
    expected = [max(entries, key=abs) for entries in zip(*(d.reshape(-1).tolist() for d in changes), strict=True)]
    out = fold(changes)
    assert out.dtype == dtype
    assert torch.equal(out, torch.tensor(expected, dtype=dtype).reshape(shape))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), order=st.permutations(range(5)), factor=st.sampled_from([-8.0, -1.0, 0.25, 2.0]))
def test_magmax_sees_no_order_and_scales_with_the_changes(seed, order, factor):
    changes = [noise(seed + i, 9) for i in range(5)]
    assert torch.equal(fold([factor * changes[i] for i in order]), factor * fold(changes))


def test_on_equal_magnitude_the_earlier_stays():
    a = torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(magmax(a, -a), a)
    assert torch.equal(magmax(-a, a), -a)


def test_zeros_change_nothing_and_copies_merge_to_themselves():
    d = noise(0, 6)
    assert torch.equal(magmax(d, torch.zeros_like(d)), d)
    assert torch.equal(magmax(torch.zeros_like(d), d), d)
    assert torch.equal(magmax(d, d), d)


def test_magmax_of_chunks_equals_that_of_the_whole():
    a, b = noise(0, 11), noise(1, 11)
    assert torch.equal(torch.cat([magmax(a[:4], b[:4]), magmax(a[4:], b[4:])]), magmax(a, b))


def test_magmax_leaves_its_inputs_alone():
    merged, d = noise(0, 5), noise(1, 5)
    before = merged.clone(), d.clone()
    magmax(merged, d).zero_()
    assert torch.equal(merged, before[0])
    assert torch.equal(d, before[1])

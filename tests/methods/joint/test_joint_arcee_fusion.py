from math import exp, floor, log, prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import BOTH_DTYPES, SHAPES, flat, noise, tensor

from merganser.errors import ParameterError
from merganser.methods.joint.arcee_fusion import arcee_fusion


def softmax(x):
    powers = [exp(v - max(x)) for v in x]
    return [p / sum(powers) for p in powers]


def quantile(x, q):
    place = q * (len(x) - 1)
    low, line = floor(place), sorted(x)
    return line[low] + (place - low) * (line[min(low + 1, len(line) - 1)] - line[low])


def plain_arcee(x):
    base, other = flat(x)
    shape = x.shape[1:]
    if not prod(shape):
        return tensor([], shape)
    n = shape[-1] if shape else 1
    importance = []
    for start in range(0, len(base), n):
        q, p = softmax(base[start : start + n]), softmax(other[start : start + n])
        divergence = max(0.0, sum(a * log(a / b) for a, b in zip(p, q, strict=True)))
        importance += [
            abs(o - b) * divergence for b, o in zip(base[start : start + n], other[start : start + n], strict=True)
        ]
    threshold = quantile(importance, 0.5) + 1.5 * (quantile(importance, 0.75) - quantile(importance, 0.25))
    return tensor([o if i >= threshold else b for b, o, i in zip(base, other, importance, strict=True)], shape)


@pytest.mark.parametrize("shape", [*SHAPES, (9,), (3, 700), (300, 7)])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_arcee_fusion_equals_plain_loops(shape, dtype, size):
    x = noise(0, 2, *shape)
    x = torch.stack([x[0], x[0] + size * x[1]]).to(dtype)
    found = arcee_fusion(x)
    assert found.dtype == dtype
    assert torch.equal(found.double(), plain_arcee(x))
    assert torch.equal(arcee_fusion(list(x)), found)


def test_threshold_is_exact_also_on_a_million_entries():
    x = noise(0, 2, 1100, 1000, dtype=torch.float32)
    found = arcee_fusion(x)
    base, other = x.double().numpy()
    p, q = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (other, base))
    importance = np.abs(other - base) * (p * np.log(p / q)).sum(1, keepdims=True)
    q1, median, q3 = np.quantile(importance, [0.25, 0.5, 0.75])
    threshold = median + 1.5 * (q3 - q1)
    sure = np.abs(importance / threshold - 1) > 1e-5
    expected = np.where(importance >= threshold, other, base)
    assert sure.mean() > 0.999
    assert (found.double().numpy() == expected)[sure].all()
    assert torch.equal(arcee_fusion(x), found)


def test_a_row_that_did_not_change_keeps_the_base_and_the_rest_may_take_the_other():
    base, other = torch.zeros(2, 8), torch.zeros(2, 8)
    other[0] = 5.0  # a constant: the softmax is the same
    other[1, 3] = 2.0
    found = arcee_fusion([base, other])
    assert float(found[1, 3]) == 2.0


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_models_give_the_model(shape):
    x = noise(0, 1, *shape).expand(2, *shape)
    assert torch.equal(arcee_fusion(x), x[0])


@given(seed=st.integers(0, 999))
def test_every_entry_is_one_of_the_two_and_inputs_are_left_alone(seed):
    x = noise(seed, 2, 4, 6)
    before = x.clone()
    found = arcee_fusion(x)
    assert bool(((found == x[0]) | (found == x[1])).all())
    found.zero_()
    assert torch.equal(x, before)


def test_arcee_fusion_reads_transposed_tensors():
    x = noise(0, 2, 5, 8)
    turned = [m.T for m in x]
    assert torch.equal(arcee_fusion(turned), arcee_fusion([m.contiguous() for m in turned]))


@pytest.mark.parametrize("models", [1, 3])
def test_arcee_fusion_takes_two_models(models):
    with pytest.raises(ParameterError, match=f"the base and one other model; there are {models}"):
        arcee_fusion(noise(0, models, 3))

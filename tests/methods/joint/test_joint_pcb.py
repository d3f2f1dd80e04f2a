from math import exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import BOTH_DTYPES, SHAPES, close, flat, noise, tensor

from merganser.errors import ParameterError
from merganser.methods.joint.pcb import pcb

WEIGHT = [0.7, 1.0, 0.4]


def norm(x):
    low, high = min(x), max(x)
    return [(v - low) / (high - low) if high > low else 0.0 for v in x]


def softmax(x):
    powers = [exp(v) for v in x]
    return [p / sum(powers) for p in powers]


def plain_balances(d, density):
    rows, balances = flat(d), []
    for row in rows:
        intra = softmax([len(rows) * v for v in norm([v * v for v in row])])
        inters = [softmax(norm([v * o for v, o in zip(row, other, strict=True)])) for other in rows]
        b = [i * sum(column) for i, column in zip(intra, zip(*inters, strict=True), strict=True)]
        kept = set(sorted(range(len(b)), key=lambda i: (-b[i], i))[: max(1, round(density * len(b)))])
        balances.append([v if i in kept else 0.0 for i, v in enumerate(b)])
    return balances


def plain_pcb(d, weight, density, scale=1.0):
    if not d[0].numel():
        return tensor([], d.shape[1:])
    merged = []
    for column, b in zip(zip(*flat(d), strict=True), zip(*plain_balances(d, density), strict=True), strict=True):
        total = sum(w * v * x for w, v, x in zip(weight, column, b, strict=True))
        merged.append(scale * total / sum(b) if sum(b) else 0.0)
    return tensor(merged, d.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_pcb_equals_plain_loops(shape, dtype, density):
    d = noise(0, 3, *shape, dtype=dtype)
    found = pcb(d, weight=WEIGHT, density=density, scale=0.6)
    close(found, plain_pcb(d, WEIGHT, density, 0.6), dtype)
    assert torch.equal(pcb(list(d), weight=WEIGHT, density=density, scale=0.6), found)


@given(values=st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=1, max_size=12), density=st.floats(0.01, 1.0))
def test_every_entry_kept_is_a_mean_of_the_models_that_keep_it(values, density):
    d = torch.tensor(values, dtype=torch.float64).T
    found = pcb(d, weight=[1.0, 1.0], density=density)
    assert bool((found >= d.amin(0).clamp(max=0) - 1e-12).all())
    assert bool((found <= d.amax(0).clamp(min=0) + 1e-12).all())


def test_equal_balances_are_kept_by_index():
    d = torch.ones(2, 5)
    assert torch.equal(pcb(d, weight=[1.0, 1.0], density=0.4), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))


def test_an_entry_on_which_models_agree_outweighs_one_on_which_they_do_not():
    d = torch.tensor([[3.0, 3.0, 0.0, 0.0], [3.0, -3.0, 0.0, 0.0]])
    assert torch.equal(pcb(d, weight=[1.0, 1.0], density=0.25), torch.tensor([3.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12])
def test_tiny_and_huge_changes_neither_underflow_nor_overflow(size):
    d = noise(0, 4, 5, 8, dtype=torch.float32)
    found = pcb(size * d, weight=[1.0] * 4)
    torch.testing.assert_close(found / size, pcb(d, weight=[1.0] * 4), rtol=1e-5, atol=0)
    assert bool(found.any())


def test_many_models_and_one_outlier_stay_finite():
    d = noise(0, 40, 200, dtype=torch.float32)
    d[:, 0] = 1e6
    found = pcb(d, weight=[1.0] * 40)
    assert bool(torch.isfinite(found).all())
    assert float(found[0]) == pytest.approx(1e6)


def test_changes_that_are_nearly_constant_do_not_overflow():
    d = 1 + 1e-4 * noise(0, 3, 50)
    found = pcb(d, weight=WEIGHT)
    torch.testing.assert_close(found, plain_pcb(d, WEIGHT, 0.2), rtol=1e-9, atol=0)


def test_zeros_copies_and_a_zero_change_among_others():
    assert torch.equal(pcb(torch.zeros(3, 4), weight=[1.0] * 3), torch.zeros(4))
    d = noise(0, 20)
    whole = pcb(d.expand(3, 20), weight=[1.0] * 3, density=1.0)
    torch.testing.assert_close(whole, d, rtol=1e-12, atol=0)
    assert bool(torch.isfinite(pcb(torch.stack([d, torch.zeros(20)]), weight=[1.0, 1.0])).all())


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_pcb_scales_with_the_changes_and_does_not_depend_on_their_order(seed, factor):
    d, weight = noise(seed, 3, 13), torch.tensor(WEIGHT)
    out = pcb(d, weight=weight)
    torch.testing.assert_close(pcb(factor * d, weight=weight), factor * out, rtol=1e-12, atol=1e-15)
    order = [2, 0, 1]
    torch.testing.assert_close(pcb(d[order], weight=weight[order]), out, rtol=1e-12, atol=1e-15)


def test_pcb_reads_transposed_tensors_in_their_own_order_and_leaves_inputs_alone():
    d = noise(0, 2, 5, 8)
    before = d.clone()
    turned = [x.T for x in d]
    assert torch.equal(pcb(turned, weight=[1.0, 1.0]), pcb([x.contiguous() for x in turned], weight=[1.0, 1.0]))
    assert torch.equal(d, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 20}, r"density is 20.0; it is a fraction in \(0, 1\], not a percentage"),
        ({"density": 0}, "density is 0.0; it is"),
        ({"density": float("nan")}, "density is nan; it is"),
        ({"scale": float("inf")}, "scale is inf; it is a finite number"),
        ({"weight": [1.0]}, "1 values are given for 3 models"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        pcb(noise(0, 3, 4), **({"weight": WEIGHT} | settings))

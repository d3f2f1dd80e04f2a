import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import BOTH_DTYPES, SHAPES, check_elementwise, close, flat, noise, tensor

from merganser.errors import ParameterError
from merganser.methods.joint.consensus import consensus

WEIGHT = [0.7, 1.0, 0.4]


def plain_consensus(d, weight, tall, agree, scale=1.0):
    merged = []
    for column in zip(*flat(d), strict=True):
        y = [w * v for w, v in zip(weight, column, strict=True)]
        total = sum(y)
        masks = sum(abs(v) > t * abs(total - v) for v, t in zip(y, tall, strict=True))
        merged.append(scale * total if masks >= agree else 0.0)
    return tensor(merged, d.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("agree", [0, 1, 2, 3])
@pytest.mark.parametrize("tall", [0.4, (0.2, 0.6, 1.5)])
def test_consensus_equals_plain_loops(shape, dtype, agree, tall):
    d = noise(0, 3, *shape, dtype=dtype)
    expected = plain_consensus(d, WEIGHT, tall if isinstance(tall, tuple) else (tall,) * 3, agree, 0.6)
    close(consensus(d, weight=WEIGHT, tall=tall, agree=agree, scale=0.6), expected, dtype)


@given(values=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=12), agree=st.integers(0, 3))
def test_consensus_equals_plain_loops_where_a_mask_is_on_its_edge(values, agree):
    d = torch.tensor(values, dtype=torch.float64).T
    found = consensus(d, weight=[1.0] * 3, tall=0.5, agree=agree)
    assert torch.equal(found, plain_consensus(d, [1.0] * 3, [0.5] * 3, agree))


def test_an_entry_that_only_one_model_needs_is_dropped():
    d = torch.tensor([[5.0, 5.0, 0.0], [0.1, 5.0, 0.0]])
    assert torch.equal(consensus(d, weight=[1.0, 1.0]), torch.tensor([0.0, 10.0, 0.0]))
    assert torch.equal(consensus(d, weight=[1.0, 1.0], agree=1), torch.tensor([5.1, 10.0, 0.0]))


def test_agree_0_is_task_arithmetic_and_copies_are_kept():
    d = noise(0, 3, 40)
    torch.testing.assert_close(consensus(d, weight=[1.0] * 3, agree=0), d.sum(0), rtol=1e-12, atol=1e-15)
    copies = d[:1].expand(3, 40)
    torch.testing.assert_close(consensus(copies, weight=[1.0] * 3, agree=3), 3 * d[0], rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_consensus_is_elementwise_bit_for_bit(dtype):
    check_elementwise(consensus, {"d": noise(0, 3, 41, 9, dtype=dtype)}, weight=WEIGHT, tall=(0.2, 0.6, 1.5), scale=0.3)


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_consensus_scales_with_the_changes_and_does_not_depend_on_their_order(seed, factor):
    d, weight = noise(seed, 3, 13), torch.tensor(WEIGHT)
    out = consensus(d, weight=weight)
    assert torch.equal(consensus(factor * d, weight=weight), factor * out)
    order = [2, 0, 1]
    torch.testing.assert_close(consensus(d[order], weight=weight[order]), out, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tall": 0}, "tall is 0.0; it is a finite number above 0"),
        ({"tall": float("nan")}, "tall is nan; it is"),
        ({"tall": (0.5, -1.0, 0.5)}, "tall is -1.0; it is"),
        ({"tall": (0.5, 0.5)}, "2 values are given for 3 models"),
        ({"agree": 4}, r"agree is 4; it is a whole number of models, in \[0, 3\]"),
        ({"agree": -1}, "agree is -1; it is"),
        ({"agree": 1.5}, "agree is 1.5; it is"),
        ({"agree": float("nan")}, "agree is nan; it is"),
        ({"scale": float("inf")}, "scale is inf; it is a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        consensus(noise(0, 3, 4), **({"weight": WEIGHT} | settings))

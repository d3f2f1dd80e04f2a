"""Great circles between two models: slerp and nuslerp."""

from math import acos, cos, pi, sin, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.joint.karcher import karcher
from merganser.methods.joint.multislerp import multislerp
from merganser.methods.joint.nuslerp import nuslerp, nuslerp_delta, nuslerp_locality
from merganser.methods.joint.slerp import slerp
from sphere_helpers import BOTH, FEW, SEEDS, close, dots_of, inner, noise


def slerp_by_loops(a, b, t):
    n_a, n_b = sqrt(inner(a, a)), sqrt(inner(b, b))
    angle = acos(inner(a, b) / n_a / n_b)
    return [(sin((1 - t) * angle) * p + sin(t * angle) * q) / sin(angle) for p, q in zip(a, b, strict=True)]


# slerp


@BOTH
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_slerp_equals_loops(t, dtype):
    x = noise(5, 2, 4, 3, dtype=dtype)
    close(slerp(x, dots=dots_of(x), t=t), slerp_by_loops(*x.double().reshape(2, -1).tolist(), t), dtype)


@BOTH
def test_slerp_ends_are_the_models_bit_for_bit(dtype):
    x = noise(6, 2, 50, dtype=dtype)
    assert torch.equal(slerp(x, dots=dots_of(x), t=0), x[0])
    assert torch.equal(slerp(x, dots=dots_of(x), t=1), x[1])


@FEW
@given(seed=SEEDS, t=st.floats(0, 1))
def test_slerp_keeps_the_norm_of_models_of_one_norm_and_divides_the_angle(seed, t):
    x = torch.nn.functional.normalize(noise(seed, 2, 9), dim=1) * 3
    y = slerp(x, dots=dots_of(x), t=t)
    angle = acos(float(x[0] @ x[1]) / 9)
    assert float(y.norm()) == pytest.approx(3)
    assert float(y @ x[0]) / 9 == pytest.approx(cos(t * angle), abs=1e-12)


@FEW
@given(angle=st.floats(1e-9, 0.03), t=st.floats(0, 1))
def test_slerp_is_smooth_where_the_directions_meet(angle, t):
    x = torch.tensor([[1.0, 0.0], [cos(angle), sin(angle)]], dtype=torch.float64)
    expected = torch.tensor([cos(t * angle), sin(t * angle)], dtype=torch.float64)
    torch.testing.assert_close(slerp(x, dots=dots_of(x), t=t), expected, rtol=0, atol=1e-12)


def test_lerp_above_takes_the_straight_line():
    x = torch.tensor([[2.0, 0.0], [2.0 * cos(0.02), 2.0 * sin(0.02)]], dtype=torch.float64)
    line = slerp(x, dots=dots_of(x), t=0.3, lerp_above=0.9995)
    torch.testing.assert_close(line, 0.7 * x[0] + 0.3 * x[1], rtol=1e-15, atol=0)
    assert not torch.allclose(line, slerp(x, dots=dots_of(x), t=0.3), rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_slerp_between_opposites_never_passes_through_zero(t, dtype):
    a = noise(7, 40, dtype=dtype)
    x = torch.stack([a, -3 * a])
    y = slerp(x, dots=dots_of(x), t=t)
    assert float(y.norm()) == pytest.approx(float((1 - t) * x[0].norm() + t * x[1].norm()), rel=1e-6)
    nearer = x[0] if t < 0.5 else x[1]  # halfway the longer
    torch.testing.assert_close(y / y.norm(), nearer / nearer.norm())


def test_slerp_halfway_between_exact_opposites_is_the_base():
    a = noise(7, 40)
    assert torch.equal(slerp([a, -a], dots=dots_of([a, -a]), t=0.5), a)


@pytest.mark.parametrize("gap", [1e-3, 1e-2, 0.3])
def test_slerp_near_opposites_still_keeps_the_norm(gap):
    x = torch.tensor([[1.0, 0.0], [cos(pi - gap), sin(pi - gap)]], dtype=torch.float64)
    assert float(slerp(x, dots=dots_of(x), t=0.5).norm()) == pytest.approx(1)


def test_slerp_between_opposites_does_as_it_is_told():
    x = torch.tensor([[2.0, 0.0], [-4.0, 0.0]])
    assert torch.equal(slerp(x, dots=dots_of(x), t=0.25, antipode="lerp"), torch.tensor([0.5, 0.0]))
    with pytest.raises(ParameterError, match=r"opposite directions, and t is 0.25"):
        slerp(x, dots=dots_of(x), t=0.25, antipode="error")
    assert torch.equal(slerp(x, dots=dots_of(x), t=1, antipode="error"), x[1])


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp_from_a_zero_tensor_is_the_straight_line(t):
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    assert torch.equal(slerp(x, dots=dots_of(x), t=t), t * x[1])
    assert torch.equal(slerp(x.flip(0), dots=dots_of(x.flip(0)), t=t), (1 - t) * x[1])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"t": 1.5}, "t is 1.5"),
        ({"t": -0.1}, "t is -0.1"),
        ({"t": float("nan")}, "t is nan"),
        ({"t": 0.5, "lerp_above": 1.1}, "lerp_above is 1.1"),
        ({"t": 0.5, "antipode": "zero"}, "antipode is 'zero'"),
    ],
)
def test_slerp_refuses(setting, words):
    x = noise(0, 2, 3)
    with pytest.raises(ParameterError, match=words):
        slerp(x, dots=dots_of(x), **setting)


def test_slerp_refuses_three_models_or_the_dots_of_others():
    x = noise(0, 3, 3)
    with pytest.raises(ParameterError, match="there are 3 tensors"):
        slerp(x, dots=dots_of(x), t=0.5)
    with pytest.raises(ParameterError, match=r"dots has shape \(3, 3\)"):
        slerp(x[:2], dots=dots_of(x), t=0.5)


# nuslerp


@BOTH
@pytest.mark.parametrize("merge", [nuslerp, nuslerp_delta])
def test_nuslerp_equals_loops(merge, dtype):
    x = noise(8, 2, 4, 3, dtype=dtype)
    out = merge(x, weight=[0.5, 1.5], dots=dots_of(x))
    close(out, slerp_by_loops(*x.double().reshape(2, -1).tolist(), 0.75), dtype)


@BOTH
@pytest.mark.parametrize("merge", [nuslerp, nuslerp_delta])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5)], ids=str)
def test_nuslerp_of_vectors_along_the_last_axis_equals_loops(merge, shape, dtype):
    x = noise(9, 2, *shape, dtype=dtype)
    rows = [v.double().reshape(-1, shape[-1]).tolist() for v in x]
    expected = [slerp_by_loops(p, q, 0.25) for p, q in zip(*rows, strict=True)]
    close(merge(x, weight=[3.0, 1.0], dots=dots_of(x), nuslerp_flatten=False), expected, dtype)


@BOTH
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5)], ids=str)
def test_nuslerp_of_vectors_along_the_first_axis_equals_loops(shape, dtype):
    x = noise(9, 2, *shape, dtype=dtype)
    columns = [v.double().reshape(shape[0], -1).T.tolist() for v in x]
    expected = torch.tensor([slerp_by_loops(p, q, 0.25) for p, q in zip(*columns, strict=True)], dtype=torch.float64).T
    out = nuslerp(x, weight=[3.0, 1.0], dots=dots_of(x), nuslerp_flatten=False, nuslerp_row_wise=True)
    close(out, expected.reshape(-1).tolist(), dtype)


@FEW
@given(seed=SEEDS, share=st.floats(0, 1))
def test_the_order_of_two_models_does_not_matter(seed, share):
    x, weight = noise(seed, 2, 3, 4), [share, 1 - share]
    there, back = (
        nuslerp(y, weight=w, dots=dots_of(y), nuslerp_flatten=False)
        for y, w in ((x, weight), (x.flip(0), weight[::-1]))
    )
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)


def test_opposite_and_zero_rows_are_treated_by_themselves():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[-3.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 4.0]])
    out = nuslerp([a, b], weight=[1, 1], dots=dots_of([a, b]), nuslerp_flatten=False)
    expected = torch.tensor([[-2.0, 0.0], [sqrt(0.5), sqrt(0.5)], [1.0, 1.0], [3.0, 4.0]])
    torch.testing.assert_close(out, expected)


def test_nuslerp_locality_follows_its_settings():
    assert nuslerp_locality({}) == "element"
    assert nuslerp_locality({"nuslerp_flatten": True, "nuslerp_row_wise": True}) == "element"
    assert nuslerp_locality({"nuslerp_flatten": False}) == "row"
    assert nuslerp_locality({"nuslerp_flatten": False, "nuslerp_row_wise": True}) == "tensor"


@pytest.mark.parametrize("merge", [nuslerp, multislerp, karcher])
@pytest.mark.parametrize("weight", [[0.0, 0.0], [2.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, 1.0, 1.0]])
def test_weights_without_a_place_between_the_models_are_refused(merge, weight):
    x = noise(0, 2, 3)
    with pytest.raises(ParameterError, match=r"weight|values are given"):
        merge(x, weight=weight, dots=dots_of(x))


def test_nuslerp_refuses_three_models_and_other_words():
    x = noise(0, 3, 3)
    with pytest.raises(ParameterError, match="between two models; there are 3"):
        nuslerp(x, weight=[1, 1, 1], dots=dots_of(x))
    with pytest.raises(ParameterError, match="antipode is 'far'"):
        nuslerp(x[:2], weight=[1, 1], dots=dots_of(x[:2]), antipode="far")
    with pytest.raises(ParameterError, match="opposite directions"):
        nuslerp([x[0], -x[0]], weight=[1, 1], dots=dots_of([x[0], -x[0]]), antipode="error")

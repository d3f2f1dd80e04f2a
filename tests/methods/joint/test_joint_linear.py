import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import BOTH_DTYPES, SHAPES, check_elementwise, close, flat, noise, plain_sum, tensor

from merganser.errors import ParameterError
from merganser.methods.joint.linear import linear
from merganser.methods.joint.magmax import magmax
from merganser.methods.joint.passthrough import passthrough
from merganser.methods.joint.task_arithmetic import task_arithmetic

WEIGHT = torch.tensor([0.3, 1.5, -0.4], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_equals_plain_loops(shape, dtype, normalize):
    x = noise(0, 3, *shape, dtype=dtype)
    expected = tensor(plain_sum(flat(x), WEIGHT.tolist(), normalize=normalize), shape)
    close(linear(x, weight=WEIGHT, normalize=normalize), expected, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0, 0.0])
def test_task_arithmetic_equals_plain_loops(shape, dtype, normalize, scale):
    d = noise(0, 3, *shape, dtype=dtype)
    expected = tensor(plain_sum(flat(d), WEIGHT.tolist(), normalize=normalize, scale=scale), shape)
    close(task_arithmetic(d, weight=WEIGHT, normalize=normalize, scale=scale), expected, dtype)


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_linear_and_task_arithmetic_are_elementwise_bit_for_bit(dtype):
    stack = noise(0, 5, 41, 9, dtype=dtype)
    weight = [0.1, 0.7, -0.3, 2.0, 1.1]
    check_elementwise(linear, {"x": stack}, weight=weight)
    check_elementwise(task_arithmetic, {"d": stack}, weight=weight, scale=0.3)
    check_elementwise(magmax, {"d": stack}, weight=weight, scale=0.3)
    check_elementwise(passthrough, {"x": stack[:1]}, factor=0.3)
    check_elementwise(passthrough, {"x": stack[:1]})


def test_linear_normalizes_by_default_and_task_arithmetic_does_not():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(linear(x, weight=[1.0, 1.0]), torch.tensor([2.0, 3.0]))
    assert torch.equal(task_arithmetic(x, weight=[1.0, 1.0]), torch.tensor([4.0, 6.0]))


@pytest.mark.parametrize("models", [1, 2, 3, 7])
def test_mean_of_copies_is_the_copy(models):
    x = noise(1, 50, dtype=torch.float32)
    torch.testing.assert_close(linear([x] * models, weight=[0.2] * models), x, rtol=3e-7, atol=0)


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_linear_scales_with_the_models_and_not_with_the_weights(seed, factor):
    x = noise(seed, 3, 13)
    assert torch.equal(linear(factor * x, weight=[1.0, 2.0, 0.5]), factor * linear(x, weight=[1.0, 2.0, 0.5]))
    scaled = linear(x, weight=[w * factor for w in (1.0, 2.0, 0.5)])
    torch.testing.assert_close(scaled, linear(x, weight=[1.0, 2.0, 0.5]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0], [0.1, 0.2, -0.3]])
def test_weights_that_add_up_to_zero_are_refused_and_not_divided_by(weight):
    x = noise(0, len(weight), 4)
    with pytest.raises(ParameterError, match=r"the weights \[.*\] add up to 0.*\nhint: change a weight, or set norm"):
        linear(x, weight=weight)
    with pytest.raises(ParameterError, match="add up to 0"):
        task_arithmetic(x, weight=weight, normalize=True)
    assert bool(torch.isfinite(linear(x, weight=weight, normalize=False)).all())


def test_a_model_of_weight_zero_takes_no_part():
    x = noise(0, 3, 20)
    assert torch.equal(linear(x, weight=[1.0, 0.0, 2.0]), linear(x[[0, 2]], weight=[1.0, 2.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(ParameterError, match=r"weight is (nan|inf); it is a finite number"):
        linear(noise(0, 2, 4), weight=[1.0, bad])
    with pytest.raises(ParameterError, match=r"scale is (nan|inf); it is a finite number"):
        task_arithmetic(noise(0, 2, 4), weight=[1.0, 1.0], scale=bad)
    with pytest.raises(ParameterError, match=r"scale is (nan|inf); it is a finite number"):
        magmax(noise(0, 2, 4), weight=[1.0, 1.0], scale=bad)
    with pytest.raises(ParameterError, match=r"factor is (nan|inf); it is a finite number"):
        passthrough(noise(0, 1, 4), factor=bad)


def test_as_many_weights_as_models():
    with pytest.raises(ParameterError, match="2 values are given for 3 models"):
        linear(noise(0, 3, 4), weight=[1.0, 1.0])
    with pytest.raises(ParameterError, match="no model"):
        linear([], weight=[], normalize=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_magmax_equals_plain_loops(shape, dtype):
    d = noise(2, 3, *shape, dtype=dtype)
    y = [[w * v for v in x] for w, x in zip(WEIGHT.tolist(), flat(d), strict=True)]
    expected = [0.5 * max(column, key=abs) for column in zip(*y, strict=True)]
    close(magmax(d, weight=WEIGHT, scale=0.5), tensor(expected, shape), dtype)


def test_magmax_keeps_the_first_of_equal_magnitudes():
    d = torch.tensor([[2.0, -1.0], [-2.0, 1.0], [2.0, 0.5]])
    assert torch.equal(magmax(d, weight=[1.0] * 3), torch.tensor([2.0, -1.0]))
    assert torch.equal(magmax(d.flip(0), weight=[1.0] * 3), torch.tensor([2.0, 1.0]))


@given(seed=st.integers(0, 999))
def test_magmax_does_not_depend_on_the_order_of_models(seed):
    d = noise(seed, 4, 13)
    assert torch.equal(magmax(d, weight=[1.0] * 4), magmax(d[[2, 0, 3, 1]], weight=[1.0] * 4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*BOTH_DTYPES, torch.bfloat16])
def test_passthrough_is_the_model_bit_for_bit_in_other_memory(shape, dtype):
    x = noise(3, 1, *shape).to(dtype)
    out = passthrough(x)
    assert torch.equal(out, x[0])
    assert out.dtype == dtype
    assert not out.numel() or out.data_ptr() != x.data_ptr()
    assert torch.equal(passthrough(x, factor=(-0.5,)), x[0] * -0.5)


def test_passthrough_takes_one_model():
    with pytest.raises(ParameterError, match="one model a tensor; there are 2"):
        passthrough(noise(0, 2, 4))

"""Great circles and means on the sphere: slerp, nuslerp, multislerp, karcher, model_stock."""

from itertools import combinations
from math import atan2, cos, pi, sin, sqrt

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.joint._sphere import sums_of_products
from merganser.methods.joint.karcher import karcher
from merganser.methods.joint.model_stock import model_stock, model_stock_locality
from merganser.methods.joint.multislerp import multislerp, multislerp_delta
from merganser.methods.joint.nuslerp import nuslerp, nuslerp_delta
from merganser.methods.joint.slerp import slerp
from sphere_helpers import BOTH, FEW, SEEDS, close, dots_of, inner, noise

SHAPES = [(), (1,), (0, 4), (16, 1), (5, 8), (4, 3, 3, 3)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def units_by_loops(x):
    norms = [sqrt(inner(v, v)) for v in x]
    return norms, [[p / n for p in v] for v, n in zip(x, norms, strict=True)]


def combined(a, u):
    return [sum(w * p for w, p in zip(a, column, strict=True)) for column in zip(*u, strict=True)]


def stepped(m, g):
    """The exponential map at m."""
    length = sqrt(inner(g, g))
    if length < 1e-30:
        return m
    return [cos(length) * p + sin(length) / length * q for p, q in zip(m, g, strict=True)]


def multislerp_by_loops(x, a):
    """As published: the mean, the projections into its tangent space, their mean, and back."""
    norms, u = units_by_loops(x)
    _, (m,) = units_by_loops([combined(a, u)])
    tangents = [[p - inner(v, m) * q for p, q in zip(v, m, strict=True)] for v in u]
    return [inner(a, norms) * p for p in stepped(m, combined(a, tangents))]


def karcher_by_loops(x, a, steps):
    norms, u = units_by_loops(x)
    _, (m,) = units_by_loops([combined(a, u)])
    for _ in range(steps):
        logs = []
        for v in u:
            c = max(-1.0, min(1.0, inner(v, m)))
            flat = [p - c * q for p, q in zip(v, m, strict=True)]
            s = sqrt(inner(flat, flat))
            logs.append([atan2(s, c) / s * p for p in flat] if s > 1e-12 else [0.0] * len(m))
        _, (m,) = units_by_loops([stepped(m, combined(a, logs))])
    return [inner(a, norms) * p for p in m]


def model_stock_by_loops(d):
    _, u = units_by_loops(d)
    pairs = list(combinations(range(len(d)), 2))
    c = sum(inner(u[i], u[j]) for i, j in pairs) / len(pairs)
    t = len(d) * c / (1 + (len(d) - 1) * c)
    return [t * p for p in combined([1 / len(d)] * len(d), d)]


#: Every method with settings that are element by element given the dots: name -> (models, call).
ELEMENTWISE = {
    "slerp": (2, lambda x, dots: slerp(x, dots=dots, t=0.3)),
    "nuslerp": (2, lambda x, dots: nuslerp(x, weight=[1.0, 2.0], dots=dots)),
    "nuslerp_delta": (2, lambda x, dots: nuslerp_delta(x, weight=[1.0, 2.0], dots=dots)),
    "multislerp": (3, lambda x, dots: multislerp(x, weight=[1.0, 2.0, 0.5], dots=dots)),
    "multislerp_delta": (3, lambda x, dots: multislerp_delta(x, weight=[1.0, 2.0, 0.5], dots=dots)),
    "karcher": (3, lambda x, dots: karcher(x, weight=[1.0, 2.0, 0.5], dots=dots)),
    "model_stock": (3, lambda x, dots: model_stock(x, dots=dots)),
}
#: The same with settings under which a method looks at rows.
ROW_WISE = {
    "nuslerp": (2, lambda x, dots: nuslerp(x, weight=[1.0, 2.0], dots=dots, nuslerp_flatten=False)),
    "nuslerp_delta": (2, lambda x, dots: nuslerp_delta(x, weight=[1.0, 2.0], dots=dots, nuslerp_flatten=False)),
    "model_stock": (3, lambda x, dots: model_stock(x, dots=dots, filter_wise=True)),
}
TENSOR_WISE = {
    "nuslerp": (
        2,
        lambda x, dots: nuslerp(x, weight=[1.0, 2.0], dots=dots, nuslerp_flatten=False, nuslerp_row_wise=True),
    ),
}
ALL = {
    **{f"{n}, whole": c for n, c in ELEMENTWISE.items()},
    **{f"{n}, rows": c for n, c in ROW_WISE.items()},
    **{f"{n}, columns": c for n, c in TENSOR_WISE.items()},
}
EVERY_CALL = pytest.mark.parametrize(("models", "merge"), ALL.values(), ids=ALL)


@EVERY_CALL
@EVERY_SHAPE
@BOTH
def test_every_shape_gives_a_finite_tensor_of_that_shape_and_leaves_the_models_alone(models, merge, shape, dtype):
    x = [noise(seed, *shape, dtype=dtype) for seed in range(models)]
    before = [v.clone() for v in x]
    out = merge(x, dots_of(x))
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)
    assert torch.isfinite(out).all()
    assert all(torch.equal(v, w) for v, w in zip(x, before, strict=True))
    assert out.numel() == 0 or out.data_ptr() not in [v.data_ptr() for v in x]


@EVERY_CALL
@EVERY_SHAPE
def test_zeros_give_zeros(models, merge, shape):
    x = torch.zeros(models, *shape)
    assert torch.equal(merge(x, dots_of(x)), torch.zeros(shape))


@EVERY_CALL
@BOTH
def test_copies_give_one_of_them(models, merge, dtype):
    x = [noise(0, 5, 8, dtype=dtype)] * models
    torch.testing.assert_close(merge(x, dots_of(x)), x[0], rtol=1e-6, atol=1e-7)


@EVERY_CALL
@BOTH
def test_a_stack_and_a_list_are_one(models, merge, dtype):
    x = noise(3, models, 5, 8, dtype=dtype)
    assert torch.equal(merge(x, dots_of(x)), merge(list(x), dots_of(x)))


@EVERY_CALL
@FEW
@given(seed=SEEDS, exponent=st.integers(-20, 20))
def test_scaling_every_model_scales_the_merge(models, merge, seed, exponent):
    x = noise(seed, models, 4, 6)
    factor = 2.0**exponent
    torch.testing.assert_close(merge(x * factor, dots_of(x * factor)), factor * merge(x, dots_of(x)), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("models", "merge"), ELEMENTWISE.values(), ids=ELEMENTWISE)
@BOTH
def test_chunks_of_entries_equal_the_whole_bit_for_bit(models, merge, dtype):
    x = noise(1, models, 101, 37, dtype=dtype)
    whole, dots = merge(x, dots_of(x)).reshape(-1), dots_of(x)
    flat = x.reshape(models, -1)
    for size in (1000, 999, 7):
        parts = [merge([v[i : i + size] for v in flat], dots) for i in range(0, flat.shape[1], size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize(("models", "merge"), ROW_WISE.values(), ids=ROW_WISE)
@pytest.mark.parametrize("shape", [(37, 101), (37, 5, 3)], ids=str)
@BOTH
def test_chunks_of_rows_equal_the_whole_bit_for_bit(models, merge, shape, dtype):
    x = noise(1, models, *shape, dtype=dtype)
    whole, dots = merge(x, dots_of(x)), dots_of(x)
    for size in (16, 5, 1):
        parts = [merge([v[i : i + size] for v in x], dots) for i in range(0, shape[0], size)]
        assert torch.equal(torch.cat(parts), whole), size


def test_a_sum_depends_on_its_terms_only_at_any_thread_count():
    a, b = noise(3, 4, 100_003), noise(4, 4, 100_003)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole, alone = sums_of_products(a, b, -1), sums_of_products(a[:1], b[:1], -1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, sums_of_products(a, b, -1))
    assert torch.equal(alone, whole[:1])
    torch.testing.assert_close(whole, (a * b).sum(-1))


@pytest.mark.parametrize(("models", "merge"), ROW_WISE.values(), ids=ROW_WISE)
def test_a_vector_in_chunks_is_one_row(models, merge):
    x = noise(2, models, 23).add(1)
    dots = dots_of(x)
    whole = merge(x, dots)
    torch.testing.assert_close(whole, ELEMENTWISE[next(n for n, c in ROW_WISE.items() if c[1] is merge)][1](x, dots))
    assert torch.equal(torch.cat([merge(x[:, :9], dots), merge(x[:, 9:], dots)]), whole)


# multislerp


@BOTH
@pytest.mark.parametrize("merge", [multislerp, multislerp_delta])
@pytest.mark.parametrize("models", [1, 2, 5])
def test_multislerp_equals_the_published_loops_with_their_tangent_space(merge, models, dtype):
    x = noise(10, models, 4, 5, dtype=dtype).add(0.3)
    weight = torch.arange(1, models + 1, dtype=torch.float64)
    expected = multislerp_by_loops(x.double().reshape(models, -1).tolist(), (weight / weight.sum()).tolist())
    close(merge(x, weight=weight, dots=dots_of(x)), expected, dtype)


def test_multislerp_without_normalize_scales_the_norm():
    x = noise(11, 3, 6)
    once = multislerp(x, weight=[1, 2, 1], dots=dots_of(x))
    torch.testing.assert_close(multislerp(x, weight=[1, 2, 1], dots=dots_of(x), normalize=False), 4 * once)


@FEW
@given(seed=SEEDS)
def test_two_models_of_equal_weight_meet_halfway_in_every_method(seed):
    x = noise(seed, 2, 7)
    assume(abs(float(dots_of(x)[0, 1])) < 0.99 * float(x[0].norm() * x[1].norm()))
    x = torch.nn.functional.normalize(x, dim=1)
    half = slerp(x, dots=dots_of(x), t=0.5)
    for merge in (nuslerp, multislerp, karcher):
        torch.testing.assert_close(merge(x, weight=[1, 1], dots=dots_of(x)), half, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("merge", [multislerp, karcher])
@FEW
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_the_order_of_the_models_does_not_matter(merge, seed, order):
    x, weight = noise(seed, 4, 3, 5).add(0.2), torch.tensor([1.0, 2.0, 3.0, 0.5])
    moved = merge(x[order], weight=weight[order], dots=dots_of(x[order]))
    torch.testing.assert_close(moved, merge(x, weight=weight, dots=dots_of(x)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("merge", [multislerp, karcher])
def test_where_directions_cancel_the_heaviest_is_kept_with_the_mean_norm(merge):
    a = torch.tensor([3.0, 4.0])
    out = merge([a, -2 * a], weight=[1, 1], dots=dots_of([a, -2 * a]))
    torch.testing.assert_close(out, -1.5 * a)
    three = [torch.tensor([cos(k * 2 * pi / 3), sin(k * 2 * pi / 3)], dtype=torch.float64) for k in range(3)]
    torch.testing.assert_close(merge(three, weight=[1, 1, 1], dots=dots_of(three)), three[0])


@pytest.mark.parametrize("merge", [multislerp, karcher])
def test_a_zero_model_has_a_norm_and_no_direction(merge):
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([sqrt(0.5), sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(merge(x, weight=[1, 1, 1, 1], dots=dots_of(x)), expected)


def test_a_zero_model_does_not_slow_the_iteration():
    x = noise(9, 3, 8).add(0.3)
    with_zero = karcher([*x, torch.zeros(8).double()], weight=[1, 2, 3, 6], dots=dots_of([*x, x[0] * 0]), max_iter=2)
    torch.testing.assert_close(
        2 * with_zero, karcher(x, weight=[1, 2, 3], dots=dots_of(x), max_iter=2), rtol=1e-10, atol=0
    )


# karcher


@BOTH
@pytest.mark.parametrize("models", [1, 2, 3, 6])
def test_karcher_equals_loops_on_the_sphere(models, dtype):
    x = noise(12, models, 4, 4, dtype=dtype).add(0.4)
    weight = torch.arange(1, models + 1, dtype=torch.float64)
    expected = karcher_by_loops(x.double().reshape(models, -1).tolist(), (weight / weight.sum()).tolist(), 60)
    close(karcher(x, weight=weight, dots=dots_of(x), max_iter=100, tol=1e-13), expected, dtype)


def test_one_karcher_iteration_equals_one_by_loops():
    x = noise(13, 4, 9).add(0.3)
    expected = karcher_by_loops(x.tolist(), [0.25] * 4, 1)
    close(karcher(x, weight=[1] * 4, dots=dots_of(x), max_iter=1), expected)
    assert not torch.allclose(karcher(x, weight=[1] * 4, dots=dots_of(x)), torch.tensor(expected).double(), rtol=1e-8)


@FEW
@given(seed=SEEDS)
def test_no_direction_nearby_is_nearer_than_the_karcher_mean(seed):
    x = torch.nn.functional.normalize(noise(seed, 3, 4).add(0.8), dim=1)
    a = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def cost(m):
        return float(a @ torch.acos((x @ m).clamp(-1, 1)).square())

    m = karcher(x, weight=a, dots=dots_of(x), max_iter=200, tol=1e-12)
    assert float(m.norm()) == pytest.approx(1)
    for other in (
        *(m + 1e-2 * step for step in torch.eye(4).double()),
        *(m - 1e-2 * step for step in torch.eye(4).double()),
    ):
        assert cost(m) <= cost(other / other.norm()) + 1e-9


def test_karcher_of_fine_tunes_that_hardly_differ_is_their_mean():
    base = noise(14, 200)
    x = torch.stack([base + 1e-7 * noise(k, 200) for k in range(5)]).float()
    torch.testing.assert_close(
        karcher(x, weight=[1] * 5, dots=dots_of(x)), x.double().mean(0).float(), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("setting", "words"), [({"max_iter": 0}, "max_iter is 0"), ({"tol": 0.0}, "tol is 0")])
def test_karcher_refuses(setting, words):
    x = noise(0, 2, 3)
    with pytest.raises(ParameterError, match=words):
        karcher(x, weight=[1, 1], dots=dots_of(x), **setting)


# model_stock


@BOTH
@pytest.mark.parametrize("models", [2, 3, 6])
def test_model_stock_equals_loops(models, dtype):
    d = noise(15, models, 4, 5, dtype=dtype).add(0.5)
    close(model_stock(d, dots=dots_of(d)), model_stock_by_loops(d.double().reshape(models, -1).tolist()), dtype)


@BOTH
@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 2, 2)], ids=str)
def test_model_stock_by_filters_equals_loops(shape, dtype):
    d = noise(16, 3, *shape, dtype=dtype).add(0.7)
    rows = d.double().reshape(3, 6, -1).transpose(0, 1).tolist()
    close(model_stock(d, dots=dots_of(d), filter_wise=True), [model_stock_by_loops(r) for r in rows], dtype)


@FEW
@given(seed=SEEDS, order=st.permutations(range(4)), filter_wise=st.booleans())
def test_model_stock_does_not_know_the_order(seed, order, filter_wise):
    d = noise(seed, 4, 3, 5).add(0.4)
    moved = model_stock(d[order], dots=dots_of(d[order]), filter_wise=filter_wise)
    torch.testing.assert_close(moved, model_stock(d, dots=dots_of(d), filter_wise=filter_wise), rtol=1e-9, atol=1e-12)


@FEW
@given(seed=SEEDS)
def test_model_stock_never_leaves_the_way_from_the_base_to_the_mean(seed):
    d = noise(seed, 3, 6)
    out, mean = model_stock(d, dots=dots_of(d)), d.mean(0)
    t = float(out @ mean / (mean @ mean))
    assert -1e-12 <= t <= 1 + 1e-12
    torch.testing.assert_close(out, t * mean, rtol=1e-9, atol=1e-12)


def test_orthogonal_and_opposed_changes_give_the_base():
    for d in (torch.eye(3), torch.tensor([[1.0, 0.1], [-1.0, 0.1]]), torch.tensor([[2.0], [-3.0]])):
        for filter_wise in (False, True):
            assert torch.equal(model_stock(d, dots=dots_of(d), filter_wise=filter_wise), torch.zeros_like(d[0]))


def test_negative_lets_the_ratio_be_that_of_the_equation_down_to_the_pole():
    d = torch.tensor([[1.0, 0.5], [-0.5, 0.5]], dtype=torch.float64)
    close(
        model_stock(d, dots=dots_of(d), negative=True), model_stock_by_loops([[1.0, 0.5], [-0.5, 0.5]]), torch.float64
    )
    d = torch.tensor([[2.0], [-3.0]])
    assert torch.equal(model_stock(d, dots=dots_of(d), negative=True), torch.zeros(1))


def test_a_zero_change_is_orthogonal_to_all():
    d = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = (3 * (1 / 3) / (1 + 2 / 3)) * d.mean(0)
    torch.testing.assert_close(model_stock(d, dots=dots_of(d)), expected)
    rows = d[:, None, :]
    torch.testing.assert_close(model_stock(rows, dots=dots_of(d), filter_wise=True), expected[None])


def test_model_stock_locality_follows_its_settings():
    assert model_stock_locality({}) == model_stock_locality({"filter_wise": False}) == "element"
    assert model_stock_locality({"filter_wise": True}) == "row"


def test_model_stock_refuses_one_model():
    d = noise(0, 1, 3)
    with pytest.raises(ParameterError, match="there are 1"):
        model_stock(d, dots=dots_of(d))

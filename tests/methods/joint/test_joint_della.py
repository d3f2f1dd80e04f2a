import sys
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import (
    BOTH_DTYPES,
    SHAPES,
    check_elementwise,
    check_rows,
    close,
    flat,
    noise,
    plain_election,
    plain_sum,
    tensor,
    uniform,
)

from merganser.errors import ParameterError
from merganser.methods.joint.della import _order, della, della_linear, della_mask

WEIGHT = [0.7, 1.0, 0.4]
DENSITIES, EPSILONS = (0.5, 1.0, 0.3), (0.4, 0.0, 0.2)


def plain_chances(values, shape, density, epsilon, row):
    n = prod(shape[1:] if row == "first" else shape[-1:]) if len(shape) > 1 else len(values)
    chances = []
    for start in range(0, len(values), max(n, 1)):
        line = values[start : start + n]
        order = sorted(range(n), key=lambda i: (abs(line[i]), i))
        rank = {i: r for r, i in enumerate(order)}
        chances += [density + epsilon * (rank[i] / (n - 1) - 0.5) if n > 1 else density for i in range(n)]
    return chances


def plain_della(d, u, row, rescale):
    rows = []
    for values, draws, p, e in zip(flat(d), flat(u), DENSITIES, EPSILONS, strict=True):
        chances = plain_chances(values, d.shape[1:], p, e, row)
        if rescale == "share":
            rows.append([v / c if x < c else 0.0 for v, x, c in zip(values, draws, chances, strict=True)])
        else:
            rows.append([v if x < c else 0.0 for v, x, c in zip(values, draws, chances, strict=True)])
    return rows


@pytest.mark.parametrize("shape", [*SHAPES, (9,)])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("row", ["first", "last"])
@pytest.mark.parametrize("rescale", ["share", "none"])
def test_della_equals_plain_loops(shape, dtype, row, rescale):
    d, u = noise(0, 3, *shape, dtype=dtype), uniform(1, 3, *shape)
    rows = plain_della(d, u, row, rescale)
    given_ = {"weight": WEIGHT, "u": u, "density": DENSITIES, "epsilon": EPSILONS, "rescale": rescale, "row": row}
    close(della_linear(d, **given_, scale=0.6), tensor(plain_sum(rows, WEIGHT, scale=0.6), shape), dtype)
    close(della(d, **given_, scale=0.6), tensor(plain_election(rows, WEIGHT, scale=0.6), shape), dtype)
    normal = tensor(plain_sum(rows, WEIGHT, normalize=True), shape)
    close(della_linear(d, **given_, normalize=True), normal, dtype)
    close(della(d, **given_, normalize=False), tensor(plain_election(rows, WEIGHT, normalize=False), shape), dtype)


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_equal_magnitudes_are_ranked_by_their_place_and_signs_do_not_count(dtype):
    d = torch.tensor([[[1.0, -1.0, 0.0, -0.0, 1.0], [-3.0, 2.0, -2.0, 3.0, 1.0]]], dtype=dtype)
    chances = torch.tensor([[0.3, 0.4, 0.1, 0.2, 0.5], [0.4, 0.2, 0.3, 0.5, 0.1]])
    settings = {"density": 0.3, "epsilon": 0.4}
    assert bool(della_mask(d, (chances - 1e-5)[None], **settings).all())
    assert not bool(della_mask(d, (chances + 1e-5)[None], **settings).any())


def bfloat16_changes(seed, *shape):
    base = noise(seed, *shape).bfloat16()
    return (base + 0.05 * noise(seed + 1, *shape).bfloat16()).float() - base.float()


NEAR = torch.tensor([1 + 2**-20, 1 + 2**-21, 1.0, 1 + 2**-21, -1.0, 1 + 2**-20, 3.0, 2.0])
CHANGES = {
    "of bfloat16": bfloat16_changes(0, 300, 96),
    "of float32": noise(0, 50, 96, dtype=torch.float32),
    "of bfloat16 with equal leading bits in some rows": bfloat16_changes(0, 300, 96).index_put(
        (torch.tensor([[0], [7], [299]]), torch.arange(0, 96, 12)), NEAR
    ),
    "of few values": torch.round(noise(0, 50, 96, dtype=torch.float32)),
    "in long rows": bfloat16_changes(0, 2, 20000),
    "of zeros": torch.zeros(4, 8),
    "turned": bfloat16_changes(0, 96, 300).T,
}


@pytest.mark.parametrize("name", CHANGES)
def test_order_of_magnitudes_is_that_of_a_stable_sort(name):
    rows = CHANGES[name]
    assert torch.equal(_order(rows), torch.sort(rows.abs(), dim=1, stable=True).indices)


@pytest.mark.parametrize(
    ("name", "rows"), [("of bfloat16", 0), ("of bfloat16 with equal leading bits in some rows", 3)]
)
def test_only_rows_whose_leading_bits_do_not_tell_are_sorted_again(name, rows, monkeypatch):
    again = []

    def counted(bits):
        again.append(len(bits))
        return torch.sort(bits, dim=1, stable=True).indices

    module = sys.modules[della.__module__]  # the package has the function under the same name
    monkeypatch.setattr(module, "_order_of_long_keys", counted)
    _order(CHANGES[name])
    assert sum(again) == rows


@pytest.mark.parametrize("shape", [(7, 1), (1,), (), (3, 1, 1, 1)])
def test_a_row_of_one_entry_has_the_chance_density_and_no_0_by_0(shape):
    d = noise(0, 1, *shape)
    for row in ("first", "last"):
        settings = {"density": 0.4, "epsilon": 0.2, "row": row}
        kept = della_linear(d, weight=[1.0], u=torch.full(d.shape, 0.399), **settings)
        torch.testing.assert_close(kept, d[0] / 0.4)
        dropped = della_linear(d, weight=[1.0], u=torch.full(d.shape, 0.401), **settings)
        assert torch.equal(dropped, torch.zeros(shape, dtype=d.dtype))


def test_della_is_unbiased_and_its_chance_rises_with_the_rank():
    line = torch.tensor([0.1, -3.0, 0.5, 2.0, -1.0])
    d = line.expand(1, 20000, 5)
    out = della_linear(d, weight=[1.0], u=uniform(0, 1, 20000, 5), density=0.5, epsilon=0.4)
    # Standard deviation of a mean: |d| sqrt((1 - p) / p / 20000), at most 0.011 |d|; of a share: at most 0.0036.
    torch.testing.assert_close(out.mean(0), line, rtol=0.05, atol=0)
    share = (out != 0).double().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.3, 0.7, 0.4, 0.6, 0.5]).double(), rtol=0, atol=0.018)


def test_l1_gives_each_thinned_change_the_norm_it_had():
    d, u = noise(0, 1, 6, 10), uniform(1, 1, 6, 10)
    mask = della_mask(d, u)
    stretch = d.abs().sum() / (d * mask).abs().sum()
    out = della_linear(d, weight=[0.3], u=u, rescale="l1", stretch=[float(stretch)])
    torch.testing.assert_close(out.abs().sum(), 0.3 * d.abs().sum())
    assert torch.equal(out != 0, mask[0])
    agreed = della(d, weight=[0.3], u=u, rescale="l1", stretch=[float(stretch)])
    torch.testing.assert_close(agreed, out / 0.3)


def test_without_epsilon_della_is_dare():
    d, u = noise(0, 2, 6, 10), uniform(1, 2, 6, 10)
    out = della_linear(d, weight=[1.0, 2.0], u=u, density=0.25, epsilon=0.0)
    expected = torch.where(u < 0.25, 4 * d, 0)
    torch.testing.assert_close(out, expected[0] + 2 * expected[1], rtol=1e-15, atol=0)


def test_at_density_1_nothing_is_dropped_whatever_epsilon_is():
    d, u = noise(0, 1, 6, 10), torch.full((1, 6, 10), 1 - 2**-24)
    assert torch.equal(della_linear(d, weight=[1.0], u=u, density=1.0, epsilon=0.3), d[0])
    assert bool(della_mask(d, u, density=1.0, epsilon=0.3).all())


@pytest.mark.parametrize("function", [della, della_linear])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("shape", [(41, 9), (5, 3, 2, 2), (0, 4), (16, 1)])
def test_della_is_local_to_rows_bit_for_bit(function, dtype, shape):
    stacks = {"d": noise(0, 3, *shape, dtype=dtype), "u": uniform(1, 3, *shape, dtype=torch.float32)}
    for row in ("first", "last"):
        given_ = {"weight": WEIGHT, "density": DENSITIES, "epsilon": EPSILONS, "row": row, "scale": 0.3}
        check_rows(function, stacks, **given_)
        check_rows(function, stacks, **given_, rescale="l1", stretch=[2.1, 1.0, 3.3])


def test_masks_are_local_to_rows():
    d, u = noise(0, 2, 9, 4, dtype=torch.float32), uniform(1, 2, 9, 4, dtype=torch.float32)
    parts = [della_mask(d[:, i : i + 2], u[:, i : i + 2]) for i in range(0, 9, 2)]
    assert torch.equal(torch.cat(parts, dim=1), della_mask(d, u))


def test_without_epsilon_and_rows_of_one_entry_della_is_elementwise():
    stacks = {"d": noise(0, 3, 41, 1), "u": uniform(1, 3, 41, 1)}
    check_elementwise(della_linear, stacks, weight=WEIGHT, epsilon=0.0)


@given(seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]))
def test_della_scales_with_the_changes(seed, factor):
    d, u = noise(seed, 3, 4, 7).float(), uniform(seed, 3, 4, 7)
    for function in (della, della_linear):
        assert torch.equal(function(factor * d, weight=WEIGHT, u=u), factor * function(d, weight=WEIGHT, u=u))


@given(seed=st.integers(0, 999))
def test_della_does_not_depend_on_the_order_of_models(seed):
    d, u, weight = noise(seed, 3, 4, 7), uniform(seed, 3, 4, 7), torch.tensor(WEIGHT)
    order = [2, 0, 1]
    for function in (della, della_linear):
        out = function(d[order], weight=weight[order], u=u[order])
        torch.testing.assert_close(out, function(d, weight=weight, u=u), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("function"), [della, della_linear])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 20}, r"density is 20.0; it is a fraction in \(0, 1\]"),
        ({"density": (0.5, 0.0)}, "density is 0.0; it is a fraction"),
        ({"epsilon": -0.1}, r"epsilon is -0.1; it is a difference of chances, in \[0, 1\]"),
        ({"epsilon": 15}, "epsilon is 15.0; it is a difference"),
        ({"epsilon": float("nan")}, "epsilon is nan; it is a difference"),
        ({"density": 0.9, "epsilon": 0.4}, r"epsilon is 0.4 at density 0.9; density - epsilon/2 and density"),
        ({"density": 0.1, "epsilon": 0.2}, "epsilon is 0.2 at density 0.1"),
        ({"density": 0.1, "epsilon": 0.3}, r"\(in mergekit's language epsilon is epsilon/2, here 0.15\)"),
        ({"epsilon": 1.2}, r"epsilon is 1.2; .*, here 0.6\)"),
        ({"row": "second"}, "row is 'second'; it is 'first' or 'last'"),
        ({"rescale": "l2"}, "rescale is 'l2'; it is one of 'share', 'l1', 'none'"),
        ({"rescale": "l1"}, "norms of the changes were not measured"),
        ({"scale": float("inf")}, "scale is inf; it is a finite number"),
        ({"weight": [0.0, 0.0], "normalize": True}, "add up to 0"),
    ],
)
def test_settings_out_of_range_are_refused(function, settings, message):
    with pytest.raises(ParameterError, match=message):
        function(noise(0, 2, 3), **({"weight": [1.0, 1.0], "u": uniform(0, 2, 3)} | settings))


def test_della_counts_cancelled_votes_as_it_is_told():
    d, u = torch.tensor([[[2.0]], [[-2.0]]]), torch.zeros(2, 1, 1)
    assert torch.equal(della(d, weight=[1.0, 1.0], u=u, cancelled="plus"), torch.tensor([[4.0]]))
    assert torch.equal(della(d, weight=[1.0, 1.0], u=u), torch.tensor([[0.0]]))

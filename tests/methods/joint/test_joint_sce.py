from math import fsum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_plain import (
    BOTH_DTYPES,
    SHAPES,
    check_elementwise,
    close,
    flat,
    keep_of,
    masked,
    noise,
    plain_election,
    tensor,
)

from merganser.errors import ParameterError
from merganser.methods.joint.sce import sce, sce_ranks, sce_score


def plain_variance(d):
    columns = list(zip(*flat(d), strict=True))
    return [sum((v - sum(c) / len(c)) ** 2 for v in c) / len(c) for c in columns]


def brought(d, select_topk, count="round"):
    """What a caller measures over the whole tensor."""
    ranks = sce_ranks(d[0].numel(), {"select_topk": select_topk, "count": count})
    keep = keep_of(sce_score(d), [ranks])
    energy = [fsum(v * v for v in row) for row in masked(flat(d), flat(keep) * len(d))]
    return {"keep": keep, "energy": energy, "select_topk": select_topk}


def plain_sce(d, keep, cancelled="none"):
    rows = masked(flat(d), flat(keep) * len(d))
    energies = [fsum(v * v for v in row) for row in rows]
    total = fsum(energies)
    weight = [e / total if total else 0.0 for e in energies]
    return tensor(plain_election(rows, weight, cancelled=cancelled, weighted_vote=False), d.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("select_topk", [0.05, 0.3, 1.0])
def test_sce_equals_plain_loops(shape, dtype, select_topk):
    d = noise(0, 3, *shape, dtype=dtype) * torch.tensor([1.0, 0.3, 2.0], dtype=dtype).reshape(3, *[1] * len(shape))
    measured = brought(d, select_topk)
    close(sce(d, **measured), plain_sce(d, measured["keep"]), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_score_is_the_population_variance(shape, dtype):
    d = noise(0, 4, *shape, dtype=dtype)
    close(sce_score(d), tensor(plain_variance(d), (1, *shape)), dtype)
    assert torch.equal(sce_score(list(d)), sce_score(d))
    assert not bool(sce_score(d[:1]).any())


@given(
    values=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=12),
    cancelled=st.sampled_from(["none", "plus"]),
)
def test_votes_are_counted_without_weights_and_means_with_them(values, cancelled):
    d = torch.tensor(values, dtype=torch.float64).T
    measured = brought(d, 1.0)
    found = sce(d, **measured, cancelled=cancelled)
    torch.testing.assert_close(found, plain_sce(d, measured["keep"], cancelled), rtol=1e-14, atol=0)


def test_a_strong_model_does_not_outvote_two_weak_ones_of_a_larger_sum():
    d = torch.tensor([[3.0, 9.0], [-2.0, 0.0], [-2.0, 0.0]])
    assert torch.equal(sce(d, **brought(d, 1.0)), torch.tensor([-2.0, 9.0]))


def test_energies_are_those_of_the_selected_entries():
    d = torch.tensor([[4.0, 100.0, 1.0], [2.0, 100.0, 1.0]])
    # Only entry 0 varies: of 100 and 1 nothing is left, also not in the weights 16 : 4.
    out = sce(d, **brought(d, 0.3))
    torch.testing.assert_close(out, torch.tensor([(16 * 4.0 + 4 * 2.0) / 20, 0.0, 0.0]))


@pytest.mark.parametrize("n", [6, 60000])
def test_the_size_of_the_tensor_does_not_matter(n):
    d = torch.tensor([[1.0, -2.0, 3.0], [2.0, 2.0, 1.0]]).repeat(1, n // 3)
    out = sce(d, **brought(d, 1.0))
    torch.testing.assert_close(out[:3], torch.tensor([(14 * 1 + 9 * 2) / 23, 0.0, (14 * 3 + 9 * 1) / 23]))


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("select_topk", [0.3, 1.0])
def test_sce_is_elementwise_bit_for_bit(dtype, select_topk):
    d = noise(0, 3, 41, 9, dtype=dtype)
    measured = brought(d, select_topk)

    def of_any_entries(d, keep):
        return sce(d, keep=keep, energy=measured["energy"])

    check_elementwise(of_any_entries, {"d": d, "keep": measured["keep"]})


@pytest.mark.parametrize("select_topk", [0.5, 1.0])
def test_zeros_and_copies(select_topk):
    zeros = torch.zeros(3, 4)
    assert torch.equal(sce(zeros, **brought(zeros, select_topk)), torch.zeros(4))
    copies = noise(0, 4).expand(3, 4)
    measured = brought(copies, select_topk)
    torch.testing.assert_close(sce(copies, **measured), torch.where(measured["keep"][0], copies[0], 0))


def test_a_zero_change_among_others_takes_no_part():
    d = torch.stack([noise(0, 9), torch.zeros(9)])
    torch.testing.assert_close(sce(d, **brought(d, 1.0)), d[0], rtol=1e-15, atol=0)


@given(
    seed=st.integers(0, 999), factor=st.sampled_from([-4.0, -1.0, 0.125, 2.0]), select_topk=st.sampled_from([0.4, 1.0])
)
def test_sce_scales_with_the_changes_and_does_not_depend_on_their_order(seed, factor, select_topk):
    d = noise(seed, 3, 13)
    out = sce(d, **brought(d, select_topk))
    torch.testing.assert_close(sce(factor * d, **brought(factor * d, select_topk)), factor * out, rtol=1e-12, atol=0)
    d = d[[2, 0, 1]]
    torch.testing.assert_close(sce(d, **brought(d, select_topk)), out, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("n", "share", "count", "kept"),
    [(10, 0.25, "round", 2), (7, 0.25, "floor", 1), (100, 1e-6, "floor", 1), (0, 0.5, "round", 0)],
)
def test_selection_keeps_its_share_and_at_least_one_entry(n, share, count, kept):
    assert sce_ranks(n, {"select_topk": share, "count": count}) == (0, kept)


@pytest.mark.parametrize("share", [0.0, -0.1, 20, float("nan")])
def test_select_topk_outside_its_range_is_refused(share):
    d = noise(0, 2, 3)
    given_ = {"keep": torch.ones(1, 3, dtype=torch.bool), "energy": [1.0, 1.0]}
    with pytest.raises(ParameterError, match=r"select_topk is .*; it is a fraction in \(0, 1\], not a percentage"):
        sce(d, **given_, select_topk=share)
    with pytest.raises(ParameterError, match="select_topk is"):
        sce_ranks(10, {"select_topk": share, "count": "round"})
    with pytest.raises(ParameterError, match="count is 'ceil'"):
        sce(d, **given_, count="ceil")
    with pytest.raises(ParameterError, match="cancelled is 'minus'"):
        sce(d, **given_, cancelled="minus")

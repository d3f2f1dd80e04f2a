"""Means by measured statistics, and the plain means that stand in for them: fisher, regmean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ParameterError
from merganser.methods.joint._mean import mean_of_changes, mean_of_models
from merganser.methods.joint.fisher import fisher
from merganser.methods.joint.regmean import regmean

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])
SHAPES = [(), (1,), (0, 4), (16, 1), (5, 8), (4, 3, 3, 3)]
SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=25)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(out, expected, dtype=torch.float64):
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-9, 1e-11)
    torch.testing.assert_close(out.double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol)


# means


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_means_equal_loops(shape, dtype):
    x = noise(0, 3, *shape, dtype=dtype)
    values, w = x.double().reshape(3, -1).tolist(), [1.0, 2.0, 0.5]
    for merge, over in ((mean_of_changes, 3), (mean_of_models, 3.5)):
        expected = [
            sum(w_k * v for w_k, v in zip(w, column, strict=True)) / over for column in zip(*values, strict=True)
        ]
        close(merge(x, weight=w).reshape(-1), torch.tensor(expected, dtype=torch.float64), dtype)
        assert torch.equal(merge(list(x), weight=torch.tensor(w)), merge(x, weight=w))


def test_only_the_mean_of_changes_takes_a_negative_weight():
    x = torch.tensor([[4.0], [2.0]])
    assert torch.equal(mean_of_changes(x, weight=[1.0, -1.0]), torch.tensor([1.0]))
    with pytest.raises(ParameterError, match=r"each is a number from 0, and their sum is above 0"):
        mean_of_models(x, weight=[2.0, -1.0])
    with pytest.raises(ParameterError, match="weight is nan"):
        mean_of_changes(x, weight=[1.0, float("nan")])


# fisher


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fisher_equals_loops(shape, dtype):
    x, f, w = noise(1, 3, *shape, dtype=dtype), noise(2, 3, *shape, dtype=dtype).square(), [1.0, 2.0, 0.5]
    rows = [t.double().reshape(3, -1).T.tolist() for t in (x, f)]
    expected = [
        sum(w_k * f_k * v for w_k, f_k, v in zip(w, fs, vs, strict=True))
        / sum(w_k * f_k for w_k, f_k in zip(w, fs, strict=True))
        for vs, fs in zip(*rows, strict=True)
    ]
    before = x.clone(), f.clone()
    out = fisher(x, fisher=f, weight=w)
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)
    close(out.reshape(-1), torch.tensor(expected, dtype=torch.float64), dtype)
    assert torch.equal(fisher(list(x), fisher=list(f), weight=torch.tensor(w)), out)
    assert torch.equal(x, before[0])
    assert torch.equal(f, before[1])


@BOTH
def test_where_no_model_depends_on_an_entry_it_is_the_mean(dtype):
    x, f = noise(3, 3, 50, dtype=dtype), torch.zeros(3, 50, dtype=dtype)
    w = [1.0, 2.0, 0.0]
    torch.testing.assert_close(fisher(x, fisher=f, weight=w), mean_of_models(x, weight=w))
    f[2, :10] = 5  # of a model that has no weight
    torch.testing.assert_close(fisher(x, fisher=f, weight=w), mean_of_models(x, weight=w))
    f[1, 20:] = 1e-3
    torch.testing.assert_close(fisher(x, fisher=f, weight=w)[20:], x[1, 20:])


@BOTH
def test_fisher_of_any_size_gives_the_same(dtype):
    """The smallest and the largest normal numbers: what is multiplied with x, or added up, leaves the range."""
    x, f = noise(4, 3, 50, dtype=dtype).abs().add(0.1), noise(5, 3, 50, dtype=dtype).abs().clamp(max=2).add(1)
    expected, normal = fisher(x, fisher=f, weight=[1] * 3), torch.finfo(dtype)
    for factor, size in ((normal.tiny, 2.0**-16), (normal.max / 4, 2.0**4)):
        out = fisher(x * size, fisher=f * factor, weight=[1] * 3)
        torch.testing.assert_close(out, expected * size, rtol=1e-5, atol=0)


@BOTH
def test_fisher_in_chunks_equals_the_whole_bit_for_bit(dtype):
    x, f = noise(6, 3, 4001, dtype=dtype), noise(7, 3, 4001, dtype=dtype).square()
    f[:, ::5] = 0
    whole = fisher(x, fisher=f, weight=[1, 2, 3])
    for size in (1000, 37):
        cut = range(0, 4001, size)
        parts = [fisher(x[:, i : i + size], fisher=f[:, i : i + size], weight=[1, 2, 3]) for i in cut]
        assert torch.equal(torch.cat(parts), whole)


@FEW
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_fisher_stays_between_the_models_in_any_order(seed, order):
    x, f, w = noise(seed, 3, 20), noise(seed + 1, 3, 20).square(), torch.tensor([1.0, 2.0, 0.5])
    out = fisher(x, fisher=f, weight=w)
    torch.testing.assert_close(fisher(x[order], fisher=f[order], weight=w[order]), out)
    assert torch.all(out <= x.amax(0) + 1e-12)
    assert torch.all(out >= x.amin(0) - 1e-12)


def test_a_negative_fisher_is_refused():
    with pytest.raises(ParameterError, match="an entry of fisher is negative"):
        fisher(torch.ones(2, 3), fisher=torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]), weight=[1, 1])


# regmean


def inputs(seed, models, n, samples):
    x = noise(seed, models, samples, n)
    return x, x.transpose(1, 2) @ x


def regmean_by_numpy(w, gram, share, reduction):
    n = gram[0].shape[0]
    shrunk = [s * (reduction * g + (1 - reduction) * np.diag(np.diag(g))) for g, s in zip(gram, share, strict=True)]
    right = sum(w_k @ g for w_k, g in zip(w, shrunk, strict=True))
    assert np.linalg.matrix_rank(sum(shrunk)) == n
    return np.linalg.solve(sum(shrunk), right.T).T


@BOTH
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1), (3, 40)], ids=str)
@pytest.mark.parametrize("reduction", [0.0, 0.5, 0.95])
def test_regmean_equals_numpy(shape, reduction, dtype):
    x, share = noise(10, 3, *shape, dtype=dtype), [1.0, 2.0, 0.5]
    _, gram = inputs(11, 3, shape[1], 20)
    gram = gram.to(dtype)
    out = regmean(x, gram=gram, weight=share, reduction=reduction)
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)
    close(out, regmean_by_numpy(list(x.double().numpy()), list(gram.double().numpy()), share, reduction), dtype)
    assert torch.equal(regmean(list(x), gram=list(gram), weight=torch.tensor(share), reduction=reduction), out)


@BOTH
def test_without_reduction_no_layer_is_nearer_on_the_inputs(dtype):
    x, (samples, gram) = noise(12, 3, 4, 6), inputs(13, 3, 6, 30)

    def cost(w):
        return float(sum(((w - x_k) @ s.T).square().sum() for x_k, s in zip(x, samples, strict=True)))

    out = regmean(x.to(dtype), gram=gram.to(dtype), weight=[1] * 3, reduction=1.0).double()
    for seed in range(20):
        assert cost(out) < cost(out + 1e-2 * noise(seed, 4, 6))


@BOTH
@pytest.mark.parametrize("reduction", [0.95, 1.0])
def test_inputs_that_no_model_saw_take_the_mean(reduction, dtype):
    x, (_, gram) = noise(14, 3, 4, 6, dtype=dtype), inputs(15, 3, 6, 20)
    gram[:, 2] = gram[:, :, 2] = 0
    w = [1.0, 2.0, 0.5]
    out = regmean(x, gram=gram.to(dtype), weight=w, reduction=reduction)
    torch.testing.assert_close(out[:, 2], mean_of_models(x, weight=w)[:, 2])
    seen = [0, 1, 3, 4, 5]
    alone = regmean(x[:, :, seen], gram=gram[:, seen][:, :, seen].to(dtype), weight=w, reduction=reduction)
    torch.testing.assert_close(out[:, seen], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        regmean(x, gram=torch.zeros_like(gram).to(dtype), weight=[1, 1, 2]),
        mean_of_models(x.double(), weight=[1, 1, 2]).to(dtype),
    )


@BOTH
def test_fewer_samples_than_inputs_fit_them_and_leave_the_rest_at_the_mean(dtype):
    """At reduction 1 the system is singular; the minimum-distance solution is what a pseudo-inverse would give."""
    x, (samples, gram) = noise(16, 2, 4, 12), inputs(17, 2, 12, 3)
    out = regmean(x.to(dtype), gram=gram.to(dtype), weight=[1, 1], reduction=1.0).double()
    for x_k, s in zip(x, samples, strict=True):
        torch.testing.assert_close(out @ s.T, x_k @ s.T, rtol=0, atol=1e-2 if dtype == torch.float32 else 1e-6)
    assert float(out.norm()) < 10 * float(x.norm())


@BOTH
@pytest.mark.parametrize("reduction", [0.5, 0.95, 1.0])
def test_regmean_of_copies_is_one_of_them(reduction, dtype):
    x = noise(18, 5, 7, dtype=dtype)
    _, gram = inputs(19, 3, 7, 4)
    torch.testing.assert_close(
        regmean([x] * 3, gram=gram.to(dtype), weight=[1, 2, 3], reduction=reduction), x, rtol=1e-6, atol=1e-7
    )


@BOTH
@FEW
@given(seed=SEEDS, exponents=st.lists(st.integers(-12, 12), min_size=6, max_size=6))
def test_inputs_of_any_scale_are_solved_alike(dtype, seed, exponents):
    x, (_, gram) = noise(seed, 2, 3, 6), inputs(seed + 1, 2, 6, 20)
    scale = 2.0 ** torch.tensor(exponents, dtype=torch.float64)
    scaled = gram * scale[:, None] * scale
    out = regmean((x / scale).to(dtype), gram=scaled.to(dtype), weight=[1, 1]) * scale
    expected = regmean(x, gram=gram, weight=[1, 1])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@FEW
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_regmean_does_not_know_the_order(seed, order):
    x, (_, gram), w = noise(seed, 3, 4, 6), inputs(seed + 1, 3, 6, 10), torch.tensor([1.0, 2.0, 0.5])
    moved = regmean(x[order], gram=gram[order], weight=w[order])
    torch.testing.assert_close(moved, regmean(x, gram=gram, weight=w), rtol=1e-9, atol=1e-11)


@BOTH
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_an_empty_layer_stays_empty_and_no_argument_is_written_to(shape, dtype):
    out = regmean(
        torch.zeros(2, *shape, dtype=dtype), gram=torch.ones(2, shape[1], shape[1], dtype=dtype), weight=[1, 1]
    )
    assert (out.shape, out.dtype) == (torch.Size(shape), dtype)
    x, (_, gram) = noise(20, 2, 4, 6, dtype=dtype), inputs(21, 2, 6, 10)
    before, grams = x.clone(), gram.clone()
    regmean(x, gram=gram, weight=[1, 2])
    assert torch.equal(x, before)
    assert torch.equal(gram, grams)


@pytest.mark.parametrize(
    ("gram", "setting", "words"),
    [
        (torch.eye(3), {"reduction": 95.0}, "reduction is 95"),
        (torch.eye(3), {"reduction": -0.1}, "reduction is -0.1"),
        (-torch.eye(3), {}, "not positive semidefinite"),
        (torch.eye(3) - 3 * torch.ones(3, 3).fill_diagonal_(0), {}, "not positive semidefinite"),
        (torch.eye(3), {"weight": [1.0, -1.0]}, "each is a number from 0"),
    ],
)
def test_regmean_refuses(gram, setting, words):
    with pytest.raises(ParameterError, match=words):
        regmean(noise(0, 2, 4, 3), gram=torch.stack([gram, gram]), **{"weight": [1.0, 1.0], **setting})

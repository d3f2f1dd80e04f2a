"""Least squares of one layer: by NumPy's on the rows themselves, row by row, and by closed forms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from partial_networks import of, stirred
from torch import Tensor, nn
from torch.nn import functional

import merganser.align.refit
from merganser.align.layout import Side, Split, widened
from merganser.align.moments import Joint, joint_moments
from merganser.align.normal import Normal, solve
from merganser.align.refit import Target, refit
from merganser.errors import NonFiniteError, ParameterError, ShapeError
from merganser.symmetry import Spec

Array = np.ndarray
A, M, B = Side.FIRST, Side.BOTH, Side.SECOND
TARGETS: tuple[Target, ...] = ("averaged", "separate", "mixed")


def normal_of(x: Array, y: Array) -> Normal:
    normal = Normal.empty(x.shape[1], y.shape[1])
    normal.add(torch.from_numpy(x), torch.from_numpy(y))
    return normal


def sides(*which: Side) -> Tensor:
    return torch.tensor([int(side) for side in which], dtype=torch.uint8)


def reads(row: int, column: int) -> bool:
    """Whether a row of one side may read a column of another."""
    return {int(row), int(column)} != {int(A), int(B)}


def stacked(x: Array, y: Array, prior: Array, rows: Array, columns: Array, ridge: float, *, free: bool) -> Array:
    """Every row by itself, by least squares on its columns, with rows of the ridge below; the least about the prior."""
    spread = x - x.mean(0) if free else x
    strength = ridge * (spread**2).sum(0).mean()
    found = np.zeros_like(prior)
    for r, side in enumerate(rows):
        seen = [c for c, other in enumerate(columns) if reads(side, other)]
        one = np.ones((len(x), 1)) if free else np.zeros((len(x), 0))
        inputs = np.concatenate([x[:, seen], one], 1)
        damping = np.sqrt(strength) * np.eye(len(seen), inputs.shape[1])
        missed = np.concatenate([y[:, r] - x[:, seen] @ prior[r, seen], np.zeros(len(seen))])
        step = np.linalg.lstsq(np.concatenate([inputs, damping]), missed, rcond=1e-10)[0]
        found[r, seen] = prior[r, seen] + step[: len(seen)]
    return found


def problem(seed: int, rows: int = 60) -> tuple[Array, Array, Array]:
    """Inputs, targets and a prior, of 9 entries and 5 outputs."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 9)) @ generator.normal(size=(9, 9)) + generator.normal(size=9)
    return x, generator.normal(size=(rows, 5)) + 3, generator.normal(size=(5, 9))


ROWS = {"merged": (M,) * 5, "mixed": (A, A, M, B, B), "apart": (A, A, A, B, B), "unordered": (B, M, A, B, A)}
COLUMNS = {
    "merged": (M,) * 9,
    "mixed": (A, A, A, M, M, M, B, B, B),
    "unordered": (B, M, A, A, M, B, M, B, A),
    "apart": (A, A, A, A, B, B, B, B, B),
}


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_solve_is_least_squares_of_each_row_on_what_it_may_read(
    rows: str, columns: str, ridge: float, free: bool
) -> None:
    x, y, prior = problem(0)
    normal = normal_of(x, y)
    found = solve(
        normal.centred() if free else normal,
        torch.from_numpy(prior),
        sides(*ROWS[rows]),
        sides(*COLUMNS[columns]),
        ridge,
    )
    expected = stacked(x, y, prior, np.array(ROWS[rows]), np.array(COLUMNS[columns]), ridge, free=free)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("columns", ["merged", "mixed"])
def test_without_a_ridge_dead_and_repeated_inputs_move_weights_the_least(columns: str, mean: float, free: bool) -> None:
    x, y, prior = problem(1, rows=500)
    x += mean
    x[:, 1], x[:, 4], x[:, 7] = 0, x[:, 3], x[:, 6]  # one dead; one repeated among the merged, and among B's
    normal = normal_of(x, y)
    used = normal.centred() if free else normal
    found = solve(used, torch.from_numpy(prior), sides(*ROWS["mixed"]), sides(*COLUMNS[columns]), 0.0)
    expected = stacked(x, y, prior, np.array(ROWS["mixed"]), np.array(COLUMNS[columns]), 0.0, free=free)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("free", [False, True])
def test_without_a_ridge_inputs_that_differ_by_rounding_of_float32_count_as_repeated(free: bool) -> None:
    x, y, prior = problem(8, rows=500)
    x[:, 3] = x[:, 4]
    exact, noisy = normal_of(x, y), x.copy()
    noisy[:, 3] *= 1 + 2e-8 * np.random.default_rng(0).normal(size=500)
    found, expected = (
        solve(n.centred() if free else n, torch.from_numpy(prior), sides(*[M] * 5), sides(*[M] * 9), 0.0)
        for n in (normal_of(noisy, y), exact)
    )
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


def test_fewer_rows_than_entries_are_met_with_the_least_change() -> None:
    x, y, prior = problem(2, rows=4)
    found = solve(normal_of(x, y), torch.from_numpy(prior), sides(*[M] * 5), sides(*[M] * 9), 0.0).numpy()
    np.testing.assert_allclose(x @ found.T, y, rtol=1e-8)
    np.testing.assert_allclose(found, prior + (np.linalg.pinv(x) @ (y - x @ prior.T)).T, rtol=1e-8)


def test_inputs_that_are_all_dead_leave_the_prior() -> None:
    _, y, prior = problem(3)
    for ridge in (0.0, 1e-3):
        found = solve(normal_of(np.zeros((60, 9)), y), torch.from_numpy(prior), sides(*[M] * 5), sides(*[M] * 9), ridge)
        assert torch.equal(found, torch.from_numpy(prior))


def test_a_large_ridge_leaves_the_prior_without_its_blocks_of_zeros() -> None:
    x, y, prior = problem(4)
    rows, columns = ROWS["mixed"], COLUMNS["mixed"]
    found = solve(normal_of(x, y), torch.from_numpy(prior), sides(*rows), sides(*columns), 1e12).numpy()
    kept = np.array([[reads(r, c) for c in columns] for r in rows])
    np.testing.assert_allclose(found, prior * kept, atol=1e-9)
    assert not found[~kept].any()


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_out_of_range_is_refused(ridge: float) -> None:
    x, y, prior = problem(5)
    with pytest.raises(ParameterError, match="ridge is"):
        solve(normal_of(x, y), torch.from_numpy(prior), sides(*[M] * 5), sides(*[M] * 9), ridge)


@pytest.mark.parametrize("free", [False, True])
def test_residual_is_the_share_of_the_targets_that_is_missed(free: bool) -> None:
    x, y, weight = problem(6)
    normal = normal_of(x, y)
    error = y - x @ weight.T
    expected = error.var(0).sum() / y.var(0).sum() if free else (error**2).sum() / (y**2).sum()
    used = normal.centred() if free else normal
    assert used.residual(torch.from_numpy(weight)) == pytest.approx(expected, rel=1e-10)


def test_targets_that_never_vary_are_met() -> None:
    x, y, weight = problem(7)
    y[:] = 1234.567
    assert normal_of(x, y).centred().residual(torch.from_numpy(0 * weight)) == 0.0


# Two networks' layers: hidden groups of 6 and 5 units of a small MLP, of 4 and 7 channels of two convolutions.


@dataclass
class Case:
    """Two networks, and one layer of theirs that two groups meet in."""

    one: nn.Module
    two: nn.Module
    spec: Spec
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    batches: list[tuple[tuple[Tensor], dict[str, Tensor]]]
    layer: str
    splits: Mapping[str, Split]

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: widened(self.spec, name, x, self.b[name], self.splits) for name, x in self.a.items()}

    def moments(self) -> dict[str, Joint]:
        return joint_moments(self.one, self.two, self.batches, layers=[self.layer])

    def rows(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """What the layer takes in, (n, units, taps), and gives, (n, units), in each network."""
        found = []
        for network in (self.one, self.two):
            layer = network.get_submodule(self.layer)
            taken: list[Tensor] = []
            hook = layer.register_forward_pre_hook(lambda _, args, taken=taken: taken.append(args[0].detach()))
            with torch.no_grad():
                for (x,), _ in self.batches:
                    network(x)
                hook.remove()
                inputs, outputs = torch.cat(taken), layer(torch.cat(taken))
            if isinstance(layer, nn.Conv2d):
                windows = functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                inputs = windows.transpose(1, 2).reshape(-1, layer.in_channels, 9)
                outputs = outputs.movedim(1, -1).reshape(-1, layer.out_channels)
            else:
                inputs = inputs[..., None]
            found.append((inputs.numpy(), outputs.numpy()))
        return found[0], found[1]


def case(kind: str, *, bias: bool = True, apart: bool = True) -> Case:
    torch.manual_seed(0)
    if kind == "linear":
        network: nn.Module = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3)
        )
        shape: tuple[int, ...] = (4,)
    else:
        network = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 7, 3, stride=2, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(7, 2, 1),
        )
        shape = (2, 7, 7)
    it = of(network, (torch.randn(3, *shape),))
    two, b = copy.deepcopy(network), stirred(it.a, 5)
    two.load_state_dict(b)
    splits = {}
    for name in it.spec.axes["2.weight"][:2]:
        assert isinstance(name, str)
        size = it.spec.groups[name].size
        splits[name] = Split(size, tuple(range(1, size, 2)) if apart else ())
    batches = [((torch.randn(n, *shape, dtype=torch.float64),), {}) for n in (30, 11)]
    return Case(network, two, it.spec, it.a, b, batches, "2", splits)


def placed(first: Array, second: Array, split: Split, target: Target, view: int | None, *, outputs: bool) -> Array:
    """Units of two networks, along axis 1, as the merged network has them: [A's apart | merged | B's apart]."""
    apart, merged = list(split.apart), [u for u in range(split.size) if u not in split.apart]
    one, two = first[:, apart], second[:, apart]
    mean = (first[:, merged] + second[:, merged]) / 2
    if view is not None:
        own = (first, second)[view]
        one, two = (one, 0 * two) if view == 0 else (0 * one, two)
        if outputs or target == "separate":
            mean = own[:, merged]
    return np.concatenate([one, mean, two], 1)


def stacked_rows(it: Case, target: Target) -> tuple[Array, Array, Array, Array]:
    """Inputs and targets of the merged layer, and whose they are."""
    (xa, ya), (xb, yb) = it.rows()
    out, into = (it.splits[name] for name in it.spec.axes["2.weight"][:2])  # type: ignore[index]
    views = [None] if target == "averaged" else [0, 1]
    x = np.concatenate([placed(xa, xb, into, target, view, outputs=False) for view in views])
    y = np.concatenate([placed(ya, yb, out, target, view, outputs=True) for view in views])
    whose = [np.array([A] * len(s.apart) + [M] * len(s.merged) + [B] * len(s.apart)) for s in (out, into)]
    return x.reshape(len(x), -1), y, whose[0], np.repeat(whose[1], x.shape[2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_refit_from_moments_is_least_squares_on_the_rows_themselves(kind: str, target: Target, bias: bool) -> None:
    it = case(kind, bias=bias)
    done = refit(it.spec, it.a, it.b, it.state, it.moments(), it.splits, ridge=1e-2, target=target)
    x, y, rows, columns = stacked_rows(it, target)
    prior = it.state["2.weight"].reshape(len(rows), -1).numpy()
    expected = stacked(x, y, prior, rows, columns, 1e-2, free=bias)
    found = done.tensors["2.weight"]
    assert found.shape == it.state["2.weight"].shape
    np.testing.assert_allclose(found.reshape(len(rows), -1).numpy(), expected, atol=1e-9)
    offset = (y - x @ expected.T).mean(0) if bias else np.zeros(len(rows))
    if bias:
        np.testing.assert_allclose(done.tensors["2.bias"].numpy(), offset, atol=1e-9)
    missed, wanted = y - x @ expected.T - offset, y - y.mean(0) if bias else y
    assert done.residuals["2"] == pytest.approx((missed**2).sum() / (wanted**2).sum(), rel=1e-7)


@pytest.mark.parametrize("target", TARGETS)
def test_sums_that_are_put_together_in_parts_are_the_same(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    it = case("convolution")
    whole, parts = (
        (monkeypatch.setattr(merganser.align.refit, "BLOCK", block),
         refit(it.spec, it.a, it.b, it.state, it.moments(), it.splits, target=target))[1]
        for block in (1000, 7)
    )  # fmt: skip
    for name, x in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], x, rtol=0, atol=1e-12)


def test_a_layer_before_a_norm_is_fitted_as_if_it_had_a_bias() -> None:
    it = case("convolution", bias=False)
    done = refit(it.spec, it.a, it.b, it.state, it.moments(), it.splits, ridge=1e-2, free=["2"])
    x, y, rows, columns = stacked_rows(it, "averaged")
    prior = it.state["2.weight"].reshape(len(rows), -1).numpy()
    expected = stacked(x, y, prior, rows, columns, 1e-2, free=True)
    np.testing.assert_allclose(done.tensors["2.weight"].reshape(len(rows), -1).numpy(), expected, atol=1e-9)
    assert done.tensors.keys() == {"2.weight"}


def test_separate_targets_without_a_split_are_regmean() -> None:
    it = case("linear", bias=False, apart=False)
    done = refit(it.spec, it.a, it.b, it.state, it.moments(), {}, ridge=0.0, target="separate")
    (xa, _), (xb, _) = it.rows()
    gram_a, gram_b = (x[:, :, 0].T @ x[:, :, 0] for x in (xa, xb))
    a, b = it.a["2.weight"].numpy(), it.b["2.weight"].numpy()
    expected = np.linalg.solve(gram_a + gram_b, gram_a @ a.T + gram_b @ b.T).T
    np.testing.assert_allclose(done.tensors["2.weight"].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_blocks_of_zeros_of_a_widening_layer_stay_zero_and_no_other_entry_does(kind: str) -> None:
    it = case(kind)  # neither square nor symmetric: a mask the other way round would be seen
    found = refit(it.spec, it.a, it.b, it.state, it.moments(), it.splits).tensors["2.weight"]
    out, into = (it.splits[name] for name in it.spec.axes["2.weight"][:2])  # type: ignore[index]
    rows, columns = ([A] * len(s.apart) + [M] * len(s.merged) + [B] * len(s.apart) for s in (out, into))
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            assert bool((found[r, c] != 0).all()) == reads(row, column)


@pytest.mark.parametrize("target", TARGETS)
def test_two_that_are_one_keep_their_weights(target: Target) -> None:
    it = case("convolution", apart=False)
    moments = joint_moments(it.one, it.one, it.batches, layers=["2"])
    done = refit(it.spec, it.a, it.a, dict(it.a), moments, {}, ridge=0.0, target=target)
    torch.testing.assert_close(done.tensors["2.weight"], it.a["2.weight"], rtol=0, atol=1e-9)
    torch.testing.assert_close(done.tensors["2.bias"], it.a["2.bias"], rtol=0, atol=1e-9)
    assert done.residuals["2"] < 1e-12


def test_a_head_apart_gives_both_networks_outputs_of_any_number() -> None:
    it = case("linear")
    b = dict(it.b) | {"4.weight": it.b["4.weight"][:2], "4.bias": it.b["4.bias"][:2]}
    it.two[4] = nn.Linear(5, 2).double()  # type: ignore[index]
    it.two.load_state_dict(b)
    moments = joint_moments(it.one, it.two, it.batches, layers=["4"])
    state = {"4.weight": widened(it.spec, "4.weight", it.a["4.weight"], b["4.weight"], {}, ["4"])}
    state["4.bias"] = torch.cat([it.a["4.bias"], b["4.bias"]])
    done = refit(it.spec, it.a, b, state, moments, {}, ridge=0.0, apart_heads=["4"])
    it.layer = "4"
    (xa, ya), (xb, yb) = it.rows()
    inputs = np.concatenate([(xa + xb)[:, :, 0] / 2, np.ones((len(xa), 1))], 1)
    expected = np.linalg.lstsq(inputs, np.concatenate([ya, yb], 1), rcond=None)[0].T
    np.testing.assert_allclose(done.tensors["4.weight"].numpy(), expected[:, :-1], atol=1e-9)
    np.testing.assert_allclose(done.tensors["4.bias"].numpy(), expected[:, -1], atol=1e-9)


def test_moments_of_another_layer_are_refused() -> None:
    it = case("linear")
    with pytest.raises(ShapeError, match="takes in 6 entries, and its moments are those of 4"):
        refit(it.spec, it.a, it.b, it.state, {"2": joint_moments(it.one, it.two, it.batches)["0"]}, {})


@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    it = case("linear")
    moments = it.moments()
    broken = dict(it.b) | {name: it.b[name].clone()}
    broken[name][0] = torch.inf
    with pytest.raises(NonFiniteError, match="2 has NaN or infinity among its weights"):
        refit(it.spec, it.a, broken, it.state, moments, it.splits)


def test_an_unknown_target_is_refused() -> None:
    it = case("linear")
    with pytest.raises(ParameterError, match="target is 'mean'; it is averaged, separate, mixed"):
        refit(it.spec, it.a, it.b, it.state, {}, {}, target="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
def test_moments_that_are_spent_are_gone_and_gave_the_same(target: Target) -> None:
    it = case("convolution")
    moments = it.moments()
    kept = refit(it.spec, it.a, it.b, it.state, moments, it.splits, target=target)
    assert moments
    spent = refit(it.spec, it.a, it.b, it.state, moments, it.splits, target=target, spent=True)
    assert not moments
    assert all(torch.equal(x, spent.tensors[name]) for name, x in kept.tensors.items())

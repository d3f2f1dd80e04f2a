"""What merging a pair costs: by closed forms, by least squares on the rows themselves, and by what a merge does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import Batch
from merganser.align.moments import Joint, joint_moments
from merganser.align.sensitivity import unit_values, values
from merganser.errors import MissingTensorError, ParameterError, ShapeError
from merganser.symmetry import Spec, symmetries

TINY = 1e-10


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 9, 2)
    )


class Joined(nn.Module):
    """A layer that reads two groups and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x).tanh(), x, self.right(x).relu()], dim=-1))


class Pair:
    """Two networks near each other, and what they take in."""

    def __init__(self, make: Callable[[], nn.Module], shape: Sequence[int], *, ridge: float = TINY) -> None:
        torch.manual_seed(0)
        self.one = make().double().eval()
        self.two = copy.deepcopy(self.one)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.two.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.batches: list[Batch] = [((torch.randn(*shape, generator=generator, dtype=torch.float64),), {})]
        self.spec: Spec = symmetries(self.one, *self.batches[0]).spec
        self.ridge = ridge

    @property
    def a(self) -> dict[str, Tensor]:
        return dict(self.one.state_dict())

    @property
    def b(self) -> dict[str, Tensor]:
        return dict(self.two.state_dict())

    def moments(self, layers: Sequence[str] | None = None) -> dict[str, Joint]:
        return joint_moments(self.one, self.two, self.batches, layers=layers)

    def values(self, layers: Sequence[str] | None = None, share: float = 0.5) -> dict[str, Tensor]:
        groups = tuple(self.spec.groups)
        return unit_values(self.spec, self.a, self.b, self.moments(layers), groups, ridge=self.ridge, share=share)

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """What a layer takes in, unfolded, in both networks."""
        found = []
        for network in (self.one, self.two):
            layer, seen = network.get_submodule(name), []
            hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
            with torch.no_grad():
                network(*self.batches[0][0])
            hook.remove()
            x = seen[0]
            if isinstance(layer, nn.Conv2d):
                x = functional.unfold(x, layer.kernel_size, padding=layer.padding).movedim(1, -1)
            found.append(x.flatten(0, -2))
        return found[0], found[1]

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        weights = self.one.get_submodule(name).weight, self.two.get_submodule(name).weight
        return weights[0].detach().flatten(1), weights[1].detach().flatten(1)


def left_by_least_squares(x: Tensor, y: Tensor) -> float:
    """Mean square that an affine map leaves, as it is to be expected on other rows."""
    n, p = x.shape[0], x.shape[1] + 1
    whole = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], dim=1)
    rest = y - whole @ torch.linalg.lstsq(whole, y, driver="gelsd").solution
    plain = float((y - y.mean(0)).square().sum()) / n
    return min(plain, float(rest.square().sum()) / n * (n + p) / (n - p)) if n > p else plain


def expected(pair: Pair, name: str, owned: Sequence[Sequence[int]], share: float = 0.5) -> Tensor:
    """Values of the pairs that own these entries of a layer, from its rows."""
    (x, z), (v, w) = pair.rows(name), pair.layer(name)
    y, mean = (1 - share) * x @ v.T + share * z @ w.T, (1 - share) * x + share * z
    off = y - mean @ ((1 - share) * v + share * w).T  # what the mean of both leaves
    apart = [i for own in owned for i in own]
    left = left_by_least_squares(mean, off)
    if len(apart) < x.shape[1]:
        error = left_by_least_squares(torch.cat([mean, (x - z)[:, apart]], dim=1), off)
        rest = [i for i in range(x.shape[1]) if i not in apart]
        plain = share * (1 - share) * ((x - z)[:, rest] @ (v - w)[:, rest].T)
        left -= min(error, float((plain - plain.mean(0)).square().sum()) / len(x))
    alone = []
    for own in owned:
        shown = share * (1 - share) * ((x - z)[:, list(own)] @ (v - w)[:, list(own)].T)
        alone.append(float((shown - shown.mean(0)).square().sum()) / len(x))
    power = float((y - y.mean(0)).square().sum()) / len(x)
    return torch.tensor(alone, dtype=torch.float64) / sum(alone) * left / power


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_values_of_a_hidden_layer_are_those_of_least_squares_on_its_rows(share: float) -> None:
    pair = Pair(mlp, (50, 4))
    wanted = expected(pair, "2", [[i] for i in range(6)], share)
    torch.testing.assert_close(pair.values(share=share)["0"], wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "group", "entries"), [("2", "0", 9), ("5", "2", 9)], ids=["taps", "places of a picture"]
)
def test_a_unit_has_all_of_its_entries(layer: str, group: str, entries: int) -> None:
    pair = Pair(convolutions, (60, 2, 5, 5))
    units = pair.spec.groups[group].size
    owned = [list(range(u * entries, (u + 1) * entries)) for u in range(units)]
    torch.testing.assert_close(pair.values([layer])[group], expected(pair, layer, owned), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("rows", [80, 11])
def test_of_a_layer_that_reads_two_groups_either_may_use_the_other_merged(rows: int) -> None:
    pair = Pair(Joined, (rows, 4))
    found = pair.values()
    torch.testing.assert_close(found["left"], expected(pair, "last", [[i] for i in range(5)]), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(
        found["right"], expected(pair, "last", [[9 + i] for i in range(3)]), rtol=1e-5, atol=1e-12
    )
    assert all(bool((gains > 0).any()) for gains in found.values())


def test_layers_that_read_a_group_add_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            return torch.cat([self.one(x), self.two(x)], dim=-1)

    pair = Pair(Two, (50, 4))
    alone = [pair.values([name])["first"] for name in ("one", "two")]
    torch.testing.assert_close(pair.values()["first"], alone[0] + alone[1])
    assert all(bool((gains > 0).all()) for gains in alone)


def test_too_few_rows_for_least_squares_leave_the_error_of_the_mean() -> None:
    pair = Pair(mlp, (7, 4))
    (x, z), (v, w) = pair.rows("2"), pair.layer("2")
    y, mean = (x @ v.T + z @ w.T) / 2, (x + z) / 2 @ ((v + w) / 2).T
    left, power = ((e - e.mean(0)).square().sum() for e in (y - mean, y))
    torch.testing.assert_close(pair.values()["0"].sum(), left / power)


def test_a_network_and_itself_lose_nothing() -> None:
    pair = Pair(convolutions, (9, 2, 5, 5))
    pair.two = pair.one
    assert all(bool((gains == 0).all()) for gains in pair.values().values())


def test_only_pairs_that_differ_have_a_value_and_the_worst_comes_first() -> None:
    pair = Pair(mlp, (50, 4))
    pair.two.load_state_dict(pair.a)
    with torch.no_grad():
        for unit, size in ((1, 0.1), (4, 1.0)):
            pair.two.get_parameter("0.weight")[unit] += size
            pair.two.get_parameter("2.weight")[:, unit] += size
    found = pair.values()["0"]
    assert found.nonzero().flatten().tolist() == [1, 4]
    assert found[4] > found[1]
    ordered = values(pair.spec, pair.a, pair.b, pair.moments(), ["0"], ridge=TINY)["0"]
    assert torch.equal(ordered, torch.stack([found[4], found[1], *[found.new_zeros(())] * 4]))


def test_a_pair_with_the_same_inputs_or_the_same_weights_loses_nothing() -> None:
    pair = Pair(mlp, (50, 4))
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            pair.two.get_parameter(name)[2] = pair.one.get_parameter(name)[2]
        pair.two.get_parameter("2.weight")[:, 3] = pair.one.get_parameter("2.weight")[:, 3]
    found = pair.values()["0"]
    assert found[2] < 1e-12
    assert found[3] == 0
    assert bool((found[[0, 1, 4, 5]] > 1e-6).all())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3))
def test_values_follow_their_units_and_do_not_see_the_scale_of_a_layer(seed: int, size: float) -> None:
    pair = Pair(mlp, (30, 4), ridge=1e-4)
    before = pair.values()["0"]
    orders = pair.spec.random(torch.Generator().manual_seed(seed))
    for network in (pair.one, pair.two):
        network.load_state_dict({n: pair.spec.apply(orders, n, x) for n, x in network.state_dict().items()})
        with torch.no_grad():
            network.get_parameter("2.weight").mul_(size)
            network.get_parameter("2.bias").add_(size)
    torch.testing.assert_close(pair.values()["0"], before[orders["0"]], rtol=1e-7, atol=1e-14)


def test_values_are_the_same_whichever_network_comes_first() -> None:
    pair = Pair(Joined, (40, 4), ridge=1e-4)
    before = pair.values()
    pair.one, pair.two = pair.two, pair.one
    after = pair.values()
    assert all(torch.allclose(after[group], gains, rtol=1e-9) for group, gains in before.items())


def test_keeping_the_worst_pairs_apart_leaves_less_than_keeping_any_others() -> None:
    """Of all ways to keep 2 of 6 apart, refitted by least squares: the chosen one is among the best three of 15."""
    pair = Pair(mlp, (400, 4))
    (x, z), (v, w) = pair.rows("2"), pair.layer("2")
    y = (x @ v.T + z @ w.T) / 2
    worst = sorted(pair.values()["0"].argsort(descending=True)[:2].tolist())
    left = {}
    for i in range(6):
        for j in range(i + 1, 6):
            inputs = torch.cat([(x + z) / 2, (x - z)[:, [i, j]]], dim=1)
            left[i, j] = left_by_least_squares(inputs, y)
    assert sorted(left, key=left.__getitem__).index((worst[0], worst[1])) < 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_have_values_as_wholes_and_units_within_them_none() -> None:
    pair = Pair(Attention, (20, 5, 8))
    heads = [g for g in pair.spec.groups if pair.spec.inner(g)]
    assert len(heads) == 1
    moments = pair.moments()
    found = unit_values(pair.spec, pair.a, pair.b, moments, heads, ridge=TINY)[heads[0]]
    torch.testing.assert_close(found, expected(pair, "o", [range(4), range(4, 8)]), rtol=1e-5, atol=1e-12)
    inner = pair.spec.inner(heads[0])[0]
    with pytest.raises(ParameterError, match="has units of its own"):
        unit_values(pair.spec, pair.a, pair.b, moments, [inner])


def test_what_does_not_fit_is_refused() -> None:
    pair = Pair(mlp, (30, 4))
    moments = pair.moments()
    with pytest.raises(ParameterError, match="'1' is no group"):
        values(pair.spec, pair.a, pair.b, moments, ["1"])
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ParameterError, match="ridge"):
            values(pair.spec, pair.a, pair.b, moments, ["0"], ridge=ridge)
    with pytest.raises(ShapeError, match=r"2\.weight takes in 6 entries, and its moments have 4"):
        values(pair.spec, pair.a, pair.b, {"2": moments["0"]}, ["0"])
    with pytest.raises(MissingTensorError, match=r"B lacks 2\.weight"):
        values(pair.spec, pair.a, {n: x for n, x in pair.b.items() if n != "2.weight"}, moments, ["0"])


@pytest.mark.parametrize(("make", "name", "entries"), [(mlp, "2", 6), (Joined, "last", 12)])
def test_inputs_that_vary_as_little_as_their_rounding_have_a_value_all_the_same(
    make: Callable[[], nn.Module], name: str, entries: int
) -> None:
    """Means of 1e7 and deviations of 0.1: what sums of products leave of a covariance is not positive definite."""
    pair = Pair(make, (60, 4))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x, z = (1e7 + 0.1 * torch.randn(60, entries, generator=generator, dtype=torch.float64) for _ in range(2))
        rows = torch.cat([x, z, torch.ones(60, 1, dtype=torch.float64)], dim=1)
        found = unit_values(pair.spec, pair.a, pair.b, {name: Joint(rows.T @ rows, 60)}, tuple(pair.spec.groups))
        assert all(bool(torch.isfinite(gains).all()) and bool((gains >= 0).all()) for gains in found.values())


def test_a_group_that_no_measured_layer_reads_has_zeros() -> None:
    pair = Pair(mlp, (30, 4))
    assert bool((pair.values(["0"])["0"] == 0).all())

"""Rules that make one model of several: expected numbers from loops in float64 and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from merganser.decentral import rules
from merganser.decentral.matching import NetworkAligner
from merganser.errors import MissingTensorError, ParameterError, ShapeError
from tiny_agents import SPEC, TinyAligner, function, model

WEIGHTS = {0: 0.25, 2: 0.35, 7: 0.4}


def models(seed: int = 0) -> dict[int, dict[str, Tensor]]:
    return {agent: model(seed + agent) for agent in WEIGHTS}


def test_plain_is_the_weighted_sum_of_every_entry_rounded_once() -> None:
    states = models()
    merged = rules.plain(2, states, WEIGHTS)
    for name in ("w", "b", "v", "norm.running_mean"):
        for place, value in enumerate(merged[name].flatten().tolist()):
            entries = [WEIGHTS[j] * states[j][name].flatten()[place].item() for j in (0, 2, 7)]
            assert value == pytest.approx(math.fsum(entries), rel=1e-7)
        exact = sum(WEIGHTS[j] * states[j][name].double() for j in (0, 2, 7))
        assert torch.equal(merged[name], exact.float())  # type: ignore[union-attr]


def test_what_does_not_float_stays_the_agents_own() -> None:
    merged = rules.plain(7, models(), WEIGHTS)
    assert int(merged["count"]) == 7
    assert merged["count"].dtype == torch.int64


@given(st.permutations([0, 2, 7]), st.integers(0, 100))
def test_the_order_in_which_models_are_given_does_not_change_a_bit(order: list[int], seed: int) -> None:
    states = models(seed)
    shuffled = {j: states[j] for j in order}
    for rule in (
        lambda x: rules.plain(2, x, WEIGHTS),
        lambda x: rules.soft(2, x, WEIGHTS, 0.9),
        lambda x: rules.model_stock(2, x, WEIGHTS, model(seed + 50)),
    ):
        one, two = rule(states), rule(shuffled)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_merge_alone_changes_no_bit() -> None:
    states = {3: model(3)}
    for merged in (
        rules.plain(3, states, {3: 1.0}),
        rules.soft(3, states, {3: 1.0}, 0.3),
        rules.model_stock(3, states, {3: 1.0}, model(1)),
    ):
        assert all(torch.equal(merged[name], states[3][name]) for name in merged)
        assert merged["w"] is not states[3]["w"]


@pytest.mark.parametrize("own", [0.0, 0.25, 1.0])
def test_soft_moves_own_weights_towards_the_mean(own: float) -> None:
    states = models()
    mean = rules.plain(0, states, WEIGHTS)
    merged = rules.soft(0, states, WEIGHTS, own)
    for name in ("w", "v"):
        expected = own * states[0][name].double() + (1 - own) * mean[name].double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


def test_soft_refuses_a_share_that_is_none() -> None:
    with pytest.raises(ParameterError, match=r"1\.5; it is in \[0, 1\]"):
        rules.soft(0, models(), WEIGHTS, 1.5)


def test_model_stock_of_orthogonal_ways_goes_back_to_the_anchor() -> None:
    anchor = {"x": torch.zeros(3)}
    states = {0: {"x": torch.tensor([1.0, 0, 0])}, 1: {"x": torch.tensor([0, 2.0, 0])}}
    assert rules.model_stock(0, states, {0: 0.5, 1: 0.5}, anchor)["x"].tolist() == [0, 0, 0]


def test_model_stock_of_one_way_is_the_mean() -> None:
    anchor = {"x": torch.tensor([1.0, 1.0])}
    states = {0: {"x": torch.tensor([2.0, 2.0])}, 1: {"x": torch.tensor([4.0, 4.0])}}
    torch.testing.assert_close(
        rules.model_stock(0, states, {0: 0.5, 1: 0.5}, anchor)["x"], torch.tensor([3.0, 3.0]), rtol=0, atol=1e-6
    )


def test_model_stock_is_the_papers_ratio_for_two() -> None:
    """t = 2 cos / (1 + cos): at an angle of 60 degrees 2/3."""
    anchor = {"x": torch.zeros(2)}
    angle = math.pi / 3
    states = {0: {"x": torch.tensor([1.0, 0.0])}, 1: {"x": torch.tensor([math.cos(angle), math.sin(angle)])}}
    mean = (states[0]["x"] + states[1]["x"]) / 2
    found = rules.model_stock(0, states, {0: 0.5, 1: 0.5}, anchor)["x"]
    torch.testing.assert_close(found, 2 / 3 * mean, rtol=0, atol=1e-6)


def test_model_stock_leaves_statistics_at_their_mean_and_is_plain_without_an_anchor() -> None:
    states = models()
    mean = rules.plain(0, states, WEIGHTS)
    drawn = rules.model_stock(0, states, WEIGHTS, model(99))
    assert torch.equal(drawn["norm.running_mean"], mean["norm.running_mean"])
    assert not torch.allclose(drawn["w"], mean["w"])
    free = rules.model_stock(0, states, WEIGHTS, None)
    assert all(torch.equal(free[name], mean[name]) for name in mean)


@given(st.integers(0, 500))
def test_a_permuted_copy_of_oneself_merges_to_oneself(seed: int) -> None:
    own = model(seed)
    orders = SPEC.random(torch.Generator().manual_seed(seed))
    copy = TinyAligner().moved(orders, own)
    every, matches = rules.brought(1, {1: own, 4: copy}, TinyAligner())
    merged = rules.plain(1, every, {1: 0.5, 4: 0.5})
    assert torch.equal(matches[4].orders["h"], orders["h"].argsort())
    for name, x in own.items():
        torch.testing.assert_close(merged[name], x, rtol=0, atol=1e-6)


class Small(nn.Module):
    """Convolutions, BatchNorm and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(2, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.second, self.norm2 = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = (x + self.norm2(self.second(x))).relu()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def small(seed: int) -> Small:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = Small()
        with torch.no_grad():
            for norm in (network.norm1, network.norm2):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
            for x in pictures(8):
                network(x)  # statistics, so that no unit is always zero
    return network.eval()


def pictures(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(20, 2, 5, 5, generator=generator) for _ in range(count)]


def test_a_network_merged_with_permuted_copies_of_itself_is_itself_by_activations() -> None:
    network = small(0)
    aligner = NetworkAligner(network, pictures())
    own = {name: x.clone() for name, x in network.state_dict().items()}
    spec = aligner.found.spec
    assert len(spec.groups) >= 1
    copies = {}
    for agent in (0, 3):
        orders = spec.random(torch.Generator().manual_seed(agent))
        assert any(not torch.equal(o, torch.arange(len(o))) for o in orders.values())
        copies[agent] = aligner.moved(orders, own)
    every, matches = rules.brought(1, {**copies, 1: own}, aligner)
    merged = rules.plain(1, every, {0: 0.3, 1: 0.3, 3: 0.4})
    for name, x in own.items():
        torch.testing.assert_close(merged[name], x, rtol=0, atol=1e-6)
    assert min(min(match.correlation.values()) for match in matches.values()) == pytest.approx(1, abs=1e-6)


def test_an_aligned_network_keeps_its_function() -> None:
    one, two = small(1), small(2)
    aligner = NetworkAligner(one, pictures())
    (match,) = aligner.match(one.state_dict(), [two.state_dict()])
    assert min(match.fixed.values()) < 1
    (x,) = pictures(1)
    before = two(x)
    two.load_state_dict(aligner.moved(match.orders, two.state_dict()))
    torch.testing.assert_close(two(x), before, rtol=1e-5, atol=1e-5)


def test_an_order_that_gains_next_to_nothing_is_not_taken() -> None:
    network = small(3)
    near = {n: x + 1e-4 if x.is_floating_point() else x for n, x in network.state_dict().items()}
    (match,) = NetworkAligner(network, pictures(), least_gain=0.5).match(network.state_dict(), [near])
    assert set(match.fixed.values()) == {1.0}
    other = small(4).state_dict()
    (kept,) = NetworkAligner(network, pictures(), least_gain=1e9).match(network.state_dict(), [other])
    (moved,) = NetworkAligner(network, pictures()).match(network.state_dict(), [other])
    assert set(kept.fixed.values()) == {1.0}
    assert min(moved.fixed.values()) < 1


def test_a_network_that_diverged_is_left_in_its_order() -> None:
    network = small(5)
    broken = {n: torch.full_like(x, torch.nan) if x.is_floating_point() else x for n, x in network.state_dict().items()}
    (match,) = NetworkAligner(network, pictures()).match(network.state_dict(), [broken])
    assert set(match.fixed.values()) == {1.0}


def test_statistics_that_a_network_came_with_say_nothing_of_its_units() -> None:
    """BatchNorm has those of the pictures that run, in the network that stays and in the one that moves."""
    one, two = small(6).state_dict(), small(7).state_dict()
    aligner = NetworkAligner(small(6), pictures())
    strange = [
        {n: x * 37 + 5 if n.endswith(("running_mean", "running_var")) else x for n, x in state.items()}
        for state in (one, two)
    ]
    (match,), (again,) = aligner.match(one, [two]), aligner.match(strange[0], [strange[1]])
    assert min(match.fixed.values()) < 1
    assert match.correlation == again.correlation
    assert all(torch.equal(order, again.orders[name]) for name, order in match.orders.items())


def test_units_are_correlated_as_a_run_in_training_mode_shows_them() -> None:
    """The mean correlation of hidden units, by hand: BatchNorm of the batch, and Pearson in float64."""

    class Normed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.up, self.norm, self.down = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)

        def hidden(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return ((y - y.mean(0)) / (y.var(0) + self.norm.eps).sqrt()).relu()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x)).relu())

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    one, two = Normed(0), Normed(1)
    (match,) = NetworkAligner(one, [x]).match(one.state_dict(), [two.state_dict()])
    (name, order), (_, found) = *match.orders.items(), *match.correlation.items()
    with torch.no_grad():
        rows = torch.cat([one.hidden(x).T.double(), two.hidden(x).T.double()[order]])
    expected = torch.corrcoef(rows)[:9, 9:].nan_to_num().diagonal().mean()
    assert found == pytest.approx(float(expected), abs=1e-6), name


def test_units_that_no_activation_shows_are_brought_into_order_by_weights() -> None:
    class Maxout(nn.Module):
        """The largest of three units: which is which shows in no product."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.pieces, self.head = nn.Linear(6, 10), nn.Linear(10, 24), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.pieces(self.up(x).relu()).unflatten(-1, (8, 3)).amax(-1))

    network = Maxout()
    aligner = NetworkAligner(network, [torch.randn(32, 6, generator=torch.Generator().manual_seed(1))])
    spec, state = aligner.found.spec, network.state_dict()
    moved = aligner.moved(spec.random(torch.Generator().manual_seed(2)), state)
    (match,) = aligner.match(state, [moved])
    back = aligner.moved(match.orders, moved)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert any(not torch.equal(moved[name], state[name]) for name in ("pieces.weight", "pieces.bias"))


def test_batches_of_two_shapes_are_refused() -> None:
    with pytest.raises(ParameterError, match="differ in shape"):
        NetworkAligner(small(0), [torch.zeros(2, 2, 5, 5), torch.zeros(1, 2, 5, 5)])
    with pytest.raises(ParameterError, match="no batch"):
        NetworkAligner(small(0), [])


def test_permuting_units_leaves_the_tiny_function() -> None:
    state, x = model(0), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    moved = TinyAligner().moved(SPEC.random(torch.Generator().manual_seed(2)), state)
    torch.testing.assert_close(function(moved, x), function(state, x))


def test_models_that_do_not_fit_are_refused_by_name() -> None:
    states = models()
    del states[2]["b"]
    with pytest.raises(MissingTensorError, match="agent 2 lacks b"):
        rules.plain(0, states, WEIGHTS)
    states = models()
    states[7]["v"] = torch.zeros(1)
    with pytest.raises(ShapeError, match=r"\(3, 6\) in agent 0, \(1,\) in agent 7"):
        rules.plain(0, states, WEIGHTS)
    with pytest.raises(ParameterError, match="agent 1 merges"):
        rules.plain(1, models(), WEIGHTS)
    with pytest.raises(ParameterError, match="weights of"):
        rules.plain(0, models(), {0: 1.0})
    with pytest.raises(ParameterError, match=r"sum to 0\.[89]"):
        rules.plain(0, models(), {0: 0.25, 2: 0.35, 7: 0.3})

"""Graphs, their weights, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.decentral import graphs
from merganser.decentral.describing import describe
from merganser.decentral.topology import Mixing, Topology, dropped, lazy, metropolis, topology_of, uniform
from merganser.decentral.words import TopologyWords
from merganser.errors import ParameterError, RefError

KINDS = ("full", "ring", "star", "hub", "torus", "exponential", "one_peer_exponential", "random_matching")


def made(kind: str, agents: int, weights: str = "metropolis", seed: int = 0) -> Topology:
    return topology_of(TopologyWords.model_validate({"kind": kind, "weights": weights, "seed": seed}), agents)


def written(folder: Path, **content: object) -> TopologyWords:
    path = folder / "graph.json"
    path.write_text(json.dumps(content))
    return TopologyWords(kind="file", file=str(path))


# closed forms and published values


@pytest.mark.parametrize(("agents", "lambda2"), [(5, 0.5393), (10, 0.8727), (20, 0.9674)])
def test_ring_has_the_published_lambda2(agents: int, lambda2: float) -> None:
    topology = made("ring", agents)
    assert topology.lambda2 == pytest.approx(lambda2, abs=5e-5)
    closed = max(abs(1 + 2 * math.cos(2 * math.pi * k / agents)) / 3 for k in range(1, agents))
    assert topology.lambda2 == pytest.approx(closed, abs=1e-12)
    assert topology.rho == pytest.approx(closed**2)
    assert topology.gap == pytest.approx(1 - closed)


@pytest.mark.parametrize(("agents", "lambda2"), [(5, 0.5), (10, 0.78), (20, 0.90)])
def test_published_hub_weights_give_the_published_lambda2(tmp_path: Path, agents: int, lambda2: float) -> None:
    a = math.floor(100 / (agents - 1)) / 100  # rounded down to two decimals, as published
    adjacency = np.zeros((agents, agents), dtype=int)
    adjacency[:-2, -2:] = adjacency[-2:, :-2] = 1
    weights = a * adjacency + np.diag([1 - 2 * a] * (agents - 2) + [1 - (agents - 2) * a] * 2)
    words = written(tmp_path, adjacency=adjacency.tolist(), weights=weights.tolist())
    assert topology_of(words, agents).lambda2 == pytest.approx(lambda2, abs=1e-9)
    ours = made("hub", agents, "uniform")
    assert [(i, j) for i, j in np.argwhere(adjacency).tolist() if i < j] == ours.at(0).edges
    assert ours.lambda2 == pytest.approx(1 - 2 / (agents - 1))


@pytest.mark.parametrize("agents", [2, 3, 7])
def test_full_averages_and_star_keeps_1_minus_1_over_n(agents: int) -> None:
    np.testing.assert_allclose(made("full", agents).at(0).weights, 1 / agents, atol=1e-15)
    assert made("full", agents).lambda2 == 0
    assert made("star", agents).lambda2 == pytest.approx(1 - 1 / agents if agents > 2 else 0)


def test_torus_of_20_is_4_by_5_with_its_closed_eigenvalues() -> None:
    values = [
        (1 + 2 * math.cos(2 * math.pi * a / 4) + 2 * math.cos(2 * math.pi * b / 5)) / 5
        for a in range(4)
        for b in range(5)
    ]
    assert made("torus", 20).lambda2 == pytest.approx(sorted(map(abs, values))[-2])
    assert made("torus", 7).at(0).edges == made("ring", 7).at(0).edges


def test_exponential_joins_powers_of_two() -> None:
    assert made("exponential", 12).neighbours(0, 0) == (1, 2, 4, 8, 10, 11)


def test_one_agent_keeps_its_model_and_two_share() -> None:
    for kind in KINDS:
        assert made(kind, 1).at(3).weights.tolist() == [[1.0]]
        assert made(kind, 1).lambda2 == 0
        if kind != "hub":  # two hubs are not joined
            assert made(kind, 2).at(3).weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(ParameterError, match="agent 0 never reaches 1"):
        made("hub", 2)
    with pytest.raises(ParameterError, match="0 agents"):
        made("ring", 0)


# weights


@st.composite
def connected_graphs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    agents = draw(st.integers(2, 9))
    tree = [(draw(st.integers(0, i - 1)), i) for i in range(1, agents)]
    every = [(i, j) for i in range(agents) for j in range(i + 1, agents)]
    return agents, sorted({*tree, *draw(st.lists(st.sampled_from(every)))})


@given(connected_graphs())
@settings(max_examples=60, deadline=None)
def test_weights_are_those_of_their_formulas_and_keep_the_mean(graph: tuple[int, list[tuple[int, int]]]) -> None:
    agents, edges = graph
    degree = [sum(i in edge for edge in edges) for i in range(agents)]
    expected = {"metropolis": np.eye(agents), "uniform": np.eye(agents)}
    for i, j in edges:
        for name, w in (("metropolis", 1 / (1 + max(degree[i], degree[j]))), ("uniform", 1 / (1 + max(degree)))):
            expected[name][[i, j], [j, i]] += w
            expected[name][[i, j], [i, j]] -= w
    for name, found in (("metropolis", metropolis(edges, agents)), ("uniform", uniform(edges, agents))):
        np.testing.assert_allclose(found, expected[name], atol=1e-14)
        assert Mixing(found).validate().lambda2 < 1
    np.testing.assert_allclose(lazy(edges, agents), (np.eye(agents) + expected["metropolis"]) / 2, atol=1e-14)
    assert np.linalg.eigvalsh(lazy(edges, agents)).min() > -1e-12


@given(connected_graphs(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_dropped_edge_gives_its_weight_back_to_both_ends(
    graph: tuple[int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    agents, edges = graph
    mixing = Mixing(metropolis(edges, agents))
    lost = data.draw(st.lists(st.sampled_from(edges), unique=True))
    left = dropped(mixing, [(j, i) if data.draw(st.booleans()) else (i, j) for i, j in lost])
    expected = mixing.weights.copy()
    for i, j in lost:
        expected[[i, j], [i, j]] += mixing.weights[i, j]
        expected[i, j] = expected[j, i] = 0
    np.testing.assert_allclose(left.validate(connected=False).weights, expected, atol=1e-14)
    for i in range(agents):  # what an agent computes alone has the same bits
        arrived = [j for j in mixing.neighbours(i) if (min(i, j), max(i, j)) not in lost]
        row = mixing.row(i, arrived)
        assert list(row) == sorted([i, *arrived])
        assert [row.get(j, 0.0) for j in range(agents)] == left.weights[i].tolist()
        assert math.fsum(row.values()) == pytest.approx(1, abs=1e-12)


def test_weights_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        made("ring", 3).at(0).weights[0, 0] = 2


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ([[1.0, 0.0]], r"shape \(1, 2\)"),
        (np.zeros((0, 0)), r"shape \(0, 0\)"),
        ([[1 / 3, 1 / 3], [1 / 3, 1 / 3]], "agent 0 sum to 0.666667, not to 1"),  # the published ring of 2
        ([[1.0, 0.0], [0.0, 1.0]], "agent 0 never reaches 1"),
        ([[0.5, 0.5], [0.4, 0.6]], r"weight \(0, 1\) is 0.5 and \(1, 0\) 0.4"),
        ([[1.5, -0.5], [-0.5, 1.5]], r"weight \(0, 1\) is -0.5"),
        ([[0.5, math.nan], [0.5, 0.5]], r"weight \(0, 1\) is nan"),
        ([[math.inf, 0.5], [0.5, 0.5]], r"weight \(0, 0\) is inf"),
        ([[0.5, 0.5 + 3e-9], [0.5 + 3e-9, 0.5]], "not to 1"),
    ],
)
def test_a_mixing_that_does_not_keep_the_mean_is_refused(weights: object, what: str) -> None:
    with pytest.raises(ParameterError, match=what):
        Mixing(weights).validate()  # type: ignore[arg-type]


# graphs that change


@pytest.mark.parametrize("agents", [2, 4, 8, 16])
def test_one_peer_rounds_give_the_exact_mean_of_a_power_of_two(agents: int) -> None:
    topology = made("one_peer_exponential", agents)
    assert topology.period == int(math.log2(agents))
    x = np.random.default_rng(0).normal(size=agents)
    y = x
    for t in range(topology.period):
        assert all(len(topology.neighbours(i, t)) == 1 for i in range(agents))
        y = topology.at(t).weights @ y
    np.testing.assert_allclose(y, x.mean(), atol=1e-14)
    assert topology.lambda2 == 0


@pytest.mark.parametrize("agents", [3, 5, 6, 11, 20])
def test_one_peer_rounds_hold_together_only_jointly(agents: int) -> None:
    topology = made("one_peer_exponential", agents)
    assert 0 < topology.lambda2 < 1
    for t in range(topology.period):
        with pytest.raises(ParameterError, match="never reaches"):
            topology.at(t).validate()
        assert topology.at(t + topology.period).weights.tolist() == topology.at(t).weights.tolist()


def test_rho_of_a_period_is_its_worst_factor() -> None:
    topology = made("one_peer_exponential", 6)
    product = np.eye(6)
    for t in range(topology.period):
        product = topology.at(t).weights @ product
    x = np.random.default_rng(1).normal(size=(6, 200))
    x -= x.mean(0)
    factors = np.linalg.norm(product @ x, axis=0) / np.linalg.norm(x, axis=0)
    assert factors.max() <= topology.lambda2**topology.period + 1e-12
    for _ in range(500):  # power iteration finds the worst direction
        x = product.T @ product @ x
        x -= x.mean(0)
        x /= np.linalg.norm(x, axis=0)
    worst = np.linalg.norm(product @ x, axis=0).max()
    assert worst == pytest.approx(topology.lambda2**topology.period, rel=1e-9)


@pytest.mark.parametrize("agents", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("weights", ["metropolis", "lazy"])
def test_rho_of_random_matchings_is_the_mean_over_all_of_them(agents: int, weights: str) -> None:
    w = 0.5 if weights == "metropolis" else 0.25
    squares = []
    for order in permutations(range(agents)):
        mixing = np.eye(agents)
        for i, j in zip(order[::2], order[1::2], strict=False):
            mixing[[i, j], [i, j]], mixing[[i, j], [j, i]] = 1 - w, w
        squares.append(mixing @ mixing)
    expected = np.abs(np.linalg.eigvalsh(np.mean(squares, 0) - 1 / agents)).max()
    assert made("random_matching", agents, weights).rho == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("agents", [5, 6])
def test_random_matchings_follow_from_seed_and_round_and_join_all_pairs_equally(agents: int) -> None:
    topology = made("random_matching", agents, seed=3)
    rounds = [topology.at(t).edges for t in range(1500)]
    for edges in rounds:
        assert len(edges) == agents // 2
        assert len({i for edge in edges for i in edge}) == 2 * len(edges)
    assert made("random_matching", agents, seed=3).at(700).edges == rounds[700]  # whatever was asked before
    assert [made("random_matching", agents, seed=4).at(t).edges for t in range(9)] != rounds[:9]
    chance = 1 / (agents - 1 + agents % 2)
    counts = [sum((i, j) in edges for edges in rounds) for i in range(agents) for j in range(i + 1, agents)]
    spread = math.sqrt(1500 * chance * (1 - chance))
    assert all(abs(count - 1500 * chance) < 4.5 * spread for count in counts)


# push-sum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("agents", [1, 3, 8])
def test_pushed_shares_sum_to_1_by_sender_and_reach_who_expects_them(kind: str, agents: int) -> None:
    topology = made(kind, agents)
    for t in range(4):
        pushing = topology.pushing(t)
        np.testing.assert_allclose(pushing.shares.sum(0), 1, atol=1e-15)
        assert (np.diag(pushing.shares) > 0).all()
        pairs = {(i, j) for i in range(agents) for j in pushing.receivers(i)}
        assert pairs == {(i, j) for j in range(agents) for i in pushing.senders(j)}


@pytest.mark.parametrize("kind", ["exponential", "one_peer_exponential", "star"])
@pytest.mark.parametrize("agents", [5, 8])
def test_push_sum_finds_the_mean(kind: str, agents: int) -> None:
    topology = made(kind, agents)
    x = np.random.default_rng(2).normal(size=agents)
    sums, weights = x.copy(), np.ones(agents)
    for t in range(200):
        shares = topology.pushing(t).shares
        sums, weights = shares @ sums, shares @ weights
    np.testing.assert_allclose(sums / weights, x.mean(), atol=1e-9)
    assert (kind == "star") == (np.abs(weights - 1).max() > 1e-6)  # where weights matter and where not


def test_one_peer_pushes_in_one_direction() -> None:
    topology = made("one_peer_exponential", 5)
    assert [topology.pushing(t).receivers(3) for t in range(4)] == [(4,), (0,), (2,), (4,)]
    assert topology.pushing(0).senders(3) == (2,)


# spanning trees


@pytest.mark.parametrize("kind", KINDS)
def test_tree_reaches_all_by_edges_of_the_graph_parents_first(kind: str) -> None:
    topology = made(kind, 11)
    tree = topology.parents()
    edges = {edge for t in range(topology.period) for edge in topology.at(t).edges}
    known, depth = [0], {0: 0}
    for child, parent in tree.items():
        assert parent in known
        assert topology.period == 0 or (min(child, parent), max(child, parent)) in edges
        known.append(child)
        depth[child] = depth[parent] + 1
    assert sorted(known) == list(range(11))
    assert list(depth.values()) == sorted(depth.values())
    if kind == "ring":
        assert tree == {1: 0, 10: 0, 2: 1, 9: 10, 3: 2, 8: 9, 4: 3, 7: 8, 5: 4, 6: 7}


# files


def test_file_without_weights_takes_those_of_the_words(tmp_path: Path) -> None:
    words = written(tmp_path, adjacency=[[1, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_allclose(
        topology_of(words, 3).at(5).weights, [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"weights": [[1.0]]}, "no adjacency"),
        ({"adjacency": [[0, 1]]}, r"adjacency has shape \(1, 2\); 2 agents"),
        ({"adjacency": [[0, 1, 0], [1, 0, 1], [0, 1, 0]]}, r"shape \(3, 3\)"),
        ({"adjacency": [[0, 1], [1]]}, "not a matrix"),
        ({"adjacency": "ring"}, "not a matrix"),
        ({"adjacency": [[0, 2], [2, 0]]}, "other than 0 and 1"),
        ({"adjacency": [[0, 1], [0, 0]]}, "joins 0 and 1 in one direction alone"),
        ({"adjacency": [[0, 0], [0, 0]]}, "never reaches 1"),
        ({"adjacency": [[0, 0], [0, 0]], "weights": [[0.5, 0.5], [0.5, 0.5]]}, "no such edge"),
        ({"adjacency": [[0, 1], [1, 0]], "weights": [[1 / 3, 1 / 3], [1 / 3, 1 / 3]]}, "sum to 0.666667"),
        ({"adjacency": [[0, 1], [1, 0]], "weights": [[1, 0], [0, 1]]}, "never reaches 1"),
        ({"adjacency": [[0, 1], [1, 0]], "wieghts": []}, "did you mean weights"),
    ],
)
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: dict[str, object], what: str) -> None:
    with pytest.raises(ParameterError, match=what):
        topology_of(written(tmp_path, **content), 2)


def test_a_file_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefError, match="cannot be read"):
        topology_of(TopologyWords(kind="file", file=str(tmp_path / "none")), 2)
    for text in ("{", "[" * 100_000, "[]", "\udc80"):
        (tmp_path / "graph.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ParameterError, match=r"sound JSON|no adjacency"):
            topology_of(TopologyWords(kind="file", file=str(tmp_path / "graph.json")), 2)


# words


def test_description_shows_rounds_that_differ_and_lists_many_agents() -> None:
    text = describe(made("one_peer_exponential", 4))
    assert "again after 2 rounds" in text
    assert text.count("round 0") == text.count("round 1") == 1
    assert "agents agree after a period" in text
    assert "1 neighbours, 4 snapshots a round" in text
    assert "drawn anew every round" in describe(made("random_matching", 4))
    assert "\n17: 0 0.3333, 16 0.3333, 17 0.3333" in describe(made("ring", 18))


def test_graphs_have_each_edge_once_and_no_loops() -> None:
    for kind, edges_of in graphs.STATIC.items():
        for agents in range(1, 14):
            edges = edges_of(agents)
            assert edges == sorted(set(edges)), (kind, agents)
            assert all(0 <= i < j < agents for i, j in edges), (kind, agents)

"""Agents that take turns: what arrives, which edges count, and what was sent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.decentral.edges import Edges
from merganser.decentral.in_process import Network
from merganser.decentral.topology import Topology, dropped
from merganser.decentral.transport import Traffic, Transport
from merganser.errors import ParameterError


def ends(agents: int, lost: Callable[[int, int, int, str], bool] | None = None) -> list[Transport]:
    network = Network(agents, lost=lost)
    return [network.end(i) for i in range(agents)]


def test_a_snapshot_reaches_its_peers_and_nobody_else() -> None:
    a, b, c, d = ends(4)
    assert [end.agent for end in (a, b, c, d)] == [0, 1, 2, 3]
    b.publish(0, b"from b", [2, 0])
    c.publish(0, b"from c", [0])
    got = a.collect(0, [3, 2, 1], deadline_s=0)
    assert list(got.items()) == [(2, b"from c"), (1, b"from b")]
    assert c.collect(0, [1], deadline_s=0) == {1: b"from b"}
    assert d.collect(0, [0, 1, 2], deadline_s=9) == {}


def test_traffic_is_what_was_really_sent_lost_or_not() -> None:
    a, b, _ = ends(3, lost=lambda *_: True)
    a.publish(0, bytes(10), [1, 2])
    a.publish(1, bytes(7), [1])
    a.acknowledge(1, [], [1, 2])
    assert a.traffic() == Traffic(snapshots=3, snapshot_bytes=27, acknowledged=2)
    assert b.traffic() == Traffic()
    assert b.collect(0, [0], deadline_s=0) == {}


def test_synchronous_takes_its_round_and_a_receiver_may_start_it_again() -> None:
    a, b = ends(2)
    b.publish(3, b"three", [0])
    b.publish(4, b"four", [0])
    for _ in range(2):
        assert a.collect(3, [1], deadline_s=0) == {1: b"three"}
    assert a.collect(4, [1], deadline_s=0) == {1: b"four"}
    assert a.collect(5, [1], deadline_s=0) == {}
    b.publish(5, b"five", [0])
    assert a.collect(3, [1], deadline_s=0) == {}  # two are kept


def test_asynchronous_takes_the_last_that_is_not_too_old() -> None:
    a, b = ends(2)
    b.publish(3, b"three", [0])
    assert a.collect(5, [1], deadline_s=0, max_staleness=2) == {1: b"three"}
    assert a.collect(6, [1], deadline_s=0, max_staleness=2) == {}
    assert a.collect(0, [1], deadline_s=0, max_staleness=0) == {1: b"three"}
    b.publish(2, b"two again", [0])  # started again from its checkpoint
    assert a.collect(3, [1], deadline_s=0, max_staleness=2) == {1: b"two again"}


def test_a_snapshot_published_again_takes_the_place_of_the_first() -> None:
    a, b = ends(2)
    for payload in (b"first", b"second"):
        b.publish(0, payload, [0])
    assert a.collect(0, [1], deadline_s=0) == {1: b"second"}


def test_an_end_of_no_agent_is_refused() -> None:
    for agent in (-1, 2):
        with pytest.raises(ParameterError, match="counted from 0"):
            Network(2).end(agent)


# edges


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [([1], [0], True), ([1], [], False), ([], [0], False), ([], [], False), ([1], None, False), (None, None, False)],
)
def test_an_edge_counts_only_if_both_ends_accepted(
    first: list[int] | None, second: list[int] | None, counts: bool
) -> None:
    a, b = ends(2)
    for end, accepted, peer in ((a, first, 1), (b, second, 0)):
        if accepted is not None:
            end.acknowledge(0, accepted, [peer])
    assert a.confirmed(0, [1], deadline_s=0) == ((1,) if counts else ())
    assert b.confirmed(0, [0], deadline_s=0) == ((0,) if counts else ())


def test_an_edge_is_settled_by_who_asks_first() -> None:
    a, b = ends(2)
    a.acknowledge(0, [1], [1])
    assert a.confirmed(0, [1], deadline_s=0) == ()
    b.acknowledge(0, [0], [0])  # too late
    assert b.confirmed(0, [0], deadline_s=0) == ()
    for end, peer in ((a, 1), (b, 0)):
        end.acknowledge(1, [peer], [peer])
    assert a.confirmed(1, [1], deadline_s=0) == (1,)
    a.acknowledge(1, [], [1])  # started again, and this time less arrived
    assert a.confirmed(1, [1], deadline_s=0) == (1,)
    assert b.confirmed(1, [0], deadline_s=0) == (0,)


CALLS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["acknowledge", "settle"]), st.sets(st.integers(0, 3))), max_size=30
)


@given(CALLS)
@settings(max_examples=150, deadline=None)
def test_both_ends_always_get_the_same_answer(calls: list[tuple[int, str, set[int]]]) -> None:
    edges, answers = Edges(), dict[tuple[int, int], bool]()
    for agent, what, accepted in calls:
        peers = [peer for peer in range(4) if peer != agent]
        if what == "acknowledge":
            edges.acknowledge(0, agent, accepted, peers)
            continue
        counted = edges.settle(0, agent, peers)
        for peer in peers:
            pair = (min(agent, peer), max(agent, peer))
            assert answers.setdefault(pair, peer in counted) == (peer in counted)


def test_an_end_need_not_wait_once_all_have_spoken_or_the_edge_is_settled() -> None:
    edges = Edges()
    edges.acknowledge(0, 0, [1], [1, 2])
    assert not edges.heard(0, 0, [1, 2])
    edges.acknowledge(0, 1, [0], [0])
    assert edges.heard(0, 0, [1])
    assert not edges.heard(0, 0, [1, 2])
    edges.settle(0, 2, [0])
    assert edges.heard(0, 0, [1, 2])


def test_old_rounds_are_forgotten() -> None:
    edges = Edges(keep=2)
    for round in range(10):
        for agent in (0, 1):
            edges.acknowledge(round, agent, [1 - agent], [1 - agent])
        assert edges.settle(round, 0, [1]) == (1,)
    assert [edges.heard(round, 0, [1]) for round in range(10)] == [False] * 7 + [True] * 3


def drift(share: float, rounds: int, *, settled: bool) -> float:
    """How far the mean of five numbers on a ring moves, where a share of all messages is lost; rms over 300 runs."""
    topology, chance = Topology("ring", 5), np.random.default_rng(0)
    x = chance.normal(size=(5, 300))
    began = x.mean(0)
    for t in range(rounds):
        lost = set(map(tuple, np.argwhere(chance.random((5, 5, 2)) < share).tolist()))

        def is_lost(i: int, j: int, _: int, what: str, lost: set[tuple[int, ...]] = lost) -> bool:
            return (i, j, int(what != "snapshot")) in lost

        crew, mixing = ends(5, is_lost), topology.at(t)
        near = [mixing.neighbours(i) for i in range(5)]
        for end in crew:
            end.publish(t, b"x", near[end.agent])
        got = [end.collect(t, near[end.agent], deadline_s=0) for end in crew]
        for end in crew:
            end.acknowledge(t, list(got[end.agent]), near[end.agent])
        counted = [end.confirmed(t, near[end.agent], deadline_s=0) if settled else got[end.agent] for end in crew]
        rows = [mixing.row(i, counted[i]) for i in range(5)]
        weights = np.array([[row.get(j, 0.0) for j in range(5)] for row in rows])
        if settled:
            gone = [(i, j) for i, j in mixing.edges if j not in counted[i]]
            assert weights.tolist() == dropped(mixing, gone).weights.tolist()
            assert all((i in counted[j]) == (j in counted[i]) for i, j in mixing.edges)
        x = weights @ x
    return float(np.sqrt(np.mean((x.mean(0) - began) ** 2)))


def test_lost_messages_move_no_mean_where_edges_are_settled_and_do_where_they_are_not() -> None:
    assert drift(0.2, 40, settled=True) < 1e-14
    assert drift(0.2, 40, settled=False) > 0.02

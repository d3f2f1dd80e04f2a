"""Letter boxes without Ray: waiting, and edges that are settled once; and a run in one process under spoiled bytes."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.decentral.faults import parse_faults
from merganser.decentral.in_process import Network
from merganser.decentral.ray_crew import RayCrew, on_ray
from merganser.decentral.ray_seat import Failure, Seat, Seats
from merganser.decentral.ray_transport import Box, RayTransport, ray_module, slack
from merganser.decentral.rounds import run, together
from merganser.errors import ClusterError, OutputError, ParameterError
from tiny_agents import TinyLearner, tiny_config


def at_once(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """What calls of one box that run side by side give."""

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*calls)

    return asyncio.run(all_of_them())


async def later(seconds: float, call: Coroutine[Any, Any, Any]) -> Any:
    await asyncio.sleep(seconds)
    return await call


def test_a_snapshot_is_waited_for_and_others_pass_by() -> None:
    box = Box(3)
    began = time.monotonic()
    found, _, early, _ = at_once(
        box.take(0, 4, [1, 2], None, 30.0),
        later(0.05, box.put(2, [0, 1], 4, b"two")),
        box.take(1, 4, [2], None, 30.0),
        later(0.1, box.put(1, [0], 4, b"one")),
    )
    assert {peer: x for peer, (x, _) in found.items()} == {1: b"one", 2: b"two"}
    assert early[2][0] == b"two"
    assert 0 < found[2][1] - found[1][1] < 10  # how long each had been there
    assert time.monotonic() - began < 10


def test_what_does_not_come_is_waited_for_until_the_deadline_and_no_longer() -> None:
    box = Box(3)
    began = time.monotonic()
    (found, *_) = at_once(box.take(0, 4, [1, 2], None, 0.2), box.put(1, [0], 4, b"one"), box.put(2, [0], 3, b"old"))
    assert 0.2 <= time.monotonic() - began < 5
    assert list(found) == [1]


def test_nobody_waits_for_who_is_away_and_what_is_there_of_it_counts() -> None:
    async def asks(box: Box) -> tuple[Any, Any]:
        found = await box.take(0, 4, [1, 2, 3], None, 60.0)
        await box.acknowledge(4, 0, list(found), [1, 2, 3])
        return list(found), await box.settle(4, 0, {1: 60.0, 2: 60.0})

    box = Box(4)
    began = time.monotonic()
    calls = [box.put(1, [0], 4, b"one"), box.put(2, [0], 4, b"two"), box.acknowledge(4, 2, [0], [0])]
    (answer, *_) = at_once(asks(box), *calls, later(0.2, box.leave({1, 2, 3})))
    assert answer == ([1, 2], (2,))
    assert time.monotonic() - began < 20


def test_who_takes_older_snapshots_waits_for_nobody() -> None:
    box = Box(3)
    at_once(box.put(1, [0], 2, b"one"), box.put(2, [0], 1, b"two"))
    began = time.monotonic()
    assert [list(found) for found in at_once(box.take(0, 3, [1, 2], 1, 60.0), box.take(0, 3, [1, 2], 2, 60.0))] == [
        [1],
        [1, 2],
    ]
    assert time.monotonic() - began < 5


def test_an_edge_waits_for_the_word_of_both_ends_and_is_settled_for_both() -> None:
    async def end(box: Box, agent: int, peer: int, says: float, asks: float) -> Any:
        await later(says, box.acknowledge(0, agent, [peer], [peer]))
        return await box.settle(0, agent, {peer: asks})

    box = Box(3)
    assert at_once(end(box, 0, 1, 0.0, 30.0), end(box, 1, 0, 0.1, 30.0)) == [(1,), (0,)]
    box = Box(3)  # whoever asks first settles it
    assert at_once(end(box, 0, 2, 0.0, 0.1), end(box, 2, 0, 0.4, 30.0)) == [(), ()]


@settings(max_examples=30, deadline=None)
@given(
    heard=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))),
    asked=st.permutations([(i, j) for i in range(4) for j in range(4) if i != j]),
)
def test_a_box_settles_edges_as_the_network_of_one_process_does(
    heard: set[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    network, box = Network(4), Box(4)
    told = asked[: len(asked) // 2]  # half of them speak before anybody asks, the others never

    async def both() -> None:
        for agent, peer in told:
            accepted = [peer] if (peer, agent) in heard else []
            network.end(agent).acknowledge(7, accepted, [peer])
            await box.acknowledge(7, agent, accepted, [peer])
        for agent, peer in asked:
            counted = network.end(agent).confirmed(7, [peer], deadline_s=0.0)
            assert await box.settle(7, agent, {peer: 0.0}) == counted

    asyncio.run(both())


def test_a_box_that_is_cleared_knows_nothing() -> None:
    box = Box(2)
    at_once(box.put(1, [0], 0, b"one"), box.acknowledge(0, 1, [0], [0]), box.acknowledge(0, 0, [1], [1]))
    at_once(box.clear(2))
    assert at_once(box.take(0, 0, [1], None, 0.0), box.settle(0, 0, {1: 0.0})) == [{}, ()]


def test_without_ray_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for asks in (ray_module, lambda: RayTransport(0, [], send_s=1.0)):
        with pytest.raises(ParameterError, match="agents on Ray need ray, which is missing") as caught:
            asks()
        assert caught.value.hint == 'pip install "merganser[cluster]"'


def test_fewer_processes_than_agents_are_refused(tmp_path: Path) -> None:
    two = Seats((None, None), ())
    with pytest.raises(ParameterError, match="2 processes for 5 agents"):
        on_ray(tiny_config(), TinyLearner, tmp_path, seats=two).__enter__()


def test_boxes_know_nothing_of_torch() -> None:
    import subprocess

    code = "import sys, merganser.decentral.ray_transport; print('torch' in sys.modules, 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "False False\n"
    )


def test_an_error_comes_to_the_driver_as_itself() -> None:
    error = OutputError("no room", "make some")
    failure = Failure(type(error).__name__, error.message, error.hint)
    assert type(failure.error()) is OutputError
    assert str(failure.error()) == str(error)
    assert str(Failure("ValueError", "bad").error()) == "ValueError: bad"
    assert isinstance(Failure("Sequence", "in the module, and no error").error(), ClusterError)
    answer = Seat().kept()
    assert answer == Failure("ClusterError", "no agent was begun in this process")


def test_slack_grows_with_the_deadline_and_is_never_nothing() -> None:
    assert slack(0.0) == 1.0
    assert slack(60.0) == 16.0


@pytest.mark.parametrize(
    ("kept", "answer"),
    [
        ([[1, 2], [1, 2], [1, 2]], 2),
        ([[1, 2], [0, 1], [1, 2]], 1),  # a step that all have
        ([[4, 5], [4, 5], [2, 3]], 5),  # one was away: it goes on from 3
        ([[4, 5], [3, 4], [3, 4], [1, 2]], 4),  # killed between checkpoints, and one was away
        ([[0], [], []], None),  # most have none: from the start
        ([[0], [0], []], 0),
        ([[], [], []], None),
    ],
)
def test_a_run_goes_on_from_the_step_that_most_have_kept(
    kept: list[list[int]], answer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = object.__new__(RayCrew)
    monkeypatch.setattr(crew, "_all", lambda *_: kept, raising=False)
    found = crew.kept()
    assert max(set(found[0]).intersection(*found[1:]), default=None) == answer


SPOILED = "0:1:publish:corrupt,1:1:publish:truncate,2:1:publish:oversize,3:1:publish:nan,4:1:publish:huge"
SPOILED += ",0:2:publish:stale,1:2:publish:wrong,2:2:publish:foreign"


def test_spoiled_snapshots_of_every_kind_are_refused_and_everybody_goes_on(tmp_path: Path) -> None:
    config = tiny_config(rounds=4, limits={"snapshot_bytes": 100_000})
    plan = parse_faults(SPOILED, config.limits, agents=5)
    crew = together(config, TinyLearner, folder=tmp_path, tamper=plan.tamper, hook=plan.hook, aligned=False)
    lines = run(config, crew, tmp_path)
    kinds = {0: "corrupted", 1: "truncated", 2: "oversized", 3: "non_finite", 4: "norm"}
    for record in lines[1]["agents"]:
        expected = sorted(kinds[(record["agent"] + step) % 5] for step in (-1, 1))
        assert sorted(record["rejected"]) == expected
        assert set(record["rejected"].values()) == {1}
        assert record["peers"] == []
    kinds = {0: "stale", 1: "wrong_model", 2: "wrong_run"}
    for record in lines[2]["agents"]:
        beside = [(record["agent"] + step) % 5 for step in (-1, 1)]
        assert sorted(record["rejected"]) == sorted(kinds[j] for j in beside if j in kinds)
    assert [line["agents"][i]["peers"] for line in lines[2:] for i in (3,)] == [[4], [2, 4]]
    assert all(record["merged"] is not None for line in lines for record in line["agents"])
    assert {agent.learner.seen for agent in crew.agents} == {12}  # type: ignore[attr-defined]


def test_two_halves_go_on_apart_and_grow_together_again(tmp_path: Path) -> None:
    def lost(sender: int, receiver: int, step: int, what: str) -> bool:
        return step in (1, 2, 3) and (sender < 2) != (receiver < 2)

    config = tiny_config(rounds=8)
    crew = together(config, TinyLearner, folder=tmp_path, aligned=False, network=Network(5, lost=lost))
    lines = run(config, crew, tmp_path)
    assert [line["agents"][2]["peers"] for line in lines] == [[1, 3], [3], [3], [3], *[[1, 3]] * 4]
    assert [sum(record["missing"] for record in line["agents"]) for line in lines] == [0, 4, 4, 4, 0, 0, 0, 0]
    distances = [line["distance"]["raw"] for line in lines]
    assert distances[-1] < 0.5 * distances[3]

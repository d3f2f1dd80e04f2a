"""The network of agents that are processes, on one machine or many: letter boxes that outlive agents, on Ray.

A box is an actor of its own. It keeps what arrived for some agents, so a snapshot that was published is there though
its sender dies; and it keeps the record of the edges whose smaller end has it, so each edge is settled in one place.
Boxes hold bytes and know nothing of torch.

How long an end waits: snapshots are waited for until the deadline. Who accepted a peer's snapshot then waits for that
peer's word until the deadline, counted from when the snapshot arrived, and `slack` are over: the peer may itself wait
until its deadline for somebody else who is stuck, and this must cost no edge between the others. Whom the crew knows to
be away, nobody waits for.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from merganser.decentral.in_process import Lost, Network
from merganser.decentral.transport import Traffic
from merganser.errors import ParameterError

#: Seconds that a box may take for an answer, beside what it is asked to wait.
ANSWER_S = 10.0


def ray_module() -> Any:
    """Ray, without chatter, and with nothing sent to its makers.

    Raises:
        ParameterError: If it is not installed.
    """
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ParameterError("agents on Ray need ray, which is missing", 'pip install "merganser[cluster]"') from error
    return ray


def slack(deadline_s: float) -> float:
    """Seconds beside a deadline for what is done between two waits: sending, checking, telling."""
    return 1.0 + 0.25 * deadline_s


class Box:
    """What arrived for some agents, and which of their edges count; an actor whose calls may wait side by side.

    Args:
        agents: of the run.
    """

    def __init__(self, agents: int) -> None:
        self._network = Network(agents)
        self._since: dict[tuple[int, int], tuple[int, float]] = {}  # the newest one's round, and when it came
        self._away: Collection[int] = ()
        self._changed = asyncio.Condition()

    async def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    async def clear(self, agents: int) -> None:
        """Forget everything: another run begins."""
        self._network, self._since, self._away = Network(agents), {}, ()

    async def leave(self, away: Collection[int]) -> None:
        """Wait for nothing more of some agents, until this is said of others instead; what is there of them counts."""
        self._away = away
        await self._tell()

    async def put(self, sender: int, receivers: Sequence[int], round: int, payload: bytes) -> None:
        """Take in a snapshot for some agents."""
        for receiver in receivers:
            self._network.put(sender, receiver, round, payload)
            self._since[receiver, sender] = round, time.monotonic()
        await self._tell()

    async def take(
        self, receiver: int, round: int, peers: Sequence[int], max_staleness: int | None, deadline_s: float
    ) -> dict[int, tuple[bytes, float]]:
        """What is there of some peers, and for how many seconds; where rounds must be the same, waits for all."""

        def found() -> dict[int, bytes]:
            taken = {peer: self._network.take(peer, receiver, round, max_staleness) for peer in peers}
            return {peer: payload for peer, payload in taken.items() if payload is not None}

        if max_staleness is None:
            await self._until(lambda: set(peers) <= found().keys() | set(self._away), deadline_s)
        now = time.monotonic()
        came = {peer: self._since.get((receiver, peer), (round, now)) for peer in peers}
        return {peer: (x, now - came[peer][1] if came[peer][0] == round else 0.0) for peer, x in found().items()}

    async def acknowledge(self, round: int, agent: int, accepted: Collection[int], peers: Sequence[int]) -> None:
        """Note from which of its peers an agent accepted a snapshot."""
        self._network.edges.acknowledge(round, agent, accepted, peers)
        await self._tell()

    async def settle(self, round: int, agent: int, patience: Mapping[int, float]) -> tuple[int, ...]:
        """Those peers whose edge with the agent counts, once each has said its word or its seconds are over."""
        began = time.monotonic()
        for peer, seconds in patience.items():
            left = seconds - (time.monotonic() - began)
            await self._until(partial(self._said, round, agent, peer), left)
        return self._network.edges.settle(round, agent, list(patience))

    def _said(self, round: int, agent: int, peer: int) -> bool:
        return peer in self._away or self._network.edges.heard(round, agent, [peer])

    async def _until(self, holds: Callable[[], bool], seconds: float) -> None:
        if holds() or seconds <= 0:
            return
        async with self._changed:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(holds), seconds)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class RayTransport:
    """One agent's end of a network of boxes; a `Transport`.

    A box that is gone has lost what was in it: for the agents such messages have merely not arrived.

    Args:
        agent: whose end.
        boxes: handles of all `Box` actors, in the same order for all; agent i has the (i mod number)th.
        send_s: seconds that sending may take.
        lost: says which messages get lost; none by default.
    """

    def __init__(self, agent: int, boxes: Sequence[Any], *, send_s: float, lost: Lost | None = None) -> None:
        self._ray = ray_module()
        self._agent, self._boxes, self._send_s, self._lost = agent, boxes, send_s, lost
        self._traffic = Traffic()
        #: Round of the last collected snapshots, when each of them had arrived, and when they were collected.
        self._arrived: tuple[int, dict[int, float], float] = (-1, {}, 0.0)
        self._accepted: set[int] = set()

    @property
    def agent(self) -> int:
        """Whose end this is."""
        return self._agent

    def publish(self, round: int, payload: bytes, peers: Sequence[int]) -> None:
        """Send the same bytes to every peer. What is lost on its way was sent."""
        was = self._traffic
        self._traffic = Traffic(
            was.snapshots + len(peers), was.snapshot_bytes + len(peers) * len(payload), was.acknowledged
        )
        told = self._arriving(round, peers, "snapshot")
        shared = self._ray.put(payload)
        self._sent(
            self._boxes[at].put.remote(self._agent, mine, round, shared)
            for at, mine in self._by_box(told, lambda peer: peer).items()
        )

    def collect(
        self, round: int, peers: Sequence[int], *, deadline_s: float, max_staleness: int | None = None
    ) -> dict[int, bytes]:
        """The newest bytes of every peer, once all are there or the deadline is over."""
        box = self._boxes[self._agent % len(self._boxes)]
        task = box.take.remote(self._agent, round, list(peers), max_staleness, deadline_s)
        try:
            found = self._ray.get(task, timeout=deadline_s + ANSWER_S)
        except self._ray.exceptions.RayError:
            found = {}
        now = time.monotonic()
        self._arrived = round, {peer: now - age for peer, (_, age) in found.items()}, now
        return {peer: payload for peer, (payload, _) in found.items()}

    def acknowledge(self, round: int, accepted: Collection[int], peers: Sequence[int]) -> None:
        """Tell the peers from which of them a sound snapshot of this round arrived."""
        was = self._traffic
        self._traffic = Traffic(was.snapshots, was.snapshot_bytes, was.acknowledged + len(peers))
        self._accepted = set(accepted)
        told = self._arriving(round, peers, "acknowledgement")
        self._sent(
            self._boxes[at].acknowledge.remote(round, self._agent, list(accepted), mine)
            for at, mine in self._by_box(told, self._keeper).items()
        )

    def confirmed(self, round: int, peers: Sequence[int], *, deadline_s: float) -> tuple[int, ...]:
        """Those peers with whom the edge counts; asks about those that it accepted, as no other edge can count.

        Who sends it nothing, and is sent something, has its time from when the others' snapshots were collected.
        """
        _, arrived, since = self._arrived if self._arrived[0] == round else (round, {}, 0.0)
        end = deadline_s + slack(deadline_s) - time.monotonic()
        patience = {peer: max(0.0, arrived.get(peer, since) + end) for peer in peers if peer in self._accepted}
        tasks = [
            self._boxes[at].settle.remote(round, self._agent, {peer: patience[peer] for peer in mine})
            for at, mine in self._by_box(patience, self._keeper).items()
        ]
        counted: set[int] = set()
        for task in self._ended(tasks, max(patience.values(), default=0.0) + ANSWER_S):
            with suppress(self._ray.exceptions.RayError):
                counted.update(self._ray.get(task, timeout=ANSWER_S))
        return tuple(peer for peer in peers if peer in counted)

    def traffic(self) -> Traffic:
        """What this end really sent."""
        return self._traffic

    def _keeper(self, peer: int) -> int:
        return min(self._agent, peer)

    def _by_box(self, peers: Iterable[int], owner: Callable[[int], int]) -> dict[int, list[int]]:
        """Peers by the box that is to hear of them: that of an owner."""
        found: dict[int, list[int]] = {}
        for peer in peers:
            found.setdefault(owner(peer) % len(self._boxes), []).append(peer)
        return found

    def _arriving(self, round: int, peers: Sequence[int], what: str) -> list[int]:
        return [peer for peer in peers if self._lost is None or not self._lost(self._agent, peer, round, what)]

    def _sent(self, tasks: Iterable[Any]) -> None:
        self._ended(list(tasks), self._send_s)

    def _ended(self, tasks: Sequence[Any], seconds: float) -> Sequence[Any]:
        if not tasks:
            return []
        ready, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)
        return list(ready)

"""The network of agents that take turns in one process: deterministic, nothing to install, nothing to wait for.

All agents do a phase before any of them does the next, so whatever is not there when it is asked for never comes;
deadlines are not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from merganser.decentral.edges import Edges
from merganser.decentral.transport import Traffic
from merganser.errors import ParameterError

#: Messages of one sender that a receiver keeps: the last, and the one before for a receiver that starts a round again.
KEPT = 2
#: Says whether a message is lost on its way: (sender, receiver, round, "snapshot" or "acknowledgement").
Lost = Callable[[int, int, int, str], bool]


class Network:
    """Everything that is on its way between agents.

    Args:
        agents: how many.
        lost: says which messages get lost; none by default.
    """

    def __init__(self, agents: int, *, lost: Lost | None = None) -> None:
        self.agents, self.edges = agents, Edges()
        self._lost = lost
        self._box: dict[tuple[int, int], dict[int, bytes]] = {}

    def end(self, agent: int) -> InProcess:
        """An agent's end of it; a new one counts what it sends from nothing.

        Raises:
            ParameterError: If there is no such agent.
        """
        if not 0 <= agent < self.agents:
            raise ParameterError(f"agent {agent} of {self.agents}; agents are counted from 0")
        return InProcess(self, agent)

    def arrives(self, sender: int, receiver: int, round: int, what: str) -> bool:
        """Whether a message is not lost."""
        return self._lost is None or not self._lost(sender, receiver, round, what)

    def put(self, sender: int, receiver: int, round: int, payload: bytes) -> None:
        """Lay a snapshot in a receiver's box, where it takes the place of an older one by the same sender."""
        box = self._box.setdefault((receiver, sender), {})
        box.pop(round, None)  # so that one published again is the last
        box[round] = payload
        while len(box) > KEPT:
            del box[next(iter(box))]

    def take(self, sender: int, receiver: int, round: int, max_staleness: int | None) -> bytes | None:
        """The last snapshot of a sender that is of the right age; it stays in the box."""
        box = self._box.get((receiver, sender), {})
        if max_staleness is None:
            return box.get(round)
        last = next(reversed(box), None)
        return None if last is None or round - last > max_staleness else box[last]


class InProcess:
    """One agent's end of a `Network`; a `Transport`.

    Attributes:
        agent: whose.
    """

    def __init__(self, network: Network, agent: int) -> None:
        self._network, self._agent, self._traffic = network, agent, Traffic()

    @property
    def agent(self) -> int:
        """Whose end this is."""
        return self._agent

    def publish(self, round: int, payload: bytes, peers: Sequence[int]) -> None:
        """Send the same bytes to every peer. What is lost on its way was sent."""
        sent, sent_bytes = len(peers), len(peers) * len(payload)
        self._count(snapshots=sent, snapshot_bytes=sent_bytes)
        for peer in peers:
            if self._network.arrives(self._agent, peer, round, "snapshot"):
                self._network.put(self._agent, peer, round, payload)

    def collect(
        self, round: int, peers: Sequence[int], *, deadline_s: float, max_staleness: int | None = None
    ) -> dict[int, bytes]:
        """The newest bytes of every peer, of what is there."""
        found = {peer: self._network.take(peer, self._agent, round, max_staleness) for peer in peers}
        return {peer: payload for peer, payload in found.items() if payload is not None}

    def acknowledge(self, round: int, accepted: Collection[int], peers: Sequence[int]) -> None:
        """Tell the peers from which of them a sound snapshot of this round arrived."""
        self._count(acknowledged=len(peers))
        told = [peer for peer in peers if self._network.arrives(self._agent, peer, round, "acknowledgement")]
        self._network.edges.acknowledge(round, self._agent, accepted, told)

    def confirmed(self, round: int, peers: Sequence[int], *, deadline_s: float) -> tuple[int, ...]:
        """Those peers with whom the edge counts; settles it for both ends."""
        return self._network.edges.settle(round, self._agent, peers)

    def traffic(self) -> Traffic:
        """What this end really sent."""
        return self._traffic

    def _count(self, *, snapshots: int = 0, snapshot_bytes: int = 0, acknowledged: int = 0) -> None:
        was = self._traffic
        self._traffic = Traffic(
            was.snapshots + snapshots, was.snapshot_bytes + snapshot_bytes, was.acknowledged + acknowledged
        )

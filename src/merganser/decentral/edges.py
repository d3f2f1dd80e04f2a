"""Which edges count in a round: decided once, for both ends.

Both ends say whether they accepted the other's snapshot. Whoever asks first settles the edge: it counts if both have
said yes by then. The other end gets the same answer, however late it asks, and so does an end that was restarted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Edges:
    """The record of some edges; whoever keeps it must be the only one who does.

    Args:
        keep: rounds that are remembered behind the newest one that anybody spoke of.
    """

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._said: dict[int, dict[tuple[int, int], bool]] = {}
        self._settled: dict[int, dict[tuple[int, int], bool]] = {}

    def acknowledge(self, round: int, agent: int, accepted: Collection[int], peers: Iterable[int]) -> None:
        """Note from which of its peers an agent accepted a snapshot; saying it again changes what is not settled."""
        said = self._said.setdefault(round, {})
        said.update({(agent, peer): peer in accepted for peer in peers})
        for old in [r for r in self._said if r < round - self._keep]:
            self._said.pop(old), self._settled.pop(old, None)

    def heard(self, round: int, agent: int, peers: Iterable[int]) -> bool:
        """Whether every peer has said so about the agent, or the edge is settled: asking changes nothing any more."""
        said, settled = self._said.get(round, {}), self._settled.get(round, {})
        return all((peer, agent) in said or _pair(agent, peer) in settled for peer in peers)

    def settle(self, round: int, agent: int, peers: Iterable[int]) -> tuple[int, ...]:
        """Those peers whose edge with the agent counts, in the order given; from now on for both ends.

        >>> edges = Edges()
        >>> edges.acknowledge(0, 1, [2], [2])
        >>> edges.settle(0, 1, [2])
        ()
        >>> edges.acknowledge(0, 2, [1], [1])
        >>> edges.settle(0, 2, [1])
        ()
        """
        said, settled = self._said.get(round, {}), self._settled.setdefault(round, {})
        counted = []
        for peer in peers:
            both = said.get((agent, peer), False) and said.get((peer, agent), False)
            if settled.setdefault(_pair(agent, peer), both):
                counted.append(peer)
        return tuple(counted)


def _pair(i: int, j: int) -> tuple[int, int]:
    return min(i, j), max(i, j)

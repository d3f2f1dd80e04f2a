"""What an agent needs of a network: snapshots out, snapshots in, and which edges both ends agree on.

An edge counts in a synchronous round only if the snapshots of both directions arrived and were accepted. Otherwise
one end would mix and the other would not, and the mean of all agents would drift.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Traffic:
    """What an agent really sent since it was started.

    Attributes:
        snapshots: messages with a model in them, one a receiver.
        snapshot_bytes: of those.
        acknowledged: small messages.
    """

    snapshots: int = 0
    snapshot_bytes: int = 0
    acknowledged: int = 0


class Transport(Protocol):
    """One agent's end of a network. Peers are agents' numbers; rounds are counted from 0.

    Every call is bounded in time, and none raises because of a peer that is slow, gone or faulty: such a peer is
    merely not in the answer.
    """

    @property
    def agent(self) -> int:
        """Whose end this is."""
        ...

    def publish(self, round: int, payload: bytes, peers: Sequence[int]) -> None:
        """Send the same bytes to every peer. What it sent to them before in an older round may be forgotten."""
        ...

    def collect(
        self, round: int, peers: Sequence[int], *, deadline_s: float, max_staleness: int | None = None
    ) -> dict[int, bytes]:
        """The newest bytes of every peer, once all are there or the deadline is over.

        Args:
            round: the agent's own.
            peers: to wait for.
            deadline_s: seconds to wait at most.
            max_staleness: None takes nothing but what was published in `round` (synchronous); otherwise what is at
                most so many rounds older, or newer (asynchronous), and waits for nobody.

        Returns:
            Bytes by peer, in the order of `peers`; a peer without any is left out.
        """
        ...

    def acknowledge(self, round: int, accepted: Collection[int], peers: Sequence[int]) -> None:
        """Tell the peers from which of them a sound snapshot of this round arrived."""
        ...

    def confirmed(self, round: int, peers: Sequence[int], *, deadline_s: float) -> tuple[int, ...]:
        """Those peers with whom the edge counts in this round: both ends accepted each other's snapshot.

        Waits until every peer has acknowledged or the deadline is over; then what is missing is settled as "does not
        count", for both ends: whichever end asks first settles it, and the other gets the same answer.
        """
        ...

    def traffic(self) -> Traffic:
        """What this end really sent."""
        ...

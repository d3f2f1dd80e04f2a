"""What an agent holds of its neighbours: the newest sound snapshot of each, and a count of what was refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from merganser.decentral.snapshot import Kind, Rejected, Snapshot, decode
from merganser.decentral.words import Limits


@dataclass(frozen=True)
class Refused:
    """One snapshot that was rejected.

    Attributes:
        sender: from whom.
        round: of the receiver.
        kind: why.
        message: why, in words.
    """

    sender: int
    round: int
    kind: Kind
    message: str


class Mailbox:
    """Opens what arrives for one agent. Bad bytes are counted and never stop it.

    Args:
        run: name of the run.
        fingerprint: of the agent's own model.
        limits: of size, and of the ratio of norms.

    Attributes:
        refused: everything that was rejected, in order.
    """

    def __init__(self, run: str, fingerprint: str, limits: Limits) -> None:
        self.refused: list[Refused] = []
        self._run, self._fingerprint, self._limits = run, fingerprint, limits
        self._newest: dict[int, Snapshot] = {}
        self._seen: dict[int, tuple[bytes, Snapshot | None]] = {}

    def receive(
        self, sender: int, payload: bytes, *, round: int, own_norm: float, max_staleness: int | None = None
    ) -> Snapshot | None:
        """Open bytes of a neighbour.

        Args:
            sender: from whom they came.
            payload: anything. The same bytes again give the same answer, and are counted once.
            round: the agent's own.
            own_norm: norm of the agent's own model; 0 compares nothing.
            max_staleness: None takes snapshots of this very round; otherwise of at most so many rounds before.

        Returns:
            The snapshot, or None if it was rejected.
        """
        known = hashlib.sha256(payload).digest()
        seen = self._seen.get(sender)
        if seen is not None and seen[0] == known:
            snapshot = seen[1]
            return snapshot if snapshot is not None and _in_time(snapshot, round, max_staleness) else None
        try:
            opened = decode(payload, self._limits)
            self._check(sender, opened, own_norm)
            if not _in_time(opened, round, max_staleness):
                raise Rejected(Kind.STALE, f"it is of round {opened.round}, and this is round {round}")
        except Rejected as error:
            self.refused.append(Refused(sender, round, error.kind, error.message))
            self._seen[sender] = known, None
            return None
        self._newest[sender], self._seen[sender] = opened, (known, opened)
        return opened

    def newest(self, sender: int) -> Snapshot | None:
        """The newest sound snapshot of a neighbour, of whatever round."""
        return self._newest.get(sender)

    def counts(self) -> dict[str, int]:
        """Rejections by kind, in the order of `Kind`; kinds without any are left out."""
        found = Counter(refused.kind for refused in self.refused)
        return {kind.value: found[kind] for kind in Kind if found[kind]}

    def _check(self, sender: int, snapshot: Snapshot, own_norm: float) -> None:
        """Whether it belongs to this run, model and sender, is newer than what is there, and of a size to merge."""
        if snapshot.run != self._run:
            raise Rejected(Kind.WRONG_RUN, f"it belongs to the run {snapshot.run!r}, not to {self._run!r}")
        if snapshot.sender != sender:
            raise Rejected(Kind.WRONG_RUN, f"it says that agent {snapshot.sender} sent it, and it came from {sender}")
        if snapshot.fingerprint != self._fingerprint:
            raise Rejected(Kind.WRONG_MODEL, "its names, types or shapes are not those of this agent's model")
        held = self._newest.get(sender)
        if held is not None and snapshot.age <= held.age:
            raise Rejected(Kind.STALE, f"(incarnation, round) {snapshot.age}, and {held.age} is there")
        if own_norm and not snapshot.norm <= self._limits.norm_ratio * own_norm:
            raise Rejected(Kind.NORM, f"its norm is {snapshot.norm:g}, that of the agent's own model {own_norm:g}")


def _in_time(snapshot: Snapshot, round: int, max_staleness: int | None) -> bool:
    if max_staleness is None:
        return snapshot.round == round
    return round - snapshot.round <= max_staleness

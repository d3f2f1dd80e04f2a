"""What is seen of one agent's round: numbers, edges and seconds, as a line of the journal says them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from merganser.decentral.distances import by_group, finite, mean_correlation, mean_fixed
from merganser.decentral.learner import Match
from merganser.decentral.mailbox import Refused
from merganser.decentral.transport import Traffic


@dataclass
class Seen:
    """A round of one agent, as far as it has come.

    Attributes:
        losses: sum over batches.
        batches: that it trained.
        trained: its numbers after training, before the merge.
        merged: the same after the merge.
        peers: with whom it merged last.
        missing: edges that did not count.
        matches: how models were brought into an order of units.
        seconds: by what they were spent on.
    """

    losses: float = 0.0
    batches: int = 0
    trained: dict[str, float] | None = None
    merged: dict[str, float] | None = None
    peers: list[int] = field(default_factory=list)
    missing: int = 0
    matches: list[Match] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "merge": 0.0, "evaluate": 0.0})

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds of what is done inside."""
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def record(self, sent: Traffic, refused: Sequence[Refused]) -> dict[str, Any]:
        """All of it as JSON, in which what is not finite is null.

        Args:
            sent: since the last record.
            refused: since the last record.
        """
        rejected = Counter(one.kind.value for one in refused)
        return {
            "loss": finite(self.losses / self.batches if self.batches else math.nan),
            "trained": _finite_all(self.trained),
            "merged": _finite_all(self.merged),
            "peers": self.peers,
            "missing": self.missing,
            "sent": {"snapshots": sent.snapshots, "bytes": sent.snapshot_bytes},
            "rejected": dict(sorted(rejected.items())),
            "fixed": _finite(mean_fixed(self.matches)),
            "correlation": _finite(mean_correlation(self.matches)),
            "groups": {name: [finite(value) for value in pair] for name, pair in by_group(self.matches).items()},
            "seconds": dict(self.seconds),
        }


def since(before: Traffic, now: Traffic) -> Traffic:
    """What was sent between two counts."""
    return Traffic(
        now.snapshots - before.snapshots,
        now.snapshot_bytes - before.snapshot_bytes,
        now.acknowledged - before.acknowledged,
    )


def _finite_all(values: Mapping[str, float] | None) -> dict[str, float | None] | None:
    return None if values is None else {name: finite(value) for name, value in values.items()}


def _finite(value: float | None) -> float | None:
    return None if value is None else finite(value)

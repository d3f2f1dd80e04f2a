"""An agent on Ray as its crew sees it, and how long a crew waits for agents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from merganser.decentral.ray_seat import Failure


@dataclass(frozen=True)
class Patience:
    """How long a crew waits, and how often it tries.

    Attributes:
        start_s: seconds for processes to start, and to read what they go on from.
        rejoin_s: seconds that the next step waits for an agent whose process is started again.
        step_s: seconds that the first agent may take for a step.
        restarts: times that an agent's process is started again.
    """

    start_s: float = 300.0
    rejoin_s: float = 60.0
    step_s: float = 86_400.0
    restarts: int = 3


@dataclass
class Member:
    """An agent as the crew sees it.

    Attributes:
        number: of the agent.
        seat: its process.
        step: that it was last told to do.
        tasks: what it has not answered yet, in order.
        starting: whether its process is being started again.
        deaths: of its process.
        away: whether it takes no part in the step.
        failure: what ended the agent.
        lost: steps that were done, and not kept when its process died.
        news: what happened to it since its last record.
        late: its records of rounds whose line was written before.
        record: of the step, if it did it.
        last: its last record.
    """

    number: int
    seat: Any
    step: int = -1
    tasks: list[Any] = field(default_factory=list)
    starting: bool = False
    deaths: int = 0
    away: bool = False
    failure: Failure | None = None
    lost: int = 0
    news: list[str] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] | None = None
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def free(self) -> bool:
        """Whether it can be told to do something."""
        return self.failure is None and not self.tasks

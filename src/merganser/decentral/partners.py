"""With whom an agent exchanges models in a step, in either direction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from merganser.decentral.schedule import Exchange, Step, levels
from merganser.decentral.topology import Mixing, Topology


@dataclass(frozen=True, eq=False)
class Partners:
    """Those of one agent.

    Attributes:
        number: of the agent.
        topology: of the run.
    """

    number: int
    topology: Topology

    @cached_property
    def parents(self) -> dict[int, int]:
        """The spanning tree by which orders are taken over."""
        return self.topology.parents()

    @cached_property
    def level(self) -> dict[int, int]:
        """How far every agent is from its root."""
        return levels(self.parents)

    def mixing(self, step: Step) -> Mixing:
        """Weights of a step that merges or mixes."""
        n = self.topology.agents
        return Mixing(np.full((n, n), 1 / n)) if step.everybody else self.topology.at(step.at)

    def listeners(self, step: Step) -> tuple[int, ...]:
        """To whom it sends, in order of their numbers."""
        if step.exchange is Exchange.NONE:
            return ()
        if step.exchange is Exchange.ORDER:
            return tuple(c for c, p in self.parents.items() if p == self.number and self.level[c] == step.level)
        if step.exchange is Exchange.PUSH:
            return self.topology.pushing(step.at).receivers(self.number)
        return self.mixing(step).neighbours(self.number)

    def speakers(self, step: Step) -> tuple[int, ...]:
        """Who sends to it, in order of their numbers."""
        if step.exchange is Exchange.NONE:
            return ()
        if step.exchange is Exchange.ORDER:
            return (self.parents[self.number],) if self.level[self.number] == step.level else ()
        if step.exchange is Exchange.PUSH:
            return self.topology.pushing(step.at).senders(self.number)
        return self.mixing(step).neighbours(self.number)

    def all(self, step: Step) -> tuple[int, ...]:
        """With whom it has an edge, in order of their numbers."""
        return tuple(sorted({*self.speakers(step), *self.listeners(step)}))

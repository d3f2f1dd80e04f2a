"""One agent: train, publish, collect, merge, recalibrate, keep a checkpoint.

Every phase is a method of its own, so that agents can take turns in one process or run as actors. What leaves an agent
is bytes, and what it draws is determined by its seed and its checkpoint: an agent that is killed in any phase and
resumed from its checkpoint does the same again, bit for bit, if it hears the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.decentral import checkpoint, rules
from merganser.decentral.baselines import Pushed, combined, pushed_sum, readable
from merganser.decentral.distances import measured
from merganser.decentral.learner import Learner, Memory, Tensors
from merganser.decentral.mailbox import Mailbox
from merganser.decentral.partners import Partners
from merganser.decentral.schedule import Exchange, Step, steps
from merganser.decentral.seen import Seen, since
from merganser.decentral.snapshot import Rejected, Snapshot, data_bytes, decode, fingerprint_of, norm_of, refuse_above
from merganser.decentral.topology import Topology, topology_of
from merganser.decentral.transport import Traffic, Transport
from merganser.decentral.words import Limits, RunConfig
from merganser.errors import ParameterError, StateError


class Phase(str, Enum):
    """What an agent does in a step, in this order."""

    TRAIN = "train"
    PUBLISH = "publish"
    COLLECT = "collect"
    MERGE = "merge"
    RECALIBRATE = "recalibrate"
    CHECKPOINT = "checkpoint"


#: Called as (agent, number of the step, phase) when a phase begins; a fault plan is one.
Hook = Callable[[int, int, Phase], None]
#: Changes what an agent is about to publish: (agent, number of the step, payload) to payload; a fault plan is one.
Tamper = Callable[[int, int, bytes], bytes]


class Agent:
    """An agent of a run.

    Args:
        number: from 0.
        config: of the run.
        learner: what it trains.
        transport: its end of the network.
        folder: for its checkpoints; without one it keeps none.
        hook: called when a phase begins.
        tamper: changes what it publishes.
        topology: of the run, where it was made already.

    Raises:
        ParameterError: If there is no such agent, the rule compares units and the learner cannot, or all that it
            sends would be refused for its size.
    """

    def __init__(
        self,
        number: int,
        config: RunConfig,
        learner: Learner,
        transport: Transport,
        *,
        folder: Path | None = None,
        hook: Hook | None = None,
        tamper: Tamper | None = None,
        topology: Topology | None = None,
    ) -> None:
        if not 0 <= number < config.agents:
            raise ParameterError(f"agent {number} of {config.agents}; agents are counted from 0")
        self.number, self.config, self.learner, self.transport = number, config, learner, transport
        self.folder, self.hook, self.tamper = folder, hook, tamper
        self.topology = topology or topology_of(config.topology, config.agents)
        self.partners = Partners(number, self.topology)
        self.parents = self.partners.parents
        state = learner.state()
        self.pushed = Pushed(state) if config.algorithm == "sgp" else None
        self.anchor: Tensors | None = state if config.same_start else None
        #: Whether its units are in the order that all agents have; without one to have, they always are.
        self.placed = config.merge.rule != "aligned_once" or number == 0 or not self.parents
        sent = self.pushed.tensors() if self.pushed is not None else state
        self.mailbox = Mailbox(config.name, fingerprint_of(sent), config.limits)
        self.steps: list[Step] = []
        self._seen = Seen()
        self._arrived: dict[int, Tensors] = {}
        self._before: Tensors = {}
        self._traffic, self._refused = Traffic(), 0
        if config.merge.matches and learner.aligner() is None:
            raise ParameterError(f"merge.rule is {config.merge.rule}, and the learner of agent {number} aligns nothing")
        if self.parents and config.exchanges:
            refuse_above(config.limits, data_bytes(sent, config.codec))

    @cached_property
    def incarnation(self) -> int:
        """How many times it was started before; a start is counted when this is first asked."""
        return 0 if self.folder is None else checkpoint.started(self.folder)

    # the run

    def batches(self) -> int:
        """Batches of its own that a round has; those of the run are the most of any agent."""
        return self.learner.batches(self.config.local_epochs)

    def plan(self, batches: int) -> list[Step]:
        """Settle the steps of the run.

        Args:
            batches: of a round, the same for all agents; for algorithms that exchange with every batch.
        """
        self.steps = steps(self.config, depth=max(self.partners.level.values()), batches=batches)
        return self.steps

    def do(self, phase: Phase, number: int) -> None:
        """Run one phase of a step."""
        step = self.steps[number]
        if self.hook is not None:
            self.hook(self.number, number, phase)
        _PHASES[phase](self, step)

    def step(self, number: int) -> dict[str, Any]:
        """Run all phases of a step, waiting for neighbours as long as they may take; what `record` says."""
        for phase in Phase:
            self.do(phase, number)
        return self.record(number)

    # phases

    def train(self, step: Step) -> None:
        """Train on its own shard."""
        if step.first:
            self._seen = Seen()
            self.learner.new_round()
        if step.exchange in (Exchange.MIX, Exchange.PUSH):
            self._before = self.learner.state()
        batches = step.batches or self.learner.batches(step.epochs)
        if not batches:
            return
        with self._seen.timed("train"):
            loss = self.learner.train(batches)
        self._seen.losses += loss * batches
        self._seen.batches += batches
        if self.pushed is not None and step.exchange is Exchange.PUSH:
            self.pushed = self.pushed.adapted(self._before, self.learner.state())
        elif self.pushed is not None:  # a warm-up: nothing is pushed
            self.pushed = Pushed(self.learner.state())
        if step.epochs or step.last:
            with self._seen.timed("evaluate"):
                self._seen.trained = self._judged()

    def publish(self, step: Step) -> None:
        """Send its model to those that listen in this step."""
        peers = self._listeners(step)
        if not peers:
            return
        with self._seen.timed("merge"):
            snapshot = Snapshot(
                self.config.name, self.number, self.incarnation, step.number, self._sent(step), self.config.codec
            )
            payload = snapshot.encode()
            if self.tamper is not None:
                payload = self.tamper(self.number, step.number, payload)
            self.transport.publish(step.number, payload, peers)

    def collect(self, step: Step) -> None:
        """Take what arrived, and tell whose it was."""
        self._arrived = {}
        peers = self.partners.speakers(step)
        if not peers:
            return
        with self._seen.timed("merge"):
            waits = self.config.mode == "sync" or step.exchange is Exchange.ORDER
            oldest = None if waits else self.config.max_staleness
            got = self.transport.collect(step.number, peers, deadline_s=self.config.deadline_s, max_staleness=oldest)
            norm = norm_of(self._sent(step))
            own = norm if isfinite(norm) else 0.0  # what diverged is no measure of others
            for peer in sorted(got):
                snapshot = self.mailbox.receive(peer, got[peer], round=step.number, own_norm=own, max_staleness=oldest)
                if snapshot is not None:
                    self._arrived[peer] = snapshot.tensors
            if step.exchange is Exchange.PUSH:
                self._arrived = {j: self._arrived[j] for j in readable(self._arrived)}
            if self._settles(step):
                partners = self.partners.all(step)
                unheard = [j for j in partners if j not in peers]  # it pushes to them alone: the word is theirs
                accepted = [*self._arrived, *unheard] if self.placed else []
                self.transport.acknowledge(step.number, accepted, partners)

    def merge(self, step: Step) -> None:
        """Make one model of its own and those whose edges count."""
        if step.exchange is Exchange.NONE:
            return
        with self._seen.timed("merge"):
            models, self._arrived = dict(sorted(self._arrived.items())), {}
            if not self.placed:
                self._take_order(models)
                return
            if step.exchange is Exchange.ORDER:
                return
            peers, counted = self.partners.all(step), tuple(models)
            if self._settles(step):
                counted = self.transport.confirmed(step.number, peers, deadline_s=self.config.deadline_s)
                models = {j: x for j, x in models.items() if j in counted}
            self._seen.peers = list(models)
            self._seen.missing += len(peers) - len(counted)
            if step.exchange is Exchange.PUSH:
                self._merge_pushed(step, models, counted)
            else:
                self._merge_models(step, models)

    def recalibrate(self, step: Step) -> None:
        """Take statistics of BatchNorm again, and judge what the round came to."""
        if not step.last:
            return
        if step.exchange is Exchange.NONE:
            self._seen.merged = self._seen.trained
            return
        if self.config.recalibrate:
            with self._seen.timed("merge"):
                self.learner.recalibrate()
                if self.pushed is not None:
                    self.pushed = self.pushed.with_statistics(self.learner.state())
        with self._seen.timed("evaluate"):
            self._seen.merged = self.learner.evaluate()

    def checkpoint(self, step: Step) -> None:
        """Keep all that going on from here takes."""
        if self.folder is None or not step.last:
            return
        memory = self.learner.export()
        parts: dict[str, Tensors] = {"model": self.learner.state(), "memory": memory.tensors}
        if self.anchor is not None and self.config.merge.rule == "model_stock":
            parts["anchor"] = self.anchor
        if self.pushed is not None:
            parts["pushed"] = self.pushed.tensors()
        tensors = {f"{part}/{name}": x for part, content in parts.items() for name, x in content.items()}
        content = {
            "run": checkpoint.key_of(self.config),
            "agent": self.number,
            "step": step.number,
            "incarnation": self.incarnation,
            "placed": self.placed,
            "memory": memory.content,
        }
        checkpoint.save(self.folder, step.number, checkpoint.Checkpoint(tensors, content))

    # resuming

    def kept(self) -> list[int]:
        """Numbers of the steps that it could go on from, ascending."""
        return [] if self.folder is None else checkpoint.sound(self.folder)

    def resume(self, number: int) -> None:
        """Go on from the checkpoint of a step.

        Raises:
            StateError: If it cannot be read, or is one of another run or agent.
        """
        if self.folder is None:
            raise StateError(f"agent {self.number} keeps no checkpoints", "give the run a folder")
        found = checkpoint.load(self.folder, number)
        if found.content["run"] != checkpoint.key_of(self.config) or found.content["agent"] != self.number:
            raise StateError(
                f"{self.folder} holds checkpoints of another run or agent", "name another folder with --out"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "memory": {}}
        for name, x in found.tensors.items():
            part, _, inside = name.partition("/")
            parts.setdefault(part, {})[inside] = x
        self.learner.load(parts["model"])
        self.learner.restore(Memory(parts["memory"], dict(found.content["memory"])))
        self.placed = bool(found.content["placed"])
        if self.config.merge.rule == "model_stock":
            self.anchor = parts.get("anchor")
        if self.pushed is not None:
            self.pushed = Pushed.from_tensors(parts["pushed"])
        checkpoint.forget(self.folder, after=number)

    # what is seen of it

    def record(self, number: int) -> dict[str, Any]:
        """What the round of a step came to, as JSON: numbers, bytes, rejections and seconds since the last record."""
        traffic, refused = self.transport.traffic(), self.mailbox.refused
        seen = self._seen.record(since(self._traffic, traffic), refused[self._refused :])
        self._traffic, self._refused = traffic, len(refused)
        return {"agent": self.number, "incarnation": self.incarnation, "placed": self.placed, **seen}

    def encoded(self) -> bytes:
        """Its model as it is now, for whoever watches the run, however often it was started; not counted as sent."""
        return Snapshot(self.config.name, self.number, 0, 0, self.learner.state()).encode()

    def distances(self, models: Sequence[bytes], *, aligned: bool = True) -> dict[str, float | None]:
        """Consensus distance of all agents' models, raw and with their units in the order of the first one's.

        Args:
            models: what `encoded` of every agent gave.
            aligned: whether to match units, by the data that this agent compares units by.

        Returns:
            "raw" and "aligned"; None for what cannot be said, as where a model is not finite or is another network.
        """
        limits = Limits(snapshot_bytes=max(map(len, models)))
        try:
            states = [decode(model, limits).tensors for model in models]
        except Rejected:  # one of them is not finite
            return {"raw": None, "aligned": None}
        return measured(states, self.learner.aligner() if aligned else None, needed=self.config.merge.matches)

    # inside

    def _judged(self) -> dict[str, float]:
        """Its numbers before a merge, with statistics taken as they are after one; nothing of it stays."""
        if not self.config.recalibrate:
            return self.learner.evaluate()
        before = self.learner.state()
        self.learner.recalibrate()
        found = self.learner.evaluate()
        self.learner.load(before)
        return found

    def _listeners(self, step: Step) -> tuple[int, ...]:
        return self.partners.listeners(step) if self.placed else ()

    def _settles(self, step: Step) -> bool:
        """Whether an edge counts only if both ends say so."""
        return self.config.mode == "sync" and step.exchange in (Exchange.MERGE, Exchange.MIX, Exchange.PUSH)

    def _sent(self, step: Step) -> Tensors:
        if self.pushed is not None:
            return self.pushed.tensors()
        return self._before if step.exchange is Exchange.MIX else self.learner.state()

    def _merge_models(self, step: Step, models: Mapping[int, Tensors]) -> None:
        merge, row = self.config.merge, self.partners.mixing(step).row(self.number, list(models))
        if step.exchange is Exchange.MIX:
            known = {**models, self.number: self._before}
            self.learner.load(combined(self.number, known, row, self.learner.state()))
            return
        every: dict[int, Tensors] = {**models, self.number: self.learner.state()}
        if merge.rule == "aligned" and models:
            aligner = self.learner.aligner()
            assert aligner is not None
            every, matches = rules.brought(self.number, every, aligner)
            self._seen.matches += matches.values()
        if merge.rule == "soft":
            assert merge.own is not None
            merged = rules.soft(self.number, every, row, 0.0 if step.everybody else merge.own)
        elif merge.rule == "model_stock":
            merged = rules.model_stock(self.number, every, row, self.anchor)
            self.anchor = merged if models else self.anchor
        else:
            merged = rules.plain(self.number, every, row)
        self.learner.load(merged)

    def _merge_pushed(self, step: Step, models: Mapping[int, Tensors], counted: Collection[int]) -> None:
        assert self.pushed is not None
        pushing = self.topology.pushing(step.at)
        received = {self.number: self.pushed, **readable(models)}
        self.pushed = pushed_sum(self.number, received, pushing.row(self.number, received, counted))
        self.learner.load(self.pushed.model())

    def _take_order(self, models: Mapping[int, Tensors]) -> None:
        """Take over the order of units of its parent, or later of any neighbour: only those that have it speak."""
        if not models:
            return
        aligner = self.learner.aligner()
        assert aligner is not None
        (match,) = aligner.match(next(iter(models.values())), [self.learner.state()])
        self.learner.reorder(match.orders)
        self._seen.matches.append(match)
        self.placed = True


_PHASES: dict[Phase, Callable[[Agent, Step], None]] = {
    Phase.TRAIN: Agent.train,
    Phase.PUBLISH: Agent.publish,
    Phase.COLLECT: Agent.collect,
    Phase.MERGE: Agent.merge,
    Phase.RECALIBRATE: Agent.recalibrate,
    Phase.CHECKPOINT: Agent.checkpoint,
}

"""The process of one agent on Ray: what its actor does, and how it answers.

A seat is started empty and given an agent, so that an agent whose process was killed begins again in the next one, and
one process may serve several runs. Learners are made inside of it. What goes wrong is an answer, not an exception.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from merganser import errors
from merganser.decentral import checkpoint
from merganser.decentral.agent import Agent, Phase
from merganser.decentral.faults import FaultPlan
from merganser.decentral.in_process import Lost
from merganser.decentral.learner import Learner
from merganser.decentral.ray_transport import Box, RayTransport, ray_module
from merganser.decentral.rounds import one_thread
from merganser.decentral.schedule import Step
from merganser.decentral.topology import Topology
from merganser.decentral.words import RunConfig
from merganser.errors import ClusterError, MerganserError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Post:
    """What the process of an agent is told, the same for all agents of a run.

    Attributes:
        config: of the run.
        make: the learner of an agent, by its number.
        folder: of the run; all machines see it under this name.
        faults: on purpose.
        boxes: handles of the boxes.
        lost: says which messages get lost.
        topology: of the run; a file that says it is read by who began the run, where its name means something.
    """

    config: RunConfig
    make: Callable[[int], Learner]
    folder: Path
    faults: FaultPlan
    boxes: tuple[Any, ...]
    lost: Lost | None = None
    topology: Topology | None = None


@dataclass(frozen=True)
class Failure:
    """An error of an agent, as it comes to the driver.

    Attributes:
        kind: name of its class.
        message: what is wrong, and where.
        hint: what to do about it.
    """

    kind: str
    message: str
    hint: str | None = None

    def error(self) -> MerganserError:
        """The error again; one that is not ours is a `ClusterError` that names its class."""
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, MerganserError):
            return known(self.message, self.hint)
        return ClusterError(f"{self.kind}: {self.message}", self.hint)


def _answered(method: Callable[Concatenate[Seat, P], R]) -> Callable[Concatenate[Seat, P], R | Failure]:
    @wraps(method)
    def answered(self: Seat, *args: P.args, **options: P.kwargs) -> R | Failure:
        try:
            with one_thread():
                return method(self, *args, **options)
        except MerganserError as error:
            return Failure(type(error).__name__, error.message, error.hint)
        except Exception as error:  # of a learner: it ends this agent, and no other
            return Failure(type(error).__name__, str(error).strip().split("\n", 1)[0])

    return answered  # type: ignore[return-value]  # its first argument has a name


class Seat:
    """An actor with place for an agent. No method answers None."""

    def __init__(self) -> None:
        self._agent: Agent | None = None

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    @_answered
    def begin(self, post: Post, number: int) -> int:
        """Make an agent; how many batches a round of its own has."""
        return self._begin(post, number).batches()

    @_answered
    def rejoin(self, post: Post, number: int, batches: int) -> int:
        """Make an agent again in the middle of a run; the step whose checkpoint it goes on from, -1 for none."""
        agent = self._begin(post, number)
        agent.plan(batches)
        kept = agent.kept()
        if kept:
            agent.resume(kept[-1])
        return kept[-1] if kept else -1

    @_answered
    def plan(self, batches: int) -> list[Step]:
        """Settle the steps."""
        return self._here.plan(batches)

    @_answered
    def kept(self) -> list[int]:
        """Steps that it could go on from."""
        return self._here.kept()

    @_answered
    def resume(self, step: int) -> int:
        """Go on from its newest checkpoint that is not of a later step; that step, -1 for its start."""
        agent = self._here
        kept = [number for number in agent.kept() if number <= step]
        if kept:
            agent.resume(kept[-1])
        elif agent.folder is not None:
            checkpoint.forget(agent.folder, after=-1)
        return kept[-1] if kept else -1

    @_answered
    def work(self, number: int) -> Mapping[str, Any]:
        """Do a step, but for its checkpoint; its record, if a round ends with it."""
        agent = self._here
        if number == 0 and agent.folder is not None:  # checkpoints of a run that is not gone on with
            checkpoint.forget(agent.folder, after=-1)
        for phase in Phase:
            if phase is not Phase.CHECKPOINT:
                agent.do(phase, number)
        return agent.record(number) if agent.steps[number].last else {}

    @_answered
    def keep(self, number: int) -> bool:
        """Keep the checkpoint of a step."""
        self._here.do(Phase.CHECKPOINT, number)
        return True

    @_answered
    def encoded(self) -> bytes:
        """Its model as it is."""
        return self._here.encoded()

    @_answered
    def distances(self, aligned: bool, *models: bytes | Failure) -> dict[str, float | None]:
        """How far apart some models are."""
        return self._here.distances([x for x in models if not isinstance(x, Failure)], aligned=aligned)

    @property
    def _here(self) -> Agent:
        if self._agent is None:
            raise ClusterError("no agent was begun in this process")
        return self._agent

    def _begin(self, post: Post, number: int) -> Agent:
        self._agent, config = None, post.config
        transport = RayTransport(number, post.boxes, send_s=config.deadline_s, lost=post.lost)
        folder = post.folder / f"agent-{number}"
        self._agent = agent = Agent(number, config, post.make(number), transport, folder=folder, topology=post.topology)
        plan = post.faults.left(number, agent.incarnation)
        agent.hook, agent.tamper = plan.hook, plan.tamper
        return agent


@dataclass(frozen=True)
class Seats:
    """Processes of a cluster, for one crew after the other.

    Attributes:
        agents: handles of `Seat` actors.
        boxes: handles of `Box` actors.
    """

    agents: tuple[Any, ...]
    boxes: tuple[Any, ...]

    def close(self) -> None:
        """End them."""
        for actor in (*self.agents, *self.boxes):
            ray_module().kill(actor)


def take_seats(agents: int, *, boxes: int | None = None, cpus: float = 0.0) -> Seats:
    """Start processes on the cluster that this process is connected to, spread over its machines.

    Args:
        agents: how many.
        boxes: how many boxes; by default one a machine.
        cpus: processors that Ray sets aside for each agent; with 0 it starts as many as there are.

    Raises:
        ParameterError: If Ray is not installed.
        ClusterError: If this process is connected to no cluster.
    """
    ray = ray_module()
    if not ray.is_initialized():
        raise ClusterError("this process is connected to no Ray cluster", "ray.init() starts one, or finds one")
    if boxes is None:
        boxes = min(agents, sum(bool(node["Alive"]) for node in ray.nodes()))
    spread = {"scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": 0}
    seat, box = ray.remote(num_cpus=cpus, **spread)(Seat), ray.remote(num_cpus=0, **spread)(Box)
    return Seats(tuple(seat.remote() for _ in range(agents)), tuple(box.remote(agents) for _ in range(boxes)))

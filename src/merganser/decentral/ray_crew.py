"""All agents of a run as processes on Ray: who dies begins again, who is late or broken holds nobody up.

A step ends for the crew when all agents have done it, or a deadline and some slack after the first one has. Then

    died      its process is started again, goes on from the agent's newest checkpoint as a new incarnation, and takes
              part from the next step on; steps since that checkpoint are lost, of this agent alone
    late      it goes on, and takes part from the first step that begins after it is done
    failed    an error, such as a full disk, ends it; the others go on

Nobody waits for an agent that is known to be away: one that died, failed or was late, until it takes part again.
What happened is in the journal, under `faults` of the agent's next record. With `restarts` used up an agent stays away.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merganser.decentral import checkpoint
from merganser.decentral.baselines import effective
from merganser.decentral.faults import FaultPlan
from merganser.decentral.in_process import Lost
from merganser.decentral.learner import Learner, Tensors
from merganser.decentral.ray_member import Member, Patience
from merganser.decentral.ray_seat import Failure, Post, Seats, take_seats
from merganser.decentral.ray_transport import ray_module, slack
from merganser.decentral.schedule import Exchange, Step
from merganser.decentral.seen import Seen
from merganser.decentral.snapshot import Snapshot
from merganser.decentral.topology import topology_of
from merganser.decentral.transport import Traffic
from merganser.decentral.words import RunConfig
from merganser.errors import ClusterError, ParameterError

#: By how much longer than the first agent others may train, where nobody waits for anybody in a step.
PACE = 4.0


@contextmanager
def on_ray(
    config: RunConfig,
    make: Callable[[int], Learner],
    folder: Path,
    *,
    faults: FaultPlan | None = None,
    lost: Lost | None = None,
    aligned: bool = True,
    patience: Patience | None = None,
    seats: Seats | None = None,
) -> Iterator[RayCrew]:
    """All agents of a run on the cluster that this process is connected to, for as long as the context lasts.

    Args:
        config: of the run; a centralised one is a single agent.
        make: the learner of an agent, by its number; called in the agent's process, so it is to be picklable.
        folder: of the run; all machines see it under this name.
        faults: on purpose.
        lost: says which messages get lost; none by default.
        aligned: whether distances are measured with units in one order, too.
        patience: how long to wait, and how often to try.
        seats: processes to use, at least as many as agents, which outlive the context; by default new ones.

    Raises:
        ParameterError: If Ray is not installed, there are fewer processes than agents, or the graph is none.
        ClusterError: If this process is connected to no cluster, or an agent's process cannot be started.
    """
    config = effective(config)
    if seats is not None and len(seats.agents) < config.agents:
        raise ParameterError(f"{len(seats.agents)} processes for {config.agents} agents")
    topology = topology_of(config.topology, config.agents)
    taken = seats or take_seats(config.agents)
    try:
        post = Post(config, make, folder.resolve(), faults or FaultPlan(), taken.boxes, lost, topology)
        yield RayCrew(post, taken.agents[: config.agents], aligned=aligned, patience=patience or Patience())
    finally:
        if seats is None:
            taken.close()


class RayCrew:
    """Agents on Ray; a `Crew`.

    Args:
        post: what they are told.
        seats: handles of their processes.
        aligned: whether distances are measured with units in one order, too.
        patience: how long to wait, and how often to try.

    Attributes:
        members: the agents, in order.
    """

    def __init__(self, post: Post, seats: Sequence[Any], *, aligned: bool, patience: Patience) -> None:
        self._ray = ray_module()
        self._config, self._folder, self._make = post.config, post.folder, post.make
        self._aligned, self._patience = aligned, patience
        self._wait_s = post.config.deadline_s + slack(post.config.deadline_s)
        self._post, self._boxes, self._told = self._ray.put(post), post.boxes, set[int]()
        self._steps: list[Step] = []
        self._batches = 0
        self.members = [Member(i, seat) for i, seat in enumerate(seats)]
        cleared = [box.clear.remote(post.config.agents) for box in post.boxes]
        if len(self._ray.wait(cleared, num_returns=len(cleared), timeout=patience.start_s)[0]) < len(cleared):
            raise ClusterError(f"letter boxes did not start within {patience.start_s:g} s")
        self._begun = self._all("begin", lambda m: (self._post, m.number))

    # as a crew

    def plan(self) -> list[Step]:
        """Settle the steps, the same for all."""
        self._batches = max(self._begun)
        self._steps = self._all("plan", lambda _: (self._batches,))[0]
        return self._steps

    def kept(self) -> list[list[int]]:
        """By agent, the steps that it could go on from.

        Where an agent was behind, no step need be kept by all. Then the one that most have kept counts, and who has an
        older checkpoint goes on from that, as after a restart.
        """
        kept = self._all("kept", lambda _: ())
        if set(kept[0]).intersection(*kept[1:]):
            return kept
        votes = Counter(step for steps in kept for step in steps)
        votes[-1] = sum(not steps for steps in kept)
        most = max(votes, key=lambda step: (votes[step], step))
        return [[most] for _ in kept] if most >= 0 else kept

    def resume(self, number: int) -> None:
        """Have all go on from the checkpoint of a step, or an older one where they have not got it."""
        for member, step in zip(self.members, self._all("resume", lambda _: (number,)), strict=True):
            member.step = number
            if step < number:
                member.lost += number - step
                member.news.append(f"goes on from step {step}" if step >= 0 else "goes on from its start")

    def work(self, number: int) -> None:
        """Have all that can do a step, but for its checkpoint.

        Raises:
            ClusterError: If nobody is left, or nobody is done in time; or the error of the last agent that failed.
        """
        self._gather()
        waits = self._steps[number].exchange is not Exchange.NONE
        able = [member for member in self.members if member.free]
        for member in self.members:
            member.record, member.away = None, not member.free
            member.step = number if member.free else member.step
        self._announced(self._patience.start_s)
        records = self._ask(able, "work", number, after=lambda taken: self._wait_s + (0 if waits else PACE * taken))
        for member in able:
            member.record = records.get(member.number)
            member.last = member.record or member.last
        if not records and not any(member.tasks for member in able):  # nobody did it, though some may later
            self._nobody_left()

    def records(self, number: int) -> list[dict[str, Any]]:
        """What a round came to, by agent; without numbers for those that did not end it in time."""
        found = []
        for member in self.members:
            record = dict(member.record or self._absent(member))
            if member.late:
                record["late"], member.late = member.late, []
            if member.news:
                record["faults"], member.news = member.news, []
            found.append(record)
        return found

    def distances(self) -> dict[str, float | None]:
        """How far apart those are that did the step: raw and aligned, by what the first compares units by."""
        able = [member for member in self.members if member.free and member.record is not None]
        models = self._ask(able, "encoded", after=lambda _: self._wait_s, keep=True)
        for member in [m for m in able if m.number in models and m.free]:
            args = (self._aligned, *(models[number] for number in sorted(models)))
            if found := self._ask([member], "distances", *args, after=lambda _: 0.0):
                return dict(found[member.number])
        return {"raw": None, "aligned": None}

    def keep(self, number: int) -> None:
        """Have all that did a step keep its checkpoint, late ones when they have done it."""
        for member in self.members:
            if member.tasks and member.step == number and not member.starting:
                member.tasks.append(member.seat.keep.remote(number))
        able = [member for member in self.members if member.free and member.record is not None]
        self._ask(able, "keep", number, after=lambda _: self._wait_s)

    def models(self) -> list[bytes]:
        """Their models as they are, as safetensors; those that were last kept of agents that are away."""
        self._settle()
        able = [member for member in self.members if member.free]
        found = self._ask(able, "encoded", after=lambda _: self._wait_s)
        return [found[m.number] if m.number in found else self._last_kept(m.number) for m in self.members]

    def failures(self) -> dict[int, str]:
        """By agent, what ended it."""
        return {m.number: str(m.failure.error()) for m in self.members if m.failure is not None}

    # asking

    def _all(self, method: str, args: Callable[[Member], tuple[Any, ...]]) -> list[Any]:
        """Have every agent do what the run cannot begin without; answers in order."""
        tasks = [getattr(member.seat, method).remote(*args(member)) for member in self.members]
        end = time.monotonic() + self._patience.start_s
        answers = []
        for member, task in zip(self.members, tasks, strict=True):
            try:
                answer = self._ray.get(task, timeout=max(0.0, end - time.monotonic()))
            except self._ray.exceptions.GetTimeoutError:
                raise ClusterError(
                    f"the process of agent {member.number} did not start within {self._patience.start_s:g} s"
                ) from None
            except self._ray.exceptions.RayError as error:
                raise ClusterError(f"the process of agent {member.number} cannot work: {_line(error)}") from None
            if isinstance(answer, Failure):
                raise answer.error()
            answers.append(answer)
        return answers

    def _ask(
        self, members: Sequence[Member], method: str, *args: Any, after: Callable[[float], float], keep: bool = False
    ) -> dict[int, Any]:
        """Have some agents do something; answers by agent, of those that are there in time.

        Args:
            members: free ones.
            method: of their seats.
            args: of it.
            after: seconds to wait for the others once the first has answered, by how many it took.
            keep: whether answers stay where they are, and references to them are returned.
        """
        waiting = {}
        for member in members:
            task = getattr(member.seat, method).remote(*args)
            member.tasks.append(task)
            waiting[task] = member
        found: dict[int, Any] = {}
        began = time.monotonic()
        end = began + self._patience.step_s
        while waiting and (left := end - time.monotonic()) > 0:
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=left, fetch_local=not keep)
            for task in ready:
                member = waiting.pop(task)
                answer = self._answer(member)
                if answer is not None:
                    found[member.number] = task if keep else answer
                    now = time.monotonic()
                    end = min(end, now + after(now - began))
        for member in waiting.values():
            member.news.append(f"late in step {member.step}")
        return found

    def _answer(self, member: Member) -> Any:
        """The first answer that is due of an agent, which is there; None if it died or failed."""
        task = member.tasks.pop(0)
        try:
            answer = self._ray.get(task, timeout=self._patience.start_s)
        except self._ray.exceptions.RayActorError:
            self._died(member)
            return None
        except self._ray.exceptions.RayError as error:
            answer = Failure(type(error).__name__, _line(error))
        if isinstance(answer, Failure):
            member.failure, member.starting = answer, False
            member.tasks.clear()
            member.news.append(f"{answer.kind}: {answer.message}")
            self._leaves(member)
            return None
        return answer

    def _died(self, member: Member) -> None:
        member.tasks.clear()
        member.deaths += 1
        self._leaves(member)
        member.news.append(f"died in step {member.step}")
        if member.deaths > self._patience.restarts:
            member.failure = Failure("ClusterError", f"agent {member.number} died {member.deaths} times")
            return
        member.starting = True
        rejoin = member.seat.rejoin.options(max_task_retries=-1)
        member.tasks.append(rejoin.remote(self._post, member.number, self._batches))

    def _leaves(self, member: Member) -> None:
        member.away = True
        self._announced(0.0)

    def _announced(self, seconds: float) -> None:
        """Tell the boxes who is away, and wait for so long until they know."""
        away = {member.number for member in self.members if member.away}
        if away | self._told:  # a box that was started again may not know it
            told = [box.leave.remote(away) for box in self._boxes]
            self._ray.wait(told, num_returns=len(told), timeout=seconds)
        self._told = away

    def _settle(self) -> None:
        """Take all answers that are there; wait for those whose process is started again, for a while."""
        end = time.monotonic() + self._patience.rejoin_s
        while True:
            for member in self.members:
                while member.tasks and self._ray.wait(member.tasks[:1], timeout=0)[0]:
                    self._belated(member)
            starting = [member.tasks[0] for member in self.members if member.starting]
            if not starting or time.monotonic() >= end:
                return
            self._ray.wait(starting, num_returns=1, timeout=max(0.0, end - time.monotonic()))

    def _belated(self, member: Member) -> None:
        answer = self._answer(member)
        if answer is None:
            return
        if member.starting:
            member.starting = False
            member.lost += member.step - answer
            member.news.append(f"goes on from step {answer}" if answer >= 0 else "goes on from its start")
        elif isinstance(answer, dict) and "agent" in answer:
            member.late.append(answer)

    def _gather(self) -> None:
        """Have somebody free: settle, and where all are late or away wait for the first of them."""
        end = time.monotonic() + self._patience.step_s
        self._settle()
        while not any(member.free for member in self.members):
            tasks = [member.tasks[0] for member in self.members if member.tasks]
            if not tasks:
                self._nobody_left()
            if not self._ray.wait(tasks, num_returns=1, timeout=max(0.0, end - time.monotonic()))[0]:
                raise ClusterError(f"no agent answered within {self._patience.step_s:g} s")
            self._settle()

    def _nobody_left(self) -> None:
        failures = [member.failure for member in self.members if member.failure is not None]
        if len(failures) == len(self.members):
            raise failures[-1].error()

    # those that are away

    def _absent(self, member: Member) -> dict[str, Any]:
        known = {key: member.last.get(key, nothing) for key, nothing in (("incarnation", 0), ("placed", False))}
        return {"agent": member.number, **known, **Seen().record(Traffic(), [])}

    def _last_kept(self, number: int) -> bytes:
        """A model as it was last kept, or as it is at its start."""
        folder = self._folder / f"agent-{number}"
        kept = checkpoint.sound(folder)
        if kept:
            tensors = checkpoint.load(folder, kept[-1]).tensors
            state: Tensors = {n.removeprefix("model/"): x for n, x in tensors.items() if n.startswith("model/")}
        else:
            state = self._make(number).state()
        return Snapshot(self._config.name, number, 0, 0, state).encode()


def _line(error: Exception) -> str:
    """The last line of an error of Ray's that says something."""
    cause = getattr(error, "cause", None) or error
    return next((line.strip() for line in str(cause).split("\n")[::-1] if line.strip()), type(error).__name__)

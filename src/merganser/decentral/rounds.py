"""All agents of a run, step by step: a journal of its rounds, and resuming.

The journal has a line of JSON a round, written and flushed before any agent keeps the checkpoint of that round, so a
round that can be gone on from is in it. A run that is resumed goes on from the newest step of which every agent has a
sound checkpoint, and forgets lines and checkpoints of later ones: they come again, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch

from merganser.decentral import checkpoint
from merganser.decentral.agent import Agent, Hook, Phase, Tamper
from merganser.decentral.baselines import effective
from merganser.decentral.durable import append, write
from merganser.decentral.folder import JOURNAL, Line, claimed, inputs_of, text_of
from merganser.decentral.in_process import Network
from merganser.decentral.learner import Learner
from merganser.decentral.schedule import Step
from merganser.decentral.topology import topology_of
from merganser.decentral.words import RunConfig
from merganser.errors import StateError

Progress = Callable[[Line], None]


class Crew(Protocol):
    """All agents of a run, wherever they are."""

    def plan(self) -> list[Step]:
        """Settle the steps, the same for all."""
        ...

    def kept(self) -> Sequence[Sequence[int]]:
        """By agent, the steps that it could go on from."""
        ...

    def resume(self, number: int) -> None:
        """Have all go on from the checkpoint of a step."""
        ...

    def work(self, number: int) -> None:
        """Have all do a step, but for its checkpoint."""
        ...

    def records(self, number: int) -> list[dict[str, Any]]:
        """What a round came to, by agent."""
        ...

    def distances(self) -> dict[str, float | None]:
        """How far apart they are: raw and aligned."""
        ...

    def keep(self, number: int) -> None:
        """Have all keep the checkpoint of a step."""
        ...

    def models(self) -> list[bytes]:
        """Their models as they are, as safetensors."""
        ...


class Together:
    """All agents in this process, a phase at a time, in order of their numbers.

    Args:
        agents: all of them.
        aligned: whether distances are measured with units in one order, too.
    """

    def __init__(self, agents: Sequence[Agent], *, aligned: bool = True) -> None:
        self.agents, self._aligned = list(agents), aligned

    def plan(self) -> list[Step]:
        """Settle the steps, the same for all."""
        batches = max(agent.batches() for agent in self.agents)
        plans = [agent.plan(batches) for agent in self.agents]
        return plans[0]

    def kept(self) -> list[list[int]]:
        """By agent, the steps that it could go on from."""
        return [agent.kept() for agent in self.agents]

    def resume(self, number: int) -> None:
        """Have all go on from the checkpoint of a step."""
        for agent in self.agents:
            agent.resume(number)

    def work(self, number: int) -> None:
        """Have all do a step, but for its checkpoint."""
        _ = [agent.incarnation for agent in self.agents]  # a start counts from its first step on
        if number == 0:  # checkpoints of a run that is not gone on with
            for agent in self.agents:
                if agent.folder is not None:
                    checkpoint.forget(agent.folder, after=-1)
        with one_thread():
            for phase in Phase:
                if phase is not Phase.CHECKPOINT:
                    for agent in self.agents:
                        agent.do(phase, number)

    def records(self, number: int) -> list[dict[str, Any]]:
        """What a round came to, by agent."""
        return [agent.record(number) for agent in self.agents]

    def distances(self) -> dict[str, float | None]:
        """How far apart they are: raw and aligned, by what the first agent compares units by."""
        with one_thread():
            return self.agents[0].distances(self.models(), aligned=self._aligned)

    def keep(self, number: int) -> None:
        """Have all keep the checkpoint of a step."""
        for agent in self.agents:
            agent.do(Phase.CHECKPOINT, number)

    def models(self) -> list[bytes]:
        """Their models as they are, as safetensors."""
        return [agent.encoded() for agent in self.agents]


def together(
    config: RunConfig,
    make: Callable[[int], Learner],
    *,
    folder: Path | None = None,
    hook: Hook | None = None,
    tamper: Tamper | None = None,
    aligned: bool = True,
    network: Network | None = None,
) -> Together:
    """All agents of a run, in this process.

    Args:
        config: of the run; a centralised one is a single agent.
        make: the learner of an agent, by its number.
        folder: of the run; without one nothing is kept.
        hook: called when an agent begins a phase.
        tamper: changes what an agent publishes.
        aligned: whether distances are measured with units in one order, too.
        network: between them; by default one that loses nothing.
    """
    config = effective(config)
    network = network or Network(config.agents)
    topology = topology_of(config.topology, config.agents)
    agents = [
        Agent(
            i,
            config,
            make(i),
            network.end(i),
            folder=None if folder is None else folder / f"agent-{i}",
            hook=hook,
            tamper=tamper,
            topology=topology,
        )
        for i in range(config.agents)
    ]
    return Together(agents, aligned=aligned)


def run(
    config: RunConfig,
    crew: Crew,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    data: str | None = None,
) -> list[Line]:
    """Do all rounds that are left.

    Args:
        config: of the run.
        crew: its agents, as they are before the first step.
        folder: for the journal and, at the end, `models/agent-NUMBER.safetensors`.
        resume: go on with the run that the folder holds, if it holds one.
        progress: called with every line of the journal when it is written.
        data: digest of the examples; a run is gone on with on the same ones only.

    Returns:
        All lines, those of earlier parts of the run among them.

    Raises:
        StateError: If the folder holds a run and this is not to resume it, or holds one with another configuration,
            graph or examples, or whose journal lacks a round; or if another process is working on it.
        OutputError: If the journal or a checkpoint cannot be written.
    """
    known = effective(config)
    inputs = inputs_of(topology_of(known.topology, known.agents), data)
    with claimed(config, folder, resume=resume, inputs=inputs) as lines:
        return _run(crew, folder, lines, resume=resume, progress=progress)


def _run(crew: Crew, folder: Path, lines: list[Line], *, resume: bool, progress: Progress | None) -> list[Line]:
    steps = crew.plan()
    done = _common(crew.kept()) if resume else None
    lines = [line for line in lines if done is not None and line["step"] <= done]
    if done is not None:
        _refuse_holes(folder, steps, done, lines)
        crew.resume(done)
    write(folder / JOURNAL, "".join(map(text_of, lines)))
    began = time.perf_counter()
    for step in steps[0 if done is None else done + 1 :]:
        crew.work(step.number)
        if step.last:
            line = {
                "round": step.round,
                "step": step.number,
                "exchange": step.exchange.value,
                "seconds": time.perf_counter() - began,
                "distance": crew.distances(),
                "agents": crew.records(step.number),
            }
            began = time.perf_counter()
            lines.append(line)
            append(folder / JOURNAL, text_of(line))
            crew.keep(step.number)
            if progress is not None:
                progress(line)
    for i, model in enumerate(crew.models()):
        write(folder / "models" / f"agent-{i}.safetensors", model)
    return lines


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, and as many as before afterwards: sums over several depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _common(kept: Sequence[Sequence[int]]) -> int | None:
    """The newest step that all agents can go on from."""
    shared = set(kept[0]).intersection(*kept[1:])
    return max(shared, default=None)


def _refuse_holes(folder: Path, steps: Sequence[Step], done: int, lines: Sequence[Line]) -> None:
    """Refuse to go on from a step if the journal does not tell of all rounds up to it, each once.

    Raises:
        StateError: Names the first that is missing.
    """
    ends = [(step.number, step.round) for step in steps if step.last and step.number <= done]
    told = [(line["step"], line["round"]) for line in lines]
    if told != ends:
        missing = next((end[1] for end, at in zip_longest(ends, told) if end is not None and end != at), "that it has")
        raise StateError(
            f"{folder / JOURNAL} does not tell of round {missing} once, and all agents have kept step {done}",
            "put the journal back from a copy, or name another folder",
        )

"""All agents of a run, step by step: a journal of its rounds, and resuming.

The journal has a line of JSON a round, written and flushed before any agent keeps the checkpoint of that round, so a
round that can be gone on from is in it. A run that is resumed goes on from the newest step of which every agent has a
sound checkpoint, and forgets lines and checkpoints of later ones: they come again, bit for bit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from merganser.decentral import checkpoint
from merganser.decentral.agent import Agent, Hook, Phase, Tamper
from merganser.decentral.baselines import effective
from merganser.decentral.in_process import Network
from merganser.decentral.learner import Learner
from merganser.decentral.schedule import Step
from merganser.decentral.words import RunConfig
from merganser.errors import OutputError, StateError

JOURNAL = "journal.jsonl"
CONFIG = "run.json"
#: One round as the journal has it.
Line = dict[str, Any]
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
    agents = [
        Agent(
            i,
            config,
            make(i),
            network.end(i),
            folder=None if folder is None else folder / f"agent-{i}",
            hook=hook,
            tamper=tamper,
        )
        for i in range(config.agents)
    ]
    return Together(agents, aligned=aligned)


def run(
    config: RunConfig, crew: Crew, folder: Path, *, resume: bool = False, progress: Progress | None = None
) -> list[Line]:
    """Do all rounds that are left.

    Args:
        config: of the run.
        crew: its agents, as they are before the first step.
        folder: for the journal and, at the end, `models/agent-NUMBER.safetensors`.
        resume: go on with the run that the folder holds, if it holds one.
        progress: called with every line of the journal when it is written.

    Returns:
        All lines, those of earlier parts of the run among them.

    Raises:
        StateError: If the folder holds a run and this is not to resume it, or holds one with another configuration.
        OutputError: If the journal or a checkpoint cannot be written.
    """
    lines = _claim(config, folder, resume=resume)
    steps = crew.plan()
    done = _common(crew.kept()) if resume else None
    if done is not None:
        crew.resume(done)
    lines = [line for line in lines if done is not None and line["step"] <= done]
    _write(folder / JOURNAL, "".join(map(_text, lines)))
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
            _append(folder / JOURNAL, _text(line))
            crew.keep(step.number)
            if progress is not None:
                progress(line)
    for i, model in enumerate(crew.models()):
        _write(folder / "models" / f"agent-{i}.safetensors", model)
    return lines


def journal(folder: Path) -> list[Line]:
    """The lines of a run's journal; one that was cut off does not count.

    Raises:
        StateError: If the folder holds no run.
    """
    try:
        text = (folder / JOURNAL).read_text("utf-8")
    except OSError as error:
        raise StateError(f"{folder} holds no run: {JOURNAL}: {error.strerror}") from error
    found = []
    for line in text.split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def config_of(folder: Path) -> RunConfig:
    """The configuration of the run that a folder holds.

    Raises:
        StateError: If it holds none.
    """
    try:
        return RunConfig.model_validate_json((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{folder} holds no run: {CONFIG}: {error}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, and as many as before afterwards: sums over several depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _claim(config: RunConfig, folder: Path, *, resume: bool) -> list[Line]:
    """Write down whose folder this is; lines of the journal that is there."""
    path = folder / CONFIG
    if not path.is_file():
        _write(path, config.model_dump_json(indent=1) + "\n")
        return []
    known = config_of(folder)
    if not resume:
        raise StateError(f"{folder} holds a run already", "go on with it by --resume, or name another folder")
    if known.model_copy(update={"deadline_s": config.deadline_s}) != config:
        changed = [name for name in type(config).model_fields if getattr(known, name) != getattr(config, name)]
        raise StateError(f"{folder} holds a run with other {', '.join(changed)}", "name another folder")
    return journal(folder) if (folder / JOURNAL).is_file() else []


def _common(kept: Sequence[Sequence[int]]) -> int | None:
    """The newest step that all agents can go on from."""
    shared = set(kept[0]).intersection(*kept[1:])
    return max(shared, default=None)


def _text(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _write(path: Path, content: str | bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error

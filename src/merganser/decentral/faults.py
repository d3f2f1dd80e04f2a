"""Faults on purpose: a plan says which agent fails in which round and phase, and how.

    agent:round:phase:action[:seconds]        several, with commas between: "2:1:merge:kill,0:3:publish:nan"

An agent is killed or stopped by its own hand, so what is tested is the rest of the run. Spoiled snapshots keep a sound
digest where that is the point: NaN, a huge norm, an old round or another model are not damage on the way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import isfinite

import torch

from merganser.decentral.snapshot import Rejected, Snapshot, decode
from merganser.decentral.words import Limits
from merganser.errors import ParameterError

PHASES = ("train", "publish", "collect", "merge", "recalibrate", "checkpoint")
#: What an agent does to itself: dies at once, is suspended (for `seconds`, or until somebody continues it), or sleeps.
DEEDS = ("kill", "stop", "slow")
#: What an agent publishes instead of its snapshot.
SPOILS = ("corrupt", "truncate", "nan", "huge", "stale", "wrong", "foreign", "oversize")
#: Factor of a "huge" snapshot.
HUGE = 1e6


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        agent: whose.
        round: when, as messages and checkpoints count.
        phase: at the beginning of which; "publish" for what spoils a snapshot.
        action: one of `DEEDS` or `SPOILS`.
        seconds: of slow, which needs them, and stop.
    """

    agent: int
    round: int
    phase: str
    action: str
    seconds: float | None = None


@dataclass(frozen=True)
class FaultPlan:
    """Faults of a run; its `hook` and `tamper` are what an agent takes.

    Attributes:
        faults: in the order of the plan.
        limits: of the run; an "oversize" snapshot is one byte above.
    """

    faults: tuple[Fault, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def hook(self, agent: int, round: int, phase: str) -> None:
        """Do to this process what the plan says for the beginning of a phase."""
        for fault in self.faults:
            if (fault.agent, fault.round, fault.phase) == (agent, round, str(getattr(phase, "value", phase))):
                _do(fault)

    def tamper(self, agent: int, round: int, payload: bytes) -> bytes:
        """What an agent publishes in a round, by the plan."""
        for fault in self.faults:
            if (fault.agent, fault.round) == (agent, round) and fault.action in SPOILS:
                payload = spoiled(payload, fault.action, self.limits)
        return payload

    def refuse_late(self, steps: int) -> None:
        """Refuse a plan of which something would never happen.

        Args:
            steps: that the run has; a fault's round is the number of one.

        Raises:
            ParameterError: Names the first fault that is past the last.
        """
        for fault in self.faults:
            if fault.round >= steps:
                raise ParameterError(
                    f"the plan has a fault of agent {fault.agent} in round {fault.round}, and the last is {steps - 1}",
                    "messages and checkpoints are counted from 0, and taking orders over counts, too",
                )

    def left(self, agent: int, incarnation: int) -> FaultPlan:
        """The plan of an agent that was started again: every earlier incarnation used up one of its kills.

        Args:
            agent: whose.
            incarnation: how many times it was started before.
        """
        kills = [fault for fault in self.faults if fault.agent == agent and fault.action == "kill"]
        used = sorted(kills, key=lambda fault: (fault.round, PHASES.index(fault.phase)))[:incarnation]
        return replace(self, faults=tuple(fault for fault in self.faults if fault not in used))


def parse_faults(text: str, limits: Limits | None = None, *, agents: int | None = None) -> FaultPlan:
    """A plan from its words; an empty text is a plan without faults.

    Args:
        text: "agent:round:phase:action[:seconds]", several with commas between.
        limits: of the run.
        agents: how many the run has, where it is known.

    Raises:
        ParameterError: If one of them has another form, an unknown phase, action or agent, or does not go together.

    >>> parse_faults("2:1:merge:kill, 0:3:train:slow:0.5").faults[1]
    Fault(agent=0, round=3, phase='train', action='slow', seconds=0.5)
    """
    faults = tuple(_parsed(word.strip()) for word in text.split(",") if word.strip())
    for fault in faults:
        if agents is not None and fault.agent >= agents:
            raise ParameterError(f"the plan has a fault of agent {fault.agent}; there are {agents}, from 0")
    return FaultPlan(faults, limits or Limits())


def spoiled(payload: bytes, action: str, limits: Limits) -> bytes:
    """A snapshot's bytes after what an action does to them.

    Args:
        payload: as `Snapshot.encode` made it.
        action: "truncate" leaves the first half, "corrupt" turns over a bit in the middle of the data, "oversize" adds
            zeros until the limit is passed; the others are sound bytes of another snapshot: "nan" has one in every
            floating tensor, "huge" is 10^6 times as large, "stale" says that it is of round 0, "wrong" has another
            tensor, "foreign" is of another run.
        limits: of the run.

    Returns:
        Bytes; for sound ones of another snapshot the payload itself, if it is no snapshot.

    Raises:
        ParameterError: If the action is another one.
    """
    if action == "truncate":
        return payload[: len(payload) // 2]
    if action == "corrupt":
        spot = (len(payload) + min(len(payload), 8 + int.from_bytes(payload[:8], "little"))) // 2
        return payload[:spot] + bytes(byte ^ 1 for byte in payload[spot : spot + 1]) + payload[spot + 1 :]
    if action == "oversize":
        return payload + bytes(max(0, limits.snapshot_bytes + 1 - len(payload)))
    if action not in _OTHERS:
        raise ParameterError(f"{action} spoils no snapshot; {', '.join(SPOILS)} do")
    try:
        snapshot = decode(payload, Limits(snapshot_bytes=max(1, len(payload))))
    except Rejected:
        return payload
    return _OTHERS[action](snapshot).encode()


def _nan(snapshot: Snapshot) -> Snapshot:
    tensors = {name: x.clone() for name, x in snapshot.tensors.items()}
    for x in tensors.values():
        if x.is_floating_point() and x.numel():
            x.view(-1)[0] = torch.nan
    return replace(snapshot, tensors=tensors)


def _huge(snapshot: Snapshot) -> Snapshot:
    large = (torch.float64, torch.float32, torch.bfloat16)  # in float16 it would not be finite
    return replace(snapshot, tensors={n: x * HUGE if x.dtype in large else x for n, x in snapshot.tensors.items()})


def _wrong(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, tensors={**snapshot.tensors, "a layer of another model": torch.zeros(1)})


_OTHERS: Mapping[str, Callable[[Snapshot], Snapshot]] = {
    "nan": _nan,
    "huge": _huge,
    "stale": lambda snapshot: replace(snapshot, round=0),
    "wrong": _wrong,
    "foreign": lambda snapshot: replace(snapshot, run=f"not {snapshot.run}"),
}


def _parsed(word: str) -> Fault:
    parts = word.split(":")
    if len(parts) not in (4, 5):
        raise ParameterError(f"fault {word!r}", "write agent:round:phase:action[:seconds], such as 2:1:merge:kill")
    agent, round = (_number(part, name, word) for part, name in zip(parts, ("agent", "round"), strict=False))
    phase = _known(parts[2], PHASES, f"fault {word!r}: phase")
    action = _known(parts[3], DEEDS + SPOILS, f"fault {word!r}: action")
    seconds = _seconds(parts[4], word) if len(parts) == 5 else None
    if action == "slow" and seconds is None:
        raise ParameterError(f"fault {word!r}: slow needs seconds", f"{word}:2")
    if action not in ("slow", "stop") and seconds is not None:
        raise ParameterError(f"fault {word!r}: {action} takes no seconds")
    if action in SPOILS and phase != "publish":
        raise ParameterError(f"fault {word!r}: {action} is done to what an agent publishes", "its phase is publish")
    if action == "stale" and round == 0:
        raise ParameterError(f"fault {word!r}: nothing is older than round 0")
    return Fault(agent, round, phase, action, seconds)


def _number(text: str, name: str, word: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ParameterError(f"fault {word!r}: {name} is {text!r}; it is a whole number from 0")
    return int(text)


def _seconds(text: str, word: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (isfinite(seconds) and seconds >= 0):
        raise ParameterError(f"fault {word!r}: seconds is {text!r}; it is a number from 0")
    return seconds


def _known(text: str, known: tuple[str, ...], where: str) -> str:
    if text not in known:
        near = get_close_matches(text, known, n=1)
        raise ParameterError(
            f"{where} is {text!r}", f"did you mean {near[0]}?" if near else f"it is one of {', '.join(known)}"
        )
    return text


def _do(fault: Fault) -> None:
    if fault.action == "slow" and fault.seconds is not None:
        time.sleep(fault.seconds)
    elif fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        waker = None
        if fault.seconds is not None:  # who is stopped cannot wake itself
            waker = subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        if waker is not None:
            waker.wait()

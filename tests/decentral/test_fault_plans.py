"""Plans of faults: their words, and what they do to an agent's process and to its snapshots."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from merganser.decentral.faults import DEEDS, PHASES, SPOILS, Fault, FaultPlan, parse_faults, spoiled
from merganser.decentral.snapshot import Snapshot, decode
from merganser.decentral.words import Limits
from merganser.errors import ParameterError

PAYLOAD = Snapshot("run", 0, 0, 4, {"w": torch.ones(3), "h": torch.ones(2).half(), "n": torch.tensor(1)}).encode()


def test_a_plan_is_read_word_by_word() -> None:
    plan = parse_faults(" 2:1:merge:kill , 0:3:publish:nan,1:0:train:slow:0.5,1:2:collect:stop ")
    assert plan.faults == (
        Fault(2, 1, "merge", "kill"),
        Fault(0, 3, "publish", "nan"),
        Fault(1, 0, "train", "slow", 0.5),
        Fault(1, 2, "collect", "stop"),
    )
    assert parse_faults("").faults == ()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1:2:merge", "write agent:round:phase:action"),
        ("1:2:merge:kill:1:2", "write agent:round:phase:action"),
        ("-1:2:merge:kill", "agent is '-1'"),
        ("1:x:merge:kill", "round is 'x'"),
        ("1:2:merg:kill", "did you mean merge"),
        ("1:2:xyz:kill", "one of train, publish, collect, merge, recalibrate, checkpoint"),
        ("1:2:publish:trunkate", "did you mean truncate"),
        ("1:2:merge:slow", "slow needs seconds"),
        ("1:2:merge:slow:-1", "seconds is '-1'"),
        ("1:2:merge:slow:nan", "seconds is 'nan'"),
        ("1:2:merge:kill:3", "kill takes no seconds"),
        ("1:2:merge:nan", "its phase is publish"),
        ("1:0:publish:stale", "nothing is older"),
    ],
)
def test_a_plan_of_other_words_is_refused(text: str, what: str) -> None:
    with pytest.raises(ParameterError, match=what):
        parse_faults(f"0:0:train:kill,{text}")


def test_a_fault_of_an_agent_that_is_not_there_is_refused() -> None:
    assert len(parse_faults("4:0:train:kill", agents=5).faults) == 1
    with pytest.raises(ParameterError, match="agent 5; there are 5"):
        parse_faults("4:0:train:kill,5:0:train:kill", agents=5)


@pytest.mark.parametrize("action", SPOILS)
def test_a_snapshot_is_spoilt_in_its_round_alone(action: str) -> None:
    plan = parse_faults(f"1:4:publish:{action}", Limits(snapshot_bytes=2000))
    assert plan.tamper(1, 3, PAYLOAD) == plan.tamper(0, 4, PAYLOAD) == PAYLOAD
    assert plan.tamper(1, 4, PAYLOAD) != PAYLOAD
    assert plan.tamper(1, 4, b"no snapshot")  # nothing is raised
    plan.hook(1, 4, "publish")  # nothing is done


def test_sound_bytes_of_another_snapshot_differ_in_what_they_say() -> None:
    limits = Limits()
    assert decode(spoiled(PAYLOAD, "stale", limits), limits).round == 0
    assert decode(spoiled(PAYLOAD, "foreign", limits), limits).run != "run"
    huge = decode(spoiled(PAYLOAD, "huge", limits), limits).tensors
    assert huge["w"].tolist() == [1e6] * 3
    assert huge["n"] == 1
    assert decode(spoiled(PAYLOAD, "wrong", limits), limits).tensors.keys() > huge.keys()
    with pytest.raises(ParameterError, match="kill spoils no snapshot"):
        spoiled(PAYLOAD, "kill", limits)


def test_every_restart_uses_up_a_kill() -> None:
    plan = parse_faults("1:5:train:kill,0:1:train:kill,1:2:merge:kill,1:2:publish:kill,1:3:publish:nan")
    rounds = [[(f.agent, f.round, f.phase) for f in plan.left(1, n).faults] for n in range(5)]
    others = [(0, 1, "train"), (1, 3, "publish")]
    assert rounds[0] == [(1, 5, "train"), (0, 1, "train"), (1, 2, "merge"), (1, 2, "publish"), (1, 3, "publish")]
    assert rounds[1] == [(1, 5, "train"), (0, 1, "train"), (1, 2, "merge"), (1, 3, "publish")]
    assert rounds[2] == [(1, 5, "train"), *others]
    assert rounds[3] == rounds[4] == others


@pytest.mark.parametrize("phase", PHASES)
def test_a_hook_acts_in_its_phase_alone(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: sent.append(number))
    plan = FaultPlan((Fault(1, 2, phase, "kill"), Fault(3, 2, phase, "stop")))
    for other in PHASES:
        plan.hook(1, 2, other)
        plan.hook(2, 2, other)
        plan.hook(1, 3, other)
    assert sent == [signal.SIGKILL]
    plan.hook(3, 2, phase)
    assert sent == [signal.SIGKILL, signal.SIGSTOP]
    began = time.perf_counter()
    FaultPlan((Fault(0, 0, phase, "slow", 0.05),)).hook(0, 0, phase)
    assert time.perf_counter() - began >= 0.05


def test_a_process_stops_for_a_while_and_dies_at_once() -> None:
    code = """
from time import time
from merganser.decentral.faults import parse_faults
plan = parse_faults("0:0:train:stop:0.3,0:0:merge:kill")
began = time()
plan.hook(0, 0, "train")
print(time() - began, flush=True)
plan.hook(0, 0, "merge")
print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (seconds,) = done.stdout.split()
    assert 0.3 <= float(seconds) < 10


def test_deeds_and_spoils_are_all_there_is() -> None:
    for action in (*DEEDS, *SPOILS):
        seconds = ":1" if action == "slow" else ""
        assert parse_faults(f"0:1:publish:{action}{seconds}").faults[0].action == action

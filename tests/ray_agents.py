"""Runs on Ray for tests: processes that all of them use one after the other, and what a run came to."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.decentral.faults import parse_faults
from merganser.decentral.folder import Line
from merganser.decentral.in_process import Network
from merganser.decentral.ray_crew import RayCrew, on_ray
from merganser.decentral.ray_member import Patience
from merganser.decentral.ray_seat import Seats, take_seats
from merganser.decentral.ray_transport import slack
from merganser.decentral.rounds import run, together
from merganser.decentral.snapshot import decode
from merganser.decentral.words import Limits, RunConfig
from tiny_agents import TinyLearner

#: Seconds after which a test that waits has failed.
WAIT_S = 150.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_timeout_ms_task_wait_for_death_info": "200",  # a death is a death, whatever its cause
}
PATHS = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
PATIENCE = Patience(start_s=WAIT_S, rejoin_s=WAIT_S, step_s=WAIT_S)


@contextmanager
def local_seats() -> Iterator[Seats]:
    """Five processes for agents and two for letter boxes, which all tests use one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", PATHS)  # so that workers find the helpers
        import ray

        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=1, object_store_memory=80_000_000, **quiet)
        try:
            taken = take_seats(5, boxes=2)
            ray.get([seat.pid.remote() for seat in taken.agents], timeout=WAIT_S)
            yield taken
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class Done:
    """A run that is over: its journal, models, and what its crew saw."""

    lines: list[Line]
    models: list[dict[str, torch.Tensor]]
    crew: RayCrew


def on_seats(
    seats: Seats,
    config: RunConfig,
    folder: Path,
    faults: str = "",
    *,
    make: Callable[[int], TinyLearner] = TinyLearner,
    resume: bool = False,
    **options: Any,
) -> Done:
    plan = parse_faults(faults, config.limits)
    options = {"patience": PATIENCE, "aligned": False, **options}
    with on_ray(config, make, folder, faults=plan, seats=seats, **options) as crew:
        lines = run(config, crew, folder, resume=resume)
    return Done(lines, models(folder), crew)


def in_one_process(config: RunConfig, folder: Path, faults: str = "", *, lost: Any = None) -> Done:
    plan = parse_faults(faults, config.limits)
    network = Network(config.agents, lost=lost)
    crew = together(config, TinyLearner, folder=folder, aligned=False, network=network, tamper=plan.tamper)
    return Done(run(config, crew, folder), models(folder), None)  # type: ignore[arg-type]


def models(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [dict(decode(path.read_bytes(), Limits()).tensors) for path in sorted((folder / "models").iterdir())]


def numbers(lines: list[Line]) -> list[Line]:
    """Of a journal, all but seconds and how often agents were started."""
    left = [{**line, "agents": [dict(record) for record in line["agents"]]} for line in lines]
    for line in left:
        del line["seconds"]
        for record in line["agents"]:
            del record["seconds"], record["incarnation"]
    return left


def same_models(ones: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def same(one: Done, other: Done) -> None:
    assert numbers(one.lines) == numbers(other.lines)
    same_models(one.models, other.models)


def rounds_trained(done: Done) -> list[int]:
    """By agent, how many rounds of training its model has behind it: the counter in it is nobody else's."""
    return [(int(model["count"]) - i) // 3 for i, model in enumerate(done.models)]


def bounded(done: Done, deadline_s: float, faulty: Callable[[int, int], bool] = lambda _agent, _round: False) -> None:
    """Whoever is not at fault ends every round, and exchanging took it no longer than a deadline and the slack."""
    for line in done.lines:
        for record in line["agents"]:
            if not faulty(record["agent"], line["round"]):
                assert record["merged"] is not None
                assert record["seconds"]["merge"] < deadline_s + slack(deadline_s) + 2.0


class Kept(Seats):
    """Processes that outlive who takes them for its own."""

    def close(self) -> None:
        pass


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {WAIT_S} seconds in vain until {what}"
        time.sleep(0.05)

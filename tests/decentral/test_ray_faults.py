"""Agents that are real processes on Ray: the run of one process, and kill -9, suspension, loss and full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import run as run_command  # noqa: F401  # a fixture
from merganser.decentral import ray_crew
from merganser.decentral.folder import journal
from merganser.decentral.in_process import Network
from merganser.decentral.ray_member import Patience
from merganser.decentral.ray_seat import Seats
from merganser.decentral.rounds import run, together
from merganser.errors import ClusterError, ParameterError
from ray_agents import (
    WAIT_S,
    Kept,
    bounded,
    in_one_process,
    models,
    numbers,
    on_seats,
    rounds_trained,
    same,
    same_models,
    until,
)
from tiny_agents import TinyLearner, tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files open
    pytest.mark.xdist_group("ray"),
]


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"merge": {"rule": "aligned"}, "codec": "bf16"},
        {"merge": {"rule": "aligned_once", "every": 2}},
        {"algorithm": "cdsgd", "rounds": 2},
        {"algorithm": "sgp", "rounds": 2, "topology": {"kind": "star"}},
        {"algorithm": "sgp", "rounds": 1, "topology": {"kind": "one_peer_exponential"}},
        {"algorithm": "centralised", "rounds": 2},
    ],
    ids=str,
)
def test_a_run_on_ray_is_the_run_of_one_process_bit_for_bit(
    seats: Seats, tmp_path: Path, words: dict[str, Any]
) -> None:
    config = tiny_config(deadline_s=WAIT_S, **words)
    done = on_seats(seats, config, tmp_path / "ray", aligned=words.get("algorithm") != "sgp")
    crew = together(config, TinyLearner, folder=tmp_path / "one", aligned=words.get("algorithm") != "sgp")
    lines = run(config, crew, tmp_path / "one")
    assert numbers(done.lines) == numbers(lines)
    same_models(done.models, models(tmp_path / "one"))
    assert all("faults" not in record for line in lines for record in line["agents"])


def test_the_command_line_runs_networks_on_ray_to_the_same_bits(
    run_command: Callable[..., tuple[int, str, str]],  # noqa: F811
    seats: Seats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    network = {"kind": "perceptron", "image": 8, "hidden": 16, "depth": 1, "width": 16}
    words = {"agents": 2, "rounds": 2, "warmup_epochs": 1.0, "network": network, "deadline_s": WAIT_S}
    words["data"] = {"source": {"kind": "digits"}, "items": 100, "test": 50}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(words))
    monkeypatch.setattr(ray_crew, "take_seats", lambda _: Kept(seats.agents, seats.boxes))
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr("merganser.study.agents_page.pictures", lambda _: {})
    asked = ("decentral", "run", tmp_path / "config.yaml", "--quiet")
    assert run_command(*asked, "--out", here) == (0, "", "")
    assert run_command(*asked, "--out", there, "--ray", ray.get_runtime_context().gcs_address) == (0, "", "")
    assert numbers(journal(there)) == numbers(journal(here))
    same_models(models(there), models(here))
    assert (there / "report.md").exists()
    code, _, error = run_command(*asked, "--out", tmp_path / "x", "--ray", "127.0.0.1:1")
    assert (code, error.split(":")[0]) == (2, "ClusterError")


#: Who is killed in which round; the first two of each round are heard of by nobody, or do not confirm.
KILLS = {(0, 1): "train", (2, 1): "collect", (1, 2): "publish", (3, 2): "merge", (4, 3): "recalibrate"}
KILLS |= {(2, 3): "checkpoint"}


def test_a_kill_in_any_phase_loses_the_agents_own_step_since_its_checkpoint_and_nothing_else(
    seats: Seats, tmp_path: Path
) -> None:
    config = tiny_config(rounds=5, deadline_s=3.0)
    plan = ",".join(f"{agent}:{step}:{phase}:kill" for (agent, step), phase in KILLS.items())
    done = on_seats(seats, config, tmp_path / "ray", plan)
    bounded(done, 3.0, lambda agent, step: (agent, step) in KILLS)
    deaths = [sum(agent == i for agent, _ in KILLS) for i in range(5)]
    assert [member.deaths for member in done.crew.members] == deaths
    assert [member.lost for member in done.crew.members] == deaths
    assert rounds_trained(done) == [5 - d for d in deaths]
    last = done.lines[-1]["agents"]
    assert [record["incarnation"] for record in last] == deaths
    assert [record["peers"] for record in last] == [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]
    for (agent, step), _ in KILLS.items():
        told = done.lines[step]["agents"][agent].get("faults", []) + done.lines[step + 1]["agents"][agent]["faults"]
        assert told == [f"died in step {step}", f"goes on from step {step - 1}"]

    # The same in one process: who does not confirm is heard of by nobody, and who was killed goes back to its file.
    def lost(sender: int, receiver: int, step: int, what: str) -> bool:
        return KILLS.get((sender, step)) in ("train", "publish", "collect")

    loop = together(config, TinyLearner, folder=tmp_path / "loop", aligned=False, network=Network(5, lost=lost))
    loop.plan()
    for step in range(5):
        loop.work(step)
        loop.keep(step)
        for agent in loop.agents:
            if (agent.number, step) in KILLS:
                agent.resume(step - 1)
    same_models(done.models, [agent.learner.state() for agent in loop.agents])  # type: ignore[misc]


def test_a_suspended_agent_holds_nobody_up_and_comes_back_with_all_that_it_had(seats: Seats, tmp_path: Path) -> None:
    class Paced(TinyLearner):
        def train(self, batches: int) -> float:
            time.sleep(0.3)
            return TinyLearner.train(self, batches)

    config = tiny_config(agents=3, rounds=16, deadline_s=0.5)
    done = on_seats(seats, config, tmp_path, "1:1:train:stop:3.5", make=Paced)
    away = [line["round"] for line in done.lines if line["agents"][1]["merged"] is None]
    assert away == [*range(1, 1 + len(away))]
    assert 2 <= len(away) < 15
    bounded(done, 0.5, lambda agent, step: agent == 1 and step in away)
    member = done.crew.members[1]
    assert (member.deaths, member.lost) == (0, 0)
    assert rounds_trained(done) == [16, 16 - len(away) + 1, 16]  # round 1 it did, when it was woken
    for line in done.lines[2 : 1 + len(away)]:  # who is known to be away is not waited for
        assert line["agents"][0]["seconds"]["merge"] < 0.5
    back = done.lines[1 + len(away)]["agents"][1]
    assert back["peers"] == [0, 2]
    # what it did when it was woken is told once, in the line in which it takes part again or the one before
    told = [(line["round"], r) for line in done.lines for r in line["agents"][1].get("late", ())]
    assert len(told) == 1
    assert told[0][0] in (len(away), 1 + len(away))
    assert told[0][1]["merged"] is not None
    assert back["incarnation"] == 0


def test_two_halves_that_hear_nothing_of_one_another_go_on_and_grow_together_again(
    seats: Seats, tmp_path: Path
) -> None:
    def apart(sender: int, receiver: int, step: int, what: str) -> bool:
        """{0, 1} and {2, 3, 4} hear nothing of one another in rounds 1 and 2."""
        return step in (1, 2) and (sender < 2) != (receiver < 2)

    config = tiny_config(rounds=5, deadline_s=0.5)
    done = on_seats(seats, config, tmp_path / "ray", lost=apart)
    bounded(done, 0.5)
    assert [line["agents"][1]["peers"] for line in done.lines] == [[0, 2], [0], [0], [0, 2], [0, 2]]
    assert [sum(r["missing"] for r in line["agents"]) for line in done.lines] == [0, 4, 4, 0, 0]
    same(done, in_one_process(config, tmp_path / "one", lost=apart))


def test_a_slow_agent_is_left_out_of_a_round_and_one_within_the_deadline_is_not(seats: Seats, tmp_path: Path) -> None:
    config = tiny_config(rounds=3, deadline_s=0.5)
    done = on_seats(seats, config, tmp_path / "late", "2:1:train:slow:1.3")
    bounded(done, 0.5)
    assert [line["agents"][1]["peers"] for line in done.lines] == [[0, 2], [0], [0, 2]]
    assert [line["agents"][2]["peers"] for line in done.lines] == [[1, 3], [], [1, 3]]
    assert rounds_trained(done) == [3] * 5
    patient = tiny_config(deadline_s=WAIT_S)
    done = on_seats(seats, patient, tmp_path / "patient", "2:1:train:slow:0.3,4:1:collect:slow:0.3")
    same(done, in_one_process(patient, tmp_path / "one"))


SPOILED = "0:1:publish:corrupt,1:1:publish:truncate,2:1:publish:oversize,3:1:publish:nan,4:1:publish:huge"
SPOILED += ",0:2:publish:stale,1:2:publish:wrong,2:2:publish:foreign"


def test_spoiled_snapshots_are_counted_by_kind_and_nobody_stops(seats: Seats, tmp_path: Path) -> None:
    config = tiny_config(rounds=4, limits={"snapshot_bytes": 100_000})
    done = on_seats(seats, config, tmp_path / "ray", SPOILED)
    counted = [
        sorted(kind for record in line["agents"] for kind, n in record["rejected"].items() for _ in range(n))
        for line in done.lines
    ]
    assert counted[0] == counted[3] == []
    assert counted[1] == sorted(["corrupted", "truncated", "oversized", "non_finite", "norm"] * 2)
    assert counted[2] == sorted(["stale", "wrong_model", "wrong_run"] * 2)
    assert rounds_trained(done) == [4] * 5
    same(done, in_one_process(config, tmp_path / "one", SPOILED))


def test_a_full_disk_ends_the_agent_with_a_clear_error_and_the_others_go_on(seats: Seats, tmp_path: Path) -> None:
    config = tiny_config(agents=3, rounds=4, deadline_s=0.5)
    (tmp_path / "agent-1").mkdir()
    (tmp_path / "agent-1" / ".00000001.safetensors.new").symlink_to("/dev/full")
    done = on_seats(seats, config, tmp_path)
    message = f"OutputError: {tmp_path}/agent-1/00000001.safetensors cannot be written: No space left on device"
    assert done.lines[2]["agents"][1]["faults"] == [message]
    assert list(done.crew.failures()) == [1]
    assert "hint: make room, and run again with --resume" in done.crew.failures()[1]
    bounded(done, 0.5, lambda agent, step: agent == 1 and step > 1)
    assert rounds_trained(done) == [4, 1, 4]
    again = on_seats(seats, config, tmp_path, resume=True)  # with room: nobody is behind but by what it lost
    assert rounds_trained(again) == [4, 1, 4]


def test_an_error_that_all_agents_have_is_the_runs(seats: Seats, tmp_path: Path) -> None:
    class Breaks(TinyLearner):
        def train(self, batches: int) -> float:
            if self.seen >= 3:
                raise RuntimeError("no memory left\nand more")
            return TinyLearner.train(self, batches)

    def refuses(agent: int) -> TinyLearner:
        raise ParameterError(f"agent {agent} has nothing to learn from")

    config = tiny_config(agents=2)
    with pytest.raises(ClusterError, match=r"^RuntimeError: no memory left$"):
        on_seats(seats, config, tmp_path, make=Breaks)
    assert len(journal(tmp_path)) == 1
    with pytest.raises(ParameterError, match="agent 0 has nothing"):
        on_seats(seats, config, tmp_path / "other", make=refuses)


def test_a_letter_box_that_is_killed_costs_edges_and_nothing_that_was_trained(seats: Seats, tmp_path: Path) -> None:
    import ray

    pid = ray.get(seats.boxes[1].pid.remote(), timeout=WAIT_S)

    class Kills(TinyLearner):
        def train(self, batches: int) -> float:
            if self.seed == 0 and self.seen == 3:
                os.kill(pid, signal.SIGKILL)
            return TinyLearner.train(self, batches)

    config = tiny_config(agents=4, rounds=8, deadline_s=0.5)
    done = on_seats(seats, config, tmp_path, make=Kills)
    assert ray.get(seats.boxes[1].pid.remote(), timeout=WAIT_S) != pid
    assert [member.deaths for member in done.crew.members] == [0] * 4
    away = [sum(line["agents"][i]["merged"] is None for line in done.lines) for i in range(4)]
    late = [sum(len(line["agents"][i].get("late", ())) for line in done.lines) for i in range(4)]
    assert rounds_trained(done) == [8 - a + b for a, b in zip(away, late, strict=True)]  # what is trained stays
    assert sum(record["missing"] for record in done.lines[1]["agents"]) > 0
    assert [record["peers"] for record in done.lines[-1]["agents"]] == [[1, 3], [0, 2], [1, 3], [0, 2]]


DRIVER = """
    import sys
    from pathlib import Path
    import ray
    from merganser.decentral.faults import parse_faults
    from merganser.decentral.ray_crew import on_ray
    from merganser.decentral.rounds import run
    from tiny_agents import TinyLearner, tiny_config

    address, folder = sys.argv[1:]
    config = tiny_config(agents=2, rounds=4)
    ray.init(address=address, log_to_driver=False)
    with on_ray(config, TinyLearner, Path(folder), faults=parse_faults("1:2:train:slow:90"), aligned=False) as crew:
        pids = ray.get([member.seat.pid.remote() for member in crew.members])
        (Path(folder) / "pids").write_text(" ".join(map(str, pids)))
        run(config, crew, Path(folder))
"""


def test_a_killed_driver_and_a_new_one_are_the_uninterrupted_run(seats: Seats, tmp_path: Path) -> None:
    import ray

    folder = tmp_path / "ray"
    folder.mkdir()
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), address, folder], stderr=subprocess.PIPE, text=True
    )
    kept = [folder / f"agent-{i}" / "00000001.safetensors" for i in range(2)]
    try:
        until(lambda: driver.poll() is not None or all(path.exists() for path in kept), "two rounds were kept")
        assert driver.poll() is None, driver.stderr.read() if driver.stderr is not None else ""
    finally:
        driver.kill()
        driver.communicate()
    pids = (folder / "pids").read_text().split()
    until(lambda: not any(Path("/proc", pid).exists() for pid in pids), "its agents were gone")
    assert len(journal(folder)) == 2
    assert not (folder / "models").exists()
    config = tiny_config(agents=2, rounds=4)
    done = on_seats(seats, config, folder, resume=True)
    assert [record["incarnation"] for record in done.lines[-1]["agents"]] == [1, 1]
    same(done, in_one_process(config, tmp_path / "one"))


def test_who_is_left_goes_on_when_all_others_die(seats: Seats, tmp_path: Path) -> None:
    config = tiny_config(agents=4, rounds=4, deadline_s=0.5)
    plan = "0:1:train:kill,1:1:merge:kill,3:2:publish:kill"
    began = time.monotonic()
    done = on_seats(seats, config, tmp_path, plan, patience=Patience(WAIT_S, WAIT_S, WAIT_S, restarts=0))
    assert time.monotonic() - began < WAIT_S
    assert list(done.crew.failures()) == [0, 1, 3]
    assert done.crew.failures()[3] == "agent 3 died 1 times"
    bounded(done, 0.5, lambda agent, step: agent != 2)
    assert [line["agents"][2]["peers"] for line in done.lines] == [[1, 3], [1, 3], [], []]
    assert rounds_trained(done) == [1, 1, 4, 2]

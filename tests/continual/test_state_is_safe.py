"""A process that is killed or interrupted leaves the old state or the new one, and the next command goes on from it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.continual.state import locked
from merganser.errors import MerganserError, RefError, StateError
from support import load, save, save_family, tree

pytestmark = pytest.mark.xdist_group("state-is-safe")  # what its fixtures make takes long, and is made once

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}

# Every command, killed before each of its touches of the disk in turn. `{}` is the folder of one run, which holds
# `state` (experts 1 and 2 are in), `other` (expert 4) and `out` (an export of an earlier state).
COMMANDS = {
    "init": ["fold", "init", "{base}", "{}/new"],
    "add": ["fold", "add", "{}/state", "{3}"],
    "add-two": ["fold", "add", "{}/state", "{3}", "{4}"],
    "remove": ["fold", "remove", "{}/state", "expert-01"],
    "remove-last": ["fold", "remove", "{}/other", "expert-04"],
    "reweight": ["fold", "reweight", "{}/state", "expert-02", "0.25"],
    "combine": ["fold", "combine", "{}/state", "{}/other", "{}/both"],
    "export": ["fold", "export", "{}/state", "{}/fresh"],
    "overwrite": ["fold", "export", "{}/state", "{}/out", "--overwrite"],
}


class Runs:
    """What a kind of death left: for each command, one folder a touch of the disk."""

    def __init__(self, root: Path, deadly: str) -> None:
        self.root = root
        self.family = save_family(root / "models", 5, names=("wide.weight", "norm.weight", "position_ids"))
        template = root / "template"
        fold = Fold.init(self.family[0], template / "state", "mean", threads=1)
        fold.add(self.family[1])
        fold.export(template / "out")
        fold.add(self.family[2])
        Fold.init(self.family[0], template / "other", "mean", threads=1).add(self.family[4])
        plan = {
            name: {"template": str(template), "argv": [self._filled(part) for part in argv]}
            for name, argv in COMMANDS.items()
        }
        (root / "plan.json").write_text(json.dumps(plan))
        self.template = template
        done = subprocess.run(
            [sys.executable, str(HERE / "dying.py"), deadly, str(root / "plan.json")],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        )
        self.outcomes: dict[str, list[list[int]]] = json.loads(done.stdout)

    def _filled(self, part: str) -> str:
        places = {"{base}": self.family[0], "{3}": self.family[3], "{4}": self.family[4]}
        return str(places.get(part, part))

    def killed(self, command: str) -> list[Path]:
        """Folders of the runs that died, in the order of the touches."""
        return [self.root / f"{command}-{n}" for n in range(1, len(self.outcomes[command]))]

    def whole(self, command: str) -> Path:
        """Folder of the run that went through."""
        return self.root / f"{command}-{len(self.outcomes[command])}"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("killed"), "SIGKILL")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("interrupted"), "SIGINT")


def model_tree(folder: Path) -> dict[str, str]:
    """Files of an exported folder; of the receipt only what does not depend on the clock and the machine."""
    found = tree(folder)
    receipt = json.loads((folder / "merganser.json").read_text("utf-8"))
    del receipt["wall_s"], receipt["peak_bytes"]
    return found | {"merganser.json": json.dumps(receipt, sort_keys=True)}


def assert_sound(state: Path) -> None:
    assert [(f.part, f.status) for f in Fold(state).verify(threads=1) if f.status != "ok"] == []


def go_on(state: Path, runs: Runs) -> dict[str, str]:
    """What the state is after one more command, which everybody does alike; leftovers must be gone then."""
    Fold(state).add(runs.family[5], threads=1)
    found = tree(state)
    sums = read_ledger(state).sums
    assert sums is not None
    assert set(found) == {"base.json", "ledger.json", sums, f"{sums}/sums.safetensors", f"{sums}/merganser.json"}
    return found


def test_commands_were_killed_at_every_touch_and_then_went_through(killed: Runs) -> None:
    for command, outcomes in killed.outcomes.items():
        assert [status for status, _ in outcomes] == [-signal.SIGKILL] * (len(outcomes) - 1) + [0], command
        assert len(outcomes) > 4, command


AGAIN: dict[str, Callable[[Fold, Runs], object]] = {
    "add": lambda fold, runs: fold.add(runs.family[3], threads=1),
    "add-two": lambda fold, runs: fold.add_all(runs.family[3:5], threads=1),
    "remove": lambda fold, _: fold.remove("expert-01", threads=1),
    "remove-last": lambda fold, _: fold.remove("expert-04", threads=1),
    "reweight": lambda fold, _: fold.reweight("expert-02", 0.25, threads=1),
}


@pytest.mark.parametrize("command", AGAIN)
def test_killed_change_leaves_the_old_state_or_the_new_and_the_next_command_goes_on(killed: Runs, command: str) -> None:
    name = "other" if command == "remove-last" else "state"
    before, after = read_ledger(killed.template / name), read_ledger(killed.whole(command) / name)
    assert before != after
    expected = go_on(Path(shutil.copytree(killed.whole(command) / name, killed.root / f"{command}-end")), killed)
    seen = []
    for run in killed.killed(command):
        state = run / name
        ledger = read_ledger(state)
        assert ledger in (before, after), run
        assert_sound(state)
        seen.append(ledger == after)
        if ledger == before:
            AGAIN[command](Fold(state), killed)
            assert read_ledger(state) == after
        assert go_on(state, killed) == expected, run
    assert seen == sorted(seen)  # one moment parts old from new
    assert not seen[0]


@pytest.mark.parametrize("command", ["init", "combine"])
def test_killed_command_leaves_no_half_state(killed: Runs, command: str) -> None:
    name = {"init": "new", "combine": "both"}[command]
    expected = tree(killed.whole(command) / name)
    untouched = {n: tree(killed.template / n) for n in ("state", "other", "out")}
    there = []
    for run in killed.killed(command):
        there.append((run / name).exists())
        if there[-1]:
            assert_sound(run / name)
        elif command == "init":
            Fold.init(killed.family[0], run / name, threads=1)
        else:
            Fold.combine([run / "state", run / "other"], run / name, threads=1)
        assert tree(run / name) == expected, run
        assert sorted(p.name for p in run.iterdir()) == sorted([name, "state", "other", "out"]), run
        assert {n: tree(run / n) for n in untouched} == untouched, run
    assert there == sorted(there)
    assert not there[0]


def test_killed_export_leaves_no_half_model(killed: Runs) -> None:
    expected = model_tree(killed.whole("export") / "fresh")
    there = []
    for run in killed.killed("export"):
        there.append((run / "fresh").exists())
        if not there[-1]:
            Fold(run / "state").export(run / "fresh", threads=1)
        assert model_tree(run / "fresh") == expected, run
        assert sorted(p.name for p in run.iterdir()) == ["fresh", "other", "out", "state"], run
        assert tree(run / "state") == tree(killed.template / "state"), run
    assert there == sorted(there)
    assert not there[0]


def test_killed_overwriting_export_leaves_the_old_model_or_the_new(killed: Runs) -> None:
    old, new = model_tree(killed.template / "out"), model_tree(killed.whole("overwrite") / "out")
    assert old != new
    replaced = []
    for run in killed.killed("overwrite"):
        found = model_tree(run / "out")
        assert found in (old, new), run
        replaced.append(found == new)
        Fold(run / "state").export(run / "out", overwrite=True, threads=1)
        assert model_tree(run / "out") == new, run
        assert sorted(p.name for p in run.iterdir()) == ["other", "out", "state"], run
    assert replaced == sorted(replaced)
    assert replaced[-1]
    assert not replaced[0]


def test_interrupted_command_exits_with_130(interrupted: Runs) -> None:
    for command, outcomes in interrupted.outcomes.items():
        codes = [status for status, _ in outcomes]
        assert codes == [130] * (len(codes) - 1) + [0], command


@pytest.mark.parametrize("command", AGAIN)
def test_interrupted_change_leaves_the_old_state_or_the_new(interrupted: Runs, command: str) -> None:
    name = "other" if command == "remove-last" else "state"
    before, after = read_ledger(interrupted.template / name), read_ledger(interrupted.whole(command) / name)
    expected = go_on(
        Path(shutil.copytree(interrupted.whole(command) / name, interrupted.root / f"{command}-end")), interrupted
    )
    clean = 0
    for run in interrupted.killed(command):
        state = run / name
        assert read_ledger(state) in (before, after), run
        assert_sound(state)
        clean += tree(state) == tree(interrupted.template / name)
        if read_ledger(state) == before:
            AGAIN[command](Fold(state), interrupted)
        assert go_on(state, interrupted) == expected, run
    # While the work is done nothing at all is left behind; removing the last expert has no work, only the commit.
    assert clean > 2 or command == "remove-last"


def test_interrupted_init_and_export_leave_nothing_or_all(interrupted: Runs) -> None:
    for command, name in (("init", "new"), ("combine", "both"), ("export", "fresh")):
        for run in interrupted.killed(command):
            left = sorted(p.name for p in run.iterdir() if p.name not in ("state", "other", "out"))
            assert left in ([], [name]), run
            if left and name != "fresh":
                assert tree(run / name) == tree(interrupted.whole(command) / name), run
            elif left:
                assert model_tree(run / name) == model_tree(interrupted.whole(command) / name), run


# The real command line, killed while it writes tens of megabytes.


def merganser(*argv: object) -> list[str]:
    return [sys.executable, "-m", "merganser", *map(str, argv)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three experts of 32 MB, and a state that two of them are in."""
    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(1024, 1024, generator=generator) for i in range(8)}
    save(base, root / "base")
    for number in (1, 2, 3):
        save({n: x + 0.01 * torch.randn(x.shape, generator=generator) for n, x in base.items()}, root / f"e{number}")
    fold = Fold.init(root / "base", root / "state", "mean")
    fold.add(root / "e1")
    fold.export(root / "out")
    fold.add(root / "e2")
    return root


def kill_while_writing(argv: list[str], folder: Path, pattern: str, delay_s: float) -> int:
    """Start a command, wait until its temporary folder is there, wait a little longer, kill it; its status."""
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while process.poll() is None and not any(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    return process.returncode


@pytest.mark.parametrize("delay_s", [0.0, 0.04, 0.15])
def test_kill_9_while_adding(large: Path, tmp_path: Path, delay_s: float) -> None:
    state = Path(shutil.copytree(large / "state", tmp_path / "state"))
    before = read_ledger(state)
    status = kill_while_writing(merganser("fold", "add", state, large / "e3", "-q"), state, ".sums-*", delay_s)
    assert status in (-signal.SIGKILL, 0)
    assert_sound(state)
    if read_ledger(state) == before:
        Fold(state).add(large / "e3")
    uninterrupted = Fold(shutil.copytree(large / "state", tmp_path / "whole"))
    uninterrupted.add(large / "e3")
    Fold(state).reweight("e3", 0.5)
    uninterrupted.reweight("e3", 0.5)
    assert tree(state) == tree(uninterrupted.path)


def test_kill_9_while_removing(large: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(large / "state", tmp_path / "state"))
    before = read_ledger(state)
    kill_while_writing(merganser("fold", "remove", state, "e1", "-q"), state, ".sums-*", 0.03)
    assert_sound(state)
    if read_ledger(state) == before:
        Fold(state).remove("e1")
    assert [c.name for c in read_ledger(state).contributors] == ["e2"]
    Fold(state).add(large / "e3")
    assert sorted(p.name for p in state.iterdir()) == ["base.json", "ledger.json", "sums-00004"]
    assert_sound(state)


def test_kill_9_while_beginning(large: Path, tmp_path: Path) -> None:
    kill_while_writing(merganser("fold", "init", large / "base", tmp_path / "state", "-q"), tmp_path, ".state*", 0.01)
    if not (tmp_path / "state").exists():
        Fold.init(large / "base", tmp_path / "state")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert_sound(tmp_path / "state")


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_kill_9_while_exporting(large: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    if options:
        shutil.copytree(large / "out", out)
    argv = merganser("fold", "export", large / "state", out, "-q", *options)
    kill_while_writing(argv, tmp_path, ".out.partial-*", 0.02)
    expected = model_tree(Fold(large / "state").export(tmp_path / "expected"))
    if options:
        assert model_tree(out) in (model_tree(large / "out"), expected)
    elif out.exists():
        assert model_tree(out) == expected
    Fold(large / "state").export(out, overwrite=True)
    assert model_tree(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out"]


SLOW_ADD = """
import sys, time
from pathlib import Path
import merganser.continual.fold as fold
from merganser.checkpoints.writer import CheckpointWriter
commit = CheckpointWriter.commit
def late(self, *args, **options):
    Path(sys.argv[3]).touch()
    while not Path(sys.argv[4]).exists():
        time.sleep(0.01)
    commit(self, *args, **options)
CheckpointWriter.commit = late
fold.Fold(sys.argv[1]).add(sys.argv[2])
"""


def test_second_process_is_refused_while_the_first_one_adds(tmp_path: Path) -> None:
    family = save_family(tmp_path / "models", 3)
    fold = Fold.init(family[0], tmp_path / "state", "mean")
    fold.add(family[1])
    begun, go = tmp_path / "begun", tmp_path / "go"
    first = subprocess.Popen(
        [sys.executable, "-c", SLOW_ADD, str(fold.path), str(family[2]), str(begun), str(go)], env=ENVIRONMENT
    )
    try:
        deadline = time.monotonic() + 60
        while not begun.exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = subprocess.run(
            merganser("fold", "add", fold.path, family[3]), env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        for refused in (
            lambda: Fold(fold.path).add(family[3]),
            lambda: Fold(fold.path).remove("expert-01"),
            lambda: Fold(fold.path).export(tmp_path / "out"),
            lambda: Fold(fold.path).verify(),
        ):
            with pytest.raises(StateError, match=r"another process is working on .*\nhint: wait for it to end"):
                refused()
    finally:
        go.touch()
        assert first.wait(60) == 0
    assert second.returncode == 2
    assert "another process is working on" in second.stderr
    assert [c.name for c in read_ledger(fold.path).contributors] == ["expert-01", "expert-02"]
    assert not (tmp_path / "out").exists()
    assert_sound(fold.path)
    assert sorted(p.name for p in fold.path.iterdir()) == ["base.json", "ledger.json", "sums-00002"]
    Fold(fold.path).add(family[3])


def test_many_may_read_at_once(tmp_path: Path) -> None:
    family = save_family(tmp_path / "models", 1)
    fold = Fold.init(family[0], tmp_path / "state", "mean")
    fold.add(family[1])
    with locked(fold.path, write=False):
        fold.verify()
        fold.export(tmp_path / "out")
        with pytest.raises(StateError, match="another process"):
            fold.remove("expert-01")
    fold.remove("expert-01")


def test_failing_add_leaves_no_trace_in_the_state(tmp_path: Path) -> None:
    family = save_family(tmp_path / "models", 2)
    fold = Fold.init(family[0], tmp_path / "state", "gram")
    fold.add(family[1])
    before = tree(fold.path)
    broken = load(family[2])
    broken["wide.weight"][3, 4] = float("nan")
    save(broken, tmp_path / "broken")
    for expert in (tmp_path / "broken", tmp_path / "nowhere"):
        with pytest.raises(MerganserError):
            fold.add(expert)
        assert tree(fold.path) == before
    with pytest.raises(RefError, match="nowhere does not exist"):
        fold.add(tmp_path / "nowhere")

"""A process that is killed or interrupted leaves the old state or the new one, and the next command goes on from it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from state_helpers import ENVIRONMENT, assert_sound, model_tree
from support import save_family, tree

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("state-is-safe")  # what its fixtures make takes long, and is made once

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

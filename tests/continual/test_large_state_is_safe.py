"""Processes that are killed while they write a large state, and several at one state."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.continual.state import locked
from merganser.errors import MerganserError, RefError, StateError
from state_helpers import ENVIRONMENT, assert_sound, model_tree
from support import load, save, save_family, tree

pytestmark = pytest.mark.xdist_group("large-state")  # what its fixtures make takes long, and is made once


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

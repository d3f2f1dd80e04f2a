"""Writers that die at any operation, and several at once: the old or the new, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merganser.checkpoints.writer import CheckpointWriter, FolderTransaction
from merganser.types import TensorInfo
from writer_helpers import content_of, write

# Leftovers


@pytest.mark.parametrize("name", ["out", "[bold]x", "a*b", "sp ace", "-o"])
def test_what_a_dead_writer_left_is_removed_by_the_next_to_the_same_place(tmp_path: Path, name: str) -> None:
    leftover, other = tmp_path / f".{name}.partial-dead", tmp_path / ".else.partial-dead"
    for folder in (leftover, other):
        (folder / "sub").mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
    write(tmp_path / name, {"x": torch.ones(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, ".else.partial-dead"])


def test_a_leftover_of_another_target_that_a_pattern_would_fit_is_not_touched(tmp_path: Path) -> None:
    other = tmp_path / ".axb.partial-dead"
    other.mkdir()
    write(tmp_path / "a*b", {"x": torch.ones(1)})
    assert other.exists()


def test_what_a_live_writer_is_at_is_not_removed_and_both_finish(tmp_path: Path) -> None:
    infos = {"x": TensorInfo((1,), "F32")}
    with CheckpointWriter(tmp_path / "out", infos, overwrite=True) as live:
        live.put("x", torch.ones(1))
        write(tmp_path / "out", {"x": torch.zeros(1)})
        assert live.folder.exists()
        live.commit({})
    assert float(load_file(tmp_path / "out" / "model.safetensors")["x"]) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_many_writers_to_one_place_at_once_leave_one_whole_result_and_nothing_else(tmp_path: Path) -> None:
    def run(i: int) -> None:
        write(tmp_path / "out", {"x": torch.full((100,), float(i))}, overwrite=True)

    run(0)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(60)))
    x = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert torch.equal(x, x[:1].expand(100))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_result_is_replaced_also_where_the_place_looked_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is listed while another writer exchanges and removes it has nothing in it, and its place has."""
    infos = {"x": TensorInfo((1,), "F32")}
    write(tmp_path / "out", {"x": torch.zeros(1)})
    with CheckpointWriter(tmp_path / "out", infos, overwrite=True) as writer:
        writer.put("x", torch.ones(1))
        monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
        writer.commit({})
        monkeypatch.undo()
    assert float(load_file(tmp_path / "out" / "model.safetensors")["x"]) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Killed at any moment: every operation on the file system, one after the other, is the last


KILLED = '''
import json, os, shutil, signal, sys
from pathlib import Path

import torch

from merganser.checkpoints.writer import CheckpointWriter
from merganser.types import TensorInfo

work, overwrite = Path(sys.argv[1]), sys.argv[2] == "overwrite"
target = work / "out"
WATCHED = ("open", "os.", "shutil.", "fcntl.", "tempfile.", "ctypes.dlsym")


def write(value, shard_bytes=8):
    with CheckpointWriter(target, {n: TensorInfo((2,), "F32") for n in "ab"}, shard_bytes=shard_bytes,
                          overwrite=overwrite) as writer:
        for name in "ab":
            writer.put(name, torch.full((2,), value))
        writer.commit({"value": value}, [work / "config.json"])


def content(folder):
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def attempt(last):
    """Write in a child that dies before operation number `last`; whether it lived."""
    child = os.fork()
    if child == 0:
        left = last

        def count():
            nonlocal left
            left -= 1
            if left == -1:  # once, since the kill is itself an operation
                os.kill(os.getpid(), signal.SIGKILL)

        real = os.fsync
        os.fsync = lambda descriptor: (count(), real(descriptor), count())
        sys.addaudithook(lambda event, _: event.startswith(WATCHED) and count())
        write(2.0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return os.WIFEXITED(status)


def reset():
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "config.json").write_text("{}")
    if overwrite:
        write(1.0, shard_bytes=1000)
        (target / "extra.txt").write_text("of the old")


reset()
old = content(target)
write(2.0)
new = content(target)
outcomes, remaining = [], []
for last in range(1000):
    reset()
    lived = attempt(last)
    found = content(target)
    outcomes.append("old" if found == old else "new" if found == new else "torn")
    overwrite, before = True, overwrite
    write(2.0)
    overwrite = before
    if content(target) != new or sorted(p.name for p in work.iterdir()) != ["config.json", "out"]:
        remaining.append(last)
    if lived:
        break
print(json.dumps({"lived": lived, "outcomes": outcomes, "remaining": remaining}))
'''


@pytest.mark.parametrize("mode", ["fresh", "overwrite"])
def test_kill_9_before_any_operation_leaves_the_old_or_the_new_and_the_next_writer_tidies_up(
    tmp_path: Path, mode: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "work"), mode], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    outcomes = report["outcomes"]
    assert report["lived"]
    assert "torn" not in outcomes
    assert report["remaining"] == []
    assert len(outcomes) > 30, "every file is opened, flushed and its folder too"
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True), "once new, it stays new"
    assert outcomes.count("new") > 1, "a kill after the rename is among the moments"


def test_all_bytes_are_flushed_to_disk_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    by_inode: dict[int, str] = {}

    def watch_fsync(descriptor: int) -> None:
        events.append(str(os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def watch_rename(self: Path, target: Path) -> None:
        by_inode.update({p.stat().st_ino: p.name for p in self.iterdir()})
        by_inode[self.stat().st_ino] = "the folder"
        events.append("rename")
        rename(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    write(tmp_path / "out", {"a": torch.ones(1), "b": torch.ones(1)}, shard_bytes=1)
    by_inode[tmp_path.stat().st_ino] = "the parent"
    named = [e if e == "rename" else by_inode[int(e)] for e in events]
    assert named == [
        "merganser.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "the folder",
        "rename",
        "the parent",
    ]


# The transaction by itself, and anything at all


def test_a_transaction_takes_any_files_and_folders(tmp_path: Path) -> None:
    transaction = FolderTransaction(tmp_path / "out")
    (transaction.folder / "sub").mkdir()
    (transaction.folder / "sub" / "x.txt").write_text("x")
    transaction.commit()
    assert content_of(tmp_path) == {"out/sub/x.txt": b"x"}


def test_an_aborted_transaction_leaves_nothing(tmp_path: Path) -> None:
    transaction = FolderTransaction(tmp_path / "out")
    (transaction.folder / "x.txt").write_text("x")
    transaction.abort()
    assert list(tmp_path.iterdir()) == []

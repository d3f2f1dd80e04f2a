"""Where a checkpoint may be written, what is refused, and that nothing is left of what fails."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merganser.checkpoints.writer import CheckpointWriter
from merganser.errors import OutputError
from merganser.types import TensorInfo
from writer_helpers import content_of, write

# There whole, or not at all


def test_leaving_without_commit_removes_everything(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {"a": TensorInfo((2,), "F32")}) as writer:
        writer.put("a", torch.ones(2))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_an_exception_removes_everything_and_goes_on(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), CheckpointWriter(tmp_path / "out", {"a": TensorInfo((2,), "F32")}):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_at_the_target_before_commit(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        assert not (tmp_path / "out").exists()
        writer.commit({})
        assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_missing_parents_of_the_target_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", {"x": torch.ones(1)})
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").is_file()


def test_parents_that_a_failed_writer_made_are_gone_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "deep" / "er" / "out", tmp_path / "mine" / "new" / "out", tmp_path / "mine" / "out"):
        CheckpointWriter(target, {"a": TensorInfo((2,), "F32")}).abort()
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "deep" / "er" / ("x" * 300), {"a": TensorInfo((2,), "F32")})
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]


def test_parents_that_another_has_filled_meanwhile_stay(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "deep" / "er" / "out", {"a": TensorInfo((2,), "F32")}):
        (tmp_path / "deep" / "notes.txt").write_text("mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "notes.txt"]


@pytest.mark.parametrize("name", [".", "../here", "{}"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_that_a_command_runs_in_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(OutputError, match="is the folder that this runs in"):
        CheckpointWriter(Path(name.format(here)), {"a": TensorInfo((2,), "F32")}, overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["here"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", {"x": torch.ones(1)})
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_target_that_exists_is_refused_with_the_way_to_replace_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="out exists") as caught:
        CheckpointWriter(tmp_path / "out", {})
    assert "--overwrite" in (caught.value.hint or "")
    assert content_of(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a folder", "broken link"])
def test_a_target_that_is_no_folder_is_refused_and_left(tmp_path: Path, kind: str, overwrite: bool) -> None:
    target = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / ("elsewhere" if kind == "link to a folder" else "gone"))
    with pytest.raises(OutputError, match="out exists and is not a folder"):
        CheckpointWriter(target, {}, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_a_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", {})
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "deeper" / "out", {})
    assert content_of(tmp_path) == {"file": b"mine"}


def test_a_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        CheckpointWriter(tmp_path / ("x" * 250), {})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the superuser's rights, where the tests have them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
def test_a_parent_that_may_not_be_written_is_refused(mode: int) -> None:
    parent = Path(tempfile.mkdtemp())
    try:
        parent.chmod(mode)
        with as_nobody(), pytest.raises(OutputError, match="cannot be written: Permission denied") as caught:
            CheckpointWriter(parent / "out", {})
        assert str(parent) in caught.value.message
        parent.chmod(0o700)
        assert list(parent.iterdir()) == []
    finally:
        parent.chmod(0o700)
        shutil.rmtree(parent)


def test_a_disk_without_the_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="needs 1,004 bytes, and the disk has 1,000 free"):
        CheckpointWriter(tmp_path / "out", {"x": TensorInfo((251,), "F32")})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", {"x": torch.ones(250)})


@pytest.mark.parametrize("moment", ["opening", "put", "commit"])
def test_a_write_that_fails_midway_is_an_output_error_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    script = f"""
        import resource, signal, sys
        from pathlib import Path
        import torch
        from merganser.checkpoints.writer import CheckpointWriter
        from merganser.errors import OutputError
        from merganser.types import TensorInfo
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit then fail like those to a full disk

        def limit(moment, size):
            if moment == {moment!r}:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        infos = {{"a": TensorInfo((1000,), "F32"), "b": TensorInfo((50_000,), "F32")}}
        try:
            limit("opening", 100_000)
            with CheckpointWriter(Path(sys.argv[1]), infos, shard_bytes=10_000) as writer:
                writer.put("a", torch.ones(1000))
                limit("put", 100_000)
                writer.put("b", torch.ones(50_000))
                limit("commit", 100)
                writer.commit({{"long": "x" * 1000}})
        except OutputError as error:
            print("refused:", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"refused: {tmp_path / 'out'} cannot be written: ")
    assert os.strerror(errno.EFBIG) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_companion_that_cannot_be_copied_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.commit({}, [tmp_path / "gone.json"])
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appeared_meanwhile_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        target.mkdir()
        (target / "mine.txt").write_text("mine")

    with CheckpointWriter(target, {}) as writer:
        appear()
        with pytest.raises(OutputError, match="out appeared meanwhile"):
            writer.commit({})
    assert content_of(tmp_path) == {"out/mine.txt": b"mine"}
    shutil.rmtree(target)
    with CheckpointWriter(target, {}, overwrite=True) as writer:
        appear()
        writer.commit({})
    assert sorted(content_of(tmp_path) or {}) == ["out/merganser.json", "out/model.safetensors"]


def test_overwriting_replaces_the_whole_folder_and_an_abort_keeps_it(tmp_path: Path) -> None:
    write(tmp_path / "out", {"old": torch.ones(1), "more": torch.ones(1)}, shard_bytes=1)
    before = content_of(tmp_path)
    with CheckpointWriter(tmp_path / "out", {"x": TensorInfo((1,), "F32")}, overwrite=True) as writer:
        writer.put("x", torch.ones(1))
    assert content_of(tmp_path) == before
    write(tmp_path / "out", {"new": torch.ones(1)}, overwrite=True)
    assert sorted(content_of(tmp_path) or {}) == ["out/merganser.json", "out/model.safetensors"]
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["new"]


def test_a_folder_that_cannot_be_swapped_is_an_output_error_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSwap:
        def __init__(self, *_: object, **__: object) -> None:
            pass

    write(tmp_path / "out", {"x": torch.ones(1)})
    before = content_of(tmp_path)
    monkeypatch.setattr("ctypes.CDLL", NoSwap)
    with pytest.raises(OutputError, match="cannot be replaced in one step on this file system") as caught:
        write(tmp_path / "out", {"x": torch.zeros(1)}, overwrite=True)
    assert caught.value.hint == "remove it first"
    assert content_of(tmp_path) == before


def test_a_reader_never_finds_the_target_missing_or_half_while_it_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, {"x": torch.zeros(1000)})
    path = str(target / "model.safetensors")
    size = os.path.getsize(path)
    stop, polls, wrong = threading.Event(), [0], []

    def poll() -> None:
        while not stop.is_set():
            polls[0] += 1
            try:
                if os.stat(path).st_size != size:
                    wrong.append("size")
            except OSError as error:
                wrong.append(repr(error))

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for i in range(40):
            write(target, {"x": torch.full((1000,), float(i))}, overwrite=True)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    assert polls[0] > 400, "the reader hardly looked"


def test_the_umask_decides_who_may_read_as_for_any_other_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", {"x": torch.ones(1), "y": torch.ones(1)}, shard_bytes=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes == {0o640}

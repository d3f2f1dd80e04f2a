"""A run's folder: one process at a time, what a run may be gone on with, and a journal that tells of all rounds."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from merganser.decentral.durable import write
from merganser.decentral.folder import config_of, digest_of, journal, refuse_held
from merganser.decentral.rounds import run, together
from merganser.decentral.words import RunConfig
from merganser.errors import OutputError, StateError
from tiny_agents import TinyLearner, tiny_config


def go(config: RunConfig, folder: Path, *, resume: bool = False, data: str | None = None) -> int:
    crew = together(config, TinyLearner, folder=folder, aligned=False)
    return len(run(config, crew, folder, resume=resume, data=data))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process works on it, as far as anybody sees."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_driver_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    config, folder = tiny_config(), tmp_path / "run"
    go(config, folder)
    before = tree(folder)
    with held(folder):
        for resume in (True, False):
            with pytest.raises(StateError, match="another process is working on"):
                go(config, folder, resume=resume)
        with pytest.raises(StateError, match="another process is working on"):
            refuse_held(folder)
        assert tree(folder) == before
    refuse_held(folder)
    assert go(config, folder, resume=True) == 3


def test_a_folder_that_another_run_has_is_left_as_it_is(tmp_path: Path) -> None:
    go(tiny_config(), tmp_path)
    before = tree(tmp_path)
    for config, resume in ((tiny_config(), False), (tiny_config(seed=2), True), (tiny_config(codec="bf16"), True)):
        with pytest.raises(StateError, match="holds a run"):
            go(config, tmp_path, resume=resume)
        assert tree(tmp_path) == before


def test_a_folder_is_held_while_its_run_lasts(tmp_path: Path) -> None:
    config = tiny_config()
    crew = together(config, TinyLearner, folder=tmp_path, aligned=False)

    def meanwhile(_: object) -> None:
        with pytest.raises(StateError, match="another process is working on"):
            refuse_held(tmp_path)

    assert len(run(config, crew, tmp_path, progress=meanwhile)) == 3
    refuse_held(tmp_path)


def test_what_is_no_folder_is_said_without_a_hint_to_make_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file cannot be written: File exists") as caught:
        go(tiny_config(), tmp_path / "file")
    assert caught.value.hint is None
    with pytest.raises(OutputError, match="cannot be written: ") as caught:
        write(tmp_path / "file" / "x", "")
    assert caught.value.hint is None
    with pytest.raises(OutputError):
        refuse_held(tmp_path / "file")


def test_other_examples_are_not_gone_on_with_and_unknown_ones_are(tmp_path: Path) -> None:
    config = tiny_config()
    one, other = (digest_of([torch.full((3,), float(i)), torch.arange(3)]) for i in (1, 2))
    go(config, tmp_path, data=one)
    with pytest.raises(StateError, match=r"the data of the run in .* has changed since it was begun"):
        go(config, tmp_path, resume=True, data=other)
    assert go(config, tmp_path, resume=True, data=one) == 3
    assert go(config, tmp_path, resume=True) == 3
    assert digest_of([torch.zeros(2, 3)]) != digest_of([torch.zeros(3, 2)]) != digest_of([torch.zeros(6)])


def test_another_graph_in_the_same_file_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    line = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    file.write_text(json.dumps({"adjacency": line}))
    config = tiny_config(agents=3, topology={"kind": "file", "file": str(file)})
    go(config, tmp_path / "run")
    file.write_text(json.dumps({"adjacency": line}, indent=1))  # the same one
    assert go(config, tmp_path / "run", resume=True) == 3
    file.write_text(json.dumps({"adjacency": [[0, 1, 1], [1, 0, 0], [1, 0, 0]]}))
    with pytest.raises(StateError, match=r"the graph of the run in .* has changed"):
        go(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["middle", "last", "gone", "twice", "emptied"])
def test_a_journal_that_lost_a_round_is_not_gone_on_with_and_stays_as_it_is(tmp_path: Path, damage: str) -> None:
    config = tiny_config()
    go(config, tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        damaged = {
            "middle": [lines[0], "\x00" * 40 + "\n", lines[2]],
            "last": lines[:2],
            "twice": [lines[0], lines[0], *lines[1:]],
            "emptied": [],
        }
        path.write_text("".join(damaged[damage]))
    before = tree(tmp_path)
    with pytest.raises(StateError, match=r"journal.jsonl does not tell of round \d once, and all agents have kept"):
        go(config, tmp_path, resume=True)
    assert tree(tmp_path) == before
    path.write_text("".join(lines))
    assert go(config, tmp_path, resume=True) == 3


@pytest.mark.parametrize("line", ["3", "[]", "null", '{"round": 1}', '{"round": "0", "step": 0}', "\udcff", "[" * 9999])
def test_what_is_no_line_of_a_journal_does_not_count(tmp_path: Path, line: str) -> None:
    first = {"round": 0, "step": 0, "agents": []}
    (tmp_path / "journal.jsonl").write_bytes(f"{json.dumps(first)}\n{line}\n".encode(errors="surrogateescape"))
    assert journal(tmp_path) == [first]


def test_a_run_that_was_killed_before_its_first_round_has_no_line(tmp_path: Path) -> None:
    config = tiny_config()

    class Killed(TinyLearner):
        def train(self, batches: int) -> float:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, together(config, Killed, folder=tmp_path, aligned=False), tmp_path)
    (tmp_path / "journal.jsonl").unlink()
    assert config_of(tmp_path) == config
    assert journal(tmp_path) == []
    assert go(config, tmp_path, resume=True) == 3


def test_a_configuration_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"\xff\x00")
    with pytest.raises(StateError, match=r"holds no run that this version reads: run\.json") as caught:
        config_of(tmp_path)
    assert "\n" not in caught.value.message


def test_models_of_a_run_that_was_interrupted_are_the_same_files(tmp_path: Path) -> None:
    config = tiny_config()
    go(config, tmp_path / "whole")
    go(config, tmp_path / "parts")
    for path in (tmp_path / "parts").glob("agent-*/00000002.safetensors"):
        path.unlink()
    go(config, tmp_path / "parts", resume=True)
    assert tree(tmp_path / "parts" / "models") == tree(tmp_path / "whole" / "models")


def test_starts_count_from_the_first_step_on(tmp_path: Path) -> None:
    together(tiny_config(), TinyLearner, folder=tmp_path / "run", aligned=False).plan()
    assert not (tmp_path / "run").exists()

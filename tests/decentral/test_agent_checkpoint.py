"""Checkpoints of agents, and runs that were killed: real child processes and kill -9."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.decentral import checkpoint
from merganser.decentral.agent import Phase
from merganser.decentral.checkpoint import Checkpoint
from merganser.decentral.folder import journal
from merganser.decentral.rounds import run, together
from merganser.decentral.snapshot import decode
from merganser.decentral.words import Limits, RunConfig
from merganser.errors import OutputError, StateError
from tiny_agents import TinyLearner, tiny_config


def outcome(folder: Path) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """Models, and lines of the journal without what is no result: seconds, and how often an agent was started."""
    models = [decode(path.read_bytes(), Limits()).tensors for path in sorted((folder / "models").iterdir())]
    lines = journal(folder)
    for line in lines:
        del line["seconds"]
        for record in line["agents"]:
            del record["seconds"], record["incarnation"]
    return [dict(model) for model in models], lines


def same(one: Path, two: Path) -> None:
    (models, lines), (others, other_lines) = outcome(one), outcome(two)
    for a, b in zip(models, others, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines == other_lines


def killed(config: RunConfig, folder: Path, agent: int, step: int, phase: Phase) -> None:
    """Run in a child that kills itself, without a chance to clean up, when an agent begins a phase."""

    def hook(who: int, number: int, now: Phase) -> None:
        if (who, number, now) == (agent, step, phase):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            run(config, together(config, TinyLearner, aligned=False, folder=folder, hook=hook), folder)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def resumed(config: RunConfig, folder: Path) -> None:
    run(config, together(config, TinyLearner, aligned=False, folder=folder), folder, resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(tiny_config(), together(tiny_config(), TinyLearner, aligned=False, folder=folder), folder)
    return folder


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("agent", "step"), [(0, 0), (3, 1), (4, 2)])
def test_killed_in_any_phase_and_resumed_is_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, whole: Path, phase: Phase, agent: int, step: int
) -> None:
    killed(tiny_config(), tmp_path, agent, step, phase)
    assert not (tmp_path / "models").exists()
    resumed(tiny_config(), tmp_path)
    same(tmp_path, whole)
    assert {record["incarnation"] for record in journal(tmp_path)[-1]["agents"]} == {1}


@pytest.mark.parametrize(
    "words",
    [
        {"algorithm": "cdsgd"},
        {"algorithm": "sgp", "topology": {"kind": "star"}},
        {"algorithm": "isolated"},
        {"merge": {"rule": "aligned"}},
        {"merge": {"rule": "aligned_once"}},
        {"merge": {"rule": "model_stock"}, "same_start": True},
        {"merge": {"rule": "soft", "own": 0.5}, "warmup_epochs": 2.0},
        {"merge": {"rule": "plain", "final_global": True}, "topology": {"kind": "random_matching"}},
        {"codec": "bf16"},
    ],
    ids=str,
)
def test_every_algorithm_goes_on_bit_for_bit(tmp_path: Path, words: dict[str, Any]) -> None:
    config = tiny_config(**words)
    run(config, together(config, TinyLearner, aligned=False, folder=tmp_path / "one"), tmp_path / "one")
    batches = 3 if config.algorithm in ("cdsgd", "sgp") else 1
    extra = 2 if config.merge.rule == "aligned_once" else 0
    killed(config, tmp_path / "two", 2, 2 * batches + extra, Phase.TRAIN)
    assert len(journal(tmp_path / "two")) == 2
    resumed(config, tmp_path / "two")
    same(tmp_path / "two", tmp_path / "one")


def test_a_run_that_is_killed_twice_and_between_agents_checkpoints_goes_on(tmp_path: Path, whole: Path) -> None:
    killed(tiny_config(), tmp_path, 2, 1, Phase.CHECKPOINT)  # agents 0 and 1 have kept step 1, the others have not
    assert [checkpoint.numbers(tmp_path / f"agent-{i}")[-1] for i in range(5)] == [1, 1, 0, 0, 0]
    assert len(journal(tmp_path)) == 2
    folder = tmp_path
    child = os.fork()
    if not child:
        try:

            def hook(agent: int, step: int, phase: Phase) -> None:
                if (agent, step, phase) == (1, 2, Phase.MERGE):
                    os.kill(os.getpid(), signal.SIGKILL)

            run(
                tiny_config(),
                together(tiny_config(), TinyLearner, aligned=False, folder=folder, hook=hook),
                folder,
                resume=True,
            )
        finally:
            os._exit(3)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    resumed(tiny_config(), tmp_path)
    same(tmp_path, whole)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, whole: Path, damage: str) -> None:
    killed(tiny_config(), tmp_path, 0, 2, Phase.COLLECT)
    newest = tmp_path / "agent-3" / "00000001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-9] ^= 4
    new = {"cut": data[:-20], "flipped": data, "empty": b"", "gone": None}[damage]
    newest.unlink() if new is None else newest.write_bytes(new)
    assert checkpoint.sound(tmp_path / "agent-3") == [0]
    resumed(tiny_config(), tmp_path)
    same(tmp_path, whole)


def test_without_a_checkpoint_that_all_have_it_begins_anew(tmp_path: Path, whole: Path) -> None:
    killed(tiny_config(), tmp_path, 0, 2, Phase.COLLECT)
    for path in (tmp_path / "agent-3").glob("*.safetensors"):
        path.write_bytes(b"")
    resumed(tiny_config(), tmp_path)
    same(tmp_path, whole)


def test_a_finished_run_is_resumed_without_work(tmp_path: Path, whole: Path) -> None:
    before = journal(whole)

    def hook(agent: int, step: int, phase: Phase) -> None:
        raise AssertionError((agent, step, phase))

    config = tiny_config()
    assert (
        run(config, together(config, TinyLearner, aligned=False, folder=whole, hook=hook), whole, resume=True) == before
    )


def some(number: int) -> Checkpoint:
    return Checkpoint({"x": torch.full((3,), float(number)), "n": torch.tensor(number)}, {"at": number, "ratio": 1 / 3})


def test_a_checkpoint_comes_back_whole_and_two_are_kept(tmp_path: Path) -> None:
    for number in (0, 4, 9):
        checkpoint.save(tmp_path / "agent", number, some(number))
    assert checkpoint.numbers(tmp_path / "agent") == [4, 9]
    found = checkpoint.load(tmp_path / "agent", 9)
    assert torch.equal(found.tensors["x"], some(9).tensors["x"])
    assert int(found.tensors["n"]) == 9
    assert found.content == {"at": 9, "ratio": 1 / 3}
    assert sorted(path.name for path in (tmp_path / "agent").iterdir()) == [
        "00000004.safetensors",
        "00000009.safetensors",
    ]
    checkpoint.forget(tmp_path / "agent", after=4)
    assert checkpoint.numbers(tmp_path / "agent") == [4]


def test_not_finite_weights_are_kept_too(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 0, Checkpoint({"x": torch.tensor([torch.nan, 1.0])}))
    assert bool(checkpoint.load(tmp_path, 0).tensors["x"].isnan()[0])


def test_every_flipped_byte_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 0, some(0))
    data = path.read_bytes()
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found = checkpoint.load(tmp_path, 0)
        except StateError:
            continue
        # a space of the padding, or a letter of the header that says the same
        assert found.content == some(0).content
        assert all(torch.equal(found.tensors[n], x) for n, x in some(0).tensors.items())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 0, some(0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            checkpoint.save(tmp_path, 1, some(1))
    assert [path.name for path in tmp_path.iterdir()] == ["00000000.safetensors"]
    assert checkpoint.load(tmp_path, 0).content["at"] == 0


def test_starts_are_counted(tmp_path: Path) -> None:
    assert [checkpoint.started(tmp_path / "a") for _ in range(3)] == [0, 1, 2]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    config, other = tiny_config(), tiny_config(seed=1)
    run(config, together(config, TinyLearner, aligned=False, folder=tmp_path), tmp_path)
    agent = together(other, TinyLearner, aligned=False, folder=tmp_path).agents[0]
    with pytest.raises(StateError, match="of another run"):
        agent.resume(2)
    with pytest.raises(StateError, match="keeps no checkpoints"):
        together(config, TinyLearner).agents[0].resume(0)


def test_a_run_without_a_step_that_all_kept_begins_anew(tmp_path: Path) -> None:
    config = tiny_config(rounds=4)
    run(config, together(config, TinyLearner, aligned=False, folder=tmp_path / "whole"), tmp_path / "whole")
    folder = tmp_path / "odd"
    run(config, together(config, TinyLearner, aligned=False, folder=folder), folder)
    for path in (folder / "agent-0").glob("*.safetensors"):
        path.unlink()
    assert not checkpoint.numbers(folder / "agent-0")
    assert checkpoint.numbers(folder / "agent-1")
    # killed again after the first round: what it went on from must be of the new run, not of the old one
    killed_at = together(config, TinyLearner, aligned=False, folder=folder, hook=_stops_at(2))
    with pytest.raises(KeyboardInterrupt):
        run(config, killed_at, folder, resume=True)
    assert checkpoint.numbers(folder / "agent-1") == [0, 1]
    run(config, together(config, TinyLearner, aligned=False, folder=folder), folder, resume=True)
    same(tmp_path / "whole", folder)


def _stops_at(step: int) -> Any:
    def hook(_who: int, number: int, _now: Phase) -> None:
        if number == step:
            raise KeyboardInterrupt

    return hook

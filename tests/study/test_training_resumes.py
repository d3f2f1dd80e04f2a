"""An interrupted training goes on and gives the same bits; so does the same training in another process."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dying_training import trained
from tiny_models import tiny_bert
from torch import Tensor

from merganser.errors import StateError
from merganser.study.data import Examples
from merganser.study.networks import load_encoder
from merganser.study.training import Lesson, train
from merganser.study.words import Training

pytestmark = pytest.mark.xdist_group("training-resumes")  # what was killed is made once
STEPS_AN_EPOCH = 2 + 3
#: Moments of death, and how many epochs are kept then.
MOMENTS = {
    "train:1": 0,  # in the first epoch
    "train:5": 0,  # after its last step, before it is kept
    "train:replace-1": 0,  # when it is written and not yet in its place
    "train:6": 1,  # after the first step of the second
    "train:8": 1,
    "train:replace-2": 1,
    "train:11": 2,
    "train:15": 2,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each moment, left by a process that got SIGKILL there."""
    root = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("dying_training.py")
    done = subprocess.run(
        [sys.executable, str(script), "train", str(root), *MOMENTS], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["-9"] * len(MOMENTS), done.stderr
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[float]]:
    return trained(tmp_path_factory.mktemp("whole"))


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name, x in one.items():
        assert torch.equal(x, two[name]), name


@pytest.mark.parametrize(("moment", "kept"), MOMENTS.items())
def test_a_killed_training_goes_on_and_gives_the_same_bits(killed: Path, whole, moment: str, kept: int) -> None:
    folder = killed / moment.replace(":", "-")
    assert (folder / "run.pt").exists() == (kept > 0)
    steps: list[int] = []
    tensors, losses = trained(folder, lambda done, total: steps.append(done))
    assert steps == list(range(STEPS_AN_EPOCH * kept + 1, STEPS_AN_EPOCH * 3 + 1))
    assert losses == whole[1]
    assert_same_bits(tensors, whole[0])


def test_a_finished_training_is_not_done_again(tmp_path: Path, whole) -> None:
    trained(tmp_path)
    steps: list[int] = []
    tensors, losses = trained(tmp_path, lambda done, total: steps.append(done))
    assert (steps, losses) == ([], whole[1])
    assert_same_bits(tensors, whole[0])


TEXTS = Examples(
    ("a cat", "a dog", "good cat", "bad dog", "photo of a cat", "photo of a dog", "cat .", "dog ."),
    np.array([0, 1] * 4),
    ("cat", "dog"),
)


class StopError(Exception):
    pass


def read_texts(base: Path, keep: Path, *, stop: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Train a text network that drops units at random; `stop` interrupts it after that step."""

    def progress(done: int, total: int) -> None:
        if done == stop:
            raise StopError

    encoder = load_encoder(base)
    lesson = Lesson(TEXTS, lambda z: z[:, :2])
    train(encoder, {"t": lesson}, Training(epochs=3, lr=0.01, batch=4), seed=seed, keep=keep, progress=progress)
    return encoder.state_dict()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_bert(folder, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    return folder


def test_a_network_with_dropout_gives_the_same_bits_whatever_was_drawn_before(tmp_path: Path, base: Path) -> None:
    torch.manual_seed(1)
    one = read_texts(base, tmp_path / "one.pt")
    torch.manual_seed(2)
    assert_same_bits(one, read_texts(base, tmp_path / "two.pt"))


def test_an_interrupted_network_with_dropout_gives_the_same_bits(tmp_path: Path, base: Path) -> None:
    torch.manual_seed(1)
    one = read_texts(base, tmp_path / "one.pt")
    torch.manual_seed(1)
    with pytest.raises(StopError):
        read_texts(base, tmp_path / "two.pt", stop=3)
    assert_same_bits(one, read_texts(base, tmp_path / "two.pt"))


def test_training_leaves_the_global_generator_where_it_was(tmp_path: Path, base: Path) -> None:
    torch.manual_seed(1)
    encoder = load_encoder(base)
    before = torch.get_rng_state()
    train(encoder, {"t": Lesson(TEXTS, lambda z: z[:, :2])}, Training(epochs=1, lr=0.01), seed=0, keep=tmp_path / "k")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seconds_of_an_interrupted_training_are_all_that_were_spent_on_kept_epochs(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by one second whenever it is read: a training reads it at the start and an epoch."""
    clock = itertools.count()
    monkeypatch.setattr("merganser.study.training.time.perf_counter", lambda: float(next(clock)))
    with pytest.raises(StopError):
        read_texts(base, tmp_path / "k", stop=3)  # 2 steps an epoch: one epoch, one second, is kept
    next(clock)
    lesson = {"t": Lesson(TEXTS, lambda z: z[:, :2])}
    course = train(load_encoder(base), lesson, Training(epochs=3, lr=0.01, batch=4), seed=0, keep=tmp_path / "k")
    assert (len(course.losses), course.seconds) == (3, 1 + 3)  # two more epochs and the end


def test_another_seed_gives_other_bits(tmp_path: Path, base: Path) -> None:
    one, two = (read_texts(base, tmp_path / f"{seed}.pt", seed=seed) for seed in (0, 1))
    assert not torch.equal(
        one["model.embeddings.word_embeddings.weight"], two["model.embeddings.word_embeddings.weight"]
    )


def test_a_kept_run_of_other_settings_is_not_gone_on_with(tmp_path: Path, base: Path) -> None:
    read_texts(base, tmp_path / "kept.pt", seed=1)
    assert_same_bits(read_texts(base, tmp_path / "fresh.pt"), read_texts(base, tmp_path / "kept.pt"))


def test_a_damaged_run_is_refused_by_path(tmp_path: Path, base: Path) -> None:
    keep = tmp_path / "run.pt"
    for content in (b"", b"no such thing"):
        keep.write_bytes(content)
        with pytest.raises(StateError, match="is damaged") as caught:
            read_texts(base, keep)
        assert str(keep) in caught.value.message

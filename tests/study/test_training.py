"""Training: steps by hand, order, augmentation; what is not to be trained stays."""

from __future__ import annotations

import copy
import itertools
import math
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_data import bars
from tiny_models import processor, saved_model, tiny_bert, vision_sizes
from torch import Tensor
from torch.nn import functional

from merganser.errors import MerganserError, ParameterError
from merganser.study.data import Examples
from merganser.study.judge import Paper
from merganser.study.networks import Encoder, load_encoder, new_encoder
from merganser.study.training import Lesson, augmented, batches, schedule, train
from merganser.study.words import Training

SIZES = {"kind": "mlp", "image": 4, "hidden": 8, "depth": 1, "width": 2}


def network(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return new_encoder(SIZES)


def logits(x: Tensor) -> Tensor:
    return 5 * x


def bar_lesson(count: int, seed: int = 0) -> Lesson:
    x, labels = bars(count, seed)
    return Lesson(Examples(np.stack([x] * 3, axis=-1), np.array(labels), ("left", "right")), logits)


def values(encoder: Encoder) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in encoder.state_dict().items()}


def test_the_loss_falls_and_new_pictures_are_told_apart(tmp_path: Path) -> None:
    encoder = network()
    losses = train(
        encoder, {"bars": bar_lesson(60)}, Training(epochs=6, lr=0.02, batch=10), seed=0, keep=tmp_path / "k"
    ).losses
    assert len(losses) == 6
    assert losses[-1] < 0.2 * losses[0]
    assert Paper(bar_lesson(40, seed=9).examples, logits).judge(encoder).value == 100.0


def test_training_ends_in_evaluation_mode(tmp_path: Path) -> None:
    encoder = network()
    train(encoder, {"bars": bar_lesson(4)}, Training(epochs=1, lr=0.01), seed=0, keep=tmp_path / "k")
    assert not encoder.training


def test_the_loss_of_an_epoch_is_the_mean_over_batches_of_the_smoothed_cross_entropy(tmp_path: Path) -> None:
    encoder, lesson = network(), bar_lesson(6)
    with torch.no_grad():
        z = logits(encoder.embed(encoder.prepare(lesson.examples.items))).double().numpy()
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    each = [-0.9 * log_p[i, label] - 0.1 * log_p[i].mean() for i, label in enumerate(lesson.examples.labels)]
    training = Training(epochs=1, lr=1e-30, batch=4, label_smoothing=0.1)
    (loss,) = train(encoder, {"bars": lesson}, training, seed=3, keep=tmp_path / "k").losses
    first, second = batches(6, 4, 3, 0, 0)
    expected = (np.mean([each[i] for i in first]) + np.mean([each[i] for i in second])) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_first_step_is_that_of_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    encoder, lesson = network(), bar_lesson(6)
    twin = copy.deepcopy(encoder)
    loss = functional.cross_entropy(
        logits(twin.embed(twin.prepare(lesson.examples.items))), torch.from_numpy(lesson.examples.labels)
    )
    loss.backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in twin.parameters() if p.grad is not None))
    assert norm > 1  # so that clipping matters
    train(encoder, {"bars": lesson}, Training(epochs=1, lr=0.01, weight_decay=0.5), seed=0, keep=tmp_path / "k")
    for before, after in zip(twin.parameters(), encoder.parameters(), strict=True):
        assert before.grad is not None
        g, p = before.grad.double() / norm, before.detach().double()
        expected = p * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5  # elsewhere the sign is rounding
        assert torch.allclose(after.detach().double()[clear], expected[clear], atol=1e-5)


def test_every_batch_comes_from_one_lesson_and_an_epoch_shows_every_example_once(tmp_path: Path) -> None:
    seen: dict[str, list[list[int]]] = {"one": [], "two": []}
    encoder = network()
    embed = encoder.embed
    shown: list[list[int]] = []

    def marked(name: str, count: int) -> Lesson:
        x = np.zeros((count, 4, 4, 3), np.uint8)
        x[:, 0, 0, 0] = np.arange(count) + (100 if name == "two" else 0)

        def head(z: Tensor) -> Tensor:
            seen[name].append(shown[-1])
            return z

        return Lesson(Examples(x, np.zeros(count, np.int64), ("a", "b")), head)

    def watched(prepared: list[Tensor]) -> Tensor:
        shown.append([int(x[0, 0, 0]) for x in prepared])
        return embed(prepared)

    encoder.embed = watched  # type: ignore[method-assign]
    training = Training(epochs=2, lr=0.01, batch=4)
    train(encoder, {n: marked(n, c) for n, c in (("one", 9), ("two", 6))}, training, seed=0, keep=tmp_path / "k")
    assert len(shown) == 2 * (3 + 2)
    for epoch in range(2):
        one, two = (seen["one"][3 * epoch :][:3], seen["two"][2 * epoch :][:2])
        assert sorted(itertools.chain(*one)) == list(range(9))
        assert sorted(itertools.chain(*two)) == list(range(100, 106))
    assert seen["one"][:3] != seen["one"][3:]


@pytest.mark.parametrize("freeze", [("stem.*",), ("norm*", "*.bias"), ("project.weight", "ups.0.weight")])
def test_frozen_tensors_stay_and_the_others_move(tmp_path: Path, freeze: tuple[str, ...]) -> None:
    encoder = network()
    before = values(encoder)
    train(encoder, {"b": bar_lesson(20)}, Training(epochs=2, lr=0.01, freeze=freeze), seed=0, keep=tmp_path / "k")
    for name, x in encoder.state_dict().items():
        assert torch.equal(x, before[name]) == any(fnmatchcase(name, pattern) for pattern in freeze), name


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"freeze \* leaves nothing to train"):
        train(network(), {"b": bar_lesson(4)}, Training(epochs=1, lr=1, freeze=("*",)), seed=0, keep=tmp_path / "k")


def test_a_pattern_that_freezes_nothing_is_refused(tmp_path: Path) -> None:
    training = Training(epochs=1, lr=0.01, freeze=("embedings.*",))
    with pytest.raises(ParameterError, match="embedings"):
        train(network(), {"b": bar_lesson(4)}, training, seed=0, keep=tmp_path / "k")


@pytest.mark.parametrize("total", [1, 2, 7, 20, 33, 1000])
def test_the_learning_rate_rises_for_a_twentieth_and_falls_as_half_a_cosine(total: int) -> None:
    warm = max(1, round(total / 20))
    ours = [schedule(step, total) for step in range(total)]
    assert ours[:warm] == [(step + 1) / warm for step in range(warm)]
    angles = [math.pi / 2 * k / (total - warm) for k in range(total - warm)]
    assert ours[warm:] == pytest.approx([math.cos(angle) ** 2 for angle in angles], abs=1e-12)
    assert max(ours) == 1.0
    assert min(ours) > 0


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (9, 4), (10, 1), (5, 100)])
def test_batches_cover_each_place_once(count: int, size: int) -> None:
    found = batches(count, size, 0, 0, 0)
    assert sorted(itertools.chain(*found)) == list(range(count))
    assert {len(batch) for batch in found[:-1]} <= {size}
    assert 0 < len(found[-1]) <= size


def test_batches_are_fixed_by_seed_epoch_and_lesson_and_differ_by_each() -> None:
    assert batches(50, 7, 1, 2, 3) == batches(50, 7, 1, 2, 3)
    orders = {tuple(itertools.chain(*batches(50, 7, *key))) for key in itertools.product(range(3), repeat=3)}
    assert len(orders) == 27


def moved(picture: np.ndarray, down: int, right: int) -> np.ndarray:
    """The window `down` and `right` of the middle of a picture whose edges are drawn out."""
    height, width, _ = picture.shape
    wide = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge")
    return wide[2 + down : 2 + down + height, 2 + right : 2 + right + width]


@pytest.mark.parametrize(("shift", "flip"), [(0, True), (1, False), (2, True)])
def test_augmentation_gives_every_shift_and_mirror_image_and_nothing_else(shift: int, flip: bool) -> None:
    picture = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    steps = range(-shift, shift + 1)
    possible = {moved(picture, d, r)[:, ::turn].tobytes() for d in steps for r in steps for turn in (1, -1)[: 1 + flip]}
    items = [torch.from_numpy(picture)] * 800
    seen = {x.numpy().tobytes() for x in augmented(items, shift, flip, torch.Generator().manual_seed(0))}
    assert seen == possible


def test_augmentation_of_a_tiny_picture_by_hand() -> None:
    picture = torch.tensor([[[1], [2]], [[3], [4]]], dtype=torch.uint8)
    plain = [[[1, 2], [3, 4]], [[1, 1], [3, 3]], [[2, 2], [4, 4]]]  # as it is, one to the right, one to the left
    above = [[[a, b], [a, b]] for (a, b), _ in plain]
    below = [[[c, d], [c, d]] for _, (c, d) in plain]
    found = augmented([picture] * 300, 1, False, torch.Generator().manual_seed(1))
    assert sorted({str(x.squeeze(-1).tolist()) for x in found}) == sorted(set(map(str, plain + above + below)))


def test_half_of_the_pictures_are_mirrored() -> None:
    picture = torch.tensor([[[1], [2]]], dtype=torch.uint8)
    found = augmented([picture] * 4000, 0, True, torch.Generator().manual_seed(2))
    share = np.mean([x.flatten().tolist() == [2, 1] for x in found])
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 4000)


def test_bfloat16_training_learns_and_keeps_single_precision(tmp_path: Path) -> None:
    encoder = network()
    training = Training(epochs=6, lr=0.02, batch=10, bfloat16=True)
    losses = train(encoder, {"bars": bar_lesson(60)}, training, seed=0, keep=tmp_path / "k").losses
    assert losses[-1] < 0.3 * losses[0]
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_a_vision_tower_of_clip_can_be_trained_on_moved_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**vision_sizes())
    saved_model(transformers.CLIPVisionModelWithProjection(config), tmp_path)
    processor(tmp_path)
    encoder, (x, labels) = load_encoder(tmp_path), bars(20, size=8)
    lesson = Lesson(Examples(np.stack([x] * 3, axis=-1), np.array(labels), ("left", "right")), lambda z: z[:, :2])
    training = Training(epochs=4, lr=0.01, batch=10, shift=1)
    losses = train(encoder, {"bars": lesson}, training, seed=0, keep=tmp_path / "k").losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("augmentation", [{"shift": 1}, {"flip": True}])
def test_texts_cannot_be_moved_or_mirrored(tmp_path: Path, augmentation: dict[str, int]) -> None:
    tiny_bert(tmp_path)
    lesson = Lesson(Examples(("a cat", "a dog"), np.array([0, 1]), ("cat", "dog")), lambda z: z[:, :2])
    training = Training(epochs=1, lr=0.01, **augmentation)
    with pytest.raises(MerganserError, match="text"):
        train(load_encoder(tmp_path), {"t": lesson}, training, seed=0, keep=tmp_path / "k")

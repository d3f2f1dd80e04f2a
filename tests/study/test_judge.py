"""Judging: one number from fixed examples, with its n and standard error."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from merganser.errors import MerganserError, ParameterError
from merganser.study.data import Examples, Items
from merganser.study.judge import Paper, Score
from merganser.study.networks import Encoder, new_encoder


class Speller(Encoder):
    """Answers with the number that a text says, such as 2 for "xxx 2"."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.batches: list[list[str]] = []
        self.prepared = 0

    def prepare(self, items: Items) -> list[Any]:
        self.prepared += 1
        return list(items)

    def embed(self, prepared: list[Any]) -> Tensor:
        self.batches.append(prepared)
        return self.scale * torch.eye(5)[[int(text.split()[-1]) for text in prepared]]

    def config(self) -> dict[str, Any]:
        return {}


def same(x: Tensor) -> Tensor:
    return x


def texts(answers: Sequence[int], labels: Sequence[int], classes: int = 3) -> Examples:
    """Texts of lengths in no order, to which `Speller` gives these answers."""
    lengths = random.Random(0).sample(range(1, 400), len(answers))
    items = tuple(f"{'x' * n} {answer}" for n, answer in zip(lengths, answers, strict=True))
    return Examples(items, np.array(labels), tuple("abcde"[:classes]))


FIVE = texts([0, 1, 2, 2, 0], [0, 1, 2, 2, 1])


def test_accuracy_is_the_share_of_right_answers_in_percent() -> None:
    score = Paper(FIVE, same).judge(Speller())
    assert (score.value, score.n, score.unit) == (80.0, 5, "%")


def test_the_error_of_an_accuracy_is_that_of_a_share() -> None:
    assert Paper(FIVE, same).judge(Speller()).error == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 5), rel=1e-12)
    assert Paper(texts([1, 2], [1, 2]), same).judge(Speller()).error == 0.0


@pytest.mark.parametrize("batch", [1, 2, 3, 250])
def test_batches_by_length_mix_up_no_answers(batch: int) -> None:
    generator = random.Random(batch)
    answers = [generator.randrange(5) for _ in range(60)]
    labels = [generator.randrange(5) for _ in range(60)]
    encoder = Speller()
    score = Paper(texts(answers, labels, 5), same).judge(encoder, batch=batch)
    right = sum(a == b for a, b in zip(answers, labels, strict=True))
    assert score.value == pytest.approx(100 * right / 60, rel=1e-12)
    lengths = [len(text) for together in encoder.batches for text in together]
    assert lengths == sorted(lengths)
    assert max(map(len, encoder.batches)) == min(batch, 60)


def test_a_count_takes_the_first_examples() -> None:
    answers, labels = [0, 1, 2, 2, 0, 0], [0, 1, 2, 1, 1, 1]
    paper = Paper(texts(answers, labels), same)
    assert [paper.judge(Speller(), count=n).value for n in (1, 3, 4, 6)] == [100.0, 100.0, 75.0, 50.0]
    assert [paper.judge(Speller(), count=n).n for n in (1, 4, 99)] == [1, 4, 6]


def test_no_examples_at_all_are_no_score() -> None:
    with pytest.raises(ParameterError):
        Paper(FIVE, same).judge(Speller(), count=0)


def test_the_answer_is_the_heads_and_not_the_networks() -> None:
    turned = torch.eye(5)[[1, 2, 0, 3, 4]]
    assert Paper(texts([2, 0, 1], [0, 1, 2]), lambda x: x @ turned).judge(Speller()).value == 100.0


def test_macro_f1_is_the_mean_over_classes_by_hand() -> None:
    # class a: 2 right, 1 wrong, 0 missed -> 4/5; b: 0; c: 1 right, 1 wrong, 0 missed -> 2/3
    score = Paper(texts([0, 0, 0, 2, 2], [0, 0, 1, 2, 1]), same, "macro_f1").judge(Speller())
    assert score.value == pytest.approx(100 * (4 / 5 + 0 + 2 / 3) / 3, abs=1e-4)
    assert math.isnan(score.error)
    assert score.n == 5


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_macro_f1_is_that_of_scikit_learn(classes: int) -> None:
    generator = random.Random(classes)
    for _ in range(5):
        answers = [generator.randrange(classes) for _ in range(30)]
        labels = [generator.choice([0, generator.randrange(classes)]) for _ in range(30)]
        ours = Paper(texts(answers, labels, classes), same, "macro_f1").judge(Speller()).value
        assert ours == pytest.approx(100 * f1_score(labels, answers, average="macro", zero_division=0), abs=1e-4)


def test_macro_f1_without_torchmetrics_is_refused_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not there
    with pytest.raises(MerganserError, match="macro_f1 needs torchmetrics") as caught:
        Paper(FIVE, same, "macro_f1").judge(Speller())
    assert caught.value.hint == 'pip install "merganser[study]"'


def test_items_are_prepared_once_for_many_networks() -> None:
    paper, one, two = Paper(FIVE, same), Speller(), Speller()
    paper.judge(one, count=2)
    paper.judge(one)
    assert paper.judge(two).value == 80.0
    assert (one.prepared, two.prepared) == (1, 0)


def test_progress_counts_examples_up_to_all_of_them() -> None:
    seen: list[tuple[int, int]] = []
    Paper(FIVE, same).judge(Speller(), batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_score_names_its_examples_and_goes_through_json() -> None:
    score = Paper(FIVE, same).judge(Speller())
    assert score.digest == FIVE.digest
    assert Score(**json.loads(json.dumps(score.record()))) == score


def test_a_score_of_some_examples_names_those() -> None:
    paper = Paper(FIVE, same)
    assert paper.judge(Speller(), count=2).digest == FIVE.first(2).digest != FIVE.digest
    assert paper.judge(Speller(), count=9).digest == FIVE.digest


def test_pictures_are_judged_by_a_real_network_as_its_logits_say() -> None:
    torch.manual_seed(0)
    encoder = new_encoder({"kind": "mlp", "image": 4, "hidden": 8, "depth": 1, "width": 3}).eval()
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(40) % 3
    with torch.no_grad():
        right = [int(encoder.embed(encoder.prepare(x[i : i + 1])).argmax()) == labels[i] for i in range(40)]
    paper = Paper(Examples(x, labels, ("a", "b", "c")), same)
    assert paper.judge(encoder, batch=7).value == pytest.approx(100 * sum(right) / 40, rel=1e-12)
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


def test_bfloat16_changes_no_answer_that_is_clear() -> None:
    encoder = new_encoder({"kind": "mlp", "image": 4, "hidden": 8, "depth": 1, "width": 2}).eval()
    with torch.no_grad():
        encoder.project.weight.zero_()
        encoder.project.bias.copy_(torch.tensor([-1.0, 1.0]))
    x = np.zeros((4, 4, 4, 3), np.uint8)
    paper = Paper(Examples(x, np.array([1, 1, 1, 0]), ("a", "b")), same)
    assert paper.judge(encoder, bfloat16=True).value == paper.judge(encoder).value == 75.0


def test_a_network_that_answers_nan_is_not_scored_as_if_it_had_answered() -> None:
    encoder = Speller()
    with torch.no_grad():
        encoder.scale.fill_(math.nan)
    with pytest.raises(MerganserError):
        Paper(texts([1, 1], [0, 0]), same).judge(encoder)

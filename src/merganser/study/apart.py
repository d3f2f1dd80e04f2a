"""What studies of networks that started apart share: pictures, and networks that are trained once.

The folder of a trained network that is there is done; what an interrupted run left goes on from its last epoch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.checkpoints.writer import RECEIPT_NAME
from merganser.errors import ParameterError, StateError
from merganser.study.data import Examples, Split, load_examples
from merganser.study.networks import Encoder, load_encoder, new_encoder
from merganser.study.records import read_record
from merganser.study.training import Lesson, train
from merganser.study.words import LinearHead, Source, Task, Training
from merganser.study.words_apart import Pictures
from merganser.study.zoo import Bar, save_encoder
from merganser.version import __version__

State = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """Where and how a study of networks that started apart is done.

    Attributes:
        out: folder of the study.
        zoo: folder of the trained networks.
        data: folder of packed data sets.
        device: where networks are trained; everything else runs on the CPU.
        bfloat16: judge accuracies with matrix products in bfloat16.
        bar: for progress.
    """

    out: Path
    zoo: Path
    data: Path | None
    device: str
    bfloat16: bool
    bar: Bar


@dataclass
class Album:
    """The pictures of a study, each split read when it is first needed.

    Attributes:
        name: of the study, for errors.
        source: of the pictures.
        counts: how many each step looks at.
        data: folder of packed data sets.
        seen: of the pictures that are compared and measured, where they are of other data.
    """

    name: str
    source: Source
    counts: Pictures
    data: Path | None
    seen: Source | None = None

    @cached_property
    def train(self) -> Examples:
        """What networks are trained on: all but every tenth of the training pictures."""
        return self._read("train")

    @cached_property
    def test(self) -> Examples:
        """What is judged."""
        examples = self._read("test")
        return examples if self.counts.test is None else examples.first(self.counts.test)

    @cached_property
    def compare(self) -> list[Batch]:
        """The first training pictures, or those of other data, to compare units by."""
        return self._batches(self._shown("train"), 0, self.counts.compare, "compare")

    @cached_property
    def measure(self) -> list[Batch]:
        """The next ones, for statistics."""
        return self._batches(self._shown("train"), self.counts.compare, self.counts.measure, "measure")

    @cached_property
    def held_out(self) -> list[Batch]:
        """Pictures that no network was trained on, to choose a balance by."""
        return self._batches(self._shown("validation"), 0, self.counts.held_out, "held_out")

    @cached_property
    def pages(self) -> list[tuple[Tensor, Tensor]]:
        """Test pictures and their classes, some at a time."""
        return pages_of(self.test, self.counts.batch)

    @property
    def own_test(self) -> Mapping[str, Tensor] | None:
        """By side, which test pictures are its own; None where its classes tell."""
        return None

    def own_train(self, side: str) -> Examples:
        """What the network of a side is trained on, of which its classes are taken."""
        return self.train

    def learnt(self, side: str) -> dict[str, Any]:
        """Where that comes from, in words for JSON."""
        return {"data": self.source.model_dump(mode="json")}

    def _shown(self, split: Split) -> Examples:
        """What rules look at.

        Raises:
            ParameterError: If other data are of another size.
        """
        if self.seen is None:
            return self.train if split == "train" else self._read(split)
        shown = self._examples(self.seen, split)
        if (sizes := [x.items.shape[1:] for x in (self.train, shown)])[0] != sizes[1]:  # type: ignore[union-attr]
            raise ParameterError(f"seen holds pictures of {sizes[1]}, and the networks take in {sizes[0]}")
        return shown

    def _read(self, split: Split) -> Examples:
        return self._examples(self.source, split)

    def _examples(self, source: Source, split: Split) -> Examples:
        task = Task(data=source, head=LinearHead(kind="linear"))  # the head is the study's
        examples = load_examples(self.name, task, split, self.data)
        if isinstance(examples.items, tuple):
            raise ParameterError(f"study {self.name} takes pictures, and its data are texts")
        return examples

    def _batches(self, examples: Examples, start: int, count: int, key: str) -> list[Batch]:
        if start + count > len(examples):
            raise ParameterError(
                f"pictures.{key} is {count}, and there are {max(len(examples) - start, 0)}",
                "take fewer for it, or for what comes before it",
            )
        x = pixels(examples.take(np.arange(start, start + count)))
        return [((part,), {}) for part in parts(x, self.counts.batch)]


def pixels(examples: Examples) -> Tensor:
    """Values in [-1, 1], shape (n, side, side, 3)."""
    assert not isinstance(examples.items, tuple)
    return torch.from_numpy(examples.items).float() / 127.5 - 1


def parts(x: Tensor, size: int) -> list[Tensor]:
    """Some rows at a time."""
    return [x[start : start + size] for start in range(0, len(x), size)]


def pages_of(examples: Examples, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Pictures and their labels, some at a time."""
    return list(zip(parts(pixels(examples), batch), parts(torch.from_numpy(examples.labels), batch), strict=True))


def trained(
    target: Path,
    network: Mapping[str, Any],
    training: Training,
    lesson: Callable[[], Lesson],
    *,
    seed: int,
    learns: Mapping[str, Any],
    work: Work,
) -> Encoder:
    """The network of a folder; trained first where it is not there.

    Args:
        target: folder of the network.
        network: its node, with the width of its answers.
        training: how.
        lesson: gives what it learns; not called where the network is there.
        seed: of weights, order and augmentation.
        learns: what the lesson is, in words for JSON.
        work: where and how.

    Raises:
        StateError: If the folder holds a network that was made in another way.
        MerganserError: If data are missing, or data and network do not fit.
    """
    wanted = {"network": dict(network), "training": training.model_dump(mode="json"), "seed": seed, **learns}
    wanted = json.loads(json.dumps(wanted))
    if (target / "config.json").is_file():
        receipt = read_record(target / RECEIPT_NAME)
        if changed := [key for key in wanted if receipt.get(key) != wanted[key]]:
            raise StateError(
                f"{target} holds a network with other {', '.join(changed)}", "name another folder with --zoo"
            )
        return load_encoder(target)
    taught = lesson()
    assert not isinstance(taught.examples.items, tuple)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        encoder = new_encoder({"image": taught.examples.items.shape[1], **network})
    keep = target.parent / f".training-{target.name}" / "run.pt"
    with work.bar(f"training {target.parent.name}, {target.name}") as progress:
        course = train(encoder, {"": taught}, training, seed=seed, keep=keep, device=work.device, progress=progress)
    made = {
        "merganser": __version__,
        "torch": torch.__version__,
        **wanted,
        "items": len(taught.examples),
        "digest": taught.examples.digest,
        "losses": [round(loss, 6) for loss in course.losses],
        "wall_s": round(course.seconds, 1),
    }
    save_encoder(encoder.cpu(), target, made, None)
    shutil.rmtree(keep.parent)
    return load_encoder(target)


def state_of(network: nn.Module) -> State:
    """Its tensors."""
    return {name: x.detach() for name, x in network.state_dict().items()}

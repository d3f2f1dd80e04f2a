"""Learners of a decentralised run from its configuration: data shared out, a network for every agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from merganser.decentral.shards import shared_out
from merganser.decentral.torch_learner import Labelled, TorchLearner
from merganser.decentral.words import RunConfig
from merganser.errors import ParameterError
from merganser.study.data import Examples, Split, load_examples
from merganser.study.networks import PixelEncoder, new_encoder
from merganser.study.words import LinearHead, Source, Task

#: Reads the examples of a split of a task: its name, what it is, the split, the folder of packed data sets.
Reader = Callable[[str, Task, Split, Path | None], Examples]


class Classifier(nn.Module):
    """An encoder of pictures with a linear layer behind it.

    Args:
        encoder: reads a tensor of pixels, shape (n, image, image, 3), values in [-1, 1].
        classes: how many.
    """

    def __init__(self, encoder: PixelEncoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (n, classes)."""
        y: Tensor = self.head(self.encoder(x))
        return y


class Learners:
    """Makes the learner of an agent; it can be sent to another process.

    Args:
        config: of the run.
        data: folder of packed data sets.
        read: reads examples; one that remembers them serves many runs.

    Raises:
        ParameterError: If a source or a network is unknown, is not of pictures, or has too few examples.
        RefError: If a data set is not there.
    """

    def __init__(self, config: RunConfig, data: Path | None = None, *, read: Reader = load_examples) -> None:
        self.config = config
        words = config.data
        sources = words.domains or {"data": words.source or {}}
        tasks = {name: Task(data=_source(name, node), head=LinearHead(kind="linear")) for name, node in sources.items()}

        def examples(name: str, split: Split) -> Examples:
            return _shrunk(name, _pictures(name, read(name, tasks[name], split, data)), words.shrink)

        train = {name: examples(name, "train") for name in tasks}
        test = [examples(name, "test") for name in tasks]
        named = {part.classes for part in (*train.values(), *test)}
        if len(named) > 1:
            raise ParameterError("the domains have other classes", f"{min(named)} and {max(named)}"[:300])
        self.classes = len(named.pop())
        self.seed = config.seed if words.seed is None else words.seed
        self.proxy: Tensor | None = None
        if words.proxy:
            train, shared = _set_aside(train, words.proxy, self.seed)
            self.proxy = torch.cat([_pixels(part) for part in shared])
        self.shards = self._shared_out(list(train.values()))
        self.test = _joined([_labelled(part) for part in test])
        if words.test is not None:
            order = np.random.default_rng([self.seed, 1]).permutation(len(self.test))[: words.test]
            self.test = Labelled(self.test.x[order], self.test.y[order])

    def _shared_out(self, train: list[Examples]) -> list[Labelled]:
        words, agents = self.config.data, self.config.agents
        if words.split == "domains":
            found = []
            for i in range(agents):
                examples, owners = train[i % len(train)], range(i % len(train), agents, len(train))
                parts = shared_out(examples.labels, len(owners), "iid", seed=self.seed, items=words.items)
                found.append(_labelled(examples.take(parts[owners.index(i)])))
        else:
            (examples,) = train
            parts = shared_out(
                examples.labels, agents, words.split, alpha=words.alpha, seed=self.seed, items=words.items
            )
            found = [_labelled(examples.take(part)) for part in parts]
        return [_joined(found)] if self.config.algorithm == "centralised" else found

    def __call__(self, agent: int) -> TorchLearner:
        """The learner of an agent, at its start."""
        config = self.config
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed * 1_000_003 + (0 if config.same_start else agent))
            encoder = new_encoder(config.network)
            if not isinstance(encoder, PixelEncoder):
                raise ParameterError(f"network {config.network.get('kind')} reads no pictures")
            network = Classifier(encoder, self.classes)
        if (size := tuple(self.test.x.shape[1:3])) != (encoder.image, encoder.image):
            raise ParameterError(
                f"pictures are {size[0]} x {size[1]}, and the network reads {encoder.image} x {encoder.image}",
                f"network: {{image: {size[0]}, ...}}",
            )
        match = config.merge.match
        return TorchLearner(
            network,
            self.shards[agent],
            self.test,
            agent=agent,
            seed=config.seed,
            batch=config.batch,
            optimizer=config.optimizer,
            augment=config.augment,
            images=match.images,
            proxy=self.proxy if match.data == "proxy" else None,
        )


def _source(name: str, node: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(Source).validate_python({"kind": "packed", **node})
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{key}: " for key in first["loc"])
        raise ParameterError(f"data {name}: {place}{first['msg']}") from None


def _pictures(name: str, examples: Examples) -> Examples:
    if isinstance(examples.items, tuple):
        raise ParameterError(f"{name} holds texts, and agents learn from pictures")
    return examples


def _shrunk(name: str, examples: Examples, side: int) -> Examples:
    """Every square of so many pixels a side as one pixel, their mean."""
    if side == 1:
        return examples
    assert not isinstance(examples.items, tuple)
    n, height, width, channels = examples.items.shape
    if height % side or width % side:
        raise ParameterError(f"data.shrink is {side}, and pictures of {name} are {height} x {width}")
    parts = examples.items.reshape(n, height // side, side, width // side, side, channels)
    items = np.rint(parts.mean((2, 4), dtype=np.float32)).astype(np.uint8)
    return Examples(items, examples.labels, examples.classes)


def _set_aside(train: dict[str, Examples], count: int, seed: int) -> tuple[dict[str, Examples], list[Examples]]:
    """Training examples without some that are shared, as many of every source, and those."""
    left, shared = {}, []
    for number, (name, examples) in enumerate(train.items()):
        part = count // len(train) + (number < count % len(train))
        if part >= len(examples):
            raise ParameterError(f"data.proxy sets {part} of the {len(examples)} examples of {name} aside")
        order = np.random.default_rng([seed, 2, number]).permutation(len(examples))
        shared.append(examples.take(order[:part]))
        left[name] = examples.take(np.sort(order[part:]))
    return left, shared


def _pixels(examples: Examples) -> Tensor:
    assert not isinstance(examples.items, tuple)
    return torch.from_numpy(np.ascontiguousarray(examples.items)).float() / 127.5 - 1


def _labelled(examples: Examples) -> Labelled:
    return Labelled(_pixels(examples), torch.from_numpy(examples.labels))


def _joined(parts: list[Labelled]) -> Labelled:
    return Labelled(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))

"""A learner for networks that classify: its own shard, its own optimizer, and no generator that outlives a batch.

Every draw is keyed by the seed, the agent and the number of the batch, so what a learner remembers of its randomness is
one number. Training always sets training mode, and the momentum of BatchNorm is the network's own after every
recalibration: evaluations leave no trace.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.renorm import reset_batch_norm
from merganser.decentral.learner import Memory, Tensors
from merganser.decentral.matching import NetworkAligner
from merganser.decentral.words import Augment, Optimizer
from merganser.errors import ParameterError
from merganser.symmetry import Orders
from merganser.symmetry.record import evaluating

#: Examples of a run that only evaluates.
EVALUATED = 500
#: Numbers of inputs of a run that compares units; in fewer, larger runs less is lost on the way, and more memory taken.
COMPARED = 1 << 19
#: Examples that statistics of BatchNorm are taken on, at most.
MEASURED = 500


@dataclass(frozen=True)
class Labelled:
    """Examples.

    Attributes:
        x: what the network takes in, shape (n, ...); pictures as (n, height, width, channels) if they are to be varied.
        y: class numbers, shape (n,).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


class TorchLearner:
    """A network with a shard of data.

    Args:
        network: inputs to logits, shape (n, classes); trained in place.
        train: the agent's own shard.
        test: what it is judged on.
        agent: its number; agents of one seed draw apart.
        seed: of order and augmentation.
        batch: examples a step; the batches of an epoch differ by at most one example.
        optimizer: how steps are taken.
        augment: how pictures are varied.
        images: how many inputs units are compared by.
        proxy: shared inputs to compare units by, instead of those of the shard.

    Raises:
        ParameterError: If there is no example, or pictures are to be varied and inputs are none.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Labelled,
        test: Labelled,
        *,
        agent: int = 0,
        seed: int = 0,
        batch: int = 100,
        optimizer: Optimizer | None = None,
        augment: Augment | None = None,
        images: int = 1000,
        proxy: Tensor | None = None,
    ) -> None:
        if not len(train) or not len(test):
            raise ParameterError(f"agent {agent} has {len(train)} examples to train on and {len(test)} to be judged by")
        self.network, self.shard, self.test = network, train, test
        self._key, self._batch = f"{seed}\0{agent}", batch
        self._words, self._augment = optimizer or Optimizer(), augment or Augment()
        if (self._augment.flip or self._augment.crop) and train.x.ndim != 4:
            raise ParameterError(f"flip and crop are for pictures, and inputs are of shape {tuple(train.x.shape[1:])}")
        self._images, self._proxy = images, proxy
        self._seen = 0  # batches
        self._optimizer = self._new_optimizer()
        self._aligner: NetworkAligner | None = None

    # the model

    def state(self) -> dict[str, Tensor]:
        """A copy of weights and buffers."""
        return {name: x.detach().clone() for name, x in self.network.state_dict().items()}

    def load(self, state: Tensors) -> None:
        """Take over weights and buffers."""
        self.network.load_state_dict(dict(state))

    # training

    def batches(self, epochs: float) -> int:
        """How many batches so many passes over its data are; at least 1 where epochs is above 0."""
        return max(1, round(epochs * self._an_epoch)) if epochs else 0

    def new_round(self) -> None:
        """Make the optimizer anew, unless it is kept."""
        if not self._words.keep:
            self._optimizer = self._new_optimizer()

    def train(self, batches: int) -> float:
        """Take so many steps from where it stands; the mean loss in nats, NaN for none."""
        self.network.train()
        summed = 0.0
        for _ in range(batches):
            epoch, place = divmod(self._seen, self._an_epoch)
            order = torch.randperm(len(self.shard), generator=self._generator("order", epoch))
            chosen = order.tensor_split(self._an_epoch)[place]
            x = varied(self.shard.x[chosen], self._augment, self._generator("picture", self._seen))
            with torch.random.fork_rng([]):
                torch.manual_seed(self._drawn("dropout", self._seen))  # dropout draws from the global generator
                loss = functional.cross_entropy(self._logits(x), self.shard.y[chosen])
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            summed += float(loss.detach())
            self._seen += 1
        return summed / batches if batches else math.nan

    def _logits(self, x: Tensor) -> Tensor:
        try:
            found: Tensor = self.network(x)
        except ValueError as error:
            if len(x) > 1:
                raise
            raise ParameterError(
                f"the network does not train on a batch of one example: {error}",
                "take larger batches, and agents with more examples",
            ) from error
        return found

    @property
    def _an_epoch(self) -> int:
        return math.ceil(len(self.shard) / self._batch)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if self._words.name == "adam":
            return torch.optim.Adam(parameters, lr=self._words.lr)
        return torch.optim.SGD(parameters, lr=self._words.lr, momentum=self._words.momentum)

    def _drawn(self, what: str, number: int) -> int:
        key = f"{self._key}\0{what}\0{number}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1

    def _generator(self, what: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._drawn(what, number))

    # judging

    def recalibrate(self) -> int:
        """Take statistics of BatchNorm again on up to `MEASURED` pictures of its own, not varied, always the same."""
        chosen = torch.randperm(len(self.shard), generator=self._generator("statistics", 0))[:MEASURED]
        parts = chosen.tensor_split(math.ceil(len(chosen) / self._batch))
        return reset_batch_norm(self.network, (((self.shard.x[part],), {}) for part in parts))

    def evaluate(self) -> dict[str, float]:
        """Accuracy in percent, and mean cross entropy in nats, on the test data."""
        right, loss = 0, 0.0
        with evaluating(self.network), torch.no_grad():
            for start in range(0, len(self.test), EVALUATED):
                y = self.test.y[start : start + EVALUATED]
                logits = self.network(self.test.x[start : start + EVALUATED])
                right += int((logits.argmax(1) == y).sum())
                loss += float(functional.cross_entropy(logits.double(), y, reduction="sum"))
        return {"accuracy": 100 * right / len(self.test), "loss": loss / len(self.test)}

    # memory

    def export(self) -> Memory:
        """The optimizer's state and the number of batches that were seen."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for number, entry in self._optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}.{key}"] = value.detach().clone()
                else:
                    plain[f"{number}.{key}"] = value
        return Memory(tensors, {"seen": self._seen, "optimizer": plain})

    def restore(self, memory: Memory) -> None:
        """Go on from where `export` was called."""
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**memory.tensors, **memory.content["optimizer"]}.items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value.clone() if isinstance(value, Tensor) else value
        self._optimizer = self._new_optimizer()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._seen = int(memory.content["seen"])

    # order of units

    def aligner(self) -> NetworkAligner:
        """What compares units, by pictures of the shard that are drawn once, or by the shared ones."""
        if self._aligner is None:
            x = self.shard.x[torch.randperm(len(self.shard), generator=self._generator("matching", 0))]
            x = (x if self._proxy is None else self._proxy)[: self._images]
            runs = math.ceil(x.numel() / COMPARED)
            size = max(1, len(x) // runs)
            batches = [x[start : start + size] for start in range(0, len(x) // size * size, size)]
            self._aligner = NetworkAligner(self.network, batches)
        return self._aligner

    def reorder(self, orders: Orders) -> None:
        """Put its units in another order, and what the optimizer remembers of them."""
        aligner = self.aligner()
        self.load(aligner.moved(orders, self.state()))
        spec = aligner.found.spec
        for name, parameter in self.network.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and spec.moves(name):
                    self._optimizer.state[parameter][key] = spec.apply(orders, name, value)


def varied(x: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Pictures moved by some pixels each way, the edges drawn out, and half of them mirrored.

    Args:
        x: shape (n, height, width, channels).
        augment: how.
        generator: what draws.
    """
    if not augment.crop and not augment.flip:
        return x
    n, height, width, _ = x.shape
    down, right = torch.randint(-augment.crop, augment.crop + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    if augment.flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    return x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]

"""Agents that are a few tensors: a learner with momentum and draws of its own, and its aligner by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merganser.align.costs import WeightCosts
from merganser.align.match import match
from merganser.decentral.distances import fixed_fraction
from merganser.decentral.learner import Match, Memory, Tensors
from merganser.decentral.words import RunConfig, read_config
from merganser.symmetry import Group, Orders, Spec

UNITS, INPUTS, OUTPUTS = 6, 4, 3
#: y = v relu(w x + b), with a running mean that is averaged like weights and a counter that is not.
SPEC = Spec(
    groups={"h": Group(UNITS)},
    axes={"w": ("h", INPUTS), "b": ("h",), "v": (OUTPUTS, "h"), "norm.running_mean": ("h",), "count": ()},
    roles={},
    pinned={},
)


def model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(UNITS, INPUTS, generator=generator),
        "b": torch.randn(UNITS, generator=generator),
        "v": torch.randn(OUTPUTS, UNITS, generator=generator),
        "norm.running_mean": torch.randn(UNITS, generator=generator),
        "count": torch.tensor(seed),
    }


def function(state: Tensors, x: Tensor) -> Tensor:
    return (x @ state["w"].T + state["b"]).relu() @ state["v"].T


class TinyAligner:
    """Matches units by weights."""

    def match(self, stays: Tensors, moves: Sequence[Tensors]) -> list[Match]:
        found = []
        for other in moves:
            orders = match(SPEC, WeightCosts(SPEC, dict(stays), dict(other))).orders
            found.append(Match(orders, {"h": fixed_fraction(orders["h"])}, {"h": 1.0}))
        return found

    def moved(self, orders: Orders, state: Tensors) -> dict[str, Tensor]:
        return {name: SPEC.apply(orders, name, x) for name, x in state.items()}


class TinyLearner:
    """Regresses on a teacher; draws are keyed by its seed and the number of the batch."""

    def __init__(self, seed: int, *, start: int | None = None, batches: int = 3, lr: float = 0.05) -> None:
        self.seed, self.lr, self.a_round = seed, lr, batches
        self.tensors = model(seed if start is None else start)
        self.teacher = model(10_000)
        self.momentum = {name: torch.zeros_like(self.tensors[name]) for name in "wbv"}
        self.seen = 0

    def state(self) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in self.tensors.items()}

    def load(self, state: Tensors) -> None:
        assert state.keys() == self.tensors.keys()
        self.tensors = {name: state[name].clone() for name in self.tensors}

    def batches(self, epochs: float) -> int:
        return max(1, round(epochs * self.a_round)) if epochs else 0

    def new_round(self) -> None:
        pass

    def train(self, batches: int) -> float:
        summed = 0.0
        for _ in range(batches):
            generator = torch.Generator().manual_seed(self.seed * 1000 + self.seen)
            x = torch.randn(8, INPUTS, generator=generator) + self.seed % 3
            leaves = {name: self.tensors[name].clone().requires_grad_() for name in "wbv"}
            loss = (function(leaves, x) - function(self.teacher, x)).square().mean()
            for name, slope in zip("wbv", torch.autograd.grad(loss, list(leaves.values())), strict=True):
                self.momentum[name] = 0.5 * self.momentum[name] + slope.clamp(-1, 1)
                self.tensors[name] = self.tensors[name] - self.lr * self.momentum[name]
            self.tensors["count"] = self.tensors["count"] + 1
            self.seen += 1
            summed += float(loss.detach())
        return summed / batches

    def recalibrate(self) -> int:
        return 0

    def evaluate(self) -> dict[str, float]:
        x = torch.randn(32, INPUTS, generator=torch.Generator().manual_seed(0))
        loss = float((function(self.tensors, x) - function(self.teacher, x)).square().mean())
        return {"accuracy": 100 / (1 + loss), "loss": loss}

    def export(self) -> Memory:
        return Memory({n: x.clone() for n, x in self.momentum.items()}, {"seen": self.seen})

    def restore(self, memory: Memory) -> None:
        self.momentum = {name: x.clone() for name, x in memory.tensors.items()}
        self.seen = memory.content["seen"]

    def aligner(self) -> TinyAligner:
        return TinyAligner()

    def reorder(self, orders: Orders) -> None:
        self.load(TinyAligner().moved(orders, self.tensors))
        self.momentum = {name: SPEC.apply(orders, name, x) for name, x in self.momentum.items()}


class Still(TinyLearner):
    """Trains nothing, and takes no statistics: what is left is the mixing."""

    def train(self, batches: int) -> float:
        return 0.0


def tiny_config(**changes: Any) -> RunConfig:
    """A run of five on a ring."""
    words: Mapping[str, Any] = {
        "agents": 5,
        "rounds": 3,
        "local_epochs": 1.0,
        "deadline_s": 5.0,
        "network": {},
        "data": {"source": {}},
        **changes,
    }
    return read_config(words)

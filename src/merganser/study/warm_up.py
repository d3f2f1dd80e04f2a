"""What agents learn alone before they first merge: trained once, kept, and the same bits for every method after it.

    ZOO/KEY/what.json                     what the warm-up was
    ZOO/KEY/agent-NUMBER/*.safetensors    weights and what the optimizer remembers, written whole or not at all

Training is determined by its configuration: an agent that takes its warm-up from there has the bits that it would have
trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from merganser.decentral import checkpoint
from merganser.decentral.learner import Learner, Memory
from merganser.decentral.torch_learner import Labelled
from merganser.decentral.words import RunConfig
from merganser.errors import StateError
from merganser.study.agents import Learners
from merganser.study.records import write_record

#: Keys of a configuration that what an agent learns alone depends on.
DECIDING = ("agents", "warmup_epochs", "optimizer", "augment", "batch", "seed", "same_start", "network", "data")


def deciding(config: RunConfig) -> dict[str, Any]:
    """What the warm-up of a run depends on, as JSON without what is left at its default.

    One agent with the data of all learns another thing.
    """
    words = config.model_dump(mode="json", include=set(DECIDING), exclude_defaults=True)
    return {**words, "centralised": config.algorithm == "centralised", "torch": torch.__version__}


def folder_of(config: RunConfig, zoo: Path) -> Path:
    """Where the warm-up of a run is kept."""
    key = hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()[:12]
    start = "one" if config.algorithm == "centralised" else "same" if config.same_start else "own"
    return zoo / f"seed-{config.seed}-{start}-{key}"


def warmed(config: RunConfig, learners: Learners, zoo: Path) -> Callable[[int], Learner]:
    """Makers of learners that take their warm-up from a folder where it is there, and keep it there where not.

    Args:
        config: of the run.
        learners: make an agent's learner, at its start.
        zoo: folder of all warm-ups.
    """
    if not config.warmup_epochs:
        return learners
    folder = folder_of(config, zoo)
    write_record(folder / "what.json", deciding(config))

    def make(agent: int) -> Learner:
        digest = digest_of(learners.shards[agent])
        return cast("Learner", _Warmed(learners(agent), folder / f"agent-{agent}", digest))

    return make


def seconds_of(folder: Path) -> float:
    """Seconds that the warm-up of all agents in a folder took when it was trained."""
    agents = sorted(path for path in folder.glob("agent-*") if checkpoint.numbers(path))
    return math.fsum(checkpoint.load(agent, 0).content["seconds"] for agent in agents)


def digest_of(shard: Labelled) -> str:
    """sha256 of an agent's examples."""
    return hashlib.sha256(shard.x.contiguous().numpy().tobytes() + shard.y.numpy().tobytes()).hexdigest()


class _Warmed:
    """A learner whose first training is its warm-up; everything else is the learner's own.

    Args:
        learner: at its start.
        folder: of its warm-up.
        digest: of its shard.
    """

    def __init__(self, learner: Learner, folder: Path, digest: str) -> None:
        self._learner, self._folder, self._digest = learner, folder, digest
        self._fresh = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def train(self, batches: int) -> float:
        """Take so many steps, or take over what they came to."""
        if not self._fresh:
            return self._learner.train(batches)
        self._fresh = False
        if checkpoint.numbers(self._folder):
            return self._taken(batches)
        began = time.perf_counter()
        loss = self._learner.train(batches)
        memory = self._learner.export()
        parts = {"model": self._learner.state(), "memory": memory.tensors}
        content = {
            "batches": batches,
            "digest": self._digest,
            "loss": loss if math.isfinite(loss) else None,
            "seconds": time.perf_counter() - began,
            "memory": memory.content,
        }
        tensors = {f"{part}/{name}": x for part, found in parts.items() for name, x in found.items()}
        checkpoint.save(self._folder, 0, checkpoint.Checkpoint(tensors, content))
        return loss

    def restore(self, memory: Memory) -> None:
        """Go on from later than its start."""
        self._fresh = False
        self._learner.restore(memory)

    def _taken(self, batches: int) -> float:
        kept = checkpoint.load(self._folder, 0)
        if (kept.content["batches"], kept.content["digest"]) != (batches, self._digest):
            raise StateError(f"{self._folder} holds what was learnt from other data", "name another folder with --zoo")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "memory": {}}
        for name, x in kept.tensors.items():
            part, _, inside = name.partition("/")
            parts[part][inside] = x
        self._learner.load(parts["model"])
        self._learner.restore(Memory(parts["memory"], dict(kept.content["memory"])))
        loss = kept.content["loss"]
        return math.nan if loss is None else float(loss)

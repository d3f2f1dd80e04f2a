"""Train one network on one task or several, so that an interrupted run goes on and gives the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merganser.errors import ParameterError, StateError
from merganser.study.data import Examples
from merganser.study.heads import HeadFunction
from merganser.study.networks import Encoder
from merganser.study.words import Training

Progress = Callable[[int, int], None]
WARM_UP = 0.05
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Lesson:
    """What a network learns from: examples and the fixed head of their task."""

    examples: Examples
    head: HeadFunction


@dataclass(frozen=True)
class Course:
    """A finished training: the mean loss of every epoch, and the seconds that it took, interruptions left out."""

    losses: list[float]
    seconds: float


def train(
    encoder: Encoder,
    lessons: Mapping[str, Lesson],
    training: Training,
    *,
    seed: int,
    keep: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Course:
    """Train in place, one pass over all lessons an epoch; every batch comes from one of them.

    Args:
        encoder: to train; left in evaluation mode.
        lessons: by name of the task.
        training: how.
        seed: of order and augmentation; epoch e of a run is the same whether or not the run was interrupted before it.
        keep: file that holds the run after every epoch; removed by whoever saves the result.
        device: where to train.
        progress: called as (steps done, steps in all).

    Returns:
        Losses and seconds; the global random generators are left as they were.

    Raises:
        ParameterError: If everything is frozen, or a pattern freezes nothing.
    """
    encoder.to(device)
    prepared = {name: encoder.prepare(lesson.examples.items) for name, lesson in lessons.items()}
    encoder.train()
    parameters = _trainable(encoder, training.freeze)
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
    steps_an_epoch = sum(len(batches(len(x), training.batch, 0, 0, 0)) for x in prepared.values())
    total = steps_an_epoch * training.epochs
    run = _fingerprint(lessons, training, seed)
    losses, spent = _resume(keep, run, encoder, optimizer, device)
    began = time.perf_counter() - spent
    for epoch in range(len(losses), training.epochs):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = [
            (name, places)
            for i, (name, items) in enumerate(prepared.items())
            for places in batches(len(items), training.batch, seed, epoch, i)
        ]
        summed = 0.0
        with torch.random.fork_rng([device] if device.startswith("cuda") else []):
            torch.manual_seed(seed * 100_003 + epoch)  # dropout draws from the global generator
            for step, place in enumerate(torch.randperm(len(order), generator=generator), epoch * steps_an_epoch):
                name, chosen = order[int(place)]
                items = [prepared[name][i] for i in chosen]
                if training.shift or training.flip:
                    items = augmented(items, training.shift, training.flip, generator)
                labels = torch.from_numpy(lessons[name].examples.labels[chosen]).to(device)
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * schedule(step, total)
                with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=training.bfloat16):
                    x = encoder.embed(items)
                loss = functional.cross_entropy(
                    lessons[name].head(x.float()), labels, label_smoothing=training.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
                optimizer.step()
                summed += float(loss.detach())
                if progress is not None:
                    progress(step + 1, total)
        losses.append(summed / steps_an_epoch)
        _remember(keep, run, encoder, optimizer, losses, time.perf_counter() - began)
    encoder.eval()
    return Course(losses, time.perf_counter() - began)


def batches(count: int, size: int, seed: int, epoch: int, lesson: int) -> list[list[int]]:
    """Places of the examples of every batch of an epoch, in random order; the last batch may be smaller."""
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) * 1_009 + lesson)
    order = torch.randperm(count, generator=generator).tolist()
    return [order[start : start + size] for start in range(0, count, size)]


def schedule(step: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to zero.

    >>> [round(schedule(step, 100), 3) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def augmented(items: list[Any], shift: int, flip: bool, generator: torch.Generator) -> list[Tensor]:
    """Pictures moved by up to `shift` pixels each way, the edges drawn out; half of them mirrored if `flip`."""
    if not (isinstance(items[0], Tensor | np.ndarray) and items[0].ndim == 3):
        raise ParameterError("shift and flip are for pictures, and the task has texts")
    x = torch.stack([torch.as_tensor(item) for item in items])
    n, height, width, _ = x.shape
    down, right = torch.randint(-shift, shift + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return list(x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].unbind())


def _trainable(encoder: Encoder, freeze: tuple[str, ...]) -> list[torch.nn.Parameter]:
    network = getattr(encoder, "model", encoder)
    names = [name for name, _ in network.named_parameters()]
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ParameterError(f"freeze {pattern} fits no tensor", f"tensors: {', '.join(names[:5])}, ...")
    kept = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in freeze))
        if parameter.requires_grad:
            kept.append(parameter)
    if not kept:
        raise ParameterError(f"freeze {', '.join(freeze)} leaves nothing to train")
    return kept


def _fingerprint(lessons: Mapping[str, Lesson], training: Training, seed: int) -> str:
    """What a kept run must have been begun with to be gone on with: settings, seed and examples."""
    digests = {name: lesson.examples.digest for name, lesson in lessons.items()}
    content = {"seed": seed, "training": training.model_dump(mode="json"), "examples": digests}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _remember(
    keep: Path, run: str, encoder: Encoder, optimizer: torch.optim.Optimizer, losses: list[float], seconds: float
) -> None:
    keep.parent.mkdir(parents=True, exist_ok=True)
    beside = keep.with_suffix(".new")
    content = {
        "run": run,
        "network": encoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "seconds": seconds,
    }
    torch.save(content, beside)
    os.replace(beside, keep)


def _resume(
    keep: Path, run: str, encoder: Encoder, optimizer: torch.optim.Optimizer, device: str
) -> tuple[list[float], float]:
    """Losses of the epochs that an earlier run with the same fingerprint finished, and the seconds that they took."""
    if not keep.is_file():
        return [], 0.0
    try:
        content = torch.load(keep, weights_only=True, map_location=device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StateError(f"{keep} is damaged: {error}", "remove it; the training then begins anew") from error
    if content.get("run") != run:
        return [], 0.0
    encoder.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    return list(content["losses"]), float(content["seconds"])

"""A zoo: the base and the experts of a study, trained from data, as ordinary checkpoint folders.

    ZOO/base                what all experts are tuned from (unless the study starts from a base that is there already)
    ZOO/experts/TASK        one expert a task

A folder that is there is done; what an interrupted run left unfinished goes on from its last epoch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints import open_source
from merganser.checkpoints.writer import RECEIPT_NAME, CheckpointWriter, write_json
from merganser.errors import ParameterError, StateError
from merganser.numerics import DTYPE_NAMES
from merganser.study.composing import Plan, zoo_of
from merganser.study.data import Examples, load_examples
from merganser.study.heads import make_head
from merganser.study.networks import Encoder, load_encoder, new_encoder, resolve
from merganser.study.training import Lesson, Progress, train
from merganser.study.words import Pretraining, Task, TaskPool, Training, Zoo
from merganser.types import TensorInfo
from merganser.version import __version__

#: Gives a progress callback for a piece of work of that name.
Bar = Callable[[str], AbstractContextManager[Progress | None]]


def base_of(zoo: Zoo, folder: Path) -> Path:
    """Where the base of a zoo is."""
    return Path(resolve(zoo.start)) if zoo.start is not None else folder / "base"


def missing(zoo: Zoo, tasks: TaskPool, folder: Path) -> list[str]:
    """What of a zoo is not there yet."""
    wanted = {"base": base_of(zoo, folder)} | {task: folder / "experts" / task for task in tasks.tasks}
    return [name for name, place in wanted.items() if not (place / "config.json").is_file()]


def train_needed(plan: Plan, *, data: Path | None, device: str, bar: Bar, extra: Path | None = None) -> None:
    """Train what a study needs and its zoo lacks; nothing where the pool has no zoo.

    Raises:
        MerganserError: As for `train_zoo`.
    """
    if plan.models.zoo is None:
        return
    zoo, tasks = zoo_of(plan.models.zoo, extra=extra)
    wanted = tasks.model_copy(update={"tasks": {n: t for n, t in tasks.tasks.items() if n in plan.models.models}})
    if plan.models.zoo_folder is None:
        raise ParameterError(f"modelpool {plan.models.name} names a zoo and no zoo_folder")
    folder = Path(plan.models.zoo_folder)
    if missing(zoo, wanted, folder):
        train_zoo(zoo, tasks, folder, data=data, device=device, bar=bar, only=list(wanted.tasks))


def train_zoo(
    zoo: Zoo,
    tasks: TaskPool,
    folder: Path,
    *,
    data: Path | None,
    seed: int = 0,
    device: str = "cpu",
    bar: Bar,
    only: Sequence[str] | None = None,
) -> None:
    """Train what is not there yet.

    Args:
        zoo: how.
        tasks: one expert each.
        folder: of the zoo.
        data: folder of packed data sets.
        seed: of weights, order and augmentation.
        device: where to train.
        bar: for the progress of one model.
        only: experts of these tasks; by default of all.

    Raises:
        StateError: If the folder holds another zoo.
        MerganserError: If data are missing, or tasks and network do not fit.
    """
    for task in zoo.changes:
        if task not in tasks.tasks:
            near = get_close_matches(task, tasks.tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its tasks: {', '.join(tasks.tasks)}"
            raise ParameterError(f"zoo {zoo.name} changes {task}, which is no task of {tasks.name}", hint)
    making = _Making(zoo, tasks, folder, data, seed, device, bar)
    making.check_claim()
    if zoo.pretraining is not None and not (folder / "base" / "config.json").is_file():
        making.base(zoo.pretraining)
    for name in only if only is not None else tasks.tasks:
        if not (folder / "experts" / name / "config.json").is_file():
            making.expert(name)


@dataclass(frozen=True)
class _Making:
    """What `train_zoo` was asked for."""

    zoo: Zoo
    tasks: TaskPool
    folder: Path
    data: Path | None
    seed: int
    device: str
    bar: Bar

    def _content(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.zoo.model_dump(mode="json"), "tasks": self.tasks.model_dump(mode="json")}

    def check_claim(self) -> None:
        """Refuse to mix two zoos."""
        path, content = self.folder / "zoo.json", self._content()
        try:
            known = json.loads(path.read_text("utf-8")) if path.is_file() else content
            changed = [key for key in content if known.get(key) != content[key]]
        except (ValueError, AttributeError) as error:
            raise StateError(
                f"{path} is damaged: {error}", "remove it if the models beside it are this zoo's"
            ) from error
        if changed:
            raise StateError(
                f"{self.folder} holds a zoo with other {', '.join(changed)}", "name another folder with --zoo"
            )

    def _claim(self) -> None:
        """Write down what this zoo is, when all that can be checked before training has been."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / ".zoo.json.new"
        write_json(beside, self._content())
        os.replace(beside, self.folder / "zoo.json")

    def base(self, pretraining: Pretraining) -> None:
        """Make the base from its own tasks and a little of the pool's."""
        assert self.zoo.network is not None
        training = pretraining.training
        lessons = {name: self._lesson(name, task, training.items) for name, task in pretraining.tasks.items()}
        for name in pretraining.little:
            if name not in self.tasks.tasks:
                raise ParameterError(
                    f"zoo {self.zoo.name} wants a little of {name}, which is no task of {self.tasks.name}",
                    f"its tasks: {', '.join(self.tasks.tasks)}",
                )
            lessons[f"little {name}"] = self._lesson(name, self.tasks.tasks[name], pretraining.little_items)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            encoder = new_encoder(self.zoo.network)
        self._make(encoder, lessons, training, self.folder / "base", None)

    def expert(self, name: str) -> None:
        """Tune the base on one task."""
        base, training = base_of(self.zoo, self.folder), self.zoo.finetuning_of(name)
        lesson = self._lesson(name, self.tasks.tasks[name], training.items)
        self._make(load_encoder(base), {name: lesson}, training, self.folder / "experts" / name, base)

    def _lesson(self, name: str, task: Task, items: int | None) -> Lesson:
        examples = load_examples(name, task, "train", self.data)
        if items is not None:
            examples = examples.first(items)
        return Lesson(examples, make_head(name, task, examples.classes))

    def _make(
        self, encoder: Encoder, lessons: Mapping[str, Lesson], training: Training, target: Path, base: Path | None
    ) -> None:
        for name, lesson in lessons.items():
            _check_head(name, encoder, lesson)
        self._claim()
        keep = target.parent / f".training-{target.name}" / "run.pt"
        with self.bar(target.name) as progress:
            course = train(encoder, lessons, training, seed=self.seed, keep=keep, device=self.device, progress=progress)
        receipt = {
            "merganser": __version__,
            "torch": torch.__version__,
            "seed": self.seed,
            "training": training.model_dump(mode="json"),
            "tasks": {name: _described(lesson.examples) for name, lesson in lessons.items()},
            "losses": [round(loss, 6) for loss in course.losses],
            "wall_s": round(course.seconds, 1),
        }
        save_encoder(encoder, target, receipt, base)
        shutil.rmtree(keep.parent)


def _check_head(name: str, encoder: Encoder, lesson: Lesson) -> None:
    encoder.prepare(lesson.examples.first(1).items)  # pictures and texts first, then widths
    try:
        logits = lesson.head(torch.zeros(1, encoder.width))
    except RuntimeError as error:
        raise ParameterError(
            f"the head of {name} does not take embeddings of width {encoder.width}: {error}"
        ) from error
    if logits.shape[1] < len(lesson.examples.classes):
        raise ParameterError(f"{name} has {len(lesson.examples.classes)} classes, and its head {logits.shape[1]}")


def _described(examples: Examples) -> dict[str, Any]:
    return {"n": len(examples), "classes": len(examples.classes), "digest": examples.digest}


def save_encoder(encoder: Encoder, target: Path, receipt: Mapping[str, Any], base: Path | None) -> None:
    """Write a network as a checkpoint folder; what only the base has (tensors, tokenizer) is taken from there."""
    network = getattr(encoder, "model", encoder)
    tensors = {n: x.detach().cpu() for n, x in network.state_dict().items()}
    companions: list[Path] = []
    if base is not None:
        source = open_source(base)
        tensors |= {n: source.read(n) for n in source.infos if n not in tensors}
        companions = [p for p in source.companions() if p.name not in ("config.json", RECEIPT_NAME)]
    infos = {n: TensorInfo(tuple(x.shape), DTYPE_NAMES[x.dtype]) for n, x in tensors.items()}
    with CheckpointWriter(target, infos) as writer:
        for name, x in tensors.items():
            writer.put(name, x)
        config = json.dumps(encoder.config(), indent=2) + "\n"
        (writer.folder / "config.json").write_text(config, "utf-8")
        writer.commit(receipt, companions)

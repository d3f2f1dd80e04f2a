"""Train in processes that kill themselves: `python dying_training.py train|zoo FOLDER MOMENT...`.

A moment is NAME:STEP, after that step of the model of that name, or NAME:replace-N, before the N-th epoch is kept. Each
one gets a fork of this process, which works in FOLDER/MOMENT. Prints the statuses; -9 is a kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from small_data import bar_task

from merganser.study.data import load_examples
from merganser.study.heads import make_head
from merganser.study.networks import new_encoder
from merganser.study.training import Lesson, Progress, train
from merganser.study.words import TaskPool, Training, Zoo
from merganser.study.zoo import train_zoo

NETWORK = {"kind": "mlp", "image": 4, "hidden": 8, "depth": 1, "width": 6}
#: Two lessons of 16 and 20 examples make 2 + 3 steps an epoch.
TRAINING = Training(epochs=3, lr=0.01, batch=8, shift=1, flip=True, label_smoothing=0.1)


def trained(folder: Path, progress: Progress | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The tensors and losses of a network trained on two tasks, kept in `folder`/run.pt."""
    tasks = {name: bar_task(folder, name, train=n, seed=n) for name, n in (("one", 17), ("two", 22))}
    examples = {name: load_examples(name, task, "train", folder) for name, task in tasks.items()}
    lessons = {name: Lesson(x, make_head(name, tasks[name], x.classes)) for name, x in examples.items()}
    torch.manual_seed(5)
    encoder = new_encoder(NETWORK)
    course = train(encoder, lessons, TRAINING, seed=7, keep=folder / "run.pt", progress=progress)
    return encoder.state_dict(), course.losses


def zoo_and_tasks(folder: Path) -> tuple[Zoo, TaskPool]:
    """A zoo of two experts over a base that learns a third task and a few examples of one of theirs."""
    one, two, wide = (
        bar_task(folder / "data", name, train=n, seed=n) for name, n in (("one", 18), ("two", 22), ("w", 30))
    )
    training = {"epochs": 2, "lr": 0.01, "batch": 8}
    pretraining = {"tasks": {"wide": wide}, "little": ["two"], "little_items": 4, "training": training}
    zoo = {"name": "bars", "taskpool": "bars", "network": NETWORK, "pretraining": pretraining, "finetuning": training}
    return Zoo.model_validate(zoo), TaskPool(name="bars", tasks={"one": one, "two": two})


@contextlib.contextmanager
def silent(name: str) -> Iterator[None]:
    """A bar that nobody sees."""
    yield None


Bar = Callable[[str], contextlib.AbstractContextManager[Progress | None]]


def make_zoo(folder: Path, bar: Bar = silent) -> Path:
    """Train the zoo in `folder`/zoo, from data in `folder`/data."""
    zoo, tasks = zoo_and_tasks(folder)
    train_zoo(zoo, tasks, folder / "zoo", data=folder / "data", seed=1, bar=bar)
    return folder / "zoo"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(what: str, folder: Path, moment: str) -> None:
    name, _, when = moment.partition(":")
    current, kept, replace = "", 0, os.replace

    def progress(done: int, total: int) -> None:
        if current == name and when == str(done):
            die()

    def replaced(source: str, target: str) -> None:
        nonlocal kept
        kept += current == name
        if when == f"replace-{kept}":
            die()
        replace(source, target)

    @contextlib.contextmanager
    def bar(model: str) -> Iterator[Progress]:
        nonlocal current
        current = model
        yield progress

    os.replace = replaced  # type: ignore[assignment]
    if what == "zoo":
        make_zoo(folder, bar)
    else:
        current = "train"
        trained(folder, progress)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports much, once for all forks
    what, root, moments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    statuses = []
    for moment in moments:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(what, root / moment.replace(":", "-"), moment)
                code = 0
            finally:
                os._exit(code)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(*statuses)

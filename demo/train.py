"""Where the nine checkpoints come from: one base and eight fine-tunes, trained once and kept in demo/work.

The base sees all plain digits and, as a web-scale model would, a handful of each task (15 images); that is what lifts
its zero-shot accuracy above chance. Every expert starts from the base and sees its own task alone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from model import DigitReader, Sizes, load, save
from tasks import TASKS, Split, plain_digits, seen_by
from torch.nn import functional


@dataclass(frozen=True)
class Training:
    """Everything that decides the trained weights; its hash names them."""

    sizes: Sizes = field(default_factory=Sizes)
    handful: int = 15
    base_epochs: int = 30
    base_rate: float = 2e-3
    expert_epochs: int = 12
    expert_rate: float = 5e-4
    batch: int = 64
    weight_decay: float = 0.01

    @property
    def key(self) -> str:
        """Hash of the settings and of the three files that give them their meaning."""
        here = Path(__file__).parent
        sources = [(here / name).read_text() for name in ("tasks.py", "model.py", "train.py")]
        return hashlib.sha256(json.dumps([asdict(self), *sources]).encode()).hexdigest()[:16]


def is_trained(folder: Path, key: str) -> bool:
    """Whether `folder` holds a checkpoint of exactly these settings."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("training") == key


def fit(model: DigitReader, data: Split, *, epochs: int, rate: float, training: Training, seed: int) -> None:
    """AdamW under a one-cycle rate; the same seed gives the same bits on one thread."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=training.weight_decay)
    steps = epochs * -(-len(data.digits) // training.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.digits), generator=generator).split(training.batch):
            loss = functional.cross_entropy(model(data.images[rows]), data.digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def train_base(folder: Path, training: Training) -> str:
    """Pre-train on plain digits plus a handful of every task; returns "base"."""
    plain, _ = plain_digits()
    parts = [plain]
    for i, task in enumerate(TASKS):
        rows = torch.randperm(len(plain.digits), generator=torch.Generator().manual_seed(i))[: training.handful]
        parts.append(seen_by(task, Split(plain.images[rows], plain.digits[rows])))
    mixture = Split(torch.cat([p.images for p in parts]), torch.cat([p.digits for p in parts]))
    torch.manual_seed(0)
    model = DigitReader(training.sizes)
    fit(model, mixture, epochs=training.base_epochs, rate=training.base_rate, training=training, seed=0)
    save(model, folder, training=training.key)
    return "base"


def train_expert(base: Path, folder: Path, task: str, training: Training) -> str:
    """Fine-tune the base on one task; returns the task's name."""
    model = load(base).train()
    data = seen_by(task, plain_digits()[0])
    seed = 1 + TASKS.index(task)
    fit(model, data, epochs=training.expert_epochs, rate=training.expert_rate, training=training, seed=seed)
    save(model, folder, training=training.key)
    return task


def train_missing(work: Path, training: Training, tell: Callable[[str], None]) -> int:
    """Train what `work` does not hold yet, two at a time; returns how many experts were reused."""
    base = work / "base"
    if not is_trained(base, training.key):
        tell("pre-training the base")
        list(_in_processes(train_base, [(base, training)]))
    missing = [task for task in TASKS if not is_trained(work / "experts" / task, training.key)]
    for task in _in_processes(train_expert, [(base, work / "experts" / task, task, training) for task in missing]):
        tell(f"trained the expert of {task}")
    return len(TASKS) - len(missing)


def _in_processes(function: Callable[..., str], jobs: Sequence[tuple[object, ...]]) -> Iterator[str]:
    """Results as they come, from two processes of one thread each; leaving early ends the processes."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, len(jobs)), mp_context=context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered once, by the parent
    torch.set_num_threads(1)

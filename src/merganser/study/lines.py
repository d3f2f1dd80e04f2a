"""Run a study of lines: two networks learn one task from two seeds, and are judged on the straight line between them.

    OUT/study.json                      what is shared by all; networks, pairs and rules may come later
    OUT/pairs/NETWORK/seeds-S-T.json    one entry a rule, as they come: losses and accuracies along the line
    ZOO/NETWORK/seed-S                  the trained networks, ordinary checkpoint folders

Killed at any moment, the same command goes on: a line that is written down is not measured again. A network answers
with one number a class. BatchNorm's statistics are measured anew at every place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from merganser.align.activations import Batch
from merganser.align.barrier import loss_line
from merganser.errors import StateError
from merganser.study.apart import Album, Work, trained
from merganser.study.networks import Encoder
from merganser.study.records import claim, read_record, write_record
from merganser.study.rules import Bench
from merganser.study.training import Lesson
from merganser.study.words_apart import LineRule, LinesNetwork, LinesNode
from merganser.symmetry import Orders
from merganser.version import __version__

ORDERS: dict[LineRule, Callable[[Bench], Orders]] = {
    "naive": lambda bench: bench.spec.identity(),
    "weights": lambda bench: bench.by_weights,
    "activations": lambda bench: bench.by_activations,
}
LABELS: dict[LineRule, str] = {
    "naive": "as they are",
    "weights": "aligned by weights (Git Re-Basin)",
    "activations": "aligned by activations",
}


@dataclass
class Lines:
    """A study of lines at work.

    Attributes:
        node: what is compared.
        work: where and how.
        written: called after every pair.
    """

    node: LinesNode
    work: Work
    written: Callable[[], object] = lambda: None
    album: Album = field(init=False)

    def __post_init__(self) -> None:
        self.album = Album(self.node.name, self.node.data, self.node.pictures, self.work.data)

    def run(self) -> None:
        """Do all that is not done yet.

        Raises:
            StateError: If a folder holds another study or other networks.
            MerganserError: If data or networks cannot be used.
        """
        claim(self.work.out, self.node.model_dump(mode="json", include={"kind", "data", "points", "pictures"}))
        for name, network in self.node.networks.items():
            for seeds in network.pairs:
                if self._pair(name, network, seeds):
                    self.written()

    def _pair(self, name: str, node: LinesNetwork, seeds: tuple[int, int]) -> bool:
        """One pair; whether there was something to do."""
        path = pair_path(self.work.out, name, seeds)
        what = {"network": node.network, "training": node.training.model_dump(mode="json"), "seeds": list(seeds)}
        record = read_record(path) if path.is_file() else {}
        if record and any(record.get(key) != value for key, value in what.items()):
            raise StateError(f"{path} was measured on another network", "give the network another name, or remove it")
        todo = [rule for rule in self.node.rules if rule not in record.get("rules", {})]
        if not todo:
            return False
        if not record:
            record = {"merganser": __version__, "torch": torch.__version__, **what, "rules": {}}
        inputs = self.album.compare, self.album.measure  # refused, if there is too little, before anything is trained
        one, two = (self._network(name, node, seed) for seed in seeds)
        bench = Bench(one, two, *inputs)
        reset = bench.statistics != "REPAIR"
        labelled: list[tuple[Batch, Tensor]] = [(((x,), {}), y) for x, y in self.album.pages]
        with self.work.bar(f"{name}, seeds {seeds[0]} and {seeds[1]}") as progress:
            for done, rule in enumerate(todo, 1):
                began = time.perf_counter()
                orders = ORDERS[rule](bench)
                seconds = time.perf_counter() - began
                line = loss_line(
                    bench.one,
                    bench.a,
                    bench.ordered(orders),
                    labelled,
                    points=self.node.points,
                    reset=reset,
                    measured=self.album.measure,
                )
                height, place = line.barrier
                record["rules"][rule] = {
                    "places": list(line.places),
                    "losses": list(line.losses),
                    "accuracies": list(line.accuracies),
                    "n": line.items,
                    "digest": self.album.test.digest,
                    "barrier": height,
                    "at": place,
                    "statistics": bench.statistics if reset else "none",
                    "pictures": bench.looked_at(
                        *(["compare"] if rule == "activations" else []), *(["measure"] if reset else [])
                    ),
                    "labels": False,
                    "wall_s": round(seconds, 2),
                }
                write_record(path, record)
                if progress is not None:
                    progress(done, len(todo))
        return True

    def _network(self, name: str, node: LinesNetwork, seed: int) -> Encoder:
        """Trained if need be."""
        classes = len(self.album.test.classes)

        def lesson() -> Lesson:
            examples = self.album.train
            return Lesson(examples if node.training.items is None else examples.first(node.training.items), _as_it_is)

        return trained(
            self.work.zoo / name / f"seed-{seed}",
            {**node.network, "width": classes},
            node.training,
            lesson,
            seed=seed,
            learns={"data": self.node.data.model_dump(mode="json"), "classes": list(range(classes))},
            work=self.work,
        )


def _as_it_is(x: Tensor) -> Tensor:
    """A head of classes: the network's answers are logits."""
    return x


def pair_path(out: Path, network: str, seeds: tuple[int, int]) -> Path:
    """Where the record of a pair is."""
    return out / "pairs" / network / f"seeds-{seeds[0]}-{seeds[1]}.json"

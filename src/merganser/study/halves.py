"""Run a study of halves: two networks learn a half of the classes each, one is made of both, by every rule.

    OUT/study.json                      what is shared by all; networks, splits and rules may come later
    OUT/pairs/NETWORK/split-S.json      both networks alone, then one entry a rule, as they come
    OUT/surface.json                    two losses on the plane through one pair and what was made of it
    ZOO/NETWORK/split-S-a, -b           the trained networks, ordinary checkpoint folders

Killed at any moment, the same command goes on: a rule that is written down is not measured again.

Joint: the right one of all classes. Task: the right one of a half, for pictures of that half. One network answers with
the cosines of its output with the codes of the classes; several answer each for its half, by a softmax within it.

A study of domains is the same with all classes on both sides, and a domain of pictures on each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import Batch
from merganser.align.barrier import mean_loss
from merganser.align.costs import WeightCosts
from merganser.align.match import match
from merganser.align.renorm import reset_batch_norm
from merganser.align.surface import surface
from merganser.errors import ParameterError, StateError
from merganser.study.apart import Album, Work, pages_of, state_of, trained
from merganser.study.data import Examples
from merganser.study.domains import Domains
from merganser.study.judge import Score
from merganser.study.networks import Encoder
from merganser.study.records import claim, read_record, write_record
from merganser.study.rules import Bench, embeddings, merge
from merganser.study.training import Lesson
from merganser.study.words_apart import Codes, DomainsNode, HalvesNetwork, HalvesNode
from merganser.version import __version__

SIDES = ("a", "b")


@dataclass
class Halves:
    """A study of halves at work.

    Attributes:
        node: what is compared.
        work: where and how.
        written: called after every pair.
    """

    node: HalvesNode
    work: Work
    written: Callable[[], object] = lambda: None
    albums: dict[int, Album] = field(init=False, default_factory=dict)

    def album(self, split: int) -> Album:
        """The pictures of a split; halves of classes share theirs."""
        node = self.node
        how = node.pictures, self.work.data, node.seen
        if isinstance(node, DomainsNode):
            pair = node.pairs[split % len(node.pairs)]
            return self.albums.setdefault(split, Domains(node.name, node.data, *how, pair))
        return self.albums.setdefault(0, Album(node.name, node.data, *how))

    def split_of(self, split: int) -> Split:
        """What a split divides, and its codes."""
        both = isinstance(self.node, DomainsNode)
        return split_by(split, len(self.album(split).test.classes), self.node.codes, domains=both)

    def run(self) -> None:
        """Do all that is not done yet.

        Raises:
            StateError: If a folder holds another study or other networks.
            MerganserError: If data or networks cannot be used.
        """
        keys = {"kind", "data", "codes", "balances", "zipping", "pictures", "pairs"} & set(type(self.node).model_fields)
        shared = self.node.model_dump(mode="json", include=keys)
        if self.node.seen is not None:
            shared["seen"] = self.node.seen.model_dump(mode="json")
        claim(self.work.out, {**shared, "bfloat16": self.work.bfloat16})
        for name, network in self.node.networks.items():
            for split in network.splits:
                if self._pair(name, network, split):
                    self.written()
        self._surface()

    def _pair(self, name: str, node: HalvesNetwork, split: int) -> bool:
        """One pair; whether there was something to do."""
        path = pair_path(self.work.out, name, split)
        what = {"network": node.network, "training": node.training.model_dump(mode="json"), "split": split}
        record = read_record(path) if path.is_file() else {}
        if record and any(record.get(key) != value for key, value in what.items()):
            raise StateError(f"{path} was measured on another network", "give the network another name, or remove it")
        rules = node.rules or self.node.rules
        todo = [rule for rule in rules if rule not in record.get("rules", {})]
        if not todo:
            return False
        album = self.album(split)
        inputs = self._inputs(album, choosing=bool({"dual", "dual_zip"} & set(todo)))
        both, split_of = self._networks(name, node, split)
        bench = self._bench(both, split_of, inputs)
        if not record:
            record = {"merganser": __version__, "torch": torch.__version__, **what}
            record |= {"classes": [[album.test.classes[i] for i in half] for half in split_of.halves.values()]}
            record["alone"] = {s: self._score([n], split_of, album) for s, n in zip(SIDES, both, strict=True)}
            record["rules"] = {}
            write_record(path, record)
        with self.work.bar(f"{name}, split {split}") as progress:
            for done, rule in enumerate(todo, 1):
                began = time.perf_counter()
                merged = merge(rule, bench)
                seconds = time.perf_counter() - began
                record["rules"][rule] = {
                    **self._score(merged.networks, split_of, album),
                    "statistics": merged.statistics,
                    "pictures": merged.pictures,
                    "labels": False,
                    "balance": merged.balance,
                    "distances": {str(x): round(far, 6) for x, far in merged.distances.items()},
                    **({} if merged.size is None else {"size": [round(x, 4) for x in merged.size]}),
                    "wall_s": round(seconds, 2),
                }
                write_record(path, record)
                if progress is not None:
                    progress(done, len(todo))
        return True

    def _networks(self, name: str, node: HalvesNetwork, split: int) -> tuple[list[Encoder], Split]:
        """Both networks, trained if need be, and what they were split by."""
        split_of, album = self.split_of(split), self.album(split)
        made = []
        for i, side in enumerate(SIDES):
            half = split_of.halves[side]

            def lesson(side: str = side, half: list[int] = half) -> Lesson:
                return lesson_of(album.own_train(side), half, split_of, node.training.items)

            made.append(
                trained(
                    self.work.zoo / name / f"split-{split}-{side}",
                    {**node.network, "width": self.node.codes.width},
                    node.training,
                    lesson,
                    seed=2 * split + i,
                    learns={
                        **album.learnt(side),
                        "classes": half,
                        "codes": {**self.node.codes.model_dump(mode="json"), "seed": split},
                    },
                    work=self.work,
                )
            )
        return made, split_of

    def _inputs(self, album: Album, *, choosing: bool) -> tuple[list[Batch], list[Batch], list[Batch]]:
        """What rules look at, before anything is trained: refused if there is too little of it."""
        return album.compare, album.measure, album.held_out if choosing else []

    def _bench(self, both: Sequence[Encoder], split_of: Split, inputs: tuple[list[Batch], ...]) -> Bench:
        (one, two), node = both, self.node
        compare, measure, held_out = inputs
        return Bench(
            one, two, compare, measure, held_out, split_of.logits, node.balances, node.zipping, split_of.together
        )

    def _score(self, networks: Sequence[nn.Module], split_of: Split, album: Album) -> dict[str, Any]:
        batches = [x for x, _ in album.pages]
        found = [split_of.logits(embeddings(n, batches, bfloat16=self.work.bfloat16)) for n in networks]
        return scores(found, album.test, split_of, album.own_test)

    def _surface(self) -> None:
        """The plane of one pair; what was joined by both is brought into the first one's order, as the second is."""
        node, path = self.node.surface, self.work.out / "surface.json"
        if node is None or (path.is_file() and read_record(path).get("plane") == node.model_dump(mode="json")):
            return
        both, split_of = self._networks(node.network, self.node.networks[node.network], node.split)
        album = self.album(node.split)
        bench = self._bench(both, split_of, self._inputs(album, choosing=False))
        known = read_record(pair_path(self.work.out, node.network, node.split))["rules"].get("dual_zip")
        merged = state_of(bench.zipped(0.0 if known is None else known["balance"]))
        orders = match(bench.spec, WeightCosts(bench.spec, bench.a, merged)).orders
        merged = {n: bench.spec.apply(orders, n, x) if n in bench.spec.axes else x for n, x in merged.items()}
        some = measured_for(album.measure, node.measure)
        test, batch = album.test.first(node.test), self.node.pictures.batch
        labelled = [_labelled(own_half(test, half), batch) for half in split_of.halves.values()]
        codes = [split_of.codes[half] for half in split_of.halves.values()]

        def judge(network: nn.Module) -> tuple[float, ...]:
            reset_batch_norm(network, some)
            heads = [Headed(network, c, self.node.codes.scale) for c in codes]
            return tuple(mean_loss(head, own)[0] for head, own in zip(heads, labelled, strict=True))

        corners = (bench.a, bench.ordered(bench.by_activations), merged)
        with self.work.bar("surface") as progress:
            found = surface(bench.one, corners, judge, points=node.points, margin=node.margin, progress=progress)
        counts = [sum(len(y) for _, y in own) for own in labelled]
        write_record(path, {"plane": node.model_dump(mode="json"), "n": counts, **asdict(found)})
        self.written()


@dataclass(frozen=True)
class Split:
    """Two halves of the classes, and the codes of all.

    Attributes:
        halves: numbers of the classes of either side.
        codes: orthonormal rows, shape (classes, width).
        scale: of the cosines.
    """

    halves: dict[str, list[int]]
    codes: Tensor
    scale: float

    def logits(self, x: Tensor) -> Tensor:
        """Of embeddings, over all classes."""
        return self.scale * functional.normalize(x, dim=1) @ self.codes.T

    def answer(self, logits: Sequence[Tensor]) -> Tensor:
        """Probabilities over all classes from one network a side, each for the classes that it learnt."""
        answers = torch.zeros_like(logits[0])
        for own, half in zip(logits, self.halves.values(), strict=True):
            answers[:, half] += functional.softmax(own[:, half], 1)
        return answers

    def together(self, one: Tensor, two: Tensor) -> Tensor:
        """The embedding whose products with the codes are the probabilities that both networks' give, halved."""
        return self.answer([self.logits(x.to(self.codes)) for x in (one, two)]) / 2 @ self.codes


class Headed(nn.Module):
    """A network with codes of some classes: pictures to logits."""

    def __init__(self, network: nn.Module, codes: Tensor, scale: float) -> None:
        super().__init__()
        self.network, self.codes, self.scale = network, codes, scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (n, classes)."""
        return self.scale * functional.normalize(self.network(x), dim=1) @ self.codes.T


def split_by(seed: int, classes: int, codes: Codes, *, domains: bool = False) -> Split:
    """Halves and codes of a seed; with domains both sides have all classes.

    Raises:
        ParameterError: If there are fewer than four classes, or more than a code is wide.
    """
    if not 4 <= classes <= codes.width:
        raise ParameterError(f"there are {classes} classes; halves take 4 to {codes.width}, the width of a code")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(classes, generator=generator).tolist()
    rows = torch.linalg.qr(torch.randn(codes.width, classes, generator=generator)).Q.T
    cut = classes // 2
    if domains:
        return Split({side: list(range(classes)) for side in SIDES}, rows.contiguous(), codes.scale)
    return Split({"a": sorted(order[:cut]), "b": sorted(order[cut:])}, rows.contiguous(), codes.scale)


def lesson_of(examples: Examples, half: list[int], split_of: Split, items: int | None) -> Lesson:
    """The pictures of a half, and the head of its classes."""
    own = own_half(examples, half)
    codes = split_of.codes[half]

    def head(x: Tensor) -> Tensor:
        return split_of.scale * functional.normalize(x, dim=1) @ codes.to(x.device).T

    return Lesson(own if items is None else own.first(items), head)


def own_half(examples: Examples, half: list[int]) -> Examples:
    """The pictures of some classes, labelled by places among these."""
    own = examples.take(np.flatnonzero(np.isin(examples.labels, half)))
    labels = np.searchsorted(half, own.labels).astype(np.int64)
    return Examples(own.items, labels, tuple(examples.classes[i] for i in half))


def scores(
    logits: Sequence[Tensor], test: Examples, split_of: Split, own: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Joint and task accuracies of one network, or of one a side, for JSON.

    Args:
        logits: of all classes, by each network.
        test: pictures that they are of.
        split_of: what the sides learnt.
        own: by side, which pictures are its own; by default those of its classes.
    """
    labels = torch.from_numpy(test.labels)
    answers = logits[0] if len(logits) == 1 else split_of.answer(logits)
    found: dict[str, Any] = {"joint": _score(answers.argmax(1) == labels, test.digest).record()}
    for side, half in split_of.halves.items():
        chosen = torch.isin(labels, torch.tensor(half)) if own is None else own[side]
        right = torch.tensor(half)[answers[chosen][:, half].argmax(1)] == labels[chosen]
        found[f"task_{side}"] = _score(right, test.digest).record()
    found["per_task"] = (found["task_a"]["value"] + found["task_b"]["value"]) / 2
    return found


def _score(right: Tensor, digest: str) -> Score:
    if not len(right):
        raise ParameterError("a half has no test picture", "take more: pictures.test")
    value = float(right.double().mean())
    return Score(100 * value, len(right), 100 * math.sqrt(value * (1 - value) / len(right)), "%", digest)


def _labelled(examples: Examples, batch: int) -> list[tuple[Batch, Tensor]]:
    return [(((x,), {}), y) for x, y in pages_of(examples, batch)]


def measured_for(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first batches that hold so many pictures."""
    found: list[Batch] = []
    seen = 0
    for batch in batches:
        if seen >= count:
            break
        found.append(batch)
        seen += len(batch[0][0])
    return found


def pair_path(out: Path, network: str, split: int) -> Path:
    """Where the record of a pair is."""
    return out / "pairs" / network / f"split-{split}.json"

"""Run a study: experts arrive in several orders, every method merges them, and after every arrival it is judged.

    OUT/study.json                       models and tasks; methods and orders may come later, other models may not
    OUT/controls.json                    the base and every expert on its own
    OUT/runs/METHOD/seed-S.json          one row an arrival; the record of a run that is complete has "wall_s"
    OUT/states/STATE-seed-S              the fold of a run that is not complete

Killed at any moment, the same command goes on: a row that is written down is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from merganser.continual import Fold
from merganser.continual.kinds import check_settings
from merganser.continual.ledger import absolute_ref
from merganser.errors import RefError, StateError
from merganser.methods import Sums, find_method
from merganser.study.composing import Plan
from merganser.study.data import load_examples
from merganser.study.heads import make_head
from merganser.study.judge import Paper, Progress, Score
from merganser.study.networks import Encoder, folder_of, load_encoder, resolve
from merganser.study.records import claim, read_record, write_record
from merganser.study.words import MethodNode
from merganser.version import __version__

#: Gives a progress callback for a piece of work of that name.
Bar = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass
class Study:
    """A study at work.

    Attributes:
        plan: what is compared.
        out: folder of the study.
        data: folder of packed data sets.
        device: where networks run.
        bfloat16: judge with matrix products in bfloat16.
        bar: for progress.
    """

    plan: Plan
    out: Path
    data: Path | None
    device: str
    bfloat16: bool
    bar: Bar
    papers: dict[str, Paper] = field(default_factory=dict)

    def run(self) -> None:
        """Do all that is not done yet.

        Raises:
            StateError: If the folder holds another study, or an expert was tuned from another base.
            MerganserError: If data, models or settings cannot be used; nothing is merged then.
        """
        for node in self.plan.methods.values():
            check_settings(node.method, node.settings)
        self._models()
        self._claim()
        self._read_tasks()
        self._controls()
        for seed in self.plan.study.seeds:
            for state, methods in states_of(self.plan.methods).items():
                self._run(state, methods, seed)

    def _models(self) -> None:
        """Every model is there, before any work."""
        for name, ref in {"the base": self.plan.models.base, **self.plan.models.models}.items():
            place = Path(resolve(ref))
            if not ref.startswith("hf:") and not place.exists():
                needs = self.plan.models.needs or f"merganser zoo train {self.plan.models.zoo}"
                raise RefError(f"{name} of {self.plan.models.name} is not at {place}", needs)

    def _claim(self) -> None:
        """Write down what this study is; refuse to mix two."""
        content = {
            "split": self.plan.study.split,
            "curve_items": self.plan.study.curve_items,
            "models": self.plan.models.model_dump(mode="json"),
            "tasks": self.plan.tasks.model_dump(mode="json"),
            "bfloat16": self.bfloat16,
        }
        claim(self.out, content)

    def _read_tasks(self) -> None:
        for name, task in self.plan.tasks.tasks.items():
            examples = load_examples(name, task, self.plan.study.split, self.data)
            expert = folder_of(self.plan.models.models[name])
            self.papers[name] = Paper(examples, make_head(name, task, examples.classes, expert), task.metric)

    def _controls(self) -> None:
        path = self.out / "controls.json"
        found: dict[str, Any] = read_record(path) if path.is_file() else {}
        with self.bar("controls") as progress:
            tasks = list(self.papers)
            for i, task in enumerate(tasks):
                for kind, expert in (("zero_shot", None), ("experts", folder_of(self.plan.models.models[task]))):
                    rows = found.setdefault(kind, {})
                    if task not in rows:
                        encoder = load_encoder(folder_of(self.plan.models.base), expert=expert).to(self.device)
                        rows[task] = self._judge(encoder, task).record()
                        write_record(path, found)
                if progress is not None:
                    progress(i + 1, len(tasks))

    def _judge(self, encoder: Encoder, task: str, count: int | None = None) -> Score:
        return self.papers[task].judge(encoder, count=count, bfloat16=self.bfloat16)

    def _run(self, state: str, methods: Mapping[str, MethodNode], seed: int) -> None:
        """One order of arrival of one state, exported with each of its methods after every arrival."""
        order = order_of(list(self.plan.models.models), seed)
        records = {name: self._record(name, node, seed, order) for name, node in methods.items()}
        todo = {name: record for name, record in records.items() if "wall_s" not in record}
        if not todo:
            return
        folder = self.out / "states" / f"{state}-seed-{seed}"
        fold = self._fold(folder, methods, min(len(record["rows"]) for record in todo.values()), order)
        with self.bar(f"{state}, order {seed}") as progress:
            for t in range(max(1, len(fold.ledger.contributors)), len(order) + 1):
                if t > len(fold.ledger.contributors):
                    began = time.perf_counter()
                    ref = _local(self.plan.models.models[order[t - 1]])
                    fold.add(ref, name=order[t - 1], ignore=self.plan.models.ignore, device=self.device)
                    for record in todo.values():
                        record["add_s"].append(round(time.perf_counter() - began, 3))
                for name, record in todo.items():
                    record["state_bytes"] = fold.state_bytes
                    if len(record["rows"]) < t:
                        record["rows"].append(self._row(fold, name, methods[name], order, t))
                    write_record(self._path(name, seed), record)
                if progress is not None:
                    progress(t, len(order))
        for name, record in todo.items():
            record["peak_bytes"] = fold.cost_of_next(base=_local(self.plan.models.base)).peak_bytes
            record["wall_s"] = round(sum(row["wall_s"] for row in record["rows"]) + sum(record["add_s"]), 2)
            write_record(self._path(name, seed), record)
        shutil.rmtree(folder)

    def _fold(self, folder: Path, methods: Mapping[str, MethodNode], begun: int, order: list[str]) -> Fold:
        """The state as an interrupted run left it, or a new one where that cannot be gone on with."""
        if folder.is_dir():
            with suppress(StateError):  # half removed
                fold = Fold(folder)
                there = [c.name for c in fold.ledger.contributors]
                if begun in (len(there), len(there) - 1) and there == order[: len(there)]:
                    return fold
            shutil.rmtree(folder)
        node = next(iter(methods.values()))
        sums = isinstance(find_method(node.method), Sums)  # those take their settings on export
        needed = {n for m in methods.values() for n in getattr(find_method(m.method), "needs", ())}
        method = ("gram" if "g" in needed else "mean") if sums else node.method
        options: dict[str, Any] = {"freeze": self.plan.models.freeze, **node.fold, **({} if sums else node.settings)}
        return Fold.init(_local(self.plan.models.base), folder, method, **options)

    def _row(self, fold: Fold, name: str, node: MethodNode, order: list[str], t: int) -> dict[str, Any]:
        """Export, load, judge: all test items of the newest task and of every task at the end, some of the others."""
        began = time.perf_counter()
        merged = self.out / "merged" / name
        shutil.rmtree(merged, ignore_errors=True)  # of an interrupted run, and maybe half removed
        sums = isinstance(find_method(node.method), Sums)
        fold.export(merged, node.method if sums else None, **(node.settings if sums else {}))
        export_s = time.perf_counter() - began
        encoder = load_encoder(merged).to(self.device)
        scores = {}
        for task in self.papers:
            whole = t == len(order) or task == order[t - 1]
            count = None if whole else self.plan.study.curve_items
            if whole or count:
                scores[task] = self._judge(encoder, task, count).record()
        digests = read_record(merged / "merganser.json")["outputs"]
        shutil.rmtree(merged)
        return {
            "arrived": order[t - 1],
            "scores": scores,
            "export_s": round(export_s, 2),
            "wall_s": round(time.perf_counter() - began, 2),
            "weights": _digest(digests),
        }

    def _path(self, name: str, seed: int) -> Path:
        return self.out / "runs" / name / f"seed-{seed}.json"

    def _record(self, name: str, node: MethodNode, seed: int, order: list[str]) -> dict[str, Any]:
        path, method = self._path(name, seed), node.model_dump(mode="json")
        if not path.is_file():
            made = {"merganser": __version__, "torch": torch.__version__}
            return {**made, "method": method, "seed": seed, "order": order, "add_s": [], "rows": []}
        record = read_record(path)
        if record.get("method") != method:
            raise StateError(f"{path} was measured with other settings", "give the method another name, or remove it")
        return record


def order_of(names: list[str], seed: int) -> list[str]:
    """The order of arrival of a seed, as in the published protocol.

    >>> order_of(["a", "b", "c", "d"], 42)
    ['c', 'b', 'd', 'a']
    """
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def states_of(methods: Mapping[str, MethodNode]) -> dict[str, dict[str, MethodNode]]:
    """Which methods share a fold, by its name: all methods of sums with the same options; any other has its own."""
    states: dict[str, dict[str, MethodNode]] = {}
    options: list[dict[str, Any]] = []
    for name, node in methods.items():
        if not isinstance(find_method(node.method), Sums):
            states[name] = {name: node}
            continue
        if node.fold not in options:
            options.append(node.fold)
        states.setdefault(f"sums-{options.index(node.fold) + 1}", {})[name] = node
    return states


def _local(ref: str) -> str:
    return absolute_ref(resolve(ref))


def _digest(content: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

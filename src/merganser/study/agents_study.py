"""Run a study of agents: several methods of decentralised training, each from the same seeds.

    OUT/study.json                   what is shared by all; methods and seeds may come later
    OUT/runs/METHOD/seed-S.json      the journal of a run that is done
    OUT/working/METHOD/seed-S        journal and checkpoints of a run that is not
    ZOO/KEY                          what agents learn alone before they first merge, trained once for all methods

Killed at any moment, the same command goes on: a run that is written down is not run again, and one that is not goes on
from the last round that all of its agents have kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from merganser.decentral.baselines import effective
from merganser.decentral.rounds import run as run_rounds
from merganser.decentral.rounds import together
from merganser.decentral.words import read_config
from merganser.errors import StateError
from merganser.study.agents import Learners
from merganser.study.apart import Work
from merganser.study.data import Examples, Split, load_examples
from merganser.study.records import claim, read_record, write_record
from merganser.study.warm_up import folder_of, seconds_of, warmed
from merganser.study.words import Task
from merganser.study.words_agents import AgentsNode
from merganser.version import __version__


@dataclass
class Shelf:
    """Examples that were read once; runs of a study share them."""

    kept: dict[tuple[str, Split], Examples] = field(default_factory=dict)

    def __call__(self, name: str, task: Task, split: Split, data: Path | None) -> Examples:
        """Read them, unless they are there."""
        key = (task.model_dump_json(), split)
        if key not in self.kept:
            self.kept[key] = load_examples(name, task, split, data)
        return self.kept[key]


@dataclass
class AgentsStudy:
    """A study of agents at work.

    Attributes:
        node: what is compared.
        work: where and how.
        written: called after every run.
    """

    node: AgentsNode
    work: Work
    written: Callable[[], object] = lambda: None
    shelf: Shelf = field(init=False, default_factory=Shelf)

    def run(self) -> None:
        """Do all that is not done yet, a seed at a time, so that all methods have the first seed early.

        Raises:
            StateError: If a folder holds another study or other runs.
            MerganserError: If data or networks cannot be used.
        """
        claim(self.work.out, self.node.model_dump(mode="json", include={"kind", "base"}))
        for seed in self.node.seeds:
            for method in self.node.chosen:
                if self._one(method, seed):
                    self.written()

    def _one(self, method: str, seed: int) -> bool:
        """One run; whether there was something to do."""
        config, path = self.node.config(method, seed), record_path(self.work.out, method, seed)
        if path.is_file():
            known = read_config(read_record(path)["config"])
            if changed := [key for key in type(config).model_fields if getattr(known, key) != getattr(config, key)]:
                raise StateError(
                    f"{path} is of a run with other {', '.join(changed)}", "give the method another name, or remove it"
                )
            return False
        working = self.work.out / "working" / method / f"seed-{seed}"
        make = warmed(config, Learners(config, self.work.data, read=self.shelf), self.work.zoo)
        with self.work.bar(f"{method}, seed {seed}") as progress:

            def done(line: dict[str, Any]) -> None:
                if progress is not None:
                    progress(line["round"] + 1, config.rounds)

            crew = together(config, make, folder=working)
            lines = run_rounds(effective(config), crew, working, resume=True, progress=done)
        warm = folder_of(config, self.work.zoo)
        record = {
            "merganser": __version__,
            "torch": torch.__version__,
            "config": {**config.model_dump(mode="json", exclude_defaults=True), "seed": seed},
            "warm_up": {"kept": warm.name, "seconds": seconds_of(warm)} if config.warmup_epochs else None,
            "rounds": lines,
        }
        write_record(path, record)
        shutil.rmtree(working)
        return True


def record_path(out: Path, method: str, seed: int) -> Path:
    """Where the record of a run is."""
    return out / "runs" / method / f"seed-{seed}.json"

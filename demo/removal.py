"""Whether removing an expert equals never having added it: weights, sums and accuracy of two states, side by side."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from arrivals import WAYS
from commands import CommandError, Shell
from exam import Exam
from safetensors.torch import load_file
from tasks import TASKS
from torch import Tensor

REMOVED = TASKS[2]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Removal:
    """Largest differences, relative to the largest entry of each tensor, and accuracy on the eight tasks."""

    weights_differ: float
    sums_differ: float
    after_removal: list[float]
    never_added: list[float]


def compare_removal(shell: Shell, exam: Exam) -> Removal:
    """Take one expert out of a copy of the gram state; build another state that never had it; compare.

    Raises:
        CommandError: If a command fails or the two differ by more than TOLERANCE.
    """
    work = shell.folder
    shutil.copytree(work / "states" / "gram", work / "states" / "removed")
    shell.run_all(
        [
            ("fold", "remove", "states/removed", f"experts/{REMOVED}"),
            ("fold", "init", "base", "states/never", "--method", "gram"),
        ]
    )
    shell.run("fold", "add", "states/never", *(f"experts/{task}" for task in TASKS if task != REMOVED))
    names = ("removed", "never")
    shell.run_all([("fold", "export", f"states/{n}", f"merged/{n}", *WAYS["gram"].export) for n in names])
    shell.run("fold", "verify", "states/removed")
    result = Removal(
        weights_differ=largest_difference(*(tensors_in(work / "merged" / name) for name in names)),
        sums_differ=largest_difference(*(sums_of(work / "states" / name) for name in names)),
        after_removal=exam.sit(work / "merged" / "removed"),
        never_added=exam.sit(work / "merged" / "never"),
    )
    if not (result.weights_differ <= TOLERANCE and result.sums_differ <= TOLERANCE):
        raise CommandError(
            f"removing {REMOVED} differs from never having added it: "
            f"merged weights {result.weights_differ:.1e}, sums {result.sums_differ:.1e}, allowed {TOLERANCE:.0e}"
        )
    return result


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest |a - b| over all tensors, each relative to the largest entry of its `b` (absolute where that is 0)."""
    if a.keys() != b.keys():
        raise CommandError(f"tensors of one side only: {sorted(a.keys() ^ b.keys())}")
    gaps = []
    for name, theirs in b.items():
        scale = theirs.double().abs().max()
        gap = (a[name].double() - theirs.double()).abs().max()
        gaps.append(gap / torch.where(scale == 0, 1.0, scale))
    return torch.stack(gaps).max().item()  # a NaN in any of them stays a NaN


def sums_of(state: Path) -> dict[str, Tensor]:
    """The running sums of a state: a checkpoint in the folder that the ledger names."""
    return tensors_in(state / json.loads((state / "ledger.json").read_text())["sums"])


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors

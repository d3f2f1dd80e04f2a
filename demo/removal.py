"""Whether removing an expert equals never having added it: weights and sums of two states, side by side."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from commands import CommandError, Shell
from safetensors.torch import load_file
from torch import Tensor

EXPERTS = tuple(f"shuffle-{i}" for i in range(1, 9))
REMOVED = EXPERTS[2]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Removal:
    """Largest differences, relative to the largest entry of each tensor."""

    weights_differ: float
    sums_differ: float


def compare_removal(shell: Shell) -> Removal:
    """Take one expert out of a state of all; build another state that never had it; compare.

    Raises:
        CommandError: If a command fails or the two differ by more than TOLERANCE.
    """
    work = shell.folder
    for stale in ("states", "merged"):
        shutil.rmtree(work / stale, ignore_errors=True)
    for state, experts in (("removed", EXPERTS), ("never", [e for e in EXPERTS if e != REMOVED])):
        shell.run("fold", "init", "zoo/base", f"states/{state}", "--method", "gram", "--quiet")
        shell.run("fold", "add", f"states/{state}", *(f"zoo/experts/{e}" for e in experts), "--quiet")
    shell.run("fold", "remove", "states/removed", f"zoo/experts/{REMOVED}", "--quiet")
    for state in ("removed", "never"):
        shell.run("fold", "export", f"states/{state}", f"merged/{state}", "--quiet")
    shell.run("fold", "verify", "states/removed")
    result = Removal(
        weights_differ=largest_difference(*(tensors_in(work / "merged" / n) for n in ("removed", "never"))),
        sums_differ=largest_difference(*(sums_of(work / "states" / n) for n in ("removed", "never"))),
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

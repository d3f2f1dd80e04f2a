"""Tiny studies of networks that started apart: four classes of noisy 8 x 8 pictures, groups of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small import write
from small_data import write_npz

from merganser.cli import main

TRAINING = "{epochs: 2, lr: 1.0e-2, batch: 20, items: 80}"
PICTURES = "{compare: 32, measure: 32, held_out: 16, batch: 16}"


def corners(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Pictures with one bright corner of four; anything can learn which."""
    rng = np.random.default_rng(seed)
    labels = [i % 4 for i in range(count)]
    x = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
    for picture, label in zip(x, labels, strict=True):
        down, right = label // 2 * 4, label % 2 * 4
        picture[down : down + 4, right : right + 4] += 90
    return x, labels


def write_data(folder: Path) -> Path:
    """What `--data` takes: `corners.npz`."""
    write_npz(folder / "corners.npz", {"train": corners(400, 0), "test": corners(80, 1)}, ["nw", "ne", "sw", "se"])
    return folder


def write_groups(folder: Path) -> Path:
    """What `--config-dir` takes: `study=tiny-halves` and `study=tiny-lines`."""
    head = "# @package _global_\nstudy:\n  data: {kind: packed, file: corners}\n  zoo: zoo/tiny\n"
    write(
        folder / "study/tiny-halves.yaml",
        f"{head}  kind: halves\n  name: tiny-halves\n  title: Tiny halves\n"
        "  codes: {width: 6}\n  balances: [0.2, 0.8]\n"
        "  networks:\n"
        "    net:\n      label: Net with BatchNorm\n      network: {kind: resnet, channels: 4, blocks: 1}\n"
        f"      training: {TRAINING}\n      splits: [0]\n"
        "    plain:\n      label: MLP\n      network: {kind: perceptron, hidden: 12, depth: 2}\n"
        f"      training: {TRAINING}\n      splits: [0, 1]\n      rules: [average, weights, zip, ensemble]\n"
        "  rules: [ensemble, average, weights, activations, dual, zip, dual_zip, part_zip]\n"
        f"  pictures: {PICTURES}\n"
        "  surface: {network: net, split: 0, points: 3, measure: 16, test: 80}\n",
    )
    write(
        folder / "study/tiny-lines.yaml",
        f"{head}  kind: lines\n  name: tiny-lines\n  title: Tiny lines\n  networks:\n"
        "    net:\n      label: Net with BatchNorm\n      network: {kind: resnet, channels: 4, blocks: 1}\n"
        f"      training: {TRAINING}\n      pairs: [[0, 1]]\n"
        "    plain:\n      label: MLP\n      network: {kind: perceptron, hidden: 12, depth: 2}\n"
        f"      training: {TRAINING}\n      pairs: [[0, 1], [2, 3]]\n"
        f"  points: 3\n  pictures: {PICTURES}\n",
    )
    return folder


def call(*words: object) -> int:
    """The command line, in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["merganser", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    """All files under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_times(folder: Path) -> dict[str, object]:
    """All records of a study without what the clock decides."""
    found: dict[str, object] = {}
    for path in sorted((folder / "pairs").rglob("*.json")):
        record = json.loads(path.read_text())
        for rule in record["rules"].values():
            del rule["wall_s"]
        found[str(path.relative_to(folder))] = record
    return found

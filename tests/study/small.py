"""A tiny study in a configuration folder of its own: three patch shuffles of the digits, an MLP of 16 units."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TASKS = ("first", "second", "third")
HEAD = "{kind: prototypes, file: %s, scale: 10.0}"


def write_groups(folder: Path, *, epochs: int = 2) -> Path:
    """Groups that `--config-dir` takes; the head is ten random prototypes in a file."""
    generator = torch.Generator().manual_seed(3)
    folder.mkdir(parents=True)
    prototypes = folder / "prototypes.safetensors"
    save_file({"prototypes": torch.randn(10, 16, generator=generator)}, prototypes)
    head = HEAD % json.dumps(str(prototypes))
    tasks = "".join(
        f"  {name}:\n    data: {{kind: digits, shuffle: {i}}}\n    head: {head}\n" for i, name in enumerate(TASKS, 1)
    )
    models = "".join(f"  {name}: ${{zoo_folder}}/experts/{name}\n" for name in TASKS)
    training = f"{{epochs: {epochs}, lr: 3.0e-3, batch: 64}}"
    write(folder / "taskpool/small.yaml", f"name: small\ntasks:\n{tasks}")
    write(
        folder / "modelpool/small.yaml",
        f"name: small\nzoo: small\nzoo_folder: ${{zoo_folder}}\nbase: ${{zoo_folder}}/base\nmodels:\n{models}",
    )
    write(
        folder / "zoo/small.yaml",
        "name: small\ntaskpool: small\nnetwork: {kind: mlp, image: 8, hidden: 16, depth: 1, width: 16}\n"
        f"pretraining:\n  tasks:\n    plain:\n      data: {{kind: digits}}\n      head: {head}\n"
        f"  training: {training}\nfinetuning: {training}\n",
    )
    write(
        folder / "study/small.yaml",
        "# @package _global_\ndefaults:\n  - override /modelpool: small\n  - override /taskpool: small\n"
        "study:\n  name: small\n  title: A small study\n  methods: [mean, gram, opcm]\n  seeds: [0, 1]\n"
        "  curve_items: 50\n",
    )
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def times_out(record: dict[str, object]) -> dict[str, object]:
    """A record without what the clock decides."""
    rows = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in record["rows"]]  # type: ignore[attr-defined]
    return {k: v for k, v in record.items() if not k.endswith("_s")} | {"rows": rows}

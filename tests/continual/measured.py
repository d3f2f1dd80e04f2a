"""Fold models in a process of its own and print what it took, as JSON: for tests of memory.

    python measured.py '{"method": "opcm", "settings": {}, "models": [BASE, E1, E2], "out": DIR, "spare_bytes": null,
        "together": false}'

`spare_bytes` limits the private memory that the process may take beside what it holds before the work.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from merganser.continual import Fold


def status_bytes(key: str) -> int:
    """A line of this process's status, such as VmHWM, the peak of its resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def warm(folder: Path, method: str, settings: dict[str, object]) -> None:
    """Fold one matrix first, so that libraries are loaded and their buffers, which stay, are touched."""
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        save_file({"x.weight": torch.randn(600, 520)}, folder / name / "model.safetensors")
    fold = Fold.init(folder / "a", folder / "state", method, threads=1, **settings)
    for name in ("b", "c"):
        fold.add(folder / name, threads=1, allow_distant=True)
    fold.export(folder / "out", threads=1)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    root, settings = Path(job["out"]), job["settings"]
    warm(root / "warm", job["method"], settings)
    base, *experts = job["models"]
    if job["spare_bytes"] is not None:
        limit = status_bytes("VmData") + job["spare_bytes"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    fold = Fold.init(base, root / "state", job["method"], threads=1, **settings)
    predicted = 0
    for arrivals in [experts] if job["together"] else [[expert] for expert in experts]:
        predicted = max(predicted, fold.cost(*arrivals, threads=1).peak_bytes)
        fold.add_all(arrivals, threads=1)
    folding = status_bytes("VmHWM") - before
    fold.export(root / "merged", threads=1)
    print(json.dumps({"predicted": predicted, "folding": folding, "with_export": status_bytes("VmHWM") - before}))

"""The surroundings of commands that are killed, and what must be whole after it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from merganser.continual import Fold
from support import tree

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


def model_tree(folder: Path) -> dict[str, str]:
    """Files of an exported folder; of the receipt only what does not depend on the clock and the machine."""
    found = tree(folder)
    receipt = json.loads((folder / "merganser.json").read_text("utf-8"))
    del receipt["wall_s"], receipt["peak_bytes"]
    return found | {"merganser.json": json.dumps(receipt, sort_keys=True)}


def assert_sound(state: Path) -> None:
    assert [(f.part, f.status) for f in Fold(state).verify(threads=1) if f.status != "ok"] == []

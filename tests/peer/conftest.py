"""One process of mergekit for the whole session: it merges every recipe of `peer_jobs.JOBS`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from peer_jobs import JOBS, Merges
from peer_models import save_models

collect_ignore = ["merge_with_mergekit.py"]  # it is run by the other interpreter
ROOT = Path(__file__).resolve().parents[2]
#: The interpreter that mergekit is installed for; `make test-peer` makes it.
PEER = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))


@pytest.fixture(scope="session")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Merges:
    """Both programs' results by the name of the job."""
    if not PEER.exists():
        pytest.fail(f"{PEER} is not there; make test-peer makes it")
    root = tmp_path_factory.mktemp("peer")
    save_models(root / "models")
    found = Merges(root)
    listed = [
        {"text": found.text(job), "out": str(found.theirs_at(name)), "seed": job.seed, "options": found.options(job)}
        for name, job in JOBS.items()
    ]
    (root / "jobs.json").write_text(json.dumps(listed), "utf-8")
    ran = subprocess.run(
        [PEER, Path(__file__).with_name("merge_with_mergekit.py"), root / "jobs.json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        pytest.fail(f"mergekit's process: {ran.stderr[-3000:]}")
    return found

"""Merge a list of recipes with mergekit, in one process: `python merge_with_mergekit.py JOBS.json`.

JOBS.json is a list of `{"text": YAML, "out": folder, "seed": number or null, "options": {...}}`. Beside every folder
stands afterwards `folder.json`: null, or the error that mergekit ended with.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.scripts import multimerge


def merge(job: dict[str, Any]) -> None:
    """One job."""
    options = {"quiet": True, "write_model_card": False, "random_seed": job["seed"], **job["options"]}
    documents = [d for d in yaml.safe_load_all(job["text"]) if d is not None]
    out = Path(job["out"])
    if len(documents) == 1:
        run_merge(MergeConfiguration.model_validate(documents[0]), str(out), MergeOptions(**options))
        return
    recipe, stages = out.with_suffix(".yaml"), out.with_suffix(".stages")
    recipe.write_text(job["text"], "utf-8")
    stages.mkdir(parents=True)
    arguments = [str(recipe), "--intermediate-dir", str(stages), "--out-path", str(out), "--quiet"]
    multimerge.main.main(arguments, standalone_mode=False)


def main() -> None:
    """All jobs in turn."""
    started = time.process_time()
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for job in jobs:
        error = None
        try:
            merge(job)
        except Exception as caught:  # whatever it is, it is the result of this job
            error = f"{type(caught).__name__}: {caught}"
            shutil.rmtree(job["out"], ignore_errors=True)
        Path(job["out"] + ".json").write_text(json.dumps(error), "utf-8")
    print(f"{len(jobs)} merges, {time.process_time() - started:.1f} CPU-s")


if __name__ == "__main__":
    main()

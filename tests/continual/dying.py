"""Run commands in processes that die, or are interrupted, just before their n-th touch of the disk; n = 1, 2, ...

    python dying.py SIGNAL PLAN     PLAN is JSON: name -> {"template": folder, "argv": [...]}

For every name and n the template is copied to a folder NAME-n beside it, "{}" in argv stands for that folder, and a
fork of this process runs the command line. Prints JSON: name -> [[status, touches], ...]; the last one lived.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import merganser.checkpoints.writer as writer
import merganser.continual.fold  # noqa: F401  # imported once, for all forks
from merganser.cli import main

TOUCHES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def die_before(number: int, deadly: signal.Signals) -> dict[str, int]:
    """Let this process get the signal just before its touch of that number; the dictionary keeps count."""
    seen = {"touches": 0}

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*args: Any, **options: Any) -> Any:
            seen["touches"] += 1
            if seen["touches"] == number:
                os.kill(os.getpid(), deadly)
            return call(*args, **options)

        return touch

    for name in TOUCHES:
        setattr(os, name, counted(getattr(os, name)))
    writer._exchange = counted(writer._exchange)
    writer.CheckpointWriter.put = counted(writer.CheckpointWriter.put)  # type: ignore[method-assign]
    writer.write_json = counted(writer.write_json)
    return seen


def run(argv: list[str], number: int, deadly: signal.Signals, log: Path) -> tuple[int, int]:
    """Status and touches of one run; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        with log.open("w") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            seen = die_before(number, deadly)
            try:
                sys.argv = ["merganser", *argv]
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            log.with_suffix(".count").write_text(str(seen["touches"]))
        os._exit(code)
    _, status = os.waitpid(child, 0)
    count = log.with_suffix(".count")
    return os.waitstatus_to_exitcode(status), int(count.read_text()) if count.exists() else number


if __name__ == "__main__":
    torch.set_num_threads(1)
    deadly, plan = signal.Signals[sys.argv[1]], json.loads(Path(sys.argv[2]).read_text())
    outcomes: dict[str, list[tuple[int, int]]] = {}
    for name, job in plan.items():
        outcomes[name] = []
        for number in range(1, 500):
            folder = Path(job["template"]).parent / f"{name}-{number}"
            shutil.copytree(job["template"], folder)
            argv = [part.replace("{}", str(folder)) for part in job["argv"]]
            outcomes[name].append(run(argv, number, deadly, folder.with_suffix(".log")))
            if outcomes[name][-1][1] < number:
                break
    print(json.dumps(outcomes))

"""How the demo runs the command line: one child a command, in demo/work, timed, its stderr in the error.

Nothing of the package is imported for merging; what you see is what you can type yourself.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class CommandError(Exception):
    """A command ended with a code other than 0; the message has its words and its stderr."""


class Shell:
    """Runs `merganser ...` in one folder and remembers what it ran, and how long each command took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[tuple[str, float]] = []

    def run(self, *words: str) -> float:
        """Run one command, one thread; returns its wall time in seconds, start-up included."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
        started = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-m", "merganser", *words],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        wall_s = time.perf_counter() - started
        line = shlex.join(["merganser", *words])
        if child.returncode:
            said = child.stderr.strip() or child.stdout.strip() or "it printed nothing"
            raise CommandError(f"{line}\nended with code {child.returncode} and said:\n{said}")
        self.history.append((line, wall_s))
        return wall_s

    def run_all(self, commands: Iterable[tuple[str, ...]]) -> list[float]:
        """Run commands that do not need each other, two at a time; returns their times in order."""
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(self.run, *words) for words in commands]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

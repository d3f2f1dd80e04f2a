"""How the demo runs the command line: one child a command, in demo/work, its stderr in the error.

Nothing of the package is imported for training, merging or judging; what you see is what you can type yourself.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path


class CommandError(Exception):
    """A command ended with a code other than 0; the message has its words and its stderr."""


class Shell:
    """Runs `merganser ...` in one folder and remembers what it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[str] = []

    def run(self, *words: str) -> str:
        """Run one command, one thread: the networks are tiny. Returns what it printed."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
        child = subprocess.run(
            [sys.executable, "-m", "merganser", *words],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        line = shlex.join(["merganser", *words])
        if child.returncode:
            said = child.stderr.strip() or child.stdout.strip() or "it printed nothing"
            raise CommandError(f"{line}\nended with code {child.returncode} and said:\n{said}")
        self.history.append(line)
        return child.stdout

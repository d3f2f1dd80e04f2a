"""The demo: train a base and eight experts, merge them as they arrive in three orders, judge every step, remove one.

Run it with `make demo`. It runs the command line alone; a second run reuses the trained networks and what was measured.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from commands import CommandError, Shell
from removal import REMOVED, compare_removal
from rich.console import Console
from rich.markup import escape

HERE = Path(__file__).resolve().parent


def main(console: Console) -> None:
    """All steps in order; every one says how long it took."""
    started = time.perf_counter()
    (HERE / "work").mkdir(exist_ok=True)
    shell = Shell(HERE / "work")
    console.print("[bold]merganser: eight networks, merged as they arrive[/bold]")
    with console.status("training a base and eight experts on scikit-learn's digits"):
        console.print(shell.run("zoo", "train", "digits", "--zoo", "zoo").splitlines()[0], highlight=False)
    trained_s = time.perf_counter() - started
    with console.status("merging in three orders and judging every step"):
        table = shell.run("study", "study=digits8", "--zoo", "zoo", "--out", "study")
    console.print(table.rpartition("\n" + "study")[0], markup=False, soft_wrap=True)
    judged_s = time.perf_counter() - started - trained_s
    with console.status(f"removing {REMOVED}"):
        removal = compare_removal(shell)
    console.print(
        f"{REMOVED} removed from a state of eight against never added, largest difference relative to the largest "
        f"entry of a tensor: merged weights {removal.weights_differ:.0e}, sums {removal.sums_differ:.0e}",
        soft_wrap=True,
    )
    shutil.copyfile(HERE / "work" / "study" / "report.html", HERE / "report.html")
    console.print("\nwhat was run, in demo/work:")
    for line in shell.history:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    wall_s = time.perf_counter() - started
    console.print(
        f"\n{wall_s:.0f} s in all: training {trained_s:.0f}, merging and judging {judged_s:.0f}. "
        f"Report: [bold]{os.path.relpath(HERE / 'report.html')}[/bold]",
        soft_wrap=True,
    )


if __name__ == "__main__":
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        main(console)
    except KeyboardInterrupt:
        errors.print("stopped; what was trained and measured so far will be reused")
        sys.exit(130)
    except CommandError as error:
        errors.print(f"[bold red]the demo failed:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)

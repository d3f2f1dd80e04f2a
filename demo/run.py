"""The demo: train a base and eight experts, fold the experts in by the command line, print one table, write one page.

Run it with `make demo`. A second run reuses the trained networks.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from arrivals import WAYS, fold_all
from commands import CommandError, Shell
from exam import Exam
from page import page
from removal import REMOVED, compare_removal
from results import HEADER, LABELS, REMOVAL_HEADER, Results, difference, removal_rows, rows
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tasks import TASKS
from train import Training, train_missing

HERE = Path(__file__).resolve().parent


def main(console: Console) -> None:
    """All steps in order; every one says how long it took."""
    started = time.perf_counter()
    work = HERE / "work"
    console.print("[bold]merganser: eight networks, merged as they arrive[/bold]")
    with console.status("training"):
        reused = train_missing(work, Training(), lambda words: console.print(f"  {words}"))
    console.print(
        f"reusing {reused} trained experts" if reused else f"trained in {time.perf_counter() - started:.0f} s"
    )

    exam, shell = Exam(), Shell(work)
    for stale in ("states", "merged"):
        shutil.rmtree(work / stale, ignore_errors=True)
        (work / stale).mkdir()
    zero_shot = exam.sit(work / "base")
    experts = [exam.sit(work / "experts" / task)[j] for j, task in enumerate(TASKS)]

    console.print("\nmean accuracy over all eight tasks after each arrival, %")
    console.print(" " * 14 + "".join(f"{LABELS[name]:>16}" for name in WAYS))
    with console.status("folding"):

        def tell(count: int, means: dict[str, float]) -> None:
            console.print(f"+ {TASKS[count - 1]:<12}" + "".join(f"{value:16.1f}" for value in means.values()))

        arrivals = fold_all(shell, exam, tell)
    with console.status(f"removing {REMOVED}"):
        removal = compare_removal(shell, exam)
    results = Results(zero_shot, experts, arrivals, removal)

    print_tables(console, results)
    report = HERE / "report.html"
    report.write_text(page(results, shell.history), encoding="utf-8")
    wall_s = time.perf_counter() - started
    console.print(f"\n{wall_s:.0f} s in all. Report: [bold]{os.path.relpath(report)}[/bold]", soft_wrap=True)


def print_tables(console: Console, results: Results) -> None:
    """The result of the run, and of the removal."""
    for title, header, cells in (
        ("After eight arrivals", HEADER, rows(results)),
        ("After one expert is taken out again", REMOVAL_HEADER, removal_rows(results)),
    ):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print(
        "removed against never added, largest difference relative to the largest entry of a tensor:\n"
        f"merged weights {difference(results.removal.weights_differ)}, sums {difference(results.removal.sums_differ)}"
    )


if __name__ == "__main__":
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        main(console)
    except KeyboardInterrupt:
        errors.print("stopped; what was trained so far will be reused")
        sys.exit(130)
    except CommandError as error:
        errors.print(f"[bold red]the demo failed:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)

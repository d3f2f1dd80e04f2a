"""What the demo found out, as one record and one table; the terminal and the page print the same cells."""

from __future__ import annotations

from dataclasses import dataclass

from arrivals import WAYS, Arrivals
from removal import REMOVED, Removal
from tasks import TASKS

from merganser.evaluate import acc, bwt

LABELS = {"gram": "gram", "opcm": "OPCM", "task_arithmetic": "task arithmetic", "average": "average"}
HEADER = ("", "ACC, %", "BWT", "BWT (1/T)", "state, MB", "add, s")
REMOVAL_HEADER = ("gram", f"{REMOVED}, %", "the other seven, %")


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    zero_shot: list[float]
    experts: list[float]
    arrivals: Arrivals
    removal: Removal


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def difference(share: float) -> str:
    """A relative difference; zero is worth a word."""
    return f"{share:.0e}" if share else "0 (the same bits)"


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row a model or method; BWT keeps its sign."""
    none = ("", "", "", "")
    table: list[tuple[str, ...]] = [("base, zero-shot", f"{mean(results.zero_shot):.1f}", *none)]
    for name, R in results.arrivals.accuracy.items():
        state = WAYS[name].state
        table.append(
            (
                LABELS[name],
                f"{acc(R):.1f}",
                f"{bwt(R):+.1f}",
                f"{bwt(R, normalise='T'):+.1f}",
                f"{results.arrivals.state_bytes[state] / 1e6:.1f}",
                f"{results.arrivals.add_s[state] / len(TASKS):.1f}",
            )
        )
    return [*table, ("experts, own task", f"{mean(results.experts):.1f}", *none)]


def removal_rows(results: Results) -> list[tuple[str, ...]]:
    """Accuracy of the gram merge with the expert, after its removal, and never having had it."""
    gone = TASKS.index(REMOVED)
    models = {
        "all eight": results.arrivals.accuracy["gram"][-1],
        "removed": results.removal.after_removal,
        "never added": results.removal.never_added,
    }
    return [
        (name, f"{scores[gone]:.1f}", f"{mean([s for j, s in enumerate(scores) if j != gone]):.1f}")
        for name, scores in models.items()
    ]

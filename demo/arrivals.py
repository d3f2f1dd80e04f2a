"""What each method knows after each arrival: experts are folded in one by one, every method exported and examined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from commands import Shell
from exam import Exam
from tasks import TASKS


@dataclass(frozen=True)
class Way:
    """One way to a merged model: the state that is kept and the words of its export."""

    state: str
    export: tuple[str, ...] = ()


# Three of the four read the same sums: a state of sums is not bound to the method that it was made with.
WAYS = {
    "gram": Way("gram", ("--method", "gram", "--eps", "0.01")),
    "opcm": Way("opcm"),
    "task_arithmetic": Way("gram", ("--method", "task_arithmetic", "--scale", "0.3")),
    "average": Way("gram", ("--method", "average")),
}
STATES = tuple(dict.fromkeys(way.state for way in WAYS.values()))


@dataclass
class Arrivals:
    """What was measured while the experts came in."""

    accuracy: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in WAYS})
    add_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATES, 0.0))
    first_bytes: dict[str, int] = field(default_factory=dict)
    state_bytes: dict[str, int] = field(default_factory=dict)


def fold_all(shell: Shell, exam: Exam, tell: Callable[[int, dict[str, float]], None]) -> Arrivals:
    """Start the states, add the experts in order, and fill one matrix R a method."""
    seen = Arrivals()
    shell.run_all([("fold", "init", "base", f"states/{state}", "--method", state) for state in STATES])
    for count, task in enumerate(TASKS, start=1):
        times = shell.run_all([("fold", "add", f"states/{state}", f"experts/{task}") for state in STATES])
        for state, wall_s in zip(STATES, times, strict=True):
            seen.add_s[state] += wall_s
            seen.state_bytes[state] = bytes_in(shell.folder / "states" / state)
            seen.first_bytes.setdefault(state, seen.state_bytes[state])
        shell.run_all(
            [
                ("fold", "export", f"states/{way.state}", f"merged/{name}", *way.export, "--overwrite")
                for name, way in WAYS.items()
            ]
        )
        for name, rows in seen.accuracy.items():
            rows.append(exam.sit(shell.folder / "merged" / name))
        tell(count, {name: sum(rows[-1]) / len(TASKS) for name, rows in seen.accuracy.items()})
    shell.run_all([("fold", "verify", f"states/{state}") for state in STATES])
    return seen


def bytes_in(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""What a study found: its records as numbers with their spread, and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser.errors import StateError
from merganser.evaluate import Spread, acc, bwt, order_spread
from merganser.study.composing import Plan

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class MethodSummary:
    """One method over all orders.

    Attributes:
        label: in tables.
        acc: mean over tasks after the last arrival, in %.
        bwt: change of a task between its arrival and the end, in points, mean over all but the last task.
        bwt_t: the same sum divided by the number of tasks.
        by_task: accuracy on every task at the end, in %, mean over orders.
        curve: mean over all tasks after each arrival, in %, mean over orders.
        matrix: R of the first order; NaN where nothing was measured.
        order: tasks in the first order.
        error: standard error of ACC over test items, in points.
        add_s: wall seconds of one add, mean.
        state_bytes: on disk at the end.
        peak_bytes: predicted memory of an add.
    """

    label: str
    acc: Spread
    bwt: Spread
    bwt_t: Spread
    by_task: dict[str, float]
    curve: list[float]
    matrix: npt.NDArray[np.float64]
    order: list[str]
    error: float
    add_s: float
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Summary:
    """What a study found.

    Attributes:
        title: of the study.
        tasks: in the pool's order, with the number of test items and classes' digest.
        zero_shot: accuracy of the base by task, in %.
        experts: accuracy of every expert on its own task, in %.
        errors: standard error over items of (zero_shot, experts) on the mean, in points.
        methods: complete ones by name, best ACC first.
        open: methods without a complete order.
    """

    title: str
    tasks: dict[str, int]
    zero_shot: dict[str, float]
    experts: dict[str, float]
    errors: tuple[float, float]
    methods: dict[str, MethodSummary]
    open: list[str]


def summarise(plan: Plan, out: Path) -> Summary:
    """Read a study's records.

    Raises:
        StateError: If there are none.
    """
    controls = out / "controls.json"
    if not controls.is_file():
        raise StateError(f"{out} holds no study", "merganser study ... --out DIR")
    found = json.loads(controls.read_text("utf-8"))
    zero_shot, experts = found["zero_shot"], found["experts"]
    methods, waiting = {}, []
    for name in plan.methods:
        records = [json.loads(p.read_text("utf-8")) for p in sorted((out / "runs" / name).glob("seed-*.json"))]
        done = [r for r in records if "wall_s" in r and r["seed"] in plan.study.seeds]
        if done:
            methods[name] = _method(plan.methods[name].label, done, list(zero_shot))
        if len(done) < len(plan.study.seeds):
            waiting.append(name)
    ranked = dict(sorted(methods.items(), key=lambda item: -item[1].acc.mean))
    return Summary(
        plan.study.title,
        {task: score["n"] for task, score in zero_shot.items()},
        _values(zero_shot),
        _values(experts),
        (_mean_error(zero_shot), _mean_error(experts)),
        ranked,
        waiting,
    )


def _values(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {task: float(score["value"]) for task, score in scores.items()}


def _mean_error(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Standard error of the mean over tasks, from the items' alone."""
    return math.sqrt(sum(float(score["error"]) ** 2 for score in scores.values())) / len(scores)


def matrix_of(record: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """R of one order: rows are arrivals, columns tasks in the order of arrival."""
    rows = [[row["scores"].get(task, {}).get("value", math.nan) for task in record["order"]] for row in record["rows"]]
    return np.array(rows, dtype=np.float64)


def _method(label: str, records: Records, tasks: list[str]) -> MethodSummary:
    matrices = [matrix_of(record) for record in records]
    finals = [record["rows"][-1]["scores"] for record in records]
    return MethodSummary(
        label,
        order_spread([acc(R) for R in matrices]),
        order_spread([bwt(R) if len(R) > 1 else 0.0 for R in matrices]),
        order_spread([bwt(R, normalise="T") if len(R) > 1 else 0.0 for R in matrices]),
        {task: float(np.mean([final[task]["value"] for final in finals])) for task in tasks},
        [float(x) for x in np.mean([R.mean(1) for R in matrices], axis=0)],
        matrices[0],
        list(records[0]["order"]),
        _mean_error(finals[0]),
        fmean([s for record in records for s in record["add_s"]] or [math.nan]),  # a killed run may miss some
        int(records[0]["state_bytes"]),
        int(records[0]["peak_bytes"]),
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """For programs; NaN becomes null."""

    def spread(s: Spread) -> dict[str, Any]:
        return {"mean": s.mean, "std": None if math.isnan(s.std) else s.std, "min": s.min, "max": s.max, "orders": s.n}

    return {
        "title": summary.title,
        "unit": "%",
        "tasks": {name: {"n": n} for name, n in summary.tasks.items()},
        "zero_shot": summary.zero_shot,
        "experts": summary.experts,
        "methods": {
            name: {
                "label": m.label,
                "acc": spread(m.acc),
                "acc_standard_error": m.error,
                "bwt": spread(m.bwt),
                "bwt_over_T": spread(m.bwt_t),
                "by_task": m.by_task,
                "curve": [None if math.isnan(x) else x for x in m.curve],
                "add_s": m.add_s,
                "state_bytes": m.state_bytes,
                "peak_bytes": m.peak_bytes,
            }
            for name, m in summary.methods.items()
        },
        "open": summary.open,
    }


HEADER = ("", "ACC %", "s.e.", "BWT", "BWT (1/T)", "of experts %")
COST_HEADER = ("", "add s", "state MB", "peak MB of an add")


def rows(summary: Summary) -> list[list[str]]:
    """The main table: controls, then methods; mean +- standard deviation over orders."""
    top = _mean(summary.experts)
    lines = [
        _control("experts, each on its own task", top, summary.errors[1], top),
        _control("zero-shot base", _mean(summary.zero_shot), summary.errors[0], top),
    ]
    for m in summary.methods.values():
        numbers = [_spread(m.acc), f"{m.error:.1f}", _spread(m.bwt), _spread(m.bwt_t), f"{100 * m.acc.mean / top:.1f}"]
        lines.append([m.label, *numbers])
    return lines


def cost_rows(summary: Summary) -> list[list[str]]:
    """What each method takes."""
    return [
        [m.label, f"{m.add_s:.2f}", f"{m.state_bytes / 1e6:.1f}", f"{m.peak_bytes / 1e6:.1f}"]
        for m in summary.methods.values()
    ]


def _control(label: str, value: float, error: float, top: float) -> list[str]:
    return [label, f"{value:.1f}", f"{error:.1f}", "", "", f"{100 * value / top:.1f}"]


def task_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Accuracy on every task at the end; header and lines."""
    tasks = list(summary.tasks)
    lines = [
        ["experts", *(f"{summary.experts[t]:.1f}" for t in tasks)],
        ["zero-shot base", *(f"{summary.zero_shot[t]:.1f}" for t in tasks)],
    ]
    lines += [[m.label, *(f"{m.by_task[t]:.1f}" for t in tasks)] for m in summary.methods.values()]
    return ["accuracy, %", *tasks], [["test items", *(str(summary.tasks[t]) for t in tasks)], *lines]


def _spread(s: Spread) -> str:
    return f"{s.mean:.1f}" if math.isnan(s.std) else f"{s.mean:.1f} ± {s.std:.1f}"


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def markdown(summary: Summary, words: str = "") -> str:
    """The tables as Markdown."""
    header, by_task = task_rows(summary)
    parts = [f"# {summary.title}", words, _table(HEADER, rows(summary)), _table(header, by_task)]
    parts.append(_table(COST_HEADER, cost_rows(summary)))
    if summary.open:
        parts.append(f"Not complete: {', '.join(summary.open)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: tuple[str, ...] | list[str], lines: list[list[str]]) -> str:
    bars = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(header), bars, *lines))

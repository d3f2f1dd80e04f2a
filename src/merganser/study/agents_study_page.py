"""Studies of agents as files for people: report.md, scores.json and a picture.

What is there is shown: a study that is not finished has a page too. Spread over the agents of a run and spread over
seeds are two things, and stand apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from merganser.decentral.page import accuracies, sent_bytes, size
from merganser.decentral.words import RunConfig
from merganser.report import accuracy_curve_png
from merganser.study.agents_study import record_path
from merganser.study.apart_page import Table
from merganser.study.records import read_record
from merganser.study.words_agents import AgentsNode

Record = dict[str, Any]


def write_agents_page(node: AgentsNode, out: Path, *, draws: bool = True) -> list[Table]:
    """Write the files beside a study's records.

    Args:
        node: the study.
        out: its folder.
        draws: a picture, too.

    Returns:
        What report.md shows.

    Raises:
        StateError: If a record is damaged.
        MerganserError: If matplotlib is not installed.
    """
    records = {name: _records(node, name, out) for name in node.chosen}
    found = {name: summary(runs) for name, runs in records.items() if runs}
    tables = [_table(node, found)]
    if node.against in found and len(found) > 1:
        tables.append(_differences(node, node.against, found))
    parts = [f"# {node.title}", _setting(node, records), *(table.markdown() for table in tables)]
    drawn = {how: [name for name in found if node.methods[name].drawn == how] for how in ("curve", "level")}
    if drawn["curve"] and draws:
        curves = {node.methods[name].label: found[name]["merged"] for name in drawn["curve"]}
        levels = {node.methods[name].label: found[name]["merged"][-1] for name in drawn["level"]}
        label = "test accuracy, mean over agents and seeds, %"
        png = accuracy_curve_png(curves, references=levels, x_label="rounds done", y_label=label)
        (out / "accuracy.png").write_bytes(png)
        parts.append("![accuracy](accuracy.png)")
    (out / "report.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (out / "scores.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", "utf-8")
    return tables


def summary(runs: Sequence[Record]) -> dict[str, Any]:
    """Numbers of a method over its seeds, for JSON.

    Args:
        runs: records of one configuration, a seed each.

    Returns:
        "merged" and "trained": mean accuracy over agents and seeds by round, in percent, after and before its merge;
        the same by seed; standard deviations after every round's merge, over agents (mean over seeds) and over seeds;
        bytes that an agent sent; distances, fixed share and correlation by round; seconds after the warm-up.
    """
    rounds = min(len(run["rounds"]) for run in runs)
    by_seed = {when: [_means(run, when, rounds) for run in runs] for when in ("merged", "trained")}
    apart = [[_deviation(accuracies(run["rounds"][r], "merged")) for run in runs] for r in range(rounds)]
    return {
        "seeds": [run["config"]["seed"] for run in runs],
        **{when: [_mean(values) for values in zip(*found, strict=True)] for when, found in by_seed.items()},
        **{f"{when}_by_seed": found for when, found in by_seed.items()},
        "over_agents": [_mean(values) for values in apart],
        "over_seeds": [_deviation(_there(values)) for values in zip(*by_seed["merged"], strict=True)],
        "bytes": fmean(sent_bytes(run["rounds"]) / len(run["rounds"][0]["agents"]) for run in runs),
        **{
            kind: [_mean([run["rounds"][r]["distance"][kind] for run in runs]) for r in range(rounds)]
            for kind in ("raw", "aligned")
        },
        **{
            kind: [_mean([a[kind] for run in runs for a in run["rounds"][r]["agents"]]) for r in range(rounds)]
            for kind in ("fixed", "correlation")
        },
        "seconds": {
            what: fmean(_seconds(run["rounds"][first:], what) for run in runs)
            for what, first in (("train", int(runs[0]["warm_up"] is not None)), ("merge", 0), ("evaluate", 0))
        },
        "warm_up": _mean([None if run["warm_up"] is None else run["warm_up"]["seconds"] for run in runs]),
    }


def _table(node: AgentsNode, found: dict[str, dict[str, Any]]) -> Table:
    shown = _shown(node, found)
    header = [
        *("", *(f"after {k}" for k in shown), "trained", "± agents", "± seeds", "sent an agent", "distance"),
        *("aligned", "fixed", "training s", "merging s", "seeds"),
    ]
    rows = [
        [
            node.methods[name].label,
            *(_cell(numbers["merged"], k - 1) for k in shown),
            _cell(numbers["trained"], -1),
            _cell(numbers["over_agents"], -1),
            _cell(numbers["over_seeds"], -1),
            size(numbers["bytes"]),
            _cell(numbers["raw"], -1, "{:.3f}"),
            _cell(numbers["aligned"], -1, "{:.3f}"),
            _cell(numbers["fixed"], -1, "{:.2f}"),
            f"{numbers['seconds']['train']:.0f}",
            f"{numbers['seconds']['merge']:.1f}",
            str(len(numbers["seeds"])),
        ]
        for name, numbers in found.items()
    ]
    return Table("Test accuracy, %", header, rows)


def _differences(node: AgentsNode, against: str, found: dict[str, dict[str, Any]]) -> Table:
    shown, base = _shown(node, found), found[against]
    header = ["", *(f"after {k}" for k in shown), "bytes", "seeds"]
    rows = []
    for name, numbers in found.items():
        seeds = [seed for seed in numbers["seeds"] if seed in base["seeds"]]
        if name == against or not seeds:
            continue
        cells = []
        for k in shown:
            mine, theirs = ([_at(by, seed, k) for seed in seeds] for by in (numbers, base))
            points = [x - y for x, y in zip(mine, theirs, strict=True) if x is not None and y is not None]
            cells.append(f"{fmean(points):+.1f}{_plus_minus(points)}" if points else "")
        ratio = f"{numbers['bytes'] / base['bytes']:.2f}" if base["bytes"] else ""
        rows.append([node.methods[name].label, *cells, ratio, str(len(seeds))])
    title = f"Against {node.methods[against].label}: points of accuracy, seed by seed, and times its bytes"
    return Table(title, header, rows)


def _at(numbers: dict[str, Any], seed: int, k: int) -> float | None:
    values: list[float | None] = numbers["merged_by_seed"][numbers["seeds"].index(seed)]
    return values[k - 1] if k <= len(values) else None


def _shown(node: AgentsNode, found: dict[str, dict[str, Any]]) -> list[int]:
    longest = max((len(numbers["merged"]) for numbers in found.values()), default=0)
    return [k for k in node.shown if k <= longest]


def _setting(node: AgentsNode, records: dict[str, list[Record]]) -> str:
    """How it was measured, in words."""
    config = node.config(next(iter(node.chosen)), node.seeds[0])
    runs = [run for found in records.values() for run in found]
    warm = {run["warm_up"]["kept"]: run["warm_up"]["seconds"] for run in runs if run["warm_up"] is not None}
    alone = ""
    if warm:
        alone = (
            f" {config.warmup_epochs:g} epochs alone come before the first merge, the same for all methods "
            f"({sum(warm.values()):.0f} s in all, trained once)."
        )
    return (
        f"{_words(config)}{alone} After k: mean test accuracy over agents and seeds in percent, right after the "
        "merge of round k, counted from 1; methods that mix with every batch, and those that never merge, are "
        "judged at the same places, after as many epochs. Trained: before the last merge. ± agents: standard "
        "deviation over the agents of a run, mean over seeds; ± seeds: over seeds, of the mean over agents; both "
        "after the last merge. Sent: bytes of models that an agent really sent. Distance: root mean square "
        "distance of agents from their mean, as a share of its norm; aligned: with their units in one order. "
        "Fixed: share of units that the last matching left in their places. Seconds: of one thread, for all "
        "agents, without the epochs alone and without judging."
    )


def _words(config: RunConfig) -> str:
    data, start = config.data, "the same weights" if config.same_start else "weights of their own"
    alpha = f" (alpha {data.alpha:g})" if data.alpha is not None else ""
    items = f", {data.items:,} examples each at most" if data.items is not None else ""
    return (
        f"{config.agents} agents, {config.topology.kind}, {config.topology.weights} weights; split {data.split}{alpha}"
        f"{items}; {start}; {config.rounds} rounds of {config.local_epochs:g} epochs, {config.optimizer.name} at "
        f"{config.optimizer.lr:g}, batch {config.batch}."
    )


def _records(node: AgentsNode, method: str, out: Path) -> list[Record]:
    paths = [record_path(out, method, seed) for seed in node.seeds]
    return [read_record(path) for path in paths if path.is_file()]


def _means(run: Record, when: str, rounds: int) -> list[float | None]:
    return [_mean(accuracies(line, when)) for line in run["rounds"][:rounds]]


def _seconds(lines: Sequence[dict[str, Any]], what: str) -> float:
    return float(sum(agent["seconds"][what] for line in lines for agent in line["agents"]))


def _there(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    there = _there(values)
    return fmean(there) if there else None


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _plus_minus(values: Sequence[float]) -> str:
    return f" ± {stdev(values):.1f}" if len(values) > 1 else ""


def _cell(values: Sequence[float | None], place: int, form: str = "{:.1f}") -> str:
    value = values[place] if -len(values) <= place < len(values) else None
    return "" if value is None else form.format(value)

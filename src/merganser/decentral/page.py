"""A run's journal as tables: rounds of one run, and several seeds of one configuration side by side.

Spread over agents and spread over seeds are two things, and stand apart: the first says how far agents of one run
differ, the second how far the mean over agents moves when everything is drawn anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from merganser.decentral.words import RunConfig
from merganser.errors import ParameterError

#: One round as the journal has it.
Line = dict[str, Any]

HEADER = (
    "round", "loss", "trained, %", "merged, %", "distance", "aligned", "fixed", "correlation", "sent", "lost",
    "refused",
)  # fmt: skip
EXPLAINED = (
    "Trained, merged: test accuracy before and after the merge of the round, mean over agents ± standard deviation "
    "over agents. Distance: root mean square distance of agents from their mean, as a share of its norm; aligned: "
    "after their units are brought into one order. Fixed: share of units that matching left in their places; "
    "correlation: of matched units. Sent: bytes of models that all agents really sent. Lost: edges that did not count, "
    "seen from either end. Refused: snapshots, by kind."
)


def accuracies(line: Line, when: str) -> list[float]:
    """Test accuracy of every agent in percent, "trained" or "merged"; agents that have none are left out."""
    found = [(record[when] or {}).get("accuracy") for record in line["agents"]]
    return [value for value in found if value is not None]


def sent_bytes(lines: Sequence[Line]) -> int:
    """Bytes of models that all agents sent in some rounds."""
    return sum(record["sent"]["bytes"] for line in lines for record in line["agents"])


def rejections(lines: Sequence[Line]) -> dict[str, int]:
    """Rejected snapshots by kind, in some rounds."""
    found: dict[str, int] = {}
    for line in lines:
        for record in line["agents"]:
            for kind, count in record["rejected"].items():
                found[kind] = found.get(kind, 0) + count
    return dict(sorted(found.items()))


def row(line: Line) -> tuple[str, ...]:
    """Cells of a round, as `HEADER` names them."""
    records = line["agents"]
    missing = sum(record["missing"] for record in records)
    rejected = ", ".join(f"{kind} {count}" for kind, count in rejections([line]).items())
    return (
        str(line["round"]),
        _mean([record["loss"] for record in records], "{:.3f}"),
        spread(accuracies(line, "trained")),
        spread(accuracies(line, "merged")),
        _number(line["distance"]["raw"], "{:.4f}"),
        _number(line["distance"]["aligned"], "{:.4f}"),
        _mean([record["fixed"] for record in records], "{:.2f}"),
        _mean([record["correlation"] for record in records], "{:.2f}"),
        size(sent_bytes([line])),
        str(missing) if missing else "",
        rejected,
    )


def markdown(config: RunConfig, lines: Sequence[Line]) -> str:
    """The report of a run as Markdown text."""
    head = f"| {' | '.join(HEADER)} |\n|{'|'.join('---' if i == 0 else '--:' for i in range(len(HEADER)))}|\n"
    body = "".join(f"| {' | '.join(row(line))} |\n" for line in lines)
    return f"# {config.name}\n\n{outcome(lines)}\n\n{head}{body}\n{EXPLAINED}\n\n{setting(config)} {cost(lines)}\n"


def outcome(lines: Sequence[Line]) -> str:
    """The answer of a run in a sentence."""
    if not lines:
        return "No round is done."
    last = lines[-1]
    merged, agents = spread(accuracies(last, "merged")), len(last["agents"])
    return (
        f"After round {last['round']}: {merged} % test accuracy over {agents} agents after the merge, "
        f"{spread(accuracies(last, 'trained'))} % before it; {size(sent_bytes(lines))} sent in all."
    )


def setting(config: RunConfig) -> str:
    """How it was done, in words."""
    what = f"rule {config.merge.rule}" if config.algorithm == "merge" else config.algorithm
    warm = f" after {config.warmup_epochs:g} epochs alone" if config.warmup_epochs else ""
    alpha = f" {config.data.alpha:g}" if config.data.alpha is not None else ""
    start = "the same weights" if config.same_start else "weights of their own"
    return (
        f"{config.agents} agents, {config.topology.kind}, {what}; {config.rounds} rounds of {config.local_epochs:g} "
        f"epochs{warm}; split {config.data.split}{alpha}; all start from {start}; {config.optimizer.name}, learning "
        f"rate {config.optimizer.lr:g}, batch {config.batch}; BatchNorm "
        f"{'taken again after every merge' if config.recalibrate else 'averaged'}; seed {config.seed}."
    )


def cost(lines: Sequence[Line]) -> str:
    """Seconds, over all agents, in words."""
    seconds = {
        what: sum(record["seconds"][what] for line in lines for record in line["agents"])
        for what in ("train", "merge", "evaluate")
    }
    share = f" ({100 * seconds['merge'] / seconds['train']:.0f} % of it)" if seconds["train"] else ""
    return (
        f"Training took {seconds['train']:.1f} s over all agents, everything that merging needs "
        f"{seconds['merge']:.1f} s{share}, judging {seconds['evaluate']:.1f} s."
    )


SEEDS_HEADER = ("run", "seeds", "merged, %", "over agents", "over seeds", "sent")


def over_seeds(runs: Sequence[tuple[RunConfig, Sequence[Line]]]) -> list[tuple[str, ...]]:
    """A row for every configuration, seeds apart: accuracy after the last merge that all of its seeds have done.

    Args:
        runs: configurations and journals.

    Raises:
        ParameterError: If a run has no round.
    """
    groups: dict[str, list[tuple[RunConfig, Sequence[Line]]]] = {}
    for config, lines in runs:
        if not lines:
            raise ParameterError(f"the run {config.name}, seed {config.seed}, has no round yet")
        groups.setdefault(config.model_copy(update={"seed": 0}).model_dump_json(), []).append((config, lines))
    found: list[tuple[str, ...]] = []
    for group in groups.values():
        last = min(len(lines) for _, lines in group) - 1
        values = [v for v in (accuracies(lines[last], "merged") for _, lines in group) if v]
        means = [statistics.fmean(v) for v in values]
        within = [statistics.stdev(v) for v in values if len(v) > 1]
        found.append(
            (
                f"{group[0][0].name}, round {group[0][1][last]['round']}",
                ", ".join(str(config.seed) for config, _ in group),
                f"{statistics.fmean(means):.1f}" if means else "",
                f"± {statistics.fmean(within):.1f}" if within else "",
                f"± {statistics.stdev(means):.1f}" if len(means) > 1 else "",
                size(statistics.fmean([sent_bytes(lines[: last + 1]) for _, lines in group])),
            )
        )
    return found


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation.

    >>> spread([90.0, 92.0]), spread([50.0]), spread([])
    ('91.0 ± 1.4', '50.0', '')
    """
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def size(count: float) -> str:
    """Bytes for people.

    >>> size(0), size(999), size(1_500_000)
    ('0', '999 B', '1.5 MB')
    """
    if not count:
        return "0"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mean(values: Sequence[float | None], form: str) -> str:
    there = [value for value in values if value is not None]
    return form.format(statistics.fmean(there)) if there else ""

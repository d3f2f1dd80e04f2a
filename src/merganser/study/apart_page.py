"""Studies of networks that started apart as files for people: report.md, scores.json and pictures.

What is there is shown: a study that is not finished has a page too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from merganser.align.surface import Surface
from merganser.report import line_png
from merganser.study import halves, lines
from merganser.study.drawing import points_png, surface_png
from merganser.study.records import read_record
from merganser.study.rules import label
from merganser.study.words_apart import DomainsNode, HalvesNetwork, HalvesNode, LinesNetwork, LinesNode

#: What draws a picture, by its name.
Drawings = dict[str, Callable[[], bytes]]

HALVES_HEADER = (
    *("", "joint %", "task A %", "task B %", "per task %", "pairs"),
    *("size", "statistics", "pictures", "balance", "s"),
)
LINES_HEADER = (
    *("", "barrier, nats", "loss at the ends", "in the middle", "accuracy at the ends %", "in the middle %"),
    *("pairs", "statistics", "pictures"),
)


@dataclass(frozen=True)
class Table:
    """The rows of one network.

    Attributes:
        title: the network.
        header: of the columns.
        rows: cells.
    """

    title: str
    header: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, the first column to the left."""
        head = [f"| {' | '.join(self.header)} |", f"| --- |{' ---: |' * (len(self.header) - 1)}"]
        return "\n".join([f"## {self.title}", "", *head, *(f"| {' | '.join(row)} |" for row in self.rows)])


def write_page(node: HalvesNode | LinesNode, out: Path, *, draws: bool = True) -> list[Table]:
    """Write the files beside a study's records.

    Args:
        node: the study.
        out: its folder.
        draws: pictures, too.

    Returns:
        What report.md shows.

    Raises:
        StateError: If a record is damaged.
        MerganserError: If matplotlib is not installed.
    """
    tables, found, pictures = _halves(node, out) if isinstance(node, HalvesNode) else _lines(node, out)
    shown = [f"![{name}]({name}.png)" for name in pictures if draws]
    for name, draw in pictures.items() if draws else ():
        (out / f"{name}.png").write_bytes(draw())
    text = "\n\n".join(
        [f"# {node.title}", _setting(node, [t.title for t in tables]), *(t.markdown() for t in tables), *shown]
    )
    (out / "report.md").write_text(text + "\n", "utf-8")
    (out / "scores.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return tables


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and number of pairs."""
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None, "pairs": len(values)}


def _cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean and deviation over pairs."""
    it = spread(values)
    return f"{it['mean']:.{digits}f}" + ("" if it["deviation"] is None else f" ± {it['deviation']:.{digits}f}")


def _setting(node: HalvesNode | LinesNode, shown: Sequence[str]) -> str:
    """How it was measured, in words, with the training of the networks that are shown."""
    p, trainings = node.pictures, _trainings(n for n in node.networks.values() if n.label in shown)
    judged = "all" if p.test is None else f"{p.test:,}"
    shared = (
        f"Mean ± standard deviation over pairs; n = {judged} test pictures. Labels are used to train and to judge, and "
        f"by no rule. Pictures: how many a rule looks at; units are compared on {p.compare:,} {_whose(node)}, "
        f"statistics measured on {p.measure:,} others"
    )
    if isinstance(node, LinesNode):
        said = (
            "Two networks learn one task from two seeds. Barrier: the largest rise of the mean cross entropy on the "
            f"line between them above the straight line between its ends, {node.points} places, in nats. {shared}."
        )
        return f"{said} {trainings}"
    zips, balances = node.zipping, ", ".join(f"{x:g}" for x in node.balances)
    learnt = (
        "Two networks learn a half of the classes each, from different starts; a split is a seed of halves, weights "
        "and codes. Joint: the right one of all classes; task: the right one of a half, for pictures of that half. "
    )
    if isinstance(node, DomainsNode):
        pairs = "; ".join(f"{i}: {a} and {b}" for i, (a, b) in enumerate(node.pairs))
        learnt = (
            "Two networks learn the same classes in a domain each, from different starts; a split is a seed of weights "
            f"and codes, and a pair of domains ({pairs}). Joint: test pictures of both domains; task: those of one. "
        )
    said = (
        f"{learnt}"
        f"Logits are {node.codes.scale:g} times the cosine with fixed orthonormal codes of width {node.codes.width}. "
        f"{shared}, balances chosen without labels on {p.held_out:,} held-out ones (nearest to the parents' mean "
        f"answer; tried: {balances}). Zips: repeat {zips.repeat:g}, within {zips.within:g}; in part: {zips.share:g} of "
        "the groups. BatchNorm of the networks themselves is measured on both sides, too. Size: FLOPs and "
        "parameters of what was made, in those of one network, where they are not 1. s: of merging, without judging; "
        "what rules share counts for the first."
    )
    return f"{said} {trainings}"


def _whose(node: HalvesNode | LinesNode) -> str:
    """What pictures rules look at."""
    if isinstance(node, LinesNode) or node.seen is None:
        return "training pictures"
    where = node.seen.model_dump()
    return f"pictures of other data ({where.get('file') or where.get('path') or node.seen.kind})"


def _trainings(networks: Iterable[HalvesNetwork | LinesNetwork]) -> str:
    """How every network was trained."""
    said = []
    for network in networks:
        t = network.training
        if isinstance(network, HalvesNetwork):
            seeds = f"splits {', '.join(map(str, network.splits))}"
        else:
            seeds = f"seeds {', '.join(f'{a} and {b}' for a, b in network.pairs)}"
        count = "" if t.items is None else f" of {t.items:,} pictures"
        how = f"AdamW, rate {t.lr:g}, batch {t.batch}, decay {t.weight_decay:g}"
        said.append(f"{network.label}: {t.epochs} epochs{count}, {how}; {seeds}")
    return ". ".join(said) + "."


def _halves(node: HalvesNode, out: Path) -> tuple[list[Table], dict[str, Any], Drawings]:
    tables: list[Table] = []
    found: dict[str, Any] = {}
    joint: dict[str, dict[str, tuple[float, float]]] = {}
    for name, network in node.networks.items():
        records = _records(halves.pair_path(out, name, split) for split in network.splits)
        if not records:
            continue
        rows, found[name] = [], {}
        for side in halves.SIDES:
            alone = [record["alone"][side] for record in records]
            rows.append([f"network {side.upper()} alone", *_accuracies(alone), "", "", "", "", ""])
            found[name][f"alone_{side}"] = _spreads(alone)
        for rule in network.rules or node.rules:
            measured = [record["rules"][rule] for record in records if rule in record["rules"]]
            if not measured:
                continue
            balances = ", ".join(f"{m['balance']:g}" for m in measured if m["balance"] is not None)
            looked = f"{sum(measured[0]['pictures'].values()):,}"
            seconds = f"{fmean(m['wall_s'] for m in measured):.1f}"
            size = " / ".join(f"{fmean(x):.2f}" for x in zip(*(m.get("size", ()) for m in measured), strict=True))
            name_of = label(rule)
            rows.append([name_of, *_accuracies(measured), size, measured[0]["statistics"], looked, balances, seconds])
            about = {"statistics": measured[0]["statistics"], "pictures": measured[0]["pictures"], "labels": False}
            found[name][rule] = {**_spreads(measured), **about, "balances": [m["balance"] for m in measured]}
            it = found[name][rule]["joint"]
            joint.setdefault(network.label, {})[name_of] = (it["mean"], it["deviation"] or 0.0)
        tables.append(Table(network.label, HALVES_HEADER, rows))
    pictures: Drawings = {"joint": lambda: points_png(joint, x_label="joint accuracy, %")} if joint else {}
    if (path := out / "surface.json").is_file() and node.surface is not None:
        known = read_record(path)
        plane = Surface(known["corners"], known["across"], known["up"], known["values"])
        titles = [f"task {side.upper()}, n = {n:,}" for side, n in zip(halves.SIDES, known["n"], strict=True)]
        corners = ("A", "B, aligned", "zipped")
        loss = "cross entropy, nats"
        pictures["surface"] = lambda: surface_png(plane, titles=titles, corners=corners, label=loss)
    return tables, found, pictures


def _accuracies(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [_cell([m[key]["value"] for m in measured]) for key in ("joint", "task_a", "task_b")]
    return [*cells, _cell([m["per_task"] for m in measured]), str(len(measured))]


def _spreads(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("joint", "task_a", "task_b")
    found = {key: {**spread([m[key]["value"] for m in measured]), "n": measured[0][key]["n"]} for key in keys}
    return {**found, "per_task": spread([m["per_task"] for m in measured])}


def _lines(node: LinesNode, out: Path) -> tuple[list[Table], dict[str, Any], Drawings]:
    tables: list[Table] = []
    found: dict[str, Any] = {}
    pictures: Drawings = {}
    for name, network in node.networks.items():
        records = _records(lines.pair_path(out, name, seeds) for seeds in network.pairs)
        rows, curves = [], {}
        for rule in node.rules:
            measured = [record["rules"][rule] for record in records if rule in record["rules"]]
            if not measured:
                continue
            middle = len(measured[0]["places"]) // 2
            ends = [(m["losses"][0] + m["losses"][-1]) / 2 for m in measured]
            right = [(m["accuracies"][0] + m["accuracies"][-1]) / 2 for m in measured]
            rows.append(
                [
                    lines.LABELS[rule],
                    _cell([m["barrier"] for m in measured], 2),
                    _cell(ends, 2),
                    _cell([m["losses"][middle] for m in measured], 2),
                    _cell(right),
                    _cell([m["accuracies"][middle] for m in measured]),
                    str(len(measured)),
                    measured[0]["statistics"],
                    f"{sum(measured[0]['pictures'].values()):,}",
                ]
            )
            found.setdefault(name, {})[rule] = {
                "barrier": spread([m["barrier"] for m in measured]),
                "middle_accuracy": spread([m["accuracies"][middle] for m in measured]),
                "n": measured[0]["n"],
                "statistics": measured[0]["statistics"],
                "pictures": measured[0]["pictures"],
                "labels": False,
            }
            mean = [fmean(losses) for losses in zip(*(m["losses"] for m in measured), strict=True)]
            curves[lines.LABELS[rule]] = (measured[0]["places"], mean)
        if rows:
            tables.append(Table(network.label, LINES_HEADER, rows))
            across = f"t, {network.label}"
            pictures[f"line-{name}"] = partial(line_png, curves, x_label=across, y_label="cross entropy, nats")
    return tables, found, pictures


def _records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [read_record(path) for path in paths if path.is_file()]

"""A decentralised run as files for people: report.md, report.html with its pictures inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merganser.decentral.page import (
    EXPLAINED,
    HEADER,
    Line,
    accuracies,
    cost,
    markdown,
    outcome,
    rejections,
    row,
    sent_bytes,
    setting,
    size,
)
from merganser.decentral.words import RunConfig
from merganser.errors import MerganserError
from merganser.report import accuracy_curve_png, figure_html, html_page, table_html


def write_report(config: RunConfig, lines: Sequence[Line], folder: Path) -> None:
    """Write report.md, and report.html with its pictures where matplotlib is installed, beside a run's journal."""
    (folder / "report.md").write_text(markdown(config, lines), "utf-8")
    if lines:
        try:
            drawn = pictures(lines)
        except MerganserError:
            drawn = {}
        for name, png in drawn.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / "report.html").write_text(page(config, lines, drawn), "utf-8")


def pictures(lines: Sequence[Line]) -> dict[str, bytes]:
    """Accuracy before and after every merge, and distances between agents, as PNG.

    Raises:
        MerganserError: If matplotlib is not installed.
    """
    found = {}
    curves = {name: [_mean(accuracies(line, when)) for line in lines] for name, when in _WHEN.items()}
    if all(curves.values()):
        found["accuracy"] = accuracy_curve_png(
            curves, x_label="rounds done", y_label="test accuracy, mean over agents, %"
        )
    distances = {kind: [line["distance"][kind] for line in lines] for kind in ("raw", "aligned")}
    shares = {
        kind: [100 * value for value in values]
        for kind, values in distances.items()
        if all(v is not None for v in values)
    }
    if shares:
        label = "distance from the mean of all agents, % of its norm"
        found["distance"] = accuracy_curve_png(shares, x_label="rounds done", y_label=label)
    return found


_WHEN = {"after the merge": "merged", "after training": "trained"}


def page(config: RunConfig, lines: Sequence[Line], drawn: dict[str, bytes]) -> str:
    """The whole report as HTML text."""
    alts = {
        "accuracy": "Test accuracy before and after the merge of every round, mean over agents",
        "distance": "Distance of agents from their mean after every round",
    }
    figures = "".join(figure_html(png, alt=alts[name]) for name, png in drawn.items())
    agents = [
        [
            str(record["agent"]),
            _cell(record["trained"]),
            _cell(record["merged"]),
            str(sum(line["agents"][i]["sent"]["snapshots"] for line in lines)),
            size(sum(line["agents"][i]["sent"]["bytes"] for line in lines)),
            str(record["incarnation"] + 1),
        ]
        for i, record in enumerate(lines[-1]["agents"])
    ]
    refused = ", ".join(f"{kind} {count}" for kind, count in rejections(lines).items()) or "none"
    sections = [
        ("Rounds", figures + table_html(HEADER, [row(line) for line in lines]) + f"<p>{EXPLAINED}</p>"),
        (
            "Agents",
            table_html(("agent", "trained, %", "merged, %", "models sent", "bytes", "starts"), agents)
            + f"<p>Last round. Rejected snapshots in all: {refused}.</p>",
        ),
        ("How it was done", f"<p>{setting(config)} {cost(lines)} {size(sent_bytes(lines))} were sent.</p>"),
    ]
    return html_page(config.name, sections, lead=outcome(lines))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _cell(numbers: dict[str, float | None] | None) -> str:
    value = (numbers or {}).get("accuracy")
    return "" if value is None else f"{value:.1f}"

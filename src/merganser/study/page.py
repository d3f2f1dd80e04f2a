"""A study as files for people: report.md, report.html with its pictures inside, scores.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from merganser.report import PALETTE, accuracy_curve_png, figure_html, html_page, layers_png, matrix_png, table_html
from merganser.study.composing import Plan
from merganser.study.interference import interference
from merganser.study.networks import folder_of
from merganser.study.summary import (
    COST_HEADER,
    HEADER,
    Summary,
    as_json,
    cost_rows,
    markdown,
    rows,
    summarise,
    task_rows,
)

EXPLAINED = (
    "ACC: mean accuracy over all tasks after the last arrival, mean ± standard deviation over orders of arrival; "
    "s.e.: its standard error over test items, first order. BWT: how accuracy on a task changed between its own "
    "arrival and the end, in points, mean over all but the last task; (1/T): the same sum over the number of tasks."
)
COST = (
    "Add: wall seconds of one arrival. State: on disk at the end; methods of sums share one. Peak: predicted memory "
    "beside Python and torch."
)
OVERLAP = (
    "Overlap: how much of the 1/16 leading input directions two experts' changes share, mean over pairs; chance: what "
    "random directions would share. Cosine: between changes, mean over pairs. Where overlap is high, experts speak to "
    "the same inputs, and a merge has to choose between them."
)
AT_MOST = len(PALETTE) - 1


def write_report(plan: Plan, out: Path) -> Summary:
    """Write the three files beside a study's records.

    Raises:
        StateError: If there are no records.
        MerganserError: If matplotlib is not installed.
    """
    summary = summarise(plan, out)
    layers = _layers(plan, out)
    (out / "scores.json").write_text(json.dumps(as_json(summary), indent=2) + "\n", "utf-8")
    (out / "report.md").write_text(markdown(summary, setting(plan)), "utf-8")
    (out / "report.html").write_text(page(plan, summary, layers), "utf-8")
    for name, png in {**pictures(summary), **layers}.items():
        (out / f"{name}.png").write_bytes(png)
    return summary


def setting(plan: Plan) -> str:
    """How it was measured, in words."""
    seeds = ", ".join(map(str, plan.study.seeds))
    chosen = "; ".join(f"{m.label}: {m.source}" for m in plan.methods.values() if m.source)
    return (
        f"Models: {plan.models.name}; tasks: {plan.tasks.name}; judged on the {plan.study.split} split, all items "
        f"for ACC and BWT, the first {plan.study.curve_items} a task for the curve. Orders of arrival: seeds {seeds}. "
        f"{EXPLAINED} {COST} Settings: {chosen}."
    )


def pictures(summary: Summary) -> dict[str, bytes]:
    """Curves, some methods a chart, best first."""
    methods = list(summary.methods.values())
    references = {
        "experts": sum(summary.experts.values()) / len(summary.experts),
        "zero-shot": sum(summary.zero_shot.values()) / len(summary.zero_shot),
    }
    found = {}
    for start in range(0, len(methods), AT_MOST):
        curves = {m.label: m.curve for m in methods[start : start + AT_MOST]}
        png = accuracy_curve_png(curves, references=references, x_label="experts merged", y_label="mean accuracy, %")
        found[f"curve-{start // AT_MOST + 1}"] = png
    return found


def _layers(plan: Plan, out: Path) -> dict[str, bytes]:
    """Interference of the experts as a picture; measured once, kept in interference.json."""
    path = out / "interference.json"
    if not path.is_file():
        experts = [str(folder_of(ref)) for ref in plan.models.models.values()]
        found = interference(str(folder_of(plan.models.base)), experts, plan.models.freeze) if len(experts) > 1 else []
        path.write_text(json.dumps([asdict(layer) for layer in found], indent=1) + "\n", "utf-8")
    layers = json.loads(path.read_text("utf-8"))
    if not layers:
        return {}
    lines = {key: [layer[key] for layer in layers] for key in ("overlap", "chance", "cosine")}
    return {"interference": layers_png(lines, y_label="mean over pairs of experts")}


def page(plan: Plan, summary: Summary, layers: dict[str, bytes]) -> str:
    """The whole report as HTML text."""
    top = sum(summary.experts.values()) / len(summary.experts)
    best = next(iter(summary.methods.values()), None)
    lead = f"{len(summary.tasks)} experts arrive one by one and are merged. Each on its own task reaches {top:.1f} %."
    if best is not None:
        lead += f" The best single merged model: {best.label}, {best.acc.mean:.1f} % on the mean of all tasks."
    header, by_task = task_rows(summary)
    curves = "".join(
        figure_html(png, alt="Mean accuracy over the number of merged experts, by method")
        for png in pictures(summary).values()
    )
    sections = [
        ("Methods", table_html(HEADER, rows(summary), strong_row=2) + f"<p>{EXPLAINED}</p>"),
        ("Accuracy after each arrival", curves + "<p>Mean over all tasks, also those that have not arrived.</p>"),
        ("Every task at the end", table_html(header, by_task)),
        ("Every task after every arrival", _matrices(summary)),
        ("Interference between experts", _interference(layers)),
        ("Cost", table_html(COST_HEADER, cost_rows(summary)) + f"<p>{COST}</p>"),
        ("How it was measured", f"<p>{setting(plan)}</p>"),
    ]
    return html_page(summary.title, sections, lead=lead)


def _interference(layers: dict[str, bytes]) -> str:
    figures = "".join(figure_html(png, alt="Overlap of experts' changes by layer") for png in layers.values())
    return (figures or "<p>There is one expert, or no linear weight.</p>") + f"<p>{OVERLAP}</p>"


def _matrices(summary: Summary) -> str:
    figures = "".join(
        figure_html(
            matrix_png(
                m.matrix,
                row_labels=[str(i + 1) for i in range(len(m.matrix))],
                column_labels=[task[:9] for task in m.order],
                row_title="experts merged",
                column_title="accuracy on task, %",
                staircase=True,
            ),
            alt=f"Accuracy on each task after each arrival, {m.label}",
            caption=m.label,
        )
        for m in summary.methods.values()
    )
    return (
        f'<p>First order. On and below the line: tasks whose expert has arrived.</p><div class="grid">{figures}</div>'
    )

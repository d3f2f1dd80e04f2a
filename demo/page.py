"""The page that the demo leaves behind: demo/report.html, one file that needs nothing else."""

from __future__ import annotations

import html
import io

from matplotlib.figure import Figure
from results import HEADER, LABELS, REMOVAL_HEADER, Results, difference, mean, removal_rows, rows
from tasks import TASKS, plain_digits, seen_by

from merganser.evaluate import acc
from merganser.report import accuracy_curve_png, figure_html, html_page, matrix_png, table_html


def digit_strip_png(index: int = 3) -> bytes:
    """One test digit as the base knows it and as each task shows it."""
    _, test = plain_digits()
    figure = Figure(figsize=(6.2, 2.75), facecolor="white")
    places = {"plain": 1} | {task: i + 2 + (i >= 4) for i, task in enumerate(TASKS)}  # plain, then two rows of four
    for task, place in places.items():
        axes = figure.add_subplot(2, 5, place)
        axes.imshow(seen_by(task, test).images[index].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(task, fontsize=10, color="#1f2933", pad=4)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#d9dee4")
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.92, wspace=0.12, hspace=0.2)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200)
    return out.getvalue()


def page(results: Results, history: list[tuple[str, float]]) -> str:
    """The whole report as HTML text."""
    R = results.arrivals.accuracy
    best = acc(R["gram"])
    first, last = results.arrivals.first_bytes["gram"], results.arrivals.state_bytes["gram"]
    lead = (
        f"Eight fine-tuned networks arrived one by one. One folder of running sums always held one merged network; "
        f"after the eighth it reads all eight tasks at {best:.1f} % (base {mean(results.zero_shot):.1f} %, "
        f"each expert on its own task {mean(results.experts):.1f} %). No data was used for merging."
    )
    return html_page(
        "Merging eight networks as they arrive",
        [
            ("The tasks", _tasks()),
            ("Accuracy after each arrival", _curve(results)),
            ("After eight arrivals", _table(results, first, last)),
            ("Every task after every arrival", _matrices(R)),
            ("Taking one expert out again", _removal(results)),
            ("What was run", _commands(history)),
        ],
        lead=lead,
    )


def _tasks() -> str:
    words = (
        "<p>scikit-learn's handwritten digits, 8 x 8 pixels. Each task lays the sixteen patches of 2 x 2 pixels out "
        "in an order of its own. The base learnt the plain digits and 15 images of each task; an expert is the base "
        "fine-tuned on one task. All share one fixed head: ten vectors that stand for the ten words, never trained.</p>"
    )
    return words + figure_html(digit_strip_png(), alt="The same digit, plain and as each of the eight tasks shows it")


def _curve(results: Results) -> str:
    curves = {LABELS[name]: [mean(row) for row in R] for name, R in results.arrivals.accuracy.items()}
    references = {"experts": mean(results.experts), "zero-shot": mean(results.zero_shot)}
    png = accuracy_curve_png(curves, references=references, x_label="experts merged", y_label="accuracy, %")
    caption = "Mean over all eight tasks, also those that have not arrived. Numbers: after the eighth."
    return figure_html(png, alt="Mean accuracy over the number of merged experts, by method", caption=caption)


def _table(results: Results, first: int, last: int) -> str:
    table = table_html(HEADER, rows(results), strong_row=1)
    return (
        f"{table}<p>ACC: mean accuracy over the tasks at the end. BWT: how accuracy on a task changed between its own "
        "arrival and the end, in points, mean over the first seven tasks; (1/T): the same sum divided by eight. State: "
        "bytes on disk after eight experts; the folder that gram, task arithmetic and average share held "
        f"{first / 1e6:.3f} MB after one and {last / 1e6:.3f} MB after eight. Add: wall seconds of one command, most "
        "of them for starting Python and loading torch; two ran at a time. One training run, one order of arrival.</p>"
    )


def _matrices(R: dict[str, list[list[float]]]) -> str:
    numbers = [str(i) for i in range(1, len(TASKS) + 1)]
    figures = "".join(
        figure_html(
            matrix_png(
                matrix,
                row_labels=numbers,
                column_labels=numbers,
                low=20,
                high=100,
                row_title="experts merged",
                column_title="accuracy on task, %",
                staircase=True,
            ),
            alt=f"Accuracy on each task after each arrival, {LABELS[name]}",
            caption=LABELS[name],
        )
        for name, matrix in R.items()
    )
    words = "<p>On and below the line: tasks whose expert has arrived. All four share one colour scale.</p>"
    return f'{words}<div class="grid">{figures}</div>'


def _removal(results: Results) -> str:
    table = table_html(REMOVAL_HEADER, removal_rows(results))
    return (
        f"{table}<p>The first is the state of all eight; from a copy of it the expert was removed; the third never had "
        f"it. Largest difference between the last two, relative to the largest entry of each tensor: "
        f"<b>{difference(results.removal.weights_differ)}</b> in the merged weights, "
        f"<b>{difference(results.removal.sums_differ)}</b> in the sums.</p>"
    )


def _commands(history: list[tuple[str, float]]) -> str:
    lines = "\n".join(f"{html.escape(line)}    # {wall_s:.1f} s" for line, wall_s in history)
    return (
        f"<p>{len(history)} commands, in <code>demo/work</code>, two at a time.</p>"
        f"<details><summary>Show them</summary><pre><code>{lines}</code></pre></details>"
    )

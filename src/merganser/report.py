"""Scores become one page: curves and matrices as PNG bytes, tables and the page itself as HTML text.

A page is one file that needs nothing else: inline styles, images as data URIs, nothing loaded from a network.
Every function is pure; who calls it decides where the bytes go. matplotlib comes with the extra `plots`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merganser.errors import MerganserError, ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow, told apart under every common kind of colour blindness; markers say it twice.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, RULE = "#1f2933", "#66717d", "#d9dee4"
DPI = 200


def accuracy_curve_png(
    curves: Mapping[str, Sequence[float]],
    *,
    references: Mapping[str, float] | None = None,
    x_label: str = "models merged",
    y_label: str = "mean accuracy, %",
) -> bytes:
    """Draw one line a method over the number of merged models, named at its right end.

    Args:
        curves: for each method its values after 1, 2, ... merges; at most seven methods.
        references: values that do not change, drawn as dashed lines.
        x_label: what the horizontal axis counts.
        y_label: what the vertical axis measures, with its unit.

    Returns:
        A PNG file.

    Raises:
        ParameterError: If there is no curve, a curve is empty, or there are more than seven.
        MerganserError: If matplotlib is not installed.
    """
    _check_curves(curves)
    references = references or {}
    longest = max(len(values) for values in curves.values())
    names = [*curves, *references]
    width, height, left, right = 6.2, 4.0, 0.62, 0.25 + 0.08 * max(len(f"{name} 99.9") for name in names)
    figure = blank_figure(width, height)
    axes = figure.add_axes((left / width, 0.13, max(width - left - right, 2.0) / width, 0.83))
    labels: list[tuple[float, str, str]] = []
    for name, value in references.items():
        axes.axhline(value, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        labels.append((value, name, FAINT))
    for (name, values), color, marker in zip(curves.items(), PALETTE, MARKERS, strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, marker=marker, markersize=5, linewidth=1.8, clip_on=False, zorder=3)
        labels.append((values[-1], name, color))
    axes.set_xlim(0.8, max(longest, 1.2))
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    quiet_axes(axes)
    _name_ends(axes, labels)
    return png_of(figure)


def line_png(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str) -> bytes:
    """Draw values along [0, 1], a line each, with a legend.

    Args:
        curves: places and values by name; at most seven.
        x_label: what the horizontal axis is.
        y_label: what the vertical axis measures, with its unit.

    Returns:
        A PNG file.

    Raises:
        ParameterError: If there is no curve, a curve is empty, or there are more than seven.
        MerganserError: If matplotlib is not installed.
    """
    _check_curves({name: values for name, (_, values) in curves.items()})
    figure = blank_figure(6.2, 4.0)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.83))
    for (name, (places, values)), color, marker in zip(curves.items(), PALETTE, MARKERS, strict=False):
        axes.plot(places, values, color=color, marker=marker, markersize=5, linewidth=1.8, label=name, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    quiet_axes(axes)
    axes.legend(frameon=False, labelcolor="linecolor")
    return png_of(figure)


def matrix_png(
    matrix: Sequence[Sequence[float]] | npt.NDArray[np.floating],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    low: float = 0.0,
    high: float = 100.0,
    row_title: str = "",
    column_title: str = "",
    staircase: bool = False,
) -> bytes:
    """Draw a matrix as a heat map with its numbers written in the cells; NaN stays blank.

    Args:
        matrix: the values, one row a label in `row_labels`.
        row_labels: names on the left.
        column_labels: names on top.
        low: value of the lightest colour; give several matrices the same range to compare them.
        high: value of the darkest colour.
        row_title: what the rows are.
        column_title: what the columns are.
        staircase: outline the diagonal and what lies below it: tasks that have been merged.

    Returns:
        A PNG file.

    Raises:
        ParameterError: If labels and matrix do not fit, or the range is empty.
        MerganserError: If matplotlib is not installed.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (len(row_labels), len(column_labels)) or not values.size:
        raise ParameterError(
            f"the matrix has shape {values.shape}, its labels ({len(row_labels)}, {len(column_labels)})",
            hint="give one label for each row and each column",
        )
    if not low < high:
        raise ParameterError(f"the colour range {low} to {high} is empty; low must be below high")
    rows, columns = values.shape
    figure = blank_figure(1.0 + 0.46 * columns, 0.85 + 0.40 * rows)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="YlGnBu", vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue = image.to_rgba(np.array([value]))[0, :3]
            color = "white" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.2 else INK
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9.5, color=color)
    slant: dict[str, Any] = (
        {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if max(map(len, column_labels)) > 4 else {}
    )
    axes.set_xticks(range(columns), labels=list(column_labels), fontsize=9.5, **slant)
    axes.set_yticks(range(rows), labels=list(row_labels), fontsize=9.5)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(column_title, color=INK)
    axes.set_ylabel(row_title, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if staircase:
        corners = [(j + side, j) for j in range(min(rows, columns)) for side in (0, 1)]
        x, y = zip(*corners, strict=True)
        axes.plot(np.array(x) - 0.5, np.array(y) - 0.5, color=INK, linewidth=2, solid_joinstyle="miter")
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
    figure.tight_layout(pad=0.4)
    return png_of(figure)


def layers_png(
    values: Mapping[str, Sequence[float]],
    *,
    x_label: str = "linear weights, in the order of their names",
    y_label: str = "",
) -> bytes:
    """Draw one line a quantity over the layers of a network.

    Args:
        values: for each quantity its value in every layer; at most seven quantities, all of one length.
        x_label: what the horizontal axis counts.
        y_label: what the vertical axis measures.

    Returns:
        A PNG file.

    Raises:
        ParameterError: If there is nothing to draw, too much, or lengths differ.
        MerganserError: If matplotlib is not installed.
    """
    lengths = {len(line) for line in values.values()}
    if len(lengths) != 1 or 0 in lengths or len(values) > len(PALETTE):
        raise ParameterError(f"layers need 1 to {len(PALETTE)} lines of one length; got lengths {sorted(lengths)}")
    figure = blank_figure(6.2, 3.0)
    axes = figure.add_subplot()
    for (name, line), color, marker in zip(values.items(), PALETTE, MARKERS, strict=False):
        steps = range(1, len(line) + 1)
        axes.plot(steps, line, color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    quiet_axes(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, 1.2), ncols=len(values))
    figure.tight_layout(pad=0.4)
    return png_of(figure)


def figure_html(png: bytes, *, alt: str, caption: str = "") -> str:
    """Wrap a PNG as a figure whose image is a data URI.

    Args:
        png: the bytes of the picture.
        alt: what it shows, for those who do not see it.
        caption: plain text below it.

    Returns:
        A `<figure>` element.

    >>> figure_html(b"...", alt="a dot")
    '<figure><img alt="a dot" src="data:image/png;base64,Li4u"></figure>'
    """
    data = base64.b64encode(png).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">{below}</figure>'


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]], *, strong_row: int | None = None) -> str:
    """Write a table: the first column names the row, the others are numbers set to the right.

    Args:
        header: names of the columns.
        rows: plain text cells, as many in each row as there are columns.
        strong_row: index of a row to emphasise.

    Returns:
        A `<table>` in a box of its own that scrolls sideways on a narrow screen.

    Raises:
        ParameterError: If a row has another number of cells than the header.
    """
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ParameterError(f"row {i} has {len(row)} cells; the header has {len(header)}")
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = ""
    for i, (name, *cells) in enumerate(rows):
        strong = ' class="strong"' if i == strong_row else ""
        tail = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f'<tr{strong}><th scope="row">{html.escape(name)}</th>{tail}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_page(title: str, sections: Sequence[tuple[str, str]], *, lead: str = "") -> str:
    """Put sections together into one self-contained page.

    Args:
        title: plain text, the heading of the page.
        sections: a plain text heading and an HTML body each, in order.
        lead: plain text below the heading, the answer in one or two sentences.

    Returns:
        A complete HTML document that loads nothing from anywhere.
    """
    opening = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>\n" for name, content in sections)
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{name}</h1>{opening}</header>\n{body}</main>\n</body>\n</html>\n"
    )


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; matplotlib is imported here."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MerganserError("drawing needs matplotlib", hint='pip install "merganser[plots]"') from error
    return Figure(figsize=(width, height), facecolor="white")


def _check_curves(curves: Mapping[str, Sequence[float]]) -> None:
    if not curves or not all(len(values) for values in curves.values()):
        raise ParameterError("a chart needs at least one curve, and every curve at least one value")
    if len(curves) > len(PALETTE):
        raise ParameterError(
            f"{len(curves)} curves; {len(PALETTE)} can be told apart in one chart",
            hint="split them over several charts",
        )


def _name_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write values and names beside the right ends of lines, no two on top of each other."""
    bottom, top = axes.get_ylim()
    gap = 0.065 * (top - bottom)
    heights = _apart([value for value, _, _ in labels], gap=gap)
    axes.set_ylim(min(bottom, min(heights) - gap / 2), max(top, max(heights) + gap / 2))  # no label outside
    for (value, name, color), height in zip(labels, heights, strict=True):
        text = f"{name} {value:.1f}"
        axes.annotate(text, (1.03, height), xycoords=("axes fraction", "data"), color=color, va="center", fontsize=10)


def quiet_axes(axes: Axes) -> None:
    """Lines of the values alone: a faint grid, one axis, no ticks."""
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(color=RULE, labelcolor=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def png_of(figure: Figure) -> bytes:
    """A figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Heights as near to `values` as possible, in the same vertical order, no two closer than `gap`.

    With rank r, h_r - r * gap must not fall: an isotonic regression, solved by pooling neighbours.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    pools: list[tuple[float, int]] = []  # mean, how many
    for rank, i in enumerate(order):
        mean, count = values[i] - rank * gap, 1
        while pools and pools[-1][0] >= mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    heights = [0.0] * len(values)
    levels = [mean for mean, count in pools for _ in range(count)]
    for rank, (i, level) in enumerate(zip(order, levels, strict=True)):
        heights[i] = level + rank * gap
    return heights


STYLE = """
:root { color-scheme: light; --ink: #1f2933; --faint: #66717d; --rule: #d9dee4; --tint: #eef5fa; --mark: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; background: #f6f7f9; color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 57rem; margin: 0 auto; padding: 2.2rem 1rem 4rem }
header { padding: 0 .4rem }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.1rem); line-height: 1.2; margin: 0 0 .6rem; text-wrap: balance }
h2 { font-size: 1.15rem; margin: 0 0 .7rem }
p { margin: .5rem 0; max-width: 46rem }
.lead { font-size: 1.08rem; color: #3d4852 }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px; margin: 1.1rem 0;
  padding: clamp(.9rem, .4rem + 2vw, 1.6rem) }
figure { margin: .4rem 0 }
figure img { display: block; width: 100%; max-width: 44rem; height: auto; margin: 0 auto }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .4rem }
.grid { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
.grid figcaption { text-align: center; color: var(--ink) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums lining-nums; font-size: .95rem }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
  font-weight: 400 }
th:first-child { text-align: left; padding-left: .3rem }
thead th { color: var(--faint); font-size: .85rem; border-bottom: 2px solid var(--rule) }
tbody tr:last-child > * { border-bottom: 0 }
.strong > * { font-weight: 650; background: var(--tint) }
pre { overflow-x: auto; background: #f6f7f9; border-radius: 6px; padding: .8rem; font-size: .85rem; line-height: 1.5 }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
summary { cursor: pointer; color: var(--mark) }
@media (max-width: 34rem) { th, td { padding: .4rem; font-size: .88rem } th { white-space: normal } }
@media print { body { background: #fff } section { break-inside: avoid; border: 0; padding: 0 } }
"""

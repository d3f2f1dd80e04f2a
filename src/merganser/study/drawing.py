"""Pictures of networks that started apart, as PNG bytes: rules as points, and two losses on a plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from merganser.errors import ParameterError
from merganser.report import INK, MARKERS, PALETTE, RULE, blank_figure, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from merganser.align.surface import Surface


def points_png(values: Mapping[str, Mapping[str, tuple[float, float]]], *, x_label: str) -> bytes:
    """Draw a row a rule and a mark a network, with a bar for the spread.

    Args:
        values: by network and rule, a mean and a deviation.
        x_label: what is measured, with its unit.

    Raises:
        ParameterError: If there is no network, or more than seven.
        MerganserError: If matplotlib is not installed.
    """
    rules = list(dict.fromkeys(rule for row in values.values() for rule in row))
    if not rules or len(values) > len(PALETTE):
        raise ParameterError(f"{len(values)} networks with {len(rules)} rules; 1 to {len(PALETTE)} can be told apart")
    figure = blank_figure(6.8, 1.1 + 0.34 * len(rules))
    axes = figure.add_subplot()
    for i, (name, row) in enumerate(values.items()):
        heights = [rules.index(rule) + 0.1 * (i - (len(values) - 1) / 2) for rule in row]
        means, deviations = zip(*row.values(), strict=True)
        axes.errorbar(
            means,
            heights,
            xerr=deviations,
            fmt=MARKERS[i],
            color=PALETTE[i],
            markersize=5,
            elinewidth=1.2,
            label=name,
        )
    axes.set_yticks(range(len(rules)), labels=rules)
    axes.invert_yaxis()
    axes.set_xlabel(x_label, color=INK)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    _plain(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout(pad=0.4)
    return png_of(figure)


def surface_png(surface: Surface, *, titles: Sequence[str], corners: Sequence[str], label: str) -> bytes:
    """Draw every value of a surface as filled contours, side by side, with the three networks marked.

    Args:
        surface: what was measured.
        titles: of the values.
        corners: names of the three networks.
        label: what a value is, with its unit.

    Raises:
        ParameterError: If there is not a title for every value.
        MerganserError: If matplotlib is not installed.
    """
    if len(titles) != len(surface.values):
        raise ParameterError(f"{len(titles)} titles for {len(surface.values)} values")
    figure = blank_figure(3.7 * len(titles) + 0.7, 3.2)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    grids = np.array(surface.values)
    levels = np.linspace(grids.min(), np.quantile(grids, 0.9) + 1e-9, 15)
    for axes, grid, title in zip(panels, grids, titles, strict=True):
        drawn = axes.contourf(surface.across, surface.up, grid, levels=levels, cmap="YlGnBu", extend="max")
        for (x, y), name in zip(surface.corners, corners, strict=True):
            axes.plot(x, y, "o", color="#D55E00", markersize=6)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(name, (x, y), color=INK, fontsize=9, bbox=box, **place)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("distance of weights", color=INK, fontsize=9)
        axes.set_aspect("equal")
        _plain(axes)
    bar = figure.colorbar(drawn, ax=list(panels), shrink=0.85, format="%.1f")
    bar.set_label(label, color=INK)
    bar.outline.set_visible(False)
    return png_of(figure)


def _plain(axes: Axes) -> None:
    axes.tick_params(color=RULE, labelcolor=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)

"""A topology in words: its weights, and how fast agents agree by it."""

from __future__ import annotations

from math import log

from merganser.decentral.topology import TOLERANCE, Mixing, Topology

#: Largest number of agents whose weights are shown as a table; above it each has a line.
TABLE_AGENTS = 16


def describe(topology: Topology, *, rounds: int | None = None) -> str:
    """Text of some lines: what it is, lambda2 and the gap, and the weights.

    Args:
        topology: which.
        rounds: of weights to show; a whole period by default, and 3 rounds where they never come again.

    >>> from merganser.decentral.topology import topology_of
    >>> from merganser.decentral.words import TopologyWords
    >>> print(describe(topology_of(TopologyWords(kind="star"), 3)))
    star of 3 agents, metropolis weights
    lambda2 0.6667, rho 0.4444, gap 1 - lambda2 = 0.3333: disagreement falls to a tenth in 5.7 rounds
    at most 2 neighbours, 4 snapshots a round
            0      1      2
    0  0.3333 0.3333 0.3333
    1  0.3333 0.6667      -
    2  0.3333      - 0.6667
    """
    shown = [topology.at(t) for t in range(rounds or topology.period or 3)]
    weighting = "weights of the file" if topology.given is not None and topology.given[1] is not None else ""
    plural = "" if topology.agents == 1 else "s"
    lines = [
        f"{topology.kind} of {topology.agents} agent{plural}, {weighting or f'{topology.weighting} weights'}",
        f"lambda2 {topology.lambda2:.4f}, rho {topology.rho:.4f}, gap 1 - lambda2 = {topology.gap:.4f}"
        + _pace(topology.lambda2),
        f"at most {max(_degrees(shown))} neighbours, {_snapshots(shown)} snapshots a round",
    ]
    if topology.period != 1:
        lines[0] += f", again after {topology.period} rounds" if topology.period else ", drawn anew every round"
    for t, mixing in enumerate(shown):
        lines += [f"round {t}"] if len(shown) > 1 else []
        lines += _table(mixing) if topology.agents <= TABLE_AGENTS else _rows(mixing)
    return "\n".join(lines)


def _pace(lambda2: float) -> str:
    if lambda2 == 0:
        return ": agents agree after a period"
    if lambda2 >= 1 - TOLERANCE:
        return ": disagreement does not shrink"
    return f": disagreement falls to a tenth in {log(0.1) / log(lambda2):.1f} rounds"


def _degrees(shown: list[Mixing]) -> list[int]:
    return [len(mixing.neighbours(i)) for mixing in shown for i in range(mixing.agents)]


def _snapshots(shown: list[Mixing]) -> str:
    return f"{sum(_degrees(shown)) / len(shown):g}"


def _table(mixing: Mixing) -> list[str]:
    width = len(str(mixing.agents - 1))
    head = " " * (width + 1) + "".join(f"{j:>7}" for j in range(mixing.agents))
    rows = [
        f"{i:<{width}} " + "".join(f"{w:7.4f}" if w else "      -" for w in row)
        for i, row in enumerate(mixing.weights.tolist())
    ]
    return [head, *rows]


def _rows(mixing: Mixing) -> list[str]:
    return [f"{i}: " + ", ".join(f"{j} {w:.4f}" for j, w in mixing.row(i).items()) for i in range(mixing.agents)]

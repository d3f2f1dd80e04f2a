"""The graphs that agents may stand in: pairs of neighbours, by number from 0.

Exponential graphs are directed in the literature (Assran et al. 2019, arXiv:1811.10792; Ying et al. 2021,
arXiv:2110.13363); `hops` gives those, for push-sum. Merging weighs both directions alike, so its exponential graph
has the same edges without direction, and its one-peer form pairs i with i xor 2^k: among 2^m agents, m rounds of halves
give the exact mean, as the directed form does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merganser.errors import ParameterError, RefError
from merganser.noise import uniform

Edge = tuple[int, int]
FILE_KEYS = ("adjacency", "weights")


def full(agents: int) -> list[Edge]:
    """Everybody with everybody."""
    return [(i, j) for i in range(agents) for j in range(i + 1, agents)]


def ring(agents: int) -> list[Edge]:
    """Everybody with the one before and the one behind; two agents have one edge.

    >>> ring(4)
    [(0, 1), (0, 3), (1, 2), (2, 3)]
    """
    return _sorted((i, (i + 1) % agents) for i in range(agents))


def star(agents: int) -> list[Edge]:
    """Everybody with agent 0."""
    return [(0, i) for i in range(1, agents)]


def hub(agents: int) -> list[Edge]:
    """Everybody with each of the last two agents, which are not joined themselves; the published "bipartite" graph."""
    return [(i, j) for i in range(agents - 2) for j in (agents - 2, agents - 1)]


def torus(agents: int) -> list[Edge]:
    """A grid that is closed at its sides, as near to a square as the number allows; a prime number makes a ring."""
    rows = next(r for r in range(isqrt(agents), 0, -1) if agents % r == 0)
    columns = agents // rows
    down = ((r * columns + c, (r + 1) % rows * columns + c) for r in range(rows) for c in range(columns))
    along = ((r * columns + c, r * columns + (c + 1) % columns) for r in range(rows) for c in range(columns))
    return _sorted([*down, *along])


def exponential(agents: int) -> list[Edge]:
    """Everybody with those 1, 2, 4, ... places further on, and so with those as far behind."""
    return _sorted((i, (i + hop) % agents) for i in range(agents) for hop in _powers(agents))


def one_peer(agents: int, round: int) -> list[Edge]:
    """In round t: i with i xor 2^k, k = t mod log2 of the number; who would have a partner past the last has none.

    >>> [one_peer(4, t) for t in (0, 1)]
    [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]
    """
    if agents == 1:
        return []
    bit = 1 << round % one_peer_period(agents)
    return [(i, i | bit) for i in range(agents) if not i & bit and i | bit < agents]


def one_peer_period(agents: int) -> int:
    """Rounds after which the one-peer graph comes again: the base-2 logarithm, rounded up, and at least 1."""
    return max(1, (agents - 1).bit_length())


def random_matching(agents: int, seed: int, round: int) -> list[Edge]:
    """Pairs drawn anew every round; one agent stays alone where the number is odd. Depends on (seed, round) alone."""
    order = torch.argsort(uniform(seed, "random matching", str(round), 0, agents), stable=True).tolist()
    return sorted((min(pair), max(pair)) for pair in zip(order[::2], order[1::2], strict=False))


def hops(kind: str, agents: int, round: int) -> list[int] | None:
    """How far an agent pushes in a directed exponential graph; None for a kind that has no direction.

    >>> hops("exponential", 5, 0), hops("one_peer_exponential", 5, 1), hops("ring", 5, 0)
    ([1, 2, 4], [2], None)
    """
    powers = _powers(agents)
    if kind == "exponential":
        return powers
    if kind == "one_peer_exponential":
        return [powers[round % len(powers)]] if powers else []
    return None


#: Edges of the graphs that stay the same, by kind.
STATIC: Mapping[str, Callable[[int], list[Edge]]] = {
    "full": full,
    "ring": ring,
    "star": star,
    "hub": hub,
    "torus": torus,
    "exponential": exponential,
}


def read_graph(path: Path, agents: int) -> tuple[list[Edge], NDArray[np.float64] | None]:
    """Edges from a JSON file {"adjacency": [[0, 1], [1, 0]], "weights": [[...], [...]]}; weights may be left out.

    Args:
        path: the file. The diagonal of the adjacency is not looked at.
        agents: how many there must be.

    Returns:
        Edges, and weights of shape (agents, agents) if the file has them.

    Raises:
        RefError: If the file cannot be read.
        ParameterError: If it is not such a file: not square, not of that many agents, an entry that is neither 0
            nor 1, an edge in one direction alone, or a weight where there is no edge.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RefError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{path} is not sound JSON: {error}") from error
    if not isinstance(content, dict) or "adjacency" not in content:
        raise ParameterError(f"{path} has no adjacency", 'write {"adjacency": [[0, 1], [1, 0]]}')
    for key in content:
        if key not in FILE_KEYS:
            near = get_close_matches(key, FILE_KEYS, n=1)
            raise ParameterError(f"{path}: {key}: there is no such key", f"did you mean {near[0]}?" if near else None)
    adjacency = _matrix(content["adjacency"], agents, f"{path}: adjacency")
    if not np.isin(adjacency, (0, 1)).all():
        raise ParameterError(f"{path}: adjacency has entries other than 0 and 1")
    np.fill_diagonal(adjacency, 0)
    if (adjacency != adjacency.T).any():
        i, j = np.argwhere(adjacency != adjacency.T)[0].tolist()
        raise ParameterError(f"{path}: adjacency joins {i} and {j} in one direction alone")
    edges = [(i, j) for i, j in np.argwhere(adjacency).tolist() if i < j]
    if "weights" not in content:
        return edges, None
    weights = _matrix(content["weights"], agents, f"{path}: weights")
    stray = np.argwhere((weights != 0) & (adjacency == 0) & ~np.eye(agents, dtype=bool))
    if len(stray):
        raise ParameterError(f"{path}: weights has {tuple(stray[0].tolist())}, and adjacency no such edge")
    return edges, weights


def _matrix(value: Any, agents: int, where: str) -> NDArray[np.float64]:
    rows = value if isinstance(value, list) and all(isinstance(row, list) for row in value) else [[None]]
    if not all(type(entry) in (int, float) for row in rows for entry in row):
        raise ParameterError(f"{where} is not a matrix of numbers")
    try:
        matrix = np.array(rows, dtype=np.float64)
    except (ValueError, OverflowError):
        raise ParameterError(f"{where} is not a matrix of numbers") from None
    if matrix.shape != (agents, agents):
        raise ParameterError(f"{where} has shape {matrix.shape}; {agents} agents need ({agents}, {agents})")
    return matrix


def _powers(agents: int) -> list[int]:
    """1, 2, 4, ... below the number."""
    return [1 << k for k in range(agents.bit_length()) if 1 << k < agents]


def _sorted(edges: Any) -> list[Edge]:
    """Each pair once, the smaller number first, without pairs of one agent."""
    return sorted({(min(i, j), max(i, j)) for i, j in edges if i != j})

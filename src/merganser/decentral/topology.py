"""Who mixes with whom in a round, and with what weight.

    x_i <- sum_j w_ij x_j        W symmetric, doubly stochastic, non-negative; w_ij > 0 only along an edge

Conventions differ between papers. Here lambda2 is the largest |eigenvalue| of W - 11'/n, the factor by which
disagreement shrinks in a round; rho = lambda2^2; the spectral gap is 1 - sqrt(rho) = 1 - lambda2, as in DIMAT
(Saadati et al. 2024, arXiv:2404.08079). Metropolis weights: Xiao & Boyd 2004, doi:10.1016/j.sysconle.2004.02.022.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merganser.decentral import graphs
from merganser.decentral.graphs import Edge
from merganser.decentral.words import TopologyWords
from merganser.errors import ParameterError

Matrix = NDArray[np.float64]
#: How far sums of rows and columns may be from 1, and w_ij from w_ji.
TOLERANCE = 1e-9
#: A product of rounds whose disagreement is below this has reached the mean, but for rounding.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Mixing:
    """Weights of one round.

    Attributes:
        weights: float64, shape (n, n); row i is what agent i takes of everybody. Not to be written to.
    """

    weights: Matrix

    def __post_init__(self) -> None:
        weights = np.array(self.weights, dtype=np.float64)
        weights.setflags(write=False)
        object.__setattr__(self, "weights", weights)

    @property
    def agents(self) -> int:
        """How many."""
        return int(self.weights.shape[0])

    def validate(self, *, connected: bool = True) -> Mixing:
        """The mixing itself, once it is known to keep the mean.

        Args:
            connected: whether everybody must reach everybody in this round alone.

        Raises:
            ParameterError: If it is not square, symmetric, doubly stochastic to 1e-9, non-negative and, if asked for,
                connected.
        """
        w = self.weights
        if w.ndim != 2 or w.shape[0] != w.shape[1] or not len(w):
            raise ParameterError(f"weights have shape {w.shape}; they are n x n, one row an agent")
        if not np.isfinite(w).all() or w.min() < 0:
            i, j = np.argwhere(~(w >= 0) | np.isinf(w))[0].tolist()
            raise ParameterError(f"weight ({i}, {j}) is {w[i, j]}; weights are finite and not negative")
        if (off := np.abs(w - w.T)).max() > TOLERANCE:
            i, j = np.unravel_index(int(off.argmax()), w.shape)
            raise ParameterError(f"weight ({i}, {j}) is {w[i, j]:g} and ({j}, {i}) {w[j, i]:g}; they must be equal")
        sums = np.array([fsum(row) for row in w.tolist()])
        if (off := np.abs(sums - 1)).max() > TOLERANCE:
            i = int(off.argmax())
            raise ParameterError(f"weights of agent {i} sum to {sums[i]:g}, not to 1", "a merge would scale the model")
        if connected and len(apart := _apart([self])):
            raise _disconnected(apart)
        return self

    @cached_property
    def lambda2(self) -> float:
        """Second largest |eigenvalue|: 0 for one agent or equal weights, 1 where some are out of reach of others."""
        return _largest(np.linalg.eigvalsh(self.weights - 1 / self.agents))

    @property
    def rho(self) -> float:
        """Its square."""
        return self.lambda2**2

    @property
    def gap(self) -> float:
        """1 - sqrt(rho)."""
        return 1 - self.lambda2

    @property
    def edges(self) -> list[Edge]:
        """Pairs with a weight, the smaller number first."""
        return [(i, j) for i, j in np.argwhere(self.weights > 0).tolist() if i < j]

    def neighbours(self, agent: int) -> tuple[int, ...]:
        """Everybody else of whom the agent takes a share, in order of their numbers."""
        return tuple(j for j in np.flatnonzero(self.weights[agent] > 0).tolist() if j != agent)

    def row(self, agent: int, arrived: Collection[int] | None = None) -> dict[int, float]:
        """Weights of an agent and its neighbours, in order of their numbers; they sum to 1.

        Args:
            agent: whose.
            arrived: those neighbours whose edge counts; the weight of the others goes back to the agent itself. All
                of them by default.

        >>> Mixing([[0.5, 0.5], [0.5, 0.5]]).row(0, arrived=())
        {0: 1.0}
        """
        near = self.neighbours(agent)
        lost = [j for j in near if arrived is not None and j not in arrived]
        own = fsum([self.weights[agent, agent], *(self.weights[agent, j] for j in lost)])
        return {j: float(own if j == agent else self.weights[agent, j]) for j in sorted({agent, *near} - {*lost})}


def dropped(mixing: Mixing, edges: Iterable[Edge]) -> Mixing:
    """The mixing without some edges: their weight goes back to both ends, so rows and columns still sum to 1.

    Args:
        mixing: of all edges.
        edges: those that did not arrive in both directions.

    >>> dropped(Mixing([[0.5, 0.5], [0.5, 0.5]]), [(0, 1)]).weights.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    without = {pair for i, j in edges for pair in ((i, j), (j, i))}
    weights = np.zeros_like(mixing.weights)
    for i in range(mixing.agents):
        row = mixing.row(i, [j for j in mixing.neighbours(i) if (i, j) not in without])
        weights[i, list(row)] = list(row.values())
    return Mixing(weights)


@dataclass(frozen=True, eq=False)
class Pushing:
    """Shares of one round of push-sum, where an edge may have one direction.

    Attributes:
        shares: float64, shape (n, n); column i is what agent i gives to everybody, itself among them; it sums to 1.
    """

    shares: Matrix

    def row(self, agent: int, received: Iterable[int], counted: Collection[int]) -> dict[int, float]:
        """What an agent takes of itself and of those whose shares arrived.

        A share that did not arrive stays with who gave it, so that numerators and weights keep their sums.

        Args:
            agent: whose.
            received: of whom, itself among them.
            counted: those whose edge with the agent counts, in whatever direction.

        >>> Pushing(np.array([[0.5, 0.5], [0.5, 0.5]])).row(0, [0], ())
        {0: 1.0}
        """
        kept = fsum(self.shares[j, agent] for j in (agent, *self.receivers(agent)) if j == agent or j not in counted)
        return {j: float(kept if j == agent else self.shares[agent, j]) for j in received}

    def receivers(self, agent: int) -> tuple[int, ...]:
        """Everybody else whom the agent gives a share."""
        return tuple(j for j in np.flatnonzero(self.shares[:, agent] > 0).tolist() if j != agent)

    def senders(self, agent: int) -> tuple[int, ...]:
        """Everybody else who gives the agent a share."""
        return tuple(j for j in np.flatnonzero(self.shares[agent] > 0).tolist() if j != agent)


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph that stays or changes by rounds, with its weights; `topology_of` makes and checks one.

    Attributes:
        kind: of graph.
        agents: how many.
        weighting: "metropolis", "uniform" or "lazy".
        seed: of random matchings.
        given: edges and perhaps weights from a file.
    """

    kind: str
    agents: int
    weighting: str = "metropolis"
    seed: int = 0
    given: tuple[list[Edge], Matrix | None] | None = None

    @property
    def period(self) -> int:
        """Rounds after which the weights come again; 1 where they stay, 0 where they never do."""
        if self.kind == "one_peer_exponential":
            return graphs.one_peer_period(self.agents)
        return 0 if self.kind == "random_matching" else 1

    def at(self, round: int) -> Mixing:
        """Weights of a round, counted from 0."""
        return self._rounds[round % self.period] if self.period else self._made(round)

    def neighbours(self, agent: int, round: int) -> tuple[int, ...]:
        """With whom an agent exchanges snapshots in a round, in order of their numbers."""
        return self.at(round).neighbours(agent)

    def pushing(self, round: int) -> Pushing:
        """Shares of push-sum: equal ones for an agent and those it pushes to; exponential graphs have a direction."""
        if self.given is not None and self.given[1] is not None:
            return Pushing(self.at(round).weights)
        directed = graphs.hops(self.kind, self.agents, round)
        shares = np.zeros((self.agents, self.agents))
        for i in range(self.agents):
            out = self.neighbours(i, round) if directed is None else [(i + hop) % self.agents for hop in directed]
            shares[[i, *out], i] = 1 / (1 + len(out))
        return Pushing(shares)

    @cached_property
    def rho(self) -> float:
        """Factor by which the squared disagreement shrinks in a round.

        Over a period it is the mean factor at worst; for random matchings that of the expected squared disagreement,
        1 - 2 w (1 - w) n p: w is the weight of a pair, p = 1 / (n - 1), or 1 / n for odd n, the chance that two meet.
        """
        n = self.agents
        if self.period == 1 or n == 1:
            return self.at(0).rho
        if self.period:
            product = np.eye(n)
            for t in range(self.period):
                product = self.at(t).weights @ product
            return float(_largest(np.linalg.svd(product - 1 / n, compute_uv=False)) ** (2 / self.period))
        w = max(self.at(0).weights[edge] for edge in self.at(0).edges)
        return float(max(0.0, 1 - 2 * w * (1 - w) * n / (n - 1 + n % 2)))

    @property
    def lambda2(self) -> float:
        """sqrt(rho): of a graph that stays, the second largest |eigenvalue|."""
        return sqrt(self.rho)

    @property
    def gap(self) -> float:
        """1 - sqrt(rho)."""
        return 1 - self.lambda2

    def parents(self) -> dict[int, int]:
        """A spanning tree from agent 0, breadth first: the parent of every other agent, parents before children.

        Neighbours are taken in order of their numbers. It may use edges of all rounds; where pairs are drawn, any two
        agents are neighbours some time.
        """
        found: dict[int, int] = {}
        queue = [0]
        for parent in queue:
            near = range(self.agents) if not self.period else _joint(self._rounds, parent)
            for child in near:
                if child and child not in found and child != parent:
                    found[child] = parent
                    queue.append(child)
        return found

    def validate(self) -> Topology:
        """The topology itself, once its weights keep the mean and everybody reaches everybody over a period.

        Raises:
            ParameterError: If not.
        """
        for mixing in self._rounds or [self.at(0)]:
            mixing.validate(connected=False)
        if self.period and len(apart := _apart(self._rounds)):
            raise _disconnected(apart)
        return self

    @cached_property
    def _rounds(self) -> list[Mixing]:
        return [self._made(t) for t in range(self.period)]

    def _made(self, round: int) -> Mixing:
        if self.given is not None and self.given[1] is not None:
            return Mixing(self.given[1])
        if self.given is not None:
            edges = self.given[0]
        elif self.kind == "one_peer_exponential":
            edges = graphs.one_peer(self.agents, round)
        elif self.kind == "random_matching":
            edges = graphs.random_matching(self.agents, self.seed, round)
        else:
            edges = graphs.STATIC[self.kind](self.agents)
        return Mixing(_WEIGHTS[self.weighting](edges, self.agents))


def topology_of(words: TopologyWords, agents: int) -> Topology:
    """The topology that a configuration means.

    Args:
        words: kind, weights, seed and file.
        agents: how many.

    Raises:
        RefError: If the file cannot be read.
        ParameterError: If there is no agent, or the graph of that many does not hold together or keep the mean.

    >>> round(topology_of(TopologyWords(kind="ring"), 5).lambda2, 4)
    0.5393
    """
    if agents < 1:
        raise ParameterError(f"there are {agents} agents; 1 is the least")
    given = graphs.read_graph(Path(words.file), agents) if words.file is not None else None
    return Topology(words.kind, agents, words.weights, words.seed, given).validate()


def metropolis(edges: Iterable[Edge], agents: int) -> Matrix:
    """w_ij = 1 / (1 + max(deg_i, deg_j)), w_ii the rest: an agent needs nothing but its neighbours' degrees."""
    return _weighted(edges, agents, lambda i, j: 1 / (1 + max(i, j)))


def uniform(edges: Iterable[Edge], agents: int) -> Matrix:
    """The same weight 1 / (1 + largest degree) along every edge, w_ii the rest."""
    pairs = list(edges)
    largest = int(_degrees(pairs, agents).max(initial=0))
    return _weighted(pairs, agents, lambda _i, _j: 1 / (1 + largest))


def lazy(edges: Iterable[Edge], agents: int) -> Matrix:
    """(I + W) / 2 of the metropolis weights: no negative eigenvalue."""
    return (np.eye(agents) + metropolis(edges, agents)) / 2


_WEIGHTS: dict[str, Callable[[Iterable[Edge], int], Matrix]] = {
    "metropolis": metropolis,
    "uniform": uniform,
    "lazy": lazy,
}


def _weighted(edges: Iterable[Edge], agents: int, weight: Callable[[int, int], float]) -> Matrix:
    pairs = list(edges)
    degrees = _degrees(pairs, agents).tolist()
    w = np.zeros((agents, agents))
    for i, j in pairs:
        w[i, j] = w[j, i] = weight(degrees[i], degrees[j])
    w[np.diag_indices(agents)] = [max(0.0, 1 - fsum(row)) for row in w.tolist()]
    return w


def _degrees(pairs: list[Edge], agents: int) -> NDArray[np.int64]:
    return np.bincount(np.array(pairs, dtype=np.int64).reshape(-1), minlength=agents)


def _largest(values: NDArray[np.floating[Any]]) -> float:
    largest = float(np.abs(values).max())
    return largest if largest > ROUNDING else 0.0


def _joint(rounds: list[Mixing], agent: int) -> list[int]:
    """Neighbours of an agent in any of the rounds, in order of their numbers."""
    return sorted({j for mixing in rounds for j in mixing.neighbours(agent)})


def _apart(rounds: list[Mixing]) -> list[int]:
    """Agents that agent 0 does not reach over all rounds together."""
    reached, queue = {0}, [0]
    for agent in queue:
        new = [j for j in _joint(rounds, agent) if j not in reached]
        reached.update(new)
        queue += new
    return [i for i in range(rounds[0].agents) if i not in reached]


def _disconnected(apart: list[int]) -> ParameterError:
    named = ", ".join(map(str, apart[:5])) + (", ..." if len(apart) > 5 else "")
    return ParameterError(
        f"agent 0 never reaches {named}: the graph falls apart", "agents that exchange nothing are algorithm: isolated"
    )

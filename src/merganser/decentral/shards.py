"""Training examples shared out to agents: evenly, by drawn shares of every class, or by classes.

    iid        every class is cut evenly
    dirichlet  p_c ~ Dirichlet(alpha, .., alpha) over agents, for every class c; small alpha, few classes an agent
    classes    class c goes to agent c mod agents; with more agents than classes, agents of one class share it evenly

Source of the Dirichlet split: Hsu et al. 2019, arXiv:1909.06335.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from merganser.errors import ParameterError

Places = npt.NDArray[np.int64]
#: How often shares are drawn before they are given up.
DRAWS = 200
#: Examples that an agent has at least, if there are twice as many for each.
LEAST = 10


def shared_out(
    labels: npt.NDArray[np.integer],
    agents: int,
    split: Literal["iid", "dirichlet", "classes"],
    *,
    alpha: float | None = None,
    seed: int = 0,
    items: int | None = None,
) -> list[Places]:
    """Which examples each agent has; no example is two agents'.

    Args:
        labels: class numbers, shape (n,).
        agents: how many.
        split: how.
        alpha: concentration; for "dirichlet".
        seed: of what is drawn.
        items: most examples an agent has.

    Returns:
        Places of the examples by agent, in random order.

    Raises:
        ParameterError: If there are too few examples or classes for so many agents.
    """
    generator = np.random.default_rng([seed, agents])
    classes = [generator.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    if split == "iid":
        parts = _evenly(classes, agents)
    elif split == "classes":
        parts = _by_classes(classes, agents)
    else:
        parts = _drawn(classes, agents, alpha if alpha is not None else 1.0, generator)
    if empty := [i for i, part in enumerate(parts) if not len(part)]:
        raise ParameterError(
            f"agent {empty[0]} has no example: {len(labels)} of {len(classes)} classes for {agents} agents",
            "take fewer agents, or another split",
        )
    return [generator.permutation(part)[:items].astype(np.int64) for part in parts]


def _evenly(classes: list[Places], agents: int) -> list[Places]:
    """Every class cut evenly; the remainders go round, so that agents differ by at most one example in all."""
    parts: list[list[Places]] = [[] for _ in range(agents)]
    next_ = 0
    for places in classes:
        for i in range(agents):
            parts[(next_ + i) % agents].append(places[i::agents])
        next_ += len(places)
    return [np.concatenate(part) for part in parts]


def _by_classes(classes: list[Places], agents: int) -> list[Places]:
    parts: list[list[Places]] = [[] for _ in range(agents)]
    count = len(classes)
    for c, places in enumerate(classes):
        owners = [c % agents] if agents <= count else list(range(c, agents, count))
        for i, owner in enumerate(owners):
            parts[owner].append(places[i :: len(owners)])
    return [np.concatenate(part) for part in parts]


def _drawn(classes: list[Places], agents: int, alpha: float, generator: np.random.Generator) -> list[Places]:
    total = sum(map(len, classes))
    least = min(LEAST, total // (2 * agents))
    for _ in range(DRAWS):
        parts: list[list[Places]] = [[] for _ in range(agents)]
        for places in classes:
            shares = generator.dirichlet([alpha] * agents)
            cuts = np.round(np.cumsum(shares)[:-1] * len(places)).astype(np.int64)
            for part, piece in zip(parts, np.split(places, cuts), strict=True):
                part.append(piece)
        found = [np.concatenate(part) for part in parts]
        if min(map(len, found)) >= max(1, least):
            return found
    raise ParameterError(
        f"{DRAWS} draws with alpha {alpha} gave none in which each of {agents} agents has {max(1, least)} examples",
        "take a larger alpha, or fewer agents",
    )

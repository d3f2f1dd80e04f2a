"""The steps of a run: what every agent does, one after the other, known to all before the first.

A round of merging is one step. Where agents are first brought into one order of units, the first merging round has a
step for every level of the spanning tree before its merge; where weights are mixed with every batch, a round has a step
a batch. A step exchanges models once at most, and its number is what messages, checkpoints and fault plans call round.

    merge        round: train, merge                    | train, merge | ...
    warm-up      round: warm-up, merge                  | train, merge | ...      "merge first", as published
    aligned once round: train, order 1, .., order depth, merge | train, merge | ...
    cdsgd, sgp   round: batch and mix, batch and mix, ..      | ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from merganser.decentral.words import RunConfig


class Exchange(str, Enum):
    """What a step exchanges models for.

    Attributes:
        NONE: nothing.
        ORDER: agents of one level of the spanning tree take over their parents' order of units.
        MERGE: neighbours merge by the rule of the run.
        MIX: neighbours' weights from before the batch are mixed, and the batch's change added (CDSGD).
        PUSH: shares of weights after the batch are pushed along the graph (SGP).
    """

    NONE = "none"
    ORDER = "order"
    MERGE = "merge"
    MIX = "mix"
    PUSH = "push"


@dataclass(frozen=True)
class Step:
    """One step of all agents.

    Attributes:
        number: from 0; that of its messages and checkpoints.
        round: that it is a part of, from 0.
        exchange: what for.
        epochs: passes over its own shard that an agent trains first.
        batches: that it trains first, instead.
        at: round of the topology whose weights count.
        everybody: whether all agents merge with equal weights, whatever the graph.
        level: of the spanning tree, from 1, where orders are taken over.
        first: whether the round begins with it.
        last: whether the round ends with it: agents recalibrate, are judged, and keep a checkpoint.
    """

    number: int
    round: int
    exchange: Exchange
    epochs: float = 0.0
    batches: int = 0
    at: int = 0
    everybody: bool = False
    level: int = 0
    first: bool = True
    last: bool = True


def steps(config: RunConfig, *, depth: int = 0, batches: int = 0) -> list[Step]:
    """All steps of a run.

    Args:
        config: of the run.
        depth: of the spanning tree; for the rule aligned_once.
        batches: of a round; for algorithms that exchange with every batch.

    >>> from merganser.decentral.words import read_config
    >>> words = {"agents": 5, "rounds": 2, "network": {}, "data": {"source": {}}, "merge": {"rule": "aligned_once"}}
    >>> [(s.number, s.round, s.exchange.value, s.epochs) for s in steps(read_config(words), depth=2)]
    [(0, 0, 'order', 2.0), (1, 0, 'order', 0.0), (2, 0, 'merge', 0.0), (3, 1, 'merge', 2.0)]
    """
    found: list[Step] = []
    merges = 0
    for round in range(config.rounds):
        warm = round == 0 and config.warmup_epochs > 0
        epochs = config.warmup_epochs if warm else config.local_epochs
        if config.algorithm in ("cdsgd", "sgp") and not warm:
            exchange = Exchange.MIX if config.algorithm == "cdsgd" else Exchange.PUSH
            found += [
                Step(len(found) + i, round, exchange, batches=1, at=merges + i, first=i == 0, last=i == batches - 1)
                for i in range(batches)
            ]
            merges += batches
            continue
        final = config.merge.final_global and round == config.rounds - 1
        if config.algorithm != "merge" or not (final or config.merge.at(round)):
            found.append(Step(len(found), round, Exchange.NONE, epochs))
            continue
        depths = range(1, depth + 1) if config.merge.rule == "aligned_once" and merges == 0 else ()
        exchanges = [*((Exchange.ORDER, level) for level in depths), (Exchange.MERGE, 0)]
        for i, (exchange, level) in enumerate(exchanges):
            found.append(
                Step(
                    number=len(found),
                    round=round,
                    exchange=exchange,
                    epochs=0.0 if i else epochs,
                    at=merges,
                    everybody=final and exchange is Exchange.MERGE,
                    level=level,
                    first=i == 0,
                    last=exchange is Exchange.MERGE,
                )
            )
        merges += 1
    return found


def levels(parents: Mapping[int, int]) -> dict[int, int]:
    """How far every agent of a spanning tree is from its root, agent 0, by its parents, parents before children.

    >>> levels({1: 0, 4: 0, 2: 1, 3: 4})
    {0: 0, 1: 1, 4: 1, 2: 2, 3: 2}
    """
    found = {0: 0}
    for child, parent in parents.items():
        found[child] = found[parent] + 1
    return found

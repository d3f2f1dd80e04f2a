"""Push-sum where messages get lost: what was to be given away stays, or steps would grow as weights shrink."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser.decentral.baselines import PUSHED_WEIGHT, Pushed
from merganser.decentral.in_process import Lost, Network
from merganser.decentral.rounds import Together, run, together
from merganser.decentral.snapshot import Snapshot, decode
from merganser.decentral.topology import topology_of
from merganser.decentral.words import Limits, RunConfig
from tiny_agents import Still, TinyLearner, model, tiny_config

FLOATS = ("w", "b", "v", "norm.running_mean")


def pushed(crew: Together) -> list[Pushed]:
    found = [agent.pushed for agent in crew.agents if agent.pushed is not None]
    assert len(found) == len(crew.agents)
    return found


def numerators(crew: Together) -> Tensor:
    return torch.stack([torch.cat([p.numerators[name].double().flatten() for name in FLOATS]) for p in pushed(crew)])


def without(agent: int) -> Lost:
    return lambda sender, receiver, step, what: agent in (sender, receiver)


def a_fifth(agents: int, steps: int) -> Lost:
    draws = np.random.default_rng(1).random((2, agents, agents, steps)) < 0.2
    return lambda sender, receiver, step, what: bool(draws[int(what == "acknowledgement"), sender, receiver, step])


def crew_of(config: RunConfig, learner: type[TinyLearner], folder: Path, lost: Lost) -> Together:
    crew = together(config, learner, aligned=False, network=Network(config.agents, lost=lost))
    run(config, crew, folder)
    return crew


@pytest.mark.parametrize("kind", ["ring", "star", "exponential", "one_peer_exponential"])
def test_lost_shares_stay_with_their_sender_so_numerators_and_weights_keep_their_sums(
    tmp_path: Path, kind: str
) -> None:
    config = tiny_config(algorithm="sgp", rounds=30, local_epochs=0.3, agents=6, topology={"kind": kind})
    crew = crew_of(config, Still, tmp_path, a_fifth(6, 30))
    assert sum(p.weight for p in pushed(crew)) == pytest.approx(6, abs=1e-9)
    before = torch.stack([torch.cat([model(i)[name].double().flatten() for name in FLOATS]) for i in range(6)])
    torch.testing.assert_close(numerators(crew).sum(0), before.sum(0), rtol=0, atol=2e-5)
    mean = before.mean(0)
    for agent in crew.agents:
        state = agent.learner.state()
        z = torch.cat([state[name].double().flatten() for name in FLOATS])
        assert float((z - mean).norm()) < 0.05 * float((before[agent.number] - mean).norm())


def test_an_edge_that_is_lost_one_way_gives_its_share_back_as_in_a_float64_loop(tmp_path: Path) -> None:
    config = tiny_config(algorithm="sgp", rounds=6, local_epochs=0.3, agents=5, topology={"kind": "exponential"})
    gone = {(0, 2, 1), (3, 4, 1), (1, 2, 4)}  # sender, receiver, step
    crew = crew_of(config, Still, tmp_path, lambda i, j, t, what: what == "snapshot" and (i, j, t) in gone)
    topology, x, y = topology_of(config.topology, 5), [model(i)["w"].double() for i in range(5)], [1.0] * 5
    for t in range(6):
        shares = topology.pushing(t).shares.copy()
        for i, j, at in gone:
            if at == t:
                for a, b in ((i, j), (j, i)):  # an edge counts in both directions or in none
                    shares[a, a] += shares[b, a]
                    shares[b, a] = 0
        assert shares.sum(0) == pytest.approx(np.ones(5))
        x = [sum(shares[i, j] * x[j] for j in range(5)) for i in range(5)]  # type: ignore[misc]
        y = [float(shares[i] @ np.array(y)) for i in range(5)]
    for i, found in enumerate(pushed(crew)):
        assert found.weight == pytest.approx(y[i], rel=1e-12)
        torch.testing.assert_close(found.numerators["w"].double(), x[i], rtol=0, atol=5e-6)


def test_an_agent_that_is_cut_off_costs_the_others_neither_weight_nor_what_they_learn(tmp_path: Path) -> None:
    config = tiny_config(algorithm="sgp", rounds=8)
    whole = crew_of(config, TinyLearner, tmp_path / "whole", lambda *_: False)
    apart = crew_of(config, TinyLearner, tmp_path / "apart", without(4))
    weights = [p.weight for p in pushed(apart)]
    assert sum(weights[:4]) == pytest.approx(4, abs=1e-9)
    assert weights[4] == 1.0
    assert min(weights) > 0.3
    for i in range(4):
        assert apart.agents[i].learner.evaluate()["loss"] < 2 * whole.agents[i].learner.evaluate()["loss"] + 0.1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_with_a_weight_that_is_none_is_not_accepted_and_stays_with_its_sender(
    tmp_path: Path, weight: float
) -> None:
    config = tiny_config(algorithm="sgp", rounds=1, local_epochs=0.3, agents=3, topology={"kind": "star"})

    def tamper(agent: int, step: int, payload: bytes) -> bytes:
        if agent != 1:
            return payload
        s = decode(payload, Limits())
        bad = Pushed({}, weight).tensors()[PUSHED_WEIGHT]
        return Snapshot(s.run, s.sender, s.incarnation, s.round, {**s.tensors, PUSHED_WEIGHT: bad}).encode()

    crew = together(config, Still, aligned=False, tamper=tamper)
    (line,) = run(config, crew, tmp_path)
    assert [p.weight for p in pushed(crew)] == pytest.approx([1 / 3 + 1 / 2 + 1 / 3, 1.0, 1 / 2 + 1 / 3], rel=1e-12)
    assert [record["missing"] for record in line["agents"]] == [1, 1, 0]

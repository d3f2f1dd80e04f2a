"""CDSGD, push-sum, isolated and centralised agents, against loops in float64 and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from merganser.decentral.baselines import PUSHED_WEIGHT, Pushed, combined, effective, pushed_sum, readable
from merganser.decentral.rounds import Together, run, together
from merganser.decentral.schedule import Exchange, steps
from merganser.decentral.topology import topology_of
from merganser.decentral.words import RunConfig
from merganser.errors import ParameterError
from tiny_agents import Still, TinyLearner, model, tiny_config

FLOATS = ("w", "b", "v", "norm.running_mean")


def trained(config: RunConfig, folder: Path, learner: type[TinyLearner] = TinyLearner) -> Together:
    crew = together(config, learner, aligned=False)
    run(config, crew, folder)
    return crew


def test_combine_then_adapt_adds_the_change_to_the_mixed_weights() -> None:
    before, after = {i: model(i) for i in (0, 1, 4)}, model(50)
    weights = {0: 0.2, 1: 0.5, 4: 0.3}
    found = combined(1, before, weights, after)
    for name in FLOATS:
        for place, value in enumerate(found[name].flatten().tolist()):
            mixed = sum(w * before[j][name].flatten()[place].item() for j, w in weights.items())
            change = after[name].flatten()[place].item() - before[1][name].flatten()[place].item()
            assert value == pytest.approx(mixed + change, abs=1e-6)
    assert int(found["count"]) == 50


def test_cdsgd_is_a_loop_of_mixing_and_stepping(tmp_path: Path) -> None:
    config = tiny_config(algorithm="cdsgd", rounds=2, agents=4)
    crew = trained(config, tmp_path)
    w = topology_of(config.topology, 4).at(0).weights
    loop = [TinyLearner(i) for i in range(4)]
    for _ in range(6):  # 2 rounds of 3 batches
        before = [learner.state() for learner in loop]
        for i, learner in enumerate(loop):
            learner.train(1)
            after = learner.state()
            for name in FLOATS:
                mixed = sum(w[i, j] * before[j][name].double() for j in range(4))
                after[name] = (mixed + after[name].double() - before[i][name].double()).float()
            learner.load(after)
    for agent, learner in zip(crew.agents, loop, strict=True):
        for name in FLOATS:
            torch.testing.assert_close(agent.learner.state()[name], learner.state()[name], rtol=0, atol=2e-6)


def test_cdsgd_sends_a_model_a_batch_where_merging_sends_one_a_round(tmp_path: Path) -> None:
    sent = {}
    for name in ("merge", "cdsgd"):
        config = tiny_config(algorithm=name, rounds=2)
        lines = run(config, together(config, lambda i: TinyLearner(i, batches=10), aligned=False), tmp_path / name)
        sent[name] = sum(record["sent"]["bytes"] for line in lines for record in line["agents"])
    assert sent["cdsgd"] / sent["merge"] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("kind", ["star", "exponential", "one_peer_exponential"])
def test_push_sum_reaches_the_mean_where_its_numerators_alone_do_not(tmp_path: Path, kind: str) -> None:
    config = tiny_config(algorithm="sgp", rounds=30, local_epochs=0.3, agents=6, topology={"kind": kind})
    crew = trained(config, tmp_path, Still)
    mean = torch.stack([model(i)["w"].double() for i in range(6)]).mean(0)
    pushed = [agent.pushed for agent in crew.agents if agent.pushed is not None]
    assert len(pushed) == 6
    for agent in crew.agents:
        torch.testing.assert_close(agent.learner.state()["w"].double(), mean, rtol=0, atol=1e-4)
    assert sum(p.weight for p in pushed) == pytest.approx(6, abs=1e-9)
    if kind == "star":  # the hub is given more than it gives
        off = max(float((p.numerators["w"].double() - mean).abs().max()) for p in pushed)
        assert off > 0.1
        assert max(p.weight for p in pushed) > 2


def test_sgp_is_a_loop_of_stepping_and_pushing(tmp_path: Path) -> None:
    config = tiny_config(algorithm="sgp", rounds=2, agents=4, topology={"kind": "exponential"})
    crew = trained(config, tmp_path)
    topology = topology_of(config.topology, 4)
    loop = [TinyLearner(i) for i in range(4)]
    x = [{name: learner.state()[name].double() for name in FLOATS} for learner in loop]
    y = [1.0] * 4
    for t in range(6):
        p = topology.pushing(t).shares
        for i, learner in enumerate(loop):
            before = learner.state()
            learner.train(1)
            after = learner.state()
            x[i] = {name: x[i][name] + after[name].double() - before[name].double() for name in FLOATS}
        x = [{name: sum(p[i, j] * x[j][name] for j in range(4)) for name in FLOATS} for i in range(4)]  # type: ignore[misc]
        y = [sum(p[i, j] * y[j] for j in range(4)) for i in range(4)]
        for i, learner in enumerate(loop):
            learner.load({**learner.state(), **{name: (x[i][name] / y[i]).float() for name in FLOATS}})
    for agent, learner in zip(crew.agents, loop, strict=True):
        for name in FLOATS:
            torch.testing.assert_close(agent.learner.state()[name], learner.state()[name], rtol=0, atol=1e-5)


def test_a_lost_share_leaves_a_weighted_mean() -> None:
    states = {j: {"x": torch.tensor([float(j)])} for j in range(3)}
    shares = {0: 0.5, 1: 0.25, 2: 0.5}
    whole = pushed_sum(1, {j: Pushed(states[j], 1.0) for j in states}, shares)
    lost = pushed_sum(1, {j: Pushed(states[j], 1.0) for j in (1, 2)}, {j: shares[j] for j in (1, 2)})
    assert whole.model()["x"].item() == pytest.approx((0.25 * 1 + 0.5 * 2) / 1.25)
    assert lost.model()["x"].item() == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)


def test_the_weight_of_push_sum_travels_without_rounding() -> None:
    pushed = Pushed({"x": torch.ones(2)}, 1 / 3)
    sent = pushed.tensors()
    assert not sent[PUSHED_WEIGHT].is_floating_point()
    assert Pushed.from_tensors(sent).weight == 1 / 3


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_left_out(weight: float) -> None:
    bad = Pushed({"x": torch.ones(2)}, weight).tensors()
    with pytest.raises(ParameterError, match="weight of push-sum"):
        Pushed.from_tensors(bad)
    assert list(readable({3: bad, 4: Pushed({"x": torch.ones(2)}).tensors()})) == [4]


def test_an_isolated_agent_trains_as_if_it_were_alone(tmp_path: Path) -> None:
    config = tiny_config(algorithm="isolated")
    crew = together(config, TinyLearner)
    lines = run(config, crew, tmp_path)
    for i, agent in enumerate(crew.agents):
        alone = TinyLearner(i)
        alone.train(9)  # 3 rounds of 3 batches
        found: dict[str, Tensor] = agent.learner.state()
        assert all(torch.equal(found[name], x) for name, x in alone.state().items())
    assert {record["sent"]["bytes"] for line in lines for record in line["agents"]} == {0}
    assert all(record["trained"] == record["merged"] for line in lines for record in line["agents"])


def test_a_centralised_run_is_one_agent() -> None:
    config = tiny_config(algorithm="centralised", topology={"kind": "star"})
    assert effective(config).agents == 1
    assert len(together(config, TinyLearner).agents) == 1
    assert effective(tiny_config()).agents == 5


def test_a_warm_up_is_trained_alone_before_weights_are_mixed() -> None:
    for algorithm, exchange in (("cdsgd", Exchange.MIX), ("sgp", Exchange.PUSH)):
        found = steps(tiny_config(algorithm=algorithm, rounds=3, warmup_epochs=4.0), batches=2)
        assert [step.exchange for step in found] == [Exchange.NONE, *[exchange] * 4]
        assert [step.round for step in found] == [0, 1, 1, 2, 2]
        assert [step.last for step in found] == [True, False, True, False, True]
        assert [step.at for step in found[1:]] == [0, 1, 2, 3]

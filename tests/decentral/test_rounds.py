"""All agents of a run: consensus, orders, dropped edges, schedules and the journal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser.decentral.agent import Agent
from merganser.decentral.distances import aligned_distance, consensus_distance
from merganser.decentral.folder import Line, config_of, journal
from merganser.decentral.in_process import Network
from merganser.decentral.rounds import Together, one_thread, run, together
from merganser.decentral.schedule import Exchange, levels, steps
from merganser.decentral.snapshot import Snapshot, decode
from merganser.decentral.topology import topology_of
from merganser.decentral.words import Limits, RunConfig
from merganser.errors import ParameterError, StateError
from tiny_agents import SPEC, Still, TinyAligner, TinyLearner, function, model, tiny_config

FLOATS = ("w", "b", "v", "norm.running_mean")


def flat(crew: Together) -> Tensor:
    """All weights, shape (agents, entries), in float64."""
    states = [agent.learner.state() for agent in crew.agents]
    return torch.stack([torch.cat([state[name].double().flatten() for name in FLOATS]) for state in states])


def watched(config: RunConfig, crew: Together, folder: Path) -> list[Tensor]:
    """Weights before the first round and after each."""
    seen = [flat(crew)]
    run(config, crew, folder, progress=lambda _: seen.append(flat(crew)))
    return seen


@pytest.mark.parametrize("agents", [5, 10])
def test_disagreement_falls_by_lambda2_a_round_and_the_mean_stays(tmp_path: Path, agents: int) -> None:
    config = tiny_config(agents=agents, rounds=12)
    seen = watched(config, together(config, Still, aligned=False), tmp_path)
    spreads = [float((x - x.mean(0)).norm()) for x in seen]
    slope = np.polyfit(range(6, 13), np.log(spreads[6:13]), 1)[0]
    assert math.exp(slope) == pytest.approx(topology_of(config.topology, agents).lambda2, rel=0.01)
    assert {5: 0.5393, 10: 0.8727}[agents] == pytest.approx(topology_of(config.topology, agents).lambda2, abs=1e-4)
    for x in seen:
        torch.testing.assert_close(x.mean(0), seen[0].mean(0), rtol=0, atol=1e-6)


def broken(share: float, agents: int, rounds: int) -> set[tuple[int, int]]:
    """Which agents' snapshots of which rounds are damaged on their way."""
    lost = np.random.default_rng(0).random((agents, rounds)) < share
    return {(int(i), int(t)) for i, t in np.argwhere(lost)}


@pytest.mark.parametrize("settled", [True, False])
def test_edges_dropped_on_both_sides_keep_the_mean_and_one_sided_ones_do_not(
    tmp_path: Path, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not settled:
        monkeypatch.setattr(Agent, "_settles", lambda *_: False)
    config = tiny_config(rounds=10)
    lost = broken(0.25, 5, 10)

    def tamper(agent: int, step: int, payload: bytes) -> bytes:
        return payload[:-3] if (agent, step) in lost else payload

    crew = together(config, Still, tamper=tamper, aligned=False)
    seen = watched(config, crew, tmp_path)
    drift = float((seen[-1].mean(0) - seen[0].mean(0)).abs().max())
    assert drift < 1e-6 if settled else drift > 1e-2
    lines = journal(tmp_path)
    rejected = sum(record["rejected"].get("truncated", 0) for line in lines for record in line["agents"])
    assert rejected == 2 * len(lost)
    if settled:
        missing = [record["missing"] for line in lines for record in line["agents"]]
        assert sum(missing) % 2 == 0
        assert sum(missing) > 2 * len(lost)
        mixings = [topology_of(config.topology, 5).at(0).weights.copy() for _ in range(10)]
        for i, t in lost:  # the same in float64: weight of a lost edge goes back to both ends
            for j in range(5):
                if i != j:
                    mixings[t][i, i] += mixings[t][i, j]
                    mixings[t][j, j] += mixings[t][j, i]
                    mixings[t][i, j] = mixings[t][j, i] = 0
        x = seen[0]
        for w in mixings:
            x = torch.from_numpy(w) @ x
        torch.testing.assert_close(seen[-1], x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settled", [True, False])
def test_a_fifth_of_all_messages_lost_one_way_leaves_the_mean_where_both_ends_agree(
    tmp_path: Path, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not settled:
        monkeypatch.setattr(Agent, "_settles", lambda *_: False)
    draws = np.random.default_rng(1).random((2, 5, 5, 10))

    def lost(sender: int, receiver: int, step: int, what: str) -> bool:
        return bool(draws[int(what == "acknowledgement"), sender, receiver, step] < 0.2)

    config = tiny_config(rounds=10)
    crew = together(config, Still, aligned=False, network=Network(5, lost=lost))
    seen = watched(config, crew, tmp_path)
    drift = float((seen[-1].mean(0) - seen[0].mean(0)).abs().max())
    assert drift < 1e-6 if settled else drift > 1e-2
    spreads = [float((x - x.mean(0)).norm()) for x in seen]
    assert spreads[-1] < 0.2 * spreads[0]


def test_a_run_is_a_loop_of_training_and_mixing(tmp_path: Path) -> None:
    config = tiny_config(warmup_epochs=3.0)
    crew = together(config, TinyLearner)
    run(config, crew, tmp_path)
    w = torch.tensor(topology_of(config.topology, 5).at(0).weights)
    loop = [TinyLearner(i) for i in range(5)]
    for batches in (9, 3, 3):  # "merge first": the warm-up takes the place of the first round's training
        for learner in loop:
            learner.train(batches)
        states = [learner.state() for learner in loop]
        for i, learner in enumerate(loop):
            mixed = {n: sum(w[i, j] * states[j][n].double() for j in range(5)) for n in FLOATS}
            learner.load({**states[i], **{n: x.float() for n, x in mixed.items()}})  # type: ignore[union-attr]
    for agent, learner in zip(crew.agents, loop, strict=True):
        for name in FLOATS:
            torch.testing.assert_close(agent.learner.state()[name], learner.state()[name], rtol=0, atol=1e-5)
        assert int(agent.learner.state()["count"]) == agent.number + 15


class Copy(Still):
    """Agent 0's model with its units in an order of its own, so that it stands in another basis."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, start=0)
        if seed:
            self.load(TinyAligner().moved(SPEC.random(torch.Generator().manual_seed(seed)), self.state()))


@pytest.mark.parametrize("kind", ["ring", "full", "star", "one_peer_exponential", "random_matching"])
def test_aligned_merging_of_permuted_copies_changes_nobody(tmp_path: Path, kind: str) -> None:
    config = tiny_config(merge={"rule": "aligned"}, topology={"kind": kind}, rounds=2)
    seen = watched(config, together(config, Copy), tmp_path)
    torch.testing.assert_close(seen[-1], seen[0], rtol=0, atol=1e-6)
    distance = journal(tmp_path)[-1]["distance"]
    assert distance["aligned"] == pytest.approx(0, abs=1e-6)
    assert distance["raw"] > 0.5


@pytest.mark.parametrize("kind", ["ring", "star", "torus", "random_matching"])
def test_taking_orders_over_once_keeps_every_agents_function(tmp_path: Path, kind: str) -> None:
    config = tiny_config(merge={"rule": "aligned_once"}, topology={"kind": kind}, agents=6, rounds=1)
    crew = together(config, Still, aligned=False)
    plan = crew.plan()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    before = [function(agent.learner.state(), x) for agent in crew.agents]
    weights = flat(crew)
    depth = max(levels(topology_of(config.topology, 6).parents()).values())
    assert [step.exchange for step in plan] == [*[Exchange.ORDER] * depth, Exchange.MERGE]
    for step in plan[:-1]:
        crew.work(step.number)
    for agent, y in zip(crew.agents, before, strict=True):
        assert agent.placed
        torch.testing.assert_close(function(agent.learner.state(), x), y, rtol=1e-5, atol=1e-5)
    after = flat(crew)
    assert not torch.equal(after[1:], weights[1:])
    assert torch.equal(after[0], weights[0])
    matched = sum(len(agent.record(0)["groups"]) for agent in crew.agents)
    assert matched == 5  # N - 1 matchings in all


def test_permuted_copies_stand_in_one_order_after_taking_it_over_and_merge_to_themselves(tmp_path: Path) -> None:
    config = tiny_config(merge={"rule": "aligned_once"}, rounds=3)
    crew = together(config, Copy)
    first = flat(crew)[0]
    run(config, crew, tmp_path)
    torch.testing.assert_close(flat(crew), first.expand(5, -1), rtol=0, atol=1e-6)


def test_plain_merging_of_permuted_copies_loses_their_function(tmp_path: Path) -> None:
    config = tiny_config(rounds=1, topology={"kind": "full"})
    crew = together(config, Copy)
    first = flat(crew)[0]
    run(config, crew, tmp_path)
    assert float((flat(crew)[1] - first).norm()) > 0.3 * float(first.norm())


@pytest.mark.parametrize("rule", ["plain", "none", "aligned_once"])
def test_the_final_merge_is_of_all_whatever_the_graph(tmp_path: Path, rule: str) -> None:
    config = tiny_config(merge={"rule": rule, "final_global": True}, rounds=2)
    crew = together(config, TinyLearner)
    lines = run(config, crew, tmp_path)
    assert lines[-1]["distance"]["raw"] < 1e-7
    assert lines[0]["distance"]["raw"] > 1e-2
    assert [record["sent"]["snapshots"] for record in lines[-1]["agents"]] == [4] * 5


def test_late_and_rare_merges_send_nothing_in_between(tmp_path: Path) -> None:
    config = tiny_config(rounds=6, merge={"rule": "plain", "every": 2, "start": 1})
    lines = run(config, together(config, TinyLearner), tmp_path)
    assert [line["agents"][0]["sent"]["snapshots"] for line in lines] == [0, 2, 0, 2, 0, 2]
    assert [line["exchange"] for line in lines] == ["none", "merge"] * 3


def test_a_graph_that_changes_goes_on_with_every_merge_not_with_every_round() -> None:
    config = tiny_config(rounds=6, merge={"rule": "plain", "every": 2}, topology={"kind": "one_peer_exponential"})
    assert [step.at for step in steps(config) if step.exchange is Exchange.MERGE] == [0, 1, 2]


class Measured(TinyLearner):
    """Its statistics are the mean of its weights whenever they are taken."""

    def recalibrate(self) -> int:
        self.tensors["norm.running_mean"] = self.tensors["w"].mean(1)
        return 1


@pytest.mark.parametrize("words", [{}, {"algorithm": "cdsgd"}, {"algorithm": "sgp"}], ids=str)
def test_recalibration_follows_every_merge_if_it_is_wanted(tmp_path: Path, words: dict[str, str]) -> None:
    for wanted in (True, False):
        config = tiny_config(recalibrate=wanted, rounds=2, **words)
        crew = together(config, Measured, aligned=False)
        run(config, crew, tmp_path / str(wanted))
        for agent in crew.agents:
            state = agent.learner.state()
            assert torch.allclose(state["norm.running_mean"], state["w"].mean(1), atol=1e-6) is wanted


def test_judging_before_a_merge_leaves_no_trace(tmp_path: Path) -> None:
    config = tiny_config(algorithm="isolated", rounds=2)
    crew = together(config, Measured, aligned=False)
    run(config, crew, tmp_path)
    assert torch.equal(crew.agents[0].learner.state()["norm.running_mean"], model(0)["norm.running_mean"])


def test_model_stock_draws_towards_the_last_merge(tmp_path: Path) -> None:
    config = tiny_config(merge={"rule": "model_stock"}, rounds=3)
    stock = together(config, TinyLearner)
    lines = run(config, stock, tmp_path / "stock")
    plain = run(tiny_config(), together(tiny_config(), TinyLearner), tmp_path / "plain")
    one, two = ([line["distance"]["raw"] for line in lines] for lines in (lines, plain))
    assert one[0] == two[0]  # no common merge yet: plain
    assert one[1:] != two[1:]


def test_soft_merging_is_slower_by_the_own_share(tmp_path: Path) -> None:
    config = tiny_config(merge={"rule": "soft", "own": 0.9}, topology={"kind": "full"}, rounds=1)
    crew = together(config, Still, aligned=False)
    seen = watched(config, crew, tmp_path)
    expected = 0.9 * seen[0] + 0.1 * seen[0].mean(0)
    torch.testing.assert_close(seen[1], expected, rtol=0, atol=1e-6)


def test_the_journal_counts_what_was_really_sent(tmp_path: Path) -> None:
    config = tiny_config()
    crew = together(config, TinyLearner, folder=tmp_path)
    lines = run(config, crew, tmp_path)
    assert [line["round"] for line in lines] == [0, 1, 2]
    size = len(Snapshot("run", 0, 0, 0, model(0)).encode())
    for line in lines:
        for record in line["agents"]:
            assert record["sent"] == {"snapshots": 2, "bytes": 2 * size}
            assert record["missing"] == 0
            assert record["peers"] == [(record["agent"] - 1) % 5, (record["agent"] + 1) % 5] or record["agent"] in (
                0,
                4,
            )
            assert set(record["seconds"]) == {"train", "merge", "evaluate"}
    assert journal(tmp_path) == lines
    states = [agent.learner.state() for agent in crew.agents]
    assert lines[-1]["distance"]["raw"] == pytest.approx(consensus_distance(states), rel=1e-12)
    assert lines[-1]["distance"]["aligned"] == pytest.approx(aligned_distance(states, TinyAligner()), rel=1e-12)
    loss = crew.agents[2].learner.evaluate()["loss"]
    assert lines[-1]["agents"][2]["merged"]["loss"] == loss


def test_models_are_written_as_safetensors_at_the_end(tmp_path: Path) -> None:
    config = tiny_config(rounds=1)
    crew = together(config, TinyLearner, folder=tmp_path)
    run(config, crew, tmp_path)
    for i, agent in enumerate(crew.agents):
        tensors = decode((tmp_path / "models" / f"agent-{i}.safetensors").read_bytes(), Limits()).tensors
        assert all(torch.equal(tensors[name], x) for name, x in agent.learner.state().items())


def test_distances_are_the_formula() -> None:
    states = [{"x": torch.tensor([3.0, 0.0])}, {"x": torch.tensor([1.0, 2.0])}]
    # mean (2, 1), both sqrt(2) from it; norm sqrt(5)
    assert consensus_distance(states) == pytest.approx(math.sqrt(2 / 5), abs=1e-12)
    assert consensus_distance(states[:1]) == 0
    with pytest.raises(ParameterError, match="no agent"):
        consensus_distance([])


def test_a_model_that_is_not_finite_leaves_the_others_and_the_journal_sound(tmp_path: Path) -> None:
    class Diverges(TinyLearner):
        def train(self, batches: int) -> float:
            loss = super().train(batches)
            if self.seed == 1:
                self.tensors["w"] = self.tensors["w"] * math.nan
                return math.nan
            return loss

    config = tiny_config()
    lines = run(config, together(config, Diverges), tmp_path)
    assert all(math.isfinite(record["merged"]["loss"]) for record in lines[-1]["agents"] if record["agent"] != 1)
    assert lines[-1]["agents"][1]["loss"] is None
    assert lines[-1]["agents"][0]["rejected"] == {"non_finite": 1}
    assert lines[-1]["distance"] == {"raw": None, "aligned": None}


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    config = tiny_config()
    run(config, together(config, Still, aligned=False), tmp_path)
    with pytest.raises(StateError, match="holds a run already"):
        run(config, together(config, Still, aligned=False), tmp_path)
    other = tiny_config(seed=3)
    with pytest.raises(StateError, match="with other seed"):
        run(other, together(other, Still), tmp_path, resume=True)
    patient = tiny_config(deadline_s=77.0)
    assert len(run(patient, together(patient, Still), tmp_path, resume=True)) == 3
    assert config_of(tmp_path) == config
    for reads in (journal, config_of):
        with pytest.raises(StateError, match="holds no run"):
            reads(tmp_path / "nowhere")


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    lines: list[Line] = [{"round": 0, "step": 0}]
    (tmp_path / "journal.jsonl").write_text(json.dumps(lines[0]) + '\n{"round": 1, "st')
    assert journal(tmp_path) == lines


def test_threads_are_as_many_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

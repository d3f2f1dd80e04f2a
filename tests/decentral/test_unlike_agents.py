"""Agents that are not like each other, or diverge, or send what nobody takes; words and graphs that lead nowhere."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from merganser.decentral.describing import describe
from merganser.decentral.faults import parse_faults
from merganser.decentral.learner import Match, Tensors
from merganser.decentral.page import over_seeds
from merganser.decentral.rounds import run, together
from merganser.decentral.seen import Seen
from merganser.decentral.snapshot import Snapshot, data_bytes
from merganser.decentral.topology import topology_of
from merganser.decentral.transport import Traffic
from merganser.decentral.words import TopologyWords, load_config, read_config
from merganser.errors import ParameterError, TensorError
from tiny_agents import Still, TinyAligner, TinyLearner, model, tiny_config

WORDS = {"agents": 2, "rounds": 3, "network": {}, "data": {"source": {}}}


def test_an_agent_with_a_buffer_of_its_own_is_refused_by_kind_and_ends_nobodys_run(tmp_path: Path) -> None:
    class Apart(TinyLearner):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            if seed == 2:
                self.tensors["norm.running_var"] = torch.ones(3)

    config = tiny_config()
    lines = run(config, together(config, Apart), tmp_path)
    assert lines[-1]["distance"] == {"raw": None, "aligned": None}
    rejected = [record["rejected"] for record in lines[-1]["agents"]]
    assert rejected == [{}, {"wrong_model": 1}, {"wrong_model": 2}, {"wrong_model": 1}, {}]
    assert lines[-1]["agents"][0]["peers"] == [1, 4]


class Untraced(TinyAligner):
    def match(self, stays: Tensors, moves: Sequence[Tensors]) -> list[Match]:
        raise TensorError("this network cannot be traced")


class OfUntraced(TinyLearner):
    def aligner(self) -> TinyAligner:
        return Untraced()


def test_units_that_cannot_be_compared_cost_the_aligned_distance_and_no_run_that_does_not_need_them(
    tmp_path: Path,
) -> None:
    config = tiny_config(rounds=1)
    (line,) = run(config, together(config, OfUntraced), tmp_path / "plain")
    assert line["distance"]["aligned"] is None
    assert line["distance"]["raw"] > 0
    needing = tiny_config(rounds=1, merge={"rule": "aligned"})
    with pytest.raises(TensorError, match="cannot be traced"):
        run(needing, together(needing, OfUntraced), tmp_path / "aligned")


def test_an_agent_that_diverged_does_not_count_its_neighbours_snapshots_as_too_large(tmp_path: Path) -> None:
    class Diverges(TinyLearner):
        def train(self, batches: int) -> float:
            loss = super().train(batches)
            if self.seed == 1:
                self.tensors["w"] = self.tensors["w"] * math.nan
            return loss

    config = tiny_config(rounds=1)
    (line,) = run(config, together(config, Diverges, aligned=False), tmp_path)
    assert [record["rejected"] for record in line["agents"]] == [{"non_finite": 1}, {}, {"non_finite": 1}, {}, {}]
    assert [record["missing"] for record in line["agents"]] == [1, 2, 1, 0, 0]


@pytest.mark.parametrize("words", [{}, {"algorithm": "cdsgd"}, {"algorithm": "sgp"}, {"codec": "bf16"}], ids=str)
def test_a_model_that_everybody_would_refuse_for_its_size_is_refused_before_it_trains(
    words: dict[str, str],
) -> None:
    size = data_bytes(model(0), "bf16" if "codec" in words else "fp32") + 8 * (words.get("algorithm") == "sgp")
    snapshot = Snapshot("run", 0, 0, 0, model(0), "bf16" if "codec" in words else "fp32").encode()
    assert size - 8 * (words.get("algorithm") == "sgp") == len(snapshot) - 8 - int.from_bytes(snapshot[:8], "little")
    with pytest.raises(ParameterError, match=f"a snapshot of this model takes {size:,} bytes"):
        together(tiny_config(limits={"snapshot_bytes": size - 1}, **words), Still)
    together(tiny_config(limits={"snapshot_bytes": size - 1}, algorithm="isolated"), Still)
    together(tiny_config(limits={"snapshot_bytes": size - 1}, merge={"rule": "none"}), Still)


def test_the_final_merge_of_soft_agents_is_the_mean_of_all(tmp_path: Path) -> None:
    config = tiny_config(merge={"rule": "soft", "own": 0.99, "final_global": True})
    crew = together(config, Still, aligned=False)
    lines = run(config, crew, tmp_path)
    assert lines[-1]["distance"]["raw"] < 1e-6 < lines[-2]["distance"]["raw"]
    mean = torch.stack([model(i)["w"].double() for i in range(5)]).mean(0)
    for agent in crew.agents:
        torch.testing.assert_close(agent.learner.state()["w"].double(), mean, rtol=0, atol=1e-5)


# words


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"agents": 2001}, "agents: .*less than or equal to 2000"),
        ({"agents": 10**30}, "agents: "),
        ({"seed": 1 << 43}, "seed: .*less than"),
        ({"data": {"source": {}, "seed": 1 << 70}}, "data.seed: "),
        ({"topology": {"kind": "random_matching", "seed": 1 << 70}}, "topology.seed: "),
        ({"merge": {"match": {"data": "proxy"}}}, "data.proxy sets no examples aside"),
    ],
)
def test_what_no_run_can_do_is_said_by_its_words(words: dict[str, object], what: str) -> None:
    with pytest.raises(ParameterError, match=what):
        read_config({**WORDS, **words})


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    torch.Generator().manual_seed(((1 << 43) - 1) * 1_000_003 + 2000)


def test_a_key_that_stands_twice_is_refused_and_merged_keys_are_not(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("agents: 2\nrounds: 3\nnetwork: {}\ndata: {source: {}}\nrounds: 5\n")
    with pytest.raises(ParameterError, match=r"run.yaml is not sound YAML: rounds stands there twice, .* line 5"):
        load_config(path)
    path.write_text("agents: 2\nrounds: 3\nnetwork: {}\nmerge: {rule: soft, own: 0.1, own: 0.2}\ndata: {source: {}}\n")
    with pytest.raises(ParameterError, match="own stands there twice"):
        load_config(path)
    path.write_text(
        "agents: 2\nrounds: 3\nnetwork: &a {kind: x, width: 1}\ndata: {source: &b {<<: *a, width: 2, seed: 3}, "
        "domains: {}}\n"
    )
    assert load_config(path).data.source == {"kind": "x", "width": 2, "seed": 3}


DEEP = {"list": "[" * 1500, "map": "agents: 2\nnetwork: " + "{a: " * 900 + "1" + "}" * 900}


@pytest.mark.parametrize("kind", DEEP)
def test_yaml_that_is_nested_too_deeply_is_an_error_of_its_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run.yaml").write_text(DEEP[kind])
    with pytest.raises(ParameterError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_faults_that_would_never_happen_are_refused() -> None:
    plan = parse_faults("0:2:train:kill, 1:3:publish:nan", agents=2)
    plan.refuse_late(4)
    with pytest.raises(ParameterError, match="a fault of agent 1 in round 3, and the last is 2"):
        plan.refuse_late(3)


# graphs


def graph(folder: Path, **content: object) -> TopologyWords:
    (folder / "graph.json").write_text(json.dumps(content))
    return TopologyWords(kind="file", file=str(folder / "graph.json"))


@pytest.mark.parametrize("weights", [[[0, 1], [1, 0]], [[1 - 1e-15, 1e-15], [1e-15, 1 - 1e-15]]])
def test_weights_by_which_nobody_agrees_are_described_as_such(tmp_path: Path, weights: object) -> None:
    """Two that change places have an eigenvalue of -1, two that hardly listen one of 1."""
    words = graph(tmp_path, adjacency=[[0, 1], [1, 0]], weights=weights)
    assert "lambda2 1.0000, rho 1.0000, gap 1 - lambda2 = 0.0000: disagreement does not shrink" in describe(
        topology_of(words, 2)
    )


@pytest.mark.parametrize("entry", ["1", True, None, [1], 10**400, {}])
def test_entries_that_are_no_numbers_are_refused(tmp_path: Path, entry: object) -> None:
    words = graph(tmp_path, adjacency=[[0, entry], [entry, 0]])
    with pytest.raises(ParameterError, match="adjacency is not a matrix of numbers"):
        topology_of(words, 2)


def test_the_largest_ring_has_the_closed_eigenvalue() -> None:
    ring = topology_of(TopologyWords(kind="ring"), 600)
    assert ring.lambda2 == pytest.approx((1 + 2 * np.cos(2 * np.pi / 600)) / 3, abs=1e-12)


# what is told


def test_a_run_whose_last_round_nobody_ended_in_time_has_no_number() -> None:
    absent = {"merged": None, "trained": None, "sent": {"bytes": 0}, "rejected": {}, "missing": 0}
    config = tiny_config(agents=1)
    lines = [{"round": 4, "agents": [absent]}]
    assert over_seeds([(config, lines)]) == [("run, round 4", "0", "", "", "", "0")]


def test_a_match_without_units_leaves_no_nan_in_a_record() -> None:
    seen = Seen(matches=[Match({}, {"h": math.nan}, {"h": math.nan})])
    record = seen.record(Traffic(), [])
    assert (record["fixed"], record["correlation"], record["groups"]) == (None, None, {"h": [None, None]})
    json.dumps(record, allow_nan=False)

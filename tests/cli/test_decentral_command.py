"""`merganser decentral`: runs, resumes, shows and describes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from merganser.checkpoints import open_source
from merganser.decentral.folder import journal
from merganser.decentral.page import accuracies, over_seeds, row
from merganser.decentral.shards import shared_out
from merganser.decentral.torch_learner import TorchLearner
from merganser.decentral.words import load_config, read_config
from merganser.errors import ParameterError
from merganser.study.agents import Learners

pytestmark = pytest.mark.xdist_group("decentral-command")  # the run is made once
Run = Callable[..., tuple[int, str, str]]
EXAMPLE = Path(__file__).parents[2] / "examples" / "decentral" / "digits.yaml"


def config_file(folder: Path, **changes: object) -> Path:
    """The shipped example, smaller."""
    small = {
        "name": "small",
        "agents": 3,
        "rounds": 2,
        "warmup_epochs": 6,
        "merge": {"rule": "aligned_once", "match": {"images": 50}},
        "network": {"kind": "perceptron", "image": 8, "hidden": 24, "depth": 1, "width": 16},
        "augment": {},
    }
    path = folder / f"{'-'.join(changes) or 'config'}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(EXAMPLE.read_text()), **small, **changes}))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.yaml`, and the run of networks on the digits that it tells of in `whole`."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["decentral", "run", config_file(folder), "--out", folder / "whole"]
    command = [sys.executable, "-m", "merganser", *map(str, words)]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    (folder / "said").write_text(found.stdout)
    return folder


def test_agents_learn_the_digits_and_a_run_that_was_killed_ends_the_same(done: Path, run: Run) -> None:
    config, out = done / "config.yaml", (done / "said").read_text()
    assert out.splitlines()[0].split()[0] == "round"
    assert "report.html: written" in out
    lines = journal(done / "whole")
    assert [line["round"] for line in lines] == [0, 1]
    assert min(accuracies(lines[0], "trained")) > 60
    assert min(accuracies(lines[1], "merged")) > 70  # 10 by chance
    assert lines[1]["distance"]["raw"] < lines[0]["distance"]["raw"]
    for name in ("report.md", "report.html", "accuracy.png", "distance.png"):
        assert (done / "whole" / name).stat().st_size > 500
    assert f"{row(lines[1])[3]}" in (done / "whole" / "report.md").read_text()
    # the same, taken up again after its first round
    for path in (done / "whole").glob("agent-*/00000003.safetensors"):
        path.unlink()
    first = open_source(done / "whole" / "models" / "agent-1.safetensors")
    before = {name: first.read(name) for name in first.infos}
    code, _, error = run("decentral", "run", config, "--out", done / "whole", "--resume", "-q")
    assert (code, error) == (0, "")
    again = open_source(done / "whole" / "models" / "agent-1.safetensors")
    assert all(torch.equal(again.read(name), x) for name, x in before.items())
    assert journal(done / "whole")[1]["agents"][1]["merged"] == lines[1]["agents"][1]["merged"]


def test_a_run_is_shown(done: Path, run: Run) -> None:
    code, out, _ = run("decentral", "show", done / "whole")
    assert code == 0
    assert "3 agents, ring, rule aligned_once; 2 rounds" in out
    assert row(journal(done / "whole")[0])[3] in out
    code, out, _ = run("decentral", "show", done / "whole", done / "whole")
    assert code == 0
    assert out.splitlines()[0].split("  ")[0] == "run"
    assert "small, round 1" in out


def test_what_cannot_be_run_says_so(tmp_path: Path, run: Run) -> None:
    for words, says in (
        ((tmp_path / "nowhere.yaml", "--out", tmp_path / "x"), "there is no file"),
        ((config_file(tmp_path, rouns=3), "--out", tmp_path / "x"), "did you mean rounds?"),
        ((config_file(tmp_path, network={"kind": "blob"}), "--out", tmp_path / "x"), "network kind is 'blob'"),
        ((config_file(tmp_path), "--out", tmp_path / "x", "--faults", "1:2"), "agent:round:phase:action"),
        ((config_file(tmp_path, data={"source": {"kind": "digit"}}), "--out", tmp_path / "x"), "digit"),
    ):
        code, out, error = run("decentral", "run", *words)
        assert (code, out) == (2, "")
        assert says in error
    code, _, error = run("decentral", "show", tmp_path)
    assert code == 2
    assert "holds no run" in error


def test_a_run_that_cannot_begin_leaves_no_folder_and_no_trace_in_one_that_is_there(
    done: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = config_file(tmp_path), tmp_path / "out"
    for words, says in (
        (("--faults", "3:0:train:kill"), "a fault of agent 3; there are 3, from 0"),
        (("--faults", "0:9:publish:nan"), "a fault of agent 0 in round 9, and the last is 2"),
        (("--seed", 1 << 50), "seed: Input should be less than"),
        (("limits.snapshot_bytes=100",), "limits.snapshot_bytes is 100, and a snapshot of this model takes"),
        (("merge.match.data=proxy",), "data.proxy sets no examples aside"),
        (("topology.kind=hub", "agents=2"), "the graph falls apart"),
    ):
        code, said, error = run("decentral", "run", config, *words, "--out", out)
        assert (code, said) == (2, "")
        assert says in error
        assert not out.exists()
    whole = done / "whole"
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    monkeypatch.setattr("merganser.study.agents.load_examples", pytest.fail)  # it is refused before anything is read
    for words, says in (((), "holds a run already"), (("--resume", "rounds=3"), "holds a run with other rounds")):
        code, said, error = run("decentral", "run", done / "config.yaml", *words, "--out", whole)
        assert (code, said) == (2, "")
        assert says in error
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert len(json.loads((whole / "inputs.json").read_text())["data"]) == 64


def test_a_run_that_has_no_round_yet_is_shown_as_such(done: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((done / "whole" / "run.json").read_bytes())
    code, out, error = run("decentral", "show", tmp_path)
    assert (code, error) == (0, "")
    assert "No round is done." in out
    code, _, error = run("decentral", "show", tmp_path, done / "whole")
    assert code == 2
    assert "the run small, seed 0, has no round yet" in error


def test_a_topology_is_described(run: Run) -> None:
    code, out, _ = run("decentral", "topology", "ring", "10")
    assert code == 0
    assert "lambda2 0.8727" in out
    code, _, error = run("decentral", "topology", "rong", "10")
    assert code == 2
    assert "did you mean ring?" in error


def test_the_shipped_example_is_sound() -> None:
    config = load_config(EXAMPLE)
    assert (config.agents, config.topology.kind, config.merge.rule) == (5, "ring", "aligned_once")
    learners = Learners(config)
    assert sum(map(len, learners.shards)) == 1079  # nine tenths of two thirds of 1,797
    one, two = learners(0), learners(1)
    assert not torch.equal(one.state()["head.weight"], two.state()["head.weight"])


def made(**changes: object) -> Learners:
    words = {
        "agents": 4,
        "rounds": 1,
        "network": {"kind": "perceptron", "image": 8, "hidden": 8, "depth": 1, "width": 8},
        "data": {"source": {"kind": "digits"}},
    }
    return Learners(read_config({**words, **changes}))


def rows(learner: TorchLearner) -> set[bytes]:
    return {x.numpy().tobytes() for x in learner.shard.x}


def test_learners_start_alike_only_if_they_are_to() -> None:
    alike = made(same_start=True)
    assert all(torch.equal(alike(3).state()[name], x) for name, x in alike(0).state().items())
    other = made(seed=1)
    assert not torch.equal(other(0).state()["head.weight"], made()(1).state()["head.weight"])


def test_a_centralised_learner_has_everybodys_data_and_a_proxy_is_nobodys() -> None:
    apart = made(data={"source": {"kind": "digits"}, "proxy": 50})
    parts = [rows(apart(i)) for i in range(4)]
    assert apart.proxy is not None
    assert len(apart.proxy) == 50
    shared = {x.numpy().tobytes() for x in apart.proxy}
    assert not any(part & shared for part in parts)
    pooled = made(algorithm="centralised", data={"source": {"kind": "digits"}, "proxy": 50})
    assert rows(pooled(0)) == set().union(*parts)


def test_domains_go_round_and_share_out_evenly() -> None:
    domains = {"plain": {"kind": "digits"}, "shuffled": {"kind": "digits", "shuffle": 3}}
    config = {"domains": domains, "split": "domains", "items": 200, "test": 77}
    four = made(data=config)
    sizes = [len(four(i).shard) for i in range(4)]
    assert sizes == [200] * 4
    assert not rows(four(0)) & rows(four(2))
    assert len(four(1).test) == 77
    with pytest.raises(ParameterError, match=r"data only: .*'digit'"):
        made(data={"domains": {"only": {"kind": "digit"}}, "split": "domains"})


LABELS = np.repeat(np.arange(10), 60)


@pytest.mark.parametrize("agents", [1, 5, 7, 10, 20])
@pytest.mark.parametrize("split", ["iid", "classes", "dirichlet"])
def test_shards_are_a_partition(split: str, agents: int) -> None:
    parts = shared_out(LABELS, agents, split, alpha=0.5, seed=3)  # type: ignore[arg-type]
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    counts = np.array([np.bincount(LABELS[part], minlength=10) for part in parts])
    if split == "iid":
        assert np.ptp(counts, axis=0).max() <= 1
        assert np.ptp(counts.sum(1)) <= 1
    elif split == "classes":
        for c in range(10):
            owners = np.flatnonzero(counts[:, c])
            assert owners.tolist() == ([c % agents] if agents <= 10 else [c, c + 10])
    else:
        assert counts.sum(1).min() >= min(10, 600 // (2 * agents))
    again = shared_out(LABELS, agents, split, alpha=0.5, seed=3)  # type: ignore[arg-type]
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_dirichlet_shares_have_the_concentration_they_are_asked_for() -> None:
    """Var of a share is (1/n)(1 - 1/n) / (n alpha + 1)."""
    labels = np.repeat(np.arange(400), 500)
    for alpha in (0.5, 5.0):
        parts = shared_out(labels, 4, "dirichlet", alpha=alpha, seed=1)
        shares = np.array([np.bincount(labels[part], minlength=400) for part in parts]) / 500
        assert shares.var() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.1)


def test_an_agent_without_examples_is_an_error() -> None:
    with pytest.raises(ParameterError, match="agent 3 has no example"):
        shared_out(np.array([0, 0, 1]), 4, "iid")
    with pytest.raises(ParameterError, match="draws with alpha"):
        shared_out(LABELS[::60], 12, "dirichlet", alpha=0.5)


def line(merged: list[float]) -> dict[str, object]:
    agents = [
        {"merged": {"accuracy": x}, "trained": None, "sent": {"bytes": 500}, "rejected": {}, "missing": 0}
        for x in merged
    ]
    return {"round": 0, "agents": agents}


def test_spread_over_agents_and_over_seeds_stand_apart() -> None:
    config = read_config({"agents": 2, "rounds": 1, "network": {}, "data": {"source": {}}})
    runs = [
        (config.model_copy(update={"seed": seed}), [line(values)])
        for seed, values in enumerate(([10.0, 12.0], [20.0, 22.0], [30.0, 32.0]))
    ]
    ((name, seeds, mean, over_agents, across, sent),) = over_seeds(runs)
    assert (name, seeds, mean, sent) == ("run, round 0", "0, 1, 2", "21.0", "1.0 kB")
    assert (over_agents, across) == ("± 1.4", "± 10.0")
    with pytest.raises(ParameterError, match="has no round"):
        over_seeds([(config, [])])


def test_the_journal_is_json_without_nan(done: Path) -> None:
    for text in (done / "whole" / "journal.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)

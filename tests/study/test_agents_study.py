"""A study of agents: one warm-up for all methods, runs as they are by themselves, a page, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import write
from small_apart import call, contents, corners, write_data
from small_data import write_npz

from merganser.decentral.rounds import run as run_rounds
from merganser.decentral.rounds import together
from merganser.decentral.words import read_config
from merganser.errors import ParameterError, StateError
from merganser.study.agents import Learners
from merganser.study.composing import study_of
from merganser.study.warm_up import warmed
from merganser.study.words_agents import AgentsNode

Run = Callable[..., tuple[int, str, str]]
METHODS = ("alone", "plain", "once", "cdsgd", "one")
STUDY = """# @package _global_
study:
  kind: agents
  name: tiny-agents
  title: Tiny agents
  zoo: zoo/tiny
  seeds: [0, 1]
  shown: [1, 3, 9]
  against: plain
  base:
    agents: 3
    rounds: 3
    warmup_epochs: 2
    local_epochs: 1
    batch: 10
    optimizer: {lr: 1.0e-2}
    network: {kind: perceptron, image: 4, hidden: 8, depth: 1, width: 8}
    data: {source: {kind: packed, file: corners}, shrink: 2, items: 40, test: 40}
  methods:
    alone: {label: alone, drawn: level, run: {algorithm: isolated}}
    plain: {label: WA + BN}
    once: {label: once, run: {merge: {rule: aligned_once, match: {images: 20}}}}
    cdsgd: {label: CDSGD, run: {algorithm: cdsgd}}
    one: {label: in one place, drawn: level, run: {algorithm: centralised}}
"""


class Shop:
    """Data, a group, and a study that is done."""

    def __init__(self, root: Path) -> None:
        self.data, self.groups, self.zoo = write_data(root / "data"), root / "groups", root / "zoo"
        write(self.groups / "study/tiny-agents.yaml", STUDY)
        self.whole = root / "whole"

    def words(self, out: Path, *more: object, zoo: Path | None = None) -> tuple[object, ...]:
        folders = ("--data", self.data, "--config-dir", self.groups, "--zoo", zoo or self.zoo, "--out", out)
        return ("study", "study=tiny-agents", *more, *folders, "--quiet")

    @property
    def node(self) -> AgentsNode:
        node = study_of(["study=tiny-agents"], extra=self.groups)
        assert isinstance(node, AgentsNode)
        return node


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    assert call(*shop.words(shop.whole)) == 0
    return shop


def rounds_of(out: Path, method: str, seed: int) -> list[dict[str, Any]]:
    """The journal of a run, without what the clock decides."""
    found = json.loads((out / "runs" / method / f"seed-{seed}.json").read_text())["rounds"]
    return [timeless(line) for line in found]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    agents = [{k: v for k, v in agent.items() if k not in ("seconds", "incarnation")} for agent in line["agents"]]
    return {**{k: v for k, v in line.items() if k != "seconds"}, "agents": agents}


@pytest.mark.parametrize("method", ["plain", "cdsgd", "one"])
def test_a_run_of_a_study_is_the_run_by_itself_bit_for_bit(shop: Shop, tmp_path: Path, method: str) -> None:
    config = shop.node.config(method, 1)
    lines = run_rounds(config, together(config, Learners(config, shop.data)), tmp_path / "run")
    assert [timeless(line) for line in lines] == rounds_of(shop.whole, method, 1)


def test_methods_share_what_agents_learn_alone_and_one_agent_with_all_data_learns_its_own(shop: Shop) -> None:
    for seed in (0, 1):
        alone = [rounds_of(shop.whole, method, seed)[0] for method in METHODS[:-1]]
        losses = [[agent["loss"] for agent in line["agents"]] for line in alone]
        assert len(set(losses[0])) == 3
        assert all(found == losses[0] for found in losses)
    kept = sorted(path.parent.relative_to(shop.zoo).as_posix() for path in shop.zoo.glob("*/*/*.safetensors"))
    names = sorted(path.name.rsplit("-", 1)[0] for path in shop.zoo.iterdir())
    assert names == ["seed-0-one", "seed-0-own", "seed-1-one", "seed-1-own"]
    assert [Path(place).name for place in kept if "-own-" in place] == ["agent-0", "agent-1", "agent-2"] * 2
    assert [Path(place).name for place in kept if "-one-" in place] == ["agent-0"] * 2
    assert not any((shop.whole / "working").glob("*/*"))


def test_bytes_of_a_merge_are_those_of_one_batch_of_mixing(shop: Shop) -> None:
    merged, mixed = (rounds_of(shop.whole, method, 0) for method in ("plain", "cdsgd"))
    merges = [agent["sent"] for line in merged for agent in line["agents"]]
    mixes = [agent["sent"] for line in mixed for agent in line["agents"]]
    assert [sent["snapshots"] for sent in merges] == [2] * 9
    assert [sent["snapshots"] for sent in mixes] == [0] * 3 + [8] * 6  # 4 batches a round, after the one alone
    assert mixes[-1]["bytes"] / 4 == pytest.approx(merges[-1]["bytes"], rel=1e-2)


def test_page_says_what_records_hold(shop: Shop) -> None:
    text = (shop.whole / "report.md").read_text()
    found = json.loads((shop.whole / "scores.json").read_text())
    runs = {method: [rounds_of(shop.whole, method, seed) for seed in (0, 1)] for method in METHODS}

    def accuracy(method: str, seed: int, round: int, when: str = "merged") -> list[float]:
        return [agent[when]["accuracy"] for agent in runs[method][seed][round]["agents"]]

    def means(method: str, round: int) -> list[float]:
        return [statistics.fmean(accuracy(method, seed, round)) for seed in (0, 1)]

    (row,) = [line.split("|") for line in text.split("## Against")[0].splitlines() if line.startswith("| once ")]
    cells = [cell.strip() for cell in row]
    trained = statistics.fmean(statistics.fmean(accuracy("once", seed, 2, "trained")) for seed in (0, 1))
    agents = statistics.fmean(statistics.stdev(accuracy("once", seed, 2)) for seed in (0, 1))
    assert cells[2:4] == [f"{statistics.fmean(means('once', k)):.1f}" for k in (0, 2)]
    assert cells[4:7] == [f"{trained:.1f}", f"{agents:.1f}", f"{statistics.stdev(means('once', 2)):.1f}"]
    sent = [agent["sent"]["bytes"] for seed in (0, 1) for line in runs["once"][seed] for agent in line["agents"]]
    assert found["once"]["bytes"] == pytest.approx(sum(sent) / 6)
    (row,) = [line.split("|") for line in text.split("## Against")[1].splitlines() if line.startswith("| CDSGD ")]
    points = [x - y for x, y in zip(means("cdsgd", 2), means("plain", 2), strict=True)]
    assert row[3].strip() == f"{statistics.fmean(points):+.1f} ± {statistics.stdev(points):.1f}"
    assert (found["one"]["bytes"], found["one"]["over_agents"]) == (0, [None] * 3)
    assert "(accuracy.png)" in text
    assert (shop.whole / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_a_rerun_changes_no_byte(shop: Shop) -> None:
    before = contents(shop.whole) | contents(shop.zoo)
    assert call(*shop.words(shop.whole)) == 0
    assert contents(shop.whole) | contents(shop.zoo) == before


def test_a_study_killed_in_a_run_goes_on_to_the_same_bits(shop: Shop, tmp_path: Path) -> None:
    out, zoo = tmp_path / "out", tmp_path / "zoo"
    words = shop.words(out, "study.seeds=[1]", zoo=zoo)
    argv = [sys.executable, "-m", "merganser", *map(str, words)]
    process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < ends:
        begun = [path for path in out.glob("working/*/*/journal.jsonl") if path.stat().st_size]
        if begun and any(out.glob("runs/*/*.json")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = contents(out / "runs")
    assert 0 < len(done) < len(METHODS)
    assert call(*words) == 0
    assert {name: content for name, content in contents(out / "runs").items() if name in done} == done
    for method in METHODS:
        assert rounds_of(out, method, 1) == rounds_of(shop.whole, method, 1)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("study.methods.plain.run.merge.rule=alinged", "did you mean aligned?"),
        ("study.methods.plain.run.seed=1", "seed is the study's to give"),
        ("study.base.name=x", "name is the study's to give"),
        ("study.against=wa", "against names wa"),
        ("study.only=[plain,alon]", "only names alon"),
        ("study.shown=[0]", "study.shown.0"),
        ("study.base.rounds=4", "other base"),
        ("study.methods.plain.run.batch=20", "other batch"),
        ("study.base.data.shrink=3", "shrink is 3, and pictures of data are 8 x 8"),
        ("--bfloat16", "train in float32 on the CPU"),
    ],
)
def test_what_cannot_be_meant_is_refused(shop: Shop, tmp_path: Path, run: Run, word: str, says: str) -> None:
    out = tmp_path / "out" if "shrink" in word else shop.whole
    code, _, error = run(*shop.words(out, word, zoo=tmp_path / "zoo"))
    assert (code, says in error) == (2, True), error
    assert not list((tmp_path / "zoo").glob("*/agent-*"))


def test_a_warm_up_from_other_data_is_refused(shop: Shop, tmp_path: Path) -> None:
    other = tmp_path / "data"
    write_npz(other / "corners.npz", {"train": corners(400, 2), "test": corners(80, 1)}, ["nw", "ne", "sw", "se"])
    config = shop.node.config("plain", 0)
    make = warmed(config, Learners(config, other), shop.zoo)
    with pytest.raises(StateError, match="learnt from other data"):
        make(0).train(8)


def test_shrunk_pictures_are_means_of_squares(shop: Shop) -> None:
    words = {"agents": 1, "rounds": 1, "network": {"kind": "resnet", "image": 4}}
    source = {"kind": "packed", "file": "corners"}
    small, large = (
        Learners(read_config({**words, "data": {"source": source, "shrink": side}}), shop.data) for side in (2, 1)
    )
    squares = (large.test.x + 1) * 127.5
    expected = squares.reshape(-1, 4, 2, 4, 2, 3).double().mean((2, 4))
    assert (small.test.x.shape, small.test.y.tolist()) == ((80, 4, 4, 3), large.test.y.tolist())
    assert float(((small.test.x + 1) * 127.5 - expected).abs().max()) <= 0.5 + 1e-4


def test_seven_methods_are_told_apart_in_a_picture_and_an_eighth_is_not(shop: Shop) -> None:
    content = shop.node.model_dump()
    content["methods"] = {f"m{i}": {"label": f"m{i}"} for i in range(8)}
    with pytest.raises(ValueError, match="7 curves apart"):
        AgentsNode.model_validate({**content, "against": None})
    content["methods"]["m7"]["drawn"] = "level"
    AgentsNode.model_validate({**content, "against": None})
    with pytest.raises(ParameterError, match="method m0"):
        AgentsNode.model_validate({**content, "against": None}).model_copy(update={"base": {}}).config("m0", 0)

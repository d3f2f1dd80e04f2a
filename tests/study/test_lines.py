"""A study of lines: losses between two networks, and no ridge between a network and itself with its units elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_apart import call, contents, without_times, write_data, write_groups
from torch import nn

from merganser.align.barrier import loss_line, mean_loss
from merganser.align.renorm import reset_batch_norm
from merganser.align.surface import surface
from merganser.errors import ParameterError
from merganser.study.networks import load_encoder
from merganser.symmetry import symmetries

Run = Callable[..., tuple[int, str, str]]
RULES = ("naive", "weights", "activations")


class Shop:
    """Data, groups, and a study that is done."""

    def __init__(self, root: Path) -> None:
        self.data, self.groups, self.zoo = write_data(root / "data"), write_groups(root / "groups"), root / "zoo"
        self.whole = root / "whole"

    def words(self, out: Path, *more: object, zoo: Path | None = None) -> tuple[object, ...]:
        folders = ("--data", self.data, "--config-dir", self.groups, "--zoo", zoo or self.zoo, "--out", out)
        return ("study", "study=tiny-lines", *more, *folders, "--quiet")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    assert call(*shop.words(shop.whole)) == 0
    return shop


def rules_of(out: Path, name: str) -> dict:
    return json.loads((out / "pairs" / f"{name}.json").read_text())["rules"]


def test_every_rule_has_its_line_and_its_ends_are_the_networks_themselves(shop: Shop) -> None:
    for name, statistics in (("net/seeds-0-1", "BatchNorm anew"), ("plain/seeds-0-1", "none")):
        rules = rules_of(shop.whole, name)
        assert tuple(rules) == RULES
        for rule in rules.values():
            assert (rule["n"], rule["labels"], rule["statistics"]) == (80, False, statistics)
            assert rule["places"] == [0, 0.5, 1]
            rise = rule["losses"][1] - (rule["losses"][0] + rule["losses"][2]) / 2
            assert rule["barrier"] == pytest.approx(max(rise, 0), abs=1e-9)
            for end in (0, 2):
                assert rule["losses"][end] == pytest.approx(rules["naive"]["losses"][end], abs=1e-4)
    assert rules_of(shop.whole, "net/seeds-0-1")["weights"]["pictures"] == {"measure": 32}
    assert rules_of(shop.whole, "plain/seeds-0-1")["weights"]["pictures"] == {}
    assert rules_of(shop.whole, "plain/seeds-0-1")["activations"]["pictures"] == {"compare": 32}


def test_there_is_no_ridge_to_itself_with_its_units_elsewhere(shop: Shop, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(shop.zoo, tmp_path / "zoo"))
    for name in ("net", "plain"):
        one, two = zoo / name / "seed-0", zoo / name / "seed-1"
        spec = symmetries(load_encoder(one), (torch.rand(2, 8, 8, 3),)).spec
        moved = spec.random(torch.Generator().manual_seed(1))
        state = load_file(one / "model.safetensors")
        state = {n: spec.apply(moved, n, x) if n in spec.axes else x for n, x in state.items()}
        save_file(state, two / "model.safetensors")  # its receipt stays that of seed 1
    assert call(*shop.words(tmp_path / "out", "study.networks.plain.pairs=[[0,1]]", zoo=zoo)) == 0
    for name in ("net", "plain"):
        rules = rules_of(tmp_path / "out", f"{name}/seeds-0-1")
        for rule in ("weights", "activations"):
            assert abs(rules[rule]["barrier"]) < 1e-5
            assert len(set(rules[rule]["accuracies"])) == 1
        assert rules["naive"]["barrier"] > 0.05


def test_page_has_a_table_and_a_picture_a_network(shop: Shop) -> None:
    text = (shop.whole / "report.md").read_text()
    barriers = [rules_of(shop.whole, f"plain/seeds-{s}")["weights"]["barrier"] for s in ("0-1", "2-3")]
    lines = [x for x in text.split("## MLP")[1].splitlines() if x.startswith("| aligned by weights (Git Re-Basin)")]
    mean, deviation = sum(barriers) / 2, abs(barriers[0] - barriers[1]) / 2**0.5
    assert lines[0].split("|")[2].strip() == f"{mean:.2f} ± {deviation:.2f}"
    for name in ("line-net", "line-plain"):
        assert f"({name}.png)" in text
        assert (shop.whole / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_rerun_changes_no_byte(shop: Shop) -> None:
    before = contents(shop.whole) | contents(shop.zoo)
    assert call(*shop.words(shop.whole)) == 0
    assert contents(shop.whole) | contents(shop.zoo) == before


def test_a_study_killed_in_training_goes_on_to_the_same_bits(shop: Shop, tmp_path: Path) -> None:
    out, zoo = tmp_path / "out", tmp_path / "zoo"
    words = shop.words(out, "~study.networks.plain", zoo=zoo)
    argv = [sys.executable, "-m", "merganser", *map(str, words)]
    process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(zoo.glob("*/.training-*/run.pt")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "pairs").exists()
    assert call(*words) == 0
    name = "pairs/net/seeds-0-1.json"
    assert without_times(out) == {name: without_times(shop.whole)[name]}
    for path in ("net/seed-0/model.safetensors", "net/seed-1/model.safetensors"):
        assert (zoo / path).read_bytes() == (shop.zoo / path).read_bytes()
    assert not any(zoo.glob("*/.training-*"))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("study.points=2", "study.points"),
        ("study.networks.net.pairs=[[0]]", "study.networks.net.pairs"),
        ("study.rules=[wieghts]", "study.rules.0"),
        ("study.networks.net.splits=[0]", "study.networks.net.splits"),
        ("--bfloat16", "judges losses, and these in float32"),
    ],
)
def test_what_cannot_be_meant_is_refused(shop: Shop, tmp_path: Path, run: Run, word: str, says: str) -> None:
    code, _, error = run(*shop.words(tmp_path / "out", word, zoo=tmp_path / "zoo"))
    assert (code, says in error) == (2, True), error
    assert not (tmp_path / "zoo").exists()


def test_statistics_of_a_line_are_measured_on_what_is_given_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 2, generator=generator), 3 + 2 * torch.randn(16, 2, generator=generator)
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    state, labelled = network.state_dict(), [(((x,), {}), torch.arange(16) % 2)]
    found = {
        name: loss_line(network, state, state, labelled, points=3, reset=True, measured=batches).losses[1]
        for name, batches in (("given", [((y,), {})]), ("judged", None), ("same", [((x,), {})]))
    }
    assert found["judged"] == found["same"]
    reset_batch_norm(network, [((y,), {})])
    assert found["given"] == pytest.approx(mean_loss(network, labelled)[0])
    assert abs(found["given"] - found["judged"]) > 1e-3


def parabola(target: tuple[float, float]) -> Callable[[nn.Module], list[float]]:
    """The squared distance of a network's two weights from a place, and the first weight."""

    def judge(network: nn.Module) -> list[float]:
        x = network.get_parameter("weight").detach()[0]
        return [float(((x - torch.tensor(target)) ** 2).sum()), float(x[0])]

    return judge


def test_a_surface_is_that_of_its_plane() -> None:
    network = nn.Linear(2, 1, bias=False)
    a, b, c = ({"weight": torch.tensor([row])} for row in ((1.0, 1.0), (3.0, 1.0), (2.0, 4.0)))
    found = surface(network, (a, b, c), parabola((1.0, 1.0)), points=3, margin=0.5)
    assert found.corners == ((0.0, 0.0), (2.0, 0.0), (1.0, 3.0))
    assert found.across == pytest.approx((-1.0, 1.0, 3.0))
    assert found.up == pytest.approx((-1.5, 1.5, 4.5))
    assert found.values[0][1] == pytest.approx([v + 1.5**2 for v in (1.0, 1.0, 9.0)], rel=1e-5)
    assert found.values[1][2] == pytest.approx([0.0, 2.0, 4.0], abs=1e-5)


def test_a_line_is_no_plane() -> None:
    a, b, c = ({"weight": torch.tensor([[x, x]])} for x in (0.0, 1.0, 2.0))
    with pytest.raises(ParameterError, match="lie on one line"):
        surface(nn.Linear(2, 1, bias=False), (a, b, c), parabola((0.0, 0.0)))

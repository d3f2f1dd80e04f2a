"""A study of halves measures what it says, goes on after kill -9, and refuses what it cannot mean."""

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

import numpy as np
import pytest
import torch
from small_apart import call, contents, corners, without_times, write_data, write_groups
from torch import Tensor

from merganser.errors import ParameterError
from merganser.study.data import Examples
from merganser.study.halves import Split, scores, split_by
from merganser.study.networks import load_encoder, new_encoder
from merganser.study.rules import RULES, Bench
from merganser.study.training import Lesson, train
from merganser.study.words import Training
from merganser.study.words_apart import Codes, Rule
from merganser.symmetry import symmetries

Run = Callable[..., tuple[int, str, str]]
ALL = ("ensemble", "average", "weights", "activations", "dual", "zip", "dual_zip", "part_zip")


class Shop:
    """Data, groups, and a study that is done."""

    def __init__(self, root: Path) -> None:
        self.data, self.groups, self.zoo = write_data(root / "data"), write_groups(root / "groups"), root / "zoo"
        self.whole = root / "whole"

    def words(self, out: Path, *more: object, study: str = "tiny-halves") -> tuple[object, ...]:
        folders = ("--data", self.data, "--config-dir", self.groups, "--zoo", self.zoo, "--out", out)
        return ("study", f"study={study}", *more, *folders, "--quiet")

    def record(self, name: str) -> dict:
        return json.loads((self.whole / "pairs" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    assert call(*shop.words(shop.whole)) == 0
    return shop


def test_every_rule_of_every_pair_is_measured_with_what_it_used(shop: Shop) -> None:
    rules = shop.record("net/split-0")["rules"]
    assert tuple(rules) == ALL
    for rule in (*rules.values(), *shop.record("plain/split-1")["rules"].values()):
        assert rule["labels"] is False
        assert rule["joint"]["n"] == rule["task_a"]["n"] + rule["task_b"]["n"] == 80
        assert rule["per_task"] == (rule["task_a"]["value"] + rule["task_b"]["value"]) / 2
    assert rules["weights"]["pictures"] == {"measure": 32}
    assert rules["dual"]["pictures"] == {"compare": 32, "measure": 32, "held_out": 16}
    assert rules["dual_zip"]["balance"] in (0.2, 0.8)
    assert set(rules["dual_zip"]["distances"]) == {"0.2", "0.8"}
    assert rules["average"]["statistics"] == "BatchNorm anew"
    assert {r["statistics"] for r in shop.record("plain/split-0")["rules"].values()} == {"REPAIR", "none"}


def test_networks_know_their_own_half_and_both_together_know_all(shop: Shop) -> None:
    for name in ("net/split-0", "plain/split-0"):
        record = shop.record(name)
        assert record["alone"]["a"]["task_a"]["value"] > 90
        assert record["alone"]["b"]["task_b"]["value"] > 90
        both = record["rules"]["ensemble"]
        assert (both["task_a"], both["task_b"]) == (record["alone"]["a"]["task_a"], record["alone"]["b"]["task_b"])


def test_page_shows_every_rule_with_spread_and_pairs(shop: Shop) -> None:
    text = (shop.whole / "report.md").read_text()
    assert text.count("zipped by both (MuDSC)") == 1
    assert "## Net with BatchNorm" in text
    (line,) = [x for x in text.splitlines() if x.startswith("| zipped by activations (ZipIt)") and "±" in x]
    values = [shop.record(f"plain/split-{s}")["rules"]["zip"]["joint"]["value"] for s in (0, 1)]
    assert line.split("|")[2].strip() == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert line.split("|")[6].strip() == "2"
    found = json.loads((shop.whole / "scores.json").read_text())["plain"]["zip"]["joint"]
    assert (found["mean"], found["n"], found["pairs"]) == (pytest.approx(np.mean(values)), 80, 2)
    for name in ("joint.png", "surface.png"):
        assert (shop.whole / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_surface_passes_through_the_three_networks(shop: Shop) -> None:
    found = json.loads((shop.whole / "surface.json").read_text())
    assert np.array(found["values"]).shape == (2, 3, 3)
    assert np.isfinite(found["values"]).all()
    assert found["corners"][0] == [0, 0]
    assert found["corners"][1][1] == 0
    assert found["corners"][2][1] > 0
    assert sum(found["n"]) == 80


def test_a_rerun_changes_no_byte_and_needs_no_data(shop: Shop) -> None:
    before = contents(shop.whole)
    words = [w for w in shop.words(shop.whole) if w not in ("--data", shop.data)]
    assert call(*words) == 0
    assert contents(shop.whole) == before


def test_a_killed_study_goes_on_to_the_same_numbers(shop: Shop, tmp_path: Path) -> None:
    out, zoo, name = tmp_path / "out", tmp_path / "zoo", "pairs/plain/split-0.json"
    only = ("~study.networks.net", "study.networks.plain.splits=[0]", "study.surface=null")
    words = [zoo if w == shop.zoo else w for w in shop.words(out, *only)]
    argv = [sys.executable, "-m", "merganser", *map(str, words)]
    process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    path = out / name
    while process.poll() is None and not (path.exists() and json.loads(path.read_text())["rules"]):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begun = json.loads(path.read_text())["rules"]
    assert 1 <= len(begun) < 4
    assert call(*words) == 0
    after = json.loads(path.read_text())["rules"]
    assert {name: after[name] for name in begun} == begun  # with its times: not measured again
    assert without_times(out) == {name: without_times(shop.whole)[name]}


def test_a_split_that_comes_later_is_added_and_another_training_is_refused(
    shop: Shop, tmp_path: Path, run: Run
) -> None:
    out = Path(shutil.copytree(shop.whole, tmp_path / "out"))
    before = without_times(out)
    assert call(*shop.words(out, "study.networks.plain.splits=[0,1,2]")) == 0
    after = without_times(out)
    assert {name: after[name] for name in before} == before
    assert "pairs/plain/split-2.json" in after
    code, _, error = run(*shop.words(out, "study.networks.plain.training.epochs=3"))
    assert (code, "was measured on another network" in error) == (2, True)
    words = ("study.networks.plain.training.epochs=3", "~study.networks.net", "study.surface=null")
    code, _, error = run(*shop.words(tmp_path / "new", *words))
    assert (code, "holds a network with other training" in error) == (2, True)
    code, _, error = run(*shop.words(out, "study.pictures.compare=48"))
    assert (code, "holds a study with other pictures" in error) == (2, True)


@pytest.mark.parametrize(
    ("word", "says", "hint"),
    [
        ("study.kind=halvs", "study.kind is 'halvs'", "did you mean halves?"),
        ("study.networks.net.splitss=[0]", "study.networks.net.splitss", "did you mean splits?"),
        ("study.pictures.compar=16", "study.pictures.compar", "did you mean compare?"),
        ("study.rules=[averag]", "study.rules.0", ""),
        ("study.networks.net.network.width=3", "which the study knows", ""),
        ("study.networks.net.network.kind=resnt", "network kind is 'resnt'", ""),
        ("study.networks.net.network.norm=layer", "norm is 'layer'", ""),
        ("study.surface.split=7", "no such pair", ""),
        ("study.pictures.compare=40", "multiple of batch", ""),
        ("study.pictures.compare=3200", "pictures.compare is 3200, and there are 360", ""),
        ("study.codes.width=3", "halves take 4 to 3", ""),
        ("study.data.file=cornerz", "holds neither cornerz.npz", "did you mean corners?"),
        ("method=opcm", "method=opcm: a study of halves has no use for it", "study.KEY"),
        ("seed=3", "seed=3: a study of halves has no use for it", "study.KEY"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_place(
    shop: Shop, tmp_path: Path, run: Run, word: str, says: str, hint: str
) -> None:
    words = [tmp_path / "zoo" if w == shop.zoo else w for w in shop.words(tmp_path / "out", word)]
    code, _, error = run(*words)
    assert code == 2
    assert says in error
    assert hint in error
    assert not (tmp_path / "zoo").exists()


def test_data_that_are_not_there_are_named(shop: Shop, tmp_path: Path, run: Run) -> None:
    words = ("study", "study=cifar5x5", "--zoo", tmp_path, "--out", tmp_path / "out")
    code, _, error = run(*words, "--data", shop.data)
    assert (code, "holds neither cifar10_full.npz" in error) == (2, True)
    code, _, error = run(*words)
    assert (code, "cifar10_full is a packed data set, and no data folder is given" in error) == (2, True)


def test_dry_run_writes_nothing(shop: Shop, tmp_path: Path, run: Run) -> None:
    code, text, error = run(*shop.words(tmp_path / "out"), "--dry-run")
    assert (code, error) == (0, "")
    assert "Tiny halves: net, plain; ensemble, average" in text
    assert not (tmp_path / "out").exists()


def taught(kind: str) -> torch.nn.Module:
    """A network that learned the four corners, with codes for a head."""
    x, labels = corners(80, 0)
    examples = Examples(np.repeat(x[..., None], 3, -1), np.array(labels), ("nw", "ne", "sw", "se"))
    sizes = {"resnet": {"channels": 4, "blocks": 1}, "perceptron": {"hidden": 12, "depth": 2}, "vgg": {"channels": 2}}
    torch.manual_seed(0)
    encoder = new_encoder({"kind": kind, "image": 8, "width": 6, **sizes[kind]})
    lesson = Lesson(examples, split_by(0, 4, Codes(width=6)).logits)
    train(encoder, {"": lesson}, Training(epochs=3, lr=0.01, batch=20), seed=0, keep=Path("never"))
    return encoder


@pytest.mark.parametrize("kind", ["resnet", "perceptron"])
def test_a_network_and_itself_with_its_units_elsewhere_merge_to_itself(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = taught(kind), taught(kind)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(32, 8, 8, 3, generator=generator) * 2 - 1
    batches = [((x,), {})]  # one: REPAIR brings every batch to its target on its own
    spec = symmetries(one, *batches[0]).spec
    moved = spec.random(generator)
    two.load_state_dict({n: spec.apply(moved, n, t) if n in spec.axes else t for n, t in two.state_dict().items()})
    bench = Bench(one, two, batches, batches, batches, balances=(0.5,))
    assert bench.a.keys() == bench.b.keys()
    with torch.no_grad():
        wanted = one(x)
        scale = wanted.abs().max()
        far = {r: ((RULES[r](bench).networks[0](x) - wanted).abs().max() / scale).item() for r in RULES}
    exact: tuple[Rule, ...] = ("weights", "activations", "dual", "zip", "dual_zip", "part_zip", "ensemble")
    assert all(far[rule] < 1e-4 for rule in exact), far
    assert far["average"] > 0.01


@pytest.mark.parametrize(
    "network", [{"kind": "vgg", "channels": 2}, {"kind": "resnet", "channels": 8, "norm": "group"}]
)
def test_small_networks_come_back_from_their_folder_and_take_pictures_and_pixels(network: dict, tmp_path: Path) -> None:
    from merganser.study.zoo import save_encoder

    encoder = new_encoder({"image": 8, "width": 5, **network}).eval()
    save_encoder(encoder, tmp_path / "net", {}, None)
    again = load_encoder(tmp_path / "net")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    with torch.no_grad():
        one, two = encoder(encoder.prepare(pictures)), again(torch.from_numpy(pictures).float() / 127.5 - 1)
    assert torch.equal(one, two)
    assert one.shape == (3, 5)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ({"kind": "vgg", "image": 12}, "power of 2"),
        ({"kind": "resnet", "norm": "group", "groups": 3}, "groups 3 must divide channels 16"),
        ({"kind": "resnet", "channels": 0}, "channels is 0"),
    ],
)
def test_sizes_that_make_no_network_are_refused(network: dict, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        new_encoder(network)


def split_of_five() -> Split:
    return Split({"a": [0, 3], "b": [1, 2, 4]}, torch.eye(5, 6), 1.0)


def examples_of(labels: list[int]) -> Examples:
    return Examples(np.zeros((len(labels), 2, 2, 3), np.uint8), np.array(labels), tuple("vwxyz"))


def test_scores_of_one_network_are_those_of_a_confusion_by_hand() -> None:
    labels = [0, 3, 1, 2, 4, 4]
    said: Tensor = torch.tensor(
        [
            [5.0, 0, 0, 4, 0],  # right
            [5, 0, 0, 4, 0],  # 0 for 3, and in its half, too
            [5, 4, 0, 0, 0],  # 0 for 1, right in its half
            [0, 0, 9, 0, 8],  # right
            [0, 0, 9, 0, 8],  # 2 for 4, and in its half, too
            [0, 0, 0, 3, 2],  # 3 for 4, right in its half
        ]
    )
    found = scores([said], examples_of(labels), split_of_five())
    assert [found[key]["value"] for key in ("joint", "task_a", "task_b")] == pytest.approx([100 / 3, 50, 75])
    assert [found[key]["n"] for key in ("joint", "task_a", "task_b")] == [6, 2, 4]
    assert found["per_task"] == pytest.approx(62.5)
    assert found["joint"]["error"] == pytest.approx(100 * (1 / 3 * 2 / 3 / 6) ** 0.5)


def test_two_networks_answer_each_for_its_half_by_a_softmax_within_it() -> None:
    one = torch.tensor([[1.0, 50, 50, 0, 50]])  # 0.73 for class 0, whatever it says of the other half
    two = torch.tensor([[90.0, 3, 0, 90, 0]])  # 0.91 for class 1
    found = scores([one.repeat(2, 1), two.repeat(2, 1)], examples_of([1, 0]), split_of_five())
    assert [found[key]["value"] for key in ("joint", "task_a", "task_b")] == [50, 100, 100]


def test_a_split_depends_on_its_seed_alone_and_codes_are_orthonormal() -> None:
    one, again, other = (split_by(seed, 10, Codes()) for seed in (3, 3, 4))
    assert one.halves == again.halves != other.halves
    assert sorted(one.halves["a"] + one.halves["b"]) == list(range(10))
    assert torch.allclose(one.codes @ one.codes.T, torch.eye(10), atol=1e-6)

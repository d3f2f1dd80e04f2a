"""Studies of domains: who learns what, what is judged, and partial merges among the rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from small import write
from small_apart import call, corners

from merganser.errors import ParameterError, RefError
from merganser.study.domains import Domains
from merganser.study.halves import Split, scores
from merganser.study.rules import label
from merganser.study.words import PackedSource
from merganser.study.words_apart import Pictures, Rule

RULES = 'ensemble, average, regmean, pleas, refit, refit_answers, "refit@1.5", "pleas@2"'


def write_domains(folder: Path) -> Path:
    """`two.npz`: 240 bright corners, and 160 dark ones on white, in turn as long as there are both."""
    x, y = corners(400, 0)
    domain = np.array([i % 2 if i < 320 else 0 for i in range(400)])
    domain[360:400:4] = 1  # a quarter of the test pictures
    x = np.where(domain[:, None, None] == 1, 255 - x, x).astype(np.uint8)
    labels = np.array(y)
    parts = {"train": slice(0, 360), "test": slice(360, 400)}
    folder.mkdir(parents=True)
    arrays = {f"{key}_{split}": z[part] for split, part in parts.items() for key, z in (("x", x), ("y", labels))}
    arrays |= {f"domain_{split}": domain[part] for split, part in parts.items()}
    np.savez(
        folder / "two.npz", classes=np.array(["nw", "ne", "sw", "se"]), domains=np.array(["light", "dark"]), **arrays
    )
    return folder


def album(folder: Path, *pair: str) -> Domains:
    counts = Pictures(compare=32, measure=32, held_out=16, batch=16)
    return Domains("tiny", PackedSource(file="two"), counts, folder, pair=(pair[0], pair[1]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains") / "data")


def test_rules_look_at_both_domains_in_turn_and_networks_at_one(data: Path) -> None:
    it = album(data, "light", "dark")
    seen = torch.cat([batch[0][0] for batch in it.compare]).mean(dim=(1, 2, 3))
    assert (seen[0::2] < 0).all()  # mostly dark pixels: the domain of bright corners
    assert (seen[1::2] > 0).all()
    assert np.asarray(it.own_train("a").items).mean() < 127 < np.asarray(it.own_train("b").items).mean()
    assert it.learnt("b")["data"] == {"kind": "packed", "file": "two", "domain": "dark"}


def test_every_test_picture_is_of_one_side(data: Path) -> None:
    it = album(data, "dark", "light")
    own = it.own_test
    assert (len(it.test), int(own["a"].sum()), int(own["b"].sum())) == (40, 10, 30)
    assert not (own["a"] & own["b"]).any()
    assert np.asarray(it.test.items)[own["a"].numpy()].mean() > 127


def test_an_unknown_domain_is_named_with_those_there_are(data: Path) -> None:
    with pytest.raises(RefError, match="no domain dim") as caught:
        _ = album(data, "light", "dim").test
    assert "light, dark" in str(caught.value)


def test_both_networks_answer_by_the_sum_of_their_softmaxes() -> None:
    split = Split({"a": [0, 1], "b": [0, 1]}, torch.eye(2), 1.0)
    one, two = torch.tensor([[2.0, 0.0], [0.0, 0.1]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])

    class Test:
        labels = np.array([0, 1])
        digest = "d"

    # picture 0: .88 + .27 against .12 + .73, class 0; picture 1: .48 + .95 against .52 + .05, class 0
    own = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True])}
    found = scores([one, two], Test(), split, own)  # type: ignore[arg-type]
    assert [found[key]["value"] for key in ("joint", "task_a", "task_b")] == [50.0, 100.0, 0.0]
    assert [found[key]["n"] for key in ("joint", "task_a", "task_b")] == [2, 1, 1]


def test_the_joint_target_has_the_cosines_of_both_answers() -> None:
    codes = torch.eye(3, 4)
    split = Split({"a": [0], "b": [1, 2]}, codes, 2.0)
    one, two = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0.0, 1, 0, 0]])
    # a knows one class alone: probability 1; b: softmax of (2, 0) = (.8808, .1192)
    wanted = torch.tensor([[1.0, 0.8808, 0.1192, 0.0]]) / 2
    assert torch.allclose(split.together(one, two), wanted, atol=1e-4)


@pytest.mark.parametrize("rule", ["refit@", "refit@3", "refit@x", "zip@1.2", "refits"])
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(ValidationError, match="rule"):
        TypeAdapter(Rule).validate_python(rule)


def test_a_budget_stands_in_the_table() -> None:
    assert label("refit@1.20") == "refitted from front to back, 1.2x"


def test_a_study_of_domains_merges_by_every_rule_under_its_budget(data: Path, tmp_path: Path) -> None:
    write(
        tmp_path / "groups/study/tiny.yaml",
        "# @package _global_\nstudy:\n  kind: domains\n  name: tiny\n  title: Tiny domains\n"
        "  data: {kind: packed, file: two}\n  pairs: [[light, dark]]\n  zoo: zoo/tiny\n  codes: {width: 6}\n"
        "  networks:\n    net:\n      label: Net\n      network: {kind: resnet, channels: 4, blocks: 1}\n"
        "      training: {epochs: 2, lr: 1.0e-2, batch: 20, items: 80}\n      splits: [0]\n"
        f"  rules: [{RULES}]\n  pictures: {{compare: 32, measure: 32, held_out: 16, batch: 16}}\n",
    )
    out = tmp_path / "out"
    words = ("study", "study=tiny", "--data", data, "--config-dir", tmp_path / "groups", "--zoo", tmp_path / "zoo")
    assert call(*words, "--out", out, "--quiet") == 0
    record = json.loads((out / "pairs/net/split-0.json").read_text())
    rules = record["rules"]
    assert all(rule["joint"]["n"] == 40 and rule["task_a"]["n"] == 30 for rule in rules.values())
    assert rules["refit"]["size"] == [1.0, 1.0]
    assert 1.0 < rules["refit@1.5"]["size"][0] <= 1.5
    assert rules["pleas@2"]["size"] == pytest.approx([2.0, 2.0], abs=0.05)  # parameters that no network shares
    assert rules["pleas"]["statistics"] == "BatchNorm anew"
    text = (out / "report.md").read_text()
    assert "| refitted from front to back, 1.5x |" in text
    assert "0: light and dark" in text


def test_a_surface_is_none_of_domains() -> None:
    from merganser.study.words_apart import DomainsNode

    with pytest.raises(ValidationError, match="surface"):
        DomainsNode.model_validate(
            {
                "kind": "domains",
                "name": "x",
                "title": "x",
                "data": {"kind": "packed", "file": "two"},
                "pairs": [["a", "b"]],
                "zoo": "z",
                "rules": ["average"],
                "networks": {
                    "net": {
                        "label": "n",
                        "network": {"kind": "resnet"},
                        "training": {"epochs": 1, "lr": 1e-3, "batch": 8},
                        "splits": [0],
                    }
                },
                "surface": {"network": "net", "split": 0},
            }
        )


def test_too_few_pictures_name_the_setting(data: Path) -> None:
    it = Domains(
        "tiny",
        PackedSource(file="two"),
        Pictures(compare=1600, measure=16, held_out=16, batch=16),
        data,
        pair=("light", "dark"),
    )
    with pytest.raises(ParameterError, match=r"pictures\.compare"):
        _ = it.compare

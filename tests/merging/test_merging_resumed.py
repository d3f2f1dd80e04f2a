"""Merges that were killed, that failed or that another recipe left behind, and those that go on with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merganser.errors import (
    NonFiniteError,
    OutputError,
    ParameterError,
)
from merganser.merging import folding
from merganser.merging.merged import Merged
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_recipes, run
from merging_helpers import layered, merged, recipe, refused
from support import load, save, save_family, tree

pytestmark = pytest.mark.xdist_group("merging-resumed")  # what was killed is made once


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    return save_family(tmp_path / "models", 3)


HERE = Path(__file__).parent


def test_other_shards_begin_anew(killed: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    from merganser.merging.native import read_recipes

    root, outcomes = killed
    left = next(p for n in range(len(outcomes) - 1, 0, -1) for p in (root / f"merge-{n}").glob(".out.partial-*"))
    shutil.copytree(left, tmp_path / left.name)
    recipes, _ = read_recipes(root / "recipe.yaml")
    out = run(plan_recipes(recipes), tmp_path / "out", threads=1, resume=True, shard_bytes=100)
    assert all("-of-" in p.name for p in out.glob("*.safetensors"))


def test_failed_merge_can_go_on(tmp_path: Path) -> None:
    family = save_family(tmp_path / "models", 2, names=("large.weight", "norm.weight", "wide.weight"))
    model = load(family[2])
    whole = model["wide.weight"].clone()
    model["wide.weight"][0, 0] = float("nan")
    bad = save(model, tmp_path / "bad")
    one = recipe("linear", [family[1], bad])
    with pytest.raises(NonFiniteError):
        merged(tmp_path / "out", one, resume=True)
    (journal,) = tmp_path.glob(".out.partial-*/.journal")
    assert len(journal.read_text().splitlines()) > 1
    assert not (tmp_path / "out").exists()
    assert whole.isfinite().all()


def test_a_factor_that_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPCM's factor takes a pass over all models; the run that goes on has it to the last bit, and leaves no trace."""
    family = save_family(tmp_path / "models", 2, names=("large.weight", "norm.weight", "wide.weight"))
    one = recipe("opcm", family[1:], family[0])
    whole = run(plan_recipes([one]), tmp_path / "whole", threads=1)

    def fails(merged: Merged, name: str) -> None:
        del merged
        raise AssertionError(f"{name} was measured again")

    def stop(done: int, total: int) -> None:
        if done > total // 2:  # the factor is measured, and not everything is written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan_recipes([one]), tmp_path / "out", threads=1, resume=True, progress=stop)
    assert len(list(tmp_path.glob(".out.partial-*/.measured.json"))) == 1
    monkeypatch.setattr(folding, "figures", fails)
    run(plan_recipes([one]), tmp_path / "out", threads=1, resume=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in whole.iterdir()}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_output_inside_an_input_is_refused(family: list[Path]) -> None:
    with pytest.raises(OutputError, match="lies within what is read"):
        merged(family[1] / "out", recipe("linear", family[1:3]))
    assert not (family[1] / "out").exists()


def test_layer_ranges_beyond_the_model_are_refused(tmp_path: Path) -> None:
    folder = save(layered(3, 1), tmp_path / "m")
    one = Recipe("passthrough", (Slice((Input(str(folder), (1, 4)),)),), text="")
    assert "has 3 layers" in refused(ParameterError, tmp_path / "out", one)


# kill -9


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A merge that was killed before each of its touches of the disk in turn; folders merge-1, merge-2, ..."""
    root = tmp_path_factory.mktemp("killed")
    family = save_family(root / "models", 2, names=("wide.weight", "norm.weight", "large.weight", "position_ids"))
    template = root / "template"
    template.mkdir()
    text = f"method: dare_ties\nbase: {family[0]}\nmodels: [{family[1]}, {family[2]}]\nsettings: {{density: 0.5}}\n"
    (root / "recipe.yaml").write_text(text)
    argv = ["merge", str(root / "recipe.yaml"), "{}/out", "--resume", "--threads", "1"]
    plan = {"merge": {"template": str(template), "argv": argv}}
    (root / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "continual" / "dying.py"), "SIGKILL", str(root / "plan.json")],
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return root, json.loads(done.stdout)["merge"]


def test_killed_merge_leaves_nothing_or_the_whole_and_goes_on_to_the_same_bits(
    killed: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    from merganser.merging.native import read_recipes

    root, outcomes = killed
    assert [status for status, _ in outcomes] == [-signal.SIGKILL] * (len(outcomes) - 1) + [0]
    assert len(outcomes) > 6
    recipes, _ = read_recipes(root / "recipe.yaml")
    expected = tree(root / f"merge-{len(outcomes)}" / "out")
    resumed = 0
    for number in range(1, len(outcomes)):
        folder = Path(shutil.copytree(root / f"merge-{number}", tmp_path / str(number)))
        if not (folder / "out").exists():
            journals = list(folder.glob(".out.partial-*/.journal"))
            finished = sum(len(j.read_text().splitlines()) - 1 for j in journals)
            resumed += finished > 0
            run(plan_recipes(recipes), folder / "out", threads=1, resume=True)
        found = tree(folder / "out")
        assert {n: d for n, d in found.items() if n != "merganser.json"} == {
            n: d for n, d in expected.items() if n != "merganser.json"
        }
        assert sorted(p.name for p in folder.iterdir()) == ["out"]
        receipts = [json.loads((f / "out" / "merganser.json").read_text()) for f in (folder, tmp_path / "1")]
        assert receipts[0]["outputs"] == receipts[1]["outputs"]
    assert resumed > 1


def test_another_recipe_does_not_go_on_with_what_is_left(killed: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    root, outcomes = killed
    family = sorted((root / "models").iterdir())
    left = tmp_path / "left"
    expected = merged(tmp_path / "fresh", recipe("linear", family))
    source = next(p for n in range(len(outcomes) - 1, 0, -1) for p in (root / f"merge-{n}").glob(".out.partial-*"))
    left.mkdir()
    shutil.copytree(source, left / source.name)
    found = merged(left / "out", recipe("linear", family), resume=True)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert sorted(p.name for p in left.iterdir()) == ["out"]

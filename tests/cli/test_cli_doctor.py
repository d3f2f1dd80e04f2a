"""`merganser doctor`: what it prints, its exit codes, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support import save, tree

Run = Callable[..., tuple[int, str, str]]

RECIPE = """
method: task_arithmetic
base: base
models:
- {model: a, weight: 0.5}
- {model: b, weight: 0.5}
"""


def model(seed: int | None = None, size: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = {"layers.0.mlp.weight": torch.randn(32, 24, generator=generator), "norm.weight": torch.ones(64)}
    if seed is None:
        return base
    generator.manual_seed(seed)
    return {name: x + size * torch.randn(x.shape, generator=generator) for name, x in base.items()}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    save(model(), tmp_path / "base")
    save(model(1), tmp_path / "a")
    save(model(2), tmp_path / "b")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_a_healthy_recipe_exits_with_0_and_its_figures(run: Run, shop: Path) -> None:
    before = tree(shop)
    code, out, err = run("doctor", shop / "recipe.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "the merge: task_arithmetic of 2 models, 2 tensors"
    assert lines[-1] == "healthy: nothing found"
    assert lines[1].split() == ["model", "norm", "of", "the", "change", "weighted", "relative", "below", "resolution"]
    assert str(shop / "a") in lines[2]
    assert lines[4].split() == ["pair", "cosine", "opposing", "overlap", "chance"]
    assert any(line.startswith("interference over 1 linear weight: ||U^T U - I||") for line in lines)
    assert tree(shop) == before


def test_warnings_exit_with_1_and_say_what_to_do(run: Run, shop: Path) -> None:
    (shop / "recipe.yaml").write_text(RECIPE.replace("0.5}\n- {", "5.0}\n- {"))
    code, out, err = run("doctor", shop / "recipe.yaml", "--json", shop / "found.json")
    assert (code, err) == (1, "")
    warning, advice, written = out.splitlines()[-3:]
    assert warning.startswith(f"warning [norms]: the weighted change of {shop / 'a'} is ")
    assert advice.startswith("  do: if that is not meant, give weights that even them out: ")
    assert written == f"{shop / 'found.json'}: written"
    (found,) = json.loads((shop / "found.json").read_text())
    assert (found["method"], found["tensors"]) == ("task_arithmetic", 2)
    (finding,) = found["findings"]
    assert (finding["kind"], finding["fatal"]) == ("norms", False)
    assert finding["models"] == [str(shop / "a"), str(shop / "b")]
    assert finding["figures"]["ratio"] == pytest.approx(10, rel=0.1)
    assert list(found["models"]) == finding["models"]
    assert found["pairs"][0]["models"] == finding["models"]
    assert list(found["layers"]) == ["layers.0.mlp.weight"]


def test_what_cannot_be_merged_exits_with_2_and_names_the_model(run: Run, shop: Path) -> None:
    broken = model(3)
    broken["norm.weight"][5] = math.nan
    save(broken, shop / "c")
    (shop / "recipe.yaml").write_text(f"{RECIPE}- c\n")
    code, out, err = run("doctor", shop / "recipe.yaml")
    assert (code, err) == (2, "")
    assert out.splitlines()[-2:] == [
        f"error [nonfinite]: {shop / 'c'} holds 1 value that is NaN or infinite, in 1 tensor; the first is norm.weight",
        "  do: leave the model out, or fetch it again",
    ]


def test_only_the_first_findings_of_a_kind_are_printed_and_all_are_written(run: Run, shop: Path) -> None:
    names = ("c", "d", "e", "f", "g")
    for name in names:
        save(model(), shop / name)
    (shop / "recipe.yaml").write_text(RECIPE + "".join(f"- {name}\n" for name in names))
    code, out, _ = run("doctor", shop / "recipe.yaml", "--json", shop / "found.json")
    assert code == 1
    assert "12 of 21 pairs; --json writes all" in out
    printed = [line.partition(" is equal")[0] for line in out.splitlines() if line.startswith("warning [equal]: ")]
    assert printed == [f"warning [equal]: {shop / name}" for name in names[:3]]
    assert "and 2 more [equal]; --json writes all" in out
    (found,) = json.loads((shop / "found.json").read_text())
    assert [finding["models"] for finding in found["findings"]] == [[str(shop / name)] for name in names]
    assert len(found["pairs"]) == 21


def test_sampled_layers_are_noted(run: Run, shop: Path) -> None:
    _, out, _ = run("doctor", shop / "recipe.yaml", "--layers", "1")
    assert "note: 2 of 2 tensors were measured" in out


def test_two_runs_write_the_same_bytes(run: Run, shop: Path) -> None:
    for name in ("1", "2"):
        run("doctor", shop / "recipe.yaml", "--json", shop / f"{name}.json", "--threads", name)
    assert (shop / "1.json").read_bytes() == (shop / "2.json").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "more", "says"),
    [
        (RECIPE.replace("method: task", "method: tsk"), (), "task_arithmetic"),
        (RECIPE.replace("model: b", "model: bb"), (), "bb"),
        (RECIPE, ("--json", "/nowhere/at/all.json"), "no such folder"),
        (RECIPE, ("--json", "{shop}/recipe.yaml"), "recipe.yaml is, holds or lies within what is read"),
        (RECIPE, ("--json", "{shop}/a/found.json"), "a/found.json is, holds or lies within what is read"),
        pytest.param(
            RECIPE,
            ("--json", "/dev/full"),
            "/dev/full cannot be written: No space left on device",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file of Linux"),
        ),
        (RECIPE, ("--layers", "0"), "layers"),
        (RECIPE, ("--threads", "0"), "threads is 0; it is at least 1"),
        (RECIPE.replace("task_arithmetic", "ties") + "settings: {density: 20}\n", (), "density is 20"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(
    run: Run, shop: Path, recipe: str, more: tuple[str, ...], says: str
) -> None:
    (shop / "recipe.yaml").write_text(recipe)
    before = tree(shop)
    code, out, err = run("doctor", shop / "recipe.yaml", *(word.replace("{shop}", str(shop)) for word in more))
    assert (code, out) == (2, "")
    assert says in err
    assert tree(shop) == before


def test_a_missing_recipe_exits_with_2(run: Run, tmp_path: Path) -> None:
    code, out, err = run("doctor", tmp_path / "nothing.yaml")
    assert (code, out) == (2, "")
    assert str(tmp_path / "nothing.yaml") in err

"""`merganser diff`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support import save, tree

Run = Callable[..., tuple[int, str, str]]


def model(factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "embed.weight": torch.ones(6, 4),
        "layers.0.proj.weight": factor * torch.eye(4),
        "layers.0.proj.bias": torch.ones(4),
        "layers.1.proj.weight": torch.eye(4) + (factor - 1) * torch.ones(4, 4),
        "ids": torch.arange(3),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(model(), tmp_path / "a"), save(model(3.0), tmp_path / "b")


def test_diff_prints_the_most_changed_tensors_and_the_layers(run: Run, pair: tuple[Path, Path]) -> None:
    code, out, err = run("diff", *pair)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    a, b = pair
    norm, before = math.sqrt(16 + 64), math.sqrt(24 + 4 + 4 + 4 + 5)
    assert out.startswith(
        f"2 of 5 tensors changed from {a} to {b}: norm {norm:.3g}, relative {norm / before:.3g}, cosine 0.7"
    )
    assert lines[1] == ["most", "changed", "shape", "norm", "relative", "cosine", "largest", "rank"]
    assert lines[2] == ["layers.1.proj.weight", "(4,", "4)", "8", "4", "0.654654", "2", "1.0"]
    assert lines[3] == ["layers.0.proj.weight", "(4,", "4)", "4", "2", "1.000000", "2", "4.0"]
    assert lines[4] == ["layer", "tensors", "norm", "relative", "cosine", "largest", "mean", "rank"]
    assert [line[0] for line in lines[5:]] == ["embed", "layers.0", "layers.1", "ids"]
    assert lines[5] == ["embed", "1", "0", "0", "1.000000", "0", "-"]
    assert lines[6][:4] == ["layers.0", "2", "4", "1.41"]


def test_json_holds_every_tensor_and_null_where_there_is_no_number(run: Run, tmp_path: Path) -> None:
    nothing, tensor = torch.zeros(2), torch.tensor([3.0, -4.0])
    broken = torch.tensor([math.nan, 1.0])
    a = save({"x": nothing, "y": tensor, "old": nothing.clone()}, tmp_path / "a")
    b = save({"x": tensor.clone(), "y": broken, "new": nothing.clone()}, tmp_path / "b")
    code, out, err = run("diff", a, b, "--json", tmp_path / "d.json")
    assert (code, err) == (0, "")
    assert f"only in {a}: old" in out
    assert f"only in {b}: new" in out
    assert "NaN or infinity in y: 0 of A's values, 1 of B's" in out
    assert out.endswith(f"{tmp_path / 'd.json'}: written\n")
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["a"], found["b"], found["only_in_a"], found["only_in_b"]) == (str(a), str(b), ["old"], ["new"])
    assert found["tensors"]["x"] == {
        "shape": [2],
        "norm": 5.0,
        "relative": None,
        "cosine": None,
        "largest": 4.0,
        "effective_rank": None,
        "changed": 2,
        "nonfinite_in_a": 0,
        "nonfinite_in_b": 0,
    }
    assert found["tensors"]["y"]["norm"] is None
    assert found["tensors"]["y"]["nonfinite_in_b"] == 1
    assert list(found["layers"]) == ["x", "y"]
    assert found["total"]["norm"] is None


def test_two_runs_write_the_same_bytes(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("1", "2"):
        words = ("--json", tmp_path / f"{name}.json", "--plot", tmp_path / f"{name}.png", "--quiet")
        assert run("diff", *pair, *words) == (0, "", "")
    for kind in ("json", "png"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()


def test_top_limits_the_table_and_no_rank_leaves_ranks_out(run: Run, pair: tuple[Path, Path]) -> None:
    _, out, _ = run("diff", *pair, "--top", "1", "--no-rank")
    assert "layers.1.proj.weight" in out
    assert "layers.0.proj.weight" not in out
    assert out.splitlines()[2].split()[-1] == "-"
    assert "most changed" not in run("diff", *pair, "--top", "0")[1]


def test_equal_models_are_said_to_be(run: Run, pair: tuple[Path, Path]) -> None:
    code, out, _ = run("diff", pair[0], pair[0])
    assert code == 0
    assert out == f"0 of 5 tensors changed from {pair[0]} to {pair[0]}: norm 0, relative 0, cosine 1.000000\n"


def test_an_adapter_is_applied_to_the_first_model(run: Run, tmp_path: Path) -> None:
    base = save({"model.q_proj.weight": torch.eye(4)}, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}
    weights = {f"base_model.model.model.q_proj.lora_{n}.weight": x for n, x in factors.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    code, out, err = run("diff", base, adapter)
    assert (code, err) == (0, "")
    assert out.splitlines()[2].split() == ["model.q_proj.weight", "(4,", "4)", "8", "4", "0.654654", "2", "1.0"]


def test_the_plot_is_a_png_however_many_layers_there_are(run: Run, tmp_path: Path) -> None:
    many = {f"h.{i}.{part}": torch.ones(2) for i in range(130) for part in ("w", "b")} | {"wte": torch.zeros(3)}
    a = save(many, tmp_path / "a")
    b = save({name: x + 1 for name, x in many.items()}, tmp_path / "b")
    code, out, err = run("diff", a, b, "--plot", tmp_path / "d.png", "--top", "3")
    assert (code, err) == (0, "")
    assert out.endswith(f"{tmp_path / 'd.png'}: written\n")
    png = (tmp_path / "d.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (24 * 200, 840)


def test_without_matplotlib_the_extra_is_named_before_anything_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("diff", "nowhere", "nowhere", "--plot", tmp_path / "d.png")
    assert (code, out) == (2, "")
    assert err == 'MerganserError: drawing needs matplotlib\nhint: pip install "merganser[plots]"\n'
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "ShapeError: layers.0.proj.bias has 2 shapes: (4,) in "),
        (("--ignore", "nothing*"), "ParameterError: no tensor is called 'nothing*'"),
        (("--json", "/nowhere/at/all.json"), "OutputError: /nowhere/at/all.json cannot be written: no such folder"),
        (("--plot", "/"), "OutputError: / cannot be written: it is a folder"),
        (("--threads", "0"), "threads"),
        (("--top", "-1"), "top"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(run: Run, tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    a = save(model(), tmp_path / "a")
    b = save(model() | {"layers.0.proj.bias": torch.ones(5)}, tmp_path / "b")
    before = tree(tmp_path)
    if "--threads" in more:
        more = (*more, "--ignore", "layers.0.proj.bias")
    code, out, err = run("diff", a, b, *more)
    assert (code, out) == (2, "")
    assert says in err
    assert tree(tmp_path) == before


def test_a_missing_model_exits_with_2_and_names_the_nearest(run: Run, pair: tuple[Path, Path]) -> None:
    a, b = pair
    (b.parent / "tuned").mkdir()
    missing = b.parent / "tunned"
    assert run("diff", a, missing) == (
        2,
        "",
        f"RefError: {missing} does not exist\nhint: did you mean {b.parent / 'tuned'}?\n",
    )


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("place", ["a/config.json", "b"])
def test_no_result_is_written_over_what_is_read(run: Run, tmp_path: Path, option: str, place: str) -> None:
    a, b = save(model(), tmp_path / "a"), save(model(), tmp_path / "other") / "model.safetensors"
    b = b.rename(tmp_path / "b")
    (a / "config.json").write_text("{}")
    before = tree(tmp_path)
    code, out, err = run("diff", a, b, option, tmp_path / place)
    assert (code, out) == (2, "")
    assert f"{tmp_path / place} is, holds or lies within what is read" in err
    assert tree(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file of Linux")
def test_a_disk_that_takes_no_result_exits_with_2(run: Run, tmp_path: Path) -> None:
    a = save(model(), tmp_path / "a")
    code, out, err = run("diff", a, a, "--json", "/dev/full")
    assert (code, out) == (2, "")
    assert err == "OutputError: /dev/full cannot be written: No space left on device\n"

"""`merganser zip`: copies give the network, bad input is refused and nothing is written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import tree

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 6, generator=generator) for _ in range(4)]

def by_name():
    return [{"input": x} for x in batches()]

def in_tuples():
    return [((x,), {}) for x in batches()]

def wide():
    return [torch.randn(8, 7)]

def none():
    return []

def words():
    return ["a text"]

def failing():
    raise RuntimeError("no such data")

def needs(folder):
    return []
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("zip_nets", tmp_path / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    a = module.mlp().state_dict()
    order = torch.randperm(16)
    b = {"0.weight": a["0.weight"][order], "0.bias": a["0.bias"][order], "2.weight": a["2.weight"][:, order]}
    for name, tensors in {"a": a, "b": {**b, "2.bias": a["2.bias"]}}.items():
        (tmp_path / name).mkdir()
        save_file({n: x.contiguous() for n, x in tensors.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    save_file({"0.weight": torch.ones(16, 6)}, tmp_path / "part.safetensors")
    save_file({**{n: x.contiguous() for n, x in a.items()}, "2.bias": torch.ones(4)}, tmp_path / "other.safetensors")
    return tmp_path


def words(shop: Path, *checkpoints: str, batches: str = "batches", model: str = "mlp") -> list[str]:
    named = [str(shop / name) for name in checkpoints]
    code = f"{shop / 'nets.py'}"
    return ["zip", *named, "--model", f"{code}:{model}", "--batches", f"{code}:{batches}", "--out", str(shop / "out")]


@pytest.mark.parametrize("batches", ["batches", "by_name", "in_tuples"])
def test_copies_in_another_order_are_zipped_into_the_network(shop: Path, run: Run, batches: str) -> None:
    code, text, error = run(*words(shop, "a", "b", batches=batches))
    assert (code, error) == (0, "")
    assert "2 networks, 1 group, 4 batches" in text
    one, merged = (load_file(shop / name / "model.safetensors") for name in ("a", "out"))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    answers = [
        torch.nn.functional.gelu(x @ t["0.weight"].T + t["0.bias"]) @ t["2.weight"].T + t["2.bias"]
        for t in (one, merged)
    ]
    assert torch.allclose(*answers, atol=1e-5)
    receipt = json.loads((shop / "out" / "merganser.json").read_text())
    assert receipt["zipped"] == [str(shop / "a"), str(shop / "b")]
    assert (shop / "out" / "config.json").is_file()


def test_three_networks_are_zipped_without_a_join_within_any(shop: Path, run: Run) -> None:
    """Every unit is then the mean of three, one of each, and the units' sum is the mean of the three sums."""
    generator = torch.Generator().manual_seed(5)
    c = {n: torch.randn(x.shape, generator=generator) for n, x in load_file(shop / "a" / "model.safetensors").items()}
    save_file(c, shop / "c.safetensors")
    assert run(*words(shop, "a", "b", "c.safetensors"), "--within", "0", "-q") == (0, "", "")
    a, b, merged = (load_file(shop / name / "model.safetensors")["0.bias"].double() for name in ("a", "b", "out"))
    assert torch.allclose(merged.sum(), (a + b + c["0.bias"].double()).sum() / 3, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpoints", "change", "message"),
    [
        (("a",), {}, "zipping takes two or more"),
        (("a", "nowhere"), {}, "nowhere does not exist"),
        (("a", "part.safetensors"), {}, "part.safetensors lacks 0.bias"),
        (("a", "other.safetensors"), {}, "2.bias of"),
        (("a", "b"), {"batches": "batch"}, "has no batch"),
        (("a", "b"), {"batches": "none"}, "gives no batch"),
        (("a", "b"), {"batches": "words"}, "gives a str"),
        (("a", "b"), {"batches": "failing"}, "cannot be run: RuntimeError: no such data"),
        (("a", "b"), {"batches": "needs"}, "cannot be called without arguments"),
        (("a", "b"), {"batches": "wide"}, "cannot be run on these inputs"),
        (("a", "b"), {"model": "batches"}, "it must give a network"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    shop: Path, run: Run, checkpoints: tuple[str, ...], change: dict[str, str], message: str
) -> None:
    run(*words(shop, "a", "b"))  # compiles the file of networks
    before = tree(shop)
    code, out, error = run(*words(shop, *checkpoints, **change)[:-1], str(shop / "new"))
    assert (code, out) == (2, "")
    assert message in error
    assert tree(shop) == before


def test_a_folder_that_is_there_is_kept_unless_told(shop: Path, run: Run) -> None:
    assert run(*words(shop, "a", "b"), "--quiet") == (0, "", "")
    code, _, error = run(*words(shop, "a", "b"))
    assert code == 2
    assert "out exists" in error
    assert "--overwrite" in error
    assert run(*words(shop, "a", "b"), "--quiet", "--overwrite") == (0, "", "")


def aligned(shop: Path, *more: str) -> list[str]:
    code = str(shop / "nets.py")
    return ["align", str(shop / "a"), str(shop / "b"), str(shop / "out"), "--model", f"{code}:mlp", *more]


@pytest.mark.parametrize("balance", ["0", "0.5", "1"])
def test_align_compares_what_units_do_too(shop: Path, run: Run, balance: str) -> None:
    code, text, error = run(*aligned(shop, "--batches", f"{shop / 'nets.py'}:batches", "--balance", balance))
    assert (code, error) == (0, "")
    assert "-> 0\n" in text
    one, back = (load_file(shop / name / "model.safetensors") for name in ("a", "out"))
    assert all(torch.equal(one[name], back[name]) for name in one)
    receipt = json.loads((shop / "out" / "merganser.json").read_text())
    assert (receipt["balance"], receipt["similarity"]) == (float(balance), "pearson")


def test_align_refuses_a_balance_that_is_none_and_batches_without_a_network(shop: Path, run: Run) -> None:
    batches = ("--batches", f"{shop / 'nets.py'}:batches")
    code, _, error = run(*aligned(shop, *batches, "--balance", "2"))
    assert (code, "balance is 2.0" in error) == (2, True)
    words_ = ["align", str(shop / "a"), str(shop / "b"), str(shop / "out"), "--symmetry", "x.json", *batches]
    code, _, error = run(*words_)
    assert (code, "--batches needs a network" in error) == (2, True)
    assert not (shop / "out").exists()


@pytest.mark.parametrize("setting", [("--repeat", "0"), ("--repeat", "1.5"), ("--within", "-0.1"), ("--within", "2")])
def test_settings_out_of_range_are_refused(shop: Path, run: Run, setting: tuple[str, str]) -> None:
    code, _, error = run(*words(shop, "a", "b"), *setting)
    assert code == 2
    assert setting[0].strip("-") in error
    assert not (shop / "out").exists()


def test_weights_count_and_layers_are_repaired_if_told(shop: Path, run: Run) -> None:
    assert run(*words(shop, "a", "b"), "--balance", "0.5", "--repair", "--seed", "3", "--quiet") == (0, "", "")
    one, merged = (load_file(shop / name / "model.safetensors") for name in ("a", "out"))
    receipt = json.loads((shop / "out" / "merganser.json").read_text())
    assert (receipt["balance"], receipt["repair"], receipt["seed"]) == (0.5, True, 3)
    units = torch.cdist(merged["0.weight"], one["0.weight"]).argmin(0)
    assert torch.allclose(merged["0.weight"][units], one["0.weight"], atol=1e-2)  # batches differ from their mean
    code, _, error = run(*words(shop, "a", "b"), "--balance", "2", "--overwrite")
    assert code == 2
    assert "balance is 2.0" in error

"""Inputs that are no numbers, options without use and files that would be lost are refused, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from support import tree

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(50, 6, generator=generator) for _ in range(2)]

def with_nan():
    first, second = batches()
    second[3, 1] = torch.nan
    return [first, second]

def labelled():
    return [(x, torch.arange(50) % 3) for x in batches()]

def in_floats():
    return [(x, torch.rand(50) * 2.9) for x in batches()]

class Missing(nn.Sequential):
    def __init__(self):
        super().__init__(*mlp())

    def forward(self, x):
        return {}["logits"]  # raises

class Unset(Missing):
    def forward(self, x):
        return self.nothing(x)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(CODE)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    save_file(network.state_dict(), tmp_path / "c.safetensors")
    (tmp_path / "user.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


AB = ("a.safetensors", "b.safetensors")
BY = ("--batches", "nets.py:batches")
NAN = ("--batches", "nets.py:with_nan")
MLP = ("--model", "nets.py:mlp")
BARRIER = ("barrier", *AB, *MLP, "--labelled", "nets.py:labelled")
SHOW = ("symmetry", "show", "nets.py:mlp", "--input", "2,6")
PLEAS = ("pleas", *AB, "out", *MLP)

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    # numbers
    "NaN to align": (("align", *AB, "out", *MLP, *NAN), "NonFiniteError: batch 2 holds NaN"),
    "NaN to zip": (("zip", *AB, "--out", "out", *MLP, *NAN), "NonFiniteError: batch 2 holds NaN"),
    "NaN to meet": (("meet", *AB, "--out", "out", *MLP, *NAN), "NonFiniteError: batch 2 holds NaN"),
    "NaN to pleas": ((*PLEAS, *NAN), "NonFiniteError: batch 2 holds NaN"),
    "classes that are no classes": (
        ("barrier", *AB, *MLP, "--labelled", "nets.py:in_floats"),
        "ParameterError: nets.py:in_floats gives classes of torch.float32; they are whole numbers",
    ),
    # options
    "balance without batches": (
        ("align", *AB, "out", *MLP, "--input", "2,6", "--balance", "0.3"),
        "ParameterError: --balance weighs weights against what units do\nhint: give --batches FILE:NAME, too",
    ),
    "balance with symmetries": (
        ("align", *AB, "out", "--symmetry", "spec.json", "--balance", "7"),
        "ParameterError: --balance weighs weights",
    ),
    "input with symmetries": (
        ("align", *AB, "out", "--symmetry", "spec.json", "--input", "2,6"),
        "ParameterError: --input is for a network to run, and --symmetry brings none",
    ),
    "input with batches": (("align", *AB, "out", *MLP, *BY, "--input", "2,6"), "ParameterError: --input has no use"),
    "similarity with batches": (
        ("align", *AB, "out", *MLP, *BY, "--similarity", "frobenius"),
        "ParameterError: --similarity is for weights alone; with inputs it is pearson",
    ),
    "weights by batches": (
        ("align", *AB, "out", *MLP, *BY, "--method", "weight"),
        "ParameterError: --method weight looks at weights alone",
    ),
    "activations of nothing": (
        ("align", *AB, "out", *MLP, "--input", "2,6", "--method", "activation"),
        "ParameterError: --method activation looks at what units do",
    ),
    "balance of activations": (
        ("align", *AB, "out", *MLP, *BY, "--method", "activation", "--balance", "0.5"),
        "ParameterError: --balance has no use with --method activation",
    ),
    "zipping by nothing": (
        ("align", *AB, "out", *MLP, "--input", "2,6", "--method", "zip"),
        "ParameterError: --method zip looks at what units do",
    ),
    "inputs to zip": (("zip", *AB, "--out", "out", *MLP), "ParameterError: there are no inputs to run the networks on"),
    "input to zip with batches": (
        ("zip", *AB, "--out", "out", *MLP, *BY, "--input", "2,6"),
        "ParameterError: --input has no use",
    ),
    "examples to align by batches": (
        ("align", *AB, "out", *MLP, *BY, "--examples", "9"),
        "ParameterError: --examples is for pictures",
    ),
    "batches and data": (
        ("align", *AB, "out", *MLP, *BY, "--data", "."),
        "ParameterError: --batches and --data both give inputs",
    ),
    "starts of a star": (
        ("meet", *AB, "--out", "out", *MLP, "--input", "2,6", "--method", "star", "--starts", "3"),
        "ParameterError: --starts is for --method c2m3; star begins once",
    ),
    "input to meet with batches": (
        ("meet", *AB, "--out", "out", *MLP, *BY, "--input", "2,6"),
        "ParameterError: --input has no use",
    ),
    "budgets of no curve": ((*PLEAS, *BY, "--budgets", "1,2"), "ParameterError: --budgets is for a curve or a preview"),
    "examples of batches": ((*PLEAS, *BY, "--examples", "9"), "ParameterError: --examples is for pictures"),
    "input to pleas with batches": ((*PLEAS, *BY, "--input", "2,6"), "ParameterError: --input has no use"),
    "scale of noise": ((*PLEAS, "--noise", "8", "--scale", "0.5/0.5"), "ParameterError: --scale is for pictures"),
    "no place in the middle": ((*BARRIER, "--points", "4"), "ParameterError: --points is 4: no place is in the middle"),
    "one line twice": ((*BARRIER, "b.safetensors"), "ParameterError: b.safetensors is given twice"),
    # files
    "the code": ((*SHOW, "--json", "nets.py", "--overwrite"), "OutputError: nets.py is read, or lies in nets.py"),
    "a checkpoint": ((*BARRIER, "--json", "a.safetensors", "--overwrite"), "OutputError: a.safetensors is read"),
    "the other checkpoint": ((*BARRIER, "--plot", "b.safetensors", "--overwrite"), "OutputError: b.safetensors is"),
    "somebody's": ((*SHOW, "--json", "user.txt"), "OutputError: user.txt exists, and was not made by this command"),
    "a line as symmetries": ((*SHOW, "--json", "line.json"), "OutputError: line.json exists, and was not made by"),
    "symmetries as a line": ((*BARRIER, "--json", "spec.json"), "OutputError: spec.json exists, and was not made by"),
    "a picture": ((*BARRIER, "--plot", "user.txt"), "OutputError: user.txt exists"),
    "one for two": ((*BARRIER, "--plot", "x", "--json", "./x"), "OutputError: x cannot be both"),
    "a folder": ((*SHOW, "--json", "."), "OutputError: . cannot be written: it is a folder"),
}


def test_each_is_refused_with_what_to_do_and_nothing_is_written(shop: Path, run: Run) -> None:
    assert run(*SHOW, "--json", "spec.json")[0] == 0
    assert run(*BARRIER, "--points", "3", "--json", "line.json")[0] == 0
    before = tree(shop)
    for case, (words, message) in REFUSED.items():
        code, out, error = run(*words)
        assert (case, code, out) == (case, 2, "")
        assert error.startswith(message), (case, error)
        assert tree(shop) == before, case


def test_own_files_are_replaced_and_others_if_told(shop: Path, run: Run) -> None:
    for words in ((*SHOW, "--json", "spec.json"), (*BARRIER, "--points", "3", "--json", "line.json")):
        assert [run(*words)[0] for _ in range(2)] == [0, 0]
    assert list(json.loads((shop / "line.json").read_text())) == ["b.safetensors"]
    assert run(*SHOW, "--json", "user.txt", "--overwrite")[0] == 0
    assert "groups" in json.loads((shop / "user.txt").read_text())
    drawn = (*BARRIER, "--points", "3", "--plot", "line.png", "--quiet")
    assert [run(*drawn)[0], run(*drawn)[0], run(*drawn, "--overwrite")[0]] == [0, 2, 0]


@pytest.mark.parametrize(("kind", "what"), [("Missing", "KeyError: 'logits'"), ("Unset", "AttributeError: ")])
def test_what_the_code_of_a_network_raises_is_told_with_its_line(shop: Path, run: Run, kind: str, what: str) -> None:
    line = 1 + CODE.splitlines().index('        return {}["logits"]  # raises')
    line += 0 if kind == "Missing" else 4
    model = f"nets.py:{kind}"
    for words in (
        ("symmetry", "show", model, "--input", "2,6"),
        ("barrier", *AB, "--model", model, "--labelled", "nets.py:labelled"),
        ("zip", *AB, "--out", "out", "--model", model, *BY),
    ):
        code, out, error = run(*words)
        assert (code, out) == (2, "")
        assert error.startswith(f"ParameterError: {model} cannot be run on these inputs: {what}")
        assert f"(line {line} of {shop / 'nets.py'})" in error
    assert not (shop / "out").exists()

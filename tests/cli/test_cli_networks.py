"""Networks that commands load, run and write: names, types and code that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support import tree

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, x):
        return self.head(self.down(self.up(self.embed(x)).relu()))

def tied():
    return Tied(), torch.arange(10).reshape(2, 5)

def batches():
    return [torch.randn(64, 6) for _ in range(3)]

def widths():
    return [torch.randn(64, 6), torch.randn(64, 7)]

def gone():
    yield torch.randn(64, 6)
    raise OSError("gone")

def nans():
    return [torch.full((64, 6), float("nan"))]
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(CODE)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).state_dict()
        save_file(tensors, tmp_path / f"{name}.safetensors")
        save_file({n: x.bfloat16() for n, x in tensors.items()}, tmp_path / f"{name}-bf16.safetensors")
        shapes = {"embed.weight": (11, 8), "up.weight": (16, 8), "up.bias": (16,), "down.weight": (8, 16)}
        save_file(
            {n: torch.randn(s) for n, s in {**shapes, "down.bias": (8,)}.items()}, tmp_path / f"{name}-tied.safetensors"
        )
        save_file({**tensors, "0.bias": torch.full((16,), torch.nan)}, tmp_path / f"{name}-nan.safetensors")
    return tmp_path


def meet(shop: Path, kind: str = "", model: str = "mlp", more: tuple[str, ...] = ()) -> list[str]:
    files = [str(shop / f"{name}{kind}.safetensors") for name in "ab"]
    return ["meet", *files, "--model", f"{shop / 'nets.py'}:{model}", "--out", str(shop / "out"), *more]


def zip_(shop: Path, batches: str) -> list[str]:
    code, files = f"{shop / 'nets.py'}", [str(shop / f"{name}.safetensors") for name in "ab"]
    return ["zip", *files, "--model", f"{code}:mlp", "--batches", f"{code}:{batches}", "--out", str(shop / "out")]


def test_tied_tensors_may_be_stored_under_one_name(shop: Path, run: Run) -> None:
    code, _, error = run(*meet(shop, "-tied", "tied"))
    assert (code, error) == (0, "")
    found = load_file(shop / "out" / "model.safetensors")
    assert torch.equal(found["head.weight"], found["embed.weight"])


def test_types_stay_those_of_the_files(shop: Path, run: Run) -> None:
    assert run(*meet(shop, "-bf16"))[0] == 0
    found = load_file(shop / "out" / "model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("batches", ["widths", "gone", "nans"])
@pytest.mark.parametrize("command", ["meet", "zip"])
def test_code_that_fails_is_one_message_and_nothing_is_written(
    shop: Path, run: Run, command: str, batches: str
) -> None:
    run(*meet(shop))  # compiles the file of networks
    before = tree(shop)
    words = zip_(shop, batches) if command == "zip" else meet(shop, more=("--batches", f"{shop / 'nets.py'}:{batches}"))
    code, out, error = run(*[str(shop / "new") if w == str(shop / "out") else w for w in words])
    assert (code, out) == (2, "")
    assert "Error" in error
    assert tree(shop) == before


def test_nan_in_a_file_is_named(shop: Path, run: Run) -> None:
    code, _, error = run(*meet(shop, "-nan"))
    assert code == 2
    assert "0.bias of" in error
    assert "NaN" in error


def test_the_folder_of_the_network_is_not_written_over(shop: Path, run: Run) -> None:
    (shop / "net").mkdir()
    (shop / "net" / "config.json").write_text('{"model_type": "bert"}')
    words = [str(shop / "net") if ":" in w else w for w in meet(shop)]
    words[words.index(str(shop / "out"))] = str(shop / "net")
    code, _, error = run(*words, "--overwrite")
    assert code == 2
    assert "net" in error
    assert (shop / "net" / "config.json").is_file()

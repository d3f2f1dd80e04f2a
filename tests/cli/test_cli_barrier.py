"""`merganser barrier`: what it prints, draws and refuses."""

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

def labelled():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(50, 6, generator=generator), torch.arange(50) % 3) for _ in range(2)]

def by_name():
    return [({"input": x}, y) for x, y in labelled()]

def unlabelled():
    return [x for x, _ in labelled()]

def none():
    return []
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(CODE)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def words(shop: Path, *others: str, labelled: str = "labelled", more: tuple[str, ...] = ()) -> list[str]:
    code = f"{shop / 'nets.py'}"
    files = [str(shop / f"{name}.safetensors") for name in ("a", *others)]
    return ["barrier", *files, "--model", f"{code}:mlp", "--labelled", f"{code}:{labelled}", *more]


@pytest.mark.parametrize("labelled", ["labelled", "by_name"])
def test_lines_are_printed_drawn_and_written(shop: Path, run: Run, labelled: str) -> None:
    more = ("--plot", str(shop / "line.png"), "--json", str(shop / "line.json"), "--points", "5")
    code, out, error = run(*words(shop, "b", "a", labelled=labelled, more=more))
    assert (code, error) == (0, "")
    assert "100 examples" in out
    numbers = json.loads((shop / "line.json").read_text())
    assert list(numbers) == [str(shop / "b.safetensors"), str(shop / "a.safetensors")]
    to_b, to_itself = numbers.values()
    assert to_b["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert to_b["items"] == 100
    assert to_b["barrier"] == max(
        x - ((1 - t) * to_b["loss"][0] + t * to_b["loss"][-1]) for x, t in zip(to_b["loss"], to_b["t"], strict=True)
    )
    assert to_itself["loss"] == pytest.approx([to_b["loss"][0]] * 5, abs=1e-6)
    assert f"{to_b['barrier']:.3f}" in out
    assert (shop / "line.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("others", "labelled", "more", "says"),
    [
        (("nowhere",), "labelled", (), "nowhere"),
        (("b",), "unlabelled", (), "pairs of inputs and classes"),
        (("b",), "none", (), "gives no batch"),
        (("b",), "label", (), "did you mean labelled?"),
        (("b",), "labelled", ("--points", "2"), "points"),
        (("b",), "labelled", ("--plot", "/nowhere/at/all.png"), "no such folder"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    shop: Path, run: Run, others: tuple[str, ...], labelled: str, more: tuple[str, ...], says: str
) -> None:
    run(*words(shop, "b"))  # compiles the file of networks
    before = tree(shop)
    code, out, error = run(*words(shop, *others, labelled=labelled, more=more))
    assert (code, out) == (2, "")
    assert says in error
    assert tree(shop) == before

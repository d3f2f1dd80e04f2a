"""`merganser pleas --noise`: without data, what is written has the statistics that its parents' data had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merganser.checkpoints import open_source
from merganser.cli.subject import loaded, subject

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def pictures():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers), torch.zeros(2, 3, 4, 4)

def coloured():
    colours = torch.tensor([3.0, 4.0, -3.0]).reshape(3, 1, 1)
    x = colours + torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    return [(x, torch.arange(50) % 3)]
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(CODE)
    return tmp_path


def built(x: Tensor) -> nn.Module:
    """The network that was written, as other commands load it."""
    return loaded(subject("out", None, ((x,), {})).network, open_source("out"))


def normed(seed: int) -> nn.Sequential:
    """A network with BatchNorm that knows data of which no entry is near 0."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    network = nn.Sequential(*layers)
    network[1].weight.data.uniform_(0.5, 2)
    network[1].bias.data.normal_()
    network[1].momentum = None
    network(coloured(500))
    return network.eval()


def coloured(count: int) -> Tensor:
    colours = torch.tensor([3.0, 4.0, -3.0]).reshape(3, 1, 1)
    return colours + torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(7))


def turned(network: nn.Sequential) -> dict[str, Tensor]:
    """The same function with its channels in another order."""
    order = torch.tensor([2, 0, 3, 1])
    state = {n: x[order] if n[0] in "01" and x.ndim else x for n, x in network.state_dict().items()}
    state["4.weight"] = state["4.weight"].reshape(3, 4, 4)[:, order].reshape(3, 16)
    return {n: x.contiguous() for n, x in state.items()}


@pytest.mark.parametrize("way", ["sequence", "layers", "none"])
def test_without_data_a_copy_in_another_order_becomes_the_network_with_the_statistics_of_its_data(
    shop: Path, run: Run, way: str
) -> None:
    network = normed(0)
    save_file(network.state_dict(), "n.safetensors")
    save_file(turned(network), "m.safetensors")
    words = ["pleas", "n.safetensors", "m.safetensors", "out", "--model", "nets.py:pictures", "--noise", "60"]
    code, text, error = run(*words, "--budget", "1", "--way", way)
    assert (code, error) == (0, "")
    said = "no data was seen: inputs are surrogates, noise by which 0 gives what 1 remembers"
    assert "60 examples" in text
    assert said in text
    with torch.no_grad():
        y = built(coloured(2))(coloured(20))
        torch.testing.assert_close(y, network(coloured(20)), rtol=1e-3, atol=1e-3)
    receipt = json.loads(Path("out/merganser.json").read_text())
    told = receipt["surrogates"]
    assert (told["what"], told["count"], told["layer"]) == (said, 60, "0")
    np.testing.assert_allclose(told["mean"], [3, 4, -3], atol=0.6)
    assert receipt["batches"] == []


def test_without_data_right_answers_are_those_of_what_is_written(shop: Path, run: Run) -> None:
    for seed, name in enumerate("nm"):
        save_file(normed(seed).state_dict(), f"{name}.safetensors")
    words = ["pleas", "n.safetensors", "m.safetensors", "out", "--model", "nets.py:pictures", "--noise", "60"]
    code, text, error = run(*words, "--budget", "2", "--labelled", "nets.py:coloured")
    assert (code, error) == (0, "")
    x = coloured(50)
    with torch.no_grad():
        y = built(x)(x)
        mean = (normed(0)(x) + normed(1)(x)) / 2
    torch.testing.assert_close(y, mean, rtol=1e-3, atol=1e-3)
    right = float((y.argmax(1) == torch.arange(50) % 3).float().mean())
    assert f"{100 * right:.1f} %" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "inputs to compare and fit by are needed"),
        (("--data", ".", "--noise", "60"), "inputs come from one place, and --data and --noise are given"),
        (("--noise", "60", "--no-recalibrate"), "leave --no-recalibrate out"),
        (("--noise", "1"), "--noise"),
    ],
)
def test_noise_and_data_are_not_mixed(shop: Path, run: Run, more: tuple[str, ...], message: str) -> None:
    for name in "nm":
        save_file(normed(0).state_dict(), f"{name}.safetensors")
    code, _, error = run("pleas", "n.safetensors", "m.safetensors", "out", "--model", "nets.py:pictures", *more)
    assert code == 2
    assert message in error
    assert not Path("out").exists()


def test_plain_noise_serves_networks_without_batch_norm_and_says_so(shop: Path, run: Run) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    save_file(network.state_dict(), "n.safetensors")
    words = ["pleas", "n.safetensors", "n.safetensors", "out", "--model", "nets.py:plain", "--input", "2,6"]
    code, text, error = run(*words, "--noise", "96", "--budget", "1")
    assert (code, error) == (0, "")
    assert "no data was seen: inputs are surrogates, standard normal noise" in text
    x = torch.randn(20, 6)
    with torch.no_grad():
        torch.testing.assert_close(built(x)(x), network(x), rtol=1e-4, atol=1e-4)
    assert json.loads(Path("out/merganser.json").read_text())["surrogates"]["mean"] is None

"""A folder and a program give the network back, bit by bit; what is none, or not whole, is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from partial_networks import Two, two
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merganser.align.blocks import BlockConv, BlockLinear, blocked
from merganser.align.partial_file import (
    Partial,
    export_onnx,
    export_program,
    load_partial,
    read_partial,
    save_partial,
)
from merganser.align.wider import Record, plan, widen
from merganser.checkpoints import open_source
from merganser.errors import (
    MerganserError,
    MissingTensorError,
    NonFiniteError,
    OutputError,
    ParameterError,
    RefError,
    ShapeError,
)


def made(it: Two, *, blocks: bool) -> tuple[nn.Module, Partial]:
    splits = it.some_apart([g for g in it.outer() if g != "embed_patches"])
    record = plan(it.network, it.spec, splits)
    dense = widen(it.network, it.spec, splits, it.wide(splits))
    return (blocked(dense, record) if blocks else dense), Partial("module:network", record, blocks)


def saved(it: Two, folder: Path, *, blocks: bool = True) -> nn.Module:
    network, partial = made(it, blocks=blocks)
    save_partial(folder, network, partial, {"command": "a test"})
    return network


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("name", ["resnet", "resnet-group", "small-vit", "depthwise"])
def test_a_folder_gives_the_network_back(tmp_path: Path, name: str, blocks: bool) -> None:
    it = two(name)
    network = saved(it, tmp_path / "out", blocks=blocks).train()
    back = load_partial(tmp_path / "out", it.network)
    assert not back.training
    assert torch.equal(it.run(back), it.run(network.eval()))
    kinds = {n: type(m) for n, m in network.named_modules()}
    assert {n: type(m) for n, m in back.named_modules()} == kinds
    assert any(kind in (BlockLinear, BlockConv) for kind in kinds.values()) == (blocks and name != "small-vit")


def test_a_folder_tells_how_to_build_its_network_and_how_it_was_made(tmp_path: Path) -> None:
    it = two("mlp")
    saved(it, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert (config["model_type"], config["model"], config["blocks"]) == ("merganser-partial", "module:network", True)
    assert config["layout"]["shapes"]["layers.0.weight"] == [9, 192]
    receipt = json.loads((tmp_path / "out/merganser.json").read_text("utf-8"))
    assert receipt["command"] == "a test"
    assert receipt["outputs"].keys() == open_source(tmp_path / "out").infos.keys()
    assert read_partial(tmp_path / "out").model == "module:network"


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    save_partial(tmp_path / "out", network, Partial("m", Record(), False), {})
    source = open_source(tmp_path / "out")
    assert dict(source.aliases) == {"1.weight": "0.weight"}
    back: Any = load_partial(tmp_path / "out", network)
    assert back[1].weight is back[0].weight
    assert torch.equal(back[0].weight, network[0].weight)


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    it = two("mlp")
    saved(it, tmp_path / "out")
    before = (tmp_path / "out/config.json").read_bytes()
    network, partial = made(it, blocks=False)
    with pytest.raises(OutputError, match="exists"):
        save_partial(tmp_path / "out", network, partial, {})
    assert (tmp_path / "out/config.json").read_bytes() == before
    save_partial(tmp_path / "out", network, partial, {}, overwrite=True)
    assert read_partial(tmp_path / "out").blocks is False
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "bert"}, ParameterError, "holds no partly merged network"),
        ({"model": 3}, ParameterError, 'lacks a "model"'),
        ({"blocks": 1}, ParameterError, 'lacks a "model"'),
        ({"layout": {}}, ParameterError, "config.json: this is no layout"),
        ({"layout": {"attributes": {}, "shapes": {"no": [1]}, "sides": {}, "heads": {}}}, ParameterError, "has no"),
    ],
)
def test_configurations_of_other_things_are_refused(tmp_path: Path, change: Any, error: Any, words: str) -> None:
    it = two("mlp")
    saved(it, tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(error, match=words):
        load_partial(tmp_path / "out", it.network)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_folders_without_a_configuration_are_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(MerganserError, match=r"does not tell which network|holds no partly merged"):
        load_partial(tmp_path, nn.Linear(2, 2))
    with pytest.raises((RefError, ParameterError)):
        read_partial(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        ("layers.0.bias", None, MissingTensorError),
        ("layers.0.bias", torch.full((9,), float("nan")), NonFiniteError),
        ("layers.0.bias", torch.zeros(8), ShapeError),
    ],
)
def test_tensors_that_are_missing_or_unsound_are_refused(
    tmp_path: Path, name: str, tensor: Tensor | None, error: Any
) -> None:
    it = two("mlp")
    saved(it, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = {n: x for n, x in load_file(path).items() if n != name} | ({} if tensor is None else {name: tensor})
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(error, match=name):
        load_partial(tmp_path / "out", it.network)


def test_a_program_runs_without_this_package(tmp_path: Path) -> None:
    it = two("resnet")
    network, _ = made(it, blocks=False)
    export_program(network, tmp_path / "net.pt2", it.args, any_batch=True)
    x = torch.randn(5, 8, 8, 3, dtype=torch.float64)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "program = torch.export.load('net.pt2').module()\n"
        "torch.save(program(torch.load('x.pt')), 'y.pt')\n"
        "assert not any(name.partition('.')[0] == 'merganser' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), network(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(OutputError, match="exists"):
        export_program(network, tmp_path / "net.pt2", it.args)


def test_a_network_in_blocks_is_a_program_too(tmp_path: Path) -> None:
    it = two("dense")
    network, _ = made(it, blocks=True)
    export_program(network, tmp_path / "net.pt2", it.args)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "net.pt2").module()(*it.args)
    torch.testing.assert_close(found, it.run(network), rtol=1e-12, atol=1e-12)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.one(x), "hidden": x}


def test_a_program_gives_what_counts(tmp_path: Path) -> None:
    network, x, more = Named(), torch.randn(4, 3), torch.randn(6, 3)
    export_program(network, tmp_path / "some/all.pt2", (), {"x": x}, any_batch=True)
    export_program(network, tmp_path / "one.pt2", (x,), output=lambda result: result["logits"])
    logits, hidden = torch.export.load(tmp_path / "some/all.pt2").module()(x=more)
    assert torch.equal(logits, network.one(more))
    assert torch.equal(hidden, more)
    assert torch.equal(torch.export.load(tmp_path / "one.pt2").module()(x), network.one(x))
    assert network.training


def test_a_network_that_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ParameterError, match="the network cannot be exported"):
        export_program(Branching(), tmp_path / "net.pt2", (torch.randn(3),))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        export_program(nn.Linear(3, 2), tmp_path / "file/net.pt2", (torch.randn(1, 3),))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_onnx_names_the_packages_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n.startswith("onnx") else real(n))
    with pytest.raises(MerganserError, match=r"ONNX needs onnx and onnxscript\nhint: pip install onnx onnxscript"):
        export_onnx(nn.Linear(3, 2), tmp_path / "net.onnx", (torch.randn(1, 3),))


def test_onnx_gives_the_networks_outputs(tmp_path: Path) -> None:
    import onnx
    from onnx import reference

    network, _ = made(two("mlp"), blocks=True)
    network, x = network.float(), torch.randn(2, 8, 8, 3)
    export_onnx(network, tmp_path / "net.onnx", (x,))
    session = reference.ReferenceEvaluator(onnx.load(tmp_path / "net.onnx"))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-5, atol=1e-5)

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
from merganser.align.ways import Way
from merganser.align.wider import Record, filled, plan, widen
from merganser.checkpoints import open_source
from merganser.errors import (
    ExtraTensorError,
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


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("shapes", {"layers.1.weight": [9]}, "layers.1.weight of 1 axes, and the network's has 2"),
        ("shapes", {"layers.0.bias": [10**30]}, "cannot be made"),
        ("shapes", {"layers.0.bias": [10**14]}, "cannot be made"),
        ("attributes", {"layers.0": {"forward": 3}}, "layers.0.forward cannot be 3"),
        ("attributes", {"layers.0": {"in_features": [192]}}, r"layers.0.in_features cannot be \[192\]"),
        ("attributes", {"layers.0": {"training": 0}}, "layers.0.training cannot be 0"),
        ("sides", {"layers.1": [[[1, 10**12]], [[2, 9]]]}, "sides are of 1000000000000 places"),
    ],
)
def test_layouts_that_were_tampered_with_are_refused(tmp_path: Path, part: str, change: Any, words: str) -> None:
    it = two("mlp")
    saved(it, tmp_path / "out")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text("utf-8"))
    config["layout"][part] |= change
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(ParameterError, match=words):
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


def test_tensors_that_the_network_has_not_are_refused(tmp_path: Path) -> None:
    it = two("mlp")
    saved(it, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    save_file({**load_file(path), "layers.7.bias": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ExtraTensorError, match=r"has layers.7.bias, and the network has not"):
        load_partial(tmp_path / "out", it.network)


def with_buffer(x: Any) -> nn.Module:
    network = nn.Linear(2, 2)
    network.register_buffer("mask", x)
    return network


def test_a_mask_of_infinities_comes_back_and_no_other_infinity(tmp_path: Path) -> None:
    network = with_buffer(torch.full((3, 3), -torch.inf).triu(1))
    save_partial(tmp_path / "out", network, Partial("m", Record(), False), {})
    assert torch.equal(load_partial(tmp_path / "out", network).get_buffer("mask"), network.get_buffer("mask"))
    with pytest.raises(NonFiniteError, match="mask"):
        load_partial(tmp_path / "out", with_buffer(torch.zeros(3, 3)))


class Telling(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}


@pytest.mark.parametrize(
    "network",
    [
        Telling(2, 2),
        nn.Linear(2, 2, device="meta"),
        with_buffer(torch.ones(3).to_sparse()),
        with_buffer(torch.ones(3, dtype=torch.complex128)),
    ],
    ids=["extra state", "meta", "sparse", "complex128"],
)
def test_what_no_such_file_can_hold_is_refused_before_anything_is_written(tmp_path: Path, network: nn.Module) -> None:
    with pytest.raises(ParameterError, match="of the network cannot be stored"):
        save_partial(tmp_path / "out", network, Partial("m", Record(), False), {})
    assert not list(tmp_path.iterdir())


def test_a_network_with_a_tensor_that_repeats_its_entries_is_refused() -> None:
    network = with_buffer(torch.ones(1, 2).expand(2, 2))
    with pytest.raises(ParameterError, match="the network cannot be filled"):
        filled(network, {name: x.clone() for name, x in network.state_dict().items()})


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


def three_ways() -> nn.Module:
    """Convolutions computed densely, in two groups, and as blocks."""
    a, both, b = 1, 0, 2
    mixed = [[a, 1], [both, 2], [b, 1], [both, 1], [a, 2], [b, 2]]
    halves, thirds = [[a, 16], [b, 16]], [[a, 12], [b, 12]]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(9, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 24, 1))
    found: Any = blocked(network, Record(sides={"0": [halves, mixed], "1": [halves, halves], "2": [thirds, halves]}))
    assert [layer.way for layer in found] == [Way.DENSE, Way.GROUPS, Way.BLOCKS]
    return found


def test_all_ways_are_programs_for_any_batch(tmp_path: Path) -> None:
    network, x = three_ways(), torch.randn(5, 9, 4, 4)
    export_program(network, tmp_path / "net.pt2", (x[:2],), any_batch=True)
    found = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(found(x), network(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found(x[:1]), network(x[:1]), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("name", ["mlp", "three ways"])
def test_onnx_gives_the_networks_outputs(tmp_path: Path, name: str) -> None:
    import onnx
    from onnx import reference

    network = made(two("mlp"), blocks=True)[0].float() if name == "mlp" else three_ways()
    x = torch.randn(2, 8, 8, 3) if name == "mlp" else torch.randn(2, 9, 4, 4)
    export_onnx(network, tmp_path / "net.onnx", (x,))
    session = reference.ReferenceEvaluator(onnx.load(tmp_path / "net.onnx"))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-5, atol=1e-5)

"""Programs of torch.export: the symmetries of the network that was exported, and nothing in a file that is executed."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import Built, vectors
from torch import Tensor, nn
from wording import sizes, words

from merganser.align.renorm import reset_batch_norm
from merganser.errors import CheckpointError, ParameterError, RefError
from merganser.symmetry import symmetries
from merganser.symmetry.program import network_of
from merganser.symmetry.program_file import read_program
from merganser.symmetry.record import tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export, about itself


def exported(built: Built, path: Path, **options: Any) -> Path:
    """A network as a file."""
    network, args, kwargs = built
    torch.export.save(torch.export.export(network, args, kwargs, **options), path)
    return path


def of_program(path: Path) -> Built:
    program = read_program(path)
    assert program.example_inputs is not None
    return network_of(program), *program.example_inputs


@pytest.mark.parametrize("name", ["mlp-bn", "resnet-option-a", "vit-fused", "gpt2"])
def test_a_program_has_the_groups_of_its_network(tmp_path: Path, name: str) -> None:
    """MLP, option-A ResNet with BatchNorm, ViT of several heads, and a network of transformers."""
    built = ARCHITECTURES[name]()
    program = of_program(exported(built, tmp_path / "net.pt2"))
    with torch.no_grad():
        given, wanted = (tensors_of(it(*args, **kwargs), None) for it, args, kwargs in (program, built))
    torch.testing.assert_close(given, wanted)
    ours, theirs = symmetries(*built), symmetries(*program)
    tensors = list(built[0].state_dict())
    assert sorted(program[0].state_dict()) == sorted(tensors)
    assert words(theirs.spec, tensors) == words(ours.spec, tensors)
    assert sizes(theirs.spec, tensors) == sizes(ours.spec, tensors)
    assert ours.spec.groups
    assert theirs.checked
    assert (theirs.unsound, theirs.unknown) == ((), ())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h) * (2 if bool(h.sum() > 1e9) else 1)


def test_a_run_tells_of_networks_that_cannot_be_exported() -> None:
    """Why a run is recorded and no graph: a way that depends on numbers stops torch.export, and not the record."""
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Branching(), (vectors(),))
    assert [group.size for group in symmetries(Branching(), (vectors(),)).spec.groups.values()] == [24]


class Net(nn.Module):
    """Layers, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.2, 0.2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(y)) * scale


def net(*, training: bool = False, batch: int = 2) -> Built:
    torch.manual_seed(0)
    return Net().train(training), (torch.randn(batch, 3, 8, 8), torch.ones(5)), {}


@pytest.mark.parametrize(("training", "decomposed"), [(False, False), (True, False), (True, True)])
def test_a_program_runs_in_evaluation_mode_however_it_was_exported(training: bool, decomposed: bool) -> None:
    """Also one that was taken apart into core operations, where BatchNorm gives statistics."""
    network, args, _ = net(training=training)
    program = torch.export.export(network, args)
    ours = network_of(program.run_decompositions() if decomposed else program)
    with torch.no_grad():
        torch.testing.assert_close(ours(*args), network.eval()(*args))
        assert torch.equal(ours(*args), ours(*args))
    assert isinstance(ours.norm, nn.BatchNorm2d)
    assert not ours.training


class Measuring(nn.Module):
    """Normalises by what comes in, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(12, 24), nn.BatchNorm1d(24, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


@pytest.mark.parametrize("decomposed", [False, True])
def test_batch_norm_without_statistics_measures_in_any_mode(decomposed: bool) -> None:
    network, x = Measuring().eval(), vectors()
    program = torch.export.export(network, (x,))
    ours = network_of(program.run_decompositions({}) if decomposed else program)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), network(x))


def test_layers_are_modules_again_and_batch_norm_can_be_measured() -> None:
    network, args, _ = net()
    ours = network_of(torch.export.export(network, args))
    assert {name: type(m) for name, m in ours.named_modules() if name} == {
        "conv": nn.Conv2d, "norm": nn.BatchNorm2d, "head": nn.Linear,
    }  # fmt: skip
    batches = [((torch.randn(2, 3, 8, 8), torch.ones(5)), {}) for _ in range(3)]
    assert reset_batch_norm(ours, batches) == reset_batch_norm(network, batches) == 1
    for name, x in network.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x)


class Tied(nn.Module):
    """A table whose rows are also what logits are made by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(13, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.table(x))))


def test_tied_tensors_stay_one(tmp_path: Path) -> None:
    ours, *_ = of_program(exported((Tied().eval(), (torch.tensor([[1, 2, 3]]),), {}), tmp_path / "net.pt2"))
    state = ours.state_dict(keep_vars=True)
    assert set(state) == {"table.weight", "head.weight", "inner.weight", "inner.bias"}
    assert state["table.weight"] is state["head.weight"]
    assert symmetries(ours, (torch.tensor([[1, 2, 3]]),)).spec.tied == {"head.weight": "table.weight"}


# inputs


def test_a_program_for_any_batch_takes_any_batch_by_place_and_by_name(tmp_path: Path) -> None:
    network, (x, scale), _ = built = net()
    sizes = ({0: torch.export.Dim.DYNAMIC}, None)
    ours, *_ = of_program(exported(built, tmp_path / "net.pt2", dynamic_shapes=sizes))
    more = torch.cat([x, x + 1, x - 1])
    with torch.no_grad():
        for result in (ours(more, scale), ours(more, scale=scale), ours(scale=scale, x=more)):
            torch.testing.assert_close(result, network(more, scale))


def test_inputs_that_the_program_was_not_made_for_are_told_apart() -> None:
    network, (x, scale), _ = net()
    ours = network_of(torch.export.export(network, (x, scale)))
    with pytest.raises(ParameterError, match=r"x is \(3, 3, 8, 8\), and the program was made for \(2, 3, 8, 8\)"):
        ours(torch.randn(3, 3, 8, 8), scale)
    with pytest.raises(ParameterError, match="the program takes x, scale; it was given 1 by place"):
        ours(x)
    with pytest.raises(ParameterError, match="the program takes x, scale; it was given 2 by place"):
        ours(x, scale, more=scale)


# what a file may hold


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The same archive with other records, stored where readers of torch expect them."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    root = next(iter(records)).partition("/")[0]
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        inner = name.removeprefix(f"{root}/")
        if not inner.startswith((".data/", "version", "byteorder")):
            content = change(inner, content)
            writer.write_record(inner, content, len(content))
    writer.write_end_of_file()
    return path


class Marks:
    """An object that leaves a mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.merganser_mark = 1",)


def marked() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Marks()}, buffer)
    return buffer.getvalue()


def as_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        it = json.loads(content)
        change(it)
        return json.dumps(it).encode()

    return changed


def pickled_weight(config: Any) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def custom_object(config: Any) -> None:
    config["config"]["thing"] = {
        "path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None,
    }  # fmt: skip


def input_that_is_code(program: Any) -> None:
    text = json.dumps(program["graph_module"])
    program["graph_module"] = json.loads(
        text.replace('"x"', "\"x=exec('import builtins; builtins.merganser_mark=1')\"")
    )


def size_that_is_code(program: Any) -> None:
    text = json.dumps(program["graph_module"])
    assert "Symbol(" in text
    program["graph_module"] = json.loads(
        text.replace("Symbol(", "exec('import builtins; builtins.merganser_mark=1') or Symbol(")
    )


ATTACKS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "example inputs": ("data/sample_inputs/model.pt", lambda _: marked(), "pickled objects"),
    "a weight": ("data/weights/model_weights_config.json", as_json(pickled_weight), "conv.weight, which is no plain"),
    "a constant": ("data/constants/model_constants_config.json", as_json(custom_object), "thing, which is no plain"),
    "an input's name": ("models/model.json", as_json(input_that_is_code), "a name that is none"),
    "a size": ("models/model.json", as_json(size_that_is_code), "a size that is no formula"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    return exported(net(), path, dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, None)).read_bytes()


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_would_be_executed_is_refused_and_not_executed(
    tmp_path: Path, sound: bytes, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "merganser_mark", 0, raising=False)
    place, change, message = ATTACKS[attack]
    path = tmp_path / "net.pt2"
    path.write_bytes(sound)
    seen: list[str] = []
    rewritten(path, lambda name, content: change(content) if name == place and not seen.append(name) else content)
    assert seen, f"the file has no {place}"
    with pytest.raises(CheckpointError, match=message):
        read_program(path)
    assert builtins.merganser_mark == 0  # type: ignore[attr-defined]


def test_the_marks_of_these_tests_are_real(tmp_path: Path, sound: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch itself does with the first of these files."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # it says so in a form that logging cannot print
    monkeypatch.setattr(builtins, "merganser_mark", 0, raising=False)
    path = tmp_path / "net.pt2"
    path.write_bytes(sound)
    rewritten(path, lambda name, content: marked() if name == "data/sample_inputs/model.pt" else content)
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert builtins.merganser_mark == 1  # type: ignore[attr-defined]


def test_a_rewritten_file_of_the_same_records_is_read(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(sound)
    ours, *_ = of_program(rewritten(path, lambda _, content: content))
    assert set(ours.state_dict()) == set(Net().state_dict())


@pytest.mark.parametrize("kind", ["text", "weights", "half", "library"])
def test_a_file_that_is_no_program_is_refused(tmp_path: Path, sound: bytes, kind: str) -> None:
    path = tmp_path / "net.pt2"
    if kind == "text":
        path.write_text("no program")
    elif kind == "weights":
        torch.save({"a": torch.ones(2)}, path)
    elif kind == "half":
        path.write_bytes(sound[: len(sound) // 2])
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("version", "8.8")
            file.writestr("serialized_state_dict.pt", pickle.dumps({"a": 1}))
    with pytest.raises(RefError, match=r"net.pt2 is no program of torch.export"):
        read_program(path)


class Outside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.merganser_tests.twice(x)


def test_operations_that_are_not_torchs_own_are_refused_by_name() -> None:
    with torch.library._scoped_library("merganser_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        program = torch.export.export(Outside(), (torch.ones(3),))
        with pytest.raises(ParameterError, match=r"calls merganser_tests.twice.default, which is not run here"):
            network_of(program)

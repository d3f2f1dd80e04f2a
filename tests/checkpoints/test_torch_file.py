from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.checkpoints.torch_file import MAX_OPEN_SHARDS, TorchFile, TorchShards
from merganser.errors import CheckpointError, DtypeError
from merganser.types import TensorInfo


def counting(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + int(np.prod(shape)), dtype=torch.float32).reshape(shape)


@pytest.fixture(params=[True, False], ids=["zip", "before-1.6"])
def layout(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"_use_new_zipfile_serialization": request.param}


def test_headers_are_sorted_and_typed(tmp_path: Path, layout: dict[str, bool]) -> None:
    path = tmp_path / "m.bin"
    stored = {
        "z": counting(2, 3),
        "a": torch.tensor(7, dtype=torch.int64),
        "m.half": counting(4).to(torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4, dtype=torch.float16),
    }
    torch.save(stored, path, **layout)
    source = TorchFile(path, "m.bin")
    assert list(source.infos.items()) == [
        ("a", TensorInfo((), "I64")),
        ("flag", TensorInfo((2,), "BOOL")),
        ("m.half", TensorInfo((4,), "BF16")),
        ("none", TensorInfo((0, 4), "F16")),
        ("z", TensorInfo((2, 3), "F32")),
    ]
    assert source.aliases == {}
    assert source.companions() == ()
    for name, tensor in stored.items():
        assert torch.equal(source.read(name), tensor)


def test_row_slices_equal_slices_of_the_whole(tmp_path: Path, layout: dict[str, bool]) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": counting(5, 2, 3)}, path, **layout)
    source = TorchFile(path, "m.pt")
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(source.read("w", (start, stop)), counting(5, 2, 3)[start:stop])


def test_a_transposed_tensor_is_read_contiguous(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": counting(3, 4).T}, path)
    read = TorchFile(path, "m.pt").read("w")
    assert read.is_contiguous()
    assert torch.equal(read, counting(3, 4).T)


def test_what_was_read_is_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": counting(3)}, path)
    source = TorchFile(path, "m.pt")
    source.read("w").zero_()
    assert torch.equal(source.read("w"), counting(3))


def test_tied_tensors_are_found_once_under_the_first_name(tmp_path: Path, layout: dict[str, bool]) -> None:
    path = tmp_path / "m.pt"
    shared = counting(4, 2)
    views = {"rows": shared[1:], "turned": shared.T, "copy": shared.clone()}
    torch.save({"lm_head": shared, "embed": shared, "wte": nn.Parameter(shared), **views}, path, **layout)
    source = TorchFile(path, "m.pt")
    assert source.aliases == {"lm_head": "embed", "wte": "embed"}
    assert list(source.infos) == ["copy", "embed", "rows", "turned"]


def test_empty_tensors_are_not_tied(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.empty(0), "b": torch.empty(0)}, path)
    assert TorchFile(path, "m.pt").aliases == {}


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict", "ema", "net"])
def test_a_nested_state_dict_is_found_beside_an_optimizer(tmp_path: Path, key: str) -> None:
    path = tmp_path / "last.ckpt"
    parameter = nn.Parameter(counting(2, 2))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    content = {
        "epoch": 3,
        "loss": torch.tensor(0.25),
        "metrics": {"accuracy": torch.tensor(0.5)},
        "optimizer": optimizer.state_dict(),
        "schedulers": [{"last": 1}],
        key: {"w": counting(2), "steps": 12, "note": "text"},
    }
    torch.save(content, path)
    assert list(TorchFile(path, "last.ckpt").infos) == ["w"]


def test_a_deeper_state_dict_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state": {"model": {"w": counting(2)}}, "epoch": 1}, path)
    assert list(TorchFile(path, "last.ckpt").infos) == ["w"]


def test_two_state_dicts_are_refused_and_a_key_chooses(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"model": {"w": counting(2)}, "ema": {"w": counting(3)}}, path)
    with pytest.raises(CheckpointError, match="holds 2 mappings of tensors") as refusal:
        TorchFile(path, "last.ckpt")
    assert refusal.value.hint == "say which: last.ckpt::model, last.ckpt::ema"
    assert TorchFile(path, "last.ckpt::ema", "ema").infos["w"].shape == (3,)
    with pytest.raises(CheckpointError, match="no mapping of tensors at 'emma'") as refusal:
        TorchFile(path, "last.ckpt::emma", "emma")
    assert "last.ckpt::ema" in str(refusal.value.hint)


def test_tensors_at_the_top_never_hide_a_nested_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"w": counting(2), "head": {"w": counting(3)}}, path)
    with pytest.raises(CheckpointError, match="holds 2 mappings"):
        TorchFile(path, "last.ckpt")
    assert TorchFile(path, "last.ckpt::.", ".").infos["w"].shape == (2,)
    assert TorchFile(path, "last.ckpt::head", "head").infos["w"].shape == (3,)


@pytest.mark.parametrize("content", [[counting(2)], counting(2), {"epoch": 3}, {0: counting(2)}, {}, 5])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "m.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"m\.pt holds"):
        TorchFile(path, "m.pt")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (Bomb(), "mkdir"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(0.5), "numpy"),
        (np.zeros(3), "numpy"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
    ids=["code", "namespace", "numpy-scalar", "numpy-array", "module"],
)
def test_objects_are_refused_by_name_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, bool], extra: object, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pt"
    torch.save({"w": counting(2), "extra": extra}, path, **layout)
    with pytest.raises(CheckpointError, match=rf"m\.pt holds objects other than tensors: .*{named}") as refusal:
        TorchFile(path, "m.pt")
    assert "safetensors" in str(refusal.value.hint)
    assert not (tmp_path / "exploded").exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(CheckpointError, match="TorchScript program"):
        TorchFile(path, "m.pt")


def test_every_truncation_is_refused_by_path(tmp_path: Path, layout: dict[str, bool]) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": counting(64, 8), "v": counting(3)}, path, **layout)
    whole = path.read_bytes()
    for keep in sorted({0, 1, 4, 7, *range(8, len(whole), len(whole) // 40), len(whole) - 1}):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"m\.pt"):
            TorchFile(path, "m.pt")


@pytest.mark.parametrize("junk", [b"", b"hello world" * 9, b"PK\x03\x04" + b"\0" * 99, b"\x80\x02.", bytes(range(256))])
def test_other_files_are_refused_by_path(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(junk)
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        TorchFile(path, "m.pt")


@pytest.mark.parametrize("place", ["absent.pt", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchFile(tmp_path / place, place)


def test_tensors_that_cannot_be_merged_are_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unmergeable = {
            "quantised": torch.quantize_per_tensor(counting(4), 0.1, 0, torch.qint8),
            "sparse": counting(2, 2).to_sparse(),
            "complex128": torch.zeros(2, dtype=torch.complex128),
        }
    for what, tensor in unmergeable.items():
        path = tmp_path / f"{what}.pt"
        torch.save({"fine": counting(2), "layer.weight": tensor}, path)
        with pytest.raises(DtypeError, match=rf"layer\.weight .*{what}"):
            TorchFile(path, path.name)


def test_a_tensor_without_data_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.empty(2, device="meta")}, path)
    with pytest.raises(CheckpointError, match="w was saved from the meta device"):
        TorchFile(path, "m.pt")


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": counting(2)}, path)
    source = TorchFile(path, "m.pt")
    other = tmp_path / "other.pt"
    torch.save({"w": counting(3)}, other)
    other.replace(path)
    with pytest.raises(CheckpointError, match="changed while"):
        source.read("w")
    path.unlink()
    with pytest.raises(CheckpointError, match="w cannot be read"):
        source.read("w")


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_read_as_one_with_few_files_open(tmp_path: Path) -> None:
    shared = counting(2, 2)
    shards = {f"s{k}.bin": {f"w{k}": counting(3, 2, start=k), f"v{k}": counting(k + 1)} for k in range(5)}
    shards["s4.bin"] |= {"tie.a": shared, "tie.b": shared}
    source = TorchShards(sharded(tmp_path, shards), "folder")
    assert list(source.infos) == sorted([*(f"w{k}" for k in range(5)), *(f"v{k}" for k in range(5)), "tie.a"])
    assert source.aliases == {"tie.b": "tie.a"}
    for k in (0, 4, 2, 2, 1, 3, 0):
        assert torch.equal(source.read(f"w{k}", (1, 3)), counting(3, 2, start=k)[1:])
        assert len(source._open) <= MAX_OPEN_SHARDS


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "s.bin", "b": "s.bin", "c": "gone.bin"}, r"gone\.bin, which is missing"),
        ({"a": "s.bin", "b": "s.bin", "c": "s.bin"}, r"c is in s\.bin, and it is not"),
        ({"a": "s.bin"}, r"s\.bin holds b, which"),
        ({"a": "../s.bin"}, r"'\.\./s\.bin', which is not a file of its own folder"),
        ({"a": "/etc/passwd"}, r"'/etc/passwd', which is not"),
        ({"a": 3}, "3, which is missing"),
    ],
    ids=["missing-file", "name-not-in-shard", "unlisted", "traversal", "absolute", "no-name"],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"a": counting(1)}, tmp_path / "s.bin")
    index = sharded(folder, {"s.bin": {"a": counting(2), "b": counting(2)}}, weight_map)
    with pytest.raises(CheckpointError, match=message):
        TorchShards(index, "model")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map"'])
def test_an_index_that_is_not_sound_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="not a shard index"):
        TorchShards(index, "model")

"""References: each form of the table in `merganser.checkpoints`, and what a reference to nothing says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merganser.checkpoints as wing
from merganser.checkpoints import open_source
from merganser.errors import CheckpointError, RefError

W = torch.arange(6.0).reshape(2, 3)


def base_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"lin.weight": W, "norm": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def adapter_folder(folder: Path) -> Path:
    """A LoRA of rank 1 that adds 2 * [1, 10]^T [1, 1, 1]."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["lin"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(1, 3), "B": torch.tensor([[1.0], [10.0]])}
    tensors = {f"base_model.model.lin.lora_{k}.weight": v for k, v in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


ADAPTED = W + torch.tensor([[2.0], [20.0]])


def test_a_ref_is_a_string_or_a_path_and_is_kept_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert open_source("base").ref == "base"
    assert open_source("./base/").ref == "./base/"
    assert open_source(Path("base")).ref == "base"
    assert open_source("base/model.safetensors").ref == "base/model.safetensors"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_folder(tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(open_source("~/base").read("lin.weight"), W)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_torch_file_opens_and_a_key_says_which_mapping_is_meant(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save({"model": {"w": W}, "ema": {"w": W + 1}, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="holds 2 mappings of tensors"):
        open_source(path)
    assert torch.equal(open_source(f"{path}::model").read("w"), W)
    assert torch.equal(open_source(f"{path}::ema").read("w"), W + 1)
    with pytest.raises(CheckpointError, match="has no mapping of tensors at 'emma'"):
        open_source(f"{path}::emma")


def test_a_key_of_a_file_that_has_no_mappings_is_refused_and_not_ignored(tmp_path: Path) -> None:
    path = base_folder(tmp_path / "base") / "model.safetensors"
    with pytest.raises(RefError, match="only a torch file has mappings") as caught:
        open_source(f"{path}::model")
    assert caught.value.hint == f"write {path}"


def test_a_plus_applies_an_adapter_to_a_base(tmp_path: Path) -> None:
    base, adapter = base_folder(tmp_path / "base"), adapter_folder(tmp_path / "lora")
    source = open_source(f"{base}+{adapter}")
    assert source.identity is None, "the base is not the caller's, so its bytes count"
    assert torch.equal(source.read("lin.weight"), ADAPTED)
    assert torch.equal(source.read("norm"), torch.ones(3))
    assert list(source.companions()) == [base / "config.json"]


def test_a_bare_adapter_is_applied_to_the_base_that_is_handed_over(tmp_path: Path) -> None:
    base, adapter = base_folder(tmp_path / "base"), adapter_folder(tmp_path / "lora")
    assert torch.equal(open_source(adapter, base=open_source(base)).read("lin.weight"), ADAPTED)
    # a whole model stays what it is beside a base
    assert torch.equal(open_source(base, base=open_source(base)).read("lin.weight"), W)


def test_adapters_chain_from_left_to_right(tmp_path: Path) -> None:
    base, adapter = base_folder(tmp_path / "base"), adapter_folder(tmp_path / "lora")
    twice = open_source(f"{base}+{adapter}+{adapter}").read("lin.weight")
    assert torch.equal(twice, ADAPTED + torch.tensor([[2.0], [20.0]]))


def test_a_path_with_a_plus_in_it_is_that_path(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base+tuned")
    assert torch.equal(open_source(folder).read("lin.weight"), W)


def test_a_misspelt_part_of_base_and_adapter_is_the_one_named(tmp_path: Path) -> None:
    base, adapter = base_folder(tmp_path / "base"), adapter_folder(tmp_path / "lora")
    with pytest.raises(RefError, match="bsae does not exist") as caught:
        open_source(f"{tmp_path / 'bsae'}+{adapter}")
    assert caught.value.hint == f"did you mean {base}?"
    with pytest.raises(RefError, match="loar does not exist") as caught:
        open_source(f"{base}+{tmp_path / 'loar'}")
    assert caught.value.hint == f"did you mean {adapter}?"


def test_a_misspelt_path_names_the_nearest(tmp_path: Path) -> None:
    base_folder(tmp_path / "digits-tuned")
    with pytest.raises(RefError, match="digits-tund does not exist") as caught:
        open_source(tmp_path / "digits-tund")
    assert caught.value.hint == f"did you mean {tmp_path / 'digits-tuned'}?"


def test_a_path_like_nothing_there_says_so_and_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefError) as caught:
        open_source(tmp_path / "zzz")
    assert caught.value.hint == f"nothing in {tmp_path} has such a name"
    with pytest.raises(RefError) as caught:
        open_source(tmp_path / "no" / "such" / "x.safetensors")
    assert caught.value.hint == f"there is no folder {tmp_path / 'no' / 'such'} either"


@pytest.mark.parametrize("name", ["x.onnx", "x.gguf", "x", "x.h5", "x.zip"])
def test_a_file_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is no known kind of checkpoint; known are \.safetensors, \.bin"):
        open_source(path)


@pytest.mark.parametrize("ref", ["hf:", "hf:name", "hf:a/b/c", "hf:/b", "hf:a/", "hf:a/b@", "hf:a b/c", "hf:a/b@v 1"])
def test_a_malformed_hub_reference_is_refused_with_the_form(ref: str) -> None:
    with pytest.raises(RefError, match="is not a hub reference") as caught:
        open_source(ref)
    assert "hf:organisation/name@revision" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("ref", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("hf:org/name", "org/name", None),
        ("hf:org-1/na.me_2@v1.0", "org-1/na.me_2", "v1.0"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
    ],
)
def test_a_hub_reference_is_parted_into_repository_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str, repository: str, revision: str | None
) -> None:
    import merganser.checkpoints.hub as hub

    asked: list[tuple[str, str | None]] = []
    folder = base_folder(tmp_path / "cache")

    def snapshot(repo_id: str, revision: str | None = None) -> Path:
        asked.append((repo_id, revision))
        return folder

    monkeypatch.setattr(hub, "snapshot", snapshot)
    monkeypatch.chdir(tmp_path)
    source = open_source(ref)
    assert asked == [(repository, revision)]
    assert source.ref == ref
    assert torch.equal(source.read("lin.weight"), W)


def test_a_local_path_wins_over_a_hub_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import merganser.checkpoints.hub as hub

    monkeypatch.setattr(hub, "snapshot", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    base_folder(tmp_path / "org" / "name")
    assert torch.equal(open_source("org/name").read("lin.weight"), W)
    with pytest.raises(RefError, match="org/nmae does not exist"):  # org is here, so a typo stays a typo
        open_source("org/nmae")


def test_a_hub_reference_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RefError, match="hf:org/name needs huggingface_hub") as caught:
        open_source("org/name")
    assert caught.value.hint == 'pip install "merganser[hub]"'


def test_a_hub_reference_offline_is_refused_without_waiting_for_the_network(tmp_path: Path) -> None:
    script = """
import time
from merganser.checkpoints import open_source
from merganser.errors import RefError
import huggingface_hub, huggingface_hub.errors
began = time.monotonic()
try:
    open_source("no-such-organisation/no-such-model")
except RefError as error:
    print(round(time.monotonic() - began, 3))
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    seconds, message = done.stdout.split("\n", 1)
    assert float(seconds) < 2
    assert "no-such-organisation/no-such-model is not in the cache" in message


def test_opening_is_quick_because_no_tensor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    gigabytes = 4 * 10**9
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, gigabytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + gigabytes)  # sparse
    began = time.monotonic()
    assert open_source(path).infos["w"].nbytes == gigabytes
    assert time.monotonic() - began < 1


def test_the_table_of_reference_forms_stands_in_the_modules_docstring() -> None:
    documented = re.findall(r"^\| `([^`]+)`", wing.__doc__ or "", re.MULTILINE)
    assert documented == [
        "path/to/folder",
        "path/to/file.safetensors",
        "path/to/file.pt",
        "path/to/file.pt::key",
        "path/to/adapter",
        "BASE+ADAPTER",
        "hf:org/name",
    ]

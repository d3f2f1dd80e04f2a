"""A folder that holds a checkpoint: every form that libraries write, and every way in which one can be no good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.errors import CheckpointError, MerganserError, RefError
from merganser.types import Source

A, B = torch.arange(6.0).reshape(3, 2), torch.ones(2, dtype=torch.bfloat16)


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": weight_map}))
    return path


def sharded(folder: Path, stem: str = "model") -> Path:
    """Two shards and their index, as transformers and diffusers write them."""
    folder.mkdir(exist_ok=True)
    one, two = f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"
    save_file({"a": A}, folder / one)
    save_file({"b": B}, folder / two)
    write_index(folder, {"a": one, "b": two}, f"{stem}.safetensors.index.json")
    return folder


def assert_holds_a_and_b(source: Source) -> None:
    assert list(source.infos) == ["a", "b"]
    for name, expected in (("a", A), ("b", B)):
        read: Tensor = source.read(name)
        assert read.dtype == expected.dtype
        assert torch.equal(read, expected)
    assert torch.equal(source.read("a", (1, 3)), A[1:3])


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "pytorch_model.bin",
        "diffusion_pytorch_model.bin",
        "weights.safetensors",
        "weights.pt",
        "weights.pth",
        "weights.ckpt",
        "open_clip_pytorch_model.bin",
    ],
)
def test_a_folder_with_one_weight_file_of_any_known_name_opens(tmp_path: Path, name: str) -> None:
    tensors = {"a": A, "b": B}
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    source = open_source(tmp_path)
    assert source.ref == str(tmp_path)
    assert_holds_a_and_b(source)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "consolidated"])
def test_a_folder_with_a_sharded_index_opens_as_one_checkpoint(tmp_path: Path, stem: str) -> None:
    assert_holds_a_and_b(open_source(sharded(tmp_path, stem)))


def test_a_sharded_torch_index_opens_as_one_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": B}, tmp_path / "pytorch_model-00002-of-00002.bin")
    where = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(tmp_path, where, "pytorch_model.bin.index.json")
    assert_holds_a_and_b(open_source(tmp_path))


def test_an_index_file_named_itself_opens_as_one_checkpoint(tmp_path: Path) -> None:
    source = open_source(sharded(tmp_path) / "model.safetensors.index.json")
    assert_holds_a_and_b(source)
    assert source.companions() == ()


def test_safetensors_are_taken_before_torch_files_of_the_same_model(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_holds_a_and_b(open_source(tmp_path))


def test_a_weight_file_of_a_standard_name_is_taken_beside_others(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    torch.save({"step": 3}, tmp_path / "optimizer.pt")
    torch.save({"step": 3}, tmp_path / "scheduler.pt")
    assert_holds_a_and_b(open_source(tmp_path))


def test_an_adapter_without_a_base_is_refused_with_the_way_to_name_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": A}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RefError, match="is an adapter, which needs a base") as caught:
        open_source(tmp_path)
    assert caught.value.hint == f"write BASE+{tmp_path}"


def test_several_weight_files_of_no_standard_name_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "two.safetensors")
    torch.save({"a": A}, tmp_path / "one.pt")
    with pytest.raises(RefError, match="holds 2 checkpoints") as caught:
        open_source(tmp_path)
    assert caught.value.hint == "name one: one.pt, two.safetensors"


def test_two_indexes_of_no_standard_name_are_refused_by_name(tmp_path: Path) -> None:
    write_index(tmp_path, {}, "x.safetensors.index.json")
    write_index(tmp_path, {}, "y.safetensors.index.json")
    with pytest.raises(RefError, match="holds 2 checkpoints") as caught:
        open_source(tmp_path)
    assert caught.value.hint == "name one: x.safetensors.index.json, y.safetensors.index.json"


def test_a_folder_without_weights_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").mkdir()  # a folder of that name is no file
    with pytest.raises(RefError, match="is a folder without a checkpoint") as caught:
        open_source(tmp_path)
    assert "model.safetensors" in (caught.value.hint or "")


def test_a_folds_state_is_refused_with_the_command_that_exports_it(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(RefError, match="is a fold's state, not a checkpoint") as caught:
        open_source(tmp_path)
    assert caught.value.hint == f"merganser fold export {tmp_path} OUT"


def test_a_pipelines_root_is_refused_with_its_folders(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("vae", "unet"):
        (tmp_path / part).mkdir()
    with pytest.raises(RefError, match="is a pipeline of several models") as caught:
        open_source(tmp_path)
    assert caught.value.hint == "name one of its folders: unet, vae"


def test_a_part_of_a_pipeline_opens(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert_holds_a_and_b(open_source(sharded(tmp_path / "unet", "diffusion_pytorch_model")))


def test_a_missing_shard_is_named_with_its_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing") as caught:
        open_source(tmp_path)
    assert str(tmp_path / "model.safetensors.index.json") in caught.value.message
    assert caught.value.hint == "fetch the missing shard"


@pytest.mark.parametrize("file", ["../secret.safetensors", "{absolute}", "sub/x.safetensors", "..", ".", "./x"])
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors", folder / "x"):
        save_file({"a": A}, place)
    write_index(folder, {"a": file.replace("{absolute}", str(tmp_path / "secret.safetensors"))})
    with pytest.raises(CheckpointError, match="which is not a file of its own folder"):
        open_source(folder)


@pytest.mark.parametrize("file", ["", "x" * 300, "a\0b.safetensors", "\ud800.safetensors"])
def test_an_index_with_a_name_that_no_file_can_have_is_refused(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match="which is missing"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"weight_map": []}', '{"weight_map": "x"}', '{"weight_map": null}', "{", "[" * 100_000],
    ids=range(9),
)
def test_an_index_that_is_no_index_is_refused_by_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not a shard index"):
        open_source(tmp_path)


def test_an_index_in_invalid_utf8_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xff": "x"}}')
    with pytest.raises(CheckpointError, match="is not a shard index"):
        open_source(tmp_path)


def test_an_index_that_lists_a_tensor_which_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(tmp_path, {"a": one, "b": two, "c": one})
    with pytest.raises(CheckpointError, match=r"says that c is in model-00001-of-00002\.safetensors, and it is not"):
        open_source(tmp_path)


def test_an_index_that_swaps_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="and it is not"):
        open_source(tmp_path)


def test_a_shard_with_a_tensor_that_the_index_leaves_out_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"b": B, "extra": A}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds extra, which .* does not list there"):
        open_source(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": A + 1, "b": B}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a, which .* does not list there"):
        open_source(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="holds 3 bytes of data") as caught:
        open_source(tmp_path)
    assert str(path) in caught.value.message


def test_tied_names_of_a_shard_are_aliases_whether_the_index_lists_them_or_not(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "1.safetensors", {"tied": "a", "listed": "a"})
    save_file({"b": B}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "listed": "1.safetensors"})
    source = open_source(tmp_path)
    assert dict(source.aliases) == {"listed": "a", "tied": "a"}
    assert_holds_a_and_b(source)


def test_a_tensor_that_one_shard_holds_is_not_lost_to_an_alias_that_another_declares(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "1.safetensors", {"b": "a"})
    save_file({"b": B}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    source = open_source(tmp_path)
    assert not source.aliases
    assert_holds_a_and_b(source)


BROUGHT = (
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model_card.json",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
LEFT = (
    "README.md",
    "adapter_config.json",
    "adapter_notes.txt",
    "events.out.tfevents",
    "flax_model.msgpack",
    "merganser.json",
    "modeling_own.py",
    "optimizer.pt",
    "pytorch_model.bin.index.json",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "training_args.json",
)


def test_config_tokenizer_template_and_licence_come_along_and_nothing_else_does(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a": A}, base / "model.safetensors")
    for name in (*BROUGHT, *LEFT):
        if name != "adapter_config.json":  # which would make it an adapter
            (base / name).write_text("x")
    (base / "folder.json").mkdir()
    source = open_source(base)
    assert source.companions() == [base / name for name in BROUGHT]


def test_an_adapters_own_files_are_no_companions(tmp_path: Path) -> None:
    from merganser.checkpoints.folder import FolderSource
    from merganser.checkpoints.safetensors_file import SafetensorsFile

    save_file({"a": A}, tmp_path / "model.safetensors")
    for name in ("adapter_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    source = FolderSource(SafetensorsFile(tmp_path / "model.safetensors", "x"), tmp_path)
    assert source.companions() == [tmp_path / "config.json"]


def test_every_refusal_of_a_folder_names_it(tmp_path: Path) -> None:
    def config_only(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    def state(folder: Path) -> None:
        (folder / "ledger.json").write_text("{}")

    def lying(folder: Path) -> None:
        write_index(folder, {"a": "gone.safetensors"})

    for make in (config_only, state, lying):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder)
        with pytest.raises(MerganserError) as caught:
            open_source(folder)
        assert str(folder) in caught.value.message

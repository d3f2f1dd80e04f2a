"""The writer: files that other libraries read, and a folder that is there whole or not at all, whatever happens."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from merganser.checkpoints import open_source
from merganser.checkpoints.shards import plan_shards
from merganser.checkpoints.writer import CheckpointWriter
from merganser.errors import OutputError
from merganser.numerics import TORCH_DTYPES
from merganser.types import ITEM_BYTES, TensorInfo
from writer_helpers import content_of, infos_of, write


def example() -> dict[str, Tensor]:
    """Every item size, a scalar, a tensor of no elements, and names out of order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "z.bool": torch.tensor([True, False, True]),
        "a.weight": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(3, 3, generator=generator).bfloat16(),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "count": torch.tensor(12),
        "none": torch.empty(0, 4),
        "byte": torch.arange(5, dtype=torch.uint8),
        "naïve.名前": torch.ones(1),
    }


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a file's header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def assert_same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read[name], tensor), name


# What is written


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "out", example())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["merganser.json", "model.safetensors"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), example())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_written_opens_again_with_the_same_headers_and_bits(tmp_path: Path) -> None:
    tensors = example()
    write(tmp_path / "out", tensors)
    source = open_source(tmp_path / "out")
    assert dict(source.infos) == infos_of(tensors)
    assert_same({name: source.read(name) for name in source.infos}, tensors)


def test_every_tensor_is_aligned_to_its_item_size_and_the_header_to_8(tmp_path: Path) -> None:
    for length in range(1, 10):  # of a name, and so of the header
        target = tmp_path / str(length)
        write(target, example() | {"n" * length: torch.ones(3, dtype=torch.bool)})
        header_bytes, header = header_of(target / "model.safetensors")
        assert header_bytes % 8 == 0
        del header["__metadata__"]
        for name, entry in header.items():
            assert entry["data_offsets"][0] % ITEM_BYTES[entry["dtype"]] == 0, name


def test_each_file_holds_at_most_shard_bytes_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    tensors = {f"{i}": torch.full((n,), float(i)) for i, n in enumerate([10, 10, 10, 100, 1, 1, 25, 24, 1])}
    write(tmp_path / "out", tensors, shard_bytes=100)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [sorted(load_file(f)) for f in files]
    assert sizes == [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"], ["7", "8"]]
    assert [f.name for f in files] == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert_same({k: v for f in files for k, v in load_file(f).items()}, tensors)


@given(
    sizes=st.lists(st.integers(0, 300), max_size=20),
    shard_bytes=st.integers(1, 500),
)
def test_the_plan_keeps_order_and_begins_a_file_only_where_it_must(sizes: list[int], shard_bytes: int) -> None:
    infos = {f"{i:02d}": TensorInfo((n,), "U8") for i, n in enumerate(sizes)}
    shards = plan_shards(infos, shard_bytes)
    assert [name for shard in shards for name in shard] == list(infos)
    bytes_of = [sum(infos[n].nbytes for n in shard) for shard in shards]
    assert all(total <= shard_bytes or len(shard) == 1 or total == infos[shard[0]].nbytes
               for shard, total in zip(shards, bytes_of, strict=True))  # fmt: skip
    for total, following in zip(bytes_of, shards[1:], strict=False):
        assert total + infos[following[0]].nbytes > shard_bytes


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=20), shard_bytes=st.integers(1, 500))
def test_tensors_of_one_key_share_a_file_and_the_plan_is_that_of_their_sums(sizes: list[int], shard_bytes: int) -> None:
    infos = {f"{i % 3}/{i // 3:02d}": TensorInfo((n,), "U8") for i, n in enumerate(sizes)}
    shards = plan_shards(dict(sorted(infos.items())), shard_bytes, lambda name: name.partition("/")[2])
    keys = [list(dict.fromkeys(name[2:] for name in shard)) for shard in shards]
    sums = {f"{i:02d}": TensorInfo((sum(sizes[3 * i : 3 * i + 3]),), "U8") for i in range(-(-len(sizes) // 3))}
    assert keys == plan_shards(sums, shard_bytes)
    assert sorted(name for shard in shards for name in shard) == sorted(infos)


def test_the_index_has_the_total_size_and_the_file_of_every_tensor_and_alias(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(3)}
    write(tmp_path / "out", tensors, shard_bytes=16, aliases={"tied": "c"})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 16 + 16 + 12},
        "weight_map": {
            "a": "model-00001-of-00003.safetensors",
            "b": "model-00002-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors",
            "tied": "model-00003-of-00003.safetensors",
        },
    }
    source = open_source(tmp_path / "out")
    assert_same({name: source.read(name) for name in source.infos}, tensors)
    assert dict(source.aliases) == {"tied": "c"}


def test_the_files_take_the_stem_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a": torch.ones(1)}, stem="sums")
    write(tmp_path / "two", {"a": torch.ones(1), "b": torch.ones(1)}, stem="sums", shard_bytes=1)
    assert sorted(content_of(tmp_path / "one") or {}) == ["merganser.json", "sums.safetensors"]
    assert "sums.safetensors.index.json" in (content_of(tmp_path / "two") or {})
    assert_same({"a": open_source(tmp_path / "two").read("a")}, {"a": torch.ones(1)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_safetensors_load_model_loads_a_tied_model_from_what_is_written(tmp_path: Path) -> None:
    model = Tied()
    state = {k: v.detach() for k, v in model.state_dict().items() if k != "head.weight"}
    write(tmp_path / "out", state, aliases={"head.weight": "embed.weight"})
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    fresh = Tied()
    missing, unexpected = load_model(fresh, path)
    assert (set(missing), list(unexpected)) == (set(), [])
    assert torch.equal(fresh.head.weight, model.embed.weight)
    assert torch.equal(fresh.body.weight, model.body.weight)


@pytest.mark.parametrize("shard_bytes", [4000, 10**9], ids=["sharded", "one file"])
def test_transformers_loads_what_is_written(tmp_path: Path, shard_bytes: int) -> None:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, dtype="float32"
    )
    with warnings.catch_warnings():  # transformers may warn; our own code stays under "error"
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(config)
    state = {k: v.detach() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config.save_pretrained(tmp_path / "base")
    with CheckpointWriter(
        tmp_path / "out",
        infos_of(state),
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        shard_bytes=shard_bytes,
    ) as writer:
        for name, tensor in state.items():
            writer.put(name, tensor)
        writer.commit({}, [tmp_path / "base" / "config.json"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(loaded.state_dict(), model.state_dict())


def test_digests_equal_hashlib_over_the_tensors_bytes_in_the_file(tmp_path: Path) -> None:
    tensors = example()
    digests = write(tmp_path / "out", tensors, shard_bytes=40)
    receipt = json.loads((tmp_path / "out" / "merganser.json").read_text())
    assert receipt == {"outputs": digests}
    for path in (tmp_path / "out").glob("*.safetensors"):
        length, header = header_of(path)
        data = path.read_bytes()[8 + length :]
        for name in set(header) - {"__metadata__"}:
            begin, end = header[name]["data_offsets"]
            assert digests[name] == hashlib.sha256(data[begin:end]).hexdigest()
    assert set(digests) == set(tensors)
    assert digests["count"] == hashlib.sha256((12).to_bytes(8, "little")).hexdigest()
    assert digests["none"] == hashlib.sha256(b"").hexdigest()


def test_companions_are_copied_bit_for_bit_and_links_become_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"\x00\xff config")
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.commit({}, [tmp_path / "config.json"])
    copy = tmp_path / "out" / "config.json"
    assert copy.read_bytes() == b"\x00\xff config"
    assert not copy.is_symlink()


def test_a_tensor_is_cast_to_the_type_of_its_header_and_laid_out_in_row_order(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with CheckpointWriter(tmp_path / "out", {"x": TensorInfo((3, 2), "BF16")}) as writer:
        writer.put("x", x.T)
        writer.commit({})
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), {"x": x.T.bfloat16()})


@pytest.mark.parametrize(("name", "alias"), [("__metadata__", "tied"), ("x", "format")])
def test_a_name_that_the_format_keeps_for_itself_is_refused_and_not_lost(tmp_path: Path, name: str, alias: str) -> None:
    with pytest.raises(OutputError, match="cannot hold a tensor called __metadata__, or a tied one called format"):
        CheckpointWriter(tmp_path / "out", {name: TensorInfo((1,), "F32")}, aliases={alias: name})
    assert list(tmp_path.iterdir()) == []


# In any order, from any thread


def all_orders(tensors: dict[str, Tensor], seed: int) -> list[tuple[str, int, Tensor]]:
    """Every row of every tensor as (name, first row, rows), shuffled among tensors and in order within each."""
    parts = {n: [(n, i, t[i : i + 1]) for i in range(len(t))] if t.dim() else [(n, 0, t)] for n, t in tensors.items()}
    names = [name for name, rows in parts.items() for _ in rows]
    random.Random(seed).shuffle(names)
    return [parts[name].pop(0) for name in names]


def test_the_same_bits_are_written_whatever_the_order_and_the_size_of_the_parts(tmp_path: Path) -> None:
    tensors = example()
    write(tmp_path / "whole", tensors, shard_bytes=60)
    expected = content_of(tmp_path / "whole")
    for seed in range(5):
        target = tmp_path / f"rows{seed}"
        with CheckpointWriter(target, infos_of(tensors), shard_bytes=60) as writer:
            for name, row, part in all_orders(tensors, seed):
                writer.put(name, part, row)
            writer.commit({"outputs": writer.digests()})
        assert content_of(target) == expected
    write(tmp_path / "backwards", dict(reversed(tensors.items())), shard_bytes=60)
    assert content_of(tmp_path / "backwards") == expected


def test_threads_that_each_write_the_rows_of_their_tensors_write_the_same_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{i}": torch.randn(40, 50, generator=generator) for i in range(24)}
    write(tmp_path / "one", tensors, shard_bytes=30_000)
    with CheckpointWriter(tmp_path / "many", infos_of(tensors), shard_bytes=30_000) as writer:

        def rows_of(name: str) -> None:
            for row in range(0, 40, 3):
                writer.put(name, tensors[name][row : row + 3], row)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(rows_of, tensors))
        writer.commit({"outputs": writer.digests()})
    assert content_of(tmp_path / "many") == content_of(tmp_path / "one")


def test_rows_out_of_order_again_or_past_the_end_are_a_value_error(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {"x": TensorInfo((4, 2), "F32")}) as writer:
        with pytest.raises(ValueError, match=r"x: bytes .* do not follow 0"):
            writer.put("x", torch.ones(1, 2), 1)
        writer.put("x", torch.ones(2, 2), 0)
        with pytest.raises(ValueError, match="do not follow 16"):
            writer.put("x", torch.ones(1, 2), 0)
        with pytest.raises(ValueError, match="do not follow 16"):
            writer.put("x", torch.ones(1, 2), 3)
        with pytest.raises(ValueError, match="do not follow 16"):
            writer.put("x", torch.ones(3, 2), 2)
        writer.put("x", torch.full((2, 2), 2.0), 2)
        with pytest.raises(ValueError, match="do not follow 32"):
            writer.put("x", torch.ones(4, 2))
        writer.commit({})
    read = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert torch.equal(read, torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]]))


def test_a_tensor_never_written_in_full_cannot_be_committed(tmp_path: Path) -> None:
    infos = {"a": TensorInfo((2,), "F32"), "b": TensorInfo((2,), "F32")}
    with CheckpointWriter(tmp_path / "out", infos) as writer:
        writer.put("a", torch.ones(2))
        writer.put("b", torch.ones(1))
        with pytest.raises(ValueError, match=r"never written in full: \['b'\]"):
            writer.commit({})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    headers=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(lambda n: n != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(ITEM_BYTES))),
        max_size=6,
    ),
    shard_bytes=st.integers(1, 200),
)
def test_any_names_types_and_shapes_come_back_through_the_safetensors_library(
    tmp_path: Path, headers: dict[str, tuple[list[int], str]], shard_bytes: int
) -> None:
    infos = {name: TensorInfo(tuple(shape), dtype) for name, (shape, dtype) in headers.items()}
    tensors = {
        name: (torch.arange(info.nbytes) % 2).to(torch.uint8).view(TORCH_DTYPES[info.dtype]).reshape(info.shape)
        for name, info in infos.items()
    }
    write(tmp_path / "out", tensors, shard_bytes=shard_bytes, overwrite=True)
    read = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))

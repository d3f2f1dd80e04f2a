"""The writer: files that other libraries read, and a folder that is there whole or not at all, whatever happens."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from merganser.checkpoints.writer import CheckpointWriter, FolderTransaction, plan_shards
from merganser.errors import OutputError
from merganser.numerics import DTYPE_NAMES, TORCH_DTYPES
from merganser.types import ITEM_BYTES, TensorInfo


def infos_of(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in tensors.items()}


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


def write(target: Path, tensors: dict[str, Tensor], **options: Any) -> dict[str, str]:
    """Write a checkpoint; returns the digests."""
    with CheckpointWriter(target, infos_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        writer.commit({"outputs": writer.digests()})
    return writer.digests()


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a file's header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def content_of(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder by name; None where there is no folder."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


# There whole, or not at all


def test_leaving_without_commit_removes_everything(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {"a": TensorInfo((2,), "F32")}) as writer:
        writer.put("a", torch.ones(2))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_an_exception_removes_everything_and_goes_on(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), CheckpointWriter(tmp_path / "out", {"a": TensorInfo((2,), "F32")}):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_at_the_target_before_commit(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        assert not (tmp_path / "out").exists()
        writer.commit({})
        assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_missing_parents_of_the_target_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", {"x": torch.ones(1)})
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").is_file()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", {"x": torch.ones(1)})
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_target_that_exists_is_refused_with_the_way_to_replace_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="out exists") as caught:
        CheckpointWriter(tmp_path / "out", {})
    assert "--overwrite" in (caught.value.hint or "")
    assert content_of(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a folder", "broken link"])
def test_a_target_that_is_no_folder_is_refused_and_left(tmp_path: Path, kind: str, overwrite: bool) -> None:
    target = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / ("elsewhere" if kind == "link to a folder" else "gone"))
    with pytest.raises(OutputError, match="out exists and is not a folder"):
        CheckpointWriter(target, {}, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_a_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", {})
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "deeper" / "out", {})
    assert content_of(tmp_path) == {"file": b"mine"}


def test_a_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        CheckpointWriter(tmp_path / ("x" * 250), {})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the superuser's rights, where the tests have them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
def test_a_parent_that_may_not_be_written_is_refused(mode: int) -> None:
    parent = Path(tempfile.mkdtemp())
    try:
        parent.chmod(mode)
        with as_nobody(), pytest.raises(OutputError, match="cannot be written: Permission denied") as caught:
            CheckpointWriter(parent / "out", {})
        assert str(parent) in caught.value.message
        parent.chmod(0o700)
        assert list(parent.iterdir()) == []
    finally:
        parent.chmod(0o700)
        shutil.rmtree(parent)


def test_a_disk_without_the_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="needs 1,004 bytes, and the disk has 1,000 free"):
        CheckpointWriter(tmp_path / "out", {"x": TensorInfo((251,), "F32")})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", {"x": torch.ones(250)})


@pytest.mark.parametrize("moment", ["opening", "put", "commit"])
def test_a_write_that_fails_midway_is_an_output_error_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    script = f"""
        import resource, signal, sys
        from pathlib import Path
        import torch
        from merganser.checkpoints.writer import CheckpointWriter
        from merganser.errors import OutputError
        from merganser.types import TensorInfo
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit then fail like those to a full disk

        def limit(moment, size):
            if moment == {moment!r}:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        infos = {{"a": TensorInfo((1000,), "F32"), "b": TensorInfo((50_000,), "F32")}}
        try:
            limit("opening", 100_000)
            with CheckpointWriter(Path(sys.argv[1]), infos, shard_bytes=10_000) as writer:
                writer.put("a", torch.ones(1000))
                limit("put", 100_000)
                writer.put("b", torch.ones(50_000))
                limit("commit", 100)
                writer.commit({{"long": "x" * 1000}})
        except OutputError as error:
            print("refused:", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"refused: {tmp_path / 'out'} cannot be written: ")
    assert os.strerror(errno.EFBIG) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_companion_that_cannot_be_copied_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.commit({}, [tmp_path / "gone.json"])
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appeared_meanwhile_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        target.mkdir()
        (target / "mine.txt").write_text("mine")

    with CheckpointWriter(target, {}) as writer:
        appear()
        with pytest.raises(OutputError, match="out appeared meanwhile"):
            writer.commit({})
    assert content_of(tmp_path) == {"out/mine.txt": b"mine"}
    shutil.rmtree(target)
    with CheckpointWriter(target, {}, overwrite=True) as writer:
        appear()
        writer.commit({})
    assert sorted(content_of(tmp_path) or {}) == ["out/merganser.json", "out/model.safetensors"]


def test_overwriting_replaces_the_whole_folder_and_an_abort_keeps_it(tmp_path: Path) -> None:
    write(tmp_path / "out", {"old": torch.ones(1), "more": torch.ones(1)}, shard_bytes=1)
    before = content_of(tmp_path)
    with CheckpointWriter(tmp_path / "out", {"x": TensorInfo((1,), "F32")}, overwrite=True) as writer:
        writer.put("x", torch.ones(1))
    assert content_of(tmp_path) == before
    write(tmp_path / "out", {"new": torch.ones(1)}, overwrite=True)
    assert sorted(content_of(tmp_path) or {}) == ["out/merganser.json", "out/model.safetensors"]
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["new"]


def test_a_folder_that_cannot_be_swapped_is_an_output_error_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSwap:
        def __init__(self, *_: object, **__: object) -> None:
            pass

    write(tmp_path / "out", {"x": torch.ones(1)})
    before = content_of(tmp_path)
    monkeypatch.setattr("ctypes.CDLL", NoSwap)
    with pytest.raises(OutputError, match="cannot be replaced in one step on this file system") as caught:
        write(tmp_path / "out", {"x": torch.zeros(1)}, overwrite=True)
    assert caught.value.hint == "remove it first"
    assert content_of(tmp_path) == before


def test_a_reader_never_finds_the_target_missing_or_half_while_it_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, {"x": torch.zeros(1000)})
    path = str(target / "model.safetensors")
    size = os.path.getsize(path)
    stop, polls, wrong = threading.Event(), [0], []

    def poll() -> None:
        while not stop.is_set():
            polls[0] += 1
            try:
                if os.stat(path).st_size != size:
                    wrong.append("size")
            except OSError as error:
                wrong.append(repr(error))

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for i in range(40):
            write(target, {"x": torch.full((1000,), float(i))}, overwrite=True)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    assert polls[0] > 400, "the reader hardly looked"


def test_the_umask_decides_who_may_read_as_for_any_other_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", {"x": torch.ones(1), "y": torch.ones(1)}, shard_bytes=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


# Leftovers


@pytest.mark.parametrize("name", ["out", "[bold]x", "a*b", "sp ace", "-o"])
def test_what_a_dead_writer_left_is_removed_by_the_next_to_the_same_place(tmp_path: Path, name: str) -> None:
    leftover, other = tmp_path / f".{name}.partial-dead", tmp_path / ".else.partial-dead"
    for folder in (leftover, other):
        (folder / "sub").mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
    write(tmp_path / name, {"x": torch.ones(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, ".else.partial-dead"])


def test_a_leftover_of_another_target_that_a_pattern_would_fit_is_not_touched(tmp_path: Path) -> None:
    other = tmp_path / ".axb.partial-dead"
    other.mkdir()
    write(tmp_path / "a*b", {"x": torch.ones(1)})
    assert other.exists()


def test_what_a_live_writer_is_at_is_not_removed_and_both_finish(tmp_path: Path) -> None:
    infos = {"x": TensorInfo((1,), "F32")}
    with CheckpointWriter(tmp_path / "out", infos, overwrite=True) as live:
        live.put("x", torch.ones(1))
        write(tmp_path / "out", {"x": torch.zeros(1)})
        assert live.folder.exists()
        live.commit({})
    assert float(load_file(tmp_path / "out" / "model.safetensors")["x"]) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_many_writers_to_one_place_at_once_leave_one_whole_result_and_nothing_else(tmp_path: Path) -> None:
    def run(i: int) -> None:
        write(tmp_path / "out", {"x": torch.full((100,), float(i))}, overwrite=True)

    run(0)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(60)))
    x = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert torch.equal(x, x[:1].expand(100))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Killed at any moment: every operation on the file system, one after the other, is the last


KILLED = '''
import json, os, shutil, signal, sys
from pathlib import Path

import torch

from merganser.checkpoints.writer import CheckpointWriter
from merganser.types import TensorInfo

work, overwrite = Path(sys.argv[1]), sys.argv[2] == "overwrite"
target = work / "out"
WATCHED = ("open", "os.", "shutil.", "fcntl.", "tempfile.", "ctypes.dlsym")


def write(value, shard_bytes=8):
    with CheckpointWriter(target, {n: TensorInfo((2,), "F32") for n in "ab"}, shard_bytes=shard_bytes,
                          overwrite=overwrite) as writer:
        for name in "ab":
            writer.put(name, torch.full((2,), value))
        writer.commit({"value": value}, [work / "config.json"])


def content(folder):
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def attempt(last):
    """Write in a child that dies before operation number `last`; whether it lived."""
    child = os.fork()
    if child == 0:
        left = last

        def count():
            nonlocal left
            left -= 1
            if left == -1:  # once, since the kill is itself an operation
                os.kill(os.getpid(), signal.SIGKILL)

        real = os.fsync
        os.fsync = lambda descriptor: (count(), real(descriptor), count())
        sys.addaudithook(lambda event, _: event.startswith(WATCHED) and count())
        write(2.0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return os.WIFEXITED(status)


def reset():
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "config.json").write_text("{}")
    if overwrite:
        write(1.0, shard_bytes=1000)
        (target / "extra.txt").write_text("of the old")


reset()
old = content(target)
write(2.0)
new = content(target)
outcomes, remaining = [], []
for last in range(1000):
    reset()
    lived = attempt(last)
    found = content(target)
    outcomes.append("old" if found == old else "new" if found == new else "torn")
    overwrite, before = True, overwrite
    write(2.0)
    overwrite = before
    if content(target) != new or sorted(p.name for p in work.iterdir()) != ["config.json", "out"]:
        remaining.append(last)
    if lived:
        break
print(json.dumps({"lived": lived, "outcomes": outcomes, "remaining": remaining}))
'''


@pytest.mark.parametrize("mode", ["fresh", "overwrite"])
def test_kill_9_before_any_operation_leaves_the_old_or_the_new_and_the_next_writer_tidies_up(
    tmp_path: Path, mode: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "work"), mode], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    outcomes = report["outcomes"]
    assert report["lived"]
    assert "torn" not in outcomes
    assert report["remaining"] == []
    assert len(outcomes) > 30, "every file is opened, flushed and its folder too"
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True), "once new, it stays new"
    assert outcomes.count("new") > 1, "a kill after the rename is among the moments"


def test_all_bytes_are_flushed_to_disk_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    by_inode: dict[int, str] = {}

    def watch_fsync(descriptor: int) -> None:
        events.append(str(os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def watch_rename(self: Path, target: Path) -> None:
        by_inode.update({p.stat().st_ino: p.name for p in self.iterdir()})
        by_inode[self.stat().st_ino] = "the folder"
        events.append("rename")
        rename(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    write(tmp_path / "out", {"a": torch.ones(1), "b": torch.ones(1)}, shard_bytes=1)
    by_inode[tmp_path.stat().st_ino] = "the parent"
    named = [e if e == "rename" else by_inode[int(e)] for e in events]
    assert named == [
        "merganser.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "the folder",
        "rename",
        "the parent",
    ]


# The transaction by itself, and anything at all


def test_a_transaction_takes_any_files_and_folders(tmp_path: Path) -> None:
    transaction = FolderTransaction(tmp_path / "out")
    (transaction.folder / "sub").mkdir()
    (transaction.folder / "sub" / "x.txt").write_text("x")
    transaction.commit()
    assert content_of(tmp_path) == {"out/sub/x.txt": b"x"}


def test_an_aborted_transaction_leaves_nothing(tmp_path: Path) -> None:
    transaction = FolderTransaction(tmp_path / "out")
    (transaction.folder / "x.txt").write_text("x")
    transaction.abort()
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

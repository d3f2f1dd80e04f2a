"""One safetensors file: literal bytes in, tensors or a named refusal out; the safetensors library is the judge."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from merganser.checkpoints import open_source
from merganser.checkpoints.safetensors_file import MAX_HEADER_BYTES
from merganser.errors import CheckpointError, DtypeError
from merganser.numerics import TORCH_DTYPES
from merganser.types import ITEM_BYTES, TensorInfo
from safetensors_helpers import entry, opened, write

#: A whole file, byte by byte: two tensors, one of them a scalar.
GOOD_HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    b'"s":{"dtype":"I16","shape":[],"data_offsets":[16,18]}}'
)
GOOD_DATA = b"\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x40\x40\x00\x00\x80\x40\xff\x7f"
GOOD = len(GOOD_HEADER).to_bytes(8, "little") + GOOD_HEADER + GOOD_DATA


def test_a_file_written_byte_by_byte_reads_as_what_the_bytes_say(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    file = opened(path)
    assert dict(file.infos) == {"a": TensorInfo((2, 2), "F32"), "s": TensorInfo((), "I16")}
    assert dict(file.metadata) == {"format": "pt"}
    assert torch.equal(file.read("a"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(file.read("s"), torch.tensor(0x7FFF, dtype=torch.int16))
    assert not file.aliases
    assert file.companions() == ()
    assert file.identity is None


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_cut_anywhere_is_refused_by_path(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    assert str(path) in caught.value.message


def test_bytes_behind_the_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD + b"\x00")
    with pytest.raises(CheckpointError, match="holds 19 bytes of data where the header speaks of 18"):
        opened(path)


E32 = entry()
HOSTILE: dict[str, tuple[Any, bytes, type[Exception], str]] = {
    "overlap": ({"a": E32, "b": entry(offsets=(2, 6))}, b"123456", CheckpointError, r"b at \[2, 6\) overlaps a"),
    "same place": ({"a": E32, "b": E32}, b"1234", CheckpointError, r"b at \[0, 4\) overlaps a"),
    "inside": (
        {"a": entry(shape=(4,), offsets=(0, 16)), "b": entry(offsets=(4, 8))},
        b"1" * 16,
        CheckpointError,
        r"b at \[4, 8\) overlaps a",
    ),
    "hole": ({"a": E32, "b": entry(offsets=(8, 12))}, b"1" * 12, CheckpointError, "b at .* leaves a hole after a"),
    "hole first": ({"a": entry(offsets=(4, 8))}, b"1" * 8, CheckpointError, "leaves a hole after the header"),
    "past the end": ({"a": entry(shape=(2,), offsets=(0, 8))}, b"1234", CheckpointError, "4 bytes of data .* of 8"),
    "far past": (
        {"a": entry(shape=(2**40,), offsets=(0, 2**42))},
        b"1234",
        CheckpointError,
        "4 bytes of data where the header speaks of 4398046511104",
    ),
    "offset of 4000 digits": (
        {"a": entry(offsets=(10**4000, 10**4000 + 4))},
        b"1234",
        CheckpointError,
        "a at .* leaves a hole after the header",
    ),
    "offset of 5000 digits": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1' + b"0" * 5000 + b"]}}",
        b"1234",
        CheckpointError,
        "not sound JSON",
    ),
    "backwards": ({"a": entry(offsets=(4, 0))}, b"1234", CheckpointError, r"a is F32 \(1,\) = 4 bytes, .* span -4"),
    "span too small": ({"a": entry(shape=(2,))}, b"1234", CheckpointError, r"a is F32 \(2,\) = 8 bytes, .* span 4"),
    "span too large": ({"a": entry("F16")}, b"1234", CheckpointError, r"a is F16 \(1,\) = 2 bytes, .* span 4"),
    "one offset": ({"a": entry(offsets=(4,))}, b"1234", CheckpointError, r"a has data_offsets \[4\]"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, b"1234", CheckpointError, r"a has data_offsets \[0, 4, 8\]"),
    "offsets no list": ({"a": entry(offsets=4)}, b"1234", CheckpointError, "a has data_offsets 4"),
    "offsets of floats": ({"a": entry(offsets=(0.0, 4.0))}, b"1234", CheckpointError, r"data_offsets \[0.0, 4.0\]"),
    "offsets of bools": ({"a": entry("U8", (), (False, True))}, b"1", CheckpointError, r"offsets \[False, True\]"),
    "offset below 0": ({"a": entry(offsets=(-4, 0))}, b"", CheckpointError, r"data_offsets \[-4, 0\]"),
    "offset -0": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
        b"1234",
        CheckpointError,
        r"data_offsets \[-0.0, 4\]",
    ),
    "shape below 0": ({"a": entry(shape=(-1, -1))}, b"1234", CheckpointError, r"a has shape \[-1, -1\]"),
    "shape of a bool": ({"a": entry(shape=(True,))}, b"1234", CheckpointError, r"a has shape \[True\]"),
    "shape of a float": ({"a": entry(shape=(1.0,))}, b"1234", CheckpointError, r"a has shape \[1.0\]"),
    "shape of NaN": ({"a": entry(shape=(float("nan"),))}, b"1234", CheckpointError, r"a has shape \[nan\]"),
    "shape of text": ({"a": entry(shape=("1",))}, b"1234", CheckpointError, r"a has shape \['1'\]"),
    "shape nested": ({"a": entry(shape=((1,),))}, b"1234", CheckpointError, r"a has shape \[\[1\]\]"),
    "shape no list": ({"a": entry(shape=1)}, b"1234", CheckpointError, "a has shape 1"),
    "shape null": ({"a": entry(shape=None)}, b"1234", CheckpointError, "a has shape None"),
    # 2**32 * 2**32 * 4 = 2**66, which is 0 in 64 bits
    "product wraps to 0": ({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}, b"", CheckpointError, "more than any"),
    "product wraps to 4": ({"a": entry(shape=(2**62 + 1, 2**62 + 1))}, b"1234", CheckpointError, "more than any file"),
    "bytes wrap to 0": ({"a": entry(shape=(2**62,), offsets=(0, 0))}, b"", CheckpointError, "18446744073709551616 byt"),
    "axis of 2**63": ({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, b"", CheckpointError, "more than any file"),
    "axis of 2**64": ({"a": entry(shape=(2**64,))}, b"1234", CheckpointError, "more than any file"),
    "hidden by a 0": ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", CheckpointError, "more than any fil"),
    "a million huge axes": ({"a": entry(shape=[2**62] * 1_000_000)}, b"1234", CheckpointError, "more than any file"),
    "product of 5000 digits": ({"a": entry(shape=[10**18] * 300)}, b"1234", CheckpointError, "more than any file"),
    "dtype of 4 bits": ({"a": entry("F4", (8,))}, b"1234", DtypeError, "a has dtype 'F4', which cannot be read"),
    "dtype unknown": ({"a": entry("Q4_K")}, b"1234", DtypeError, "a has dtype 'Q4_K'"),
    "dtype lower case": ({"a": entry("f32")}, b"1234", DtypeError, "a has dtype 'f32'"),
    "dtype number": ({"a": entry(32)}, b"1234", CheckpointError, "a has dtype 32"),
    "dtype list": ({"a": entry(["F32"])}, b"1234", CheckpointError, r"a has dtype \['F32'\]"),
    "dtype object": ({"a": entry({})}, b"1234", CheckpointError, r"a has dtype \{\}"),
    "dtype null": ({"a": entry(None)}, b"1234", CheckpointError, "a has dtype None"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", CheckpointError, "a must have dtype, shape and dat"),
    "extra field": ({"a": E32 | {"scale": 2}}, b"1234", CheckpointError, "and nothing else"),
    "tensor no object": ({"a": ["F32", [1], [0, 4]]}, b"1234", CheckpointError, "a must have dtype, shape"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
        CheckpointError,
        "'a' stands twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
        CheckpointError,
        "'dtype' stands twice",
    ),
    "duplicate metadata": (b'{"__metadata__":{"k":"1","k":"2"}}', b"", CheckpointError, "'k' stands twice"),
    "invalid UTF-8": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", CheckpointError, "JSON"),
    "half a character": (
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
        CheckpointError,
        "surrogates not allowed",
    ),
    "half a character in metadata": (b'{"__metadata__":{"k":"\\udc00"}}', b"", CheckpointError, "surrogates not allow"),
    "control character": (b'{"a\n":1}', b"", CheckpointError, "not sound JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", CheckpointError, "not sound JSON"),
    "UTF-16": ("{}".encode("utf-16-le"), b"", CheckpointError, "not sound JSON"),
    "deeply nested arrays": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", CheckpointError, "x.safetensors"),
    "deeply nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", CheckpointError, "x.safetensors"),
    "unclosed": (b'{"a":', b"", CheckpointError, "not sound JSON"),
    "two values": (b"{}{}", b"", CheckpointError, "not sound JSON"),
    "no JSON": (b"hello", b"", CheckpointError, "not sound JSON"),
    "empty header": (b"", b"", CheckpointError, "not sound JSON"),
    "header a list": ([], b"", CheckpointError, "the header is not a JSON object"),
    "header a number": (7, b"", CheckpointError, "the header is not a JSON object"),
    "header null": (None, b"", CheckpointError, "the header is not a JSON object"),
    "metadata a list": ({"__metadata__": ["pt"]}, b"", CheckpointError, "__metadata__ is not a map of strings"),
    "metadata a text": ({"__metadata__": "pt"}, b"", CheckpointError, "__metadata__ is not a map of strings"),
    "metadata null": ({"__metadata__": None}, b"", CheckpointError, "__metadata__ is not a map of strings"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", CheckpointError, "__metadata__ is not a map of strings"),
    "metadata nested": ({"__metadata__": {"a": {}}}, b"", CheckpointError, "__metadata__ is not a map of strings"),
    "metadata a tensor": ({"__metadata__": E32}, b"1234", CheckpointError, "__metadata__ is not a map of strings"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_at_once_with_path_and_reason(tmp_path: Path, case: str) -> None:
    header, data, kind, reason = HOSTILE[case]
    path = write(tmp_path / "x.safetensors", header, data)
    began = time.monotonic()
    with pytest.raises(kind, match=reason) as caught:
        opened(path)
    assert type(caught.value) is kind
    assert caught.value.message.startswith(str(path))
    assert len(caught.value.message) < 20_000, "a message is for people"
    assert time.monotonic() - began < 5


def test_a_header_with_a_duplicate_among_half_a_million_names_is_refused_in_seconds(tmp_path: Path) -> None:
    names = [*(f"n{i}" for i in range(500_000)), "n499999"]
    path = write(tmp_path / "x.safetensors", ("{" + ",".join(f'"{n}":0' for n in names) + "}").encode())
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="'n499999' stands twice"):
        opened(path)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, MAX_HEADER_BYTES + 1, 11])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes in a file of 10") as caught:
        opened(path)
    assert str(path) in caught.value.message
    assert "truncated" in (caught.value.hint or "")


def test_a_pointer_of_git_lfs_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(CheckpointError, match="is Git LFS's pointer") as caught:
        open_source(str(path))
    assert caught.value.hint == "git lfs pull, in its folder"


def test_a_header_past_the_limit_is_refused_even_if_the_file_has_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    os.truncate(path, MAX_HEADER_BYTES + 100)  # a sparse file
    with pytest.raises(CheckpointError, match="claims a header of 100000001 bytes"):
        opened(path)


def test_an_empty_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="has 0 bytes; a safetensors file starts with 8 bytes of length"):
        opened(path)


def test_a_missing_file_and_a_folder_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        opened(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        opened(tmp_path)


def test_a_file_of_no_tensors_is_sound(tmp_path: Path) -> None:
    assert not opened(write(tmp_path / "x.safetensors", {})).infos


def test_scalars_and_tensors_of_no_elements_read_equal_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "none": torch.empty(0),
        "rows": torch.empty(0, 4, dtype=torch.float64),
        "columns": torch.empty(4, 0, dtype=torch.bool),
        "scalar": torch.tensor(2.5),
        "last": torch.empty(3, 0, 2, dtype=torch.bfloat16),
    }
    save_file(tensors, path)
    file = opened(path)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(read, tensor)
    assert file.read("columns", (1, 3)).shape == (2, 0)
    assert file.read("rows", (0, 0)).shape == (0, 4)
    assert torch.equal(file.read("scalar", (0, 1)), torch.tensor(2.5))


def test_a_tensor_of_no_elements_between_two_others_leaves_no_hole(tmp_path: Path) -> None:
    header = {"a": entry(), "z": entry(shape=(0,), offsets=(4, 4)), "b": entry(offsets=(4, 8))}
    file = opened(write(tmp_path / "x.safetensors", header, b"\x00" * 8))
    assert list(file.infos) == ["a", "b", "z"]


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_reads_equal_the_library_whole_and_by_rows(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype == "BOOL" else 256
    raw = torch.randint(high, (7 * 3 * ITEM_BYTES[dtype],), dtype=torch.uint8, generator=generator)
    save_file({"pad": torch.zeros(1, dtype=torch.uint8), "x": raw.view(TORCH_DTYPES[dtype]).reshape(7, 3)}, path)
    file = opened(path)
    with safe_open(path, "pt") as peer:
        expected = peer.get_tensor("x")
        rows = [(0, 7), (0, 0), (7, 7), (2, 5), (6, 7)]
        slices = [peer.get_slice("x")[start:stop] if start < stop else expected[start:stop] for start, stop in rows]
    assert file.infos["x"] == TensorInfo((7, 3), dtype)
    read = file.read("x")
    assert read.dtype == expected.dtype
    assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8))
    for (start, stop), part in zip(rows, slices, strict=True):
        got = file.read("x", (start, stop))
        assert got.shape == (stop - start, 3)
        assert torch.equal(got.reshape(-1).view(torch.uint8), part.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("rows", [(0, 3), (-1, 1), (2, 1), (3, 3)])
def test_rows_that_a_tensor_lacks_are_never_read_from_its_neighbour(tmp_path: Path, rows: tuple[int, int]) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}, path)
    with pytest.raises(IndexError, match="a has 2 rows"):
        opened(path).read("a", rows)


def test_what_is_read_can_be_written_to_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    file = opened(path)
    file.read("a").zero_()
    assert path.read_bytes() == GOOD
    assert torch.equal(file.read("a"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_a_file_rewritten_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    file = opened(path)
    path.write_bytes(GOOD)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="changed while it was being read") as caught:
        file.read("a")
    assert str(path) in caught.value.message


def test_a_file_replaced_by_one_of_the_same_time_and_size_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    path.write_bytes(GOOD)
    other.write_bytes(GOOD)
    for each in (path, other):
        os.utime(each, ns=(5, 5))
    file = opened(path)
    os.replace(other, path)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        file.read("a")


def test_a_file_shortened_or_removed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    file = opened(path)
    os.truncate(path, len(GOOD) - 10)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        file.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="a cannot be read: No such file"):
        file.read("a")


def test_a_tied_name_in_the_metadata_is_an_alias_and_other_metadata_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"format": "pt", "tied": "pt", "b": "pt", "author": "nobody", "chain": "tied"}
    save_file({"pt": torch.zeros(1), "b": torch.ones(1)}, path, metadata)
    assert dict(opened(path).aliases) == {"tied": "pt"}

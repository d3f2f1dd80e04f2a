"""Mutated and invented safetensors files: the safetensors library is the judge."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from merganser.errors import CheckpointError, DtypeError
from merganser.types import ITEM_BYTES, TensorInfo
from safetensors_helpers import JSON, entry, opened, write

# What the library takes and we refuse, each on purpose:
#   a name that stands twice (the library keeps one of them), a field it does not know, __metadata__ of null, a tensor
#   written as a list, a packed type, an axis that torch cannot hold. Nothing is the other way round.
VALID = {
    "__metadata__": {"format": "pt", "t": "b"},
    "a": entry("F32", [2, 2], [0, 16]),
    "b": entry("BF16", [3], [16, 22]),
    "z": entry("I8", [0, 2], [22, 22]),
}
VALID_HEADER = json.dumps(VALID, separators=(",", ":")).encode()
VALID_DATA = bytes(range(22))
INTERESTING = (
    *(bytes([b]) for b in b'"{}[]:,-0123456789.eE \\\n\t\x00\x7f\x80\xff'),
    *(b"F4", b"F64", b"null", b"true", b"NaN", b'"a"', b"\\u0000", b"\\ud800", b"-0", b"18446744073709551616", b"{}"),
    *(b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"dtype":"F32",', b"9" * 400, b"[" * 3000),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes of its header replaced, inserted, removed or copied."""
    header = bytearray(VALID_HEADER)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(header)))
        removed = draw(st.integers(0, 6))
        if draw(st.booleans()):
            new = draw(st.sampled_from(INTERESTING))
        else:
            start = draw(st.integers(0, len(header)))
            new = bytes(header[start : start + draw(st.integers(0, 60))])
        header[at : at + removed] = new
    length = len(header) + draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1, 8, 2**63]))
    return struct.pack("<Q", max(0, length)) + bytes(header) + VALID_DATA


def peer_reads(path: Path) -> dict[str, torch.Tensor] | None:
    """What the safetensors library makes of a file; None where it refuses."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:
        return None


def check_against_the_library(path: Path) -> bool:
    """Whether we accept the file; fails where we are laxer than the library or read otherwise."""
    expected, read, refusal = peer_reads(path), {}, None
    try:
        file = opened(path)
        read = {name: file.read(name) for name in file.infos}
    except (CheckpointError, DtypeError) as error:
        refusal = error.message
    if refusal is not None:
        assert str(path) in refusal
        return False
    assert expected is not None, "the library refuses this file, and we took it"
    assert set(read) == set(expected)
    for name, tensor in read.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
    return True


FUZZ = settings(
    max_examples=1000, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@FUZZ
@given(data=mutated())
def test_what_the_library_refuses_in_a_mutated_header_we_refuse_and_what_both_take_reads_equal(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    check_against_the_library(path)


AXES = st.lists(st.integers(0, 4) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64]), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "F4", "F6_E2M3"]) | JSON,
        "shape": AXES | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 22]), min_size=2, max_size=2).map(sorted) | JSON,
    },
    optional={"extra": JSON},
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "é"]), ENTRIES | JSON, max_size=3),
    metadata=st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | JSON, max_size=2) | JSON,
)
def test_what_the_library_refuses_in_an_invented_header_we_refuse_and_what_both_take_reads_equal(
    tmp_path: Path, header: dict[str, Any], metadata: Any
) -> None:
    path = tmp_path / "fuzz.safetensors"
    full = header if metadata is None else header | {"__metadata__": metadata}
    write(path, full, VALID_DATA if header else b"")
    check_against_the_library(path)


@st.composite
def sound_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header that tiles its data, of any types and shapes."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(min_size=1, max_size=4), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        info = TensorInfo(tuple(shape), dtype)
        header[name] = entry(dtype, shape, [position, position + info.nbytes])
        position += info.nbytes
    return header, bytes(i % 2 for i in range(position))


@settings(FUZZ, max_examples=200)
@given(sound=sound_files())
def test_a_sound_file_of_any_names_types_and_shapes_is_taken(
    tmp_path: Path, sound: tuple[dict[str, Any], bytes]
) -> None:
    path = write(tmp_path / "fuzz.safetensors", *sound)
    assert check_against_the_library(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1}}',
        b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":["F32",[1],[0,4]]}',
    ],
    ids=["name twice", "unknown field", "metadata null", "tensor as a list"],
)
def test_where_we_are_stricter_than_the_library_the_file_is_ambiguous_or_odd(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path / "x.safetensors", header, b"1234")
    assert peer_reads(path) is not None
    with pytest.raises(CheckpointError):
        opened(path)

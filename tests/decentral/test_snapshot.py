"""Snapshots: bytes that travel, and what their reader refuses."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from merganser.decentral.snapshot import Kind, Rejected, Snapshot, decode, encode, fingerprint_of, norm_of
from merganser.decentral.words import Limits
from merganser.errors import DtypeError, ParameterError
from support import make_base

LIMITS = Limits()
TINY = Snapshot("r", 1, 2, 3, {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor(7, dtype=torch.int16)})


def rejection(payload: bytes, limits: Limits = LIMITS) -> Kind:
    with pytest.raises(Rejected) as caught:
        decode(payload, limits)
    return caught.value.kind


def parts(payload: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(payload[:8], "little")
    return json.loads(payload[8:end]), payload[end:]


def signed(header: Any, data: bytes) -> bytes:
    """Bytes whose digest is right, whatever their header says."""
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        metadata = {key: value for key, value in header["__metadata__"].items() if key != "digest"}
        header = {**header, "__metadata__": metadata}
        plain = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        header["__metadata__"] = {**metadata, "digest": hashlib.sha256(plain + data).hexdigest()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# what travels


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_snapshot_comes_back_as_it_was_sent(codec: Any) -> None:
    tensors = make_base()
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    tensors["flag"] = torch.tensor([True, False])
    tensors["grad"] = torch.ones(2, requires_grad=True)
    sent = Snapshot("run", 4, 0, 9, tensors, codec)
    got = decode(sent.encode(), LIMITS)
    assert (got.run, got.sender, got.age, got.codec) == ("run", 4, (0, 9), codec)
    assert got.fingerprint == sent.fingerprint
    assert list(got.tensors) == sorted(tensors)
    for name, x in tensors.items():
        wide = codec == "bf16" and x.dtype in (torch.float32, torch.float64)
        expected = x.detach().to(torch.bfloat16).to(x.dtype) if wide else x.detach()
        assert got.tensors[name].dtype == x.dtype
        assert torch.equal(got.tensors[name], expected), name


def test_bytes_are_those_of_the_format_and_no_others() -> None:
    """Written by hand: floats before integers, so that all stay aligned; keys sorted; padded to 8 bytes."""
    fingerprint = hashlib.sha256(b'[["n","I16",[]],["w","F32",[2]]]').hexdigest()
    head = '{"__metadata__":{"codec":"fp32",'
    tail = (
        f'"dtypes":"{{}}","fingerprint":"{fingerprint}","incarnation":"2","round":"3","run":"r","sender":"1"}},'
        '"n":{"data_offsets":[8,10],"dtype":"I16","shape":[]},"w":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}'
    )
    data = b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x07\x00"
    digest = hashlib.sha256((head + tail).encode() + data).hexdigest()
    text = (head + f'"digest":"{digest}",' + tail).encode()
    text += b" " * (-len(text) % 8)
    assert TINY.encode() == len(text).to_bytes(8, "little") + text + data


def test_any_reader_of_safetensors_opens_it() -> None:
    tensors = make_base()
    found = load(Snapshot("run", 0, 0, 0, tensors).encode())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], x) for name, x in tensors.items())


def test_order_of_tensors_changes_no_byte() -> None:
    tensors = make_base()
    backwards = dict(reversed(tensors.items()))
    assert Snapshot("r", 0, 0, 0, tensors).encode() == Snapshot("r", 0, 0, 0, backwards).encode()


def test_bf16_halves_the_data_and_errs_by_a_256th_at_most() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    full, half = (Snapshot("r", 0, 0, 0, {"x": x}, codec).encode() for codec in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert len(parts(full)[1]) == 2 * len(parts(half)[1]) == 4 * 4096
    assert ((decode(half, LIMITS).tensors["x"] - x).abs() <= x.abs() / 256).all()


def test_tensors_are_the_receivers_own() -> None:
    payload = TINY.encode()
    decode(payload, LIMITS).tensors["w"].fill_(9)
    assert payload == TINY.encode()
    assert decode(payload, LIMITS).tensors["w"].tolist() == [1.0, -2.0]


def test_a_model_without_tensors_or_entries_travels_too() -> None:
    assert decode(Snapshot("r", 0, 0, 0, {}).encode(), LIMITS).tensors == {}
    (x,) = decode(Snapshot("r", 0, 0, 0, {"x": torch.empty(0, 3)}, "bf16").encode(), LIMITS).tensors.values()
    assert x.shape == (0, 3)
    assert x.dtype == torch.float32


def test_fingerprint_is_of_names_types_and_shapes_alone() -> None:
    known = fingerprint_of({"a": torch.zeros(2, 3), "b": torch.zeros(1)})
    assert known == fingerprint_of({"b": torch.ones(1), "a": torch.ones(2, 3)})
    others: list[dict[str, Tensor]] = [
        {"a": torch.zeros(3, 2), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(())},
        {"a": torch.zeros(2, 3).double(), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(1)},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({known, *map(fingerprint_of, others)}) == 6


def test_norm_is_of_floating_tensors_in_float64() -> None:
    tensors = make_base()
    squares = [float(v) ** 2 for x in tensors.values() if x.is_floating_point() for v in x.double().reshape(-1)]
    assert norm_of(tensors) == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-14)
    assert norm_of({"x": torch.full((2,), 3e38)}) == pytest.approx(3e38 * math.sqrt(2))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"round": -1}, ParameterError),
        ({"sender": -1}, ParameterError),
        ({"codec": "fp8"}, ParameterError),
        ({"tensors": {"__metadata__": torch.zeros(1)}}, ParameterError),
        ({"tensors": {"x": torch.zeros(1, dtype=torch.complex64)}}, DtypeError),
    ],
)
def test_what_no_snapshot_holds_is_refused_where_it_is_made(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        encode(replace(TINY, **changes))


# what is refused


def test_every_beginning_is_truncated() -> None:
    payload = TINY.encode()
    assert {rejection(payload[:length]) for length in range(len(payload))} == {Kind.TRUNCATED}


def test_every_flipped_bit_is_found() -> None:
    payload = TINY.encode()
    for spot in range(len(payload)):
        for bit in range(8):
            spoilt = bytearray(payload)
            spoilt[spot] ^= 1 << bit
            assert rejection(bytes(spoilt)) in (Kind.CORRUPTED, Kind.TRUNCATED), (spot, bit)


def test_more_bytes_behind_it_are_corruption() -> None:
    assert rejection(TINY.encode() + b"\0") is Kind.CORRUPTED


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_but_rejected(noise: bytes) -> None:
    rejection(noise)
    rejection(len(noise).to_bytes(8, "little") + noise)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_signed_header_of_anything_raises_nothing_but_rejected(data: st.DataObject) -> None:
    header, body = parts(TINY.encode())
    node: dict[str, Any] = data.draw(st.sampled_from([header, header["__metadata__"], header["w"], header["n"]]))
    key = data.draw(st.sampled_from([*node, "more"]))
    node[key] = data.draw(JSON)
    with suppress(Rejected):
        assert decode(signed(header, body), LIMITS).tensors["w"].shape == tuple(header["w"]["shape"])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("w", "data_offsets"), [0, 10]),
        (("w", "data_offsets"), [2, 10]),
        (("w", "data_offsets"), [0.0, 8]),
        (("w", "data_offsets"), [0]),
        (("w", "shape"), [-2]),
        (("w", "shape"), [True, 2]),
        (("w", "shape"), [1 << 70]),
        (("w", "shape"), [1] * 65 + [2]),
        (("w", "shape"), [0, 1 << 62]),
        (("w", "dtype"), "F8_E4M3"),
        (("w", "dtype"), ["F32"]),
        (("w", "more"), 1),
        (("w",), 5),
        (("n", "data_offsets"), [9, 11]),
        (("__metadata__",), None),
        (("__metadata__", "more"), "x"),
        (("__metadata__", "round"), 3),
        (("__metadata__", "round"), "-3"),
        (("__metadata__", "round"), "³"),
        (("__metadata__", "sender"), "1" * 19),
        (("__metadata__", "incarnation"), ""),
        (("__metadata__", "codec"), "fp8"),
        (("__metadata__", "dtypes"), "{"),
        (("__metadata__", "dtypes"), "[" * 100_000),
        (("__metadata__", "dtypes"), "[]"),
        (("__metadata__", "dtypes"), '{"w":"I64"}'),
        (("__metadata__", "dtypes"), '{"w":[]}'),
        (("__metadata__", "dtypes"), '{"w":"F64"}'),
        (("__metadata__", "fingerprint"), "0" * 64),
    ],
)
def test_a_signed_header_that_lies_is_corrupted(place: tuple[str, ...], value: Any) -> None:
    header, data = parts(TINY.encode())
    node = header
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert rejection(signed(header, data)) is Kind.CORRUPTED


@pytest.mark.parametrize("text", ["[1]", "3", '{"a":' * 100_000, "1" * 5000, '"\\ud800"', "\xff", "{}"])
def test_a_header_that_is_no_mapping_is_corrupted(text: str) -> None:
    assert rejection(len(text).to_bytes(8, "little") + text.encode("latin-1")) is Kind.CORRUPTED


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [1 << 62, 1 << 62, 0]])
def test_an_empty_tensor_beyond_all_measure_is_corrupted(shape: list[int]) -> None:
    header, data = parts(TINY.encode())
    header["x"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    assert rejection(signed(header, data)) is Kind.CORRUPTED


def test_a_header_length_beyond_all_measure_is_corrupted() -> None:
    assert rejection(b"\xff" * 8 + b"{}") is Kind.CORRUPTED


def test_size_is_looked_at_before_anything_is_parsed() -> None:
    payload = TINY.encode()
    assert decode(payload, Limits(snapshot_bytes=len(payload))).round == 3
    assert rejection(payload, Limits(snapshot_bytes=len(payload) - 1)) is Kind.OVERSIZED
    assert rejection(b"\xff" * 100, Limits(snapshot_bytes=99)) is Kind.OVERSIZED


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_rejected(dtype: torch.dtype, value: float) -> None:
    tensors = {"a": torch.ones(3), "x": torch.tensor([1.0, value], dtype=dtype)}
    assert rejection(Snapshot("r", 0, 0, 0, tensors).encode()) is Kind.NON_FINITE


def test_finite_values_whose_sum_is_not_are_accepted_until_the_codec_overflows() -> None:
    large = {"x": torch.full((3,), torch.finfo(torch.float32).max)}
    assert torch.equal(decode(Snapshot("r", 0, 0, 0, large).encode(), LIMITS).tensors["x"], large["x"])
    assert rejection(Snapshot("r", 0, 0, 0, large, "bf16").encode()) is Kind.NON_FINITE

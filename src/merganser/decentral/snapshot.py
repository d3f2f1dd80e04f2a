"""A model as it travels between agents: safetensors bytes that say whose they are and whether they are whole.

Layout: 8 bytes little-endian header length, JSON header, data; any reader of safetensors opens it. `__metadata__` has
run, sender, incarnation, round, codec, fingerprint and digest. The digest is the sha256 of the rest of the header, in
canonical JSON, and of the data, so it covers names, types, shapes, bytes and who sent them when. The same snapshot is
the same bytes everywhere. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from math import prod, sqrt
from reprlib import repr as short
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from merganser.decentral.words import Codec, Limits
from merganser.errors import DtypeError, MerganserError, ParameterError
from merganser.numerics import DTYPE_NAMES, TORCH_DTYPES, all_finite, raw_bytes, sum_of_squares
from merganser.types import EXACT_DTYPES, FLOAT_DTYPES, ITEM_BYTES

MAX_HEADER_BYTES = 100_000_000
#: Types that bf16 sends in fewer bytes.
NARROWED = ("F64", "F32")
#: Largest number of digits in a count of the header.
MAX_DIGITS = 18
#: Most axes that a tensor has; torch's own limit.
MAX_AXES = 64
_KEYS = ("run", "sender", "incarnation", "round", "codec", "dtypes", "fingerprint", "digest")


class Kind(Enum):
    """Why a snapshot was rejected."""

    OVERSIZED = "oversized"
    TRUNCATED = "truncated"
    CORRUPTED = "corrupted"
    WRONG_RUN = "wrong_run"
    WRONG_MODEL = "wrong_model"
    STALE = "stale"
    NON_FINITE = "non_finite"
    NORM = "norm"


class Rejected(MerganserError):  # noqa: N818 - an everyday event, and no fault of the agent that meets it
    """Bytes that are no snapshot an agent may merge.

    Attributes:
        kind: why; counted by it.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(f"{kind.value}: {message}")
        self.kind = kind


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model of one agent after one round's training.

    Attributes:
        run: name of the run that it belongs to.
        sender: number of the agent.
        incarnation: how many times that agent was started before; a restarted one counts on.
        round: of the sender, from 0.
        tensors: by name, buffers among them; integer ones too.
        codec: what floating tensors are sent as.
    """

    run: str
    sender: int
    incarnation: int
    round: int
    tensors: Mapping[str, Tensor]
    codec: Codec = "fp32"

    @cached_property
    def fingerprint(self) -> str:
        """Of the model: that of `fingerprint_of` its tensors."""
        return fingerprint_of(self.tensors)

    @cached_property
    def norm(self) -> float:
        """Of all floating tensors together."""
        return norm_of(self.tensors)

    @property
    def age(self) -> tuple[int, int]:
        """(incarnation, round): the larger is the newer of two by one sender."""
        return self.incarnation, self.round

    def encode(self) -> bytes:
        """The bytes that travel, the same for the same snapshot.

        Raises:
            ParameterError: If a number is negative, or the codec is not known.
            DtypeError: If a tensor is neither floating, integer nor boolean.
        """
        return encode(self)


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the sorted names, types and shapes of a model: whose weights can be averaged has the same."""
    return _fingerprint((name, DTYPE_NAMES[x.dtype], x.shape) for name, x in tensors.items())


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all floating tensors together, summed in float64."""
    return sqrt(sum(sum_of_squares(x.detach()) for _, x in sorted(tensors.items()) if x.is_floating_point()))


def data_bytes(tensors: Mapping[str, Tensor], codec: Codec) -> int:
    """Bytes that the tensors of a snapshot take, without its header.

    >>> data_bytes({"x": torch.zeros(3), "n": torch.tensor(1)}, "bf16")
    14
    """
    narrow = codec == "bf16"
    sizes = (2 if narrow and DTYPE_NAMES[x.dtype] in NARROWED else x.element_size() for x in tensors.values())
    return sum(x.numel() * size for x, size in zip(tensors.values(), sizes, strict=True))


def refuse_above(limits: Limits, size: int) -> None:
    """Refuse to send what everybody would refuse to take.

    Raises:
        ParameterError: If the size is above the limit.
    """
    if size > limits.snapshot_bytes:
        raise ParameterError(
            f"limits.snapshot_bytes is {limits.snapshot_bytes:,}, and a snapshot of this model takes {size:,} bytes: "
            "every one would be refused",
            f"limits.snapshot_bytes={max(2 * size, 1 << 20)}",
        )


def encode(snapshot: Snapshot) -> bytes:
    """As `Snapshot.encode`."""
    if min(snapshot.sender, snapshot.incarnation, snapshot.round) < 0:
        raise ParameterError(f"sender, incarnation and round are {snapshot.sender}, {snapshot.age}; none is negative")
    if snapshot.codec not in ("fp32", "bf16"):
        raise ParameterError(f"codec is {snapshot.codec!r}; it is fp32 or bf16")
    if "__metadata__" in snapshot.tensors:
        raise ParameterError("a tensor is called __metadata__, which safetensors keeps for itself")
    sent: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    for name, x in sorted(snapshot.tensors.items()):
        dtype = DTYPE_NAMES.get(x.dtype, str(x.dtype))
        if dtype not in FLOAT_DTYPES + EXACT_DTYPES:
            raise DtypeError(f"{name} is {dtype}, which no snapshot holds")
        sent[name] = x.detach().cpu()
        if snapshot.codec == "bf16" and dtype in NARROWED:
            sent[name], dtypes[name] = sent[name].to(torch.bfloat16), dtype
    header: dict[str, Any] = {
        "__metadata__": {
            "run": snapshot.run,
            "sender": str(snapshot.sender),
            "incarnation": str(snapshot.incarnation),
            "round": str(snapshot.round),
            "codec": snapshot.codec,
            "dtypes": _canonical(dtypes),
            "fingerprint": snapshot.fingerprint,
        }
    }
    end, parts = 0, []
    for name in sorted(sent, key=lambda name: (-sent[name].element_size(), name)):  # so that all stay aligned
        x = sent[name]
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        parts.append(raw_bytes(x))
    header["__metadata__"]["digest"] = _digest(header, parts)
    text = _canonical(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def decode(payload: bytes, limits: Limits) -> Snapshot:
    """The snapshot that bytes hold, in the types that its sender has.

    Args:
        payload: anything.
        limits: size is looked at before anything else.

    Raises:
        Rejected: If it is oversized, truncated, corrupted or not finite. Nothing else is raised, whatever the bytes.
    """
    if len(payload) > limits.snapshot_bytes:
        raise Rejected(Kind.OVERSIZED, f"{len(payload)} bytes; the limit is {limits.snapshot_bytes}")
    header, data = _split(memoryview(payload))
    metadata = _metadata(header)
    spans = _spans(header, len(data))
    if _digest(header, [data]) != metadata["digest"]:
        _corrupted("the digest is that of other bytes")
    dtypes = _dtypes(metadata["dtypes"])
    tensors = {}
    for name, (dtype, shape, begin, end) in sorted(spans.items()):
        x = torch.empty(end - begin, dtype=torch.uint8)
        if end > begin:
            raw_bytes(x)[:] = data[begin:end]
        x = x.view(TORCH_DTYPES[dtype]).reshape(shape)
        tensors[name] = x.to(TORCH_DTYPES[dtypes[name]]) if name in dtypes else x
    if fingerprint_of(tensors) != metadata["fingerprint"]:
        _corrupted("the fingerprint is that of another model")
    for name, x in tensors.items():
        if not all_finite(x):
            raise Rejected(Kind.NON_FINITE, f"{short(name)} holds NaN or infinity")
    sender, incarnation, round = (_count(metadata, key) for key in ("sender", "incarnation", "round"))
    return Snapshot(metadata["run"], sender, incarnation, round, tensors, cast(Codec, metadata["codec"]))


def _split(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    """Header and data, the header a mapping of anything."""
    if len(view) < 8:
        raise Rejected(Kind.TRUNCATED, f"{len(view)} bytes; the length of the header alone takes 8")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES:
        _corrupted(f"a header of {length} bytes")
    if 8 + length > len(view):
        raise Rejected(Kind.TRUNCATED, f"a header of {length} bytes in {len(view)}")
    try:
        header = json.loads(bytes(view[8 : 8 + length]).decode("utf-8"))
    except (ValueError, RecursionError):
        _corrupted("the header is not sound JSON")
    if not isinstance(header, dict):
        _corrupted("the header is not a JSON object")
    return header, view[8 + length :]


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != set(_KEYS):
        _corrupted("__metadata__ is not that of a snapshot")
    if not all(isinstance(value, str) for value in metadata.values()) or metadata["codec"] not in ("fp32", "bf16"):
        _corrupted("__metadata__ has a value of another kind")
    return metadata


def _spans(header: dict[str, Any], data_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Type, shape, begin and end of every tensor, once they are known to tile the data exactly."""
    spans = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            _corrupted(f"{short(name)} has no dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES + EXACT_DTYPES:
            _corrupted(f"{short(name)} is {short(dtype)}")
        if not _counts(shape) or len(shape) > MAX_AXES or not _counts(offsets) or len(offsets) != 2:
            _corrupted(f"{short(name)} has shape {short(shape)} at {short(offsets)}")
        beyond = prod(size or 1 for size in shape) >= 1 << 63  # an empty tensor, whose strides no torch can hold
        if offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype] or beyond:
            _corrupted(f"{short(name)} is {dtype} {short(shape)} at {short(offsets)}")
        spans[name] = (dtype, tuple(shape), offsets[0], offsets[1])
    position = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            _corrupted(f"{short(name)} starts at {begin}, and what is before it ends at {position}")
        position = end
    if data_bytes < position:
        raise Rejected(Kind.TRUNCATED, f"{data_bytes} bytes of data; the header speaks of {position}")
    if data_bytes > position:
        _corrupted(f"{data_bytes} bytes of data; the header speaks of {position}")
    return spans


def _dtypes(text: str) -> dict[str, str]:
    """Types before the codec, by name, of those tensors that it narrowed."""
    try:
        dtypes = json.loads(text)
    except (ValueError, RecursionError):
        _corrupted("dtypes is not sound JSON")
    if not isinstance(dtypes, dict) or not all(isinstance(d, str) and d in NARROWED for d in dtypes.values()):
        _corrupted("dtypes is not a map of names to types")
    return dtypes


def _count(metadata: Mapping[str, str], key: str) -> int:
    text = metadata[key]
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        _corrupted(f"{key} is {short(text)}")
    return int(text)


def _counts(value: object) -> bool:
    """Whether it is a list of whole numbers, none negative and each of 63 bits at most."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _fingerprint(infos: Iterable[tuple[str, str, Iterable[int]]]) -> str:
    return hashlib.sha256(
        _canonical(sorted([name, dtype, list(shape)] for name, dtype, shape in infos)).encode()
    ).hexdigest()


def _digest(header: Mapping[str, Any], parts: Iterable[memoryview]) -> str:
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "digest"}
    found = hashlib.sha256(_canonical({**header, "__metadata__": metadata}).encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _corrupted(what: str) -> NoReturn:
    raise Rejected(Kind.CORRUPTED, what)

"""Torch's own files, .bin .pt .pth .ckpt: only tensors are ever unpickled, and they stay mapped until they are read.

A training checkpoint nests its weights beside an optimizer and an epoch. The mapping that is meant is the top level
when it holds tensors, else the only nested mapping of names to tensors; where several could be meant, `file.pt::key`
says which (`a.b` for deeper ones, `.` for the top level).
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.weight_map import read_weight_map
from merganser.errors import CheckpointError, DtypeError
from merganser.numerics import DTYPE_NAMES
from merganser.types import TensorInfo

TOP_LEVEL = "."
MAX_DEPTH = 4
MAX_OPEN_SHARDS = 2

_OBJECT = re.compile(r"(?:GLOBAL|Unsupported class) ([\w.]+)")


class TorchFile:
    """A Source over one torch file.

    Args:
        path: the file.
        ref: the reference as the user wrote it.
        key: which mapping of the file is meant; None where only one can be.

    Raises:
        CheckpointError: If the file is damaged, holds objects other than tensors, or several mappings of tensors.
        DtypeError: If a tensor is quantised, sparse, or of a type that safetensors cannot hold.
    """

    identity: str | None = None

    def __init__(self, path: Path, ref: str, key: str | None = None) -> None:
        self.path, self.ref = path, ref
        try:
            self._stamp = _stamp(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        mapping = _choose(_load(path), path, key)
        self._tensors: dict[str, Tensor] = {name: mapping[name].detach() for name in sorted(_tensor_names(mapping))}
        infos: dict[str, TensorInfo] = {}
        aliases: dict[str, str] = {}
        first_by_memory: dict[tuple[object, ...], str] = {}
        for name, tensor in self._tensors.items():
            info = _header(name, tensor, path)
            first = first_by_memory.setdefault(_memory(name, tensor), name)
            if first == name:
                infos[name] = info
            else:
                aliases[name] = first
        self.infos: Mapping[str, TensorInfo] = infos
        self.aliases: Mapping[str, str] = aliases

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Copy one tensor, or rows [start, stop) of it, out of the file.

        Raises:
            CheckpointError: If the file changed since its header was read.
        """
        try:
            unchanged = _stamp(self.path) == self._stamp
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error.strerror}") from error
        if not unchanged:
            raise CheckpointError(f"{self.path} changed while it was being read", "run the command again")
        tensor = self._tensors[name]
        if rows is not None and tensor.dim():
            tensor = tensor[rows[0] : rows[1]]
        return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)

    def companions(self) -> Sequence[Path]:
        """A bare file brings no others."""
        return ()


class TorchShards:
    """A Source over `*.bin.index.json` and the files that it names; at most two are open at a time.

    Raises:
        CheckpointError: If a shard is missing, lies outside the folder, or disagrees with the index.
        DtypeError: If a tensor is quantised, sparse, or of a type that safetensors cannot hold.
    """

    identity: str | None = None

    def __init__(self, index_path: Path, ref: str) -> None:
        self.ref, self._folder = ref, index_path.parent
        self._where = read_weight_map(index_path)
        self._open: OrderedDict[str, TorchFile] = OrderedDict()
        self._lock = Lock()
        infos: dict[str, TensorInfo] = {}
        aliases: dict[str, str] = {}
        for file in sorted(set(self._where.values())):
            shard = self._shard(file)
            held = {*shard.infos, *shard.aliases}
            listed = {name for name, home in self._where.items() if home == file}
            if absent := sorted(listed - held):
                raise CheckpointError(f"{index_path} says that {absent[0]} is in {file}, and it is not")
            if unlisted := sorted(held - listed):
                raise CheckpointError(f"{file} holds {unlisted[0]}, which {index_path} does not list there")
            infos.update(shard.infos)
            aliases.update(shard.aliases)
        self.infos: Mapping[str, TensorInfo] = dict(sorted(infos.items()))
        self.aliases: Mapping[str, str] = dict(sorted(aliases.items()))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or rows of it from the shard that holds it.

        Raises:
            CheckpointError: If the shard changed since its header was read.
        """
        return self._shard(self._where[name]).read(name, rows)

    def companions(self) -> Sequence[Path]:
        """The index brings no others; its folder does."""
        return ()

    def _shard(self, file: str) -> TorchFile:
        with self._lock:
            shard = self._open.pop(file, None)
            if shard is None:
                while len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                shard = TorchFile(self._folder / file, self.ref)
            self._open[file] = shard
            return shard


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _load(path: Path) -> object:
    """What the file holds, tensors mapped; files from before torch 1.6 cannot be mapped and are read whole."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is empty", "fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start == b"PK\x03\x04")
    except pickle.UnpicklingError as error:
        found = _OBJECT.search(str(error))
        if found is None:
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} holds objects other than tensors: {found[1]}",
            "loading such a file can run any code, so it is refused; save its tensors as safetensors where it was made",
        ) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, which holds code", "save its state_dict() as safetensors"
            ) from error
        raise _damaged(path, error) from error
    except Exception as error:  # the unpickler meets arbitrary bytes: KeyError, EOFError, struct.error, ...
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0].split(". ")[0]
    return CheckpointError(
        f"{path} cannot be read as a torch file: {type(error).__name__}: {reason[:200]}",
        "the file is truncated, damaged or of another kind; fetch it again",
    )


def _tensor_names(mapping: Mapping[Any, Any]) -> list[str]:
    return [name for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)]


def _nested(
    mapping: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping below this one that holds tensors by name, with its path."""
    for key, value in mapping.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            if _tensor_names(value):
                yield (*path, key), value
            elif len(path) + 1 < MAX_DEPTH:
                yield from _nested(value, (*path, key))


def _choose(content: object, path: Path, key: str | None) -> Mapping[str, Any]:
    """The mapping of names to tensors that is meant.

    Raises:
        CheckpointError: If there is none, or several and no key.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors")
    depth_and_mapping = {".".join(keys): (len(keys), mapping) for keys, mapping in _nested(content)}
    if _tensor_names(content):
        depth_and_mapping = {TOP_LEVEL: (1, content), **depth_and_mapping}
    listed = ", ".join(f"{path.name}::{label}" for label in depth_and_mapping)
    if key is not None:
        if key not in depth_and_mapping:
            raise CheckpointError(
                f"{path} has no mapping of tensors at {key!r}", f"it has {listed}" if listed else None
            )
        return depth_and_mapping[key][1]
    if not depth_and_mapping:
        raise CheckpointError(f"{path} holds no tensors by name")
    # A loss or an accuracy, or a mapping of such, is no rival to the weights; nor is what lies deeper than they do.
    weights = {label: found for label, found in depth_and_mapping.items() if not _only_scalars(found[1])}
    rivals = weights or depth_and_mapping
    least = min(depth for depth, _ in rivals.values())
    nearest = [mapping for depth, mapping in rivals.values() if depth == least]
    if len(nearest) > 1:
        raise CheckpointError(f"{path} holds {len(nearest)} mappings of tensors", f"say which: {listed}")
    return nearest[0]


def _only_scalars(mapping: Mapping[Any, Any]) -> bool:
    return all(mapping[name].dim() == 0 for name in _tensor_names(mapping))


def _header(name: str, tensor: Tensor, path: Path) -> TensorInfo:
    if tensor.is_quantized:
        raise DtypeError(f"{path}: {name} is quantised ({tensor.dtype})", "dequantise it first")
    if tensor.layout != torch.strided:
        raise DtypeError(f"{path}: {name} is sparse ({tensor.layout})", "save it with .to_dense()")
    if tensor.dtype not in DTYPE_NAMES:
        raise DtypeError(f"{path}: {name} has dtype {tensor.dtype}, which cannot be merged")
    if tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: {name} was saved from the {tensor.device.type} device, without its data")
    return TensorInfo(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])


def _memory(name: str, tensor: Tensor) -> tuple[object, ...]:
    """What two tied tensors share; an empty tensor shares nothing."""
    if tensor.numel() == 0:
        return (name,)
    where = tensor.untyped_storage().data_ptr()
    return (
        where,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )

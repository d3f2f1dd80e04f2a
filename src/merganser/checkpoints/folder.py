"""A folder that holds a checkpoint: one file or a sharded index, with its config and tokenizer beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.checkpoints.safetensors_file import SafetensorsFile
from merganser.checkpoints.torch_file import TorchFile, TorchShards
from merganser.checkpoints.weight_map import read_weight_map
from merganser.errors import CheckpointError, RefError
from merganser.types import Source, TensorInfo

#: Weight files by the names that libraries give them, the safest first.
STANDARD_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
#: Small files that belong to a model and not to its weights.
COMPANION_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_COMPANIONS = ("*.index.json", "adapter_*", "merganser.json", "trainer_state.json", "training_args*")


class SafetensorsShards:
    """A Source over `*.safetensors.index.json` and the files that it names.

    Raises:
        CheckpointError: If a shard is missing, lies outside the folder, or disagrees with the index.
    """

    identity: str | None = None

    def __init__(self, index: Path, ref: str) -> None:
        self.ref = ref
        where = read_weight_map(index)
        shards = {file: SafetensorsFile(index.parent / file, ref) for file in sorted(set(where.values()))}
        listed: dict[str, set[str]] = {file: set() for file in shards}
        aliases: dict[str, str] = {}
        held = {name for shard in shards.values() for name in shard.infos}
        for shard in shards.values():
            aliases.update({alias: name for alias, name in shard.aliases.items() if alias not in held})
        for name, file in where.items():
            if name in shards[file].infos:
                listed[file].add(name)
            elif name not in aliases:
                raise CheckpointError(f"{index} says that {name} is in {file}, and it is not")
        for file, shard in shards.items():
            if unlisted := sorted(set(shard.infos) - listed[file]):
                raise CheckpointError(f"{file} holds {unlisted[0]}, which {index} does not list there")
        self._home = {name: shards[file] for name, file in where.items() if name not in aliases}
        self.infos: Mapping[str, TensorInfo] = {name: self._home[name].infos[name] for name in sorted(self._home)}
        self.aliases: Mapping[str, str] = dict(sorted(aliases.items()))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or rows of it from the shard that holds it."""
        return self._home[name].read(name, rows)

    def read_lines(self, name: str, lines: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or lines of it along its last axis from the shard that holds it."""
        return self._home[name].read_lines(name, lines)

    def companions(self) -> Sequence[Path]:
        """The index brings no others; its folder does."""
        return ()


class FolderSource:
    """A Source over weights in a folder, which brings the folder's config and tokenizer files along."""

    identity: str | None = None

    def __init__(self, weights: Source, folder: Path) -> None:
        self._weights, self.folder = weights, folder
        self.ref, self.infos, self.aliases = weights.ref, weights.infos, weights.aliases
        self.read = weights.read
        if isinstance(weights, SafetensorsFile | SafetensorsShards):
            self.read_lines = weights.read_lines

    def companions(self) -> Sequence[Path]:
        """Config, tokenizer, chat template and licence files, sorted by name; code where the config names some."""
        patterns = [*COMPANION_PATTERNS, *(["*.py"] if "auto_map" in config_of([self.folder / "config.json"]) else [])]
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(p for p in found if not any(p.match(pattern) for pattern in NOT_COMPANIONS))


def config_of(companions: Iterable[Path]) -> Mapping[str, Any]:
    """What the config.json among a model's files says; nothing where there is none, or it is no JSON object."""
    path = next((p for p in companions if p.name == "config.json"), None)
    try:
        content = json.loads(path.read_bytes()) if path is not None else None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def stem_for(companions: Iterable[Path]) -> str:
    """First part of the names of weight files by which the library looks for them that wrote the config."""
    return "diffusion_pytorch_model" if "_diffusers_version" in config_of(companions) else "model"


def open_weights(path: Path, ref: str, key: str | None = None) -> Source:
    """Open one weight file or shard index by its name.

    Raises:
        RefError: If a key is given and the file is no torch file.
        CheckpointError: If the file is not sound, or its kind is not known.
    """
    if key is not None and (path.suffix not in WEIGHT_SUFFIXES or path.suffix == ".safetensors"):
        raise RefError(f"{ref} names a key, and only a torch file has mappings to choose from", f"write {path}")
    if path.name.endswith(".safetensors.index.json"):
        return SafetensorsShards(path, ref)
    if path.name.endswith(".index.json"):
        return TorchShards(path, ref)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, ref)
    if path.suffix in WEIGHT_SUFFIXES:
        return TorchFile(path, ref, key)
    raise CheckpointError(f"{path} is no known kind of checkpoint; known are {', '.join(WEIGHT_SUFFIXES)}")


def open_folder(folder: Path, ref: str) -> Source:
    """Open the one checkpoint that a folder holds.

    Raises:
        RefError: If it holds none, or several.
        CheckpointError: If what it holds is not sound.
    """
    for name in STANDARD_NAMES:
        if (folder / name).is_file():
            return FolderSource(open_weights(folder / name, ref), folder)
    if (folder / "ledger.json").is_file():
        raise RefError(f"{ref} is a fold's state, not a checkpoint", f"merganser fold export {ref} OUT")
    if (folder / "model_index.json").is_file():
        parts = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise RefError(f"{ref} is a pipeline of several models", f"name one of its folders: {', '.join(parts)}")
    indexes = sorted(folder.glob("*.index.json"))
    found = indexes or sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if not found:
        raise RefError(f"{ref} is a folder without a checkpoint", f"expected one of {', '.join(STANDARD_NAMES[:3])}")
    if len(found) > 1:
        raise RefError(f"{ref} holds {len(found)} checkpoints", f"name one: {', '.join(p.name for p in found[:8])}")
    return FolderSource(open_weights(found[0], ref), folder)

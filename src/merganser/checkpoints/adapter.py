"""A LoRA adapter on a base, seen as a checkpoint: every row is the base's plus the change, computed when it is read.

The arithmetic is float32, or float64 where the base's tensor is; the result has the type of the base's tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints.lora_config import CONFIG_NAME, LoraConfig, read_config
from merganser.checkpoints.lora_edits import Edit, LowRank, place
from merganser.checkpoints.lora_math import blocks, dora_columns, dora_rows, low_rank_rows
from merganser.checkpoints.safetensors_file import SafetensorsFile
from merganser.checkpoints.torch_file import TorchFile
from merganser.errors import AdapterError, CheckpointError
from merganser.numerics import TORCH_DTYPES, compute_dtype
from merganser.types import Source, TensorInfo


class AdapterSource:
    """A Source over a base with a LoRA applied to it.

    Args:
        folder: holds adapter_config.json beside adapter_model.safetensors or adapter_model.bin.
        base: what the adapter was trained on.
        ref: the reference as the user wrote it.

    Attributes:
        base: see there.

    Raises:
        CheckpointError: If the folder does not hold a sound adapter.
        AdapterError: If the adapter cannot be applied to this base faithfully.
    """

    def __init__(self, folder: Path, base: Source, ref: str) -> None:
        self.ref, self.base = ref, base
        self._config = read_config(folder / CONFIG_NAME)
        self._own = _open_own(folder, ref)
        self.infos: Mapping[str, TensorInfo] = base.infos
        self.aliases: Mapping[str, str] = base.aliases
        own = dict(self._own.infos) | {alias: self._own.infos[name] for alias, name in self._own.aliases.items()}
        seen = dict(base.infos) | {alias: base.infos[name] for alias, name in base.aliases.items()}
        if hasattr(base, "tokenizer_files"):  # of another vocabulary than its companions are
            self.tokenizer_files: Mapping[str, bytes] = base.tokenizer_files
        self._edits = self._fold_ties(place(own, self._config, seen, base.ref))
        self._norms: dict[str, Tensor] = {}

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the adapter, its settings and its base's identity; other bases are the caller's to know."""
        return _identity(self._own, self._config, self.base.identity)

    @property
    def own_identity(self) -> str:
        """The same of the adapter alone, whatever it is applied to."""
        return _identity(self._own, self._config, None)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor, or rows [start, stop) of it, with the adapter applied; a slice has the bits of the whole.

        Raises:
            CheckpointError: If a file changed or ended since its header was read.
        """
        name = self.aliases.get(name, name)
        edit, info = self._edits.get(name), self.infos[name]
        if edit is None:
            return self.base.read(name, rows)
        dtype = TORCH_DTYPES[info.dtype]
        if edit.low_rank is None and edit.added is None:
            return self._stand_in(name, edit, rows).to(dtype)
        start, stop = (0, info.rows) if rows is None else rows
        result = torch.empty((stop - start, *info.shape[1:]), dtype=dtype)
        if edit.added is not None:
            key, factor = edit.added
            wide = compute_dtype(dtype)
            change = self._read_own(key, (start, stop)).to(wide) * factor
            return result.copy_(self._stand_in(name, edit, (start, stop)).to(wide) + change)
        for low, block in self._folded_blocks(name, edit, start, stop):
            first, last = max(low, start), min(low + len(block), stop)
            result[first - start : last - start] = block[first - low : last - low]
        return result

    def companions(self) -> Sequence[Path]:
        """The files beside the base."""
        return self.base.companions()

    def _read_own(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self._own.read(self._own.aliases.get(key, key), rows)

    def _stand_in(self, name: str, edit: Edit, rows: tuple[int, int] | None) -> Tensor:
        """What the change is added to: the base's tensor, or the adapter's own in its place, as the base stores it."""
        if edit.replaced is None:
            return self.base.read(name, rows)
        return self._read_own(edit.replaced, rows).to(TORCH_DTYPES[self.infos[name].dtype])

    def _factors(self, change: LowRank, rows: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L and R of the change s L R, for some rows of the base's tensor."""
        down = self._read_own(change.down).to(dtype).flatten(1)
        if not change.transposed:
            return self._read_own(change.up, rows).to(dtype).flatten(1), down
        return down[:, rows[0] : rows[1]].T.contiguous(), self._read_own(change.up).to(dtype).T.contiguous()

    def _low_rank_blocks(self, name: str, edit: Edit, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """W + s L R in the blocks that cover [start, stop), each with its first row."""
        info, change = self.infos[name], edit.low_rank
        if change is None or start == stop:
            return
        dtype, spans = compute_dtype(TORCH_DTYPES[info.dtype]), list(blocks(start, stop, info.rows))
        top = spans[0][0]
        left, right = self._factors(change, (top, spans[-1][1]), dtype)
        for low, high in spans:
            w = self._stand_in(name, edit, (low, high)).to(dtype)
            yield low, low_rank_rows(left[low - top : high - top], right, change.scaling).reshape(w.shape).add_(w)

    def _folded_blocks(self, name: str, edit: Edit, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """The same, rescaled where it is a DoRA."""
        key = edit.low_rank.magnitude if edit.low_rank is not None else None
        transposed = edit.low_rank is not None and edit.low_rank.transposed
        for low, w in self._low_rank_blocks(name, edit, start, stop):
            if key is None:
                yield low, w
            elif transposed:
                yield low, dora_columns(w, self._read_own(key).to(w.dtype), self._column_norms(name, edit).to(w.dtype))
            else:
                yield low, dora_rows(w, self._read_own(key, (low, low + len(w))).to(w.dtype))

    def _column_norms(self, name: str, edit: Edit) -> Tensor:
        """Norm of every column of W + s L R, which needs all rows; kept, since every slice asks for it."""
        if name not in self._norms:
            squares = torch.zeros(self.infos[name].shape[1], dtype=torch.float64)
            for _, w in self._low_rank_blocks(name, edit, 0, self.infos[name].rows):
                squares += w.double().square().sum(0)
            self._norms[name] = squares.sqrt()
        return self._norms[name]

    def _fold_ties(self, edits: Mapping[str, Edit]) -> dict[str, Edit]:
        """Edits by the name that holds the data; all names of a tied tensor must be edited, and alike.

        Raises:
            AdapterError: If the edit would untie a tensor.
        """
        folded: dict[str, Edit] = {}
        for name in edits:
            home = self.aliases.get(name, name)
            tied = [home, *(alias for alias, held in self.aliases.items() if held == home)]
            for other in tied:
                if other not in edits or not self._alike(edits[name], edits[other]):
                    raise AdapterError(
                        f"the adapter changes {name}, which is tied to {', '.join(t for t in tied if t != name)}",
                        "it would untie them: save the base with untied weights and train or apply the adapter on that",
                    )
            folded[home] = edits[home]
        return folded

    def _alike(self, one: Edit, other: Edit) -> bool:
        """Whether two edits of one tensor do the same."""
        if one is other:
            return True
        if one.added is not None or other.added is not None or (one.replaced is None) != (other.replaced is None):
            return False
        if one.replaced is not None and other.replaced is not None:
            mine, theirs = self._read_own(one.replaced), self._read_own(other.replaced)
            if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
                return False
        a, b = one.low_rank, other.low_rank
        if a is None or b is None:
            return a is b
        if a.scaling != b.scaling or a.magnitude is not None or b.magnitude is not None:
            return False
        rows = (0, self._own.infos[a.down].shape[1] if a.transposed else self._own.infos[a.up].shape[0])
        return all(map(torch.equal, self._factors(a, rows, torch.float64), self._factors(b, rows, torch.float64)))


def _open_own(folder: Path, ref: str) -> Source:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        path = folder / name
        if path.is_file():
            return SafetensorsFile(path, ref) if path.suffix == ".safetensors" else TorchFile(path, ref)
    raise CheckpointError(f"{folder} holds neither adapter_model.safetensors nor adapter_model.bin")


def _identity(own: Source, config: LoraConfig, base: str | None) -> str:
    """SHA-256 of the adapter's tensors and the settings that count, and of the base's identity if it has one."""
    digest = hashlib.sha256(f"{config.canonical()}\n{base or ''}\n".encode())
    for name, info in own.infos.items():
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(own.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
    for alias, name in own.aliases.items():
        digest.update(f"{alias} = {name}\n".encode())
    return digest.hexdigest()

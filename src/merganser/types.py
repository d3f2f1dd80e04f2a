"""Shared words: what a checkpoint looks like to everything above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of one element, by safetensors dtype name.
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip

#: Floating types that can be merged.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
#: Types that must be equal in all models.
EXACT_DTYPES = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Header of one tensor.

    Attributes:
        shape: sizes by axis; () for a scalar.
        dtype: safetensors name, such as "F32" or "BF16".
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Length of axis 0; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1


class Source(Protocol):
    """Anything that tensors can be read from, header first.

    Attributes:
        ref: the reference as the user wrote it; named in every error.
        infos: header of every stored tensor, sorted by name. A tied tensor is here once.
        aliases: tied names: alias -> name in `infos` that holds the data.
        identity: a digest that stands for the whole source where the bytes read are computed (an
            adapter on a base), else None: then the digest is taken from the tensors.
    """

    @property
    def ref(self) -> str: ...  # noqa: D102
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...  # noqa: D102
    @property
    def aliases(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def identity(self) -> str | None: ...  # noqa: D102

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor, or rows [start, stop) of its axis 0, as stored; the caller must not write to it.

        Raises:
            CheckpointError: If the file changed or ended since its header was read.
        """
        ...

    def companions(self) -> Sequence[Path]:
        """Files that a merged model needs beside the weights: config, tokenizer, chat template."""
        ...

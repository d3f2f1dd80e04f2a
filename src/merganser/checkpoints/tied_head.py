"""A language model's head that is its embedding: its config.json ties them, and its file holds one of them alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from merganser.checkpoints.folder import config_of
from merganser.types import Source, TensorInfo

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|proj_out|generator_lm_head|output|head|decoder)\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|(tok|token)_embeddings?|shared|embeddings?)\.weight$"
)


class Tied:
    """A Source with more aliases.

    Args:
        source: the model.
        aliases: the further names: alias -> name that holds the data.

    Attributes:
        tokenizer_files: of the source, where it brings them.
    """

    def __init__(self, source: Source, aliases: Mapping[str, str]) -> None:
        self.source, self.ref, self.identity = source, source.ref, source.identity
        self.infos: Mapping[str, TensorInfo] = source.infos
        self.aliases: Mapping[str, str] = dict(sorted({**source.aliases, **aliases}.items()))
        if hasattr(source, "tokenizer_files"):
            self.tokenizer_files = source.tokenizer_files

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or rows of it."""
        return self.source.read(name, rows)

    def companions(self) -> Sequence[Path]:
        """The files beside the source."""
        return self.source.companions()


def table_of(source: Source, name: str, shape: Sequence[int]) -> str | None:
    """The embedding that stands for a head which the source does not hold, if its config ties them.

    Args:
        source: the model.
        name: of the head in another model.
        shape: of the head there, which the embedding must have.
    """
    if name in source.infos or name in source.aliases or not _HEAD.search(name) or not _ties(source):
        return None
    tables = [n for n, info in source.infos.items() if _EMBEDDING.search(n) and info.shape == tuple(shape)]
    return tables[0] if len(tables) == 1 else None


def with_head(source: Source, infos: Mapping[str, TensorInfo]) -> Source:
    """A model under the names of another, `infos`, whose head it may hold as its embedding alone."""
    found = {name: table_of(source, name, info.shape) for name, info in infos.items()}
    more = {name: table for name, table in found.items() if table is not None}
    return Tied(source, more) if more else source


def _ties(source: Source) -> bool:
    """Whether the config ties the head to the embedding, which it does where it says nothing."""
    config = config_of(source.companions())
    return bool(config) and config.get("tie_word_embeddings", True) is True

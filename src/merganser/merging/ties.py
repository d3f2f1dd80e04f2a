"""Names that are one tensor in a model although its file does not say so.

Torch's own files hold a tied tensor under all its names, safetensors files under one, and which one differs. So names
that one model's file ties are tied in the others that have one of them alone, and the head of a model without one is
its embedding where its config.json ties them.
"""

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


def tied(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The models of a merge, each with the names that are tied in it."""
    found: dict[str, Source] = {}
    for ref, source in sources.items():
        more: dict[str, str] = {}
        for other in sources.values():
            for alias, name in other.aliases.items():
                for missing, there in ((alias, name), (name, alias)):
                    if _lacks(source, missing) and (stored := _stored(source, there)) is not None:
                        more.setdefault(missing, stored)
            for name, info in other.infos.items():
                if _lacks(source, name) and name not in more and _HEAD.search(name) and _ties(source):
                    tables = [n for n, i in source.infos.items() if _EMBEDDING.search(n) and i.shape == info.shape]
                    if len(tables) == 1:
                        more[name] = tables[0]
        found[ref] = Tied(source, more) if more else source
    return found


def _lacks(source: Source, name: str) -> bool:
    return _stored(source, name) is None


def _stored(source: Source, name: str) -> str | None:
    return name if name in source.infos else source.aliases.get(name)


def _ties(source: Source) -> bool:
    """Whether the config ties the head to the embedding, which it does where it says nothing."""
    config = config_of(source.companions())
    return bool(config) and config.get("tie_word_embeddings", True) is True

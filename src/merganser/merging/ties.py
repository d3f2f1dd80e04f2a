"""Names that are one tensor in a model although its file does not say so.

Torch's own files hold a tied tensor under all its names, safetensors files under one, and which one differs. So names
that one model's file ties are tied in the others that have one of them alone, and the head of a model without one is
its embedding where its config.json ties them.
"""

from __future__ import annotations

from collections.abc import Mapping

from merganser.checkpoints.tied_head import Tied, table_of
from merganser.types import Source


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
                if name not in more and (table := table_of(source, name, info.shape)) is not None:
                    more[name] = table
        found[ref] = Tied(source, more) if more else source
    return found


def _lacks(source: Source, name: str) -> bool:
    return _stored(source, name) is None


def _stored(source: Source, name: str) -> str | None:
    return name if name in source.infos else source.aliases.get(name)

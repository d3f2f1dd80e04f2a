"""What to do about tensors that one model has and another lacks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merganser.continual.roles import literal
from merganser.types import Source


def patterns(names: Sequence[str]) -> list[str]:
    """Few patterns that fit all of some names: numbers become stars, and nothing else stands for more than itself.

    >>> patterns(["h.0.a", "h.1.a", "experts[0].weight"])
    ['h.*.a', 'experts[[]0].weight']
    """
    found = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", literal(name)) for name in names)
    return list(found) if len(found) <= 6 else [*list(found)[:6], "..."]


def prefix_hint(names: Sequence[str], other: Source) -> str | None:
    """What to do where names are the other model's but for a prefix, as with and without `bert.`."""
    for short, long in ((names, other.infos), (other.infos, names)):
        held = frozenset(long)
        for head in dict.fromkeys(name.partition(".")[0] for name in long):
            if sum(f"{head}.{name}" in held for name in short) > len(short) / 2:
                return f"the names differ by the prefix {head}.; load and save one with the other's class"
    return None

"""Which tensors of a checkpoint lie in which file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from merganser.types import TensorInfo


def plan_shards(
    infos: Mapping[str, TensorInfo], shard_bytes: int, together: Callable[[str], str] | None = None
) -> list[list[str]]:
    """Names by file: in order, a new file where the next tensor would pass `shard_bytes`.

    With `together` (name -> key) the tensors of one key count as one, in the order of the keys.
    """
    groups: dict[str, list[str]] = {}
    for name in infos:
        groups.setdefault(together(name) if together is not None else name, []).append(name)
    shards: list[list[str]] = [[]]
    filled = 0
    for key in groups if together is None else sorted(groups):
        size = sum(infos[name].nbytes for name in groups[key])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += groups[key]
        filled += size
    return shards

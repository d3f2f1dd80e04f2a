"""The number of layers in a config.json, changed as the layers were.

| key | whose layers |
|---|---|
| `num_hidden_layers`, `n_layer`, `n_layers`, `num_layers`, `depth`, `num_hidden_groups` | of any stack |
| `encoder_layers`, `num_decoder_layers`, `num_single_layers` and the like | of the stack with that word in its name |
| any of these within `text_config`, `vision_config` and the like | of the stack with that word in its name |

The number must be that of the donor's stack, else it means something else and stays.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ANY = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_hidden_groups")
_OWNED = re.compile(r"^(?:num_|n_)?(?P<owner>encoder|decoder|single)_layers$")
#: Other words by which names of tensors call what a config calls so.
_ALSO = {"language": "text", "visual": "vision", "image": "vision", "speech": "audio"}
#: Lists that are never one entry a layer, however long they are.
_NO_LAYERS = re.compile(r"^architectures$|_token_ids?$|_token_index$|_tokens$|_limit$|(image|patch)_size$")


@dataclass(frozen=True)
class _Entry:
    """A number of layers in a config.

    Attributes:
        node: the mapping that holds it, in the changed config.
        key: its key.
        value: as it was.
        owner: word of the stack's name that the key asks for; "" for any stack.
    """

    node: dict[str, Any]
    key: str
    value: int
    owner: str


def deepen(config: Mapping[str, Any], before: Mapping[str, int], after: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A config with other numbers of layers, and lists of one entry a layer made to fit.

    Args:
        config: the donor's.
        before: number of layers of each of the donor's stacks.
        after: for every layer of each of the output's stacks, the donor's layer that it is like.

    >>> deepen({"num_hidden_layers": 2, "layer_types": ["a", "b"]}, {"h.": 2}, {"h.": [0, 1, 1]})
    {'num_hidden_layers': 3, 'layer_types': ['a', 'b', 'b']}
    >>> deepen({"num_layers": 2, "num_decoder_layers": 2}, {"decoder.block.": 2}, {"decoder.block.": [0]})
    {'num_layers': 2, 'num_decoder_layers': 1}
    """
    changed = copy.deepcopy(dict(config))
    entries = list(_entries(changed, ""))
    for stack, layers in after.items():
        count = before.get(stack, len(layers))
        if count == len(layers):
            continue
        for entry in _of_stack(entries, stack, count):
            entry.node[entry.key] = len(layers)
            for key, value in entry.node.items():
                if isinstance(value, list) and len(value) == count and not _NO_LAYERS.search(key):
                    entry.node[key] = [value[i] for i in layers]
    return changed


def _entries(node: dict[str, Any], owner: str) -> Iterator[_Entry]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _entries(value, _word(key) or owner)
        elif isinstance(value, int) and not isinstance(value, bool):
            if found := _OWNED.match(key):
                yield _Entry(node, key, value, found["owner"])
            elif key in _ANY:
                yield _Entry(node, key, value, owner)


def _of_stack(entries: Sequence[_Entry], stack: str, count: int) -> list[_Entry]:
    """Entries that speak of a stack: those of the first word of its name that any asks for, else those for any stack.

    An encoder's number may also stand under a key for any stack, beside its own; a stack without a word of its own is
    that of the text where nothing is for any stack.
    """
    words = [_word(word) for word in re.split(r"[._]", stack)]
    owners = {entry.owner for entry in entries}
    owner = next((word for word in words if word and word in owners), "")
    if not owner and "" not in owners:
        owner = "text"
    wanted = ("encoder", "") if owner == "encoder" else (owner,)
    return [entry for entry in entries if entry.owner in wanted and entry.value == count]


def _word(name: str) -> str:
    first = re.split(r"[._]", name)[0]
    return _ALSO.get(first, first)

"""What a config.json says of layers, changed as the layers were: their number, and lists of one entry a layer.

| key | whose layers |
|---|---|
| `num_hidden_layers`, `n_layer`, `n_layers`, `num_layers`, `depth`, `num_hidden_groups`, `num_blocks` | of any stack |
| `encoder_layers`, `num_decoder_layers`, `num_single_layers` and the like | of the stack with that word in its name |
| any of these within `text_config`, `vision_config` and the like | of the stack with that word in its name |

The number must be that of the donor's stack, else it means something else and stays. A list is one entry a layer where
it stands beside that number and is as long; each entry comes from the config of the model that its layer comes from.
Lists of the numbers of some layers, such as `mlp_only_layers`, get the numbers that these have in the output.

Where layers are of several kinds by another rule (`first_k_dense_replace`), each must stay where the rule has its kind.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merganser.errors import ParameterError, and_more

_ANY = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_hidden_groups", "num_blocks")
#: Lists of the numbers of some layers.
_NUMBERS = (
    "mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids",
    "cross_attention_layers", "fullatt_block_indexes", "global_attn_indexes",
)  # fmt: skip
_OWNED = re.compile(r"^(?:num_|n_)?(?P<owner>encoder|decoder|single)_layers$")
#: Other words by which names of tensors call what a config calls so.
_ALSO = {"language": "text", "visual": "vision", "image": "vision", "speech": "audio"}
#: Lists that are never one entry a layer, however long they are.
_NO_LAYERS = re.compile(r"^architectures$|_token_ids?$|_token_index$|_tokens$|_limit$|(image|patch)_size$")


@dataclass(frozen=True, eq=False)
class Described:
    """A model as its config.json describes it.

    Attributes:
        ref: of the model.
        config: its content.
        depths: number of layers of each stack of its tensors.
        parts: by stack, what the tensors of each layer are called within it; none where that is not known.
    """

    ref: str
    config: Mapping[str, Any]
    depths: Mapping[str, int]
    parts: Mapping[str, Mapping[int, frozenset[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A number of layers in a config.

    Attributes:
        node: the mapping that holds it, in the changed config.
        path: keys that lead to that mapping.
        key: its key.
        value: as it was.
        owner: word of the stack's name that the key asks for; "" for any stack.
    """

    node: dict[str, Any]
    path: tuple[str, ...]
    key: str
    value: int
    owner: str


def deepen(donor: Described, after: Mapping[str, Sequence[tuple[Described, int]]]) -> dict[str, Any]:
    """The donor's config with other numbers of layers, and with lists of one entry a layer made to fit.

    Args:
        donor: whose config it is.
        after: for every layer of each of the output's stacks, the model that it comes from, and its number there.

    Raises:
        ParameterError: If the donor has a list of one entry a layer, and a model that gives a layer has none; or a
            layer lacks tensors that the config asks for where it stands.

    >>> a = Described("a", {"num_hidden_layers": 2, "layer_types": ["x", "y"]}, {"h.": 2})
    >>> deepen(a, {"h.": [(a, 0), (a, 1), (a, 1)]})
    {'num_hidden_layers': 3, 'layer_types': ['x', 'y', 'y']}
    >>> b = Described("b", {"num_layers": 2, "num_decoder_layers": 2}, {"decoder.block.": 2})
    >>> deepen(b, {"decoder.block.": [(b, 0)]})
    {'num_layers': 2, 'num_decoder_layers': 1}
    """
    changed = copy.deepcopy(dict(donor.config))
    entries = list(_entries(changed, ""))
    for stack, layers in after.items():
        count = donor.depths.get(stack, len(layers))
        if [(model.ref, layer) for model, layer in layers] == [(donor.ref, i) for i in range(count)]:
            continue
        for entry in _of_stack(entries, stack, count):
            entry.node[entry.key] = len(layers)
            for key, value in entry.node.items():
                if key in _NUMBERS and isinstance(value, list):
                    entry.node[key] = _renumbered((*entry.path, key), layers)
                elif isinstance(value, list) and len(value) == count and not _NO_LAYERS.search(key):
                    entry.node[key] = _joined(donor, stack, (*entry.path, key), layers)
            _refuse_gaps(donor, stack, layers, entry)
    return changed


def _renumbered(path: Sequence[str], layers: Sequence[tuple[Described, int]]) -> list[int]:
    """Numbers in the output of those layers whose numbers a list of their own models holds."""
    return [number for number, (model, layer) in enumerate(layers) if layer in (_at(model.config, path) or ())]


def _refuse_gaps(donor: Described, stack: str, layers: Sequence[tuple[Described, int]], entry: _Entry) -> None:
    """Refuse a layer that lacks tensors of the donor's in its place, where no list of the config tells them apart."""
    old: Mapping[str, Any] = _at(donor.config, entry.path)
    lists = [
        key
        for key, value in old.items()
        if isinstance(value, list) and (key in _NUMBERS or (len(value) == entry.value and not _NO_LAYERS.search(key)))
    ]

    def told(node: Mapping[str, Any], number: int) -> list[Any]:
        return [number in node[key] if key in _NUMBERS else node[key][number] for key in lists]

    for number, (model, layer) in enumerate(layers[: entry.value]):
        needed = donor.parts.get(stack, {}).get(number, frozenset())
        lacking = sorted(needed - model.parts.get(stack, {}).get(layer, needed))
        if lacking and told(old, number) == told(entry.node, number):
            raise ParameterError(
                f"{stack}{number} of the output would be {stack}{layer} of {model.ref}, which has no {lacking[0]}"
                f"{and_more(lacking)}; config.json of {donor.ref} has layers of several kinds, and one with it there",
                "cut the slices so that layers of each kind stay where the config has them",
            )


def _joined(donor: Described, stack: str, path: Sequence[str], layers: Sequence[tuple[Described, int]]) -> list[Any]:
    """A list of one entry a layer for the layers of the output."""
    own = _at(donor.config, path)
    lists = {donor.ref: own, **{model.ref: _at(model.config, path) for model, _ in layers}}
    depths = {donor.ref: donor.depths[stack], **{model.ref: model.depths[stack] for model, _ in layers}}
    if len(set(depths.values())) > 1 and all(found == own for found in lists.values()):
        return list(own)  # the same in models of different depths, so its length is chance
    for number, (model, _) in enumerate(layers):
        found, count = lists[model.ref], depths[model.ref]
        if not isinstance(found, list) or len(found) != count:
            has = f"a list of {len(found)}" if isinstance(found, list) else "no such list"
            key = ".".join(path)
            raise ParameterError(
                f"{key} of config.json has one entry a layer in {donor.ref} and {has} for the {count} layers of "
                f"{model.ref}, which give {stack}{number} of the output",
                f"write {key} into the config.json of {model.ref}, or take it out of that of {donor.ref}",
            )
    return [lists[model.ref][layer] for model, layer in layers]


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    node: Any = config
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _entries(node: dict[str, Any], owner: str, path: tuple[str, ...] = ()) -> Iterator[_Entry]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _entries(value, _word(key) or owner, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            if found := _OWNED.match(key):
                yield _Entry(node, path, key, value, found["owner"])
            elif key in _ANY:
                yield _Entry(node, path, key, value, owner)


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

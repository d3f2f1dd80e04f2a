"""Layers, found in the names of tensors: `model.layers.7.mlp.weight` is layer 7 of the stack `model.layers.`.

The first number that stands alone between dots is the layer; what stands before it is the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"^(?P<stack>(?:[^.]*[^.\d][^.]*\.)*)(?P<index>\d+)\.(?P<rest>.+)$")
#: Names, outside all layers, of what stands before the first layer; everything else stands behind the last.
_BEFORE = re.compile(
    r"(?<!un)embed(?!_out\b)|embd|feature_projection|(^|\.)word_|"
    r"(^|\.)(wte|wpe|shared|stem|positions?|patchify|cls_token|class_token|pos_drop|relative_position)(\.|$)|"
    r"(^|\.)(conv[12]|bn1|conv_in|proj_in)(\.|$)|(^|\.)(pre_?(layrnorm|layernorm|norm)|(ln|norm)_pre)"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place in a stack of layers.

    Attributes:
        stack: what stands before the number, with its dot; "" where the name begins with it.
        index: of the layer.
        rest: what stands behind it.
    """

    stack: str
    index: int
    rest: str

    def moved(self, index: int) -> str:
        """Name of the same tensor in another layer."""
        return f"{self.stack}{index}.{self.rest}"


def place_of(name: str) -> Place | None:
    """Place of a tensor; None outside all layers.

    >>> place_of("model.layers.7.mlp.experts.3.weight")
    Place(stack='model.layers.', index=7, rest='mlp.experts.3.weight')
    >>> place_of("lm_head.weight") is None
    True
    """
    found = _LAYER.match(name)
    return Place(found["stack"], int(found["index"]), found["rest"]) if found else None


def depths(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of each stack.

    >>> depths(["h.0.w", "h.1.w", "ln.w"])
    {'h.': 2}
    """
    found: dict[str, int] = {}
    for name in names:
        if (place := place_of(name)) is not None:
            found[place.stack] = max(found.get(place.stack, 0), place.index + 1)
    return found


def depth_of(index: int, layers: int) -> float:
    """Depth of a layer, 0 at the first and 1 at the last; 1 for a single one."""
    return index / (layers - 1) if layers > 1 else 1.0


def stands_before(name: str) -> bool:
    """Whether a tensor outside all layers stands before the first layer, judged by its name.

    >>> stands_before("model.embed_tokens.weight"), stands_before("model.norm.weight"), stands_before("lm_head.weight")
    (True, False, False)
    >>> stands_before("embed_out.weight"), stands_before("model.encoder.conv2.weight"), stands_before("conv_out.weight")
    (False, True, False)
    """
    return _BEFORE.search(name) is not None

"""What batches of inputs must be before networks run on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merganser.align.activations import Batch


def check_batches(batches: Sequence[Batch], *, alike: bool = True) -> None:
    """Refuse batches that are not finite, or not all of the shapes of the first.

    Args:
        batches: inputs.
        alike: whether shapes must be the same.

    Raises:
        ParameterError: If one is of another shape.
        NonFiniteError: If one holds NaN or infinity.
    """
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    from merganser.errors import NonFiniteError, ParameterError

    shapes = [tree_map_only(torch.Tensor, lambda x: tuple(x.shape), batch) for batch in batches]
    for number, (shape, batch) in enumerate(zip(shapes, batches, strict=True), 1):
        if alike and shape != shapes[0]:
            raise ParameterError(
                f"batch {number} is of shape {_shown(shape)}, and the first of {_shown(shapes[0])}",
                "give batches of one size; leave out a last one that is smaller",
            )
        if not all(bool(torch.isfinite(x).all()) for x in tree_leaves(batch) if isinstance(x, torch.Tensor)):
            raise NonFiniteError(f"batch {number} holds NaN or infinity")


def _shown(shapes: Any) -> str:
    args, kwargs = shapes
    return ", ".join([*map(str, args), *(f"{name} {x}" for name, x in kwargs.items())])

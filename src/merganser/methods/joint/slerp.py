"""SLERP: from the base along the great circle to the other model, whole tensor by whole tensor.

    y = sin((1 - t) a) / sin a * x_0  +  sin(t a) / sin a * x_1      cos a = <x_0, x_1> / (||x_0|| ||x_1||)

The tensors are not normalised, so that t = 0 is x_0 and t = 1 is x_1. Equal directions and zero tensors give the
straight line, which is the limit. Between opposite directions no great circle is the shortest, and the straight line
passes through zero: there y keeps the direction of the nearer tensor and the norm (1 - t) ||x_0|| + t ||x_1||.

Source: Shoemake 1985, Animating rotation with quaternion curves, doi:10.1145/325334.325242.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sphere import between, check_antipode, square_of
from merganser.methods.joint._sum import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float


def slerp(
    x: Float[Tensor, " 2 *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    dots: Float[Tensor, "2 2"],
    t: float,
    lerp_above: float = 1.0,
    antipode: str = "nearest",
) -> Float[Tensor, "*S"]:
    """The point at t on the great circle from the first tensor to the second.

    Args:
        x: the base and one model.
        dots: inner products of the two whole tensors.
        t: place, in [0, 1]; 0 is the base.
        lerp_above: cosine above which the straight line is taken, in [0, 1]; 1 leaves that to rounding.
        antipode: between opposite directions, "nearest" keeps the nearer one, and at t = 0.5 the longer; "lerp" takes
            the straight line through zero; "error" refuses.

    Returns:
        The merged tensor.

    Raises:
        ParameterError: If `t` or `lerp_above` is outside [0, 1], `antipode` is another word, there are not two
            tensors, or they are opposite and `antipode` is "error".

    >>> import torch
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> slerp(x, dots=x.double() @ x.double().T, t=0.5)
    tensor([1.4142, 1.4142])
    """
    if not 0 <= t <= 1:
        raise ParameterError(f"t is {t}; it is a place between the base and the model, in [0, 1]")
    if not 0 <= lerp_above <= 1:
        raise ParameterError(f"lerp_above is {lerp_above}; it is a cosine in [0, 1]")
    check_antipode(antipode)
    if len(x) != 2:
        raise ParameterError(f"slerp is between the base and one model; there are {len(x)} tensors")
    (aa, ab), (_, bb) = square_of(dots, 2)
    return weighted_sum(x, between(t, aa, ab, bb, lerp_above=lerp_above, antipode=antipode))

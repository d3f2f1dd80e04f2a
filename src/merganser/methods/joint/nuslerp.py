"""NuSLERP: SLERP of two models, or of their changes, at the place that their weights give.

    y = sin((1 - t) a) / sin a * x_0  +  sin(t a) / sin a * x_1      t = w_1 / (w_0 + w_1)

cos a is that of the two whole tensors, or of each pair of vectors along the last axis, or along the first. Equal and
opposite directions and zero vectors are treated as in SLERP. A tensor of one axis is one vector in every variant.

Source: the method of this name in mergekit, Goddard et al. 2024, arXiv:2403.13257; Shoemake 1985 for the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._mean import shares
from merganser.methods.joint._sphere import between, between_along, check_antipode, square_of
from merganser.methods.joint._sum import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float


def nuslerp(
    x: Float[Tensor, " 2 *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " 2"] | Sequence[float],
    dots: Float[Tensor, "2 2"],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    antipode: str = "nearest",
) -> Float[Tensor, "*S"]:
    """The point between two models that their weights give.

    Args:
        x: the two models.
        weight: not negative; the second's share is t.
        dots: inner products of the two whole tensors.
        nuslerp_flatten: whether a whole tensor is one vector.
        nuslerp_row_wise: where it is not, whether the vectors lie along the first axis and not along the last.
        antipode: between opposite directions, "nearest" keeps the nearer one, and at equal weights the longer; "lerp"
            takes the straight line through zero; "error" refuses.

    Returns:
        The merged tensor.

    Raises:
        ParameterError: If a weight is negative or not finite, both are 0, `antipode` is another word, there are not
            two tensors, or directions are opposite and `antipode` is "error".

    >>> import torch
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> nuslerp(x, weight=[1.0, 2.0], dots=x.double() @ x.double().T)
    tensor([1.0000, 1.7321])
    """
    check_antipode(antipode)
    if len(x) != 2:
        raise ParameterError(f"nuslerp is between two models; there are {len(x)}")
    _, t = shares(weight, 2)
    (aa, ab), (_, bb) = square_of(dots, 2)
    a, b = x
    if nuslerp_flatten or a.ndim < 2:
        return weighted_sum(x, between(t, aa, ab, bb, antipode=antipode))
    return between_along(t, a, b, 0 if nuslerp_row_wise else -1, antipode)


def nuslerp_delta(
    d: Float[Tensor, " 2 *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " 2"] | Sequence[float],
    dots: Float[Tensor, "2 2"],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    antipode: str = "nearest",
) -> Float[Tensor, "*S"]:
    """The point between the changes of two models that their weights give.

    Args:
        d: the two models minus the base.
        weight: not negative; the second's share is t.
        dots: inner products of the two whole changes.
        nuslerp_flatten: whether a whole tensor is one vector.
        nuslerp_row_wise: where it is not, whether the vectors lie along the first axis and not along the last.
        antipode: as in `nuslerp`.

    Returns:
        The merged change.

    Raises:
        ParameterError: As `nuslerp` does.

    >>> import torch
    >>> d = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> nuslerp_delta(d, weight=[1.0, 1.0], dots=d.double() @ d.double().T)
    tensor([1.4142, 1.4142])
    """
    return nuslerp(
        d,
        weight=weight,
        dots=dots,
        nuslerp_flatten=nuslerp_flatten,
        nuslerp_row_wise=nuslerp_row_wise,
        antipode=antipode,
    )


def nuslerp_locality(settings: Mapping[str, Any]) -> Literal["element", "row", "tensor"]:
    """What the function may be given under these settings.

    Args:
        settings: of `nuslerp`; what is missing has its default.

    Returns:
        "element" where a whole tensor is one vector, "row" for vectors along the last axis, "tensor" along the first.

    >>> nuslerp_locality({"nuslerp_flatten": False})
    'row'
    """
    if settings.get("nuslerp_flatten", True):
        return "element"
    return "tensor" if settings.get("nuslerp_row_wise", False) else "row"

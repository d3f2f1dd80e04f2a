"""Great circles and means on the sphere, as coefficients of the models: everything stays in their span.

    between(t)   c_0 = sin((1 - t) a) / sin a,   c_1 = sin(t a) / sin a,   cos a = <x_0, x_1> / (n_0 n_1)
    mean         m = sum_k a_k u_k / ||sum_k a_k u_k||,   u_k = x_k / n_k,   n_k = ||x_k||

Where directions cancel there is no such path or mean. The result then keeps the direction of the model that counts
most and the norm that it would have had, so that it never passes through zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2, sin, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float

#: Sine of the angle below which directions are equal: there the great circle and the line agree to 1e-14.
EQUAL = 1e-7
#: Sine below which directions are opposite, and length of a mean of unit vectors below which they cancel: dividing by
#: less would show the rounding of the models, not the models.
OPPOSITE = 1e-4
ANTIPODES = ("nearest", "lerp", "error")


def check_antipode(antipode: str) -> None:
    """Whether the word is known.

    Raises:
        ParameterError: If not.
    """
    if antipode not in ANTIPODES:
        raise ParameterError(f'antipode is {antipode!r}; it is one of "nearest", "lerp" and "error"')


def between(
    t: float, aa: float, ab: float, bb: float, *, lerp_above: float = 1.0, antipode: str = "nearest"
) -> tuple[float, float]:
    """Coefficients of two vectors for the point at t between them.

    Args:
        t: place, from 0 (the first) to 1 (the second).
        aa: inner product of the first with itself.
        ab: inner product of the two.
        bb: inner product of the second with itself.
        lerp_above: cosine above which the point is taken on the straight line.
        antipode: what to do between opposite directions, where no great circle is the shortest. "nearest": the
            direction of the nearer (at t = 0.5 of the longer, then of the first) and the norm (1 - t) n_0 + t n_1.
            "lerp": the straight line, through zero; also below -lerp_above. "error".

    Returns:
        The factors of the first and of the second. A zero vector has no direction: then the straight line.

    Raises:
        ParameterError: If the directions are opposite and `antipode` is "error".

    >>> between(0.5, 1.0, -1.0, 1.0)
    (1.0, 0.0)
    """
    line = 1 - t, t
    n_a, n_b = sqrt(aa), sqrt(bb)
    if not (n_a > 0 and n_b > 0):
        return line
    cosine = max(-1.0, min(1.0, ab / n_a / n_b))
    sine = sqrt((1 - cosine) * (1 + cosine))
    opposite = cosine < 0 and sine < OPPOSITE
    if antipode == "lerp" and (opposite or cosine < -lerp_above):
        return line
    if cosine > lerp_above or (cosine > 0 and sine < EQUAL):
        return line
    if opposite and 0 < t < 1:
        if antipode == "error":
            raise ParameterError(
                f"the two tensors point in opposite directions, and t is {t}: no great circle is the shortest",
                hint='give this tensor t = 0 or t = 1, or set antipode to "nearest" or "lerp"',
            )
        norm = (1 - t) * n_a + t * n_b
        return (norm / n_a, 0.0) if (1 - t, n_a) >= (t, n_b) else (0.0, norm / n_b)
    if t in (0, 1):
        return line
    angle = atan2(sine, cosine)
    return sin((1 - t) * angle) / sine, sin(t * angle) / sine


def between_along(
    t: float, a: Float[Tensor, "*S"], b: Float[Tensor, "*S"], dim: int, antipode: str
) -> Float[Tensor, "*S"]:
    """The point at t between every vector of `a` along an axis and that of `b`.

    Args:
        t: place, from 0 (a) to 1 (b).
        a: the first tensor.
        b: the second.
        dim: axis that the vectors lie along.
        antipode: as in `between`.

    Returns:
        A new tensor. Every vector of it depends on nothing but the two, bit for bit.

    Raises:
        ParameterError: If two directions are opposite and `antipode` is "error".
    """
    aa, ab, bb = (sums_of_products(p, q, dim) for p, q in ((a, a), (a, b), (b, b)))
    pairs = [
        between(t, *g, antipode=antipode) for g in zip(*(g.reshape(-1).tolist() for g in (aa, ab, bb)), strict=True)
    ]
    c = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).to(a.device, a.dtype)
    c_a, c_b = (c[:, i].reshape(aa.shape).unsqueeze(dim) for i in (0, 1))
    return (a * c_a).add_(b * c_b)


def sums_of_products(a: Float[Tensor, "*S"], b: Float[Tensor, "*S"], dim: int) -> Float[Tensor, " ..."]:
    """Inner products along an axis in float64, added in an order that depends on its length only.

    Args:
        a: the one tensor.
        b: the other.
        dim: the axis, which the result lacks.

    Returns:
        float64; zeros where the axis is empty.

    >>> sums_of_products(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), -1)
    tensor([6.], dtype=torch.float64)
    """
    terms = a.to(torch.float64, copy=True).mul_(b).movedim(dim, -1)
    n = terms.shape[-1]
    if n == 0:
        return terms.sum(-1)
    while n > 1:
        half = n // 2
        terms[..., :half].add_(terms[..., n - half : n])
        n -= half
    return terms[..., 0]


def directions(
    dots: Float[Tensor, "K K"], models: int
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, "K K"]]:
    """Norms, their inverses and the cosines of K vectors; a zero vector has inverse 0 and cosine 0.

    Args:
        dots: their inner products.
        models: K.

    Returns:
        On the CPU in float64, shapes (K,), (K,) and (K, K).

    Raises:
        ParameterError: If the inner products are not those of K vectors.
    """
    g = torch.tensor(square_of(dots, models), dtype=torch.float64)
    norms = g.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return norms, inverse, inverse[:, None] * g * inverse


def mean_direction(
    a: Float[Tensor, " K"], norms: Float[Tensor, " K"], cosines: Float[Tensor, "K K"]
) -> tuple[Float[Tensor, " K"], bool]:
    """Coefficients of the unit vectors for the direction of their weighted mean.

    Args:
        a: weights that sum to 1, not negative.
        norms: of the vectors.
        cosines: between them.

    Returns:
        The coefficients, and whether the directions cancel: then they select the vector of largest weight times norm.
    """
    length = float((a @ cosines @ a).clamp(min=0).sqrt())
    if length > OPPOSITE:
        return a / length, False
    chosen = torch.zeros_like(a)
    chosen[int((a * norms).argmax())] = 1
    return chosen, True


def square_of(dots: Float[Tensor, "K K"], models: int) -> Sequence[Sequence[float]]:
    """The inner products as plain numbers.

    Args:
        dots: inner products of K tensors.
        models: K.

    Returns:
        K rows of K numbers.

    Raises:
        ParameterError: If they are not those of `models` models.
    """
    if dots.shape != (models, models):
        raise ParameterError(f"dots has shape {tuple(dots.shape)}; for {models} models it is ({models}, {models})")
    rows: list[list[float]] = dots.double().tolist()
    return rows

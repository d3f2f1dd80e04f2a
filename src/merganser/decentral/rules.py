"""Rules by which an agent makes one model of its own and its neighbours'.

    plain        x_i <- sum_j w_ij x_j
    aligned      x_i <- sum_j w_ij P_ij x_j        P_ij brings j's units into i's order, P_ii = 1
    soft         x_i <- own x_i + (1 - own) sum_j w_ij x_j
    model_stock  x_i <- t m + (1 - t) a,  m = sum_j w_ij x_j,  t = K cos / (1 + (K - 1) cos), tensor by tensor,
                 with the anchor a and the mean cosine of the K (K - 1) / 2 pairs of x_j - a

Sums run in float64 in the order of the agents' numbers, and are rounded once. Buffers that float, such as statistics of
BatchNorm, are averaged like weights; what does not float stays the agent's own.

Sources: DIMAT, Saadati et al. 2024, arXiv:2404.08079; PAPA, Jolicoeur-Martineau et al. 2023, arXiv:2304.03094; Model
Stock, Jang et al. 2024, arXiv:2403.19522, equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

from torch import Tensor

from merganser.align.costs import is_statistic
from merganser.decentral.learner import Aligner, Match, Tensors
from merganser.errors import MissingTensorError, ParameterError, ShapeError


def plain(own: int, models: Mapping[int, Tensors], weights: Mapping[int, float]) -> dict[str, Tensor]:
    """The weighted sum.

    Args:
        own: number of the agent that merges.
        models: by agent, its own among them.
        weights: of each of them; they sum to 1.

    Returns:
        The agent's new model, in the dtypes of its own.

    Raises:
        ParameterError: If models and weights are of other agents.
        ShapeError: If a tensor has two shapes.
        MissingTensorError: If a model lacks a tensor.
    """
    _check(own, models, weights)
    return _by_tensor(own, models, lambda _, values: _sum(values, weights))


def soft(own: int, models: Mapping[int, Tensors], weights: Mapping[int, float], share: float) -> dict[str, Tensor]:
    """The agent's own model, moved towards the weighted sum.

    Args:
        own: number of the agent that merges.
        models: by agent, its own among them.
        weights: of each of them; they sum to 1.
        share: of its own, in [0, 1]; 0 is `plain`.

    Raises:
        ParameterError: If the share is none, or as for `plain`.
        ShapeError: As for `plain`.
        MissingTensorError: As for `plain`.
    """
    if not 0 <= share <= 1:
        raise ParameterError(f"the share of an agent's own weights is {share}; it is in [0, 1]")
    _check(own, models, weights)
    moved = {j: (1 - share) * w + (share if j == own else 0) for j, w in weights.items()}
    return _by_tensor(own, models, lambda _, values: _sum(values, moved))


def model_stock(
    own: int, models: Mapping[int, Tensors], weights: Mapping[int, float], anchor: Tensors | None
) -> dict[str, Tensor]:
    """The weighted sum, drawn towards an anchor as far as the models disagree about the way from it.

    Statistics of BatchNorm are not drawn anywhere, and a mean cosine below 0 counts as 0.

    Args:
        own: number of the agent that merges.
        models: by agent, its own among them.
        weights: of each of them; they sum to 1.
        anchor: the last common merge; without one, or without a neighbour, this is `plain`.

    Raises:
        ParameterError: As for `plain`.
        ShapeError: As for `plain`.
        MissingTensorError: As for `plain`.
    """
    _check(own, models, weights)
    if anchor is None or len(models) == 1:
        return plain(own, models, weights)

    def drawn(name: str, values: Mapping[int, Tensor]) -> Tensor:
        mean = _sum(values, weights)
        if is_statistic(name):
            return mean
        start = anchor[name].double()
        t = stock_ratio([values[j].double() - start for j in sorted(values)])
        return start + t * (mean - start)

    return _by_tensor(own, models, drawn)


def stock_ratio(ways: list[Tensor]) -> float:
    """How far K models have come, by the mean cosine between their ways: K cos / (1 + (K - 1) cos), in [0, 1].

    >>> import torch
    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    >>> stock_ratio([x, x, x]), stock_ratio([x, y]), round(stock_ratio([x, x + y / 2]), 4)
    (1.0, 0.0, 0.8284)
    """
    flat = [way.double().flatten() for way in ways]
    lengths = [float(way.norm()) for way in flat]
    cosines = [
        float(flat[i] @ flat[j]) / (lengths[i] * lengths[j]) if lengths[i] and lengths[j] else 0.0
        for i, j in combinations(range(len(flat)), 2)
    ]
    cosine = min(max(sum(cosines) / len(cosines), 0.0), 1.0)
    return len(flat) * cosine / (1 + (len(flat) - 1) * cosine)


def brought(own: int, models: Mapping[int, Tensors], aligner: Aligner) -> tuple[dict[int, Tensors], dict[int, Match]]:
    """All models in the order of units of an agent's own, each matched to it alone.

    Args:
        own: number of the agent that merges.
        models: by agent, its own among them, which stays.
        aligner: compares units.

    Returns:
        The models, and by neighbour how it was moved.
    """
    others = sorted(j for j in models if j != own)
    matches = dict(zip(others, aligner.match(models[own], [models[j] for j in others]), strict=True))
    moved = {j: aligner.moved(match.orders, models[j]) for j, match in matches.items()}
    return {own: models[own], **moved}, matches


def _sum(values: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    first, *others = sorted(values)
    total = weights[first] * values[first].double()
    for j in others:
        total += weights[j] * values[j].double()
    return total


def _by_tensor(
    own: int, models: Mapping[int, Tensors], rule: Callable[[str, Mapping[int, Tensor]], Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, mine in models[own].items():
        if not mine.is_floating_point() or len(models) == 1:
            found[name] = mine.clone()
            continue
        values = {}
        for j, model in models.items():
            if name not in model:
                raise MissingTensorError(f"the model of agent {j} lacks {name}")
            if model[name].shape != mine.shape:
                shapes = f"{tuple(mine.shape)} in agent {own}, {tuple(model[name].shape)} in agent {j}"
                raise ShapeError(f"{name} has two shapes: {shapes}")
            values[j] = model[name]
        found[name] = rule(name, values).to(mine.dtype)
    return found


def _check(own: int, models: Mapping[int, Tensors], weights: Mapping[int, float]) -> None:
    if own not in models:
        raise ParameterError(f"agent {own} merges, and its own model is not among them")
    if models.keys() != weights.keys():
        raise ParameterError(f"models are of agents {sorted(models)}, and weights of {sorted(weights)}")
    total = sum(weights[j] for j in sorted(weights))
    if abs(total - 1) > 1e-9:
        raise ParameterError(f"weights of agent {own} sum to {total}; they must sum to 1")

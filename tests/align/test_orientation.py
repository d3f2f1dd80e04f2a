"""Weights that lie the other way, as GPT-2's: they are measured, valued and refitted as those of nn.Linear are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.layout import Split
from merganser.align.moments import joint_moments
from merganser.align.partial import Pair, PartlyMerged, Settings
from merganser.align.ran import layers_run
from merganser.align.refit import refit
from merganser.errors import ParameterError
from merganser.symmetry import symmetries

SIZES = (4, 8, 8, 3)


def turned(seed: int) -> nn.Sequential:
    """The MLP of GPT-2 twice over: layers whose weight is (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    layers: list[nn.Module] = [layer for nx, nf in pairwise(SIZES) for layer in (Conv1D(nf, nx), nn.GELU())]
    network = nn.Sequential(*layers[:-1]).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in network.parameters():
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return network.eval()


def straight(network: nn.Sequential) -> nn.Sequential:
    """The same function by nn.Linear."""
    layers: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, nn.GELU):
            layers.append(layer)
            continue
        nx, nf = layer.get_parameter("weight").shape
        linear = nn.Linear(nx, nf).double()
        linear.load_state_dict({"weight": layer.get_parameter("weight").T, "bias": layer.get_parameter("bias")})
        layers.append(linear)
    return nn.Sequential(*layers).eval()


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(9)
    return [((torch.randn(40, SIZES[0], generator=generator, dtype=torch.float64),), {}) for _ in range(2)]


def pair(one: nn.Module, two: nn.Module, **settings: Any) -> Pair:
    given = batches()
    return Pair(symmetries(one, *given[0]), one, two, given, settings=Settings(**settings))


def normal_equations(x: np.ndarray, y: np.ndarray, prior: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight (outputs, inputs) and bias that are nearest to targets, the weight held to a prior; about the means."""
    xs, ys = x - x.mean(0), y - y.mean(0)
    gram = xs.T @ xs
    strength = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram + strength, xs.T @ ys + strength @ prior.T).T
    return weight, y.mean(0) - weight @ x.mean(0)


def test_a_run_finds_the_layers_and_their_places() -> None:
    seen = layers_run(turned(0), batches()[0])
    assert (seen.layers, seen.left) == (["0", "2", "4"], {})
    assert seen.places == {"0": 1, "2": 1, "4": 1}


def test_in_sequence_every_layer_is_the_solution_of_its_normal_equations() -> None:
    both = pair(turned(0), turned(1), ridge=1e-2)
    made = both.merged(1.0)
    x = torch.cat([args[0] for args, _ in batches()])
    first = second = merged = x
    for name, (a, b) in enumerate(zip(both.one, both.two, strict=True)):  # type: ignore[call-overload]
        with torch.no_grad():
            first, second = a(first), b(second)
            if isinstance(a, nn.GELU):
                merged = a(merged)
                continue
        prior = (a.weight + b.weight).detach().numpy().T / 2
        weight, bias = normal_equations(merged.numpy(), ((first + second) / 2).numpy(), prior, 1e-2)
        found = made.refitted.tensors
        np.testing.assert_allclose(found[f"{name}.weight"].numpy().T, weight, atol=1e-9)
        np.testing.assert_allclose(found[f"{name}.bias"].numpy(), bias, atol=1e-9)
        merged = merged @ torch.from_numpy(weight.T) + torch.from_numpy(bias)
    torch.testing.assert_close(made.network(x), merged, rtol=0, atol=1e-8)
    assert made.refitted.kept == {}


def test_from_moments_every_layer_is_the_solution_of_its_normal_equations() -> None:
    one, two = turned(0), turned(1)
    moments = joint_moments(one, two, batches())
    a, b = one.state_dict(), two.state_dict()
    mean = {n: (a[n] + b[n]) / 2 for n in a}
    found = refit(symmetries(one, *batches()[0]).spec, a, b, mean, moments, {}, ridge=1e-2)
    assert list(found.residuals) == ["0", "2", "4"]
    first = second = torch.cat([args[0] for args, _ in batches()])
    for name, (p, q) in enumerate(zip(one, two, strict=True)):
        inputs = (first + second) / 2
        with torch.no_grad():
            first, second = p(first), q(second)
        if isinstance(p, nn.GELU):
            continue
        prior = mean[f"{name}.weight"].numpy().T
        weight, bias = normal_equations(inputs.numpy(), ((first + second) / 2).numpy(), prior, 1e-2)
        np.testing.assert_allclose(found.tensors[f"{name}.weight"].numpy().T, weight, atol=1e-9)
        np.testing.assert_allclose(found.tensors[f"{name}.bias"].numpy(), bias, atol=1e-9)


def given(made: PartlyMerged) -> Tensor:
    with torch.no_grad():
        y: Tensor = made.network(torch.randn(20, SIZES[0], generator=torch.Generator().manual_seed(5)).double())
    return y


@pytest.mark.parametrize("way", ["sequence", "layers", "none"])
@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0])
def test_which_way_weights_lie_changes_nothing(way: str, budget: float) -> None:
    one, two = turned(0), turned(1)
    here = pair(one, two, way=way, dense=True).merged(budget)
    there = pair(straight(one), straight(two), way=way, dense=True).merged(budget)
    assert {g: s.apart for g, s in here.splits.items()} == {g: s.apart for g, s in there.splits.items()}
    assert here.costs == there.costs
    torch.testing.assert_close(given(here), given(there), rtol=1e-7, atol=1e-9)
    assert here.refitted.residuals == pytest.approx(there.refitted.residuals, abs=1e-9)


def test_a_head_of_such_a_layer_cannot_stay_apart() -> None:
    with pytest.raises(ParameterError, match="4 is no head"):
        pair(turned(0), turned(1), heads=("4",)).merged(2.0)


def test_with_all_units_apart_the_mean_of_both_is_given() -> None:
    one, two = turned(0), turned(1)
    both = pair(one, two)
    made = both.laid_out({group: Split(8, tuple(range(8))) for group in both.groups})
    x = torch.randn(20, SIZES[0], generator=torch.Generator().manual_seed(5)).double()
    assert len(both.groups) == 2
    with torch.no_grad():
        torch.testing.assert_close(given(made), (one(x) + two(x)) / 2, rtol=0, atol=1e-9)

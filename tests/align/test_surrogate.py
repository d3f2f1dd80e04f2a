"""Noise in place of data: as near to the data as BatchNorm remembers it, and no nearer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.layout import Split
from merganser.align.renorm import reset_batch_norm
from merganser.align.surrogate import (
    LEAST,
    PULL,
    carried_over,
    first_layer,
    matched,
    matched_noise,
    surrogate_batches,
)
from merganser.errors import ParameterError
from merganser.symmetry import symmetries


class Turned(nn.Module):
    """Pictures whose channels come last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.movedim(-1, 1))


def convolution(**options: Any) -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3, padding=1, **options), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)
    return nn.Sequential(*layers).eval()


def pictures(count: int = 64) -> Tensor:
    """Smooth ones, whose channels differ in mean and size."""
    generator = torch.Generator().manual_seed(1)
    x = nn.functional.interpolate(torch.randn(count, 3, 3, 3, generator=generator), size=6, mode="bilinear")
    return x * torch.tensor([2.0, 1.0, 0.5]).reshape(-1, 1, 1) + torch.tensor([3.0, -2.0, 0.0]).reshape(-1, 1, 1)


def parents(make: Any, x: Tensor) -> list[nn.Module]:
    """Two networks with the statistics of some data."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(make())
        reset_batch_norm(found[-1], [((x,), {})])
    return found


def statistics(network: nn.Module, layer: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Mean and variance of what a layer gives, unit by unit."""
    seen: list[Tensor] = []
    module = network.get_submodule(layer)
    hook = module.register_forward_hook(lambda _module, _args, y: seen.append(y.detach().double()))
    with torch.no_grad():
        for args, kwargs in batches:
            network(*args, **kwargs)
    hook.remove()
    variance, mean = torch.var_mean(torch.cat(seen).movedim(1, -1).reshape(-1, seen[0].shape[1]), 0)
    return mean, variance


def distance(network: nn.Module, layer: str, norm: str, batches: Sequence[Batch]) -> tuple[float, float]:
    """How far means are off, in deviations, and variances, in themselves: root mean squares over the units."""
    module = network.get_submodule(norm)
    mean, variance = statistics(network, layer, batches)
    wanted = module.get_buffer("running_var").double()
    means = ((mean - module.get_buffer("running_mean")) / wanted.sqrt()).square().mean().sqrt()
    return float(means), float((variance / wanted - 1).square().mean().sqrt())


MAKERS: dict[str, tuple[Any, str, str, Any]] = {
    "convolution": (convolution, "0", "1", pictures),
    "without a bias": (lambda: convolution(bias=False), "0", "1", pictures),
    "channels last": (lambda: Turned(convolution()), "network.0", "network.1", lambda: pictures().movedim(1, -1)),
    "flattened": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval(),
        "1",
        "2",
        pictures,
    ),
    "vectors": (
        lambda: nn.Sequential(nn.Linear(5, 12, bias=False), nn.BatchNorm1d(12), nn.Linear(12, 2)).eval(),
        "0",
        "1",
        lambda: torch.randn(200, 5, generator=torch.Generator().manual_seed(2)) @ torch.diag(torch.arange(1, 6.0)) - 2,
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_first_layer_gives_on_surrogates_what_batch_norm_remembers_more_nearly_than_on_plain_noise(name: str) -> None:
    make, layer, norm, data = MAKERS[name]
    x = data()
    both = parents(make, x)
    example = ((x[:4],), {})
    first = first_layer(both[0], example)
    assert first is not None
    assert (first.layer, first.norm) == (layer, norm)
    noise = matched_noise(first, both)
    near, plain = surrogate_batches(example, 400, noise=noise), surrogate_batches(example, 400)
    assert near[0][0][0].shape[1:] == plain[0][0][0].shape[1:] == x.shape[1:]
    for network in both:
        ours, theirs = distance(network, layer, norm, near), distance(network, layer, norm, plain)
        assert ours[0] < 0.15 * theirs[0]
        assert ours[1] < theirs[1]


def test_channels_that_are_independent_are_found_again() -> None:
    mean, variance = np.array([1.5, -0.5, 0.0]), np.array([4.0, 1.0, 0.25])
    both = parents(convolution, pictures())
    first = first_layer(both[0], ((pictures()[:2],), {}))
    assert first is not None
    inside = np.full((6, 6), 1.0)
    padded = np.pad(inside, 1)
    shares = np.array([[padded[i : i + 6, j : j + 6].mean() for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(first.taps.numpy(), shares.reshape(-1), rtol=1e-12)
    for network in both:  # what inputs of these means and variances give, but for the border's own
        layer, norm = network[0], network[1]  # type: ignore[index]
        w, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        norm.running_mean.copy_(torch.from_numpy(np.einsum("ocij,ij,c->o", w, shares, mean) + bias))
        norm.running_var.copy_(torch.from_numpy(np.einsum("ocij,ij,c->o", w * w, shares, variance)))
    found = matched_noise(first, both)
    np.testing.assert_allclose(found.mean.numpy(), mean, atol=0.02)
    np.testing.assert_allclose(found.variance.numpy(), variance, atol=0.05)


@pytest.mark.parametrize(("outputs", "channels"), [(9, 4), (4, 9)])
def test_mean_and_variance_are_the_least_squares_that_the_equations_say(outputs: int, channels: int) -> None:
    from scipy.optimize import lsq_linear

    draw = np.random.default_rng(0)
    s, q = draw.normal(size=(outputs, channels)), draw.uniform(0.1, 2, size=(outputs, channels))
    mu, spread = draw.normal(size=outputs), draw.uniform(0.5, 3, size=outputs)
    whole = q.sum(1) / spread
    v0 = whole.sum() / (whole @ whole)
    rows = []
    for a, wanted, prior in (
        (s / np.sqrt(spread)[:, None] * np.sqrt(v0), mu / np.sqrt(spread), np.zeros(channels)),
        (q / spread[:, None] * v0, np.ones(outputs), np.ones(channels)),
    ):
        pull = np.sqrt(PULL * (a**2).sum() / channels)
        rows.append((np.vstack([a, pull * np.eye(channels)]), np.concatenate([wanted, pull * prior])))
    mean, variance = matched(s, q, mu, spread)
    np.testing.assert_allclose(mean, np.linalg.lstsq(*rows[0], rcond=None)[0] * np.sqrt(v0), rtol=1e-8)
    expected = lsq_linear(*rows[1], bounds=(LEAST, np.inf), tol=1e-14).x * v0
    np.testing.assert_allclose(variance, expected, atol=1e-5)


def test_units_that_never_vary_tell_nothing() -> None:
    mean, variance = matched(np.eye(2), np.eye(2), np.ones(2), np.zeros(2))
    assert (mean.tolist(), variance.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4)),
    ],
)
def test_where_batch_norm_tells_nothing_of_the_inputs_none_is_found(network: nn.Module) -> None:
    assert first_layer(network.eval(), ((torch.randn(3, 5),), {})) is None


def test_plain_surrogates_are_standard_normal_and_their_seed_decides() -> None:
    example: Batch = ((torch.ones(4, 50), 3), {"mask": torch.tensor([0, 1, 2, 3]), "scale": torch.ones(2)})
    batches = surrogate_batches(example, 250, seed=1)
    assert [len(args[0]) for args, _ in batches] == [83, 83, 83]
    x = torch.cat([args[0] for args, _ in batches])
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.var()) - 1) < 0.05
    assert all(args[1] == 3 and torch.equal(kw["scale"], torch.ones(2)) for args, kw in batches)
    assert batches[0][1]["mask"].tolist() == [i % 4 for i in range(83)]
    again, other = surrogate_batches(example, 250, seed=1), surrogate_batches(example, 250, seed=2)
    assert torch.equal(x, torch.cat([args[0] for args, _ in again]))
    assert not torch.equal(x, torch.cat([args[0] for args, _ in other]))
    assert not torch.equal(batches[0][0][0], batches[1][0][0])


@pytest.mark.parametrize(("example", "count"), [(torch.ones(2, 3), 1), (torch.ones(2, 3, dtype=torch.long), 5)])
def test_too_few_and_inputs_without_floating_numbers_are_refused(example: Tensor, count: int) -> None:
    with pytest.raises(ParameterError, match="too few" if count == 1 else "no floating numbers"):
        surrogate_batches(((example,), {}), count)


def test_statistics_of_units_apart_and_of_copies_are_carried_over_as_the_data_has_them() -> None:
    one, two = parents(convolution, pictures())
    spec = symmetries(one, (pictures()[:2],)).spec
    (group,) = [g for g, _ in spec.groups.items()]
    data = [copy.deepcopy(n.state_dict()) for n in (one, two)]
    for network in (one, two):
        reset_batch_norm(network, surrogate_batches(((pictures()[:2],), {}), 50))
    noise = one.state_dict(), two.state_dict()
    apart = {group: Split(8, tuple(range(8)))}
    merged = {n: torch.cat([noise[0][n], noise[1][n]]) for n in ("1.running_mean", "1.running_var")}
    found = carried_over(spec, apart, merged, noise, (data[0], data[1]))
    for name, x in found.items():
        torch.testing.assert_close(x, torch.cat([data[0][name], data[1][name]]), rtol=1e-5, atol=1e-5)
    assert sorted(found) == sorted(merged)
    copies = carried_over(spec, {}, noise[0], (noise[0], noise[0]), (data[0], data[0]))
    for name, x in copies.items():
        torch.testing.assert_close(x, data[0][name], rtol=1e-5, atol=1e-5)
    still = {**noise[0], "1.running_var": torch.zeros(8)}
    carried = carried_over(spec, {}, still, (still, still), (data[0], data[0]))
    torch.testing.assert_close(carried["1.running_var"], data[0]["1.running_var"])

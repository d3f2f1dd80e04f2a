"""Networks that count for unequal shares, as the last of several that are folded one by one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.layout import Side, Split, places, widened
from merganser.align.partial import Pair, Settings
from merganser.align.surrogate import carried_over
from merganser.errors import ParameterError
from merganser.symmetry import Group, Spec, symmetries


def deep(seed: int) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in network.parameters():
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return network.eval()


def flat(seed: int) -> nn.Sequential:
    """One layer: nothing can be in another order."""
    return nn.Sequential(copy.deepcopy(deep(seed)[0]))


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(9)
    return [((torch.randn(40, 4, generator=generator, dtype=torch.float64),), {}) for _ in range(2)]


def pair(one: nn.Module, two: nn.Module, share: float, **settings: Any) -> Pair:
    given = batches()
    return Pair(symmetries(one, *given[0]), one, two, given, settings=Settings(share=share, **settings))


def given(network: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = network(torch.randn(20, 4, generator=torch.Generator().manual_seed(5)).double())
    return y


def test_entries_of_merged_rows_have_the_share_and_others_are_whole() -> None:
    spec = Spec({"g": Group(4), "h": Group(3)}, {"w": ("g", "h")}, {"w": ("producer", "consumer")}, {})
    splits = {"g": Split(4, (1, 2)), "h": Split(3, (0,))}
    a, b = (torch.randn(4, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(2))
    found = widened(spec, "w", a, b, splits, share=0.2)
    rows, columns = (places(spec, part, splits) for part in spec.axes["w"])
    for i, (row, mine) in enumerate(zip(rows.index.tolist(), rows.side.tolist(), strict=True)):
        for j, (column, its) in enumerate(zip(columns.index.tolist(), columns.side.tolist(), strict=True)):
            of_a = {Side.BOTH: 0.8, Side.FIRST: 1.0, Side.SECOND: 0.0}[Side(mine)] * (its != Side.SECOND)
            of_b = {Side.BOTH: 0.2, Side.FIRST: 0.0, Side.SECOND: 1.0}[Side(mine)] * (its != Side.FIRST)
            assert float(found[i, j]) == pytest.approx(of_a * float(a[row, column]) + of_b * float(b[row, column]))


@pytest.mark.parametrize("way", ["sequence", "layers", "none"])
def test_with_all_units_apart_the_mean_with_the_share_is_given(way: str) -> None:
    one, two = deep(0), deep(1)
    made = pair(one, two, 0.25, way=way).merged(2.0)
    assert sum(len(split.apart) for split in made.splits.values()) == 11
    torch.testing.assert_close(given(made.network), 0.75 * given(one) + 0.25 * given(two), rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", ["sequence", "layers", "none"])
def test_three_networks_folded_one_by_one_count_alike(way: str) -> None:
    networks = [flat(seed) for seed in range(3)]
    first = pair(networks[0], networks[1], 1 / 2, way=way, ridge=0.0).merged().network
    second = pair(first, networks[2], 1 / 3, way=way, ridge=0.0).merged().network
    torch.testing.assert_close(given(second), sum(map(given, networks)) / 3, rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", ["sequence", "layers"])
def test_layers_are_the_solutions_of_their_normal_equations(way: str) -> None:
    share, ridge = 0.2, 1e-2
    both = pair(deep(0), deep(1), share, way=way, ridge=ridge)
    found = both.merged().refitted.tensors
    first = second = merged = torch.cat([args[0] for args, _ in batches()])
    for name, (a, b) in enumerate(zip(both.one, both.two, strict=True)):  # type: ignore[call-overload]
        inputs = merged if way == "sequence" else (1 - share) * first + share * second
        with torch.no_grad():
            first, second = a(first), b(second)
            if isinstance(a, nn.Tanh):
                merged = a(merged)
                continue
            prior = ((1 - share) * a.weight + share * b.weight).numpy()
        x, y = inputs.numpy(), ((1 - share) * first + share * second).numpy()
        xs, ys = x - x.mean(0), y - y.mean(0)
        pull = ridge * np.trace(xs.T @ xs) / x.shape[1] * np.eye(x.shape[1])
        weight = np.linalg.solve(xs.T @ xs + pull, xs.T @ ys + pull @ prior.T).T
        np.testing.assert_allclose(found[f"{name}.weight"].numpy(), weight, atol=1e-9)
        merged = merged @ torch.from_numpy(weight.T) + torch.from_numpy(y.mean(0) - weight @ x.mean(0))


def test_statistics_of_all_norms_are_carried_over_with_the_share() -> None:
    names = "0.running_var", "1.running_mean", "2.running_var"
    spec = Spec({"g": Group(2)}, dict.fromkeys(names, ("g",)), dict.fromkeys(names, ("scale",)), {})
    draw = torch.Generator().manual_seed(0)
    merged, *known = [{n: torch.rand(2, generator=draw) + 0.5 for n in names} for _ in range(5)]
    noise, data = (known[0], known[1]), (known[2], known[3])
    found = carried_over(spec, {}, merged, noise, data, 0.25)
    for name, x in found.items():
        seen, then = (0.75 * a[name] + 0.25 * b[name] for a, b in (noise, data))
        wanted = merged[name] + then - seen if name == names[1] else merged[name] * then / seen
        torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": 0.3, "way": "layers", "target": "separate"}, "both networks count alike"),
    ],
)
def test_shares_that_are_none_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        Settings(**settings)

"""Zipping by weights and activations, and up to a depth only."""

from __future__ import annotations

import copy

import pytest
import torch
from test_activations import Pair, mlp
from torch import Tensor, nn

from merganser.align.activations import unit_correlations
from merganser.align.costs import WeightCosts
from merganser.align.renorm import layer_statistics
from merganser.align.zip import zip_units
from merganser.align.zipped import closed, zipped, zipped_apart
from merganser.align.zipping import (
    Zip,
    by_depth,
    joined_units,
    weight_correlations,
    zip_networks,
    zip_partly,
    zipped_statistics,
)
from merganser.errors import ParameterError
from merganser.symmetry import symmetries


class Residual(nn.Module):
    """Two stages of one residual block each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.wider = nn.Conv2d(4, 8, 1)
        self.three = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        x = (self.wider(x) + self.three(x)).relu()
        return self.head(x.mean((2, 3)))


def residuals(count: int = 2) -> tuple[list[Residual], list[tuple[tuple[Tensor], dict[str, Tensor]]]]:
    networks = []
    for seed in range(count):
        torch.manual_seed(seed)
        networks.append(Residual().double().eval())
    generator = torch.Generator().manual_seed(0)
    return networks, [((torch.randn(12, 3, 5, 5, dtype=torch.float64, generator=generator),), {}) for _ in range(3)]


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {n: x.detach() for n, x in network.state_dict().items()}


def test_correlations_of_weights_between_permuted_networks_are_those_that_align_uses() -> None:
    networks, batches = residuals()
    spec = symmetries(networks[0], *batches[0]).spec
    a, b = map(tensors, networks)
    orders = spec.random(torch.Generator().manual_seed(1))
    clusters = {g: torch.stack([torch.arange(len(o)), o.argsort()]) for g, o in orders.items()}
    costs = WeightCosts(spec, a, b, "pearson")
    for group, order in orders.items():
        n = len(order)
        found = weight_correlations(spec, group, [a, b], [spec.identity()] * 2, clusters)
        assert found.shape == (2 * n, 2 * n)
        torch.testing.assert_close(found[:n, n:], costs.units(group, orders), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.diagonal(), torch.ones(2 * n, dtype=torch.float64))


def test_correlations_of_weights_where_clusters_are_of_other_sizes_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))  # noqa: E731
    nets = [tensors(make().double()) for _ in range(2)]
    spec = symmetries(make(), (torch.randn(2, 3, generator=generator),)).spec
    first, second = spec.groups
    labels = torch.tensor([[0, 0, 1, 2], [0, 3, 3, 3]])
    clusters = {first: labels, second: torch.tensor([[0, 1, 2], [2, 1, 0]])}
    found = weight_correlations(spec, second, nets, [spec.identity()] * 2, clusters)
    rows = []
    for k, net in enumerate(nets):
        for unit in range(3):
            reads = torch.zeros(4, dtype=torch.float64)
            for i, cluster in enumerate(labels[k].tolist()):
                reads[cluster] += net["2.weight"][unit, i]
            rows.append(torch.cat([reads, net["2.bias"][unit : unit + 1], net["4.weight"][:, unit]]))
    torch.testing.assert_close(found, torch.corrcoef(torch.stack(rows)))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_network_zipped_with_a_permuted_copy_by_both_is_the_network(balance: float) -> None:
    pair = Pair(mlp)
    merged = zip_networks(pair.found, [pair.one, pair.two], pair.batches, balance=balance)
    ((x,), _) = pair.batches[0]
    with torch.no_grad():
        assert torch.allclose(merged(x), pair.one(x), atol=2e-5)


def test_no_share_of_the_weights_is_what_activations_alone_say() -> None:
    networks, batches = residuals()
    found = symmetries(networks[0], *batches[0])
    orders = [found.spec.identity()] * 2
    clusters = joined_units(found, networks, orders, batches, Zip(balance=0))
    for group, similarity in unit_correlations(found, networks, batches, orders).items():
        assert torch.equal(clusters[group], zip_units(similarity, 2).reshape(2, -1))


def test_a_fixed_point_of_sweeps_is_one() -> None:
    networks, batches = residuals()
    found = symmetries(networks[0], *batches[0])
    orders, how = [found.spec.identity()] * 2, Zip(balance=0.7, sweeps=50)
    clusters = joined_units(found, networks, orders, batches, how)
    shown = unit_correlations(found, networks, batches, orders)
    for group, mine in clusters.items():
        weights = weight_correlations(found.spec, group, [tensors(n) for n in networks], orders, clusters)
        again = zip_units(0.7 * weights + 0.3 * shown[group], 2).reshape(2, -1)
        assert torch.equal(again, mine)


def test_groups_come_by_the_depth_of_what_makes_them_last() -> None:
    networks, batches = residuals()
    spec = symmetries(networks[0], *batches[0]).spec
    makers = {g: [n for n, axis in spec.members(g) if spec.roles[n][axis] == "producer"] for g in by_depth(spec)}
    assert [names[-1] for names in makers.values()] == ["one.weight", "two.weight", "three.weight"]
    inside, stream, last = makers
    assert closed(spec, [inside]) == []  # what makes it reads the stream
    assert closed(spec, [inside, stream]) == [inside, stream]
    assert closed(spec, [inside, stream, last]) == [inside, stream, last]
    assert closed(spec, [stream, last]) == []


def test_nothing_shared_are_the_networks_and_all_shared_differ_in_heads_alone() -> None:
    networks, batches = residuals()
    found = symmetries(networks[0], *batches[0])
    for own, network in zip(zip_partly(found, networks, batches, share=0.0), networks, strict=True):
        assert all(torch.equal(x, own.state_dict()[n]) for n, x in network.state_dict().items())
    one, two = map(tensors, zip_partly(found, networks, batches, share=1.0))
    assert {n for n in one if not torch.equal(one[n], two[n])} == {"head.weight", "head.bias"}


def test_what_is_shared_is_the_first_stage() -> None:
    networks, batches = residuals()
    found = symmetries(networks[0], *batches[0])
    one, two = map(tensors, zip_partly(found, networks, batches, share=0.67))
    same = {n for n in one if torch.equal(one[n], two[n])}
    assert same == {f"{m}.{kind}" for m in ("stem", "one", "two") for kind in ("weight", "bias")}


@pytest.mark.parametrize("share", [0.0, 0.67, 1.0])
def test_partly_zipped_copies_are_the_network(share: float) -> None:
    networks, batches = residuals(1)
    found = symmetries(networks[0], *batches[0])
    other = copy.deepcopy(networks[0])
    moved = found.spec.random(torch.Generator().manual_seed(0))
    other.load_state_dict({n: found.spec.apply(moved, n, x) for n, x in networks[0].state_dict().items()})
    ((x,), _) = batches[0]
    for own in zip_partly(found, [networks[0], other], batches, share=share):
        with torch.no_grad():
            torch.testing.assert_close(own(x), networks[0](x), rtol=1e-9, atol=1e-9)


def test_heads_that_read_clusters_by_loops() -> None:
    networks, batches = residuals()
    spec = symmetries(networks[0], *batches[0]).spec
    clusters = {g: torch.stack([torch.arange(spec.groups[g].size).roll(k) for k in range(2)]) for g in by_depth(spec)}
    labels = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6], [0, 7, 7, 7, 1, 2, 3, 4]])
    clusters[by_depth(spec)[-1]] = labels
    apart = zipped_apart(spec, [tensors(n) for n in networks], clusters)
    whole = zipped(spec, [tensors(n) for n in networks], [spec.identity()] * 2, clusters)
    for k, (own, network) in enumerate(zip(apart, networks, strict=True)):
        expected = torch.zeros(5, 8, dtype=torch.float64)
        for unit, cluster in enumerate(labels[k].tolist()):
            expected[:, cluster] += network.head.weight.detach()[:, unit]
        torch.testing.assert_close(own["head.weight"], expected)
        assert torch.equal(own["head.bias"], network.head.bias)
        assert all(torch.equal(own[n], whole[n]) for n in own if not n.startswith("head"))


def test_settings_out_of_range_and_open_sets_of_groups_are_refused() -> None:
    networks, batches = residuals()
    found = symmetries(networks[0], *batches[0])
    with pytest.raises(ParameterError, match=r"balance is 1\.5"):
        zip_networks(found, networks, batches, balance=1.5)
    with pytest.raises(ParameterError, match="sweeps is 0"):
        Zip(sweeps=0)
    with pytest.raises(ParameterError, match=r"share is -0\.1"):
        zip_partly(found, networks, batches, share=-0.1)
    inside = by_depth(found.spec)[0]
    labels = torch.arange(found.spec.groups[inside].size).expand(2, -1)
    with pytest.raises(ParameterError, match="cannot be zipped alone"):
        zipped_apart(found.spec, [tensors(n) for n in networks], {inside: labels})


def test_statistics_of_clusters_by_loops() -> None:
    networks, batches = residuals()
    spec = symmetries(networks[0], *batches[0]).spec
    clusters = {
        g: torch.zeros(2, spec.groups[g].size, dtype=torch.int64) + torch.arange(2)[:, None] for g in by_depth(spec)
    }
    last = by_depth(spec)[-1]
    clusters[last] = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6], [0, 7, 7, 7, 1, 2, 3, 4]])
    mine = [layer_statistics(n, batches) for n in networks]
    found = zipped_statistics(spec, mine, [spec.identity()] * 2, clusters)
    for i in range(2):
        members: list[list[Tensor]] = [[] for _ in range(8)]
        for statistics, labels in zip(mine, clusters[last].tolist(), strict=True):
            for unit, cluster in enumerate(labels):
                members[cluster].append(statistics["three"][i][unit])
        torch.testing.assert_close(found["three"][i], torch.stack([torch.stack(m).mean() for m in members]))


def test_a_zip_that_is_repaired_has_the_statistics_of_its_clusters() -> None:
    networks, batches = residuals()
    found = symmetries(networks[0], *batches[0])
    orders = [found.spec.identity()] * 2
    clusters = joined_units(found, networks, orders, batches[:1], Zip())
    merged = zip_networks(found, networks, batches[:1], repairs=True)
    wanted = zipped_statistics(found.spec, [layer_statistics(n, batches[:1]) for n in networks], orders, clusters)
    for layer, (mean, deviation) in layer_statistics(merged, batches[:1]).items():
        torch.testing.assert_close(mean, wanted[layer][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(deviation, wanted[layer][1], rtol=1e-9, atol=1e-9)

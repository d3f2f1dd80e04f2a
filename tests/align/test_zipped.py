"""One network from zipped units: copies give the network, permutations their aligned mean, clusters the loops."""

from __future__ import annotations

import pytest
import torch
from test_activations import Pair, attention, mlp
from torch import Tensor, nn

from merganser.align.activations import unit_correlations
from merganser.align.many import mean_of
from merganser.align.renorm import reset_batch_norm
from merganser.align.zip import zip_units
from merganser.align.zipped import zipped
from merganser.align.zipping import zip_networks
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import symmetries


def run(network: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(network, tensors, (x,))


@pytest.mark.parametrize("make", [mlp, attention])
def test_a_network_zipped_with_a_permuted_copy_is_the_network(make) -> None:
    pair = Pair(make)
    orders = [pair.spec.identity(), pair.spec.inverse(pair.moved)]
    clusters = {
        group: zip_units(similarity, 2).reshape(2, -1)
        for group, similarity in unit_correlations(pair.found, [pair.one, pair.two], pair.batches, orders).items()
    }
    assert clusters
    one = zipped(pair.spec, [pair.a, pair.b], orders, clusters)
    ((x,), _) = pair.batches[0]
    with torch.no_grad():
        assert torch.allclose(run(pair.one, one, x), pair.one(x), atol=2e-5)


def test_clusters_that_are_a_permutation_give_the_aligned_mean() -> None:
    pair = Pair(mlp)
    orders = pair.spec.random(torch.Generator().manual_seed(5))
    clusters = {g: torch.stack([torch.arange(len(o)), o.argsort()]) for g, o in orders.items()}
    found = zipped(pair.spec, [pair.a, pair.b], [pair.spec.identity()] * 2, clusters)
    expected = mean_of(pair.spec, [pair.a, pair.b], [pair.spec.identity(), orders])
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_clusters_of_other_sizes_by_loops() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    spec = symmetries(nets[0], (torch.randn(2, 3),)).spec
    (group,) = spec.groups
    labels = torch.tensor([[0, 0, 1, 2], [0, 3, 3, 3]])
    a, b = ({n: x.detach().double() for n, x in net.state_dict().items()} for net in nets)
    found = zipped(spec, [a, b], [spec.identity()] * 2, {group: labels})
    rows, bias, columns = torch.zeros(4, 3).double(), torch.zeros(4).double(), torch.zeros(2, 4).double()
    sizes = [3, 1, 1, 3]
    for net, mine in zip((a, b), labels.tolist(), strict=True):
        for unit, cluster in enumerate(mine):
            rows[cluster] += net["0.weight"][unit] / sizes[cluster]
            bias[cluster] += net["0.bias"][unit] / sizes[cluster]
            columns[:, cluster] += net["2.weight"][:, unit] / 2
    assert torch.allclose(found["0.weight"], rows)
    assert torch.allclose(found["0.bias"], bias)
    assert torch.allclose(found["2.weight"], columns)
    assert torch.allclose(found["2.bias"], (a["2.bias"] + b["2.bias"]) / 2)


def test_groups_that_hold_others_and_clusters_of_another_shape_are_refused() -> None:
    pair = Pair(attention)
    outer = next(g.within for g in pair.spec.groups.values() if g.within)
    identity = [pair.spec.identity()] * 2
    for group, labels in ((outer, torch.zeros(2, 3)), ("nowhere", torch.zeros(2, 3)), ("0", torch.zeros(3, 12))):
        with pytest.raises(ParameterError, match=f"{group}"):
            zipped(pair.spec, [pair.a, pair.b], identity, {group: labels.long()})


class Normed(nn.Module):
    """Hidden units with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def normed() -> tuple[nn.Module, tuple[int, ...]]:
    return Normed(), (64, 5)


@pytest.mark.parametrize("make", [mlp, normed, attention])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("repeat", [0.5, 1.0])
def test_copies_in_other_orders_are_zipped_into_the_network_itself(make, count: int, repeat: float) -> None:
    pair = Pair(make)
    reset_batch_norm(pair.one, pair.batches)
    reset_batch_norm(pair.two, pair.batches)
    one = zip_networks(pair.found, ([pair.one, pair.two] * 2)[:count], pair.batches, repeat=repeat)
    ((x,), _) = pair.batches[0]
    with torch.no_grad():
        assert torch.allclose(one(x), pair.one(x), atol=1e-4)


def test_one_network_alone_and_networks_of_other_sizes_are_refused() -> None:
    pair = Pair(mlp)
    with pytest.raises(ParameterError, match="two or more"):
        zip_networks(pair.found, [pair.one], pair.batches)
    with pytest.raises(ShapeError, match="other tensors"):
        zip_networks(pair.found, [pair.one, nn.Linear(5, 3)], pair.batches)

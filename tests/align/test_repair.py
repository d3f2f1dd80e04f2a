"""REPAIR: means and deviations of the parents come back, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from merganser.align.balancing import choose_balance
from merganser.align.many import mean_of
from merganser.align.renorm import layer_statistics, repair
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import symmetries

Batches = list[tuple[tuple[Tensor], dict[str, Tensor]]]


def convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5)
    ).eval()


def batches(count: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(9)
    return [((torch.randn(50, 3, 6, 6, generator=generator),), {}) for _ in range(count)]


def middle(one: nn.Module, two: nn.Module) -> nn.Module:
    spec = symmetries(one, batches()[0][0]).spec
    merged = copy.deepcopy(one)
    merged.load_state_dict(mean_of(spec, [one.state_dict(), two.state_dict()], [spec.identity()] * 2))
    return merged


def test_statistics_are_those_of_all_outputs() -> None:
    network, given = convolutions(0), batches()
    found = layer_statistics(network, given)
    assert list(found) == ["0", "2", "5"]
    with torch.no_grad():
        first = torch.cat([network[0](x) for (x,), _ in given]).double().movedim(1, 0).flatten(1)
        last = torch.cat([network(x) for (x,), _ in given]).double()
    torch.testing.assert_close(found["0"], (first.mean(1), first.std(1, correction=0)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["5"], (last.mean(0), last.std(0, correction=0)), rtol=1e-5, atol=1e-6)


def test_a_merged_network_gets_the_mean_statistics_of_its_parents() -> None:
    parents, given = [convolutions(0), convolutions(1)], batches(1)
    merged = middle(*parents)
    targets = [layer_statistics(p, given) for p in parents]
    before = layer_statistics(merged, given)
    assert all((before[n][1] < 0.9 * (targets[0][n][1] + targets[1][n][1]) / 2).any() for n in before)  # they shrank
    assert repair(merged, targets, given) == 3
    after = layer_statistics(merged, given)
    for name, (mean, deviation) in after.items():  # one batch: what was seen on the fly is what is folded in
        torch.testing.assert_close(mean, (targets[0][name][0] + targets[1][name][0]) / 2, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deviation, (targets[0][name][1] + targets[1][name][1]) / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_a_network_repaired_by_itself_stays(count: int) -> None:
    """To rounding; of several batches, which differ from one another, too."""
    network, given = convolutions(0), batches(count)
    given = [((x + 0.5 * k,), kwargs) for k, ((x,), kwargs) in enumerate(given)]
    same = copy.deepcopy(network).train()
    assert repair(same, [layer_statistics(network, given)] * 2, given) == 3
    assert same.training
    for name, x in network.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], x, rtol=1e-4, atol=1e-5)


def test_several_batches_give_the_moments_of_all_of_them_after_repair() -> None:
    parents = [convolutions(0), convolutions(1)]
    given = [((x[:20] * (1 + k) + 0.3 * k,), kwargs) for k, ((x,), kwargs) in enumerate(batches(4))]
    targets = [layer_statistics(p, given) for p in parents]
    merged = middle(*parents)
    assert repair(merged, targets, given) == 3
    for name, (mean, deviation) in layer_statistics(merged, given).items():
        for found, i in ((mean, 0), (deviation, 1)):
            expected = (targets[0][name][i] + targets[1][name][i]) / 2
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_batches_apart_are_repaired_as_the_same_in_one() -> None:
    parents, given = [convolutions(0), convolutions(1)], batches(3)
    whole: Batches = [((torch.cat([x for (x,), _ in given]),), {})]
    targets = [layer_statistics(p, whole) for p in parents]
    one, several = middle(*parents), middle(*parents)
    repair(one, targets, whole)
    repair(several, targets, iter(given))
    for name, x in one.state_dict().items():
        torch.testing.assert_close(several.state_dict()[name], x, rtol=2e-3, atol=2e-3)


def test_a_unit_that_never_varies_and_a_layer_without_bias_are_left_finite() -> None:
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        network[0].weight[1] = 0
    given: Batches = [((torch.randn(40, 4, generator=torch.Generator().manual_seed(0)),), {})]
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.mul_(3)
    repair(network, [layer_statistics(other, given)], given)
    torch.testing.assert_close(network[0].weight, other[0].weight)
    assert torch.isfinite(network[2].weight).all()


def test_statistics_of_another_layer_no_parent_and_no_batch_are_refused() -> None:
    network, given = convolutions(0), batches()
    targets = layer_statistics(network, given)
    with pytest.raises(ShapeError, match="0 has 8 units"):
        repair(network, [{"0": (torch.zeros(7), torch.ones(7))}], given)
    with pytest.raises(ParameterError, match="no parent"):
        repair(network, [], given)
    with pytest.raises(ParameterError, match="no batch"):
        repair(network, [targets], [])


def test_the_balance_nearest_to_the_parents_is_chosen() -> None:
    parents, given = [nn.Linear(3, 2), nn.Linear(3, 2)], [((torch.randn(20, 3),), {})]
    spec = symmetries(parents[0], given[0][0]).spec
    mean = mean_of(spec, [p.state_dict() for p in parents], [spec.identity()] * 2)

    def merge(balance: float) -> nn.Module:
        merged = copy.deepcopy(parents[0])
        merged.load_state_dict({n: x + (balance - 0.3) for n, x in mean.items()})
        return merged

    found = choose_balance(merge, parents, given)
    assert found.balance == 0.3
    assert found.distances[0.3] == pytest.approx(0, abs=1e-10)
    assert set(found.distances) == {i / 10 for i in range(11)}
    assert torch.equal(found.network.weight, mean["weight"])
    level = choose_balance(lambda _: parents[0], parents, given, balances=(0.9, 0.2))
    assert level.balance == 0.2
    with pytest.raises(ParameterError, match="no batch"):
        choose_balance(merge, parents, [])
    with pytest.raises(ParameterError, match="no balance"):
        choose_balance(merge, parents, given, balances=())
    with pytest.raises(ParameterError, match="returns a"):
        choose_balance(merge, parents, given, output=lambda x: x.tolist())

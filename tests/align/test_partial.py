"""Two networks merged under a budget: what is known of both ends, what it costs, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from partial_networks import relative, stirred
from tiny import stir
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from merganser.align.activations import Batch
from merganser.align.blocks import skipping_zeros
from merganser.align.partial import Pair, PartlyMerged, Settings
from merganser.align.sequence import Sampling
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import symmetries

SIDE = 8


class Small(nn.Module):
    """Convolutions, one of which widens, BatchNorm, a shortcut and a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.wide, self.wide_norm = nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(10)
        self.inner, self.inner_norm = nn.Conv2d(10, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 10, 3, padding=1)
        self.head = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(self.wide_norm(self.wide(x)))
        x = functional.relu(x + self.outer(functional.relu(self.inner_norm(self.inner(x)))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def small(seed: int, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    network = Small(classes).double()
    stir(network)
    return network.eval()


def images(count: int = 3, each: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(9)
    return [((torch.randn(each, 3, SIDE, SIDE, generator=generator, dtype=torch.float64),), {}) for _ in range(count)]


def pair(one: nn.Module, two: nn.Module, batches: Sequence[Batch] | None = None, **settings: Any) -> Pair:
    batches = batches or images()
    found = symmetries(one, *batches[0], check=False)
    return Pair(found, one, two, batches, settings=Settings(**settings))


@cache
def near(**settings: Any) -> Pair:
    """Two networks not far from each other."""
    one = small(0)
    two = copy.deepcopy(one)
    two.load_state_dict(stirred(one.state_dict(), 1))
    return pair(one, two, **settings)


@cache
def far() -> Pair:
    """Two networks that have nothing in common."""
    return pair(small(0), small(1))


def outputs(network: nn.Module, batches: Sequence[Batch]) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(*args, **kwargs) for args, kwargs in batches])


def mean(both: Pair) -> Tensor:
    return (outputs(both.one, both.batches) + outputs(both.two, both.batches)) / 2


def check_costs(both: Pair, merged: PartlyMerged) -> None:
    """What is told is what the network of blocks takes."""
    for network, flops, parameters in (
        (skipping_zeros(merged.blocks()), merged.costs.flops, merged.costs.parameters),
        (both.one, merged.costs.parent_flops, merged.costs.parent_parameters),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(both.batches[0][0][0][:1])
        assert flops == counter.get_total_flops()
        assert parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("how", ["activations", "weights"])
def test_a_network_merged_with_itself_in_another_order_is_that_network(how: str) -> None:
    one = small(0)
    spec = symmetries(one, *images()[0], check=False).spec
    orders = spec.random(torch.Generator().manual_seed(4))
    two = copy.deepcopy(one)
    two.load_state_dict(
        {n: spec.apply(orders, n, x) for n, x in one.state_dict().items() if n in spec.axes}
        | {n: x for n, x in one.state_dict().items() if n not in spec.axes}
    )
    assert not torch.equal(two.get_parameter("wide.weight"), one.get_parameter("wide.weight"))
    both = pair(one, two, match=how)
    merged = both.merged()
    assert merged.splits == {}
    assert relative(outputs(merged.network, both.batches), outputs(both.one, both.batches)) < 1e-9
    assert max(merged.refitted.residuals.values()) < 1e-12
    check_costs(both, merged)
    assert merged.costs.flops == merged.costs.parent_flops


@pytest.mark.parametrize("way", ["sequence", "layers"])
def test_budget_two_holds_both_networks_and_gives_their_mean(way: str) -> None:
    batches = images() if way == "sequence" else images(1)
    both = far() if way == "sequence" else pair(small(0), small(1), batches, way=way, recalibrate=False)
    merged = both.merged(2.0)
    if way == "layers":  # statistics of a run in training mode are others than those of both networks
        for name, buffer in merged.network.named_buffers():
            halves = both.a[name], both.b[name]
            buffer.copy_(torch.cat(halves) if buffer.ndim else halves[0])
    for network in (merged.network, merged.blocks()):
        assert relative(outputs(network, batches), mean(both)) < 1e-9
    assert {group: len(split.apart) for group, split in merged.splits.items()} == {
        group: both.found.spec.groups[group].size for group in both.groups
    }
    check_costs(both, merged)


def test_larger_budgets_come_nearer_to_the_mean_and_cost_what_they_may() -> None:
    both = far()
    errors = []
    for budget in (1.0, 1.25, 1.5, 1.75, 2.0):
        merged = both.merged(budget)
        check_costs(both, merged)
        share = merged.costs.flops / merged.costs.parent_flops
        assert budget - 0.12 < share <= budget
        assert relative(outputs(merged.blocks(), both.batches), outputs(merged.network, both.batches)) < 1e-12
        errors.append(float((outputs(merged.network, both.batches) - mean(both)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2] > 4 * errors[3]


def test_a_budget_of_parameters_is_one_of_parameters() -> None:
    both = near(measure="parameters", way="none")
    merged = both.merged(1.4)
    check_costs(both, merged)
    assert 1.3 < merged.costs.parameters / merged.costs.parent_parameters <= 1.4


def test_costs_may_be_those_of_dense_layers() -> None:
    both = near(dense=True, way="none")
    merged = both.merged(1.5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged.network(both.batches[0][0][0][:1])
    assert merged.costs.flops == counter.get_total_flops() <= 1.5 * merged.costs.parent_flops
    assert merged.costs.parameters == sum(p.numel() for p in merged.network.parameters())


def test_the_pairs_of_most_gain_stay_apart() -> None:
    both = near()
    for group, split in both.splits(1.5).items():
        gains = both.gains[group]
        if split.merged:
            assert gains[list(split.apart)].min() >= gains[list(split.merged)].max()


def test_heads_of_other_labels_give_both_networks_outputs() -> None:
    one, two = small(0, classes=5), small(1, classes=3)
    for how in ("activations", "weights"):
        both = pair(one, two, heads=("head",), match=how)
        merged = both.merged(2.0)
        expected = torch.cat([outputs(both.one, both.batches), outputs(both.two, both.batches)], 1)
        for network in (merged.network, merged.blocks()):
            assert outputs(network, both.batches).shape == (18, 8)
            assert relative(outputs(network, both.batches), expected) < 1e-9
        check_costs(both, merged)


@pytest.mark.parametrize("way", ["sequence", "layers"])
def test_heads_apart_cost_what_they_cost_where_the_budget_has_no_room_for_them(way: str) -> None:
    both = pair(small(0, classes=5), small(1, classes=3), heads=("head",), way=way)
    for budget in (1.0, 1.0001):
        merged = both.merged(budget)
        assert merged.splits == {}
        assert outputs(merged.network, both.batches).shape == (18, 8)
        check_costs(both, merged)
        assert merged.costs.flops - merged.costs.parent_flops == 2 * 3 * 10
        assert merged.costs.parameters - merged.costs.parent_parameters == 3 * 10 + 3
    assert both.merged(1.5).costs.flops <= 1.5 * both.merged(1.5).costs.parent_flops


def test_parents_are_left_as_they_are_and_the_same_work_gives_the_same_bits() -> None:
    one, two = small(0).train(), small(1).train()
    before = [copy.deepcopy(network.state_dict()) for network in (one, two)]
    results = []
    for _ in range(2):
        both = pair(one, two, sampling=Sampling(rows=100))
        results.append((both.merged(1.5), both.merged(1.5)))
    for network, state in zip((one, two), before, strict=True):
        assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
        assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    first, *others = [merged for pair_ in results for merged in pair_]
    for merged in others:
        assert merged.splits == first.splits
        assert merged.record == first.record
        assert all(torch.equal(x, first.network.state_dict()[n]) for n, x in merged.network.state_dict().items())
    assert not any(module.training for module in first.network.modules())
    other = pair(one, two, sampling=Sampling(rows=100, seed=1)).laid_out(first.splits).network.state_dict()
    assert not torch.equal(other["outer.weight"], first.network.state_dict()["outer.weight"])


@pytest.mark.parametrize("way", ["sequence", "layers"])
def test_less_memory_gives_the_same_network(way: str) -> None:
    whole = near(way=way).merged(1.5)
    for memory in (400_000, 280_000):
        parts = near(way=way, sampling=Sampling(memory_bytes=memory)).merged(1.5)
        assert parts.splits == whole.splits
        assert parts.refitted.residuals.keys() == whole.refitted.residuals.keys()
        for name, x in whole.network.state_dict().items():
            torch.testing.assert_close(parts.network.state_dict()[name], x, rtol=1e-10, atol=1e-10)


class Named(nn.Module):
    """Takes in and gives by name, as networks of text do; one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(11, 6), nn.Linear(6, 9)
        self.down, self.again, self.head = nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, *, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.words(ids) * mask[..., None]
        x = x + self.down(functional.gelu(self.up(x)))
        x = self.again(self.again(x).tanh()).tanh()
        return {"logits": self.head(x), "hidden": x}


def named(way: str) -> Pair:
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(Named().double())
    generator = torch.Generator().manual_seed(2)
    batches: list[Batch] = [
        ((), {"ids": torch.randint(11, (8, 5), generator=generator), "mask": torch.ones(8, 5, dtype=torch.float64)})
        for _ in range(3)
    ]

    def logits(result: Any) -> Any:
        return result["logits"]

    found = symmetries(networks[0], *batches[0], output=logits, check=False)
    return Pair(found, *networks, batches, output=logits, settings=Settings(way=way))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["sequence", "layers"])
def test_named_inputs_and_outputs_do_and_layers_that_run_twice_are_named(way: str) -> None:
    both = named(way)
    errors = []
    for budget in (1.0, 1.3):
        merged = both.merged(budget)
        assert merged.refitted.kept == {"again": "it runs 2 times"}
        assert list(merged.refitted.residuals) == ["up", "down", "head"]
        wanted, found = (torch.cat([n(**kwargs)["logits"] for _, kwargs in both.batches])
                         for n in (both.one, merged.network))  # fmt: skip
        assert found.shape == wanted.shape
        errors.append(merged.refitted.residuals["down"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            skipping_zeros(merged.blocks())(**{name: x[:1] for name, x in both.batches[0][1].items()})
        assert counter.get_total_flops() == merged.costs.flops <= budget * merged.costs.parent_flops
    assert errors[1] < errors[0]


def test_a_way_without_a_refit_is_the_block_average() -> None:
    both = near(way="none")
    merged = both.merged()
    assert merged.refitted.tensors == {}
    for name, x in both.one.named_parameters():
        expected = (x + both.two.get_parameter(name)) / 2
        torch.testing.assert_close(merged.network.get_parameter(name), expected, rtol=0, atol=1e-15)


def test_a_layer_with_a_blend_comes_as_near_to_it_as_its_inputs_let_it() -> None:
    merged = near(ridge=0.0).laid_out({}, blends={"head": lambda a, _: a})
    seen: list[Tensor] = []
    head = merged.network.get_submodule("head")
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wanted, found = (outputs(network, images()).numpy() for network in (near().one, merged.network))
    hook.remove()
    inputs = np.concatenate([torch.cat(seen).numpy(), np.ones((18, 1))], 1)
    best = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    np.testing.assert_allclose(found, best, atol=1e-9)
    missed = ((wanted - best) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
    assert merged.refitted.residuals["head"] == pytest.approx(missed, rel=1e-9)


def test_blends_are_for_the_way_that_goes_layer_by_layer() -> None:
    with pytest.raises(ParameterError, match="way is layers, and blends are for the way sequence"):
        near(way="layers").merged(blends={"head": lambda a, _: a})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"way": "both"}, "way is 'both'; it is sequence or layers or none"),
        ({"target": "mean"}, "target is 'mean'"),
        ({"measure": "flop"}, "measure is 'flop'; it is flops or parameters"),
        ({"match": "names"}, "match is 'names'"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": float("inf")}, "ridge is inf"),
        ({"ridge": float("nan")}, "ridge is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        Settings(**settings)


@pytest.mark.parametrize("budget", [0.99, 2.01, float("nan")])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(ParameterError, match="it is in"):
        near().merged(budget)


def test_networks_that_differ_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"head.weight is \(5, 10\) in A and \(3, 10\) in B"):
        pair(small(0), small(1, classes=3))
    other = small(1)
    other.outer = nn.Identity()
    with pytest.raises(ShapeError, match=r"only one of the networks has outer\.bias"):
        pair(small(0), other)


def test_what_is_no_head_is_refused() -> None:
    with pytest.raises(ParameterError, match="there is no head last") as refused:
        pair(small(0), small(1), heads=("last",))
    assert refused.value.hint == "the last linear layer is head"
    with pytest.raises(ParameterError, match=r"wide.weight makes no outputs of the network"):
        pair(small(0), small(1), heads=("wide",))


def test_no_batch_is_refused() -> None:
    one = small(0)
    with pytest.raises(ParameterError, match="there is no batch"):
        Pair(symmetries(one, *images()[0], check=False), one, small(1), [])

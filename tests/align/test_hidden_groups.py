"""Groups that no activation shows are matched by their weights, when the others are in order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_activations import Pair, mlp
from torch import Tensor, nn

from merganser.align.activations import ActivationCosts, activation_costs
from merganser.align.costs import DualCosts, WeightCosts
from merganser.align.match import match
from merganser.align.partial import Pair as Partial
from merganser.align.zipping import zip_networks


class Maxout(nn.Module):
    """The largest of three units: which is which shows in no product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.pieces, self.head = nn.Linear(6, 10), nn.Linear(10, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pieces(self.up(x).relu()).unflatten(-1, (8, 3)).amax(-1))


class Experts(nn.Module):
    """Mixtral: what its experts' hidden units do is in no tensor that a product of known axes takes in."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
        self.network = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        with torch.no_grad():
            for p in self.network.parameters():
                p.mul_(5)  # so that routes differ

    def forward(self, x: Tensor) -> Any:
        tokens = x.abs().mul(1000).long().remainder(30)
        return self.network(tokens, use_cache=False).logits


def maxout() -> tuple[nn.Module, tuple[int, ...]]:
    return Maxout(), (32, 6)


def experts() -> tuple[nn.Module, tuple[int, ...]]:
    return Experts(), (8, 7)


def seen_in(pair: Pair) -> ActivationCosts:
    return activation_costs(pair.found, pair.one, pair.two, pair.batches)


@pytest.mark.parametrize("make", [maxout, experts])
def test_a_permuted_copy_is_recovered_where_no_activation_shows_a_group(make) -> None:
    pair = Pair(make)
    seen, undone = seen_in(pair), pair.spec.inverse(pair.moved)
    assert seen.hidden()
    for costs in (seen, DualCosts(WeightCosts(pair.spec, pair.a, pair.b, "pearson"), seen, 0.1)):
        found = match(pair.spec, costs)
        assert found.settled
        assert all(torch.equal(found.orders[name], undone[name]) for name in undone)


def test_a_permuted_copy_with_hidden_groups_is_zipped_and_pleas_merged_into_the_network() -> None:
    pair = Pair(maxout)
    ((x,), _) = pair.batches[0]
    zipped = zip_networks(pair.found, [pair.one, pair.two], pair.batches)
    merged = Partial(pair.found, pair.one, pair.two, pair.batches).merged(1.0).network
    with torch.no_grad():
        for network in (zipped, merged):
            torch.testing.assert_close(network(x), pair.one(x), rtol=1e-3, atol=1e-4)


def test_hidden_groups_wait_for_the_others_and_take_the_best_order_by_weights_then() -> None:
    """From two networks that have nothing in common: the same as a start by what is shown, and weights after it."""
    pair = Pair(maxout)
    torch.manual_seed(5)
    other = Maxout().eval()
    seen = activation_costs(pair.found, pair.one, other, pair.batches)
    (inner,) = seen.hidden()
    outer = pair.spec.groups[inner].within
    found = match(pair.spec, seen).orders
    b = {n: x.detach() for n, x in other.state_dict().items()}
    pairs = WeightCosts(pair.spec, pair.a, b, "pearson").inner_units(inner, found)
    for place, (here, order) in enumerate(zip(found[outer].tolist(), found[inner], strict=True)):
        best = max(
            float(pairs[place, here][torch.arange(3), list(rows)].sum()) for rows in itertools.permutations(range(3))
        )
        assert float(pairs[place, here][torch.arange(3), order].sum()) == pytest.approx(best, rel=1e-12)


def test_where_activations_show_all_groups_weights_are_not_looked_at() -> None:
    pair = Pair(mlp)
    seen = seen_in(pair)
    assert seen.hidden() == []
    assert list(seen.meetings()) == [(one.part,) for shown in seen.shown.values() for one in shown]

"""What a partly merged network costs: what FlopCounterMode and a count of parameters say once it is built."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partial_networks import NETWORKS, WHOLE, Two, of, two
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from merganser.align.blocks import blocked, skipping_zeros
from merganser.align.cost import entries, flops, parameters, quadratic, sides
from merganser.align.layers import Layer, layers_of
from merganser.align.layout import Side, Split, places, widened
from merganser.align.wider import plan, widen
from merganser.errors import ParameterError
from merganser.symmetry.spec import Group, Spec

#: Networks whose units LayerNorm takes together, but for heads and hidden units.
ATTENTION = ("small-vit", "vit", "bert")


def measured(network: nn.Module, pair: Two) -> tuple[int, int]:
    """FLOPs and parameters, by a peer; its count knows attention where it is made of plain products."""
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # of switching a fused kernel off
        with torch.backends.mkldnn.flags(enabled=False), counter:
            pair.run(network)
    return counter.get_total_flops(), sum(p.numel() for p in network.parameters())


def layers(pair: Two) -> list[Layer]:
    return layers_of(pair.network, pair.spec, pair.args, pair.kwargs, taps=pair.found.taps)


def counts(splits: Mapping[str, Split]) -> dict[str, int]:
    return {group: len(split.apart) for group, split in splits.items()}


def costs(pair: Two, splits: Mapping[str, Split], **options: object) -> tuple[int, int]:
    found, apart = layers(pair), counts(splits)
    return flops(found, pair.spec, apart, **options), parameters(found, pair.spec, apart, **options)


def splits_of(name: str, every: bool) -> dict[str, Split]:
    pair = two(name)
    groups = [g for g in pair.outer() if name in WHOLE or "embed" not in g]
    return pair.all_apart(groups) if every else pair.some_apart(groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_network_costs_what_it_is_measured_to(name: str) -> None:
    assert costs(two(name), {}) == measured(two(name).network, two(name))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", [*WHOLE, *ATTENTION])
def test_a_network_in_blocks_costs_what_it_is_measured_to(name: str, every: bool) -> None:
    pair, splits = two(name), splits_of(name, every)
    wide = widen(pair.network, pair.spec, splits, pair.wide(splits))
    built = skipping_zeros(blocked(wide, plan(pair.network, pair.spec, splits)))
    assert costs(pair, splits) == measured(built, pair)
    assert costs(pair, splits, dense=True) == measured(wide, pair)


@pytest.mark.parametrize("name", WHOLE)
def test_with_everything_apart_it_multiplies_twice_as_much(name: str) -> None:
    pair = two(name)
    assert costs(pair, pair.all_apart())[0] == 2 * costs(pair, {})[0]


@pytest.mark.parametrize("every", [False, True])
def test_heads_of_two_label_spaces_cost_what_they_are_measured_to(every: bool) -> None:
    pair, splits = two("resnet"), splits_of("resnet", every)
    head = list(dict(pair.network.named_modules()))[-1]
    other = {
        n: torch.cat([x, x[:2]]) if n.startswith(f"{head}.") else x for n, x in pair.b.items()
    }  # seven classes, where A has five
    state = {n: widened(pair.spec, n, x, other[n], splits, [head]) for n, x in pair.a.items()}
    wide = widen(pair.network, pair.spec, splits, state, [head])
    built = skipping_zeros(blocked(wide, plan(pair.network, pair.spec, splits, {head: 7})))
    assert costs(pair, splits, heads={head: (5, 7)}) == measured(built, pair)
    assert costs(pair, splits, heads={head: (5, 7)}, dense=True) == measured(wide, pair)


@pytest.mark.parametrize("name", ["mlp", "resnet-group", "dense", "depthwise", "bert"])
def test_sides_are_those_of_the_places(name: str) -> None:
    pair, splits = two(name), splits_of(name, False)
    for parts in pair.spec.axes.values():
        for part in parts:
            side = places(pair.spec, part, splits).side
            expected = tuple(int((side == s).sum()) for s in (Side.FIRST, Side.BOTH, Side.SECOND))
            assert sides(pair.spec, part, counts(splits)) == expected


def test_entries_by_a_loop_over_rows_and_columns() -> None:
    rows, columns = (2, 3, 4), (5, 1, 6)
    whose = [[side for side, count in zip("AmB", some, strict=True) for _ in range(count)] for some in (rows, columns)]
    assert entries(rows, columns) == sum({r, c} != {"A", "B"} for r in whose[0] for c in whose[1])


@given(st.integers(1, 40), st.integers(1, 40), st.data())
@settings(max_examples=50, deadline=None)
def test_entries_are_the_authors_formula(d_o: int, d_i: int, data: st.DataObject) -> None:
    s_o, s_i = data.draw(st.integers(0, d_o)), data.draw(st.integers(0, d_i))
    r_o, r_i = Fraction(s_o, d_o), Fraction(s_i, d_i)
    assert entries((s_o, d_o - s_o, s_o), (s_i, d_i - s_i, s_i)) == d_i * d_o * (1 + r_i + r_o - r_i * r_o)


class Crossed(nn.Module):
    """Attention of one sequence to a longer one: slices of one weight at different numbers of places."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, torch.cat([x, x + 1, x - 1], 1), torch.cat([x, x, x], 1))[0]


class Twice(nn.Module):
    """One layer twice, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.three.weight = self.two.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(functional.relu(self.two(functional.relu(self.one(functional.relu(self.one(x)))))))


def upsampling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, stride=2))


def normalised() -> nn.Module:
    hidden = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    return nn.Sequential(hidden, nn.ReLU(), nn.Linear(5, 6))


MORE = {
    "crossed": (Crossed, (2, 5, 8)),
    "twice": (Twice, (3, 6)),
    "upsampling": (upsampling, (2, 3, 6, 6)),
    "weight-norm": (normalised, (4, 6)),
    "lstm": (lambda: nn.LSTM(4, 5, batch_first=True), (2, 3, 4)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), (2, 3, 9)),
}


@pytest.mark.parametrize("name", MORE)
def test_weights_that_no_layer_of_their_own_multiplies_count_once(name: str) -> None:
    make, shape = MORE[name]
    torch.manual_seed(0)
    pair = of(make(), (torch.randn(shape),))
    assert costs(pair, {}) == measured(pair.network, pair)
    found = layers(pair)
    weights = [layer.weight for layer in found if layer.weight is not None]
    assert len(weights) == len(set(weights))
    if name in ("crossed", "lstm"):
        assert not any(layer.kind == "linear" for layer in found)


def test_a_layer_that_runs_twice_counts_twice_and_is_stored_once() -> None:
    torch.manual_seed(0)
    pair = of(Twice(), (torch.randn(3, 6),))
    by_name = {layer.name: layer for layer in layers(pair)}
    assert by_name["one"].positions == 6
    assert by_name["two.weight"].kind == "product"  # two modules hold it: it is not built as blocks
    assert by_name["two.weight"].positions == 6


def test_products_of_attention_grow_with_its_heads() -> None:
    pair = two("small-vit")
    heads = [g for g in pair.outer() if pair.spec.groups[g].size == 3]
    own = [layer for layer in layers(pair) if layer.kind == "activations"]
    patches, size, examples = 4, 4, 2
    once = 2 * examples * 3 * patches**2 * size
    assert len(own) == 4
    assert [flops([layer], pair.spec, {}) for layer in own] == [once] * 4
    assert flops(own, pair.spec, dict.fromkeys(heads, 2)) == 4 * once * 5 // 3
    alone = layers_of(pair.network, pair.spec, pair.args, pair.kwargs)
    assert flops([x for x in alone if x.kind == "activations"], pair.spec, dict.fromkeys(heads, 2)) == 4 * once


@pytest.mark.parametrize("measure", ["flops", "parameters"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["resnet", "depthwise", "small-vit"])
def test_the_polynomial_is_the_cost(name: str, dense: bool, measure: str) -> None:
    pair, found, rng = two(name), layers(two(name)), np.random.default_rng(0)
    groups = list(splits_of(name, True))
    head = [layer for layer in found if layer.kind == "linear"][-1]
    heads = {head.name: (int(head.rows) + 1, int(head.rows))}
    count = flops if measure == "flops" else parameters
    poly = quadratic(found, pair.spec, groups, measure, heads=heads, dense=dense)
    assert poly.original == count(found, pair.spec, {})
    sizes = np.array([pair.spec.groups[g].size for g in groups])
    for _ in range(5):
        apart = rng.integers(0, sizes + 1)
        chosen = dict(zip(groups, apart.tolist(), strict=True))
        assert poly.at(apart) == count(found, pair.spec, chosen, heads=heads, dense=dense)
        ahead, behind = (
            np.array([poly.at(apart + step * unit) for unit in np.eye(len(groups))]) for step in (0.5, -0.5)
        )
        assert np.allclose(poly.slope(apart), ahead - behind, rtol=1e-9)


def crossing() -> tuple[Spec, list[Layer]]:
    """Two groups along one another, and an inner one."""
    groups = {"a": Group(3), "b": Group(2), "in": Group(4, "a"), "still": Group(2, fixed=True)}
    axes = {"w": ({"product": ["a", "b"]}, 5), "v": ({"product": ["a", "in"]}, 5)}
    spec = Spec(groups, axes, dict.fromkeys(axes, ("producer", "consumer")), {})
    return spec, [Layer(n, "linear", n, *axes[n]) for n in axes]


def test_two_groups_along_one_another_are_refused() -> None:
    spec, found = crossing()
    assert flops(found, spec, {"a": 1, "b": 0}) == 0
    with pytest.raises(ParameterError, match="a and b lie along one another"):
        parameters(found, spec, {"a": 1, "b": 1})
    with pytest.raises(ParameterError, match="a and b lie along one another"):
        quadratic(found, spec, ["a", "b"])


@pytest.mark.parametrize(
    ("apart", "message"),
    [
        ({"in": 1}, "in is no group"),
        ({"still": 1}, "still is no group"),
        ({"other": 1}, "other is no group"),
        ({"a": 4}, "4 units of a cannot be kept apart; it has 3"),
        ({"a": -1}, "-1 units of a"),
    ],
)
def test_units_that_cannot_be_apart_are_refused(apart: dict[str, int], message: str) -> None:
    spec, found = crossing()
    with pytest.raises(ParameterError, match=message):
        flops(found, spec, apart)


def test_heads_that_are_none_are_refused() -> None:
    spec, found = crossing()
    with pytest.raises(ParameterError, match="nothing is no head"):
        flops(found, spec, {}, heads={"nothing": (3, 4)})
    with pytest.raises(ParameterError, match="the outputs of v are units of a"):
        quadratic(found, spec, ["a"], heads={"v": (3, 4)})

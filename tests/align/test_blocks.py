"""Three products are the dense layer: outputs, gradients; and as few parameters and FLOPs as are counted by hand."""

from __future__ import annotations

import copy
import itertools
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partial_networks import NETWORKS, TRANSFORMERS, WHOLE, Two, free, relative, two
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from merganser.align.blocks import BlockConv, BlockLinear, blocked, skipping_zeros
from merganser.align.cost import flops, parameters
from merganser.align.layers import layers_of
from merganser.align.layout import Split
from merganser.align.ways import Way
from merganser.align.wider import Record, plan, widen
from merganser.errors import ParameterError

A, M, B = 1, 0, 2


def masked(weight: Tensor, rows: list[list[int]], columns: list[list[int]]) -> Tensor:
    """Zero where a row of one network meets a column of the other."""
    of_rows, of_columns = ([side for side, count in runs for _ in range(count)] for runs in (rows, columns))
    kept = weight.detach().clone()
    for i, j in itertools.product(range(len(of_rows)), range(len(of_columns))):
        if {of_rows[i], of_columns[j]} == {A, B}:
            kept[i, j] = 0
    return kept


def convolution(kind: Any, rows: list[list[int]], columns: list[list[int]], **options: Any) -> Any:
    torch.manual_seed(0)
    layer = kind(sum(n for _, n in columns), sum(n for _, n in rows), **options).double()
    layer.weight.data = masked(layer.weight, rows, columns)
    return layer


def linear(rows: list[list[int]], columns: list[list[int]], bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(sum(n for _, n in columns), sum(n for _, n in rows), bias).double()
    layer.weight.data = masked(layer.weight, rows, columns)
    return layer


RUNS = st.lists(st.tuples(st.sampled_from([A, M, B]), st.integers(1, 3)).map(list), min_size=1, max_size=5)


@settings(max_examples=50)
@given(rows=RUNS, columns=RUNS, bias=st.booleans())
def test_any_runs_of_sides_give_what_the_dense_layer_gives(rows: Any, columns: Any, bias: bool) -> None:
    dense = linear(rows, columns, bias)
    block = BlockLinear(dense, rows, columns)
    x = torch.randn(2, 3, dense.in_features, dtype=torch.float64)
    for block.way in (Way.BLOCKS, Way.DENSE):
        torch.testing.assert_close(block(x), dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(block.weight, dense.weight)
    per_row = {side: sum(n for s, n in columns if {s, side} != {A, B}) for side in (A, M, B)}
    expected = sum(n * per_row[side] for side, n in rows) + (dense.out_features if bias else 0)
    assert sum(p.numel() for p in block.parameters()) == expected


ORDERED = [[A, 2], [M, 3], [B, 2]]
MIXED = [[A, 1], [M, 2], [B, 1], [M, 1], [A, 2], [B, 2]]
HALVES = [[A, 16], [B, 16]]


@pytest.mark.parametrize(
    ("kind", "options", "sides"),
    [
        (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}, (7, 8)),
        (nn.Conv2d, {"kernel_size": (3, 1), "padding": "same", "bias": False}, (5, 4)),
        (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "dilation": (2, 1), "padding_mode": "circular"}, (6, 5)),
        (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (6, 5)),
        (nn.Conv1d, {"kernel_size": 3, "padding": 2, "dilation": 2}, (9,)),
        (nn.Conv1d, {"kernel_size": 4, "padding": 1, "stride": 3, "padding_mode": "replicate"}, (9,)),
    ],
)
@pytest.mark.parametrize(
    ("rows", "columns", "way"),
    [
        (ORDERED, ORDERED, Way.BLOCKS),
        (ORDERED, ORDERED, Way.DENSE),
        (ORDERED, MIXED, Way.BLOCKS),
        (MIXED, MIXED, Way.DENSE),
        (HALVES, HALVES, Way.GROUPS),
    ],
)
def test_convolutions_in_blocks_are_the_dense_ones(
    kind: Any, options: Any, sides: Any, rows: Any, columns: Any, way: Way
) -> None:
    dense = convolution(kind, rows, columns, **options)
    x = torch.randn(2, dense.in_channels, *sides, dtype=torch.float64)
    block = BlockConv(dense, rows, columns)
    if way is Way.GROUPS:
        assert block.way is way
    block.way = way
    torch.testing.assert_close(block(x), dense(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x[0]), dense(x[0]), rtol=1e-12, atol=1e-12)  # one example without its axis
    assert block(x[:0]).shape == dense(x[:0]).shape
    assert torch.equal(block.weight, dense.weight)


@pytest.mark.parametrize(
    "runs", [[[B, 16], [A, 16]], [[A, 16], [B, 32]], [[A, 12], [B, 12]], [[A, 16], [M, 1], [B, 16]]]
)
def test_other_halves_are_no_groups(runs: Any) -> None:
    dense = convolution(nn.Conv1d, runs, runs, kernel_size=3)
    block, x = BlockConv(dense, runs, runs), torch.randn(2, dense.in_channels, 5, dtype=torch.float64)
    assert block.way is not Way.GROUPS
    torch.testing.assert_close(block(x), dense(x), rtol=1e-12, atol=1e-12)


def test_a_convolution_of_which_some_outputs_read_nothing_is_refused() -> None:
    with pytest.raises(ParameterError, match="some outputs of a convolution read none of its inputs"):
        BlockConv(nn.Conv1d(4, 7, 3), ORDERED, [[B, 4]])


@pytest.mark.parametrize("way", [Way.BLOCKS, Way.DENSE])
def test_gradients_of_blocks_are_those_of_the_dense_layers_entries(way: Way) -> None:
    dense = linear(ORDERED, ORDERED)
    block = BlockLinear(dense, ORDERED, ORDERED)
    block.way = way
    x = torch.randn(4, 7, dtype=torch.float64)
    for layer in (dense, block):
        layer(x).square().sum().backward()
    assert dense.weight.grad is not None
    gradient = block.first_weight.grad, block.both_weight.grad, block.second_weight.grad
    expected = dense.weight.grad[:2, :5], dense.weight.grad[2:5], dense.weight.grad[5:, 2:]
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.bias.grad, dense.bias.grad, rtol=1e-12, atol=1e-12)


def test_gradients_of_two_groups_are_those_of_the_dense_layers_entries() -> None:
    dense = convolution(nn.Conv1d, HALVES, HALVES, kernel_size=3)
    block, x = BlockConv(dense, HALVES, HALVES), torch.randn(2, 32, 5, dtype=torch.float64)
    for layer in (dense, block):
        layer(x).square().sum().backward()
    assert dense.weight.grad is not None
    torch.testing.assert_close(block.first_weight.grad, dense.weight.grad[:16, :16], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.second_weight.grad, dense.weight.grad[16:, 16:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("runs", "names"), [(ORDERED, ["first", "both", "second"]), (HALVES, ["first", "second"])])
def test_what_is_stored_is_the_same_in_all_ways(runs: Any, names: list[str]) -> None:
    block = BlockConv(convolution(nn.Conv2d, runs, runs, kernel_size=1), runs, runs)
    x, state = torch.randn(2, block.in_channels, 3, 3, dtype=torch.float64), block.state_dict()
    assert list(state) == ["bias", *(f"{name}_weight" for name in names)]
    other = copy.deepcopy(block)
    other.load_state_dict({name: 2 * value for name, value in state.items()})
    torch.testing.assert_close(other(x), 2 * block(x), rtol=1e-12, atol=1e-12)  # nothing is kept of what was there
    before, block.way = block(x), Way.BLOCKS
    assert list(block.state_dict()) == list(state)
    torch.testing.assert_close(block(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("runs", "way"), [(ORDERED, Way.BLOCKS), (ORDERED, Way.DENSE), (HALVES, Way.GROUPS)])
def test_channels_last_stays_so_in_all_types(runs: Any, way: Way, dtype: torch.dtype) -> None:
    last = torch.channels_last
    dense = convolution(nn.Conv2d, runs, runs, kernel_size=3).to(dtype=dtype, memory_format=last)
    block = BlockConv(dense, runs, runs)
    block.way = way
    x = torch.randn(2, dense.in_channels, 5, 6, dtype=dtype).contiguous(memory_format=last)
    found, tolerance = block(x), 4 * torch.finfo(dtype).eps
    assert found.is_contiguous(memory_format=last)
    torch.testing.assert_close(found, dense(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(block(x), found)


def splits_of(name: str, which: str) -> dict[str, Split]:
    it = two(name)
    return it.some_apart(free(name)) if which == "some" else it.all_apart(free(name))


def measured(it: Two, network: nn.Module) -> tuple[int, int]:
    """FLOPs of a run, and parameters; attention by matrix products, since fused kernels on a CPU are not counted."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(*it.args, **it.kwargs)
    return counter.get_total_flops(), sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("which", ["some", "all"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_blocks_gives_the_same_and_costs_what_was_counted(name: str, which: str) -> None:
    it = two(name)
    splits = splits_of(name, which)
    dense = widen(it.network, it.spec, splits, it.wide(splits))
    record = plan(it.network, it.spec, splits)
    block = skipping_zeros(blocked(dense, record))
    for network in (block, blocked(dense, record)):
        assert relative(it.run(network), it.run(dense)) < 1e-12
    layers = layers_of(it.network, it.spec, it.args, it.kwargs, taps=it.found.taps)
    apart = {group: len(split.apart) for group, split in splits.items()}
    for network, options in ((block, {}), (dense, {"dense": True})):
        counted = flops(layers, it.spec, apart, **options), parameters(layers, it.spec, apart, **options)
        assert measured(it, network) == counted
    if name in WHOLE:  # the rest has a stream that stays merged on one side of every layer
        assert any(isinstance(m, BlockLinear | BlockConv) for m in block.modules())
    assert not any(isinstance(m, BlockLinear | BlockConv) for m in dense.modules())


def test_all_apart_costs_twice_and_densely_four_times_as_much_between_hidden_layers() -> None:
    it = two("mlp")
    splits = it.all_apart()
    dense: Any = widen(it.network, it.spec, splits, it.wide(splits))
    block: Any = blocked(dense, plan(it.network, it.spec, splits))
    own = prod(it.a["layers.1.weight"].shape)
    assert dense.layers[1].weight.numel() == 4 * own
    assert sum(p.numel() for n, p in block.layers[1].named_parameters() if n != "bias") == 2 * own
    assert block.layers[1].both_weight is None
    assert isinstance(block.layers[0], nn.Linear)  # nothing of it is zero


def test_small_products_are_of_zeros_too_and_store_none() -> None:
    it = two("mlp")
    splits = it.some_apart()
    dense = widen(it.network, it.spec, splits, it.wide(splits))
    record = plan(it.network, it.spec, splits)
    (exact, few), (faster, same), (whole, _) = (
        measured(it, network) for network in (skipping_zeros(blocked(dense, record)), blocked(dense, record), dense)
    )
    assert exact < faster == whole
    assert few == same


def test_networks_whose_streams_are_merged_have_no_blocks_of_zeros() -> None:
    for name in TRANSFORMERS:
        it = two(name)
        assert plan(it.network, it.spec, splits_of(name, "all")).sides == {}


class Doubled(nn.Conv1d):
    """Computes something else, by a method that `forward` calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class Mixed(nn.Module):
    """Layers that become blocks, and some of each kind that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.again = nn.Linear(7, 7), nn.Linear(7, 7)
        self.tied, self.other = nn.Linear(7, 7), nn.Linear(7, 7)
        self.other.weight = self.tied.weight
        self.hooked, self.named = nn.Linear(7, 7), nn.utils.parametrizations.weight_norm(nn.Linear(7, 7))
        self.hooked.register_forward_hook(lambda module, given, result: 2 * result)
        self.another, self.patched = Doubled(7, 7, 1), nn.Linear(7, 7)
        self.patched.forward = lambda x: x  # type: ignore[method-assign]
        self.grouped, self.turned = nn.Conv1d(14, 14, 1, groups=2), nn.ConvTranspose1d(7, 7, 1)
        self.also = self.plain


def test_layers_that_cannot_be_blocks_stay_dense() -> None:
    network = Mixed().double()
    names = [name for name, _ in network.named_children()] + ["also"]
    found: Any = blocked(network, Record(sides={name: [ORDERED, ORDERED] for name in names}))
    kinds = {name: isinstance(getattr(found, name), BlockLinear | BlockConv) for name in names}
    assert kinds == {name: name in ("plain", "again", "also") for name in names}
    assert found.also is found.plain
    assert found.plain.training
    assert isinstance(network.plain, nn.Linear)  # left as it is
    assert found.tied.weight is found.other.weight


def test_a_network_that_is_one_layer_becomes_one_block() -> None:
    dense = linear(ORDERED, ORDERED).eval()
    block = blocked(dense, Record(sides={"": [ORDERED, ORDERED]}))
    assert isinstance(block, BlockLinear)
    assert not block.training


def test_layouts_of_another_network_are_refused() -> None:
    with pytest.raises(ParameterError, match="a layer nobody, and the network has none"):
        blocked(nn.Linear(7, 7), Record(sides={"nobody": [ORDERED, ORDERED]}))
    with pytest.raises(ParameterError, match=r"sides are of 6 places, and the weight is \(7, 7\)"):
        BlockLinear(nn.Linear(7, 7), ORDERED, [[A, 6]])


def test_a_block_tells_its_sides() -> None:
    block = BlockLinear(linear(ORDERED, [[M, 4], [B, 1]]), ORDERED, [[M, 4], [B, 1]])
    assert block.extra_repr() == "rows=2 first+3 both+2 second, columns=4 both+1 second"

"""The wider network is the mean of both where all is apart, of their weights where nothing is; and can be rebuilt."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from partial_networks import NETWORKS, WHOLE, free, of, relative, two
from torch import Tensor, nn

from merganser.align.layout import Split, widened
from merganser.align.wider import Record, filled, plan, rewidened, stretches, widen
from merganser.errors import ExtraTensorError, MissingTensorError, ParameterError, ShapeError
from merganser.symmetry import Group, Spec


def dtype_and_shape(state: dict[str, Tensor]) -> dict[str, Any]:
    return {n: (x.dtype, tuple(x.shape)) for n, x in state.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_merged_with_a_permuted_copy_of_itself_is_itself(name: str) -> None:
    it = two(name)
    orders = it.spec.random(torch.Generator().manual_seed(3))
    copy = {n: it.spec.apply(orders, n, x) for n, x in it.a.items()}
    back = it.spec.inverse(orders)
    matched = {n: it.spec.apply(back, n, x) for n, x in copy.items()}
    for splits in ({}, it.some_apart(free(name)), it.all_apart(free(name))):
        wide = widen(it.network, it.spec, splits, it.wide(splits, matched))
        assert relative(it.run(wide), it.outputs(copy)) < 1e-12


@pytest.mark.parametrize("name", WHOLE)
def test_all_units_apart_give_the_mean_of_both_networks(name: str) -> None:
    it = two(name)
    splits = it.all_apart()
    mean = (it.outputs(it.a) + it.outputs(it.b)) / 2
    assert relative(it.run(widen(it.network, it.spec, splits, it.wide(splits))), mean) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_no_units_apart_give_the_mean_of_the_weights(name: str) -> None:
    it = two(name)
    wide = widen(it.network, it.spec, {}, it.wide({}))
    means = {n: (x + it.b[n]) / 2 if x.is_floating_point() else x for n, x in it.a.items()}
    assert torch.equal(it.run(wide), it.outputs(means))
    assert dtype_and_shape(dict(wide.state_dict())) == dtype_and_shape(it.a)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_record_as_json_builds_the_network_again(name: str) -> None:
    it = two(name)
    splits = it.some_apart(free(name))
    state = it.wide(splits)
    wide = widen(it.network, it.spec, splits, state)
    record = Record.from_json(json.loads(json.dumps(plan(it.network, it.spec, splits).as_json())))
    again = rewidened(it.network, record)
    assert all(not x.any() for n, x in again.state_dict().items() if n in record.shapes)
    assert torch.equal(it.run(filled(again, state)), it.run(wide))
    assert all(torch.equal(x, it.a[n]) for n, x in it.network.state_dict().items())  # left as it is


def test_modules_know_their_new_sizes() -> None:
    it = two("depthwise")
    splits = {"up": Split(6, (0, 3)), "stem": Split(4, (1,))}
    wide = widen(it.network, it.spec, splits, it.wide(splits))
    up, each, twice, down, head = wide.up, wide.each, wide.twice, wide.down, wide.head
    assert (up.in_channels, up.out_channels, wide.norm.num_features) == (5, 8, 8)
    assert (each.in_channels, each.out_channels, each.groups) == (8, 8, 8)
    assert (twice.in_channels, twice.out_channels, twice.groups) == (8, 16, 8)
    assert (down.in_channels, down.out_channels, head.in_features, head.out_features) == (16, 5, 5, 5)
    norm = widen_one("resnet-group", "conv", (0,)).norm
    assert (norm.num_channels, norm.num_groups) == (8, 4)


def widen_one(name: str, group: str, apart: tuple[int, ...]) -> Any:
    it = two(name)
    splits = {group: Split(it.spec.groups[group].size, apart)}
    return widen(it.network, it.spec, splits, it.wide(splits))


def test_attention_knows_its_new_number_of_heads() -> None:
    attention = (
        widen_one("bert", "bert.encoder.layer.0.attention.self.query", (1,)).bert.encoder.layer[0].attention.self
    )
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (5, 8, 40)
    vit = widen_one("small-vit", "blocks.1.q", (0, 2))
    assert (vit.blocks[0].heads, vit.blocks[1].heads) == (3, 5)


def test_tied_tensors_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.one(x)) + torch.tanh(self.two(x)))

    it = of(Tied(), (torch.randn(4, 3),))
    splits = it.all_apart()
    wide: Any = widen(it.network, it.spec, splits, it.wide(splits))
    assert wide.one.weight is wide.two.weight
    assert relative(it.run(wide), (it.outputs(it.a) + it.outputs(it.b)) / 2) < 1e-12


def test_heads_that_are_apart_give_the_outputs_of_both() -> None:
    one, other = two("resnet"), of(*NETWORKS["resnet"]())
    other.network.project = nn.Linear(16, 3).double()
    b = {n: x.detach() for n, x in other.network.state_dict().items()}
    splits = one.all_apart()
    state = {n: widened(one.spec, n, x, b[n], splits, ["project"]) for n, x in one.a.items()}
    wide: Any = widen(one.network, one.spec, splits, state, ["project"])
    expected = torch.cat([one.outputs(one.a), one.run(other.network)], 1)
    assert relative(one.run(wide), expected) < 1e-12
    assert wide.project.out_features == 8
    record = plan(one.network, one.spec, splits, {"project": 3})
    assert record.as_json()["heads"] == {"project": (5, 3)}
    assert record.sides["project"] == [[[1, 5], [2, 3]], [[1, 16], [2, 16]]]


def test_states_that_do_not_fit_are_refused() -> None:
    it = two("mlp")
    splits = it.some_apart()
    state = it.wide(splits)
    with pytest.raises(MissingTensorError, match=r"lacks layers\.0\.bias"):
        widen(it.network, it.spec, splits, {n: x for n, x in state.items() if n != "layers.0.bias"})
    with pytest.raises(ExtraTensorError, match=r"the state has more \(and 1 more\)"):
        widen(it.network, it.spec, splits, state | {"more": torch.zeros(1), "still": torch.zeros(1)})
    with pytest.raises(ShapeError, match=r"layers\.0\.weight is \(6, 192\), and the wider network's \(9, 192\)"):
        widen(it.network, it.spec, splits, state | {"layers.0.weight": it.a["layers.0.weight"]})


def test_records_of_another_network_are_refused() -> None:
    it, other = two("mlp"), two("vgg")
    with pytest.raises(ParameterError, match="and the network has no such tensor"):
        rewidened(it.network, plan(other.network, other.spec, other.some_apart()))
    with pytest.raises(ParameterError, match=r"layers\.0\.heads, and the network has none"):
        rewidened(it.network, Record({"layers.0": {"heads": 3}}))
    with pytest.raises(ShapeError, match="the symmetries are those of one of"):
        plan(type(it.network)(image=8, hidden=7, depth=2, width=5), it.spec, {})
    with pytest.raises(ParameterError, match="there is no head of"):
        plan(it.network, it.spec, {}, {"of": 3})


def test_a_tied_tensor_of_two_shapes_is_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    network[1].weight = network[0].weight
    with pytest.raises(ParameterError, match="would be of another shape"):
        rewidened(network, Record(shapes={"0.weight": (4, 3), "1.weight": (3, 4)}))


EMPTY = {"attributes": {}, "shapes": {}, "sides": {}, "heads": {}}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        EMPTY | {"attributes": {"a": {"groups": True}}},
        EMPTY | {"attributes": {"a": {"groups": "4"}}},
        EMPTY | {"attributes": {"a": 3}},
        EMPTY | {"shapes": {"a": [-1]}},
        EMPTY | {"shapes": {"a": [1.5]}},
        EMPTY | {"sides": {"a": [[[1, 2]]]}},
        EMPTY | {"sides": {"a": [[[3, 2]], []]}},
        EMPTY | {"heads": {"a": [1]}},
    ],
)
def test_what_is_no_record_is_refused(content: Any) -> None:
    with pytest.raises(ParameterError, match="this is no layout"):
        Record.from_json(content)


def test_stretches_of_channels_and_heads_are_counted() -> None:
    spec = Spec({"g": Group(4), "i": Group(3, within="g"), "h": Group(6)}, {}, {}, {})
    wider = Spec(spec.groups | {"g": Group(5), "h": Group(8)}, {}, {}, {})
    heads = {"product": ["g", "i"]}
    assert stretches(spec, wider, heads, 3) == 5
    assert stretches(spec, wider, {"sum": [heads, heads, 6]}, 3) == 5 + 5 + 2
    assert stretches(spec, wider, {"product": ["g", 2, "i"]}, 6) == 5
    assert stretches(spec, wider, {"product": ["g", 2, "i"]}, 3) == 10
    assert stretches(spec, wider, {"product": [2, "h"]}, 6) == 2  # each of them is wider
    assert stretches(spec, wider, "h", 1) == 8
    assert stretches(spec, wider, "h", 6) == 1
    with pytest.raises(ParameterError, match="groups of 2 that do not stay whole"):
        stretches(spec, wider, "h", 2)

"""What can be split is told from what cannot, with the reason; a wrong role or a hard-coded size is never believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from partial_networks import NETWORKS, Two, free, of, reasons_of, two
from torch import Tensor, nn

from merganser.align.layout import Split
from merganser.align.separable import fault, separable
from merganser.errors import ParameterError


def judged(it: Two, **options: Any) -> dict[str, str | None]:
    return separable(it.found, it.network, it.args, it.kwargs, **options)


#: The one stream, or the two, that a norm goes across.
STREAMS = {
    "small-vit": {"embed_patches": r"changed by .*: blocks\.0\.norm1 normalises its units together"},
    "vit": {"vit.embeddings.patch_embeddings.projection": r"what axis 2 of vit\.embeddings\.cls_token does is unknown"},
    "bert": {
        "bert.embeddings.word_embeddings": r"changed by .*: bert\.embeddings\.LayerNorm normalises its units together"
    },
    "convnext": {
        "convnext.embeddings.patch_embeddings": r"convnext\.embeddings\.layernorm normalises its units together",
        "convnext.encoder.stages.1.downsampling_layer.1": r"stages\.1\.layers\.0\.layernorm normalises its units",
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_but_streams_that_a_norm_goes_across_can_be_split(name: str) -> None:
    it = two(name)
    found = reasons_of(name)
    assert list(found) == it.outer()
    reasons = {group: why for group, why in found.items() if why is not None}
    assert reasons.keys() == STREAMS.get(name, {}).keys()
    for group, words in STREAMS.get(name, {}).items():
        with pytest.raises(ValueError, match=words):
            raise ValueError(reasons[group])
    assert free(name)
    assert fault(it.spec, it.network, it.all_apart(free(name)), it.args, it.kwargs) is None


class Net(nn.Module):
    """Two layers with something between them, and a second weight where it is asked for."""

    def __init__(self, between: Any, hidden: int = 6, inputs: int = 3, read: int = 0) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(inputs, hidden), nn.Linear(read or hidden, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.one(x)))


def net(between: Any, **sizes: int) -> Two:
    torch.manual_seed(0)
    return of(Net(between, **sizes), (torch.randn(5, 3),))


@pytest.mark.parametrize(
    ("between", "sizes", "words"),
    [
        (lambda x: x.softmax(-1), {}, "the output changed by"),
        (lambda x: x / x.norm(dim=-1, keepdim=True), {}, "the output changed by"),
        (lambda x: x / x.abs().amax(-1, keepdim=True), {}, "the output changed by"),  # twins have one maximum
        (nn.GroupNorm(1, 6, affine=False), {}, "the output changed by"),
        (nn.LayerNorm(6), {}, "the output changed by .*: between normalises its units together"),
        (lambda x: x.reshape(5, 6) * 2, {}, "the wider network cannot be run: RuntimeError: shape"),
        (nn.PReLU(6), {}, r"what axis 0 of between\.weight does is unknown"),
        (lambda x: x.view(-1, 2, 3).amax(1), {"read": 3}, "the output is of another shape|cannot be run"),
    ],
)
def test_units_that_see_each_other_or_sizes_that_are_hard_coded_are_reported(
    between: Any, sizes: dict[str, int], words: str
) -> None:
    it = net(between, **sizes)
    assert it.outer()
    for why in judged(it).values():
        with pytest.raises(ValueError, match=words):
            raise ValueError(why)


def test_products_of_two_units_are_not_separable() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 6), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.one(x) * self.other(x)).sum(-1)

    ((_, why),) = judged(of(Towers(), (torch.randn(5, 3),))).items()
    assert why is not None
    assert "the output changed by" in why


def test_halves_that_are_cut_in_the_middle_are_not_separable_although_both_may_grow_alike() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.up, self.down = nn.Linear(3, 12), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            up, down = torch.tanh(self.one(x)).chunk(2, -1)
            return self.up(up) * self.down(down)

    it = of(Halves(), (torch.randn(5, 3),))
    both = it.all_apart()
    assert len(both) == 2
    assert fault(it.spec, it.network, both, it.args) is None
    assert all(why is not None and "cannot be run" in why for why in judged(it).values())


def test_one_weight_in_two_roles_is_not_separable() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight.T) @ self.weight

    ((_, why),) = judged(of(Tied(), (torch.randn(5, 3),))).items()
    assert why is not None
    assert "the output changed by" in why


def test_two_groups_of_one_product_can_be_split_each_and_not_together() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.columns = nn.Linear(3, 4), nn.Linear(3, 5)
            self.last = nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows, columns = torch.tanh(self.rows(x)), torch.tanh(self.columns(x))
            return self.last((rows[:, :, None] + columns[:, None]).flatten(1))

    it = of(Grid(), (torch.randn(5, 3),))
    assert it.spec.axes["last.weight"][1] == {"product": ["rows", "columns"]}
    found = judged(it)
    why = fault(it.spec, it.network, it.some_apart(), it.args)
    assert found == {"rows": None, "columns": None}
    assert why is not None
    assert "rows and columns are both split" in why


@pytest.mark.parametrize(("tensor", "role"), [("one.weight", "consumer"), ("last.weight", "scale")])
def test_a_wrong_role_is_not_believed(tensor: str, role: str) -> None:
    it = net(torch.tanh)
    assert judged(it) == {"one": None}
    axis = it.spec.axes[tensor].index("one")
    roles = [*it.spec.roles[tensor]]
    roles[axis] = role
    found = replace(it.found, spec=replace(it.spec, roles={**it.spec.roles, tensor: tuple(roles)}))
    (why,) = separable(found, it.network, it.args).values()
    assert why is not None
    assert "the output changed by" in why


def test_groups_that_are_no_symmetry_are_not_believed() -> None:
    it = net(torch.tanh)
    axes = {**it.spec.axes, "one.bias": (6,)}
    (why,) = separable(replace(it.found, spec=replace(it.spec, axes=axes)), it.network, it.args).values()
    assert why is not None
    assert "cannot be run" in why


@pytest.mark.parametrize("name", ["resnet-group", "small-vit"])
def test_the_network_is_left_as_it_is_and_the_answer_the_same(name: str) -> None:
    it = two(name)
    before = {n: x.clone() for n, x in it.network.state_dict().items()}
    state = torch.random.get_rng_state()
    assert judged(it, seed=4) == judged(it, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, before[n]) for n, x in it.network.state_dict().items())


def test_only_the_outputs_that_count_are_compared() -> None:
    class Showing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.one(x))
            return self.last(hidden), hidden.amax(-1)

    it = of(Showing(), (torch.randn(5, 3),))
    (why,) = judged(it).values()
    assert why is not None
    assert judged(it, output=lambda result: result[0]) == {"one": None}


def test_splits_of_another_network_are_a_fault() -> None:
    it = two("mlp")
    why = fault(it.spec, it.network, {"layers.0": Split(7, (0,))}, it.args)
    assert why == "layers.0 has 6 units, and its split is one of 7"


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    it = net(torch.tanh)
    it.network.kept = torch.ones(2, requires_grad=True) * 2  # type: ignore[assignment]
    with pytest.raises(ParameterError, match="the network cannot be copied"):
        judged(it)

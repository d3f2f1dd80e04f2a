"""Forms of operations and networks that once were taken for something else, each with what holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.errors import ParameterError
from merganser.symmetry import Group, Spec, symmetries
from merganser.symmetry.checking import failing


class Middle(nn.Module):
    """Units between two linear layers, and something done to them."""

    def __init__(self, between: Callable[[Tensor], Any], width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.between, self.down = nn.Linear(12, 24), between, nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.between(self.up(x)))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def sound(network: nn.Module, x: Tensor = X) -> Spec:
    """What the rules alone find; it must hold."""
    spec = symmetries(network, (x,), check=False).spec
    assert all(not failing(network, (x,), None, spec, seed=seed) for seed in range(3))
    return spec


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.view(5, 4, 6).cumsum(1).flatten(1),
        lambda h: h + h.view(5, 4, 6).flip(1).flatten(1),
        lambda h: h.view(5, 4, 6).sort(1).values.flatten(1),
        lambda h: h.roll(1),
        lambda h: (
            functional.conv1d(h.view(5, 8, 3), torch.ones(8, 8, 1), padding=1, stride=2).flatten(1).repeat(1, 2)[:, :24]
        ),
        lambda h: torch.cat([h, h], 1).view(5, 4, 12).reshape(5, -1)[:, :24],
        lambda h: torch.maximum(h, torch.zeros(24)),
    ],
)
def test_rules_are_sound(between: Callable[[Tensor], Any]) -> None:
    sound(Middle(between))


def test_a_mask_over_two_axes_tells_places() -> None:
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[0, :12] = mask[3, 12:] = True  # as many as the next axis is long
    assert not sound(Middle(lambda h: h[mask])).groups


def test_dropout_that_is_always_on_is_no_symmetry() -> None:
    assert not symmetries(Middle(lambda h: functional.dropout(h, 0.5, training=True)), (X,), check=False).spec.groups


def test_other_names_of_a_transpose_mean_the_same_inside_inference_mode() -> None:
    network = Middle(lambda h: h.view(5, 4, 6).swapaxes(1, 2).swapaxes(1, 2).flatten(1))
    plain = symmetries(network, (X,)).spec
    with torch.inference_mode():
        assert symmetries(network, (X,), check=False).spec.groups == plain.groups


def test_a_parameter_that_is_another_one_transposed_does_not_move() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(24, 12)
            self.c.weight = nn.Parameter(self.a.weight.t())

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.b(torch.relu(self.a(x)))))

    found = symmetries(Tied(), (X,))
    assert not found.spec.moves("a.weight")
    assert "shares memory with c.weight" in found.spec.pinned["a.weight[0]"]


def test_numbers_inside_a_dataclass_are_outputs() -> None:
    @dataclass
    class Result:
        logits: Tensor
        units: Tensor

    class Told(Middle):
        def forward(self, x: Tensor) -> Any:
            h = self.up(x)
            return Result(self.down(h), h)

    assert not symmetries(Told(lambda h: h), (X,)).spec.groups


@pytest.mark.parametrize("result", [lambda x: None, lambda x: 3.0, lambda x: x[:0]])
def test_a_network_that_gives_no_number_is_refused(result: Callable[[Tensor], Any]) -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return result(x)

    with pytest.raises(ParameterError, match="gives no number"):
        symmetries(Silent(), (X,))


@pytest.mark.parametrize("fill", [float("nan"), float("-inf"), float("inf")])
def test_the_check_sees_past_outputs_that_are_no_numbers(fill: float) -> None:
    class Leaky(Middle):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return torch.cat([self.down(h) * h[0].tolist()[0], torch.full((5, 1), fill)], 1)

    found = symmetries(Leaky(lambda h: h), (X,))
    assert found.unsound == ("up",)


def test_whole_numbers_as_outputs_are_compared() -> None:
    class Chosen(Middle):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return torch.tensor(h.numpy().argmax(1))

    assert not symmetries(Chosen(lambda h: h), (X,)).spec.groups


def test_plain_constants_of_single_precision_do_not_stop_the_check() -> None:
    weights, scale = torch.randn(24, 24), np.ones(24, dtype=np.float32)
    network = Middle(lambda h: torch.relu(h) @ weights * torch.from_numpy(scale))
    assert symmetries(network, (X,)).unsound == ()


def test_a_network_that_keeps_things_is_left_as_it_is_and_not_refused() -> None:
    class Counting(Middle):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.register_buffer("seen", torch.zeros(()))
            self.cached: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            if self.cached is None:
                self.cached = self.down.weight * 1
            return functional.linear(torch.relu(self.up(x)), self.cached) * self.seen

    network = Counting()
    found = symmetries(network, (X,))
    assert (list(found.spec.groups), found.unsound) == (["up"], ())
    assert float(network.seen) == 0
    assert network.cached is None


def test_the_global_generator_is_as_before() -> None:
    network = Middle(lambda h: h + 0 * torch.rand(1))
    before = torch.get_rng_state()
    symmetries(network, (X,))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_group_that_was_weakened_and_refused_is_named_once() -> None:
    class Numbers(Middle):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).view(5, 4, 6)
            return self.down(h.flatten(1)) * h[0, 0].tolist()[0]

    found = symmetries(Numbers(lambda h: h), (X,))
    assert len(found.unsound) == len(set(found.unsound)) > 0


def test_what_others_lie_within_lies_within_nothing() -> None:
    spec = sound(Middle(lambda h: torch.relu(h).unflatten(1, (2, 3, 4)).softmax(-1).flatten(1)))
    for group in spec.groups.values():
        assert group.within is None or spec.groups[group.within].within is None


@pytest.mark.parametrize(
    "groups",
    [
        {"a": {"size": 2, "within": "a"}},
        {"a": {"size": 2, "within": "b"}, "b": {"size": 2, "within": "a"}},
        {"a": {"size": 2.5}},
        {"a": {"size": -1}},
        {"a": {"size": True}},
        {"a": {"size": 2, "within": "b"}, "b": {"size": 2}},
    ],
)
def test_text_with_groups_that_cannot_be_is_refused(groups: dict[str, Any]) -> None:
    good = Spec({"a": Group(2)}, {"w": ("a",)}, {"w": (None,)}, {})
    content = json.loads(good.to_json()) | {"groups": groups}
    with pytest.raises(ParameterError):
        Spec.from_json(json.dumps(content))

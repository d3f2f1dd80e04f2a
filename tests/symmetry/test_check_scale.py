"""The self-check sees what an unsound group changes, whatever else is among the outputs; and sound ones stay."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn

from merganser.align.separable import separable
from merganser.symmetry import symmetries
from merganser.symmetry.checking import change_of, failing, scales_of, whole
from merganser.symmetry.flow import Flow
from merganser.symmetry.record import Call
from merganser.symmetry.rules import RULES
from merganser.symmetry.rules.pointwise import RULES as POINTWISE

LAST = torch.arange(5) == 4
LEAST = torch.finfo(torch.float32).min
#: Networks' last steps, from five logits a row.
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "filled with the least number": lambda y: y.masked_fill(LAST, LEAST),
    "filled with -1e9": lambda y: y.masked_fill(LAST, -1e9),
    "-1e9 added": lambda y: y + LAST * -1e9,
    "-1e9 added to most": lambda y: y + ~LAST * -1e9,
    "the least number added": lambda y: y + LAST * LEAST,
    "one in other units": lambda y: y * torch.tensor([1, 1, 1, 1, 1e12]),
    "minus infinity": lambda y: y.masked_fill(LAST, -inf),
    "argmax": lambda y: y.argmax(-1),
    "argmax of one row, as a float": lambda y: y[:1].argmax(-1).float(),
    "top-k indices": lambda y: y.topk(2).indices,
    "whether above zero": lambda y: y > 0,
    "true for all": lambda y: y > -100,
    "rounded": lambda y: y.round(),
    "all zero": lambda y: torch.relu(y - 100),
    "in place": lambda y: (y - 100).relu_(),
    "a probability near 1": lambda y: torch.softmax(y + 40 * LAST, -1),
    "whole numbers beside what no weight changes": lambda y: torch.cat([y.argmax(-1), torch.full((1,), 0.5)]),
}


class Ordered(nn.Module):
    """Running sums of units, between two linear layers, and a last step."""

    def __init__(self, end: Callable[[Tensor], Tensor], between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.end, self.between = nn.Linear(6, 12), nn.Linear(12, 5), end, between

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.down(self.between(torch.relu(self.up(x)))))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("end", ENDS)
def test_an_unsound_group_is_refused_whatever_is_done_to_the_logits(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group changes the logits by little: the running sum counts a thousandth."""
    network = Ordered(ENDS[end], lambda h: h + 1e-3 * h.cumsum(-1))
    monkeypatch.setitem(RULES, "cumsum", POINTWISE["relu"])
    assert symmetries(network, (X,), check=False).spec.groups
    found = symmetries(network, (X,))
    assert (found.unsound, dict(found.spec.groups)) == (("up",), {})


@pytest.mark.parametrize("end", ENDS)
def test_a_sound_group_stays_whatever_is_done_to_the_logits(end: str) -> None:
    network = Ordered(ENDS[end], lambda h: h)
    spec = symmetries(network, (X,), check=False).spec
    assert list(spec.groups) == ["up"]
    assert not [seed for seed in range(20) if failing(network, (X,), None, spec, seed=seed)]


def convolution_as_it_was(flow: Flow, call: Call) -> None:
    """The rule, without the place at which it mixes channels."""
    noted = len(flow.products)
    CONVOLUTION(flow, call)
    del flow.products[noted:]


CONVOLUTION = RULES["convolution"]


@pytest.mark.parametrize("end", ENDS)
def test_an_order_for_each_channel_that_a_convolution_mixes_is_refused(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c, self.h = nn.Linear(6, 12), nn.Conv1d(3, 3, 1), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x)).view(-1, 3, 4)
            return ENDS[end](self.h((y + torch.relu(self.c(y))).flatten(1)))

    monkeypatch.setitem(RULES, "convolution", convolution_as_it_was)
    assert symmetries(Mixed(), (X,), check=False).spec.groups["a#2"].within == "a"
    found = symmetries(Mixed(), (X,))
    assert found.unsound == ("a#2",)
    assert {name: (group.size, group.within) for name, group in found.spec.groups.items()} == {
        "a": (3, None),
        "a#2": (4, None),
    }


def test_whole_numbers_that_numpy_makes_are_tried_with_more_weights() -> None:
    """No operation shows them; the check is of a group that is claimed by hand."""

    class Hidden(Ordered):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            return torch.from_numpy(self.down(h.cumsum(-1)).numpy().argmax(-1))

    network = Hidden(lambda y: y, lambda h: h)
    spec = symmetries(Ordered(lambda y: y, lambda h: h), (X,)).spec
    assert all(failing(network, (X,), None, spec, seed=seed) == ["up"] for seed in range(5))


@pytest.mark.parametrize("end", ["filled with the least number", "-1e9 added", "argmax"])
def test_units_that_cannot_be_apart_are_found_whatever_is_done_to_the_logits(end: str) -> None:
    """A mean over all units is of both networks' at once."""
    apart = Ordered(ENDS[end], torch.tanh)
    together = Ordered(ENDS[end], lambda h: h - h.mean(-1, keepdim=True))
    for network, held in ((apart, True), (together, False)):
        reasons = separable(symmetries(network, (X,)), network, (X,))
        assert (reasons["up"] is None) is held


# what a change is


def one_change(one: Tensor, two: Tensor, other_weights: Tensor) -> float:
    (scale,) = scales_of([one], [other_weights])
    return change_of(one, two, scale)


def test_a_change_is_a_share_of_what_other_weights_change() -> None:
    one, other = torch.tensor([1.0, 2.0, -1e9]).double(), torch.tensor([1.5, 2.25, -1e9]).double()
    assert one_change(one, one + torch.tensor([0, 0.125, 0]), other) == 0.5
    assert one_change(one, one + torch.tensor([0.125, 0, 0]), other) == 0.25


def test_rounding_of_an_entry_that_a_mask_was_added_to_is_no_change() -> None:
    logits, moved = torch.tensor([0.3, 0.7]).double(), torch.tensor([0.3, 0.7 + 1e-15]).double()
    mask = torch.tensor([0.0, -1e9]).double()
    assert one_change(logits + mask, moved + mask, logits + 0.1 + mask) == 0
    shifted = torch.nextafter(logits + mask, torch.tensor(0.0).double())  # 1e-7 by the last bit
    assert one_change(logits + mask, torch.stack([logits[0], shifted[1]]), logits + 0.1 + mask) == 0


def test_an_entry_near_zero_is_held_to_what_the_others_are() -> None:
    one, other = torch.tensor([1e-14, 1.0, 2.0, 3.0]).double(), torch.tensor([1.1e-14, 1.5, 2.5, 3.5]).double()
    assert one_change(one, one + torch.tensor([1e-15, 0, 0, 0]).double(), other) > 0.9  # one in four is no accident
    many, others = one.repeat(10)[3:], other.repeat(10)[3:].clone()
    others[1::4] = 2.0
    changed = many.clone()
    changed[0] += 1e-11
    assert one_change(many, changed, others) < 1e-9


@pytest.mark.parametrize("two", [[nan, 1.0, 0.0], [inf, 1.0, 0.0], [-inf, 1.0, nan], [-inf, nan, 0.0]])
def test_numbers_that_come_or_go_are_a_change_without_end(two: list[float]) -> None:
    one = torch.tensor([-inf, 1.0, 0.0]).double()
    assert one_change(one, torch.tensor(two).double(), one + 0.1) == inf
    assert one_change(one, one, one + 0.1) == 0


def test_outputs_that_no_weights_change_may_not_change_at_all() -> None:
    one = torch.zeros(3).double()
    assert one_change(one, one, one) == 0
    assert one_change(one, one + 1e-300, one) >= 1


def test_numbers_are_whole_where_all_of_them_are() -> None:
    assert whole([torch.tensor([1.0, -2.0, inf, nan, LEAST]), torch.tensor([True]), torch.tensor([3])])
    assert not whole([torch.tensor([1.0, 2.5])])
    assert not whole([torch.tensor([1]), torch.tensor([0.5])])


# complex buffers


class Turned(nn.Module):
    """Rotary positions as Llama's first code has them: a buffer of complex numbers of length 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)
        angles = torch.outer(torch.arange(6.0), 1e4 ** -torch.arange(0, 1, 0.5))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def _turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.freqs_cis[:, None]).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(*x.shape[:2], 2, 4) for m in (self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in (self._turn(q), self._turn(k), v))
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.down(torch.relu(self.up(self.o(h))))


def test_a_network_with_a_complex_buffer_is_checked() -> None:
    network, x = Turned(), torch.randn(2, 6, 8)
    found = symmetries(network, (x,))
    sizes = {name: (group.size, group.within) for name, group in found.spec.groups.items() if not group.fixed}
    assert found.unsound == ()
    assert sizes["up"] == (16, None)
    assert separable(found, network, (x,))["up"] is None

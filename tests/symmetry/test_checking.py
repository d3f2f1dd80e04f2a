"""The self-check: it refuses by name what a wrong rule gave, keeps the rest, and runs a network as it is meant to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stress_networks import STRESS, Network, linear
from tiny import Built, sequences, tiny, vectors
from torch import Tensor, nn
from torch.nn import functional
from wording import sizes

from merganser.symmetry import Group, Spec, symmetries
from merganser.symmetry.checking import failing
from merganser.symmetry.flow import Flow
from merganser.symmetry.record import Call
from merganser.symmetry.rules import RULES
from merganser.symmetry.rules.pointwise import RULES as POINTWISE


def before_and_after(formula: Callable[..., Tensor], inputs: Callable[[], Tensor] = vectors, **parts) -> Built:
    """A network with a good group before the formula's units, and one after them."""

    def whole(it: Network, x: Tensor) -> Tensor:
        return it.down(torch.relu(it.after(formula(it, it.up(torch.relu(it.before(x)))))))

    own = {"before": linear(12, 10), "up": linear(10, 24), "after": linear(24, 9), "down": linear(9, 11)}
    return tiny(lambda: Network(whole, **own, **parts), inputs)()


def groups(spec: Spec) -> dict[str, tuple[int, str | None]]:
    return {name: (group.size, group.within) for name, group in spec.groups.items()}


# wrong rules


@pytest.mark.parametrize(
    ("op", "formula"),
    [
        ("cumsum", lambda it, h: h.cumsum(-1)),
        ("roll", lambda it, h: h.roll(1, -1)),
        ("flip", lambda it, h: h.flip(-1)),
        ("sort", lambda it, h: h.sort(-1).values + h),
    ],
)
def test_an_operation_that_sees_an_order_is_caught_where_its_rule_does_not(
    monkeypatch: pytest.MonkeyPatch, op: str, formula: Callable[..., Tensor]
) -> None:
    built = before_and_after(formula)
    assert groups(symmetries(*built).spec) == {"before": (10, None), "after": (9, None)}
    monkeypatch.setitem(RULES, op, POINTWISE["relu"])
    assert groups(symmetries(*built, check=False).spec) == {"before": (10, None), "up": (24, None), "after": (9, None)}
    it = symmetries(*built)
    assert it.unsound == ("up",)
    assert groups(it.spec) == {"before": (10, None), "after": (9, None)}
    assert it.spec.pinned["up.weight[0]"] == "refused by the self-check"
    assert it.checked


def norm_without_its_scales(flow: Flow, call: Call) -> None:
    """Layer norm, as if its scales were in any order."""
    axes = flow.of(call.args["input"])
    flow.set(call.outputs[0], axes)
    for value in call.outputs[1:]:
        flow.fix(value, "a statistic")


def test_scales_of_one_and_shifts_of_zero_do_not_hide_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is as torch makes it: without noise, moving units past a norm's scales changes nothing."""
    torch.manual_seed(0)
    first = [nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 24), nn.LayerNorm(24), nn.ReLU()]
    network, x = nn.Sequential(*first, nn.Linear(24, 11)), vectors()
    monkeypatch.setitem(RULES, "native_layer_norm", norm_without_its_scales)
    it = symmetries(network, (x,))
    assert set(it.unsound) == {"2", "3", "3.bias"}
    assert groups(it.spec) == {"0": (10, None)}


def softmax_without_what_it_sums(flow: Flow, call: Call) -> None:
    """Softmax, as if every place had a sum of its own."""
    flow.set(call.outputs[0], flow.of(call.args["self"]))


def test_an_order_for_each_head_that_does_not_hold_becomes_one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    built = STRESS["softmax_over_heads"]()
    monkeypatch.setitem(RULES, "_softmax", softmax_without_what_it_sums)
    rules = symmetries(*built, check=False).spec
    assert sizes(rules, rules.axes) == "a 4, b 6 in a"
    it = symmetries(*built)
    assert sizes(it.spec, it.spec.axes) == "a 4, b 6"
    assert it.unsound == ("up#2",)
    assert failing(*built, it.spec) == []


def test_units_of_heads_that_are_refused_are_left_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running sums over heads: heads cannot move, and their units can, all alike."""

    def formula(it: Network, x: Tensor) -> Tensor:
        return it.down(it.up(x).view(len(x), 4, 6).cumsum(1).flatten(1))

    built = tiny(lambda: Network(formula, up=linear(12, 24), down=linear(24, 11)), vectors)()
    monkeypatch.setitem(RULES, "cumsum", POINTWISE["relu"])
    rules = symmetries(*built, check=False).spec
    assert sizes(rules, rules.axes) == "a 4, b 6 in a"
    it = symmetries(*built)
    assert it.spec.axes["up.weight"] == ({"product": [4, "up#2"]}, 12)
    assert groups(it.spec) == {"up#2": (6, None)}
    assert set(it.unsound) == {"up", "up#2"}
    assert failing(*built, it.spec) == []


def test_heads_that_a_scale_tells_apart_are_refused() -> None:
    """By hand: the scale is said to stay where its heads move."""
    built = STRESS["scale_of_each_head_by_a_turned_view"]()
    spec = symmetries(*built, check=False).spec
    wrong = Spec(spec.groups, {**spec.axes, "scale": (4,)}, spec.roles, spec.pinned)
    assert failing(*built, wrong) == ["up"]
    assert failing(*built, spec) == []


def test_a_group_that_is_claimed_by_hand_and_does_not_hold_is_named() -> None:
    built = before_and_after(lambda it, h: torch.relu(h))
    spec = symmetries(*built, check=False).spec
    wrong = Spec({**spec.groups, "bad": Group(11)}, {**spec.axes, "down.bias": ("bad",)}, spec.roles, spec.pinned)
    assert failing(*built, wrong) == ["bad"]


# how it runs a network


def cast_down(it: Network, h: Tensor) -> Tensor:
    h = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    h = h.softmax(-1, dtype=torch.float32).to(torch.bfloat16).type(torch.float32)
    return h * torch.ones(24, dtype=torch.float32) + torch.full((24,), 0.5, dtype=torch.float16)


def places_in_float32(it: Network, h: Tensor) -> Tensor:
    t = torch.arange(h.shape[1], dtype=torch.float32)[:, None]
    return torch.outer(t[:, 0], torch.ones(1)).matmul(torch.ones(1, 24)).sin() + h.to(torch.float32)


def complex_in_few_bits(it: Network, h: Tensor) -> Tensor:
    return (h.to(torch.complex64) * torch.full((24,), 0.5, dtype=torch.complex64)).abs()


@pytest.mark.parametrize(
    ("formula", "inputs"), [(cast_down, vectors), (places_in_float32, sequences), (complex_in_few_bits, vectors)]
)
def test_networks_that_cast_to_fewer_bits_are_checked_in_float64(
    formula: Callable[..., Tensor], inputs: Callable[[], Tensor]
) -> None:
    built = before_and_after(formula, inputs)
    it = symmetries(*built)
    assert it.unsound == ()
    assert groups(it.spec) == {"before": (10, None), "up": (24, None), "after": (9, None)}
    assert failing(*built, it.spec, tolerance=1e-13) == []


def test_networks_of_few_bits_are_checked_in_float64() -> None:
    network, args, kwargs = before_and_after(lambda it, h: torch.relu(h))
    it = symmetries(network.bfloat16(), tuple(x.bfloat16() for x in args), kwargs)
    assert (it.unsound, len(it.spec.groups)) == ((), 3)
    assert {x.dtype for x in network.parameters()} == {torch.bfloat16}


def test_networks_that_draw_numbers_draw_the_same_ones_every_time() -> None:
    built = before_and_after(lambda it, h: torch.relu(h) * torch.randn(5, 1))
    it = symmetries(*built)
    assert (it.unsound, len(it.spec.groups)) == ((), 3)


def test_dropout_is_off() -> None:
    network, args, kwargs = before_and_after(lambda it, h: functional.dropout(torch.relu(h), 0.5, it.training))
    it = symmetries(network.train(), args, kwargs)
    assert (it.unsound, len(it.spec.groups)) == ((), 3)


def test_batch_statistics_that_are_used_are_recomputed_in_the_new_order() -> None:
    def formula(it: Network, h: Tensor) -> Tensor:
        return functional.batch_norm(h, None, None, it.norm.weight, it.norm.bias, training=True)

    it = symmetries(*before_and_after(formula, norm=lambda: nn.BatchNorm1d(24)))
    assert (it.unsound, len(it.spec.groups)) == ((), 3)


def test_outputs_without_any_group_need_no_run_to_check_them() -> None:
    calls = []

    def formula(it: Network, x: Tensor) -> Tensor:
        calls.append(x.dtype)
        return it.up(x)

    it = symmetries(*tiny(lambda: Network(formula, up=linear(12, 24)), vectors)())
    assert (dict(it.spec.groups), it.coverage, it.checked) == ({}, 0.0, True)
    assert set(calls) == {torch.float32}


def test_the_same_seed_gives_the_same_verdict_and_the_same_text() -> None:
    built = before_and_after(lambda it, h: torch.relu(h))
    one, two = (symmetries(*built, seed=3).spec.to_json() for _ in range(2))
    assert one == two

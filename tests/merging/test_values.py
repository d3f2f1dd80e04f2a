"""Settings over layers and names, against a closed form in float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.merging.values import Choice, Gradient, resolve

numbers = st.floats(-1e6, 1e6, allow_nan=False)
lists = st.lists(numbers, min_size=1, max_size=9)


def tents(values: list[float], depth: Fraction) -> Fraction:
    """The piecewise linear function through values at 0, 1/(n-1), ..., 1 as a sum of tents, exactly."""
    n = len(values)
    return sum((Fraction(v) * max(0, 1 - abs(depth * (n - 1) - i)) for i, v in enumerate(values)), Fraction(0))


@given(lists, st.integers(0, 199), st.integers(2, 200))
def test_gradient_is_the_sum_of_tents(values: list[float], layer: int, layers: int) -> None:
    depth = Fraction(min(layer, layers - 1), layers - 1)
    found = Gradient(tuple(values)).at(float(depth))
    scale = max(1.0, *map(abs, values))
    assert isinstance(found, float)
    assert abs(found - float(tents(values, depth))) <= 1e-12 * scale


@given(lists)
def test_gradient_begins_and_ends_with_its_values(values: list[float]) -> None:
    gradient = Gradient(tuple(values))
    assert gradient.at(0.0) == values[0]
    assert gradient.at(1.0) == values[-1]


@given(lists, st.floats(0, 1))
def test_gradient_stays_within_its_values(values: list[float], depth: float) -> None:
    found = Gradient(tuple(values)).at(depth)
    assert isinstance(found, float)
    slack = 1e-15 * max(map(abs, values))
    assert min(values) - slack <= found <= max(values) + slack


@given(numbers, st.integers(1, 9), st.floats(0, 1))
def test_a_gradient_of_equal_values_is_constant(value: float, count: int, depth: float) -> None:
    found = Gradient((value,) * count).at(depth)
    assert found == pytest.approx(value, rel=1e-15, abs=0)


@given(lists, st.floats(0, 1))
def test_a_reversed_gradient_is_the_gradient_from_the_other_end(values: list[float], depth: float) -> None:
    forth, back = Gradient(tuple(values)).at(depth), Gradient(tuple(reversed(values))).at(1 - depth)
    assert forth == pytest.approx(back, rel=1e-12, abs=1e-9 * max(1.0, *map(abs, values)))


def test_a_gradient_of_integers_is_interpolated() -> None:
    assert Gradient((0, 1)).at(0.25) == 0.25


@pytest.mark.parametrize(("depth", "chosen"), [(0.0, "a"), (0.49, "a"), (0.5, "b"), (0.99, "b"), (1.0, "c")])
def test_a_gradient_of_words_is_chosen_from(depth: float, chosen: str) -> None:
    assert Gradient(("a", "b", "c")).at(depth) == chosen


def test_a_gradient_of_truth_values_is_not_interpolated() -> None:
    assert Gradient((True, False)).at(0.5) is True
    assert Gradient((True, False)).at(1.0) is False


def test_a_choice_takes_the_first_filter_that_the_name_contains() -> None:
    choice = Choice((("self_attn", 1.0), ("attn", 2.0), ("*", 3.0)))
    assert choice.of("layers.0.self_attn.q_proj.weight") == 1.0
    assert choice.of("layers.0.cross_attn.q_proj.weight") == 2.0
    assert choice.of("layers.0.mlp.weight") == 3.0


def test_a_filter_is_no_pattern() -> None:
    choice = Choice((("layers.*.mlp", 1.0), (".mlp.", 2.0)))
    assert choice.of("layers.0.mlp.weight") == 2.0
    assert choice.of("layersX0Xmlp.weight") is None


@pytest.mark.parametrize("value", [0.0, 0, False, ""])
def test_a_value_that_counts_as_false_is_a_value(value: float | bool | str) -> None:
    assert resolve([Choice((("mlp", value),)), 1.0], "mlp.weight", 0.0) == value
    assert resolve([value, 1.0], "mlp.weight", 0.0) == value


def test_what_no_filter_fits_is_taken_from_the_next_level() -> None:
    levels = [None, Choice((("mlp", 0.3),)), Gradient((0.0, 1.0)), 9.0]
    assert resolve(levels, "layers.1.mlp.weight", 0.5) == 0.3
    assert resolve(levels, "layers.1.attn.weight", 0.5) == 0.5
    assert resolve([None, Choice((("mlp", 0.3),))], "lm_head.weight", 0.0) is None
    assert resolve([], "lm_head.weight", 0.0) is None


def test_a_chosen_gradient_is_read_at_the_depth() -> None:
    assert resolve([Choice((("mlp", Gradient((0.0, 1.0))),))], "mlp", 0.25) == 0.25


def test_one_word_a_layer_gives_every_layer_its_own() -> None:
    """The word of a layer may not be that of the layer before it because its depth is rounded."""
    for layers in range(2, 200):
        gradient = Gradient(tuple(str(i) for i in range(layers)))
        assert [gradient.at(i / (layers - 1)) for i in range(layers)] == [str(i) for i in range(layers)]


def test_one_number_a_layer_gives_every_layer_its_own() -> None:
    for layers in range(2, 200):
        values = [(i * 7 % 11) / 10 for i in range(layers)]
        assert [Gradient(tuple(values)).at(i / (layers - 1)) for i in range(layers)] == values

import math

import numpy as np
import pytest

from merganser.errors import ParameterError
from merganser.evaluate import Spread, acc, bwt, order_spread

NAN = math.nan

# Three tasks. By hand: ACC = (60 + 75 + 90) / 3 = 75; BWT sum = (60 - 90) + (75 - 80) = -35.
R3 = [
    [90.0, 30.0, 20.0],
    [70.0, 80.0, 25.0],
    [60.0, 75.0, 90.0],
]


def test_acc_is_the_mean_of_the_last_row() -> None:
    assert acc(R3) == 75.0


def test_bwt_is_the_mean_change_of_the_tasks_before_the_last() -> None:
    assert bwt(R3) == -17.5


def test_bwt_divided_by_t_is_the_same_sum_over_all_tasks() -> None:
    assert bwt(R3, normalise="T") == pytest.approx(-35 / 3, rel=1e-15)


def test_bwt_is_positive_when_later_merges_help_earlier_tasks() -> None:
    assert bwt([[50.0, 0.0], [60.0, 70.0]]) == 10.0


def test_bwt_ignores_the_last_task() -> None:
    changed = [row[:] for row in R3]
    changed[2][2] = 0.0
    assert bwt(changed) == bwt(R3)


def test_fractions_give_fractions() -> None:
    fractions = np.array(R3) / 100
    assert acc(fractions) == pytest.approx(0.75, rel=1e-15)
    assert bwt(fractions) == pytest.approx(-0.175, rel=1e-15)


def test_lists_tuples_and_arrays_agree() -> None:
    assert bwt(tuple(map(tuple, R3))) == bwt(np.array(R3, dtype=np.float32)) == bwt(R3)


def test_tasks_that_have_not_arrived_may_be_nan() -> None:
    sparse = [[90.0, NAN, NAN], [70.0, 80.0, NAN], [60.0, 75.0, 90.0]]
    assert (acc(sparse), bwt(sparse)) == (75.0, -17.5)


def test_entries_between_the_diagonal_and_the_last_row_are_not_needed() -> None:
    assert bwt([[90.0, NAN, NAN], [NAN, 80.0, NAN], [60.0, 75.0, 90.0]]) == -17.5


def test_one_task_has_an_accuracy_and_no_backward_transfer() -> None:
    assert acc([[88.0]]) == 88.0
    assert math.isnan(bwt([[88.0]]))
    assert math.isnan(bwt([[88.0]], normalise="T"))


@pytest.mark.parametrize("metric", [acc, bwt])
@pytest.mark.parametrize("matrix", [[], [[]], np.empty((0, 0))])
def test_an_empty_matrix_is_refused(metric, matrix) -> None:
    with pytest.raises(ParameterError, match="empty"):
        metric(matrix)


@pytest.mark.parametrize("metric", [acc, bwt])
@pytest.mark.parametrize("matrix", [[[1.0, 2.0]], [[1.0], [2.0]], [1.0, 2.0], np.zeros((2, 2, 2))])
def test_a_matrix_that_is_not_square_is_refused_with_its_shape(metric, matrix) -> None:
    with pytest.raises(ParameterError, match=r"shape \(.*must be square"):
        metric(matrix)


def test_a_ragged_matrix_is_refused() -> None:
    with pytest.raises(ParameterError, match="ragged"):
        acc([[1.0], [1.0, 2.0]])


@pytest.mark.parametrize("metric", [acc, bwt])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_hole_in_the_last_row_is_refused_by_task(metric, bad) -> None:
    with pytest.raises(ParameterError, match=r"last row .* task 1"):
        metric([[90.0, 1.0, 1.0], [1.0, 80.0, 1.0], [60.0, bad, 90.0]])


def test_a_hole_on_the_diagonal_is_refused_by_bwt_alone() -> None:
    holed = [[90.0, 1.0, 1.0], [1.0, NAN, 1.0], [60.0, 75.0, 90.0]]
    assert acc(holed) == 75.0
    with pytest.raises(ParameterError, match=r"diagonal .* task 1"):
        bwt(holed)


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ParameterError, match="normalise"):
        bwt(R3, normalise="t")  # type: ignore[arg-type]


def test_spread_uses_the_sample_deviation() -> None:
    # mean 5, squares 9 + 1 + 1 + 9 = 20, 20 / 3
    spread = order_spread([2.0, 4.0, 6.0, 8.0])
    assert spread == Spread(mean=5.0, std=math.sqrt(20 / 3), min=2.0, max=8.0, n=4)


def test_equal_values_have_no_spread() -> None:
    assert order_spread([73.1, 73.1, 73.1]).std == 0.0


def test_one_value_has_no_deviation() -> None:
    spread = order_spread([7.0])
    assert (spread.mean, spread.n) == (7.0, 1)
    assert math.isnan(spread.std)


@pytest.mark.parametrize("values", [[], [1.0, NAN]])
def test_spread_of_nothing_or_of_a_hole_is_refused(values) -> None:
    with pytest.raises(ParameterError):
        order_spread(values)

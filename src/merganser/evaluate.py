"""Numbers that judge a sequence of merges: accuracy, backward transfer, spread over orders.

    R[i][j] = accuracy on task j after i + 1 merges, T x T; task j arrived with merge j + 1
    ACC     = mean_j R[T-1][j]
    BWT     = sum_{j < T-1} (R[T-1][j] - R[j][j]) / (T - 1)        negative: the merged model forgets

Fractions or percentages: the results have the unit of the entries. Entries above the diagonal (tasks that have not
arrived) enter neither number, so they may be NaN.

Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840; Tang et al. 2025, arXiv:2501.09522 divides by T instead.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from merganser.errors import ParameterError

Matrix: TypeAlias = "Sequence[Sequence[float]] | npt.NDArray[np.floating]"


@dataclass(frozen=True)
class Spread:
    """How far one number moves over repeats, such as the ACC of one method over random orders of arrival.

    Args:
        mean: arithmetic mean.
        std: sample standard deviation (divided by n - 1); NaN for one value.
        min: smallest value.
        max: largest value.
        n: how many values.
    """

    mean: float
    std: float
    min: float
    max: float
    n: int


def acc(R: Matrix) -> float:
    """Mean accuracy over all tasks after the last merge.

    Args:
        R: accuracy on task j (column) after i + 1 merges (row); only the last row is needed.

    Returns:
        ACC, in the unit of the entries.

    Raises:
        ParameterError: If R is empty or not square, or the last row holds a value that is not finite.

    >>> acc([[90.0, 40.0], [70.0, 80.0]])
    75.0
    """
    final = _square(R)[-1]
    _need(final, "the last row")
    return float(final.mean())


def bwt(R: Matrix, *, normalise: Literal["T-1", "T"] = "T-1") -> float:
    """Backward transfer: how accuracy on a task changes between its own merge and the last one.

    Args:
        R: accuracy on task j (column) after i + 1 merges (row); the diagonal and the last row are needed.
        normalise: divide the sum over the T - 1 earlier tasks by "T-1" (a mean) or by "T"; papers differ.

    Returns:
        BWT, in the unit of the entries; NaN when there is one task, because no task was then followed by another.

    Raises:
        ParameterError: If R is empty or not square, a needed entry is not finite, or `normalise` is unknown.

    >>> bwt([[90.0, 40.0], [70.0, 80.0]])
    -20.0
    >>> bwt([[90.0, 40.0], [70.0, 80.0]], normalise="T")
    -10.0
    """
    if normalise not in ("T-1", "T"):
        raise ParameterError(f"normalise is {normalise!r}", hint='choose "T-1" (a mean over earlier tasks) or "T"')
    matrix = _square(R)
    count = len(matrix)
    if count == 1:
        return math.nan
    final, arrival = matrix[-1, :-1], matrix.diagonal()[:-1]
    _need(final, "the last row")
    _need(arrival, "the diagonal")
    return float((final - arrival).sum() / (count if normalise == "T" else count - 1))


def order_spread(values: Sequence[float]) -> Spread:
    """Mean, sample deviation and range of one number over repeats.

    Args:
        values: one number a repeat, such as the ACC of one order of arrival.

    Returns:
        Their spread; `std` is NaN for a single value.

    Raises:
        ParameterError: If there are no values, or one is not finite.

    >>> order_spread([70.0, 72.0, 74.0])
    Spread(mean=72.0, std=2.0, min=70.0, max=74.0, n=3)
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ParameterError("there are no values to spread", hint="pass one number for each order of arrival")
    bad = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
    if bad:
        raise ParameterError(f"value {bad[0]} is {numbers[bad[0]]}; every repeat needs a finite number")
    return Spread(
        mean=statistics.fmean(numbers),
        std=statistics.stdev(numbers) if len(numbers) > 1 else math.nan,
        min=min(numbers),
        max=max(numbers),
        n=len(numbers),
    )


def _square(R: Matrix) -> npt.NDArray[np.float64]:
    try:
        matrix = np.asarray(R, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"the matrix of accuracies is ragged or not numeric: {error}") from error
    if matrix.size == 0:
        raise ParameterError("the matrix of accuracies is empty", hint="it needs one row for each merge")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ParameterError(
            f"the matrix of accuracies has shape {matrix.shape}; it must be square",
            hint="one row for each merge, one column for each task, in the order of arrival",
        )
    return matrix


def _need(entries: npt.NDArray[np.float64], where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(entries))
    if bad.size:
        raise ParameterError(
            f"{where} of the matrix of accuracies holds {entries[bad[0]]} for task {bad[0]}",
            hint="only entries above the diagonal of rows before the last may be missing",
        )

"""Symmetric eigenproblems in place: against numpy, and by what eigenvectors are."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser import lapack


def symmetric(n: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, n if rank is None else rank, generator=generator, dtype=torch.float64)
    return x @ x.T - 0.3 * torch.eye(n, dtype=torch.float64)


@pytest.fixture(params=["lapack", "numpy"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of solving: where scipy's LAPACK has other integers, it is numpy's."""
    if request.param == "numpy":
        monkeypatch.setattr(lapack, "_dsyevd", lambda: None)
    else:
        assert lapack._dsyevd() is not None  # in the constrained environment of the tests, the fast way is there


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize(("n", "rank"), [(0, None), (1, None), (2, None), (31, None), (150, None), (64, 3)])
def test_values_and_vectors(n: int, rank: int | None) -> None:
    g = symmetric(n, rank)
    expected = np.linalg.eigvalsh(g.numpy())
    rows = g.clone()
    values = lapack.eigen_in_place(rows)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-13 * n * scale, rtol=0)
    torch.testing.assert_close(rows @ rows.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows.T * values @ rows, g, atol=1e-13 * max(1, n) * scale, rtol=0)


@pytest.mark.usefixtures("solver")
def test_nan_is_an_error_or_nan() -> None:
    g = torch.full((4, 4), float("nan"), dtype=torch.float64)
    try:
        values = lapack.eigen_in_place(g)
    except np.linalg.LinAlgError:
        return
    assert values.isnan().all()


def test_two_at_once_give_the_bits_of_one() -> None:
    matrices = [symmetric(n) for n in (60, 200, 60, 200, 150, 31)]

    def solved(g: Tensor) -> tuple[Tensor, Tensor]:
        rows = g.clone()
        return lapack.eigen_in_place(rows), rows

    alone = [solved(g) for g in matrices]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solved, matrices * 5))
    for one, other in zip(alone * 5, together, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


THREADS = """
import torch
from threadpoolctl import threadpool_info
from merganser import lapack

def threads():
    return {info["num_threads"] for info in threadpool_info()} | {torch.get_num_threads()}

before = threads()
with lapack.single_threaded():
    with lapack.single_threaded():
        lapack.eigen_in_place(torch.eye(4, dtype=torch.float64))  # loads an algebra of its own
        inner = threads()
    outer = threads()
after = threads()
with lapack.single_threaded():
    again = threads()
print([max(found) for found in (before, inner, outer, after, again, threads())])
"""


def test_what_is_loaded_within_takes_one_thread_and_has_its_own_again_afterwards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env=os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[2, 1, 1, 2, 1, 2]\n"


def test_an_order_whose_workspace_lapack_cannot_be_told_of_is_solved_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapack, "LARGEST_INT", 1 + 6 * 20 + 2 * 20 * 20)
    asked: list[int] = []
    monkeypatch.setattr(lapack.np.linalg, "eigh", lambda x, eigh=np.linalg.eigh: asked.append(len(x)) or eigh(x))
    for n in (20, 21):
        rows = symmetric(n)
        assert np.allclose(lapack.eigen_in_place(rows).numpy(), np.linalg.eigvalsh(symmetric(n).numpy()))
    assert asked == [21]


TURNS = """
import threading, time
import torch
from threadpoolctl import threadpool_info
from merganser import lapack

def threads():
    return max(info["num_threads"] for info in threadpool_info())

seen = []
def run(first, last):
    time.sleep(first)
    with lapack.single_threaded():
        seen.append(threads())
        time.sleep(last)
        seen.append(threads())

others = [threading.Thread(target=run, args=times) for times in ((0, .3), (.1, .1), (.2, .3))]
[other.start() for other in others]
[other.join() for other in others]
print(seen, threads(), torch.get_num_threads())
"""


def test_runs_that_overlap_in_one_process_take_one_thread_each_and_leave_all_as_it_was() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TURNS],
        env=os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[1, 1, 1, 1, 1, 1] 2 2\n"

"""Rows that are asked for in turn were read by another thread; whatever the order, each call gives its own rows."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser.errors import NonFiniteError
from merganser.merging.ahead import Ahead
from merganser.merging.held import Rows
from merganser.merging.run import plan_recipes, run
from merging_helpers import recipe
from support import load, make_base, save

X = torch.arange(40.0)


class Reads:
    """Reads of `X`, with the threads that they ran on."""

    def __init__(self) -> None:
        self.of: list[tuple[Rows, int]] = []

    def __call__(self, rows: Rows) -> list[torch.Tensor]:
        self.of.append((rows, threading.get_ident()))
        if rows is not None and rows[1] > 30:
            raise NonFiniteError("rows beyond 30")
        return [X if rows is None else X[slice(*rows)]]


def test_every_row_is_read_once_and_all_but_the_first_by_another_thread() -> None:
    reads = Reads()
    with ThreadPoolExecutor(1) as pool:
        ahead = Ahead(pool, reads, 30)
        for start in range(0, 30, 10):
            assert torch.equal(ahead((start, start + 10))[0], X[start : start + 10])
    assert [rows for rows, _ in reads.of] == [(0, 10), (10, 20), (20, 30)]
    assert [thread == threading.get_ident() for _, thread in reads.of] == [True, False, False]


def test_the_last_rows_are_shorter_and_nothing_is_read_behind_them() -> None:
    reads = Reads()
    with ThreadPoolExecutor(1) as pool:
        ahead = Ahead(pool, reads, 15)
        assert [ahead(rows)[0].numel() for rows in ((0, 10), (10, 15))] == [10, 5]
    assert [rows for rows, _ in reads.of] == [(0, 10), (10, 15)]


def test_an_error_shows_when_its_rows_are_asked_for_and_not_before() -> None:
    with ThreadPoolExecutor(1) as pool:
        ahead = Ahead(pool, Reads(), 40)
        for start in (0, 15):
            ahead((start, start + 15))
        with pytest.raises(NonFiniteError, match="beyond 30"):
            ahead((30, 40))


@given(asked=st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 20), st.integers(0, 10))), max_size=12))
def test_each_call_gives_its_own_rows_whatever_was_asked_for_before(asked: list[tuple[int, int] | None]) -> None:
    with ThreadPoolExecutor(2) as pool:
        ahead = Ahead(pool, Reads(), 30)
        for place in asked:
            rows = None if place is None else (place[0], place[0] + place[1])
            assert torch.equal(ahead(rows)[0], X if rows is None else X[slice(*rows)])


@pytest.mark.parametrize("processors", [1, 4])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "gram"])
def test_a_merge_reads_ahead_on_a_spare_processor_and_gives_the_same_bits(
    method: str, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merganser.merging.ahead.default_threads", lambda: processors)
    base = {"model.layers.0.mlp.weight": torch.randn(900, 300), "model.norm.weight": torch.randn(8)}
    folders = [save({n: x + 0.1 * i for n, x in base.items()}, tmp_path / f"m{i}") for i in range(3)]
    plan = recipe(method, folders[1:], None if method == "linear" else folders[0])
    alone = plan_recipes([plan], chunk_elements=1)
    expected = {name: alone.read(name) for name in alone.infos}
    threads: set[int] = set()
    fill = "merganser.checkpoints.safetensors_file.SafetensorsFile._fill"
    from merganser.checkpoints.safetensors_file import SafetensorsFile

    plain = SafetensorsFile._fill
    monkeypatch.setattr(fill, lambda *a: threads.add(threading.get_ident()) or plain(*a))
    found = load(run(plan_recipes([plan], chunk_elements=1), tmp_path / "out", threads=1))
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert len(threads) == (1 if method == "gram" or processors == 1 else 2)  # gram takes matrices whole


def test_nan_far_behind_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    base = make_base() | {"w": torch.randn(900, 300)}
    bad = {**base, "w": base["w"].clone()}
    bad["w"][-1, -1] = torch.nan
    folders = [save(x, tmp_path / f"m{i}") for i, x in enumerate((base, bad))]
    with pytest.raises(NonFiniteError, match=r"w of .*m1 holds NaN"):
        run(plan_recipes([recipe("linear", folders)], chunk_elements=1), tmp_path / "out", threads=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1"]


def test_a_merge_that_failed_may_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merganser.merging.ahead.default_threads", lambda: 4)
    base = {"a": torch.randn(900, 300), "b": torch.randn(900, 300)}
    folders = [save({n: x + 0.1 * i for n, x in base.items()}, tmp_path / f"m{i}") for i in range(2)]
    merge = plan_recipes([recipe("linear", folders)], chunk_elements=1)

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    read = merge.read_lines
    monkeypatch.setattr(merge, "read_lines", lambda name, part: (read(name, part), stopped(0, 0)))
    with pytest.raises(KeyboardInterrupt):
        run(merge, tmp_path / "out", threads=1)
    monkeypatch.undo()
    monkeypatch.setattr("merganser.merging.ahead.default_threads", lambda: 4)
    found = load(run(merge, tmp_path / "out", threads=1))
    assert found.keys() == base.keys()

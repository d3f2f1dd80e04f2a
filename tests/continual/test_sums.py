"""Sums over experts: whatever came, went or changed its weight, the sums are those of the experts that are in."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.errors import StateError
from sums_helpers import folded, gram_sums, stored_sums
from support import (
    Arrays,
    arrays,
    change,
    distance,
    load,
    load_sums,
    make_base,
    save,
    save_family,
    tree,
    tune,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("mixed"), 4)


def assert_sums(state: Path, base: Arrays, expected: Arrays, tolerance: float, sizes: Arrays | None = None) -> None:
    """Sums on disk equal `expected` relative to `sizes`, by default to themselves."""
    found = stored_sums(state, base)
    assert set(found) == set(expected)
    for slot, x in expected.items():
        size = float(np.linalg.norm(x if sizes is None else sizes[slot])) or 1.0
        assert float(np.linalg.norm(found[slot] - x)) <= tolerance * size, slot


# Random histories. Everything is float64 there, so that terms are exact to 1e-16 and what is left is the sums' own
# rounding: at most 1e-16 of the largest sum that was ever held, a step. 1e-12 leaves room for the heaviest histories.

NAMES = ("wide.weight", "tall.weight", "wide.bias", "bn.running_mean", "row.weight")
WEIGHTS = st.sampled_from([0.25, 0.3, 0.5, 1.0, 1.7, 3.0])


class History(RuleBasedStateMachine):
    """Experts come, go and change their weights at random."""

    experts: ClassVar[list[Path]] = []
    changes: ClassVar[list[Arrays]] = []
    base: ClassVar[Arrays] = {}
    method: ClassVar[str] = "gram"

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.fold = Fold.init(self.experts[0], self.folder / "state", self.method, threads=1)
        self.weights: dict[int, float] = {}

    @rule(number=st.integers(1, 5), weight=WEIGHTS)
    def add(self, number: int, weight: float) -> None:
        if number in self.weights:
            with pytest.raises(StateError, match="already"):
                self.fold.add(self.experts[number], weight=weight, threads=1)
        else:
            self.fold.add(self.experts[number], weight=weight, threads=1)
            self.weights[number] = weight

    @precondition(lambda self: self.weights)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.weights)))
        self.fold.remove(self.experts[number], threads=1)
        del self.weights[number]

    @precondition(lambda self: self.weights)
    @rule(data=st.data(), weight=WEIGHTS)
    def reweight(self, data: st.DataObject, weight: float) -> None:
        number = data.draw(st.sampled_from(sorted(self.weights)))
        self.fold.reweight(self.experts[number], weight, threads=1)
        self.weights[number] = weight

    @invariant()
    def sums_are_those_of_the_experts_that_are_in(self) -> None:
        ledger = read_ledger(self.fold.path)
        assert {c.name: c.weight for c in ledger.contributors} == {
            self.experts[n].name: w for n, w in self.weights.items()
        }
        ours = [self.changes[n] for n in self.weights]
        expected = gram_sums(ours, list(self.weights.values()))
        largest = gram_sums(self.changes[1:], [3.0] * 5)
        sizes = {slot: np.abs(x) for slot, x in largest.items()}
        assert_sums(self.fold.path, self.base, expected, 1e-12, sizes)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


def test_random_histories_equal_the_sums_from_scratch(tmp_path: Path) -> None:
    base = make_base(names=NAMES, dtype=torch.float64)
    models = [base, *(tune(base, seed) for seed in range(1, 6))]
    History.experts = [save(model, tmp_path / f"model-{i}") for i, model in enumerate(models)]
    History.changes = [change(model, base) for model in models]
    History.base = arrays(base)
    run_state_machine_as_test(History, settings=settings(max_examples=5, stateful_step_count=12))


def test_fifty_steps_in_one_history_equal_the_sums_from_scratch(tmp_path: Path) -> None:
    base = make_base(names=NAMES)
    models = [base, *(tune(base, seed) for seed in range(1, 6))]
    folders = [save(model, tmp_path / f"model-{i}") for i, model in enumerate(models)]
    changes = [change(model, base) for model in models]
    fold = Fold.init(folders[0], tmp_path / "state", "mean", threads=1)
    weights: dict[int, float] = {}
    generator = np.random.default_rng(0)
    for _ in range(50):
        number, weight = int(generator.integers(1, 6)), float(generator.uniform(-2, 2))
        if number not in weights:
            fold.add(folders[number], weight=weight, threads=1)
            weights[number] = weight
        elif generator.random() < 0.5:
            fold.remove(folders[number], threads=1)
            del weights[number]
        else:
            fold.reweight(folders[number], weight, threads=1)
            weights[number] = weight
    assert len(weights) > 1
    assert fold.ledger.generation == 50
    # float32 models, float64 sums: the change is rounded to float32 once (6e-8), the same way in every pass; so the
    # sums equal those of the rounded changes to 1e-12.
    rounded = [{n: (models[i][n] - base[n]).double().numpy() for n in c} for i, c in enumerate(changes)]
    expected = {
        f"s/{n}": sum((abs(w) if "running" in n else w) * rounded[i][n] for i, w in weights.items()) for n in rounded[0]
    }
    assert_sums(fold.path, arrays(base), expected, 1e-12)


@pytest.mark.parametrize("method", ["gram", "mean", "iso_c"])
def test_removing_what_was_added_gives_the_state_before(family: list[Path], tmp_path: Path, method: str) -> None:
    one = folded(tmp_path / "one", family[0], family[1:3], method)
    two = folded(tmp_path / "two", family[0], family[1:4], method)
    two.remove(family[3])
    assert two.ledger.contributors == one.ledger.contributors
    before, after = arrays(load_sums(one.path)), arrays(load_sums(two.path))
    assert set(before) == set(after)
    for slot in before:
        assert distance(after[slot], before[slot]) <= 1e-15, slot
    merged = [change(load(f.export(tmp_path / f"out-{f.path.name}", dtype="F64")), load(family[0])) for f in (one, two)]
    for name in merged[0]:
        assert distance(merged[1][name], merged[0][name]) <= 1e-6, name


@pytest.mark.parametrize("weight", [1.0, 0.3, 1 / 3])
@pytest.mark.parametrize("gone", [1, 2, 3])
def test_removing_any_expert_equals_never_having_added_it(
    family: list[Path], tmp_path: Path, weight: float, gone: int
) -> None:
    fold = Fold.init(family[0], tmp_path / "all", "gram")
    without = Fold.init(family[0], tmp_path / "without", "gram")
    for number in (1, 2, 3):
        fold.add(family[number], weight=weight)
        if number != gone:
            without.add(family[number], weight=weight)
    fold.remove(family[gone])
    before, after = arrays(load_sums(without.path)), arrays(load_sums(fold.path))
    for slot in before:
        assert distance(after[slot], before[slot]) <= 1e-12, slot


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.3, 0.7, 1.1, 0.9)])
@pytest.mark.parametrize(("sums_dtype", "tolerance"), [("F32", 1e-6), ("F64", 1e-12)])
def test_order_of_arrival_changes_nothing_on_disk(
    family: list[Path], tmp_path: Path, weights: tuple[float, ...], sums_dtype: str, tolerance: float
) -> None:
    states = []
    for i, order in enumerate([(1, 2, 3, 4), (4, 2, 1, 3), (3, 4, 2, 1)]):
        fold = Fold.init(family[0], tmp_path / str(i), "gram", sums_dtype=sums_dtype)
        for number in order:
            fold.add(family[number], weight=weights[number - 1])
        states.append(arrays(load_sums(fold.path)))
    for other in states[1:]:
        for slot, x in states[0].items():
            assert distance(other[slot], x) <= tolerance, slot


def test_a_weight_given_late_equals_the_weight_given_at_once(family: list[Path], tmp_path: Path) -> None:
    at_once = Fold.init(family[0], tmp_path / "at-once", "gram")
    at_once.add(family[1], weight=0.7)
    at_once.add(family[2], weight=1.9)
    late = folded(tmp_path / "late", family[0], family[1:3])
    late.reweight(family[1], 0.7)
    entry = late.reweight("expert-02", 1.9)
    assert (entry.name, entry.weight) == ("expert-02", 1.9)
    assert [(c.name, c.weight) for c in late.ledger.contributors] == [
        (c.name, c.weight) for c in at_once.ledger.contributors
    ]
    assert [c.norm for c in late.ledger.contributors] == pytest.approx([c.norm for c in at_once.ledger.contributors])
    before, after = arrays(load_sums(at_once.path)), arrays(load_sums(late.path))
    for slot in before:
        assert distance(after[slot], before[slot]) <= 1e-12, slot


@pytest.mark.parametrize("method", ["gram", "mean", "linear"])
def test_combining_two_states_equals_adding_all_to_one(family: list[Path], tmp_path: Path, method: str) -> None:
    one = folded(tmp_path / "one", family[0], family[1:3], method)
    two = folded(tmp_path / "two", family[0], family[3:5], method)
    before = tree(one.path), tree(two.path)
    both = Fold.combine([one.path, two.path], tmp_path / "both")
    assert (tree(one.path), tree(two.path)) == before
    every = folded(tmp_path / "every", family[0], family[1:5], method)
    assert both.ledger.contributors == every.ledger.contributors
    expected, found = arrays(load_sums(every.path)), arrays(load_sums(both.path))
    assert set(found) == set(expected)
    for slot in expected:
        assert distance(found[slot], expected[slot]) <= 1e-12, slot
    assert all(f.status == "ok" for f in both.verify())
    both.remove(family[4])
    assert [c.name for c in both.ledger.contributors] == ["expert-01", "expert-02", "expert-03"]


def test_combining_with_an_empty_state_changes_nothing(family: list[Path], tmp_path: Path) -> None:
    one = folded(tmp_path / "one", family[0], family[1:3])
    empty = Fold.init(family[0], tmp_path / "empty", "gram")
    for states in ([one.path, empty.path], [empty.path, one.path]):
        both = Fold.combine(states, tmp_path / f"both-{states[0].name}")
        assert both.ledger.contributors == one.ledger.contributors
        assert all(torch.equal(x, load_sums(one.path)[n]) for n, x in load_sums(both.path).items())
        assert load_sums(both.path)
    none = Fold.combine([empty.path, Fold.init(family[0], tmp_path / "empty-2", "gram").path], tmp_path / "none")
    assert load_sums(none.path) == {}
    assert none.ledger.contributors == ()


def test_zero_change_divides_by_nothing_and_is_counted(family: list[Path], tmp_path: Path) -> None:
    base = load(family[0])
    same = save(base, tmp_path / "same")
    fold = folded(tmp_path / "state", family[0], [same])
    assert all(not x.any() for x in load_sums(fold.path).values())
    merged = load(fold.export(tmp_path / "out"))
    assert all(torch.equal(merged[name], base[name]) for name in base)
    fold.add(family[1])
    halves = change(load(fold.export(tmp_path / "mean", "mean", dtype="F64")), base)
    for name, x in change(load(family[1]), base).items():
        assert distance(halves[name], x / 2) <= 1e-6, name


def test_removing_the_last_expert_leaves_an_empty_state(family: list[Path], tmp_path: Path) -> None:
    fold = folded(tmp_path / "state", family[0], family[1:2])
    fold.remove("expert-01")
    ledger = read_ledger(fold.path)
    assert (ledger.contributors, ledger.sums, ledger.generation) == ((), None, 2)
    assert sorted(p.name for p in fold.path.iterdir()) == ["base.json", "ledger.json"]
    base = load(family[0])
    merged = load(fold.export(tmp_path / "out"))
    assert all(torch.equal(merged[name], base[name]) for name in base)
    fold.add(family[2])
    fresh = folded(tmp_path / "fresh", family[0], family[2:3])
    assert all(torch.equal(x, load_sums(fresh.path)[n]) for n, x in load_sums(fold.path).items())


@pytest.mark.parametrize("method", ["gram", "opcm", "ties", "tsv_m"])
def test_state_of_twelve_experts_is_as_large_as_that_of_two(tmp_path: Path, method: str) -> None:
    family = save_family(tmp_path / "models", 12)
    fold = Fold.init(family[0], tmp_path / "state", method)
    sizes = {}
    for number, expert in enumerate(family[1:], 1):
        fold.add(expert)
        if number in (2, 12):
            assert fold.ledger.sums is not None
            folder = fold.path / fold.ledger.sums
            sizes[number] = {p.name: p.stat().st_size for p in folder.iterdir()}
            sizes[number]["merganser.json"] -= len(str(number))  # the generation's digits
            ledger_bytes = (fold.path / "ledger.json").stat().st_size
            others = fold.state_bytes - ledger_bytes - sum(p.stat().st_size for p in folder.iterdir())
            sizes[number]["all but sums and ledger"] = others
            lines = (fold.path / "ledger.json").read_text("utf-8").splitlines()
            sizes[number]["ledger's lines beside contributors"] = len(lines) - number * _lines_of_an_entry(lines)
    assert sizes[12] == sizes[2]


def _lines_of_an_entry(lines: list[str]) -> int:
    """Lines of the first contributor's record."""
    begin = next(i for i, line in enumerate(lines) if '"name"' in line) - 1
    end = next(i for i, line in enumerate(lines) if i > begin and line.strip() in ("},", "}"))
    return end - begin + 1

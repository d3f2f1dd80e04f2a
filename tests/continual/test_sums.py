"""Sums over experts: whatever came, went or changed its weight, the sums are those of the experts that are in."""

from __future__ import annotations

import shutil
import tempfile
from itertools import pairwise
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
from merganser.errors import MerganserError, ParameterError, StateError
from merganser.numerics import unpack_symmetric
from support import (
    MATRICES,
    STATISTICS,
    Arrays,
    arrays,
    as_matrix,
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


def gram_sums(changes: list[Arrays], weights: list[float]) -> Arrays:
    """S, G and B of the experts, term by term in float64."""
    sums: Arrays = {}
    for tau, w in zip(changes, weights, strict=True):
        for name, x in tau.items():
            sums[f"s/{name}"] = sums.get(f"s/{name}", 0) + w * x
            if name in MATRICES:
                d = as_matrix(x) if x.size else np.zeros((0, x.shape[-1]))
                square = float(np.sum(d * d)) or 1.0
                sums[f"g/{name}"] = sums.get(f"g/{name}", 0) + w * (d.T @ d) / square
                sums[f"b/{name}"] = sums.get(f"b/{name}", 0) + w * (d @ d.T @ d) / square
    return sums


def stored_sums(state: Path, base: Arrays) -> Arrays:
    """The sums on disk in the shapes of `gram_sums`."""
    found: Arrays = {}
    for slot, x in load_sums(state).items():
        kind, name = slot.split("/", 1)
        shape = base[name].shape
        if kind == "g":
            found[slot] = unpack_symmetric(x, int(np.prod(shape[1:]))).double().numpy()
        else:
            found[slot] = x.double().numpy().reshape(shape if kind == "s" else as_matrix(base[name]).shape)
    return found


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


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("mixed"), 4)


@pytest.fixture(scope="module")
def family64(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("double"), 4, dtype=torch.float64)


def folded(folder: Path, base: Path, experts: list[Path], method: str = "gram", **options: object) -> Fold:
    fold = Fold.init(base, folder, method, threads=1, **options)
    for expert in experts:
        fold.add(expert, threads=1)
    return fold


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


# One state, every finaliser.


@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.1])
def test_gram_export_equals_the_closed_form(family64: list[Path], tmp_path: Path, eps: float) -> None:
    base = load(family64[0])
    weights = [0.5, 1.0, 2.0]
    fold = Fold.init(family64[0], tmp_path / "state", "gram", eps=eps)
    for expert, weight in zip(family64[1:4], weights, strict=True):
        fold.add(expert, weight=weight)
    found = change(load(fold.export(tmp_path / "out")), base)
    sums = gram_sums([change(load(e), base) for e in family64[1:4]], weights)
    for name, x in found.items():
        if name in MATRICES and x.size:
            g, b = sums[f"g/{name}"], sums[f"b/{name}"]
            n = len(g)
            expected = b @ np.linalg.inv(g + eps * np.trace(g) / n * np.eye(n))
            assert distance(as_matrix(x), expected) <= 1e-10, name
        else:
            assert distance(x, sums[f"s/{name}"] / sum(weights)) <= 1e-12, name


def test_gram_export_is_where_the_gradient_vanishes(family64: list[Path], tmp_path: Path) -> None:
    base = load(family64[0])
    fold = folded(tmp_path / "state", family64[0], family64[1:4])
    taus = [change(load(e), base) for e in family64[1:4]]
    sizes = []
    for eps in (1e-2, 1e-4, 1e-6, 1e-8):
        found = change(load(fold.export(tmp_path / "out", eps=eps, overwrite=True)), base)
        worst = 0.0
        for name in ("tall.weight", "square.weight", "large.weight", "bf16.weight"):
            ds = [as_matrix(t[name]) for t in taus]
            parts = [2 * (as_matrix(found[name]) - d) @ d.T @ d / np.sum(d * d) for d in ds]
            worst = max(worst, float(np.linalg.norm(sum(parts))) / max(float(np.linalg.norm(p)) for p in parts))
        sizes.append(worst)
    assert sizes[-1] <= 1e-6
    assert all(later < earlier / 10 for earlier, later in pairwise(sizes))


def test_gram_sees_inputs_where_a_model_stores_in_by_out(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"h.0.attn.c_attn.weight": torch.randn(5, 9, generator=generator, dtype=torch.float64)}
    expert = {n: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in base.items()}
    save(base, tmp_path / "base", {"model_type": "gpt2"})
    save(expert, tmp_path / "expert")
    fold = folded(tmp_path / "state", tmp_path / "base", [tmp_path / "expert"])
    assert load_sums(fold.path)["g/h.0.attn.c_attn.weight"].shape == (3, 7)  # 5 inputs
    found = change(load(fold.export(tmp_path / "out")), base)["h.0.attn.c_attn.weight"]
    d = change(expert, base)["h.0.attn.c_attn.weight"].T
    g, b = d.T @ d / np.sum(d * d), d @ d.T @ d / np.sum(d * d)
    assert distance(found.T, b @ np.linalg.inv(g + 0.01 * np.trace(g) / 5 * np.eye(5))) <= 1e-10


def test_one_state_gives_every_finaliser_its_literal_recurrence(family64: list[Path], tmp_path: Path) -> None:
    base = load(family64[0])
    taus = [change(load(e), base) for e in family64[1:5]]
    swa: Arrays = {n: np.zeros_like(x) for n, x in taus[0].items()}
    task: Arrays = {n: np.zeros_like(x) for n, x in taus[0].items()}
    fold = Fold.init(family64[0], tmp_path / "state", "gram")
    for t, (tau, expert) in enumerate(zip(taus, family64[1:5], strict=True), 1):
        fold.add(expert)
        for name, x in tau.items():
            swa[name] = ((t - 1) * swa[name] + x) / t
            task[name] = task[name] + 0.4 * x
        for method, expected, options in (
            ("mean", swa, {}),
            ("average", swa, {}),
            ("task_arithmetic", task, {"scale": 0.4}),
            ("linear", {n: x / 0.4 for n, x in task.items()}, {}),
        ):
            found = change(load(fold.export(tmp_path / "out", method, overwrite=True, **options)), base)
            for name, x in expected.items():
                # Running means and variances are averaged, whatever is done to the weights.
                assert distance(found[name], swa[name] if name in STATISTICS else x) <= 1e-12, (method, name)


def test_iso_c_export_has_the_mean_singular_value_everywhere(family64: list[Path], tmp_path: Path) -> None:
    base = load(family64[0])
    fold = folded(tmp_path / "state", family64[0], family64[1:4])
    found = change(load(fold.export(tmp_path / "out", "iso_c", scale=1.2)), base)
    total = {n: sum(change(load(e), base)[n] for e in family64[1:4]) for n in found}
    for name in MATRICES:
        if found[name].size:
            left, s, right = np.linalg.svd(as_matrix(total[name]), full_matrices=False)
            assert distance(as_matrix(found[name]), 1.2 * s.mean() * left @ right) <= 1e-12, name


def test_export_leaves_the_state_as_it_is(family: list[Path], tmp_path: Path) -> None:
    fold = folded(tmp_path / "state", family[0], family[1:3])
    before = tree(fold.path)
    for method in ("gram", "mean", "iso_c", "task_arithmetic", "linear", "average"):
        fold.export(tmp_path / method, method)
    assert tree(fold.path) == before


def test_linear_takes_negative_weights_and_gram_refuses_them(family: list[Path], tmp_path: Path) -> None:
    fold = Fold.init(family[0], tmp_path / "state", "linear")
    fold.add(family[1])
    fold.add(family[2], weight=-0.5)
    base = load(family[0])
    one, two = change(load(family[1]), base), change(load(family[2]), base)
    found = stored_sums(fold.path, arrays(base))
    for name, x in one.items():
        # A running variance of which half is taken away may be negative: statistics count sizes of weights.
        expected = x + 0.5 * two[name] if "running" in name else x - 0.5 * two[name]
        assert distance(found[f"s/{name}"], expected) <= 1e-6, name
    gram = Fold.init(family[0], tmp_path / "gram", "gram")
    with pytest.raises(ParameterError, match=r"weight is -0\.5; gram needs a positive number"):
        gram.add(family[1], weight=-0.5)


@pytest.mark.parametrize("weight", [1e300, 1e308])
@pytest.mark.parametrize("arrival", [1, 2])
def test_weight_that_overflows_is_refused_and_the_state_untouched(
    family: list[Path], tmp_path: Path, weight: float, arrival: int
) -> None:
    fold = folded(tmp_path / "state", family[0], family[1:arrival], "linear")
    before = tree(fold.path)
    try:
        fold.add(family[arrival], weight=weight)
    except MerganserError:
        assert tree(fold.path) == before
    Fold(fold.path)  # a ledger with an infinite norm could not be read again
    assert all(bool(torch.isfinite(x).all()) for x in load_sums(fold.path).values())

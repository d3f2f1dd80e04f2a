"""What every row of the table of methods promises; a new row is covered the moment that it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merganser.continual.kinds import Kind, exports, kind_of
from merganser.continual.roles import Role
from merganser.errors import ParameterError
from merganser.methods import METHODS, Factors, Step, Sums, call, describe, settings_of

#: Everything small that a checkpoint may hold, and one matrix large enough for rules that share out its rank.
CASES: list[tuple[Role, tuple[int, ...]]] = [
    ("vector", ()),
    ("vector", (1,)),
    ("vector", (0, 4)),
    ("vector", (6, 5)),
    ("matrix", (0, 4)),
    ("matrix", (16, 1)),
    ("matrix", (1, 16)),
    ("matrix", (1, 1)),
    ("matrix", (8, 5)),
    ("matrix", (5, 8)),
    ("matrix", (4, 3, 3, 3)),
    ("matrix", (40, 33)),
    ("transposed", (33, 40)),
    ("transposed", (8, 5)),
    ("statistic", (4,)),
]
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
EVERY_CASE = pytest.mark.parametrize(("role", "shape"), CASES, ids=lambda v: str(v).replace(" ", ""))
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])
ORDER_FREE = [name for name, method in METHODS.items() if isinstance(method, Sums | Factors)]

State = dict[str, Tensor]


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fold(
    kind: Kind, role: Role, shape: tuple[int, ...], changes: list[Tensor], stored: torch.dtype = torch.float64
) -> State:
    """The state after all changes, kept as `stored` in between, as it is on disk."""
    state: State = {}
    for t, d in enumerate(changes, 1):
        new = kind.update(role, shape, state, kind.seen(role, shape, d), weight=1.0, t=t)
        state = {slot: x.to(stored) for slot, x in new.items()}
    return state


def finish(kind: Kind, role: Role, shape: tuple[int, ...], state: State, experts: int) -> Tensor:
    """The merged change that an export adds to the base, before the factor that some methods put on the whole."""
    return kind.restored(role, shape, kind.finalise(kind.method, role, shape, state, kind.given, float(experts)))


def merge(kind: Kind, role: Role, changes: list[Tensor], stored: torch.dtype = torch.float64) -> Tensor:
    shape = tuple(changes[0].shape)
    return finish(kind, role, shape, fold(kind, role, shape, changes, stored), len(changes))


class Recorder:
    """A rule that keeps count of its calls."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.calls, self.__wrapped__ = rule, 0, rule

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.rule(*args, **options)


@EVERY_METHOD
def test_contract_reaches_every_rule_of_the_row(name: str) -> None:
    row = METHODS[name]
    rules = {f: Recorder(getattr(row, f)) for f in ("function", "vector", "fold") if hasattr(row, f)}
    kind = replace(kind_of(name, {}), method=replace(row, **rules))
    for role, shape in CASES:
        merge(kind, role, [noise(shape, seed) for seed in range(3)])
    assert {f: rule.calls > 0 for f, rule in rules.items()} == dict.fromkeys(rules, True)


@EVERY_METHOD
def test_row_names_its_source_and_explains_itself(name: str) -> None:
    assert METHODS[name].source.startswith(("arXiv:", "OpenReview "))
    text = describe(name)
    assert METHODS[name].source.split(",")[0].removeprefix("OpenReview ") in text or "Source:" in text
    assert "=" in text.split("\n\n", 2)[1] or ":" in text.split("\n\n", 2)[1]
    assert all(setting in text for setting in settings_of(METHODS[name]))
    assert name in exports(kind_of(name, {}))


@EVERY_METHOD
@EVERY_CASE
@BOTH_DTYPES
def test_result_is_finite_and_of_the_tensor_s_shape(
    name: str, role: Role, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    kind = kind_of(name, {})
    state = fold(kind, role, shape, [noise(shape, seed, dtype) for seed in range(3)], dtype)
    assert {slot: tuple(x.shape) for slot, x in state.items()} == kind.slot_shapes(role, shape)
    found = finish(kind, role, shape, state, 3)
    assert tuple(found.shape) == shape
    assert bool(torch.isfinite(found).all())
    assert found.any() or not found.numel()


@EVERY_METHOD
@EVERY_CASE
@BOTH_DTYPES
def test_state_and_result_keep_the_dtype(name: str, role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kind = kind_of(name, {})
    state: State = {}
    for t in (1, 2):
        new = kind.update(role, shape, state, kind.seen(role, shape, noise(shape, t, dtype)), weight=1.0, t=t)
        # Sums may be handed over in float64, to be rounded once, on disk; never in less than what came in.
        summed = isinstance(kind.method, Sums) or role == "statistic"
        exact = {dtype, torch.float64} if summed else {dtype}
        assert {x.dtype for x in new.values()} <= exact
        state = {slot: x.to(dtype) for slot, x in new.items()}
    assert finish(kind, role, shape, state, 2).dtype == dtype


@EVERY_METHOD
@EVERY_CASE
def test_zero_changes_stay_zero(name: str, role: Role, shape: tuple[int, ...]) -> None:
    found = merge(kind_of(name, {}), role, [torch.zeros(shape)] * 3)
    assert torch.equal(found, torch.zeros(shape, dtype=found.dtype))


@EVERY_METHOD
@EVERY_CASE
def test_one_zero_change_among_others_is_taken(name: str, role: Role, shape: tuple[int, ...]) -> None:
    for place in range(3):
        changes = [torch.zeros(shape) if i == place else noise(shape, i) for i in range(3)]
        found = merge(kind_of(name, {}), role, changes)
        assert bool(torch.isfinite(found).all())


@EVERY_METHOD
@EVERY_CASE
def test_rank_one_changes_are_taken(name: str, role: Role, shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    found = merge(kind_of(name, {}), role, [ones, 2 * ones, -0.5 * ones])
    assert bool(torch.isfinite(found).all())


@EVERY_METHOD
@EVERY_CASE
def test_inputs_are_not_written_to(name: str, role: Role, shape: tuple[int, ...]) -> None:
    kind = kind_of(name, {})
    state: State = {}
    for t in (1, 2, 3):
        d = noise(shape, t)
        seen = kind.seen(role, shape, d)
        before = {slot: x.clone() for slot, x in state.items()}
        new = kind.update(role, shape, state, seen, weight=0.5, t=t)
        assert torch.equal(d, noise(shape, t))
        assert all(torch.equal(state[slot], before[slot]) for slot in state)
        state = new
    kept = {slot: x.clone() for slot, x in state.items()}
    finish(kind, role, shape, state, 3)
    assert all(torch.equal(state[slot], kept[slot]) for slot in state)


@EVERY_METHOD
@EVERY_CASE
def test_result_does_not_depend_on_what_was_merged_before_in_the_same_process(
    name: str, role: Role, shape: tuple[int, ...]
) -> None:
    kind = kind_of(name, {})
    changes = [noise(shape, seed) for seed in range(3)]
    alone = merge(kind, role, changes)
    merge(kind, "matrix", [noise((7, 9), seed) for seed in range(4)])
    merge(kind, "vector", [noise((50,), seed) for seed in range(2)])
    assert torch.equal(merge(kind, role, changes), alone)


@EVERY_METHOD
@EVERY_CASE
def test_chunks_equal_the_whole_where_the_kind_allows_them(name: str, role: Role, shape: tuple[int, ...]) -> None:
    kind = kind_of(name, {})
    changes = [noise(shape, seed) for seed in range(3)]
    whole = merge(kind, role, changes)
    # Rows one at a time give the same bits, or the kind must say that it needs the whole tensor.
    rows = range(shape[0]) if shape else range(0)
    state: State = {}
    if kind.chunked(role, shape) and rows:
        for t, d in enumerate(changes, 1):
            parts = []
            for i in rows:
                old = {slot: x[i : i + 1] for slot, x in state.items()}
                parts.append(kind.update(role, shape, old, kind.seen(role, shape, d[i : i + 1]), weight=1.0, t=t))
            state = {slot: torch.cat([p[slot] for p in parts]).double() for slot in parts[0]}
        pieces = [
            kind.finalise(kind.method, role, shape, {s: x[i : i + 1] for s, x in state.items()}, kind.given, 3.0)
            for i in rows
        ]
        assert torch.equal(torch.cat(pieces), whole)
    else:
        assert not rows or kind.treats_as_matrix(role, shape) or isinstance(kind.method, Step)


@pytest.mark.parametrize("name", ORDER_FREE)
@EVERY_CASE
@pytest.mark.parametrize(
    ("stored", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["F32 sums", "F64 sums"]
)
def test_order_of_arrival_changes_nothing(
    name: str, role: Role, shape: tuple[int, ...], stored: torch.dtype, tolerance: float
) -> None:
    kind = kind_of(name, {})
    changes = [noise(shape, seed, torch.float64 if stored == torch.float64 else torch.float32) for seed in range(4)]
    expected = merge(kind, role, changes, stored).double()
    # A ridge of eps times the mean eigenvalue lets rounding of float32 sums grow by 1 / eps in weak directions.
    ridge = settings_of(kind.method).get("eps", 1.0) if stored == torch.float32 else 1.0
    for order in ((3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)):
        found = merge(kind, role, [changes[i] for i in order], stored).double()
        assert float((found - expected).norm()) <= tolerance / ridge * max(float(expected.norm()), 1e-300)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, Sums)])
@EVERY_CASE
@pytest.mark.parametrize(
    ("stored", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["F32 sums", "F64 sums"]
)
def test_order_of_arrival_does_not_change_the_sums(
    name: str, role: Role, shape: tuple[int, ...], stored: torch.dtype, tolerance: float
) -> None:
    kind = kind_of(name, {})
    changes = [noise(shape, seed) for seed in range(4)]
    expected = fold(kind, role, shape, changes, stored)
    found = fold(kind, role, shape, changes[::-1], stored)
    for slot, x in expected.items():
        assert float((found[slot] - x).norm()) <= tolerance * max(float(x.norm()), 1e-300), slot


@EVERY_METHOD
def test_every_setting_refuses_what_is_out_of_range(name: str) -> None:
    any_finite = {("task_arithmetic", "scale")}
    for setting, default in settings_of(METHODS[name]).items():
        bad: list[object] = ["sideways"] if isinstance(default, str) else [nan, inf, -inf]
        if not isinstance(default, str) and (name, setting) not in any_finite:
            bad.append(-5)
        for value in bad:
            with pytest.raises(ParameterError, match=rf"{setting} is '?{value}"):
                kind_of(name, {setting: value})


@EVERY_METHOD
def test_every_setting_refuses_what_is_of_the_wrong_type(name: str) -> None:
    for setting, default in settings_of(METHODS[name]).items():
        for value in (7, None) if isinstance(default, str) else ("much", None, [1.0]):
            with pytest.raises(ParameterError, match=setting):
                kind_of(name, {setting: value})


@EVERY_METHOD
def test_every_setting_takes_its_default(name: str) -> None:
    settings = settings_of(METHODS[name])
    given = merge(kind_of(name, settings), "matrix", [noise((40, 33), seed) for seed in range(3)])
    assert torch.equal(given, merge(kind_of(name, {}), "matrix", [noise((40, 33), seed) for seed in range(3)]))


@EVERY_METHOD
def test_every_setting_is_heard(name: str) -> None:
    other: dict[str, object] = {"alpha": 0.9, "diagonal": "keep", "scale": 0.7, "density": 0.6, "eps": 0.9}
    other |= {"rank_merged": 0.5, "rank_new": 0.5, "rho": 0.5, "noise": 0.5, "anchor": 0.5}
    changes = [noise((40, 33), seed) for seed in range(3)]
    default = merge(kind_of(name, {}), "matrix", changes)
    for setting in settings_of(METHODS[name]):
        assert not torch.equal(merge(kind_of(name, {setting: other[setting]}), "matrix", changes), default), setting


@EVERY_METHOD
def test_unknown_setting_is_refused_by_name(name: str) -> None:
    with pytest.raises(ParameterError, match=rf"{name} has no setting 'densty'\nhint: it takes "):
        kind_of(name, {"densty": 0.2})


def test_unknown_method_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ParameterError, match="there is no method 'opmc'\nhint: did you mean opcm"):
        kind_of("opmc", {})


@EVERY_METHOD
def test_only_sums_can_be_removed(name: str) -> None:
    assert kind_of(name, {}).removable == isinstance(METHODS[name], Sums)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if isinstance(m, Step) and m.scale is not None])
def test_scale_of_an_empty_or_zero_state_is_one(name: str) -> None:
    row = METHODS[name]
    assert isinstance(row, Step)
    assert row.scale is not None
    assert row.scale([], 0.0) == row.scale([0.0, 0.0], 0.0) == row.scale([1.0], 0.0) == 1.0


SCRIPT = """
import hashlib, sys
sys.path[:0] = [sys.argv[1]]
import torch
torch.set_num_threads(1)
from test_methods import CASES, METHODS, kind_of, merge, noise
for name in METHODS:
    hashed = hashlib.sha256()
    for role, shape in CASES:
        hashed.update(merge(kind_of(name, {}), role, [noise(shape, seed) for seed in range(3)]).numpy().tobytes())
    print(name, hashed.hexdigest())
"""


def test_two_fresh_processes_give_the_same_bits() -> None:
    here = str(Path(__file__).parent)
    outputs = []
    for seed in ("1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, here],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert [line.split()[0] for line in outputs[0].splitlines()] == list(METHODS)


def test_a_rule_is_handed_only_what_its_signature_names() -> None:
    assert call(lambda s, scale=1.0: (s, scale), {"s": 1, "g": 2}, {"scale": 3.0, "eps": 4}) == (1, 3.0)

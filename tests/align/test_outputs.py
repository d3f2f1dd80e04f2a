"""What parents give is noted while they are measured: the same rows, and no run more for the refit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_partial import images, pair, small
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.outputs import Outputs
from merganser.align.partial import Pair
from merganser.align.sequence import Sampling, to_note

BUDGETS = (1.2, 1.6)


class Line(nn.Module):
    """A convolution along a line, of which a linear layer reads every place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).transpose(1, 2).tanh())


def noted(rows: dict[str, list[int]]) -> tuple[Line, list[Tensor], Outputs]:
    torch.manual_seed(0)
    network, parts = Line(), [torch.randn(n, 2, 6) for n in (3, 1, 2)]
    outputs = Outputs({name: torch.tensor(some) for name, some in rows.items()}, {"first": 5, "last": 5})
    with torch.no_grad():
        for x in parts:
            with outputs.noting(network, ((x,), {})):
                network(x)
    return network, parts, outputs


def test_rows_of_all_batches_are_noted_by_their_numbers() -> None:
    rows = [0, 4, 5, 14, 15, 19, 20, 29]  # 15, 5 and 10 rows
    network, parts, outputs = noted({"first": rows, "last": rows})
    with torch.no_grad():
        first = [network.first(x) for x in parts]
        last = [network(x) for x in parts]
    every = {
        "first": torch.cat([y.transpose(1, 2).reshape(-1, 3) for y in first]),
        "last": torch.cat([y.reshape(-1, 4) for y in last]),
    }
    for name, y in every.items():
        for some in (rows, [5, 19], [29], []):
            found = outputs.at(name, torch.tensor(some, dtype=torch.int64))
            assert found is not None
            assert torch.equal(found, y[some])


@pytest.mark.parametrize("rows", [[1], [0, 3], [30], [0, 4, 31]])
def test_rows_that_were_not_noted_are_not_given(rows: list[int]) -> None:
    _, _, outputs = noted({"first": [0, 4, 29]})
    assert outputs.at("first", torch.tensor(rows)) is None
    assert outputs.at("last", torch.tensor([0])) is None


def test_a_network_has_no_hooks_after_it_was_noted() -> None:
    network, _, _ = noted({"first": [0]})
    assert not any(m._forward_hooks for m in network.modules())


def counted(both: Pair) -> list[int]:
    """A number that grows with every run of A's head."""
    runs = [0]

    def ran(*_: Any) -> None:
        runs[0] += 1

    both.one.get_submodule("head").register_forward_hook(ran)
    return runs


def test_parents_do_not_run_for_the_refit_of_any_budget_after_they_were_measured_and_no_bit_changes() -> None:
    """Apart from two looks at few examples: whether they are independent, and what is apart."""
    both, other = (pair(small(0), small(1), sampling=Sampling(rows=100)) for _ in range(2))
    runs, others = counted(both), counted(other)
    for budget in BUDGETS:
        found = []
        for it, many in ((both, runs), (other, others)):
            splits = it.splits(budget)
            if it is other:
                it._noted = None
            before = many[0]
            found.append((it.laid_out(splits), many[0] - before))
        (merged, few), (expected, more) = found
        assert merged.splits == expected.splits
        assert more - few >= len(both.batches)
        assert merged.refitted.residuals == expected.refitted.residuals
        for name, x in expected.network.state_dict().items():
            assert torch.equal(merged.network.state_dict()[name], x)


def test_outputs_that_do_not_fit_in_memory_are_not_noted() -> None:
    both = pair(small(0), small(1), sampling=Sampling(rows=100))
    units = {"stem": 6, "wide": 10, "inner": 8, "outer": 10, "head": 5}
    entries = {"stem": 27, "wide": 54, "inner": 10, "outer": 72, "head": 10}
    places = {"stem": 64, "wide": 16, "inner": 16, "outer": 16, "head": 1}
    rows = {name: min(18 * places[name], max(100, 4 * 2 * entries[name])) for name in units}  # of up to twice as wide
    nbytes = 2 * 8 * sum(rows[name] * units[name] for name in units)
    fits, lacks = (
        to_note(both.one, both._ran, both.batches, Sampling(rows=100, memory_bytes=most))
        for most in (nbytes, nbytes - 1)
    )
    assert lacks is None
    assert fits is not None
    assert {name: len(some) for name, some in fits[0].drawn.items()} == rows


def test_with_layers_that_fit_in_one_pass_parents_run_once_for_gains_and_every_refit() -> None:
    both = pair(small(0), small(1), way="layers")
    seen = both._ran.layers  # a run of its own
    runs: list[int] = []
    both.one.get_submodule("stem").register_forward_hook(lambda *_: runs.append(1))
    assert both.gains
    assert both._moments is not None
    assert set(both._moments) == set(seen)
    before = {name: joint.gram.clone() for name, joint in both._moments.items()}
    many = len(runs)
    again = [list(both.moments()) for _ in BUDGETS]
    assert len(runs) == many
    assert all(len(passes) == 1 for passes in again)
    both.merged(1.5)
    assert both._moments.keys() == before.keys()
    assert all(torch.equal(joint.gram, before[name]) for name, joint in both._moments.items())


def test_a_head_gives_its_outputs_though_measuring_needs_only_its_inputs() -> None:
    both = pair(small(0), small(1), sampling=Sampling(rows=100))
    assert both.gains
    assert both._noted is not None
    x = torch.cat([args[0] for args, _ in images()])
    with torch.no_grad():
        expected = both.one(x)
    rows = both._noted[0].drawn["head"]
    found = both._noted[0].at("head", rows)
    assert found is not None
    assert functional.l1_loss(found, expected[rows]) < 1e-12

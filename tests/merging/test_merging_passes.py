"""How often and how much of it at once a merge reads: its passes over large tensors."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_source import MemorySource
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.methods.joint import Joint


class Counting:
    """A source that keeps count of the rows that are read of it."""

    def __init__(self, source: Any) -> None:
        self._source, self.rows = source, 0
        self.ref, self.infos, self.aliases, self.identity = source.ref, source.infos, source.aliases, None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        found = self._source.read(name, rows)
        self.rows += len(found)
        return found

    def companions(self) -> tuple[Path, ...]:
        return ()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("sce", {"select_topk": 0.5, "among": "differing"}), ("sce", {"select_topk": 0.5}), ("ties", {"density": 0.3})],
)
def test_scores_of_a_large_tensor_are_never_there_all_at_once(
    method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import merganser.merging.held as held

    generator = torch.Generator().manual_seed(0)
    rows, wide = 4000, 500
    tensors = [{"a.weight": torch.randn(rows, wide, generator=generator)} for _ in range(3)]
    monkeypatch.setattr(held, "HELD_BYTES", 0)
    plan = make_plan(
        Recipe(method, (Slice((Input("m1"), Input("m2"))),), Input("m0"), settings=settings),
        {f"m{i}": MemorySource(f"m{i}", t) for i, t in enumerate(tensors)},
    )
    live, most = 0, 0

    def freed(entries: int) -> None:
        nonlocal live
        live -= entries

    def score(d: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal live, most
        found = [*inner(d)]
        for x in found:
            live += x.numel()
            weakref.finalize(x, freed, x.numel())
        most = max(most, live)
        return found

    assert isinstance(plan.rules.method, Joint)
    inner = plan.rules.method.score
    assert inner is not None
    joint = replace(plan.rules.method, score=score)
    merged = Merged(replace(plan, rules=replace(plan.rules, method=joint)), chunk_elements=1)
    merged.read("a.weight")
    assert 0 < most < rows * wide / 3


@pytest.mark.parametrize(
    ("method", "settings", "passes"),
    [
        ("linear", {}, 1),
        ("ties", {"density": 0.3}, 2.3),  # the ranks, with a sample of the rows
        ("karcher", {}, 2),
        ("dare_ties", {"rescale": "l1"}, 2),
        ("della", {"rescale": "l1"}, 2),
        ("sce", {"select_topk": 0.5}, 3.3),
    ],
)
def test_every_model_is_read_a_fixed_number_of_times_and_a_small_one_once(
    method: str, settings: dict[str, Any], passes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merganser.merging.held as held
    import merganser.merging.merged as module

    generator = torch.Generator().manual_seed(0)
    tensors = [{"a.weight": torch.randn(400, 1000, generator=generator)} for _ in range(3)]
    base = Input("m0") if method not in ("linear", "karcher") else None
    found, read = [], []
    for most in (held.HELD_BYTES, 0):
        monkeypatch.setattr(held, "HELD_BYTES", most)
        monkeypatch.setattr(module, "HELD_BYTES", most)
        sources = {f"m{i}": Counting(MemorySource(f"m{i}", t)) for i, t in enumerate(tensors)}
        plan = make_plan(Recipe(method, (Slice((Input("m1"), Input("m2"))),), base, settings=settings), sources)
        merged = Merged(plan, chunk_elements=1)
        parts = list(merged.chunks("a.weight"))
        assert len(parts) > 5
        found.append(torch.cat([merged.read("a.weight", rows) for rows in parts]))
        read.append(sources["m1"].rows)
    assert read[0] == 400
    assert 400 * int(passes) <= read[1] <= 400 * passes
    assert torch.equal(found[0], found[1])

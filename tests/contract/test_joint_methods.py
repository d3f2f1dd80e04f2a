"""What every row of the table of joint methods promises, whatever it computes; a new row is covered at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merganser.merging.lookup as lookup
from memory_source import MemorySource
from merganser.merging.lookup import joint_settings
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.methods.joint import JOINT_BROUGHT, MERGES, Joint

#: Everything small that a checkpoint may hold, one matrix with a rank to share out, and one of several cells.
SHAPES: dict[str, tuple[int, ...]] = {
    "scale": (),
    "one.bias": (1,),
    "empty.weight": (0, 4),
    "column.weight": (16, 1),
    "row.weight": (1, 16),
    "wide.weight": (5, 8),
    "tall.weight": (8, 5),
    "conv.weight": (4, 3, 3, 3),
    "table_embed.weight": (6, 5),
    "rank.weight": (40, 33),
    "norm.weight": (9,),
    "bn.running_var": (4,),
    "ids": (7,),
}
LARGE = {"large.weight": (90, 1500), "long.bias": (140_000,)}
#: A value for each setting that has no default.
REQUIRED = {"t": 0.3}
EVERY_ROW = pytest.mark.parametrize("name", MERGES)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])


def tensors(seed: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    made |= {n: x.abs() + 0.1 for n, x in made.items() if "running" in n}
    return made | ({"ids": torch.arange(7)} if "ids" in shapes else {})


def family(
    name: str, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> list[dict[str, Tensor]]:
    """The base and as many models as the row takes, at most three."""
    most = MERGES[name].models[1] or 3
    base = tensors(0, shapes, dtype)
    models = []
    for seed in range(1, 1 + max(MERGES[name].models[0], min(3, most))):
        moved = tensors(seed, shapes, dtype)
        models.append({n: x if n == "ids" else base[n].lerp(moved[n], 0.2) for n, x in base.items()})
    return [base, *models]


def merge(
    name: str,
    models: list[dict[str, Tensor]],
    *,
    chunk_elements: int = 1 << 18,
    weights: list[float] | None = None,
    labels: list[str] | None = None,
) -> dict[str, Tensor]:
    """The merged model of a family; the base comes first."""
    row = MERGES[name]
    labels = labels or [f"m{i}" for i in range(len(models) - 1)]
    sources = {label: MemorySource(label, m) for label, m in zip(["base", *labels], models, strict=True)}
    for label, model in zip(labels, models[1:], strict=True):
        sources[f"{label}-measured"] = measured(label, model)
    given = weights if weights is not None and "weight" in row.needs else [None] * len(labels)
    inputs = tuple(
        Input(
            label, settings={} if w is None else {"weight": w}, statistics=f"{label}-measured" if wants(row) else None
        )
        for label, w in zip(labels, given, strict=True)
    )
    settings = {n: REQUIRED[n] for n, default in joint_settings(row).items() if default is lookup.MISSING}
    recipe = Recipe(name, (Slice(inputs),), Input("base") if row.needs_base else None, settings=settings)
    used = {ref: sources[ref] for ref in (*recipe.refs, *recipe.statistics)}
    merged = Merged(make_plan(recipe, used), chunk_elements=chunk_elements)
    found = {}
    for tensor in merged.infos:
        parts = [merged.read(tensor, rows) for rows in merged.chunks(tensor)]
        found[tensor] = torch.cat(parts) if len(parts) > 1 else parts[0]
        merged.forget(tensor)
    return found


def wants(row: Joint) -> bool:
    return bool({"gram", "fisher"} & set(row.needs))


def measured(label: str, model: dict[str, Tensor]) -> MemorySource:
    """Statistics of a model as a survey writes them: a Gram matrix of inputs, and a Fisher diagonal, of each weight."""
    generator = torch.Generator().manual_seed(len(label) + ord(label[-1]))
    made = {}
    for name, x in model.items():
        if not x.is_floating_point():
            continue
        made[f"fisher/{name}"] = torch.rand(x.shape, generator=generator)
        if x.dim() >= 2:
            width = int(torch.Size(x.shape[1:]).numel())
            inputs = torch.randn(width + 3, width, generator=generator)
            made[f"gram/{name}"] = inputs.T @ inputs
    return MemorySource(f"{label}-measured", made)


def bits(model: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, x in sorted(model.items()):
        hashed.update(name.encode() + x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class Recorder:
    """A rule that keeps count of its calls."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.calls, self.__wrapped__ = rule, 0, rule

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.rule(*args, **options)


@EVERY_ROW
def test_contract_reaches_every_rule_of_the_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = MERGES[name]
    parts = [f for f in ("function", "vector", "score", "ranks") if getattr(row, f) is not None]
    rules = {f: Recorder(getattr(row, f)) for f in parts}
    monkeypatch.setitem(MERGES, name, replace(row, **rules))
    merge(name, family(name))
    assert {f: rule.calls > 0 for f, rule in rules.items()} == dict.fromkeys(rules, True)


@EVERY_ROW
def test_row_names_its_source_and_all_that_it_needs(name: str) -> None:
    row = MERGES[name]
    assert row.source.startswith(("arXiv:", "OpenReview ", "mergekit", "doi:", "Shoemake"))
    assert row.needs
    assert set(row.per_model) <= set(joint_settings(row))
    assert not set(joint_settings(row)) & JOINT_BROUGHT
    assert ("keep" in row.needs) == (row.score is not None) == (row.ranks is not None)
    documented = (sys.modules[row.function.__module__].__doc__ or "") + (row.function.__doc__ or "")
    assert "=" in documented
    assert "Source:" in documented
    assert all(f"{setting}:" in documented for setting in joint_settings(row))


@EVERY_ROW
@BOTH_DTYPES
def test_result_is_finite_and_of_each_tensor_s_shape_and_type(name: str, dtype: torch.dtype) -> None:
    models = family(name, dtype)
    found = merge(name, models)
    for tensor, x in models[0].items():
        assert found[tensor].shape == x.shape, tensor
        assert found[tensor].dtype == x.dtype, tensor
        assert bool(torch.isfinite(found[tensor]).all()), tensor
    assert torch.equal(found["ids"], models[0]["ids"])
    assert any(not torch.equal(found[n], models[0][n]) for n in ("wide.weight", "rank.weight"))


@EVERY_ROW
def test_models_equal_to_the_base_give_the_base(name: str) -> None:
    base, *models = family(name)
    found = merge(name, [base, *(dict(base) for _ in models)])
    for tensor, x in base.items():
        torch.testing.assert_close(found[tensor], x, rtol=2e-6, atol=1e-7, msg=tensor)


@EVERY_ROW
def test_zeros_give_zeros(name: str) -> None:
    zeros = [{n: torch.zeros_like(x) for n, x in m.items()} for m in family(name)]
    found = merge(name, zeros)
    assert all(not x.any() for x in found.values())


@EVERY_ROW
def test_copies_of_one_model_move_no_entry_against_it(name: str) -> None:
    base, model, *others = family(name)
    found = merge(name, [base, model, *(dict(model) for _ in others)])
    if MERGES[name].base_is_model:  # a great circle leaves the straight line, on the side of neither
        return
    if MERGES[name].vector is not None:  # spectra are reshaped: the direction as a whole stays
        for tensor in ("wide.weight", "rank.weight"):
            assert float(((found[tensor] - base[tensor]) * (model[tensor] - base[tensor])).sum()) > 0
        return
    for tensor, x in base.items():
        if x.is_floating_point() and "running" not in tensor:
            moved, expected = found[tensor].double() - x.double(), model[tensor].double() - x.double()
            assert bool((moved * expected >= -1e-6 * expected.abs() * (1 + x.double().abs())).all()), tensor


@EVERY_ROW
def test_order_of_the_models_does_not_matter(name: str) -> None:
    base, *models = family(name)
    weights = [0.5, 1.5, 1.0][: len(models)]
    labels = ["a", "b", "c"][: len(models)]
    found = merge(name, [base, *models], weights=weights, labels=labels)
    turned = merge(name, [base, *models[::-1]], weights=weights[::-1], labels=labels[::-1])
    for tensor, x in found.items():
        torch.testing.assert_close(turned[tensor], x, rtol=1e-4, atol=2e-5, msg=tensor)


@EVERY_ROW
def test_same_bits_in_any_chunks(name: str) -> None:
    models = family(name, shapes=LARGE | {"wide.weight": (5, 8)})
    whole = merge(name, models, chunk_elements=1 << 40)
    for elements in (1, 1 << 17):
        assert bits(merge(name, models, chunk_elements=elements)) == bits(whole)


def test_same_bits_in_two_processes() -> None:
    script = "import test_joint_methods as t; print(*(t.bits(t.merge(n, t.family(n))) for n in t.MERGES))"
    seen = set()
    for hash_seed in ("1", "2"):
        here = Path(__file__).parent
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
            "PYTHONHASHSEED": hash_seed,
            "OMP_NUM_THREADS": hash_seed,
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(seen.pop().split()) == len(MERGES)

"""What stays behind of experts that were taken out: nothing, wherever no expert that is left changed a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch

from merganser.continual import Fold
from support import Model, load, save

KEPT_WEIGHTS = (1.0, 1e-6)


def expert(base: Model, seed: int, names: Sequence[str], size: float = 0.1) -> Model:
    """The base with `names` moved at random."""
    generator = torch.Generator().manual_seed(seed)
    return {n: x + size * torch.randn(x.shape, generator=generator) if n in names else x for n, x in base.items()}


def family(folder: Path, seed: int, n: int) -> tuple[Model, list[Path]]:
    """A base, three experts that change all of it, and one that leaves b.weight as it is."""
    generator = torch.Generator().manual_seed(seed)
    base = {"a.weight": torch.randn(6, n, generator=generator), "b.weight": torch.randn(8, n, generator=generator)}
    models = [base, *(expert(base, 10 * seed + i, tuple(base), 0.1 * i) for i in (1, 2, 3))]
    models.append(expert(base, 10 * seed + 4, ("a.weight",)))
    return base, [save(model, folder / name) for name, model in zip("0ACDB", models, strict=True)]


@pytest.mark.parametrize("method", ["gram", "gram_anchored"])
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept_weight", KEPT_WEIGHTS)
def test_tensor_that_no_expert_left_changes_is_the_bases_in_any_order_of_removal(
    tmp_path: Path, method: str, n: int, seed: int, kept_weight: float
) -> None:
    base, (root, a, c, d, b) = family(tmp_path, seed, n)
    alone = Fold.init(root, tmp_path / "alone", method)
    alone.add(b, weight=kept_weight)
    expected = load(alone.export(tmp_path / "expected"))
    order = list(permutations((a, c, d)))[(seed * 3 + n) % 6]
    fold = Fold.init(root, tmp_path / "state", method)
    fold.add_all([a, c], weight=0.3)
    fold.add(b, weight=kept_weight)
    fold.add(d, weight=3.0)
    fold.reweight("C", 0.7)
    for one in order:
        fold.remove(one)
    for other in (method, "iso_c"):
        merged = load(fold.export(tmp_path / other, other))
        assert torch.equal(merged["b.weight"], base["b.weight"]), other
    merged = load(tmp_path / method)
    moved = expected["a.weight"] - base["a.weight"]
    assert float((merged["a.weight"] - expected["a.weight"]).norm() / moved.norm()) <= 1e-6


def test_expert_of_the_least_weight_alone_still_counts(tmp_path: Path) -> None:
    base, (root, a, *_, b) = family(tmp_path, 0, 3)
    fold = Fold.init(root, tmp_path / "state", "gram")
    fold.add(a, weight=1e-6)
    fold.add(b, weight=1e6)
    moved = load(fold.export(tmp_path / "out"))["b.weight"] - base["b.weight"]
    change = (load(a)["b.weight"] - base["b.weight"]).double()
    g, square = change.T @ change, change.square().sum()
    expected = change @ g @ torch.linalg.inv(g + 0.01 * square / 3 * torch.eye(3))
    assert float((moved - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("method", ["mean", "task_arithmetic", "iso_c"])
def test_sums_of_changes_keep_no_more_than_rounding_of_what_was_taken_out(tmp_path: Path, method: str) -> None:
    base, (root, a, c, d, b) = family(tmp_path, 1, 8)
    fold = Fold.init(root, tmp_path / "state", method, float64=True)
    fold.add_all([a, c, d, b], weight=0.3)
    for one in (c, a, d):
        fold.remove(one)
    left = load(fold.export(tmp_path / "out", dtype="F64"))["b.weight"] - base["b.weight"].double()
    assert float(left.norm() / base["b.weight"].norm()) <= 1e-14


@pytest.mark.parametrize("rubbish", ["sums-00007", ".sums-00002.partial-x1y2z3"])
def test_only_folders_that_a_fold_makes_are_removed_as_rubbish(tmp_path: Path, rubbish: str) -> None:
    _, (root, a, c, *_) = family(tmp_path, 0, 3)
    fold = Fold.init(root, tmp_path / "state", "mean")
    fold.add(a)
    mine = [fold.path / name for name in ("sums-mine", "sums-1", ".sums-notes", "sums-00007-copy", "sums-00008.txt")]
    for folder in (*mine, fold.path / rubbish):
        folder.mkdir()
        (folder / "notes.txt").write_text("keep")
    fold.add(c)
    assert [(folder / "notes.txt").is_file() for folder in mine] == [True] * 5
    assert not (fold.path / rubbish).exists()

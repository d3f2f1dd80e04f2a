"""Models whose norms are beyond float64: refused by name before anything of the state has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merganser.continual import Fold
from merganser.errors import NonFiniteError
from shop import command, refused
from support import Model, save, tree


def models(folder: Path, size: float, large: tuple[str, ...] = ("a.weight", "b.bias")) -> tuple[Path, Path]:
    """A base and an expert of it; the change of the tensors in `large` is about 0.1 times `size`."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base: Model = {"a.weight": noise(6, 5), "b.bias": noise(6), "c.weight": noise(4, 4)}
    base = {name: x * (size if name in large else 1) for name, x in base.items()}
    expert = {n: x + 0.1 * (size if n in large else 1) * noise(*x.shape) for n, x in base.items()}
    return save(base, folder / "base"), save(expert, folder / "expert")


@pytest.mark.parametrize("method", ["mean", "gram", "opcm", "tsv_m"])
@pytest.mark.parametrize("allow_distant", [False, True])
def test_change_whose_norm_is_beyond_float64_is_refused_and_leaves_nothing(
    tmp_path: Path, method: str, allow_distant: bool
) -> None:
    base, expert = models(tmp_path, 1e200, ("a.weight",))
    fold = Fold.init(base, tmp_path / "state", method)
    before = tree(fold.path)
    with refused(NonFiniteError, "expert is beyond float64, a.weight", "--ignore 'a.weight'"):
        fold.add(expert, allow_distant=allow_distant)
    assert tree(fold.path) == before
    fold.add(expert, ignore=["a.weight"])
    assert Fold(fold.path).ledger.contributors[0].norm > 0


def test_finite_squares_with_an_infinite_sum_are_refused_too(tmp_path: Path) -> None:
    base = save({"a.weight": torch.zeros(4, 4, dtype=torch.float64)}, tmp_path / "base")
    expert = save({"a.weight": torch.full((4, 4), 9e153, dtype=torch.float64)}, tmp_path / "expert")
    fold = Fold.init(base, tmp_path / "state", "mean")
    with refused(NonFiniteError, "beyond float64", "--ignore 'a.weight'"):
        fold.add(expert)


def test_sum_of_changes_beyond_float64_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = save({"a.bias": torch.zeros(1, dtype=torch.float64)}, tmp_path / "base")
    values = (1.0e154, 1.1e154)
    experts = [
        save({"a.bias": torch.full((1,), x, dtype=torch.float64)}, tmp_path / f"expert-{i}")
        for i, x in enumerate(values)
    ]
    fold = Fold.init(base, tmp_path / "state", "opcm")
    fold.add(experts[0])
    before = tree(fold.path)
    with refused(NonFiniteError, "the norm of the state", "--ignore 'a.bias'"):
        fold.add(experts[1])
    assert tree(fold.path) == before


def test_small_change_of_a_huge_base_comes_in(tmp_path: Path) -> None:
    base = {"a.weight": torch.full((3, 3), 1e160, dtype=torch.float64)}
    expert = {"a.weight": base["a.weight"] + 1e145}
    step = float((expert["a.weight"] - base["a.weight"])[0, 0])
    fold = Fold.init(save(base, tmp_path / "base"), tmp_path / "state", "mean")
    assert fold.add(save(expert, tmp_path / "expert")).norm == pytest.approx(3 * step, rel=1e-14)


@pytest.mark.parametrize("what", ["diff", "doctor"])
def test_diff_and_doctor_name_the_tensor_they_cannot_measure(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert = models(tmp_path, 1e200)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: task_arithmetic\nbase: {base}\nmodels: [{expert}]\n", "utf-8")
    assert command(monkeypatch, what, *((base, expert) if what == "diff" else (recipe,))) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("NonFiniteError: a.weight holds values of 1e154 and more")

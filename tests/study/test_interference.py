"""Overlap and cosine of changes: closed forms, and plain loops with full SVDs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merganser.study.interference import interference


def save(folder: Path, **tensors: Tensor) -> str:
    folder.mkdir(parents=True)
    save_file({f"{name}.weight": x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def measured(root: Path, base: dict[str, Tensor], *changes: dict[str, Tensor]) -> dict[str, tuple[float, float, float]]:
    first = save(root / "base", **base)
    experts = [save(root / f"e{i}", **{n: base[n] + d[n] for n in base}) for i, d in enumerate(changes)]
    return {x.name: (x.overlap, x.chance, x.cosine) for x in interference(first, experts)}


def test_changes_of_the_same_and_of_orthogonal_inputs(tmp_path: Path) -> None:
    base = {"same": torch.randn(16, 32), "apart": torch.randn(16, 32)}
    one, other = torch.zeros(16, 32), torch.zeros(16, 32)
    one[0, 0] = one[1, 1] = 1.0
    other[0, 30] = other[1, 31] = 1.0
    found = measured(tmp_path, base, {"same": one, "apart": one}, {"same": 3 * one, "apart": other})
    assert found["same.weight"] == pytest.approx((1.0, 2 / 32, 1.0), abs=1e-6)
    assert found["apart.weight"] == pytest.approx((0.0, 2 / 32, 0.0), abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_overlap_is_that_of_full_svds(tmp_path: Path, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(shape)
    changes = [torch.randn(shape, generator=generator) for _ in range(3)]
    found = measured(tmp_path, {"x": base}, *({"x": d} for d in changes))["x.weight"]
    k = round(shape[1] / 16)
    right = [np.linalg.svd(d.double().numpy())[2][:k].T for d in changes]
    pairs = [(0, 1), (0, 2), (1, 2)]
    overlap = np.mean([np.linalg.norm(right[i].T @ right[j]) ** 2 / k for i, j in pairs])
    flat = [d.double().numpy().ravel() for d in changes]
    cosine = np.mean([flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]) for i, j in pairs])
    assert found == pytest.approx((overlap, k / shape[1], cosine), rel=1e-6)


def test_expert_without_a_change_is_left_out(tmp_path: Path) -> None:
    d = torch.randn(16, 32)
    found = measured(tmp_path, {"x": torch.zeros(16, 32)}, {"x": d}, {"x": 0 * d}, {"x": 2 * d})
    assert found["x.weight"][0] == pytest.approx(1.0, rel=1e-6)


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ("layer.10", "layer.2", "layer.1")
    base = {name: torch.zeros(4, 6) for name in names}
    found = measured(tmp_path, base, *({name: torch.randn(4, 6) for name in names} for _ in range(2)))
    assert list(found) == ["layer.1.weight", "layer.2.weight", "layer.10.weight"]

"""What the doctor measures, against plain loops and full SVDs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from doctor_helpers import BASE, SHAPES, healthy, noise, planned, plus
from merganser.errors import ParameterError
from merganser.merging import conflicts as module
from merganser.merging.conflicts import half_unit, measure
from merganser.merging.doctor import examine

# what is measured


def test_figures_of_models_and_pairs_are_those_of_plain_loops(tmp_path: Path) -> None:
    models, weights = healthy(), {"a": 0.5, "b": -2.0, "c": 1.0}
    merged = planned(tmp_path, models, own={name: {"weight": w} for name, w in weights.items()})
    found = measure(merged)
    flat = {
        name: [
            float(v) for tensor in SHAPES for v in (models[name][tensor].double() - BASE[tensor].double()).reshape(-1)
        ]
        for name in weights
    }
    base = math.sqrt(math.fsum(float(v) ** 2 for x in BASE.values() for v in x.reshape(-1)))
    for name, w in weights.items():
        norm = math.sqrt(math.fsum(v * v for v in flat[name]))
        figures = found.models[str(tmp_path / name)]
        assert figures.norm == pytest.approx(norm, rel=1e-12)
        assert figures.weighted == pytest.approx(abs(w) * norm, rel=1e-12)
        assert figures.base == pytest.approx(base, rel=1e-12)
        assert figures.changed == sum(v != 0 for v in flat[name])
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        products = [weights[one] * p * weights[other] * q for p, q in zip(flat[one], flat[other], strict=True)]
        against = math.fsum(-v for v in products if v < 0) / math.fsum(abs(v) for v in products)
        inner = math.fsum(p * q for p, q in zip(flat[one], flat[other], strict=True))
        size = math.sqrt(math.fsum(v * v for v in flat[one]) * math.fsum(v * v for v in flat[other]))
        pair = found.pairs[str(tmp_path / one), str(tmp_path / other)]
        assert pair.opposing == pytest.approx(against, rel=1e-12)
        assert pair.cosine == pytest.approx(inner / size, rel=1e-9)
        assert not pair.equal


def test_subspaces_of_every_linear_weight_are_those_of_full_svds(tmp_path: Path) -> None:
    models = healthy()
    found = measure(planned(tmp_path, models))
    matrices = [name for name in SHAPES if name.endswith("mlp.weight")]
    assert list(found.layers) == matrices
    overlaps = {pair: [] for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
    for tensor in matrices:
        m, n = SHAPES[tensor]
        layer, share, few = found.layers[tensor], min(m, n) // 3, round(n / 16)
        d = {name: models[name][tensor].double().numpy() - BASE[tensor].double().numpy() for name in "abc"}
        factors = {name: np.linalg.svd(x) for name, x in d.items()}
        for pair, seen in overlaps.items():
            first, second = (factors[name][2][:few] for name in pair)
            overlap = float(np.linalg.norm(first @ second.T) ** 2) / few
            labels = (str(tmp_path / pair[0]), str(tmp_path / pair[1]))
            assert layer.overlap[labels] == pytest.approx(overlap, rel=1e-4)
            assert layer.chance[labels] == few / n
            seen.append(overlap)
        u = np.concatenate([x[0][:, :share] for x in factors.values()], axis=1)
        v = np.concatenate([x[2][:share].T for x in factors.values()], axis=1)
        left, right = (np.linalg.norm(x.T @ x - np.eye(3 * share)) for x in (u, v))
        assert (layer.left, layer.right) == pytest.approx((left, right), rel=1e-4)
        assert layer.left_share == pytest.approx(left**2 / (6 * share), rel=1e-4)
        assert layer.right_share == pytest.approx(right**2 / (6 * share), rel=1e-4)
        assert (layer.left_chance, layer.right_chance) == pytest.approx((share / m, share / n))
    for pair, seen in overlaps.items():
        labels = (str(tmp_path / pair[0]), str(tmp_path / pair[1]))
        assert found.pairs[labels].overlap == pytest.approx(np.mean(seen), rel=1e-4)


def test_weights_that_are_stored_in_by_out_are_measured_as_out_by_in(tmp_path: Path) -> None:
    names = ("h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias")
    plain = {names[0]: (48, 32), names[1]: (48,)}
    models = {name: noise(seed, 1.0, plain) for seed, name in enumerate(("base", "a", "b"))}
    turned = {name: {names[0]: x[names[0]].T.contiguous(), names[1]: x[names[1]]} for name, x in models.items()}
    one, other = (measure(planned(tmp_path / n, m)).layers[names[0]] for n, m in (("1", models), ("2", turned)))
    assert (other.left, other.right) == pytest.approx((one.left, one.right))
    assert list(other.overlap.values()) == pytest.approx(list(one.overlap.values()))
    assert one.left_chance == other.left_chance == 16 / 48


def test_a_kernel_is_measured_as_out_by_all_else(tmp_path: Path) -> None:
    models = {name: noise(seed, 1.0, {"conv.weight": (12, 2, 3, 3)}) for seed, name in enumerate(("base", "a", "b"))}
    flat = {name: {"conv.weight": x["conv.weight"].reshape(12, 18)} for name, x in models.items()}
    one, other = (measure(planned(tmp_path / n, m)).layers["conv.weight"] for n, m in (("1", models), ("2", flat)))
    assert (one.left, one.right) == (other.left, other.right)


def test_shares_are_one_for_equal_subspaces_and_zero_for_orthogonal_ones(tmp_path: Path) -> None:
    zero = torch.zeros(8, 8)
    one, same, other = zero.clone(), zero.clone(), zero.clone()
    one[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    same[:4, :4] = torch.diag(torch.tensor([1.0, 2.0, 4.0, 3.0]))
    other[4:, 4:] = one[:4, :4]
    name = "x.weight"
    alike = measure(planned(tmp_path / "1", {"base": {name: zero}, "a": {name: one}, "b": {name: same}})).layers[name]
    assert (alike.left_share, alike.right_share) == pytest.approx((1, 1))
    assert alike.left == pytest.approx(math.sqrt(2 * 4))
    apart = measure(planned(tmp_path / "2", {"base": {name: zero}, "a": {name: one}, "b": {name: other}})).layers[name]
    assert (apart.left, apart.right, apart.left_share) == pytest.approx((0, 0, 0), abs=1e-12)
    assert list(apart.overlap.values()) == pytest.approx([0])
    assert list(alike.chance.values()) == [1 / 8]


def test_figures_do_not_depend_on_chunks_or_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a.weight": (300, 500), "b.bias": (200_001,), "c": (), "d.weight": (0, 4)}
    base = noise(5, shapes=shapes)
    models = {"base": base, "a": plus(base, noise(6, 0.1, shapes)), "b": plus(base, noise(7, 0.1, shapes))}
    first = examine(planned(tmp_path, models), threads=1)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert examine(planned(tmp_path, models), threads=3) == first


def test_layers_can_be_sampled(tmp_path: Path) -> None:
    merged = planned(tmp_path, healthy())
    counts = {layers: measure(merged, layers=layers).tensors for layers in (1, 2, 3, 9)}
    assert counts == {1: 3, 2: 4, 3: 6, 9: 6}
    assert list(measure(merged, layers=2).layers) == ["model.layers.0.mlp.weight", "model.layers.2.mlp.weight"]
    (one,) = examine(merged, layers=1)
    assert one.notes == ("3 of 6 tensors were measured",)
    with pytest.raises(ParameterError, match="layers is 0; it is at least 1"):
        measure(merged, layers=0)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_half_a_unit_is_the_edge_of_what_rounding_keeps(dtype: str, torch_dtype: torch.dtype) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).abs().to(torch_dtype)
    x = torch.cat([x, torch.tensor([1e-6, 0.0], dtype=torch_dtype)]).double()
    half = half_unit(x, dtype)
    assert torch.equal((x + 0.99 * half).to(torch_dtype).double(), x)
    assert not bool(((x + 1.01 * half).to(torch_dtype).double() == x).any())

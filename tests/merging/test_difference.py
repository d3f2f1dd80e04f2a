"""What changed between two models: figures against plain loops in float64, closed forms, refusals, same bits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.continual.roles import assign_roles, is_matrix
from merganser.errors import CheckpointError, DtypeError, MerganserError, ParameterError, RefError, ShapeError
from merganser.merging import difference as module
from merganser.merging import spectra
from merganser.merging.difference import Change, Difference, difference
from merganser.merging.spectra import effective_rank, leading, short_gram
from support import make_base, save, tune


def compared(root: Path, a: dict[str, Tensor], b: dict[str, Tensor], **options: object) -> Difference:
    sources = []
    for name, model in (("a", a), ("b", b)):
        folder = root / f"{len(list(root.iterdir()))}-{name}"
        sources.append(open_source(str(save({n: x.clone() for n, x in model.items()}, folder))))
    return difference(*sources, **options)  # type: ignore[arg-type]


def one(root: Path, a: Tensor, b: Tensor, name: str = "x.weight") -> Change:
    (change,) = compared(root, {name: a}, {name: b}).changes
    return change


def turned(singular: list[float], m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix of given singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(singular), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(singular), generator=generator, dtype=torch.float64))[0]
    return u @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ v.T


def test_every_figure_of_every_kind_of_tensor_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    a = make_base()
    b = tune(a, 1)
    found = compared(tmp_path, a, b)
    roles = assign_roles(open_source(str(save(a, tmp_path / "again"))))
    assert [change.name for change in found.changes] == sorted(a)
    for change in found.changes:
        x, y = (t[change.name].double().reshape(-1).tolist() for t in (a, b))
        d = [q - p for p, q in zip(x, y, strict=True)]
        norm_x, norm_y, norm_d = (math.sqrt(math.fsum(v * v for v in t)) for t in (x, y, d))
        assert change.norm == pytest.approx(norm_d, rel=1e-13)
        assert change.largest == max((abs(v) for v in d), default=0.0)
        assert change.changed == sum(v != 0 for v in d)
        assert change.nonfinite == (0, 0)
        if x:
            assert change.relative == pytest.approx(norm_d / norm_x, rel=1e-13)
            inner = math.fsum(p * q for p, q in zip(x, y, strict=True))
            assert change.cosine == pytest.approx(inner / norm_x / norm_y, rel=1e-13)
        if not is_matrix(roles[change.name]):
            assert change.effective_rank is None
        elif x:
            matrix = (b[change.name].double() - a[change.name].double()).reshape(a[change.name].shape[0], -1).numpy()
            energy = [float(s) ** 2 for s in np.linalg.svd(matrix)[1]]
            entropy = -math.fsum(e / sum(energy) * math.log(e / sum(energy)) for e in energy)
            assert change.effective_rank == pytest.approx(math.exp(entropy), rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
@pytest.mark.parametrize(
    ("singular", "rank"),
    [
        ([3.0], 1.0),
        ([0.5] * 5, 5.0),
        ([2.0, 1.0], math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))),
        ([1.0, 0.0], 1.0),
    ],
)
def test_effective_rank_of_known_spectra(
    tmp_path: Path, shape: tuple[int, int], singular: list[float], rank: float
) -> None:
    base = torch.zeros(shape, dtype=torch.float64)
    assert one(tmp_path, base, turned(singular, *shape)).effective_rank == pytest.approx(rank, rel=1e-9)


def test_effective_rank_sees_a_kernel_as_out_by_all_else_and_either_way_of_storing_alike(tmp_path: Path) -> None:
    d = turned([1.0, 1.0, 1.0], 6, 18)
    assert one(tmp_path, torch.zeros(6, 2, 3, 3).double(), d.reshape(6, 2, 3, 3)).effective_rank == pytest.approx(3)
    bias = {"h.0.attn.c_attn.bias": torch.zeros(18)}
    name = "h.0.attn.c_attn.weight"
    found = compared(tmp_path, {name: torch.zeros(6, 18)} | bias, {name: d.float()} | bias).changes
    assert {c.name: c.effective_rank for c in found}[name] == pytest.approx(3, rel=1e-5)


def test_rank_is_left_out_where_it_is_not_asked_for(tmp_path: Path) -> None:
    found = compared(tmp_path, {"x.weight": torch.zeros(4, 4)}, {"x.weight": torch.ones(4, 4)}, rank=False)
    assert found.changes[0].effective_rank is None
    assert found.changes[0].norm == 4.0


def test_equal_models_have_no_change(tmp_path: Path) -> None:
    model = make_base()
    found = compared(tmp_path, model, model)
    for change in found.changes:
        assert (change.norm, change.relative, change.largest, change.changed) == (0, 0, 0, 0)
        assert change.effective_rank in (None, 0.0)
    assert found.most_changed(10) == []
    assert found.total().cosine == pytest.approx(1, abs=1e-15)


def test_what_was_zero_has_an_infinite_relative_change_and_no_cosine(tmp_path: Path) -> None:
    change = one(tmp_path, torch.zeros(3), torch.tensor([0.0, 3.0, 4.0]))
    assert (change.norm, change.relative, change.changed) == (5.0, math.inf, 2)
    assert math.isnan(change.cosine)
    back = one(tmp_path, torch.tensor([0.0, 3.0, 4.0]), torch.zeros(3))
    assert (back.norm, back.relative) == (5.0, 1.0)
    assert math.isnan(back.cosine)


def test_signs_of_the_cosine(tmp_path: Path) -> None:
    x = torch.tensor([1.0, 2.0, -1.0])
    assert one(tmp_path, x, 3 * x).cosine == pytest.approx(1)
    assert one(tmp_path, x, -2 * x).cosine == pytest.approx(-1)
    assert one(tmp_path, x, torch.tensor([1.0, 0.0, 1.0])).cosine == 0


def test_types_may_differ_and_the_difference_is_exact(tmp_path: Path) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    change = one(tmp_path, x, x.bfloat16())
    expected = [abs(float(q) - float(p)) for p, q in zip(x, x.bfloat16(), strict=True)]
    assert change.largest == max(expected)
    assert change.norm == pytest.approx(math.sqrt(math.fsum(v * v for v in expected)), rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_counted_and_no_figure_hides_them(tmp_path: Path, value: float) -> None:
    x = torch.ones(4, 5)
    y = x.clone()
    y[1, 2] = y[3, 4] = value
    found = compared(tmp_path, {"x.weight": x, "a.bias": x[0]}, {"x.weight": y, "a.bias": 2 * x[0]})
    sound, broken = found.changes
    assert broken.nonfinite == (0, 2)
    for figure in (broken.norm, broken.relative, broken.cosine, broken.largest, broken.effective_rank):
        assert figure is not None
        assert math.isnan(figure)
    assert (sound.relative, sound.nonfinite) == (1.0, (0, 0))
    assert [change.name for change in found.most_changed(2)] == ["x.weight", "a.bias"]
    assert math.isnan(found.total().norm)
    assert [math.isnan(layer.largest) for layer in found.layers()] == [False, True]


def test_nan_is_counted_over_a_whole_large_tensor(tmp_path: Path) -> None:
    x = torch.ones(200_000)
    x[[0, 1, 150_000]] = math.nan
    assert one(tmp_path, x, torch.ones(200_000)).nonfinite == (3, 0)


def test_most_changed_is_by_relative_change_and_then_by_name(tmp_path: Path) -> None:
    a = {name: torch.full((4,), size) for name, size in {"a": 1.0, "b": 10.0, "c": 1.0, "d": 5.0, "e": 0.0}.items()}
    found = compared(tmp_path, a, {name: x + (name != "d") for name, x in a.items()})
    assert [change.name for change in found.most_changed(9)] == ["e", "a", "c", "b"]
    assert [change.name for change in found.most_changed(2)] == ["e", "a"]


# names


def test_tensors_of_one_model_only_are_listed_and_the_others_compared(tmp_path: Path) -> None:
    x = torch.ones(2)
    found = compared(tmp_path, {"both": x, "old": x, "a": x}, {"both": x, "new": x})
    assert [change.name for change in found.changes] == ["both"]
    assert (found.only_a, found.only_b) == (("a", "old"), ("new",))


def test_a_tied_tensor_is_compared_with_what_the_other_stores(tmp_path: Path) -> None:
    table, head = torch.ones(3, 2), 3 * torch.ones(3, 2)
    save_file({"embed.weight": table}, tmp_path / "a.safetensors", {"format": "pt", "lm_head.weight": "embed.weight"})
    save_file({"embed.weight": table, "lm_head.weight": head}, tmp_path / "b.safetensors")
    a, b = (open_source(str(tmp_path / f"{name}.safetensors")) for name in "ab")
    for found, relative in ((difference(a, b), 2.0), (difference(b, a), 2 / 3)):
        changes = {change.name: change.relative for change in found.changes}
        assert changes == {"embed.weight": 0, "lm_head.weight": pytest.approx(relative)}
        assert (found.only_a, found.only_b) == ((), ())
    assert [change.name for change in difference(a, a).changes] == ["embed.weight"]


def test_ignored_tensors_are_neither_compared_nor_listed(tmp_path: Path) -> None:
    a, b = (
        {"x": torch.ones(2), "y.bias": torch.ones(2)},
        {"x": torch.ones(2), "y.bias": torch.ones(3), "z.bias": torch.ones(1)},
    )
    found = compared(tmp_path, a, b, ignore=["*.bias"])
    assert ([change.name for change in found.changes], found.only_b) == (["x"], ())


# layers


def test_layers_are_the_tensors_of_each_seen_as_one_vector_in_the_order_of_the_network(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{part}" for i in (0, 2, 10) for part in ("mlp.weight", "mlp.bias", "norm.weight")]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "vision.layers.1.mlp.weight"]
    shapes = {name: (6, 4) if name.endswith(("mlp.weight", "tokens.weight", "head.weight")) else (6,) for name in names}
    a = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    b = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in a.items()}
    found = compared(tmp_path, a, b)
    order = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in (0, 2, 10)),
        "vision.layers.1",
        "lm_head",
        "model.norm",
    ]
    layers = {layer.name: layer for layer in found.layers()}
    assert list(layers) == order
    ranks = {change.name: change.effective_rank for change in found.changes}
    for layer in (*layers.values(), found.total()):
        mine = [n for n in sorted(names) if layer.name == "all" or n.startswith(f"{layer.name}.")]
        x, y = (np.concatenate([t[n].double().numpy().ravel() for n in mine]) for t in (a, b))
        assert layer.tensors == len(mine)
        assert layer.norm == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
        assert layer.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        assert layer.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
        assert layer.largest == np.abs(y - x).max()
        known = [ranks[n] for n in mine if ranks[n] is not None]
        assert layer.effective_rank == (pytest.approx(np.mean(known)) if known else None)


# same bits


def test_figures_do_not_depend_on_chunks_or_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (300, 700), "b.weight": (900, 200), "c.weight": (200_001,), "d.weight": (3, 70_000)}
    a = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    b = {name: x + 0.01 * torch.randn(x.shape, generator=generator) for name, x in a.items()}
    first = compared(tmp_path, a, b, threads=1).changes
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert compared(tmp_path, a, b, threads=3).changes == first
    for change in first:
        d = b[change.name].double() - a[change.name].double()
        assert change.norm == pytest.approx(float(d.norm()), rel=1e-13)


def test_progress_ends_with_all_bytes_of_both_models(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = {"x": torch.zeros(10), "y": torch.zeros(5, dtype=torch.bfloat16)}
    compared(tmp_path, model, model, progress=lambda done, total: seen.append((done, total)), threads=1)
    assert (len(seen), seen[-1]) == (2, (100, 100))


# spectra


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_vectors_are_those_of_an_svd_whatever_the_blocks(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    u, s, vt = np.linalg.svd(x.double().numpy())
    for block in (1, 97, 1 << 22):
        monkeypatch.setattr(spectra, "BLOCK_ELEMENTS", block)
        left, right = leading(x, 4)
        k = min(4, *shape)
        assert left.shape == (shape[0], k)
        assert right.shape == (shape[1], k)
        np.testing.assert_allclose((left @ left.T).numpy(), u[:, :k] @ u[:, :k].T, atol=1e-9)
        np.testing.assert_allclose((right @ right.T).numpy(), vt[:k].T @ vt[:k], atol=1e-9)
        np.testing.assert_allclose((left.T @ x.double() @ right).numpy(), np.diag(s[:k]), atol=1e-9)
        energy = np.linalg.eigvalsh(short_gram(x).numpy())[::-1]
        np.testing.assert_allclose(energy, s**2, rtol=1e-9, atol=1e-9)


def test_directions_of_rounding_are_not_leading_and_zeros_have_none() -> None:
    x = turned([1.0, 0.5, 1e-6], 10, 20)
    assert [side.shape[1] for side in leading(x, 5)] == [2, 2]
    assert [side.shape for side in leading(torch.zeros(3, 4), 2)] == [(3, 0), (4, 0)]
    assert effective_rank(torch.zeros(3, 3)) == 0


# refusals


def test_two_shapes_are_refused_by_name_with_both_and_their_models(tmp_path: Path) -> None:
    a = {"lm_head.weight": torch.zeros(32, 4), "x.bias": torch.zeros(3), "y": torch.zeros(1)}
    b = {"lm_head.weight": torch.zeros(33, 4), "x.bias": torch.zeros(4), "y": torch.zeros(1)}
    with pytest.raises(ShapeError) as caught:
        compared(tmp_path, a, b)
    first, second = tmp_path / "0-a", tmp_path / "1-b"
    assert caught.value.message == (
        f"lm_head.weight has 2 shapes: (32, 4) in {first}; (33, 4) in {second} (and 1 more differ)"
    )
    assert caught.value.hint == "leave it out with --ignore 'lm_head.weight', or compare models of one architecture"
    assert [c.name for c in compared(tmp_path, a, b, ignore=["lm_head.weight", "x.bias"]).changes] == ["y"]


@pytest.mark.parametrize(
    ("a", "b", "options", "error", "says"),
    [
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int64)}, {}, DtypeError, "x is F32 in"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, {"x": torch.zeros(2)}, {}, DtypeError, "x is complex"),
        ({"x": torch.zeros(2)}, {"y": torch.zeros(2)}, {}, ParameterError, "share no tensor"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"ignore": ["x*"]}, ParameterError, "share no tensor"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"ignore": ["z"]}, ParameterError, "no tensor is called 'z'"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"threads": 0}, ParameterError, "threads is 0"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path,
    a: dict[str, Tensor],
    b: dict[str, Tensor],
    options: dict[str, object],
    error: type[MerganserError],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        compared(tmp_path, a, b, **options)


def test_a_missing_or_damaged_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefError, match="does not exist"):
        open_source(str(tmp_path / "nothing.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not json at all!")
    with pytest.raises(CheckpointError):
        open_source(str(tmp_path / "bad.safetensors"))


def test_integers_and_eight_bit_floats_are_compared_too(tmp_path: Path) -> None:
    a = {
        "ids": torch.arange(4),
        "q[0]*": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }
    b = {
        "ids": torch.tensor([0, 1, 2, 7]),
        "q[0]*": torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, True]),
    }
    found = {change.name: (change.norm, change.changed) for change in compared(tmp_path, a, b).changes}
    assert found == {"ids": (4.0, 1), "q[0]*": (2.0, 1), "flag": (1.0, 1)}

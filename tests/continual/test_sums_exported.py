"""What a state of sums exports: closed forms, and every finaliser from one state."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from merganser.continual import Fold
from merganser.errors import MerganserError, ParameterError
from sums_helpers import folded, gram_sums, stored_sums
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
    save,
    save_family,
    tree,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("mixed"), 4)


@pytest.fixture(scope="module")
def family64(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("double"), 4, dtype=torch.float64)


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

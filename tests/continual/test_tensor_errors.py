"""Experts whose tensors cannot be merged: refused by name, and the state is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merganser.continual import Fold
from merganser.errors import (
    DtypeError,
    ExtraTensorError,
    MerganserError,
    MissingTensorError,
    NonFiniteError,
    ParameterError,
    ShapeError,
)
from shop import Shop, command, edit, refused
from support import Model, load, load_sums, make_base, save, tune

BAD_TENSORS: dict[str, tuple[Callable[[Model], object], type[MerganserError], str, str]] = {
    "missing": (
        lambda m: m.pop("wide.bias"),
        MissingTensorError,
        "wide.bias is in the base and not in",
        "--ignore 'wide.bias'",
    ),
    "two missing": (
        lambda m: (m.pop("wide.bias"), m.pop("tall.weight")),
        MissingTensorError,
        "tall.weight (and 1 more) is in the base and not in",
        "--ignore",
    ),
    "renamed": (
        lambda m: [m.update({f"model.{n}": m.pop(n)}) for n in list(m)],
        MissingTensorError,
        "(and",
        "the names fit with --rename 'model.='",
    ),
    "extra": (
        lambda m: m.update({"head.weight": torch.ones(2, 2)}),
        ExtraTensorError,
        "head.weight is in",
        "leave it out with --ignore 'head.weight'",
    ),
    "shape": (
        edit("wide.weight", lambda x: x[:, :-1].contiguous()),
        ShapeError,
        "wide.weight has 2 shapes: (6, 20) in",
        "--ignore 'wide.weight'",
    ),
    "transposed": (
        edit("wide.weight", lambda x: x.T.contiguous()),
        ShapeError,
        "; (20, 6) in",
        "--ignore 'wide.weight'",
    ),
    "integers": (
        edit("position_ids", lambda x: x + 1),
        DtypeError,
        "position_ids is I64 and differs between",
        "--ignore 'position_ids'",
    ),
    "quantised": (
        edit("wide.weight", lambda x: (x * 50).to(torch.int8)),
        DtypeError,
        "wide.weight is F32 in",
        "must be dequantised first",
    ),
    "NaN": (
        edit("conv.weight", lambda x: x.index_fill(0, torch.tensor(2), float("nan"))),
        NonFiniteError,
        "conv.weight of",
        "--allow-nonfinite",
    ),
    "infinity": (
        edit("norm.weight", lambda x: x.index_fill(0, torch.tensor(2), float("-inf"))),
        NonFiniteError,
        "holds NaN or infinity",
        "--allow-nonfinite",
    ),
}


@pytest.mark.parametrize("problem", BAD_TENSORS)
def test_expert_with_a_bad_tensor_is_refused_by_name(shop: Shop, problem: str) -> None:
    change, kind, message, hint = BAD_TENSORS[problem]
    expert = shop.variant("expert-bad", change)
    with shop.untouched(), refused(kind, message, hint) as _:
        shop.fold.add(expert)
    with pytest.raises(kind, match="expert-bad"):
        shop.fold.add(expert)


@pytest.mark.parametrize("problem", BAD_TENSORS)
def test_bad_tensor_ends_the_command_with_exit_code_2(
    shop: Shop, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, kind, message, hint = BAD_TENSORS[problem]
    expert = shop.variant("expert-bad", change)
    with shop.untouched():
        assert command(monkeypatch, "fold", "add", shop.state, expert) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"{kind.__name__}: ")
    assert message in stderr
    assert "\nhint: " in stderr
    assert hint in stderr


def test_nonfinite_entries_count_as_unchanged_where_that_is_allowed(shop: Shop) -> None:
    base = load(shop.base)

    def poison(model: Model) -> None:
        model["conv.weight"][1, 2] = float("nan")
        model["norm.weight"][3] = float("inf")

    def heal(model: Model) -> None:
        model["conv.weight"][1, 2] = base["conv.weight"][1, 2]
        model["norm.weight"][3] = base["norm.weight"][3]

    states = []
    for name, change in (("poisoned", poison), ("healed", heal)):
        fold = Fold.init(shop.base, shop.root / f"state-{name}", "gram")
        entry = fold.add(shop.variant(name, change), allow_nonfinite=True)
        states.append((load_sums(fold.path), entry.norm))
        fold.remove(name)
        assert fold.ledger.contributors == ()
    assert states[0][1] == states[1][1]
    assert all(torch.equal(x, states[1][0][slot]) for slot, x in states[0][0].items())


def test_ignored_tensors_count_as_unchanged_and_extra_ones_are_skipped(shop: Shop) -> None:
    def spoil(model: Model) -> None:
        model["wide.weight"] = torch.ones(3, 3)
        model["head.weight"] = torch.ones(3, 3)
        del model["tall.weight"]

    expert = shop.variant("spoiled", spoil)
    fold = Fold.init(shop.base, shop.root / "mean", "mean")
    entry = fold.add(expert, ignore=["wide.weight", "head.*", "tall.weight"])
    assert entry.ignore == ("wide.weight", "head.*", "tall.weight")
    sums = load_sums(fold.path)
    assert not sums["s/wide.weight"].any()
    assert not sums["s/tall.weight"].any()
    assert sums["s/wide.bias"].any()
    fold.remove("spoiled")
    assert fold.ledger.contributors == ()


def test_pattern_that_matches_nothing_is_refused(shop: Shop) -> None:
    with shop.untouched(), refused(ParameterError, "is called 'wide.wieght'"):
        shop.fold.add(shop.experts[2], ignore=["wide.wieght"])
    for option in ("freeze", "matrix", "vector"):
        with shop.untouched(), refused(ParameterError, "is called 'haed.*'", "patterns are shell-like"):
            Fold.init(shop.base, shop.root / "new", "gram", **{option: ["haed.*"]})


def test_renaming_that_fits_nothing_is_refused(shop: Shop) -> None:
    with shop.untouched(), refused(ParameterError, "no tensor's name starts with 'module.'"):
        shop.fold.add(shop.experts[2], rename=["module.="])
    with shop.untouched(), refused(ParameterError, "renaming is 'module.'; it is written OLD=NEW"):
        shop.fold.add(shop.experts[2], rename=["module."])


def test_renamed_expert_is_the_same_expert(shop: Shop) -> None:
    prefixed = shop.variant("expert-03-prefixed", lambda m: [m.update({f"model.{n}": m.pop(n)}) for n in list(m)])
    entry = shop.fold.add(prefixed, rename=["model.="])
    other = Fold.init(shop.base, shop.root / "other", "gram")
    assert other.add(shop.experts[2]).digest == entry.digest


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_base_is_refused_by_name_unless_the_tensor_is_frozen(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base() | {"packed.weight": torch.ones(4, 4).to(dtype)}
    folder = save(base, tmp_path / "base")
    with refused(DtypeError, "packed.weight of", "dequantise the model, or leave it as the base has it"):
        Fold.init(folder, tmp_path / "state", "gram")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    fold = Fold.init(folder, tmp_path / "state", "gram", freeze=["packed.*"])
    fold.add(save(tune(make_base(), 1) | {"packed.weight": base["packed.weight"]}, tmp_path / "expert"))
    merged = load(fold.export(tmp_path / "out"))
    assert torch.equal(merged["packed.weight"].view(torch.uint8), base["packed.weight"].view(torch.uint8))

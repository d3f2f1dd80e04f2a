"""Damage that `verify` finds, and states that cannot be combined."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.errors import (
    MerganserError,
    ParameterError,
    StateError,
)
from shop import Shop, command, refused
from support import load, make_base, save


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def sums_file(shop: Shop) -> Path:
    sums = read_ledger(shop.state).sums
    assert sums is not None
    return shop.state / sums / "sums.safetensors"


@pytest.mark.parametrize("slot", ["s/wide.bias", "g/square.weight", "b/conv.weight"])
def test_verify_names_the_damaged_sum_and_exits_with_1(
    shop: Shop, slot: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sums_file(shop)
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + header_bytes])[slot]["data_offsets"]
    assert command(monkeypatch, "fold", "verify", shop.state) == 0
    flip(path, 8 + header_bytes + begin + 3)
    capsys.readouterr()
    with shop.untouched():
        assert command(monkeypatch, "fold", "verify", shop.state) == 1
    assert re.search(rf"changed +sums +{re.escape(slot)}\n", capsys.readouterr().out)


@pytest.mark.parametrize("damage", ["truncated", "gone", "no folder", "no receipt"])
def test_verify_finds_sums_that_cannot_be_read(shop: Shop, damage: str) -> None:
    path = sums_file(shop)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "gone":
        path.unlink()
    elif damage == "no folder":
        shutil.rmtree(path.parent)
    else:
        (path.parent / "merganser.json").unlink()
    with shop.untouched():
        findings = {f.part: f for f in shop.fold.verify()}
    assert (findings["sums"].status, findings["sums"].needed) == ("changed", True)
    assert findings["base"].status == findings["expert-01"].status == "ok"
    if damage != "no receipt":
        with shop.untouched(), pytest.raises(MerganserError):
            shop.fold.add(shop.experts[2])


def test_verify_tells_a_changed_base_from_changed_and_missing_experts(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(shop.experts[0])
    flip(shop.experts[1] / "model.safetensors", (shop.experts[1] / "model.safetensors").stat().st_size - 5)
    found = {f.part: (f.status, f.needed) for f in shop.fold.verify()}
    assert found == {
        "base": ("ok", True),
        "sums": ("ok", True),
        "expert-01": ("missing", False),
        "expert-02": ("changed", False),
    }
    assert command(monkeypatch, "fold", "verify", shop.state) == 0
    flip(shop.base / "model.safetensors", (shop.base / "model.safetensors").stat().st_size - 5)
    assert command(monkeypatch, "fold", "verify", shop.state) == 1
    changed = next(f for f in shop.fold.verify() if f.part == "base")
    assert changed.status == "changed"
    assert changed.detail in load(shop.base)


# Combining.


def test_states_that_do_not_add_up_are_refused(shop: Shop) -> None:
    def state(name: str, method: str = "gram", base: Path = shop.base, **options: object) -> Path:
        return Fold.init(base, shop.root / name, method, **options).path

    stranger = save(make_base(7), shop.root / "stranger")
    cases: list[tuple[list[Path], type[MerganserError], str, str | None]] = [
        ([shop.state], ParameterError, "1 state given; combining needs at least 2", None),
        ([state("one", base=stranger), shop.state], StateError, "stand on different bases", None),
        ([shop.state, state("two", "mean")], StateError, "differ in method: gram, mean", None),
        ([shop.state, state("three", sums_dtype="F32")], StateError, "differ in sums_dtype: F64, F32", None),
        ([shop.state, state("four", vector=["wide.*"])], StateError, "treat tensors differently", "same patterns"),
        ([shop.state, state("five", float64=True)], StateError, "differ in float64", None),
        ([state("six", "opcm"), state("seven", "opcm")], StateError, "opcm is sequential", "method of sums"),
        ([shop.state, shop.state], StateError, "expert-01 is in", "remove it from one of them"),
    ]
    for states, kind, message, hint in cases:
        with shop.untouched(), refused(kind, message, hint):
            Fold.combine(states, shop.root / "both")

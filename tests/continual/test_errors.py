"""Bad input: an error that says what, where and what to do; exit code 2; and not a byte of the state is changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merganser.continual import Fold
from merganser.errors import (
    NonFiniteError,
    OutputError,
    ParameterError,
    RefError,
    StateError,
)
from shop import Shop, command, refused
from support import load, make_base, save, save_family, tree

# Who is in.


def test_expert_cannot_be_added_twice(shop: Shop) -> None:
    with shop.untouched(), refused(StateError, f"expert-01 is in {shop.state} already", "remove it first"):
        shop.fold.add(shop.experts[0])


def test_same_content_cannot_be_added_under_another_name(shop: Shop) -> None:
    twin = Path(shutil.copytree(shop.experts[0], shop.root / "twin"))
    for name in (None, "third"):
        with shop.untouched(), refused(StateError, "is in", "nothing was changed") as _:
            shop.fold.add(twin, name=name)
    with pytest.raises(StateError, match=r"twin is in .*state already, as expert-01"):
        shop.fold.add(twin)


def test_of_several_experts_all_come_in_or_none(shop: Shop) -> None:
    broken = load(shop.experts[3])
    broken["wide.weight"][2, 3] = float("nan")
    nan = save(broken, shop.root / "nan")
    with (
        shop.untouched(),
        refused(NonFiniteError, f"wide.weight of {nan} holds NaN or infinity", "leave the expert out"),
    ):
        shop.fold.add_all([shop.experts[2], nan])
    with shop.untouched(), refused(StateError, f"{shop.experts[2]} is given twice", "give it once"):
        shop.fold.add_all([shop.experts[2], shop.experts[2]])
    twin = Path(shutil.copytree(shop.experts[2], shop.root / "twin"))
    with shop.untouched(), refused(StateError, f"{twin} are the same expert", "nothing was changed"):
        shop.fold.add_all([shop.experts[2], twin])
    with shop.untouched(), refused(ParameterError, "--name x is for one expert, and 2 are given", "one by one"):
        shop.fold.add_all(shop.experts[2:], name="x")
    with shop.untouched(), refused(ParameterError, "no expert is given"):
        shop.fold.add_all([])
    assert [entry.name for entry in shop.fold.add_all(shop.experts[2:])] == ["expert-03", "expert-04"]


def test_expert_of_another_base_is_refused_unless_it_is_asked_for(shop: Shop) -> None:
    stranger = save(make_base(99), shop.root / "stranger")
    with shop.untouched(), refused(StateError, "so it was hardly tuned from it", "--allow-distant"):
        shop.fold.add(stranger)
    assert shop.fold.add(stranger, allow_distant=True).name == "stranger"


def test_removing_what_was_never_added_names_what_is_in(shop: Shop) -> None:
    for change in (shop.fold.remove, lambda e: shop.fold.reweight(e, 2.0)):
        with shop.untouched(), refused(StateError, "was never added to", "in it: expert-01, expert-02"):
            change(shop.experts[2])


def test_removing_from_an_empty_state_says_so(shop: Shop) -> None:
    empty = Fold.init(shop.base, shop.root / "empty", "mean")
    with shop.untouched(), refused(StateError, "was never added to", "in it: no expert"):
        empty.remove("expert-01")


def test_expert_that_changed_since_it_was_added_cannot_be_removed(shop: Shop) -> None:
    shutil.rmtree(shop.experts[1])
    save(load(shop.experts[2]), shop.experts[1])
    for change in (shop.fold.remove, lambda e: shop.fold.reweight(e, 2.0)):
        with shop.untouched(), refused(StateError, "has changed since it was added as expert-02", "nothing was"):
            change("expert-02")


def test_expert_that_is_gone_cannot_be_removed_until_its_new_place_is_named(shop: Shop) -> None:
    moved = shop.root / "elsewhere" / "expert-02"
    moved.parent.mkdir()
    shop.experts[1].rename(moved)
    with shop.untouched(), refused(RefError, "expert-02 does not exist", "did you mean"):
        shop.fold.remove("expert-02")
    assert shop.fold.remove(moved).name == "expert-02"


def test_sequential_method_cannot_remove(shop: Shop) -> None:
    fold = Fold.init(shop.base, shop.root / "opcm", "opcm")
    fold.add(shop.experts[0])
    for change in (fold.remove, lambda e: fold.reweight(e, 2.0)):
        with shop.untouched(), refused(StateError, "opcm cannot take an expert out", "fold the others anew"):
            change("expert-01")


# The base.


def test_base_that_changed_on_disk_is_refused(shop: Shop) -> None:
    base = load(shop.base)
    base["norm.weight"][3] += 1
    shutil.rmtree(shop.base)
    save(base, shop.base)
    message = f"norm.weight of the base {shop.base} has changed since init"
    for change in (lambda: shop.fold.add(shop.experts[2]), lambda: shop.fold.remove("expert-01")):
        with shop.untouched(), refused(StateError, message, "put the original base back"):
            change()


def test_base_that_changed_on_disk_is_refused_on_export(shop: Shop) -> None:
    base = load(shop.base)
    base["norm.weight"][3] += 1
    shutil.rmtree(shop.base)
    save(base, shop.base)
    with shop.untouched(), pytest.raises(StateError, match=r"norm\.weight of the base .* has changed since init"):
        shop.fold.export(shop.root / "out")


def test_base_with_other_tensors_is_refused(shop: Shop) -> None:
    smaller = save(make_base(names=("wide.weight", "scale")), shop.root / "smaller")
    for change in (
        lambda: shop.fold.add(shop.experts[2], base=smaller),
        lambda: shop.fold.export(shop.root / "out", base=smaller),
    ):
        with shop.untouched(), refused(StateError, "has other tensors than the base of", "--base"):
            change()


def test_base_that_moved_is_found_again_with_base(shop: Shop) -> None:
    moved = shop.root / "moved"
    shop.base.rename(moved)
    for change in (
        lambda: shop.fold.add(shop.experts[2]),
        lambda: shop.fold.remove("expert-01"),
        lambda: shop.fold.export(shop.root / "out"),
        lambda: shop.fold.cost(shop.experts[2]),
    ):
        with shop.untouched(), refused(StateError, f"the base of {shop.state} is not at {shop.base}", "--base"):
            change()
    assert [f.status for f in shop.fold.verify() if f.part == "base"] == ["missing"]
    shop.fold.add(shop.experts[2], base=moved)
    shop.fold.remove("expert-01", base=moved)
    shop.fold.export(shop.root / "out", base=moved)
    assert all(f.status == "ok" for f in shop.fold.verify(base=moved))


# Settings and weights.


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0, -1.0])
def test_gram_refuses_weights_that_are_not_positive(shop: Shop, weight: float) -> None:
    with shop.untouched(), refused(ParameterError, f"weight is {weight}; gram needs a positive number"):
        shop.fold.add(shop.experts[2], weight=weight)
    with shop.untouched(), refused(ParameterError, f"weight is {weight}; gram needs a positive number"):
        shop.fold.reweight("expert-01", weight)


@pytest.mark.parametrize("method", ["mean", "opcm", "tsv_m"])
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_every_method_refuses_weights_that_are_not_finite(tmp_path: Path, method: str, weight: float) -> None:
    shop = Shop(tmp_path, method)
    with (
        shop.untouched(),
        refused(ParameterError, f"weight is {weight}; {method} needs a number of at most 1e+06 in size"),
    ):
        shop.fold.add(shop.experts[2], weight=weight)


def test_unknown_method_and_setting_leave_no_folder(shop: Shop) -> None:
    with shop.untouched(), refused(ParameterError, "there is no method 'grm'", "did you mean gram?"):
        Fold.init(shop.base, shop.root / "new", "grm")
    with shop.untouched(), refused(ParameterError, "gram has no setting 'alpha'", "it takes eps=0.01"):
        Fold.init(shop.base, shop.root / "new", "gram", alpha=0.5)
    with shop.untouched(), refused(ParameterError, "alpha is 50; it is a share of the nuclear norm, in [0, 1]"):
        Fold.init(shop.base, shop.root / "new", "opcm", alpha=50)


def test_setting_of_the_wrong_type_ends_the_command_with_exit_code_2(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shop.untouched():
        argv = ("fold", "init", shop.base, shop.root / "new", "--method", "gram", "--set", "eps=small")
        assert command(monkeypatch, *argv) == 2
    assert "eps" in capsys.readouterr().err


# Export.


def test_state_refuses_methods_that_its_sums_do_not_allow(shop: Shop) -> None:
    mean = Fold.init(shop.base, shop.root / "mean", "mean")
    mean.add(shop.experts[0])
    message = "this state holds s, which cannot give gram; it can give mean, average, linear, task_arithmetic, iso_c"
    with shop.untouched(), refused(StateError, message, "merganser fold init BASE STATE --method gram"):
        mean.export(shop.root / "out", "gram")
    opcm = Fold.init(shop.base, shop.root / "opcm", "opcm")
    with shop.untouched(), refused(StateError, "this state holds d, which cannot give mean; it can give opcm", "init"):
        opcm.export(shop.root / "out", "mean")
    with shop.untouched(), refused(ParameterError, "opcm took its settings at init"):
        opcm.export(shop.root / "out", alpha=0.1)
    with shop.untouched(), refused(ParameterError, "there is no method 'men'", "did you mean mean?"):
        mean.export(shop.root / "out", "men")
    with shop.untouched(), refused(ParameterError, "mean has no setting 'eps'", "it takes no settings"):
        mean.export(shop.root / "out", eps=0.1)
    with shop.untouched(), refused(ParameterError, "dtype is F8; it is one of F64, F32, F16, BF16"):
        mean.export(shop.root / "out", dtype="F8")


def test_folder_that_is_there_is_not_overwritten_unasked(shop: Shop) -> None:
    out = shop.fold.export(shop.root / "out")
    with shop.untouched(), refused(OutputError, f"{out} exists", "--overwrite"):
        shop.fold.export(out)
    file = shop.root / "file"
    file.write_text("mine")
    for overwrite in (False, True):
        with shop.untouched(), refused(OutputError, f"{file} exists and is not a folder"):
            shop.fold.export(file, overwrite=overwrite)
    with shop.untouched(), refused(OutputError, f"{shop.state} exists", "choose another name"):
        Fold.init(shop.base, shop.state, "gram")
    with shop.untouched(), refused(OutputError, f"{shop.state} exists", "choose another name"):
        Fold.combine([shop.state, Fold.init(shop.base, shop.root.parent / f"{shop.root.name}-2").path], shop.state)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["state", "models/base", "models/expert-01", "state/merged", "models/expert-02/a/b"])
def test_export_never_writes_into_what_it_is_made_of(shop: Shop, place: str, overwrite: bool) -> None:
    with shop.untouched(), refused(OutputError, "lies within what is read", "choose another place"):
        shop.fold.export(shop.root / place, overwrite=overwrite)


@pytest.mark.parametrize("place", [".", "models"])
def test_overwriting_export_never_replaces_a_folder_that_holds_what_it_is_made_of(shop: Shop, place: str) -> None:
    with shop.untouched(), refused(OutputError, "lies within what is read", "choose another place"):
        shop.fold.export(shop.root / place, overwrite=True)


def test_overwriting_export_never_replaces_the_folder_of_a_base_given_as_a_file(tmp_path: Path) -> None:
    base, expert = save_family(tmp_path / "models", 1)
    fold = Fold.init(base / "model.safetensors", tmp_path / "state", "mean")
    fold.add(expert / "model.safetensors")
    for folder in (base, expert):
        before = tree(tmp_path)
        with pytest.raises(OutputError, match="lies within what is read"):
            fold.export(folder, overwrite=True)
        assert tree(tmp_path) == before


def test_merge_that_overflows_the_type_is_refused_and_goes_through_in_a_wider_one(tmp_path: Path) -> None:
    base = {"a.weight": torch.full((4, 4), 32768.0).half(), "b.weight": torch.ones(4, 4).half()}
    expert = {n: x * 1.5 for n, x in base.items()}
    fold = Fold.init(save(base, tmp_path / "base"), tmp_path / "state", "linear")
    fold.add(save(expert, tmp_path / "expert"), weight=4.0)
    before = tree(tmp_path)
    with refused(NonFiniteError, "a.weight overflows F16", "choose a wider type: --dtype BF16 or F32"):
        fold.export(tmp_path / "out")
    assert tree(tmp_path) == before
    merged = load(fold.export(tmp_path / "out", dtype="F32"))
    assert torch.equal(merged["a.weight"], torch.full((4, 4), 98304.0))


# Damage.


def test_state_of_another_version_is_refused(shop: Shop) -> None:
    ledger = shop.state / "ledger.json"
    content = json.loads(ledger.read_text())
    for update in ({"format": "merganser-fold-2"}, {"colour": "red"}, {"generation": -1}, {"sums_dtype": "F16"}):
        ledger.write_text(json.dumps(content | update))
        with shop.untouched(), pytest.raises(StateError, match=r"ledger\.json is damaged or of another version"):
            Fold(shop.state)


@pytest.mark.parametrize("file", ["ledger.json", "base.json"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff\xfe" + b, lambda _: b"[]"]
)
def test_damaged_record_is_refused(
    shop: Shop, file: str, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shop.state / file
    path.write_bytes(damage(path.read_bytes()))
    with shop.untouched(), pytest.raises(StateError, match=rf"{re.escape(file)} is damaged"):
        Fold(shop.state)
    for name in ("show", "verify"):
        assert command(monkeypatch, "fold", name, shop.state) == 2


def test_folder_that_is_no_state_is_refused(shop: Shop) -> None:
    with shop.untouched(), refused(StateError, "is not a fold's state: it has no ledger.json", "fold init"):
        Fold(shop.base)
    with shop.untouched(), refused(RefError, "is a fold's state, not a checkpoint", "fold export"):
        shop.fold.add(shop.state)
    with shop.untouched(), refused(RefError, "is a fold's state, not a checkpoint", "fold export"):
        Fold.init(shop.state, shop.root / "new")


# Every error of the command line: exit code 2, one line of what, one of what to do, and no traceback.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("add", "{state}", "{models}/expert-01"), "StateError: expert-01 is in "),
        (("add", "{state}", "{models}/expert-00"), "RefError: "),
        (("add", "{state}", "{models}/expert-03", "--weight", "nan"), "ParameterError: weight is nan"),
        (("add", "{models}", "{models}/expert-03"), "StateError: "),
        (("remove", "{state}", "nobody"), "StateError: nobody was never added"),
        (("reweight", "{state}", "expert-01", "0"), "ParameterError: weight is 0.0"),
        (("export", "{state}", "{state}/out"), "OutputError: "),
        (("export", "{state}", "{root}/out", "--method", "opcm"), "StateError: this state holds s, g, b"),
        (("export", "{state}", "{root}/out", "--eps", "0"), "ParameterError: eps is 0.0"),
        (("combine", "{state}", "{root}/out"), "ParameterError: 1 state given"),
        (("init", "{models}/base", "{root}/new", "--method", "grm"), "ParameterError: there is no method 'grm'"),
        (("init", "{models}/bsae", "{root}/new"), "RefError: "),
        (("show", "{root}/nowhere"), "StateError: "),
        (("verify", "{root}/nowhere"), "StateError: "),
    ],
    ids=lambda v: "-".join(v[:1]) if isinstance(v, tuple) else None,
)
def test_bad_command_ends_with_exit_code_2_and_one_message(
    shop: Shop,
    argv: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [a.format(state=shop.state, models=shop.root / "models", root=shop.root) for a in argv]
    with shop.untouched():
        assert command(monkeypatch, "fold", *filled) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) <= 2

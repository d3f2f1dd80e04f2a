"""Bad input: an error that says what, where and what to do; exit code 2; and not a byte of the state is changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from merganser.cli import main
from merganser.continual import Fold
from merganser.continual.ledger import read_ledger
from merganser.errors import (
    DtypeError,
    ExtraTensorError,
    MerganserError,
    MissingTensorError,
    NonFiniteError,
    OutputError,
    ParameterError,
    RefError,
    ShapeError,
    StateError,
)
from support import Model, load, load_sums, make_base, save, save_family, tree, tune


class Shop:
    """A base, four experts and a state that the first two are in."""

    def __init__(self, root: Path, method: str = "gram") -> None:
        self.root = root
        self.base, *self.experts = save_family(root / "models", 4)
        self.fold = Fold.init(self.base, root / "state", method)
        for expert in self.experts[:2]:
            self.fold.add(expert)
        self.state = self.fold.path

    def variant(self, name: str, edit: Callable[[Model], object], source: int = 2) -> Path:
        """A copy of an expert with something changed."""
        model = load(self.experts[source])
        edit(model)
        return save(model, self.root / name)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        before = tree(self.root)
        yield
        assert tree(self.root) == before


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@contextmanager
def refused(kind: type[MerganserError], message: str, hint: str | None = None) -> Iterator[None]:
    """The error is of exactly this kind, and its message and hint hold these parts."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert (hint is None) == (caught.value.hint is None), caught.value.hint
    assert hint is None or hint in str(caught.value.hint)


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["merganser", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


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
    with shop.untouched(), refused(StateError, "expert-03 is in", "remove it first"):
        shop.fold.add_all([shop.experts[2], shop.experts[2]])
    twin = Path(shutil.copytree(shop.experts[2], shop.root / "twin"))
    with shop.untouched(), refused(StateError, "is in", "nothing was changed"):
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


# Tensors that do not fit.


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Model], object]:
    def apply(model: Model) -> None:
        model[name] = change(model[name])

    return apply


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
    with refused(DtypeError, "packed.weight of", "dequantise the model, or freeze it"):
        Fold.init(folder, tmp_path / "state", "gram")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    fold = Fold.init(folder, tmp_path / "state", "gram", freeze=["packed.*"])
    fold.add(save(tune(make_base(), 1) | {"packed.weight": base["packed.weight"]}, tmp_path / "expert"))
    merged = load(fold.export(tmp_path / "out"))
    assert torch.equal(merged["packed.weight"].view(torch.uint8), base["packed.weight"].view(torch.uint8))


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

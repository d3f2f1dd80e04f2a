"""What a fold refuses before it reads a tensor, and hints that lead on when they are followed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from merganser.checkpoints import open_source
from merganser.continual import Fold
from merganser.continual.roles import assign_roles, literal, matches
from merganser.errors import (
    ExtraTensorError,
    MerganserError,
    MissingTensorError,
    NonFiniteError,
    OutputError,
    ParameterError,
    ShapeError,
    StateError,
)
from shop import Shop, command, refused
from support import load, make_base, save, tune


def test_expert_given_twice_is_said_to_be(shop: Shop) -> None:
    third = shop.experts[2]
    with shop.untouched(), refused(StateError, f"{third} is given twice", "give it once"):
        shop.fold.add_all([third, shop.experts[3], third])
    copy = save(load(third), shop.root / "copies" / third.name)
    with shop.untouched(), refused(StateError, f"{third} and {copy} would both be called {third.name}", "--name"):
        shop.fold.add_all([third, copy])
    twin = save(load(third), shop.root / "twin")
    with shop.untouched(), refused(StateError, f"{third} and {twin} are the same expert", "nothing was changed"):
        shop.fold.add_all([third, twin])


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e7])
def test_dry_run_refuses_the_weights_that_the_run_refuses(
    shop: Shop, weight: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for more in ((), ("--dry-run",)):
        with shop.untouched():
            assert command(monkeypatch, "fold", "add", shop.state, shop.experts[2], "--weight", weight, *more) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert said[0].startswith(f"ParameterError: weight is {weight}; gram needs a positive number")


def test_tensor_that_is_named_matrix_and_vector_is_refused(shop: Shop) -> None:
    source = open_source(str(shop.base))
    with refused(ParameterError, "square.weight is named by --matrix and by --vector", "by one of them"):
        assign_roles(source, matrix=["square.*"], vector=["*quare.weight"])
    roles = assign_roles(source, matrix=["square.*"], vector=["tall.weight"])
    assert (roles["square.weight"], roles["tall.weight"]) == ("matrix", "vector")


def test_freezing_all_of_a_base_is_refused_at_init(shop: Shop) -> None:
    with shop.untouched(), pytest.raises(ParameterError, match="--freeze takes all of it"):
        Fold.init(shop.base, shop.root / "new", freeze=["*"])
    kept = [name for name in load(shop.base) if name != "wide.bias"]
    assert Fold.init(shop.base, shop.root / "new", freeze=kept).record.roles["wide.bias"] == "vector"


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "is empty"), (" ", "is empty"), ("a\nb", "'a\\nb' is not printable"), ("\x1b[31m", "is not printable")],
)
def test_names_that_are_empty_or_not_printable_are_refused(shop: Shop, name: str, says: str) -> None:
    with shop.untouched(), refused(ParameterError, says, "--name"):
        shop.fold.add(shop.experts[2], name=name)
    if name.strip():
        strange = save(load(shop.experts[2]), shop.root / name)
        with shop.untouched(), refused(ParameterError, says, "--name"):
            shop.fold.add(strange)
        assert shop.fold.add(strange, name="plain").name == "plain"


def followed(error: MerganserError) -> str:
    """The pattern that a hint gives to --ignore, as a shell reads it."""
    words = shlex.split(str(error.hint).replace(",", " "))
    return words[words.index("--ignore") + 1]


@pytest.mark.parametrize("kind", [MissingTensorError, ExtraTensorError, ShapeError])
@pytest.mark.parametrize("name", ["a[0].weight", "a*?.weight", "it's [a].weight"])
def test_following_the_hint_leaves_that_tensor_out_whatever_its_name(
    tmp_path: Path, kind: type[MerganserError], name: str
) -> None:
    base = {"b.weight": torch.ones(3, 3), "a0.weight": torch.ones(2)}
    expert = {n: 1.1 * x for n, x in base.items()}
    if kind is not ExtraTensorError:
        base[name] = torch.ones(3, 3)
    if kind is not MissingTensorError:
        expert[name] = torch.ones(2, 2)
    fold = Fold.init(save(base, tmp_path / "base"), tmp_path / "state", "mean")
    other = save(expert, tmp_path / "expert")
    with pytest.raises(kind) as caught:
        fold.add(other)
    fold.add(other, ignore=[followed(caught.value)])
    merged = load(fold.export(tmp_path / "out"))
    assert torch.allclose(merged["a0.weight"], expert["a0.weight"])


@pytest.mark.parametrize("name", ["plain", "a[0]", "[!a]*?", "a]b"])
def test_literal_pattern_fits_its_name_alone(name: str) -> None:
    assert matches(name, (literal(name),))
    others = ("plain2", "a0", "b", "bxy", "ab", re.sub(r"[*?\[\]!]", "x", name) + "y")
    assert not any(matches(other, (literal(name),)) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_difference_of_finite_values_that_overflows_is_said_to_and_fits_float64(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = save({"a.weight": torch.full((4, 4), -3e38).to(dtype)}, tmp_path / "base")
    expert = save({"a.weight": torch.full((4, 4), 3e38).to(dtype)}, tmp_path / "expert")
    fold = Fold.init(base, tmp_path / "state", "mean")
    for allowed in (False, True):
        with refused(NonFiniteError, "is beyond float32, though its values are not", "begin a fold with --float64"):
            fold.add(expert, allow_distant=True, allow_nonfinite=allowed)
    double = Fold.init(base, tmp_path / "double", "mean", float64=True)
    double.add(expert, allow_distant=True)
    assert torch.equal(load(double.export(tmp_path / "out"))["a.weight"], load(expert)["a.weight"])


def test_state_within_what_it_is_made_of_is_refused(shop: Shop) -> None:
    with shop.untouched(), refused(OutputError, "holds or lies within what is read", "another place"):
        Fold.init(shop.base, shop.base / "state")
    one, other = (Fold.init(shop.base, shop.root / f"one{i}", "mean") for i in (0, 1))
    one.add(shop.experts[0])
    other.add(shop.experts[1])
    for within in (one.path, other.path, shop.base, *shop.experts[:2]):
        with shop.untouched(), refused(OutputError, "holds or lies within what is read", "another place"):
            Fold.combine([one.path, other.path], within / "sub")


def test_failed_init_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    base = make_base()
    base["wide.weight"][0, 0] = float("nan")
    folder = save(base, tmp_path / "base")
    with pytest.raises(NonFiniteError):
        Fold.init(folder, tmp_path / "deep" / "er" / "state")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    fold = Fold.init(folder, tmp_path / "deep" / "er" / "state", freeze=["wide.weight"])
    fold.add(save(tune(base, 1), tmp_path / "expert"))

"""Views: other names and types for what a source holds, and nothing read until asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merganser.checkpoints.copying import renamed_by
from merganser.checkpoints.views import cast, prefix_replaced, renamed
from merganser.errors import ParameterError
from merganser.numerics import DTYPE_NAMES, TORCH_DTYPES
from merganser.types import FLOAT_DTYPES, TensorInfo


class Held:
    """A Source over tensors in memory that counts what is read."""

    identity: str | None = None

    def __init__(self, tensors: dict[str, Tensor], aliases: dict[str, str] | None = None) -> None:
        self.ref, self.tensors, self.aliases = "models/base", tensors, aliases or {}
        self.infos = {n: TensorInfo(tuple(tensors[n].shape), DTYPE_NAMES[tensors[n].dtype]) for n in sorted(tensors)}
        self.reads: list[tuple[str, tuple[int, int] | None]] = []

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        self.reads.append((name, rows))
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]

    def companions(self) -> Sequence[Path]:
        return (Path("models/base/config.json"),)


def example() -> Held:
    tensors = {
        "model.b": torch.arange(12.0).reshape(4, 3),
        "model.a": torch.arange(3),
        "model.c": torch.tensor([True, False]),
        "head": torch.tensor(1.5),
    }
    return Held(tensors, {"lm_head": "model.b"})


def test_renamed_shows_the_same_tensors_under_new_names_sorted() -> None:
    source = example()
    view = renamed(source, lambda name: {"model.a": "z", "head": "y"}.get(name, name))
    assert list(view.infos) == ["model.b", "model.c", "y", "z"]
    assert view.infos["z"] == source.infos["model.a"]
    assert torch.equal(view.read("z"), source.tensors["model.a"])
    assert torch.equal(view.read("y"), source.tensors["head"])


def test_a_view_reads_nothing_until_asked_and_then_only_the_rows_asked_for() -> None:
    source = example()
    view = cast(prefix_replaced(source, "model.", "m."), "F64")
    assert source.reads == []
    assert torch.equal(view.read("m.b", (1, 3)), source.tensors["model.b"][1:3].double())
    assert source.reads == [("model.b", (1, 3))]


def test_a_view_keeps_ref_identity_and_companions() -> None:
    source = example()
    source.identity = "abc"
    for view in (renamed(source, str.upper), cast(source, "BF16"), prefix_replaced(source, "model.", "")):
        assert (view.ref, view.identity, view.companions()) == ("models/base", "abc", source.companions())


def test_aliases_follow_a_renaming_on_both_ends() -> None:
    view = renamed(example(), lambda name: f"x.{name}")
    assert dict(view.aliases) == {"x.lm_head": "x.model.b"}
    assert "x.lm_head" not in view.infos


def test_prefix_replaced_changes_only_names_that_start_so() -> None:
    view = prefix_replaced(example(), "model.", "transformer.model.")
    assert list(view.infos) == ["head", "transformer.model.a", "transformer.model.b", "transformer.model.c"]
    assert dict(view.aliases) == {"lm_head": "transformer.model.b"}


def test_a_prefix_can_be_added_to_all_names_removed_or_belong_to_an_alias_only() -> None:
    assert list(prefix_replaced(example(), "", "m.").infos) == ["m.head", "m.model.a", "m.model.b", "m.model.c"]
    assert list(prefix_replaced(example(), "model.", "").infos) == ["a", "b", "c", "head"]
    assert dict(prefix_replaced(example(), "lm_", "o_").aliases) == {"o_head": "model.b"}


def test_a_prefix_is_replaced_once_at_the_front() -> None:
    source = Held({"a.a.w": torch.zeros(1), "b.a.w": torch.zeros(1)})
    assert list(prefix_replaced(source, "a.", "c.").infos) == ["b.a.w", "c.a.w"]


def test_a_prefix_that_no_name_has_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"models/base: no tensor's name starts with 'modell\.'"):
        prefix_replaced(example(), "modell.", "")


@pytest.mark.parametrize(
    ("names", "aliases"),
    [(("a.w", "w"), {}), (("a.w",), {"w": "a.w"}), (("w",), {"a.w": "w"})],
    ids=["two tensors", "tensor and alias", "alias and tensor"],
)
def test_two_names_that_would_become_one_are_refused_by_name(names: Sequence[str], aliases: dict[str, str]) -> None:
    source = Held({name: torch.zeros(1) for name in names}, aliases)
    with pytest.raises(ParameterError, match=r"models/base: a\.w and w would both be called w"):
        prefix_replaced(source, "a.", "")


def test_a_swap_of_two_names_is_no_collision() -> None:
    source = Held({"a": torch.zeros(1), "b": torch.ones(1)})
    view = renamed(source, {"a": "b", "b": "a"}.__getitem__)
    assert (float(view.read("a")), float(view.read("b"))) == (1.0, 0.0)


def test_renamings_written_old_equals_new_apply_in_order() -> None:
    assert list(renamed_by(example(), ["model.=m.", "m.a=first"]).infos) == ["first", "head", "m.b", "m.c"]
    with pytest.raises(ParameterError, match="renaming is 'model'; it is written OLD=NEW"):
        renamed_by(example(), ["model"])


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=20), dtype=st.sampled_from(sorted(FLOAT_DTYPES)))
def test_cast_values_equal_torchs_own_cast(values: list[float], dtype: str) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    view = cast(Held({"x": tensor}), dtype)
    assert view.infos["x"] == TensorInfo((len(values),), dtype)
    expected = tensor.to(TORCH_DTYPES[dtype])
    assert torch.equal(view.read("x").view(torch.uint8), expected.view(torch.uint8))


def test_a_cast_to_bf16_rounds_to_nearest_even_and_keeps_infinity() -> None:
    # bf16 keeps 8 bits: 1 + 2**-8 is a tie and goes to 1; 1 + 3 * 2**-8 is a tie and goes to 1 + 2**-6
    tensor = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("-inf")])
    read = cast(Held({"x": tensor}), "BF16").read("x")
    assert read.dtype == torch.bfloat16
    assert read.tolist() == [1.0, 1 + 2**-6, float("inf"), float("-inf")]


def test_a_cast_leaves_integers_booleans_and_8_bit_floats_as_they_are() -> None:
    source = Held(
        {
            "int": torch.arange(3),
            "bool": torch.tensor([True]),
            "fp8": torch.ones(2).to(torch.float8_e4m3fn),
            "complex": torch.ones(1, dtype=torch.complex64),
            "half": torch.ones(2, dtype=torch.float16),
        }
    )
    view = cast(source, "F32")
    assert {n: i.dtype for n, i in view.infos.items()} == {
        "bool": "BOOL",
        "complex": "C64",
        "fp8": "F8_E4M3",
        "half": "F32",
        "int": "I64",
    }
    assert {n: view.read(n).dtype for n in ("int", "bool", "half")} == {
        "int": torch.int64,
        "bool": torch.bool,
        "half": torch.float32,
    }


def test_a_cast_keeps_aliases() -> None:
    view = cast(example(), "BF16")
    assert dict(view.aliases) == {"lm_head": "model.b"}
    assert view.infos["model.b"].nbytes == 24


@pytest.mark.parametrize("dtype", ["I64", "bf16", "F8_E4M3", ""])
def test_a_cast_to_anything_but_a_mergeable_float_is_refused(dtype: str) -> None:
    with pytest.raises(ParameterError, match="it is one of F64, F32, F16, BF16"):
        cast(example(), dtype)

"""Which tensors have a row a token, and what is refused because they do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from merganser.errors import DtypeError, MissingTensorError, RefError, ShapeError
from merganser.merging.recipe import Input, Recipe, Slice, Vocabulary
from merganser.merging.vocabulary_rows import vocabulary_tensors
from merganser.types import TensorInfo
from vocabulary_helpers import (
    EMBED,
    HEAD,
    LETTERS,
    MERGES,
    MORE,
    bpe,
    embeddings,
    family_at,
    planned,
    recipe_of,
    save_model,
)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return family_at(tmp_path)


# which tensors

NAMES = [f"token {i}" for i in range(64)]


class Headers:
    """A source of headers alone."""

    ref, identity = "model", None

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> None:
        self.infos = {name: TensorInfo(shapes[name], dtype) for name in sorted(shapes)}
        self.aliases: dict[str, str] = {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        raise AssertionError("headers are enough")

    def companions(self) -> Sequence[Path]:
        return ()


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"transformer.wte.weight": (70, 8), "transformer.wpe.weight": (70, 8)}, None),
        ({"transformer.wte.weight": (70, 8), "transformer.wpe.weight": (16, 8)}, ["transformer.wte.weight"]),
        (
            {"shared.weight": (70, 8), "encoder.block.0.layer.weight": (8, 8), "lm_head.weight": (70, 8)},
            ["lm_head.weight", "shared.weight"],
        ),
        ({"shared.weight": (70, 8), "encoder.block.0.layer.weight": (8, 8)}, ["shared.weight"]),
        (
            {
                "bert.embeddings.word_embeddings.weight": (70, 8),
                "bert.embeddings.token_type_embeddings.weight": (2, 8),
                "bert.embeddings.position_embeddings.weight": (90, 8),
                "cls.predictions.bias": (70,),
                "cls.predictions.decoder.weight": (70, 8),
                "cls.predictions.decoder.bias": (70,),
                "cls.predictions.transform.dense.weight": (8, 8),
            },
            [
                "bert.embeddings.word_embeddings.weight",
                "cls.predictions.bias",
                "cls.predictions.decoder.bias",
                "cls.predictions.decoder.weight",
            ],
        ),
        (
            {"gpt_neox.embed_in.weight": (70, 8), "embed_out.weight": (70, 8)},
            ["embed_out.weight", "gpt_neox.embed_in.weight"],
        ),
        ({"backbone.embeddings.weight": (70, 8), "backbone.layers.0.mixer.D": (16,)}, ["backbone.embeddings.weight"]),
        ({"model.embed_tokens.weight": (70, 8), "output.weight": (3, 8)}, ["model.embed_tokens.weight"]),
        (
            {"model.tok_embeddings.weight": (70, 70), "output.weight": (70, 70), "norm.weight": (70,)},
            ["model.tok_embeddings.weight", "output.weight"],
        ),
        (
            {"embed_tokens.weight": (70, 8), "layers.0.up.weight": (70, 8), "layers.0.head.weight": (70, 8)},
            ["embed_tokens.weight"],
        ),
        ({"embed_tokens.weight": (70, 8), "layers.0.head.weight": (70, 8)}, None),
        ({"embed_tokens.weight": (70, 8), "final_logits_bias": (1, 70)}, None),
    ],
)  # fmt: skip
def test_names_and_rows_tell_which_tensors_have_a_row_a_token(
    shapes: dict[str, tuple[int, ...]], found: list[str] | None
) -> None:
    if found is None:
        with pytest.raises(ShapeError, match="does not tell whether they are tokens"):
            vocabulary_tensors(Headers(shapes), NAMES)
    else:
        assert vocabulary_tensors(Headers(shapes), NAMES) == (tuple(found), 70)


def test_doubtful_tensor_that_is_kept_is_left_alone() -> None:
    shapes = {"embed_tokens.weight": (70, 8), "score.weight": (70, 8)}
    assert vocabulary_tensors(Headers(shapes), NAMES, ["score.*"]) == (("embed_tokens.weight",), 70)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a.weight": (70, 8)}, "no tensor of model looks like an embedding of its 64 tokens"),
        (
            {"embed_tokens.weight": (60, 8)},
            "of model has 60 rows, and its tokenizer has 64 tokens, from 'token 60' on without a row",
        ),
        (
            {"encoder.embed_tokens.weight": (70, 8), "decoder.embed_tokens.weight": (80, 8)},
            "different numbers of rows: 70 in encoder.embed_tokens.weight; 80 in decoder.embed_tokens.weight",
        ),
        (
            {"embed_tokens.weight": (70, 8), "lm_head.weight": (64, 8)},
            "different numbers of rows: 64 in lm_head.weight",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ShapeError) as error:
        vocabulary_tensors(Headers(shapes), NAMES)
    assert message in error.value.message


def test_quantised_rows_are_refused() -> None:
    with pytest.raises(DtypeError, match="is U8, whose rows cannot be mapped"):
        vocabulary_tensors(Headers({"embed_tokens.weight": (70, 8)}, "U8"), NAMES)


def test_rows_of_other_widths_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    slim = save_model(tmp_path / "slim", bpe(), embeddings(0, 64, width=3))
    with pytest.raises(ShapeError, match=r"lm_head.weight has 2 shapes: \(64, 3\) in .*slim; \(66, 4\) in .*more"):
        planned(recipe_of(slim, [family["more"]], Vocabulary("union")))


def test_tensor_with_a_row_a_token_in_one_model_only_is_refused(tmp_path: Path) -> None:
    tensors = {"tok_embeddings.weight": embeddings(0, 66)[EMBED], "output.weight": embeddings(0, 66)[HEAD]}
    first = save_model(tmp_path / "first", bpe(), {n: x[:64] for n, x in tensors.items()})
    classes = tensors | {"output.weight": tensors["output.weight"][:3]}
    second = save_model(tmp_path / "second", bpe((*MERGES, *MORE)), classes)
    with pytest.raises(ShapeError, match=r"output.weight has a row a token in .*first and not in .*second: \(3, 4\)"):
        planned(recipe_of(first, [second], Vocabulary("base")))


def test_missing_head_is_refused_where_its_rows_are_needed(family: dict[str, Path], tmp_path: Path) -> None:
    tied = {name: x for name, x in embeddings(4, 66).items() if name != HEAD}
    more = save_model(tmp_path / "tied", bpe((*MERGES, *MORE)), tied)
    with pytest.raises(MissingTensorError, match=r"lm_head.weight is in .*base and not in .*tied"):
        planned(recipe_of(family["base"], [more], Vocabulary("union")))


@pytest.mark.parametrize("slow", [(), ("vocab.json", "merges.txt")])
def test_model_without_a_fast_tokenizer_is_refused_by_name(
    family: dict[str, Path], tmp_path: Path, slow: Sequence[str]
) -> None:
    bare = save_model(tmp_path / "bare", None, embeddings(1, 64))
    for name in slow:
        (bare / name).write_text("{}")
    with pytest.raises(RefError, match=r"bare has no tokenizer.json") as error:
        planned(recipe_of(family["base"], [bare], Vocabulary("union")))
    assert ("it has merges.txt, vocab.json only" in error.value.message) == bool(slow)
    assert "save_pretrained" in str(error.value.hint)


def test_slices_and_their_bases_are_seen_too(family: dict[str, Path]) -> None:
    slices = (
        Slice((Input(str(family["wide"]), (0, 1)),), Input(str(family["chat"]), (0, 1))),
        Slice((Input(str(family["more"]), (0, 1)),)),
    )
    recipe = Recipe("linear", slices, vocabulary=Vocabulary("union"))
    plan, _ = planned(recipe)
    assert plan.donor == str(family["wide"])
    assert {v.infos[EMBED].rows for v in plan.sources.values()} == {67}


def test_output_does_not_depend_on_how_tokens_are_hashed(family: dict[str, Path]) -> None:
    recipe = recipe_of(None, [family["wide"], family["more"], family["chat"]], Vocabulary("union"))
    first, second = planned(recipe)[0], planned(recipe)[0]
    assert first.tokens == second.tokens
    assert first.files == second.files
    assert [t["id"] for t in json.loads(first.files["tokenizer.json"])["added_tokens"]] == [0, 1, 2, 66]
    assert len(LETTERS) + len(MERGES) == 64

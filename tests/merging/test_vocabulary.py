from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.errors import DtypeError, MissingTensorError, ParameterError, RefError, ShapeError
from merganser.merging import vocabulary_rows
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import Input, Recipe, Slice, Token, Vocabulary
from merganser.merging.vocabulary import VocabularyPlan, vocabulary_views
from merganser.merging.vocabulary_rows import vocabulary_tensors
from merganser.types import TensorInfo
from vocabulary_helpers import (
    LETTERS,
    MERGES,
    MORE,
    auto,
    bpe,
    embeddings,
    ids_of,
    planned,
    put_down,
    recipe_of,
    save_model,
    save_tokenizer,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "the cat 42 then bathes"


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """The base (64), two more tokens and other ids (66), four rows that no token has (64 + 4), an added token."""
    return {
        "base": save_model(tmp_path / "base", bpe(), embeddings(0, 64)),
        "more": save_model(tmp_path / "more", bpe((*MERGES, *MORE), turned=5), embeddings(1, 66)),
        "wide": save_model(tmp_path / "wide", bpe(turned=3), embeddings(2, 68)),
        "chat": save_model(
            tmp_path / "chat", bpe(added=[AddedToken("<|end|>", special=True, normalized=False)]), embeddings(3, 65)
        ),
    }


def tokens_of(folder: Path) -> list[str]:
    """By id, as the library counts them."""
    tokenizer = auto(folder)
    return [str(t) for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def expected_rows(
    folders: Sequence[Path], base: Path | None, tokens: Sequence[str], policies: Mapping[str, Token] | None = None
) -> list[list[list[float]]]:
    """Rows of the embedding of every model by loops over the rules; models that lack a token take the base's row, the
    only owner's, or the owners' mean."""
    owned = [tokens_of(folder) for folder in folders]
    tables = [open_source(str(folder)).read(EMBED).tolist() for folder in folders]
    found = []
    for k in range(len(folders)):
        rows = []
        for token in tokens:
            policy = (policies or {}).get(token)
            if token in owned[k] and not (policy is not None and policy.force):
                rows.append(tables[k][owned[k].index(token)])
            elif policy is not None and policy.kind == "zero":
                rows.append([0.0] * 4)
            elif policy is not None:
                other = [str(f) for f in folders].index(str(policy.model))
                sought = policy.token if policy.token is not None else token
                row = sought if isinstance(sought, int) else owned[other].index(sought)
                rows.append(tables[other][row])
            elif base is not None and token in owned[folders.index(base)]:
                rows.append(tables[folders.index(base)][owned[folders.index(base)].index(token)])
            else:
                owners = [tables[j][owned[j].index(token)] for j in range(len(folders)) if token in owned[j]]
                rows.append(
                    [sum(column) / len(owners) for column in zip(*owners, strict=True)] if owners else [0.0] * 4
                )
        found.append(rows)
    return found


def check_rows(
    plan: VocabularyPlan, folders: Sequence[Path], base: Path | None, policies: Mapping[str, Token] | None = None
) -> None:
    wanted = expected_rows(folders, base, plan.tokens, policies)
    for folder, rows in zip(folders, wanted, strict=True):
        view = plan.sources[str(folder)]
        assert view.infos[EMBED].shape == view.infos[HEAD].shape == (plan.vocab_size, 4)
        assert view.read(EMBED)[: len(plan.tokens)].tolist() == rows
        head = view.read(HEAD)[: len(plan.tokens)]
        zero = torch.tensor(rows).any(1, keepdim=True)
        assert torch.equal(head, torch.where(zero, torch.tensor(rows) + 0.5, 0))


def test_recipe_without_vocabulary_has_no_plan(family: dict[str, Path]) -> None:
    recipe = recipe_of(family["base"], [family["more"]], None)
    assert vocabulary_views(recipe, {}) is None


def test_union_has_the_base_s_tokens_then_plain_then_added_ones(family: dict[str, Path]) -> None:
    others = [family["chat"], family["wide"], family["more"]]
    plan, _ = planned(recipe_of(family["base"], others, Vocabulary("union")))
    assert plan.tokens == (*tokens_of(family["base"]), "th", "the", "<|end|>")
    assert plan.vocab_size == 67
    check_rows(plan, [family["base"], *others], family["base"])


def test_union_without_a_base_takes_means_of_the_owners(family: dict[str, Path], tmp_path: Path) -> None:
    also = save_model(tmp_path / "also", bpe((*MERGES, *MORE)), embeddings(5, 66))
    models = [family["wide"], family["more"], also, family["chat"]]
    plan, _ = planned(recipe_of(None, models, Vocabulary("union")))
    check_rows(plan, models, None)
    row = plan.sources[str(models[0])].read(EMBED)[plan.tokens.index("the"), 0]
    own = [tokens_of(f).index("the") + 100 * k for f, k in ((family["more"], 1), (also, 5))]
    assert row == sum(own) / 2


def test_the_base_s_row_comes_before_the_mean_of_the_owners(family: dict[str, Path], tmp_path: Path) -> None:
    also = save_model(tmp_path / "also", bpe((*MERGES, *MORE)), embeddings(5, 66))
    models = [family["more"], also, family["wide"]]
    plan, _ = planned(recipe_of(family["more"], models[1:], Vocabulary("union")))
    check_rows(plan, models, family["more"])
    place = plan.tokens.index("the")
    assert plan.sources[str(models[2])].read(EMBED)[place, 0] == 100 + tokens_of(family["more"]).index("the")


def test_token_that_some_model_adds_becomes_an_added_one(family: dict[str, Path], tmp_path: Path) -> None:
    adds = save_model(tmp_path / "adds", bpe(added=["the"]), embeddings(4, 65))
    plan, _ = planned(recipe_of(family["base"], [family["more"], adds], Vocabulary("union")))
    assert plan.tokens[64:] == ("th", "the")
    assert tokens_of(put_down(plan, tmp_path / "out")) == list(plan.tokens)
    check_rows(plan, [family["base"], family["more"], adds], family["base"])


def test_base_drops_what_only_others_have(family: dict[str, Path]) -> None:
    others = [family["more"], family["chat"], family["wide"]]
    plan, sources = planned(recipe_of(family["base"], others, Vocabulary("base")))
    assert list(plan.tokens) == tokens_of(family["base"])
    assert plan.vocab_size == 64
    check_rows(plan, [family["base"], *others], family["base"])
    assert plan.sources[str(family["base"])] is sources[str(family["base"])]
    assert plan.files["tokenizer.json"] == family["base"] / "tokenizer.json"


def test_a_model_s_vocabulary_is_taken_whole(family: dict[str, Path]) -> None:
    others = [family["more"], family["chat"]]
    plan, sources = planned(recipe_of(family["base"], others, Vocabulary(str(family["more"]))))
    assert list(plan.tokens) == tokens_of(family["more"])
    check_rows(plan, [family["base"], *others], family["base"])
    assert plan.donor == str(family["more"])
    assert plan.sources[plan.donor] is sources[plan.donor]
    assert plan.files["tokenizer.json"] == family["more"] / "tokenizer.json"


def test_intersection_numbers_common_tokens_anew(family: dict[str, Path]) -> None:
    others = [family["base"], family["chat"]]
    plan, _ = planned(recipe_of(family["more"], others, Vocabulary("intersection")))
    assert plan.tokens == tuple(t for t in tokens_of(family["more"]) if t not in ("th", "the"))
    check_rows(plan, [family["more"], *others], family["more"])


def test_unused_rows_of_a_padded_model_are_dropped(family: dict[str, Path]) -> None:
    plan, _ = planned(recipe_of(None, [family["wide"], family["base"]], Vocabulary("union")))
    assert plan.vocab_size == len(plan.tokens) == 64
    assert float(plan.sources[str(family["wide"])].read(EMBED).max()) < 264


@pytest.mark.parametrize(("step", "rows"), [(1, 66), (8, 72), (66, 66), (100, 100)])
def test_padding_rows_are_the_mean_of_own_rows(family: dict[str, Path], step: int, rows: int) -> None:
    models = [family["base"], family["more"], family["wide"]]
    plan, _ = planned(recipe_of(None, models, Vocabulary("union", pad_to_multiple_of=step)))
    assert plan.vocab_size == rows
    check_rows(plan, models, None)
    for folder, count in zip(models, (64, 66, 64), strict=True):
        view, table = plan.sources[str(folder)], open_source(str(folder)).read(EMBED)[:count].tolist()
        mean = [sum(column) / count for column in zip(*table, strict=True)]
        assert view.read(EMBED)[66:].tolist() == [pytest.approx(mean)] * (rows - 66)
        assert torch.equal(view.read(EMBED, (rows - 1, rows)), view.read(EMBED)[-1:])


def test_policies_say_where_rows_come_from(family: dict[str, Path]) -> None:
    base, more, chat = (str(family[n]) for n in ("base", "more", "chat"))
    policies = {
        "the": Token("zero"),
        "th": Token("token", more, "q", force=True),
        "▁a": Token("model", chat, force=True),
        "▁b": Token("model", more),
        "<|end|>": Token("token", base, "</s>"),
        "7": Token("token", more, 65, force=True),
        "<|new|>": Token("token", chat, "<|end|>"),
        "<|nothing|>": Token("zero"),
    }
    plan, _ = planned(recipe_of(family["base"], [family["more"], family["chat"]], Vocabulary("union", policies)))
    assert plan.tokens[-3:] == ("<|end|>", "<|new|>", "<|nothing|>")
    check_rows(plan, [family[n] for n in ("base", "more", "chat")], family["base"], policies)
    assert not plan.sources[more].read(EMBED)[-1].any()


def test_tokens_that_only_the_recipe_names_become_added_ones(family: dict[str, Path], tmp_path: Path) -> None:
    tokens = {"<|new|>": Token("zero"), "[X]": Token("token", str(family["more"]), "the")}
    plan, _ = planned(recipe_of(family["base"], [family["more"]], Vocabulary("base", tokens)))
    out = put_down(plan, tmp_path / "out")
    assert list(plan.tokens) == tokens_of(out)
    assert ids_of(out, "a<|new|>[X]")[1:] == [64, 65]
    assert plan.vocab_size == 66


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Token("model", "nobody"), "nobody is no model of this recipe"),
        (Token("token", "chat", "there is none"), "has no 'there is none'"),
        (Token("token", "chat", 65), "has no id 65"),
        (Token("model", "base"), "has no '<|end|>'"),
        (Token("model"), "takes the row of a model, and names none"),
    ],
)
def test_policy_that_cannot_be_followed_is_refused(family: dict[str, Path], policy: Token, message: str) -> None:
    model = str(family[policy.model]) if policy.model in family else policy.model
    vocabulary = Vocabulary("union", {"<|end|>": Token(policy.kind, model, policy.token, policy.force)})
    with pytest.raises(ParameterError, match=r"token .<.end.>.: ") as error:
        planned(recipe_of(family["base"], [family["chat"]], vocabulary))
    assert message in error.value.message


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (Vocabulary("unoin"), "vocabulary is 'unoin', which is no model of this recipe"),
        (Vocabulary("base"), "vocabulary is base, and the recipe has none"),
        (Vocabulary("union", pad_to_multiple_of=0), "pad_to_multiple_of is 0"),
    ],
)
def test_vocabulary_that_cannot_be_had_is_refused(
    family: dict[str, Path], vocabulary: Vocabulary, message: str
) -> None:
    with pytest.raises(ParameterError) as error:
        planned(recipe_of(None, [family["base"], family["more"]], vocabulary))
    assert error.value.message.startswith(message)


@pytest.mark.parametrize("source", ["union", "base", "intersection", "more"])
def test_encoded_text_meets_the_rows_it_was_trained_with(family: dict[str, Path], tmp_path: Path, source: str) -> None:
    names = ("base", "more", "wide", "chat")
    vocabulary = Vocabulary(str(family[source]) if source == "more" else source)
    plan, _ = planned(recipe_of(family["base"], [family[n] for n in names[1:]], vocabulary))
    out = put_down(plan, tmp_path / "out")
    assert len(auto(out)) == len(plan.tokens)
    ids = ids_of(out, TEXT)
    texts = auto(out).convert_ids_to_tokens(ids)
    assert ids == [plan.tokens.index(t) for t in texts]
    for name in names:
        own = auto(family[name])
        table, seen = open_source(str(family[name])).read(EMBED), plan.sources[str(family[name])].read(EMBED)
        for i, token in zip(ids, texts, strict=True):
            if token in own.get_vocab():
                assert torch.equal(seen[i], table[own.get_vocab()[token]])
        if auto(family[name]).tokenize(TEXT) == texts:
            assert torch.equal(seen[torch.tensor(ids)], table[torch.tensor(ids_of(family[name], TEXT))])
    assert auto(out).decode(ids) == TEXT


def test_union_with_a_longer_vocabulary_cuts_text_as_that_does(family: dict[str, Path], tmp_path: Path) -> None:
    plan, _ = planned(recipe_of(family["base"], [family["more"]], Vocabulary("union")))
    out = put_down(plan, tmp_path / "out")
    assert auto(out).tokenize(TEXT) == auto(family["more"]).tokenize(TEXT)
    assert {"th", "the"} & {*auto(out).tokenize(TEXT)}


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_thin_chunks_equal_the_whole(family: dict[str, Path], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_rows, "BLOCK_ELEMENTS", 12)
    models = [family["wide"], family["more"], family["chat"]]
    plan, _ = planned(recipe_of(None, models, Vocabulary("union", pad_to_multiple_of=16)))
    for folder in models:
        view = plan.sources[str(folder)]
        whole = view.read(HEAD)
        parts = [view.read(HEAD, (i, min(i + rows, 80))) for i in range(0, 80, rows)]
        assert torch.equal(torch.cat(parts), whole)
        assert view.read(HEAD, (5, 5)).shape == (0, 4)


class Counted:
    """A source that notes how many rows are asked for at once."""

    identity: str | None = "something"

    def __init__(self, ref: str) -> None:
        self.source = open_source(ref)
        self.ref, self.infos, self.aliases = ref, self.source.infos, self.source.aliases
        self.companions = self.source.companions
        self.asked: list[int] = []

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        start, stop = rows if rows is not None else (0, self.infos[name].rows)
        self.asked.append(stop - start)
        return self.source.read(name, rows)


def test_reading_rows_reads_at_most_twice_as_many(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_rows, "BLOCK_ELEMENTS", 16)
    apart = save_model(tmp_path / "apart", bpe(stride=5), embeddings(6, 64))
    vocabulary = Vocabulary("union", pad_to_multiple_of=9)
    recipe = recipe_of(None, [family["wide"], family["more"], apart], vocabulary)
    sources = {ref: Counted(ref) for ref in recipe.refs}
    plan = vocabulary_views(recipe, sources)
    assert plan is not None
    assert all(not s.asked for s in sources.values())
    for ref in recipe.refs:
        assert plan.sources[ref].identity is None
        for start in range(0, plan.vocab_size, 4):
            plan.sources[ref].read(EMBED, (start, min(start + 4, plan.vocab_size)))
    assert max(max(s.asked) for s in sources.values()) <= 8


def test_other_tensors_pass_as_they_are(family: dict[str, Path]) -> None:
    plan, sources = planned(recipe_of(family["base"], [family["more"]], Vocabulary("union")))
    view = plan.sources[str(family["base"])]
    source = sources[str(family["base"])]
    assert [n for n in view.infos if view.infos[n] != source.infos[n]] == [HEAD, EMBED]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(view.read(name, (2, 4)), source.read(name, (2, 4)))
    assert view.companions() == source.companions()


def test_source_may_bring_files_of_its_own(family: dict[str, Path]) -> None:
    """So an earlier merge of the same recipe file can say what its tokens are."""
    recipe = recipe_of(family["base"], [family["more"]], Vocabulary("union"))
    first, sources = planned(recipe)
    stage = first.sources[str(family["base"])]
    stage.tokenizer_files = first.files  # type: ignore[attr-defined]
    second = vocabulary_views(recipe, {**sources, str(family["base"]): stage})
    assert second is not None
    assert second.tokens == first.tokens
    assert second.sources[str(family["base"])] is stage


def test_threads_read_the_same(family: dict[str, Path]) -> None:
    recipe = recipe_of(None, [family["wide"], family["more"]], Vocabulary("union", pad_to_multiple_of=32))
    whole = planned(recipe)[0].sources[str(family["more"])].read(EMBED)
    view = planned(recipe)[0].sources[str(family["more"])]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: view.read(EMBED, (i, i + 8))})) for i in range(0, 96, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([found[i] for i in sorted(found)]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_take_the_type_of_the_model_they_enter(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_model(tmp_path / "base", bpe(), embeddings(0, 64, dtype=dtype))
    more = save_model(tmp_path / "more", bpe((*MERGES, *MORE)), embeddings(1, 66))
    plan, _ = planned(recipe_of(base, [more], Vocabulary("union")))
    found = plan.sources[str(base)].read(EMBED)
    assert found.dtype == dtype
    assert torch.equal(found[64:], embeddings(1, 66)[EMBED][64:].to(dtype))


def test_config_gets_size_and_ids_of_the_output(family: dict[str, Path]) -> None:
    chat, more = str(family["chat"]), str(family["more"])
    plan, _ = planned(recipe_of(family["chat"], [family["more"]], Vocabulary("union", pad_to_multiple_of=8)))
    config = {"vocab_size": 65, "eos_token_id": [2, 64], "pad_token_id": None, "hidden_size": 65, "bos_token_id": -1}
    assert plan.adapted(config, chat) == config | {"vocab_size": 72}
    shifted = {"text_config": {"vocab_size": 66, "pad_token_id": 3}, "begin_suppress_tokens": [3, 4]}
    assert plan.adapted(shifted, more) == {
        "text_config": {"vocab_size": 72, "pad_token_id": plan.tokens.index(tokens_of(family["more"])[3])},
        "begin_suppress_tokens": [plan.tokens.index(tokens_of(family["more"])[i]) for i in (3, 4)],
    }


def test_config_that_names_a_lost_token_is_refused_or_takes_the_donor_s(family: dict[str, Path]) -> None:
    chat, more = str(family["chat"]), str(family["more"])
    plan, _ = planned(recipe_of(family["chat"], [family["more"]], Vocabulary(more)))
    with pytest.raises(ParameterError, match=r"eos_token_id of .* is '<.end.>', which the output's vocabulary lacks"):
        plan.adapted({"eos_token_id": 64}, chat)
    assert plan.adapted({"eos_token_id": 64}, chat, {"eos_token_id": 2}) == {"eos_token_id": 2}
    assert plan.adapted({"suppress_tokens": [64, 2]}, chat) == {"suppress_tokens": [2]}


def test_merge_of_mapped_models_is_the_merge_of_their_rows(family: dict[str, Path]) -> None:
    models = [family["base"], family["more"], family["chat"]]
    recipe = recipe_of(None, models, Vocabulary("union", pad_to_multiple_of=8))
    plan, _ = planned(recipe)
    merged = Merged(make_plan(recipe, {ref: open_source(ref) for ref in recipe.refs}), chunk_elements=20)
    rows = expected_rows(models, None, plan.tokens)
    mean = [[sum(x) / 3 for x in zip(*row, strict=True)] for row in zip(*rows, strict=True)]
    assert merged.infos[EMBED].shape == (72, 4)
    assert merged.read(EMBED)[: len(plan.tokens)].tolist() == [pytest.approx(row) for row in mean]


def test_real_model_says_the_same_through_a_larger_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=66, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=5
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        llama = save_tokenizer(bpe((*MERGES, *MORE), turned=5), tmp_path / "llama")
        slim = save_model(tmp_path / "slim", bpe(added=["<|end|>"]), embeddings(0, 65, width=16))
        recipe = recipe_of(None, [slim, llama], Vocabulary("union", pad_to_multiple_of=8))
        plan, _ = planned(recipe)
        out, view = put_down(plan, tmp_path / "out"), plan.sources[str(llama)]
        save_file({name: view.read(name) for name in view.infos}, out / "model.safetensors", {"format": "pt"})
        adapted = plan.adapted(json.loads((llama / "config.json").read_text()), str(llama))
        (out / "config.json").write_text(json.dumps(adapted))
        found, wanted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, llama))
    ids, own = ids_of(out, TEXT), ids_of(llama, TEXT)
    assert ids != own
    assert found.config.vocab_size == 72
    assert plan.tokens[found.config.pad_token_id] == tokens_of(llama)[5]
    places = [plan.tokens.index(token) for token in tokens_of(llama)]
    logits = found(torch.tensor([ids])).logits[0]
    assert torch.equal(logits[:, places], wanted(torch.tensor([own])).logits[0])


def test_rows_of_a_tied_head_are_those_of_the_embedding(family: dict[str, Path], tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", bpe((*MERGES, *MORE)), embeddings(4, 66))
    tensors = {name: x for name, x in embeddings(4, 66).items() if name != HEAD}
    save_file(tensors, tied / "model.safetensors", metadata={HEAD: EMBED})
    plan, _ = planned(recipe_of(family["base"], [tied], Vocabulary("union")))
    assert plan.sources[str(tied)].aliases == {HEAD: EMBED}
    assert torch.equal(plan.sources[str(family["base"])].read(HEAD)[64:], tensors[EMBED][64:])


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

"""A vocabulary of several models: its tokens, where their rows come from, and what it does to a text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoints import open_source
from merganser.errors import ParameterError
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import Token, Vocabulary
from merganser.merging.vocabulary import VocabularyPlan, vocabulary_views
from vocabulary_helpers import (
    EMBED,
    HEAD,
    MERGES,
    MORE,
    auto,
    bpe,
    embeddings,
    family_at,
    ids_of,
    planned,
    put_down,
    recipe_of,
    save_model,
    save_tokenizer,
)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return family_at(tmp_path)


TEXT = "the cat 42 then bathes"


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

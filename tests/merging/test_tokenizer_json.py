"""tokenizer.json of a merged vocabulary: every kind of tokenizer gives the ids that the plan says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from merganser.checkpoints import open_source
from merganser.errors import ParameterError
from merganser.merging.recipe import Vocabulary
from merganser.merging.tokenizer_json import SLOW_NAMES
from tokenizer_kinds import EMBED, END, EVERY_KIND, PAIRS, byte_level, check_ids, pair, word_level
from vocabulary_helpers import (
    MERGES,
    SPECIALS,
    auto,
    bpe,
    embeddings,
    finished,
    ids_of,
    planned,
    put_down,
    recipe_of,
    save_model,
)


@EVERY_KIND
@pytest.mark.parametrize("base", [False, True])
def test_union_encodes_to_the_rows_of_the_model_that_knows_the_text(kind: str, base: bool, tmp_path: Path) -> None:
    first, second = pair(kind, tmp_path)
    recipe = recipe_of(first if base else None, [second] if base else [first, second], Vocabulary("union"))
    plan, _ = planned(recipe)
    out = put_down(plan, tmp_path / "out")
    check_ids(plan, out)
    text = PAIRS[kind][2]
    assert auto(out).tokenize(text) == auto(second).tokenize(text)
    table = open_source(str(second)).read(EMBED)
    seen = plan.sources[str(second)].read(EMBED)[ids_of(out, text)]
    assert torch.equal(seen, table[ids_of(second, text)])
    assert auto(out).decode(ids_of(out, text)) == auto(second).decode(ids_of(second, text))


@EVERY_KIND
def test_union_cuts_as_before_what_the_donor_knows(kind: str, tmp_path: Path) -> None:
    first, second = pair(kind, tmp_path)
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    out = put_down(plan, tmp_path / "out")
    for text in ("a b", "cat b", "a cat", "a cat</s>"):
        assert ids_of(out, text) == ids_of(first, text)


@EVERY_KIND
@pytest.mark.parametrize("turned", [False, True])
def test_intersection_encodes_to_rows_of_all_models(kind: str, turned: bool, tmp_path: Path) -> None:
    first, second = pair(kind, tmp_path)
    models = [second, first] if turned else [first, second]
    plan, _ = planned(recipe_of(None, models, Vocabulary("intersection")))
    assert {*plan.tokens} == {*auto(first).get_vocab()} & {*auto(second).get_vocab()}
    out = put_down(plan, tmp_path / "out")
    check_ids(plan, out)
    for text in ("a b", "cat b", "a cat the</s>"):
        ids = ids_of(out, text)
        assert auto(out).decode(ids) == auto(models[0]).decode(ids_of(models[0], text))
        for folder in models:
            known, table = auto(folder).get_vocab(), open_source(str(folder)).read(EMBED)
            own = [known[t] for t in auto(out).convert_ids_to_tokens(ids)]
            assert torch.equal(plan.sources[str(folder)].read(EMBED)[ids], table[own])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("BPE", "LlamaTokenizer"), ("ByteLevel", "GPT2Tokenizer"), ("WordPiece", "BertTokenizer")],
)
def test_classes_that_rebuild_a_tokenizer_give_the_same_ids(kind: str, name: str, tmp_path: Path) -> None:
    first, second = pair(kind, tmp_path, tokenizer_class=name, pad_token="<s>", cls_token="<s>", sep_token="</s>",
                         mask_token="<unk>")  # fmt: skip
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    out = put_down(plan, tmp_path / "out")
    check_ids(plan, out)
    assert type(auto(out)).__name__.startswith(name)


def test_new_plain_tokens_do_not_cut_words(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", bpe(), embeddings(0, 64))
    second = save_model(tmp_path / "second", bpe((*MERGES, ("c", "d"), ("cd", "e"))), embeddings(1, 66))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    out = put_down(plan, tmp_path / "out")
    assert auto(out).tokenize("cde acdeb") == auto(second).tokenize("cde acdeb") == ["▁c", "d", "e", "▁a", "cde", "b"]


def test_added_tokens_keep_their_flags(tmp_path: Path) -> None:
    flags = AddedToken("<mark>", lstrip=True, rstrip=True, single_word=True, normalized=False, special=True)
    first = save_model(tmp_path / "first", bpe(), embeddings(0, 64))
    second = save_model(tmp_path / "second", bpe(added=[flags]), embeddings(1, 65))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    (entry,) = [e for e in json.loads(plan.files["tokenizer.json"])["added_tokens"] if e["content"] == "<mark>"]
    assert entry == {"id": 64, "content": "<mark>", "single_word": True, "lstrip": True, "rstrip": True,
                     "normalized": False, "special": True}  # fmt: skip
    assert auto(put_down(plan, tmp_path / "out")).all_special_ids == auto(second).all_special_ids


@pytest.mark.parametrize("kind", ["template", "bert", "roberta", "sequence"])
def test_frames_around_a_text_get_the_new_ids(kind: str, tmp_path: Path) -> None:
    def framed(tokenizer: Tokenizer) -> Tokenizer:
        sep, cls = [(t, tokenizer.token_to_id(t)) for t in ("</s>", "<s>")]
        template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[sep, cls])
        tokenizer.post_processor = {
            "template": template,
            "bert": processors.BertProcessing(sep, cls),
            "roberta": processors.RobertaProcessing(sep, cls),
            "sequence": processors.Sequence([processors.ByteLevel(), template]),
        }[kind]
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id("</s>"), pad_token="</s>")
        return tokenizer

    letters = ("zz", "yy", *SPECIALS, "▁", "a", "b")
    tokens = {t: i for i, t in enumerate(letters)}
    moved = framed(finished(Tokenizer(models.BPE(tokens, [], unk_token="<unk>"))))
    plain = framed(finished(Tokenizer(models.BPE({t: i for i, t in enumerate(letters[2:])}, [], unk_token="<unk>"))))
    first = save_model(tmp_path / "first", moved, embeddings(0, 8))
    second = save_model(tmp_path / "second", plain, embeddings(1, 6))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("intersection")))
    out = put_down(plan, tmp_path / "out")
    assert auto(out)("a b")["input_ids"] == auto(second)("a b")["input_ids"]
    assert auto(out)("a b")["input_ids"][0] == plan.tokens.index("<s>") == 1
    assert json.loads(plan.files["tokenizer.json"])["padding"]["pad_id"] == 2


@pytest.mark.parametrize(
    ("settings", "second", "message"),
    [
        ({"pad_token": "[X]"}, bpe(), r"would lack '\[X\]', which the tokenizer of .*first uses as pad_token"),
        ({}, word_level(["a", "▁a"]), None),
    ],
)
def test_intersection_that_loses_a_special_token_is_refused(
    tmp_path: Path, settings: dict[str, str], second: Tokenizer, message: str | None
) -> None:
    first = save_model(tmp_path / "first", bpe(added=["[X]"]), embeddings(0, 65), **settings)
    other = save_model(tmp_path / "second", second, embeddings(1, second.get_vocab_size()))
    recipe = recipe_of(first, [other], Vocabulary("intersection"))
    if message is None:
        assert planned(recipe)[0].tokens == (*SPECIALS, "a", "▁a")
    else:
        with pytest.raises(ParameterError, match=message):
            planned(recipe)


def test_intersection_that_loses_bytes_is_refused(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", byte_level([]), embeddings(0, 259))
    second = save_model(tmp_path / "second", bpe(), embeddings(1, 64))
    with pytest.raises(ParameterError, match=r"would lack '.' \(and \d+ more\), which .* uses as letter"):
        planned(recipe_of(first, [second], Vocabulary("intersection")))
    fallback = bpe(letters=(*SPECIALS, "▁", *(f"<0x{i:02X}>" for i in range(256))), merges=[])
    fallback.model.byte_fallback = True
    third = save_model(tmp_path / "third", fallback, embeddings(1, 260))
    with pytest.raises(ParameterError, match=r"would lack '<0x00>' \(and 255 more\), which .* uses as byte"):
        planned(recipe_of(third, [second], Vocabulary("intersection")))


def test_intersection_without_a_token_is_refused(tmp_path: Path) -> None:
    def bare(word: str) -> Tokenizer:
        return Tokenizer(models.WordLevel({word: 0}, unk_token=word))

    none = dict.fromkeys(("bos_token", "eos_token", "unk_token"))
    folders = [save_model(tmp_path / word, bare(word), embeddings(0, 4), **none) for word in ("a", "b")]
    with pytest.raises(ParameterError, match="the models have no token in common"):
        planned(recipe_of(None, folders, Vocabulary("intersection")))


@pytest.mark.parametrize("prefix", ["", "##"])
def test_merges_of_words_with_prefixed_parts_are_followed(prefix: str, tmp_path: Path) -> None:
    def pieces(more: Sequence[tuple[str, str]]) -> Tokenizer:
        tokens = [*SPECIALS, *"abc", *(prefix + letter for letter in "abc" if prefix)]
        tokens += [a + b[len(prefix) :] for a, b in more]
        vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
        model = models.BPE(vocab, list(more), unk_token="<unk>", continuing_subword_prefix=prefix)
        tokenizer = finished(Tokenizer(model))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer

    first = save_model(tmp_path / "first", pieces([("a", prefix + "b")]), embeddings(0, 16))
    second = save_model(tmp_path / "second", pieces([("a", prefix + "b"), ("ab", prefix + "c")]), embeddings(1, 16))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    out = put_down(plan, tmp_path / "out")
    assert auto(out).tokenize("abc ab") == auto(second).tokenize("abc ab") == ["abc", "ab"]
    plan, _ = planned(recipe_of(second, [first], Vocabulary("intersection")))
    assert auto(put_down(plan, tmp_path / "common")).tokenize("abc") == auto(first).tokenize("abc")


def test_union_of_different_kinds_is_refused(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", bpe(), embeddings(0, 64))
    second = save_model(tmp_path / "second", word_level(["elephant"]), embeddings(1, 4))
    with pytest.raises(ParameterError, match=r"second has a WordLevel vocabulary and .*first a BPE one"):
        planned(recipe_of(first, [second], Vocabulary("union")))


def test_slow_files_that_would_no_longer_be_true_are_left_out(tmp_path: Path) -> None:
    first, second = pair("BPE", tmp_path)
    for name in (*SLOW_NAMES, "qwen.tiktoken"):
        (first / name).write_text("{}")
    (first / "chat_template.jinja").write_text("{{ messages }}")
    plan, _ = planned(recipe_of(first, [second], Vocabulary("base")))
    assert {*SLOW_NAMES[:-1], "qwen.tiktoken"} <= {*plan.files}
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    assert sorted(plan.files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


def test_lists_of_special_tokens_follow(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", bpe(added=[END, "[X]"]), embeddings(0, 66), extra_special_tokens=["<|end|>"])
    config = json.loads((first / "tokenizer_config.json").read_text())
    entry = {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens_decoder"] = {"64": entry, "65": {**entry, "content": "[X]", "special": False}}
    (first / "tokenizer_config.json").write_text(json.dumps(config))
    (first / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|end|>", "</s>"]}))
    second = save_model(tmp_path / "second", bpe(added=["[X]"], turned=2), embeddings(1, 65))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("intersection")))
    written = {name: json.loads(content) for name, content in plan.files.items()}
    assert written["special_tokens_map.json"] == {"additional_special_tokens": ["</s>"]}
    assert written["tokenizer_config.json"]["extra_special_tokens"] == []
    assert {i: e["content"] for i, e in written["tokenizer_config.json"]["added_tokens_decoder"].items()} == {
        "0": "<unk>", "1": "<s>", "2": "</s>", "64": "[X]",
    }  # fmt: skip
    check_ids(plan, put_down(plan, tmp_path / "out"))


def test_unigram_keeps_its_unknown_token_and_lowest_score(tmp_path: Path) -> None:
    vocab = [("zz", -1.0), ("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁a", -2.5), ("a", -7.0)]
    first = save_model(
        tmp_path / "first", finished(Tokenizer(models.Unigram(vocab, unk_id=1)), ["[X]"]), embeddings(0, 7)
    )
    second = save_model(
        tmp_path / "second", finished(Tokenizer(models.Unigram([*vocab[1:], ("▁b", -3.0)], unk_id=0))), embeddings(1, 6)
    )
    common, _ = planned(recipe_of(first, [second], Vocabulary("intersection")))
    model = json.loads(common.files["tokenizer.json"])["model"]
    assert model["vocab"] == [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["▁a", -2.5], ["a", -7.0]]
    assert model["unk_id"] == 0
    union, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    model = json.loads(union.files["tokenizer.json"])["model"]
    assert model["vocab"] == [*map(list, vocab), ["[X]", -7.0], ["▁b", -3.0]]
    assert model["unk_id"] == 1
    out = put_down(union, tmp_path / "out")
    assert ids_of(out, "a b[X]?") == [4, 7, 6, 1]


def test_merges_are_written_as_the_donor_writes_them(tmp_path: Path) -> None:
    first, second = pair("BPE", tmp_path)
    content = json.loads((first / "tokenizer.json").read_text())
    assert content["model"]["merges"][0] == ["▁", "a"]
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (first / "tokenizer.json").write_text(json.dumps(content))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    merges = json.loads(plan.files["tokenizer.json"])["model"]["merges"]
    assert merges == [*(" ".join(m) for m in MERGES), "t h", "th e"]

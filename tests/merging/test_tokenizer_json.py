from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from merganser.checkpoints import open_source
from merganser.errors import CheckpointError, ParameterError
from merganser.merging.chat_templates import TEMPLATES
from merganser.merging.chosen_template import chat_template_of
from merganser.merging.recipe import Input, Recipe, Slice, Vocabulary
from merganser.merging.tokenizer_json import SLOW_NAMES, read_tokenizers
from merganser.merging.tokenizer_json import Tokenizer as Read
from merganser.merging.tokenizer_written import needed
from merganser.merging.vocabulary import VocabularyPlan
from vocabulary_helpers import (
    MERGES,
    MORE,
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

EMBED = "model.embed_tokens.weight"
END = AddedToken("<|end|>", special=True, normalized=False)


def word_level(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    vocab = {t: i for i, t in enumerate([*SPECIALS, *words])}
    tokenizer = finished(Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), added)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_piece(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    vocab = {t: i for i, t in enumerate([*SPECIALS, *words])}
    tokenizer = finished(Tokenizer(models.WordPiece(vocab, unk_token="<unk>")), added)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return tokenizer


def unigram(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    vocab = [*((t, 0.0) for t in SPECIALS), *((t, -float(i)) for i, t in enumerate(words, 2))]
    tokenizer = finished(Tokenizer(models.Unigram(vocab, unk_id=0)), added)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def byte_level(merges: Sequence[tuple[str, str]], added: Sequence[AddedToken] = ()) -> Tokenizer:
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = finished(Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges))), added)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


#: Kind -> two tokenizers, the second of which knows more in another order, and a text.
PAIRS: dict[str, tuple[Tokenizer, Tokenizer, str]] = {
    "WordLevel": (word_level(["a", "b", "cat"]), word_level(["dog", "cat", "b", "a"], [END]), "a dog cat<|end|> b"),
    "WordPiece": (
        word_piece(["a", "b", "cat", "##s"]),
        word_piece(["dog", "cat", "##s", "a", "b"], [END]),
        "cats dogs<|end|> b",
    ),
    "Unigram": (
        unigram(["▁a", "▁b", "▁cat", "a", "▁"]),
        unigram(["▁dog", "▁cat", "▁a", "▁b", "a", "▁"], [END]),
        "cat dog<|end|> b",
    ),
    "BPE": (bpe(added=["[X]"]), bpe((*MERGES, *MORE), [END], turned=9), "the cat<|end|> bathes"),
    "ByteLevel": (
        byte_level([("Ġ", "a"), ("t", "h")], ["[X]"]),
        byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a")], [END]),
        "a the<|end|> café the",
    ),
}
EVERY_KIND = pytest.mark.parametrize("kind", PAIRS)


def pair(kind: str, folder: Path, **settings: Any) -> tuple[Path, Path]:
    first, second, _ = PAIRS[kind]
    sizes = [t.get_vocab_size(with_added_tokens=True) for t in (first, second)]
    return (
        save_model(folder / "first", first, embeddings(0, sizes[0]), **settings),
        save_model(folder / "second", second, embeddings(10, sizes[1]), **settings),
    )


def check_ids(plan: VocabularyPlan, out: Path) -> None:
    """The library gives every token the id that the plan says, and knows no others."""
    assert auto(out).get_vocab() == {token: i for i, token in enumerate(plan.tokens)}


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


# ids as a library gives them


def edited(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "tokenizer.json") -> Path:
    content = json.loads((folder / name).read_text("utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), "utf-8")
    return folder


def read(folder: Path) -> Read:
    return read_tokenizers({str(folder): open_source(str(folder))})[str(folder)]


@EVERY_KIND
def test_reading_gives_the_library_s_ids(kind: str, tmp_path: Path) -> None:
    for folder in pair(kind, tmp_path):
        found = read(folder)
        assert found.ids == auto(folder).get_vocab()
        assert [found.ids[t] for t in found.names] == list(range(len(found.names)))
        assert found.sound
        assert {*SPECIALS} <= {*needed(found)}


def test_special_token_that_only_the_settings_name_has_the_id_that_loading_gives_it(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", bpe(added=["[X]"]), embeddings(0, 68), pad_token="<pad>", mask_token="<m>")
    assert read(first).ids == auto(first).get_vocab()
    second = save_model(tmp_path / "second", bpe((*MERGES, *MORE), ["[Y]"]), embeddings(1, 67))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    assert plan.tokens[64:] == ("[X]", "<pad>", "<m>", "th", "the", "[Y]")
    check_ids(plan, put_down(plan, tmp_path / "out"))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("base")))
    check_ids(plan, put_down(plan, tmp_path / "same"))


def test_added_token_that_only_the_settings_list_has_the_id_that_they_say(tmp_path: Path) -> None:
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": False}
    listed = {"64": {"content": "[X]", **flags}, "65": {"content": "[Y]", **flags}}
    first = save_model(tmp_path / "first", bpe(), embeddings(0, 66), added_tokens_decoder=listed)
    assert read(first).ids == auto(first).get_vocab()
    assert read(first).added["[Y]"] == {"id": 65, "content": "[Y]", **flags}
    second = save_model(tmp_path / "second", bpe((*MERGES, *MORE)), embeddings(1, 66))
    plan, _ = planned(recipe_of(first, [second], Vocabulary("union")))
    assert plan.tokens[64:] == ("[X]", "[Y]", "th", "the")
    out = put_down(plan, tmp_path / "out")
    check_ids(plan, out)
    assert ids_of(out, "a[Y] b") == ids_of(first, "a[Y] b")


@pytest.mark.parametrize("source", ["union", "base"])
def test_ids_that_no_token_has_stay_rows_of_the_output(tmp_path: Path, source: str) -> None:
    """The library moves added tokens that stand behind a gap; written anew they are where the rows are."""
    first = save_model(tmp_path / "first", bpe(added=["[X]"]), embeddings(0, 70))
    edited(first, lambda c: c["added_tokens"][-1].update(id=67))
    second = save_model(tmp_path / "second", bpe((*MERGES, *MORE)), embeddings(1, 66))
    assert not read(first).sound
    plan, sources = planned(recipe_of(first, [second], Vocabulary(source)))
    assert plan.tokens[64:68] == ("<|unused id 64|>", "<|unused id 65|>", "<|unused id 66|>", "[X]")
    out = put_down(plan, tmp_path / "out")
    check_ids(plan, out)
    assert ids_of(out, "a[X]")[-1] == 67
    assert torch.equal(plan.sources[str(first)].read(EMBED)[:68], sources[str(first)].read(EMBED)[:68])
    assert torch.equal(plan.sources[str(second)].read(EMBED)[64:68], sources[str(first)].read(EMBED)[64:68])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "has no model with a vocab"),
        (lambda c: c["model"].update(vocab=7), "has no model with a vocab"),
        (lambda c: c["model"].update(type="Neural"), "is of the unknown kind Neural"),
        (lambda c: c["model"]["vocab"].update(a=-1), "the id of 'a' is -1, which no token can have"),
        (lambda c: c["model"]["vocab"].update(a=True), "the id of 'a' is True, which no token can have"),
        (lambda c: c["model"]["vocab"].update(a=10**12), "the id of 'a' is 1000000000000, which no token can have"),
        (lambda c: c["model"]["vocab"].update(a=5), "gives id 5 to 'a' and 'b'"),
        (lambda c: c["added_tokens"][0].update(id=9), "gives '<unk>' two ids: 0 and 9"),
        (lambda c: c["added_tokens"].append({"id": 64}), "its added_tokens are not a list of objects"),
        (lambda c: c.update(added_tokens={"a": 1}), "its added_tokens are not a list of objects"),
        (lambda c: c["model"].update(type="Unigram", vocab=[["a", 0.0], "b"]), "entry 1 of its vocab is not"),
        (lambda c: c["model"].update(type="Unigram", vocab=[["a", "0"]]), "entry 0 of its vocab is not"),
        (lambda c: c["model"].update(merges=7), "has no list of merges"),
        (lambda c: c["model"]["merges"].append("a"), "the merge 'a' is not two parts"),
        (lambda c: c.update(post_processor={"special_tokens": {"a": 1}}), "is not sound: TypeError"),
        (lambda c: c.update(post_processor={"special_tokens": [1]}), "is not sound: AttributeError"),
    ],
)
def test_unsound_file_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    first, second = pair("BPE", tmp_path)
    edited(first, change)
    with pytest.raises(CheckpointError) as error:
        planned(recipe_of(first, [second], Vocabulary("union")))
    assert message in error.value.message
    assert "first" in error.value.message


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_file_that_is_no_object_is_refused(tmp_path: Path, name: str, text: str) -> None:
    first, second = pair("BPE", tmp_path)
    (first / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name} of .*first is not"):
        planned(recipe_of(first, [second], Vocabulary("union")))


@EVERY_KIND
def test_old_files_that_do_not_say_their_kind_are_understood(kind: str, tmp_path: Path) -> None:
    first, _ = pair(kind, tmp_path)
    before = read(first)
    assert read(edited(first, lambda c: c["model"].pop("type"))).kind == before.kind


# chat templates


def templated(folder: Path, where: str, template: str) -> Path:
    folder = save_model(folder, bpe(), embeddings(0, 64))
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(template)
    elif where == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif where == "named":
        several = [{"name": "tool", "template": "no"}, {"name": "default", "template": template}]
        edited(folder, lambda c: c.update(chat_template=several), "tokenizer_config.json")
    elif where == "settings":
        edited(folder, lambda c: c.update(chat_template=template), "tokenizer_config.json")
    return folder


def template_of(folders: Sequence[Path], wanted: str | None, base: Path | None = None) -> str | None:
    recipe = Recipe("linear", (Slice(tuple(Input(str(f)) for f in folders)),), chat_template=wanted)
    return chat_template_of(recipe, {str(f): open_source(str(f)) for f in folders})


def test_most_frequent_template_is_taken_wherever_it_stands(tmp_path: Path) -> None:
    wheres = ("settings", "jinja", "named", "json", "nowhere")
    folders = [templated(tmp_path / w, w, "{{ b }}" if w in ("named", "json") else "{{ a }}") for w in wheres]
    assert template_of(folders[:3], "auto") == "{{ a }}"
    assert template_of(folders[1:], "auto") == "{{ b }}"
    assert template_of(folders[2:0:-1], "auto") == "{{ b }}"
    assert template_of(folders[-1:], "auto") is None


def test_template_is_taken_by_name_or_as_it_is(tmp_path: Path) -> None:
    assert template_of([], None) is None
    assert template_of([], "{{ messages[0] }}") == "{{ messages[0] }}"
    assert template_of([], "chatml") == TEMPLATES["chatml"]
    with pytest.raises(ParameterError, match="chat_template is 'chatlm', which is no template"):
        template_of([], "chatlm")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>assistant\n"),
        ("exaone", "[|system|][|endofturn|]\n[|user|]Q\n[|assistant|]A[|endofturn|]\n[|assistant|]"),
    ],
)
def test_built_in_templates_write_the_known_formats(tmp_path: Path, name: str, text: str) -> None:
    tokenizer = auto(templated(tmp_path / "model", "jinja", TEMPLATES[name]))
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text

"""Tokenizer files as they are read: ids as the library gives them, unsound files refused, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.checkpoints import open_source
from merganser.errors import CheckpointError, ParameterError
from merganser.merging.chat_templates import TEMPLATES
from merganser.merging.chosen_template import chat_template_of
from merganser.merging.recipe import Input, Recipe, Slice, Vocabulary
from merganser.merging.run import plan_recipes, run
from merganser.merging.tokenizer_json import Tokenizer as Read
from merganser.merging.tokenizer_json import read_tokenizers
from merganser.merging.tokenizer_written import needed
from tokenizer_kinds import EMBED, EVERY_KIND, check_ids, pair
from vocabulary_helpers import (
    MERGES,
    MORE,
    SPECIALS,
    auto,
    bpe,
    embeddings,
    ids_of,
    planned,
    put_down,
    recipe_of,
    save_model,
)

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
    inputs, given = tuple(Input(str(f)) for f in folders), Input(str(base)) if base is not None else None
    recipe = Recipe("linear", (Slice(inputs),), given, chat_template=wanted)
    return chat_template_of(recipe, {ref: open_source(ref) for ref in recipe.refs})


def test_most_frequent_template_is_taken_wherever_it_stands(tmp_path: Path) -> None:
    wheres = ("settings", "jinja", "named", "json", "nowhere")
    folders = [templated(tmp_path / w, w, "{{ b }}" if w in ("named", "json") else "{{ a }}") for w in wheres]
    assert template_of(folders[:3], "auto") == "{{ a }}"
    assert template_of(folders[1:], "auto") == "{{ b }}"
    assert template_of(folders[2:0:-1], "auto") == "{{ b }}"
    assert template_of(folders[-1:], "auto") is None


def test_the_base_counts_behind_the_models_and_space_around_a_template_does_not(tmp_path: Path) -> None:
    one, two = (templated(tmp_path / str(i), "jinja", f"{{{{ {i} }}}}\n") for i in range(2))
    base = templated(tmp_path / "base", "settings", "{{ 1 }}")
    assert template_of([one, two], "auto", base) == "{{ 1 }}\n"
    assert template_of([one], "auto", base) == "{{ 0 }}\n"


def test_template_is_taken_by_name_or_as_it_is(tmp_path: Path) -> None:
    assert template_of([], None) is None
    assert template_of([], "{{ messages[0] }}") == "{{ messages[0] }}"
    assert template_of([], "chatml") == TEMPLATES["chatml"]
    with pytest.raises(ParameterError, match="chat_template is 'chatlm', which is no template"):
        template_of([], "chatlm")


@pytest.mark.parametrize("vocabulary", [None, Vocabulary("union")])
@pytest.mark.parametrize("where", ["jinja", "json", "named", "settings"])
def test_no_file_of_the_output_holds_the_old_template(
    tmp_path: Path, where: str, vocabulary: Vocabulary | None
) -> None:
    folders = [templated(tmp_path / name, at, "{{ old }}") for name, at in (("a", where), ("b", "nowhere"))]
    inputs = tuple(Input(str(folder)) for folder in folders)
    recipe = Recipe("linear", (Slice(inputs),), chat_template="{{ new }}", vocabulary=vocabulary)
    out = run(plan_recipes([recipe]), tmp_path / "out", threads=1)
    assert (out / "chat_template.jinja").read_text() == "{{ new }}"
    assert auto(out).chat_template == "{{ new }}"
    for file in out.glob("*.json"):
        assert json.loads(file.read_text()).get("chat_template", "{{ new }}") == "{{ new }}"


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

"""mergekit's words for the vocabulary of the output: `tokenizer_source` and `tokenizer`.

Older recipes write a model of `tokenizer_source` as `model:PATH`; mergekit itself has forgotten that form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from merganser.merging.common import SOURCES, read_member, read_source
from merganser.merging.reading import Node
from merganser.merging.recipe import Recipe, Token, Vocabulary

_OLD = "model:"


def read_vocabulary(
    entries: Mapping[str, Node], recipe: Recipe, reference: Callable[[Node], str], *, lenient: bool = False
) -> Vocabulary | None:
    """The vocabulary that a document asks for; what is wrong is collected in its problems.

    Args:
        entries: of the document.
        recipe: as far as it is read: its base and its models.
        reference: reads a model.
        lenient: warn of unknown keys rather than refuse them.
    """
    reader = _Reader(recipe, reference, lenient)
    if "tokenizer_source" in entries and "tokenizer" in entries:
        entries["tokenizer_source"].error("give tokenizer_source or tokenizer, not both")
    if "tokenizer_source" in entries:
        return Vocabulary(reader.source(entries["tokenizer_source"]))
    if "tokenizer" not in entries:
        return None
    inner = entries["tokenizer"].fields(("source", "tokens", "pad_to_multiple_of"), lenient=lenient)
    tokens = inner["tokens"].mapping("tokens by their text") if "tokens" in inner else {}
    return Vocabulary(
        source=reader.source(inner["source"]) if "source" in inner else SOURCES[0],
        tokens={text: reader.token(child) for text, child in tokens.items()},
        pad_to_multiple_of=inner["pad_to_multiple_of"].integer(1) if "pad_to_multiple_of" in inner else 1,
    )


@dataclass(frozen=True)
class _Reader:
    recipe: Recipe
    reference: Callable[[Node], str]
    lenient: bool

    def default_source(self) -> str:
        return "base" if self.recipe.base is not None or not self.recipe.refs else self.recipe.refs[0]

    def source(self, node: Node) -> str:
        if not isinstance(node.value, dict):
            text = node.string(f"one of {', '.join(SOURCES)}, or a model")
            if text == "base" and self.recipe.base is None:
                node.warn("there is no base_model; this takes the first model, and mergekit takes any")
                return self.default_source()
            if text in SOURCES or not text:
                return text or SOURCES[0]
        ref = self.reference(node)
        if ref not in self.recipe.refs and isinstance(node.value, str) and node.value.startswith(_OLD):
            ref = self.reference(replace(node, value=node.value.removeprefix(_OLD).strip()))
        return read_source(node, ref if ref != node.place else "", self.recipe.refs, SOURCES)

    def token(self, node: Node) -> Token:
        entries = node.fields(("source", "force"), lenient=self.lenient)
        force = entries["force"].flag() if "force" in entries else False
        if "source" not in entries:
            node.error("source is missing")
            return Token("zero")
        source = entries["source"]
        if not isinstance(source.value, dict) or not {"kind", "token", "token_id"} & source.value.keys():
            return Token("model", read_member(source, self.reference(source), self.recipe.refs), None, force)
        inner = source.fields(("kind", "model", "token", "token_id"), lenient=self.lenient)
        kind = inner["kind"].one_of(("zero", "model_token")) if "kind" in inner else "model_token"
        if kind == "zero":
            return Token("zero", force=force)
        if "model" not in inner:
            source.error("model is missing")
        if ("token" in inner) == ("token_id" in inner):
            source.error("give token or token_id" + (", not both" if "token" in inner else ""))
        model = None
        if "model" in inner:
            model = read_member(inner["model"], self.reference(inner["model"]), self.recipe.refs)
        token: str | int | None = None
        if "token_id" in inner:
            token = inner["token_id"].integer(0)
        elif "token" in inner:
            token = inner["token"].string("a token")
        return Token("token", model, token, force)

"""What both languages of recipes share: references, types, names and vocabularies."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merganser.checkpoints import base_and_adapter
from merganser.merging.chat_templates import TEMPLATES
from merganser.merging.checking import base_use
from merganser.merging.lookup import merge_names, rules_of
from merganser.merging.reading import Node, short
from merganser.merging.recipe import Input, Recipe

#: safetensors name by every spelling in use, without "torch." and in lower case.
DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16", "bf16": "BF16",
    "float16": "F16", "fp16": "F16", "f16": "F16", "half": "F16",
    "float32": "F32", "fp32": "F32", "f32": "F32", "float": "F32",
    "float64": "F64", "fp64": "F64", "f64": "F64", "double": "F64",
}  # fmt: skip

#: Where a vocabulary may come from, beside the models.
SOURCES = ("union", "base", "intersection")

_NAME = re.compile(r"[^\W_][\w.-]*")


@dataclass(frozen=True)
class Origin:
    """Where references come from.

    Attributes:
        folder: of the recipe file.
        names: of the recipes of the file.
        written: references as they are written, by what they were resolved to; grows as they are read.
    """

    folder: Path
    names: Collection[str] = field(default_factory=tuple)
    written: dict[str, str] = field(default_factory=dict)

    def located(self, ref: str) -> str:
        """A reference with every relative path that exists beside the recipe seen from the working folder."""
        found = self._located(ref)
        self.written.setdefault(found, ref)
        return found

    def _located(self, ref: str) -> str:
        if ref in self.names or ref.startswith("hf:"):
            return ref
        name, colons, key = ref.partition("::")
        path = self.folder / name
        if not Path(name).is_absolute() and not name.startswith("~") and _exists(path):
            return f"{path}{colons}{key}"
        base, adapter = base_and_adapter(ref, self.folder)
        if base is not None and not _exists(Path(name)):
            return f"{self.located(base)}+{self.located(adapter)}"
        return ref

    def read(self, node: Node) -> str:
        """A reference; where it is none, an error and the place of it."""
        text = node.string("a model")
        return self.located(text) if text else node.place


def read_name(document: Node) -> str | None:
    """Name of a document, None where it has none."""
    node = document.value.get("name") if isinstance(document.value, dict) else None
    if node is None or node.value is None:
        return None
    text = node.string("a name")
    if text and not _NAME.fullmatch(text):
        rule = "may hold letters, digits, dots, hyphens and underscores, and begins with a letter or a digit"
        node.error(f"{short(text)} {rule}")
    return text or None


def read_dtype(node: Node) -> str | None:
    """A floating type by any of its names; an error and None where it is none."""
    text = node.string("a type such as bfloat16")
    word = text.lower().removeprefix("torch.")
    if text and word not in DTYPES:
        known = "bfloat16, float16, float32, float64"
        node.error(f"{short(text)} is no floating type that models are stored in; known: {known}")
    return DTYPES.get(word)


def read_source(node: Node, text: str, recipe_refs: Sequence[str], words: Sequence[str]) -> str:
    """Where a vocabulary comes from: a word, or one of the models."""
    if text in words or text in recipe_refs:
        return text
    if text:
        node.error(f"{short(text)} is none of {', '.join(words)} and no model of this recipe")
    return words[0]


def read_member(node: Node, ref: str, recipe_refs: Sequence[str]) -> str:
    """A reference that must be one of the recipe's models."""
    if ref not in recipe_refs and ref != node.place:
        node.error(f"{short(ref)} is no model of this recipe")
    return ref


def read_token(node: Node) -> str | int:
    """A token by its text or its id."""
    return (
        node.integer(0) if isinstance(node.value, int) and not isinstance(node.value, bool) else node.string("a token")
    )


def read_keep(node: Node) -> tuple[str, ...]:
    """Patterns of names: one, or a list of them."""
    if isinstance(node.value, str):
        return (node.string(),)
    return tuple(entry.string("a pattern of names") for entry in node.items("a list of patterns of names"))


def read_template(node: Node) -> str:
    """A chat template: "auto", or one as it stands in the file, or one of those that have a name."""
    text = node.string("auto, or a template")
    if text in TEMPLATES:
        return TEMPLATES[text]
    if text and text != "auto" and "{" not in text:
        names = ", ".join(("auto", *TEMPLATES))
        node.error(f"{short(text)} is no template and none of {names}; write the template itself")
    return text


def uses_base(method: str) -> bool:
    """Whether a method does anything with a base; True for one that is not known."""
    return method not in merge_names() or base_use(rules_of(method)) != "none"


def base_of_slice(node: Node, inputs: Sequence[Input], base: Input | None) -> Input | None:
    """Check that ranges are of one length, and give the base a range where it has none.

    Args:
        node: of the slice.
        inputs: of the slice; those whose range is wrong have none.
        base: None where it is the recipe's or there is none.
    """
    spans = [i.layers for i in (*([base] if base and base.layers else []), *inputs) if i.layers is not None]
    lengths = list(dict.fromkeys(end - first for first, end in spans))
    if len(lengths) > 1:
        listed = " and ".join(map(str, lengths))
        node.error(f"has ranges of {listed} layers; those of one slice must be of one length")
        return base
    if base is None or base.layers is not None or not spans:
        return base
    if len(set(spans)) > 1:
        node.error(
            f"takes different layers of its models, so it must say which layers of the base {base.ref} these are"
        )
        return base
    return Input(base.ref, spans[0])


def parts_of(ref: str, names: Collection[str]) -> Iterator[str]:
    """Names of recipes that a reference uses."""
    if ref in names:
        yield ref
    elif "+" in ref:
        for part in ref.split("+"):
            if part in names:
                yield part


def uses(recipe: Recipe, names: Collection[str]) -> tuple[str, ...]:
    """Names of the recipes whose output a recipe uses."""
    return tuple(dict.fromkeys(part for ref in recipe.refs for part in parts_of(ref, names)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file can have such a name
        return False


def output_dtype(entries: Mapping[str, Node]) -> str | None:
    """Type of the output by mergekit's `dtype` and `out_dtype`; None for that of the models."""
    inner = read_dtype(entries["dtype"]) if "dtype" in entries else None
    outer = read_dtype(entries["out_dtype"]) if "out_dtype" in entries else None
    if inner == "F64" and outer != "F64" and outer is not None:
        entries["dtype"].warn("has no effect: arithmetic is in float32, or float64 where models are")
    if inner in ("BF16", "F16") and outer is not None and outer != inner:
        entries["dtype"].warn("has no effect: arithmetic is in float32; out_dtype is the type of the output")
    return outer or inner

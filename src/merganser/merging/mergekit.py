"""mergekit's language of recipes: its YAML, unchanged, becomes a recipe of the dialect "mergekit".

What differs on purpose:

* A key that nobody knows is an error here; mergekit ignores it. `lenient` warns instead.
* A key that mergekit knows and that has no effect there (`int8_mask`, a `weight` under model_stock) has none here
  either, and a warning says so.
* `keep`, a key of ours that mergekit ignores, names tensors that stay the base's or are left out.
* Of several modules, a tensor belongs to the one with the longest prefix, so `default` takes what no other does; what
  is in no module is an error.
* `dtype` is the type of the output. Arithmetic is in float32 or wider, never in bfloat16.
* Without `base_model`, the first model of the recipe gives config and tokenizer; in mergekit any of them may.

A method's base:

| methods | base_model |
|---|---|
| of changes (ties, dare_linear ...) | is subtracted; where it is listed among the models, it is left out there |
| slerp, nearswap, arcee_fusion | is the first of the two models, listed or not |
| nuslerp, multislerp | may be given; then it is nuslerp_delta or multislerp_delta here |
| linear, karcher, passthrough | is one more model, the last where it is not listed |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from merganser.merging.checking import BaseUse, Words, base_use, method_for
from merganser.merging.common import (
    Origin,
    base_of_slice,
    output_dtype,
    read_keep,
    read_template,
)
from merganser.merging.dialect import (
    DIALECT_DEFAULTS,
    EVERY_WORD,
    FACTORS,
    INERT,
    MEANT,
    PER_MODEL,
    our_word,
    spelled,
    taken,
    with_defaults,
    words_of,
)
from merganser.merging.lookup import Rules, merge_names, rules_of
from merganser.merging.mergekit_vocabulary import read_vocabulary
from merganser.merging.reading import NOTHING, Node, kind_of, short
from merganser.merging.recipe import Input, Recipe, Settings, Slice
from merganser.merging.values import Choice, Gradient, Scalar, Value, mapped

T = TypeVar("T", Input, Slice)

#: Most that can be meant as a guard, which nobody sees in the result.
GUARD = 1e-6
#: Prefix of the tensors of a module by mergekit's name of it, where it is not that name.
MODULE_PREFIXES: Mapping[str, str] = {"default": ""}

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "keep",
)  # fmt: skip


def read(document: Node, origin: Origin, *, lenient: bool = False) -> tuple[Recipe, Words]:
    """Read one document; what is wrong is collected in its problems.

    Args:
        document: a mapping.
        origin: where references come from.
        lenient: warn of unknown keys rather than refuse them.
    """
    return _Reader(document, origin, lenient).recipe()


@dataclass
class _Reader:
    document: Node
    origin: Origin
    lenient: bool
    places: dict[int, str] = field(default_factory=dict)
    alive: list[Input | Slice] = field(default_factory=list)  # so that no two have one id
    method: str = ""
    rules: Rules | None = None
    use: BaseUse | None = None
    base: Input | None = None

    def recipe(self) -> tuple[Recipe, Words]:
        entries = self._entries()
        self.method = entries["merge_method"].string("the name of a method") if "merge_method" in entries else ""
        if "merge_method" not in entries:
            self.document.error("merge_method is empty")
        if "base_model" in entries:
            self.base = Input(self.reference(entries["base_model"]))
        ours = method_for(self.method, based=self.base is not None)
        if ours in merge_names():
            self.rules = rules_of(ours)
            self.use = base_use(self.rules)
        shared = self.settings(entries.get("parameters"))
        draft = Recipe(
            method=ours,
            slices=self.slices(entries, shared),
            base=self.base,
            settings=shared,
            dtype=output_dtype(entries),
            dialect="mergekit",
            chat_template=read_template(entries["chat_template"]) if "chat_template" in entries else None,
            keep=read_keep(entries["keep"]) if "keep" in entries else (),
        )
        recipe = with_defaults(
            replace(draft, vocabulary=read_vocabulary(entries, draft, self.reference, lenient=self.lenient)),
            self.method,
        )
        words = Words("merge_method", "base_model", "parameters", "parameters", spelled(self.method), self.places)
        return recipe, words

    def _entries(self) -> dict[str, Node]:
        entries = self.document.mapping()
        for key, node in entries.items():
            if key in KEYS:
                continue
            if key in INERT:
                node.warn(_NO_EFFECT)
            elif key in EVERY_WORD:
                self.misplaced(node)
            else:
                node.unknown(key, KEYS, lenient=self.lenient)
        return {k: n for k, n in entries.items() if k in KEYS and n.value is not None}

    def misplaced(self, node: Node) -> None:
        (node.warn if self.lenient else node.error)(f"{_NO_EFFECT}; it belongs under parameters")

    # models, slices, modules

    def slices(self, entries: Mapping[str, Node], shared: Settings) -> tuple[Slice, ...]:
        given = [key for key in ("models", "slices", "modules") if key in entries]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            self.document.error(f"give exactly one of models, slices and modules; here it is {found}")
        if "modules" in entries:
            return tuple(self.modules(entries["modules"], shared))
        return tuple(self.group(entries, "", {}, [shared]))

    def modules(self, node: Node, shared: Settings) -> Iterator[Slice]:
        for name, child in node.mapping("modules by name").items():
            entries = child.fields(("models", "slices", "parameters"), lenient=self.lenient)
            given = [key for key in ("models", "slices") if key in entries]
            if len(given) != 1:
                child.error(
                    f"give exactly one of models and slices; here it is {' and '.join(given) or 'none of them'}"
                )
            prefix = MODULE_PREFIXES.get(name, f"{name}.")
            if prefix:
                child.warn(f"is taken for the tensors whose names begin with {prefix}")
            settings = self.settings(entries.get("parameters"))
            yield from self.group(entries, prefix, settings, [settings, shared])

    def group(
        self, entries: Mapping[str, Node], module: str, settings: Settings, levels: Sequence[Settings]
    ) -> Iterator[Slice]:
        if "models" in entries:
            node = entries["models"]
            listed = [(self.model(entry, ("model", "parameters")), entry) for entry in node.items("a list of models")]
            base, inputs = self.without_base(listed, levels)
            if self.use == "none" and self.base is not None and all(i.ref != self.base.ref for i in inputs):
                inputs = (*inputs, self.added_base(levels))
            if listed:
                place = node.place.removesuffix("models").rstrip(".")
                yield self.placed(Slice(inputs, base, {}, module, settings), place)
        elif "slices" in entries:
            for node in entries["slices"].items("a list of slices"):
                yield self.placed(self.slice(node, module, settings, levels), node.place)

    def slice(self, node: Node, module: str, settings: Settings, levels: Sequence[Settings]) -> Slice:
        fields = node.mapping("a mapping with sources")
        for key, child in fields.items():
            if key in INERT:
                child.warn(_NO_EFFECT)
            elif key not in ("sources", "base_model", "parameters"):
                child.unknown(key, ("sources", "base_model", "parameters"), lenient=self.lenient)
        entries = {key: child for key, child in fields.items() if child.value is not None}
        if "sources" not in entries:
            node.error("sources is missing")
        own = self.settings(entries.get("parameters"))
        sources = entries["sources"].items("a list of sources") if "sources" in entries else ()
        listed = [(self.model(entry, ("model", "layer_range", "parameters")), entry) for entry in sources]
        stated = Input(self.reference(entries["base_model"])) if "base_model" in entries else None
        base, inputs = self.without_base(listed, [own, *levels], stated)
        if self.use != "none":
            found = base_of_slice(node, inputs, base or self.base)
            base = found if found is not None and (base is not None or found.layers is not None) else None
        else:
            base_of_slice(node, inputs, None)
        return Slice(inputs, base, own, module, settings)

    def model(self, node: Node, keys: Sequence[str]) -> Input:
        if not isinstance(node.value, dict):
            if "layer_range" in keys:
                node.error("must be {model: ..., layer_range: [first, end]}")
            return self.placed(Input(self.reference(node)), node.place)
        fields = node.value
        for key, child in fields.items():
            if key in INERT:
                child.warn(_NO_EFFECT)
            elif key in EVERY_WORD:
                self.misplaced(child)
            elif key not in keys:
                child.unknown(key, keys, lenient=self.lenient)
        entries = {key: child for key, child in fields.items() if child.value is not None}
        layers = None
        if "model" not in entries:
            node.error("model is missing")
        if "layer_range" in keys and "layer_range" not in entries:
            node.error("layer_range is missing: [first, end]")
        elif "layer_range" in keys:
            layers = entries["layer_range"].layers()
        ref = self.reference(entries["model"]) if "model" in entries else node.place
        return self.placed(Input(ref, layers, self.settings(entries.get("parameters"), model=True)), node.place)

    def without_base(
        self,
        listed: Sequence[tuple[Input, Node]],
        levels: Sequence[Settings],
        stated: Input | None = None,
    ) -> tuple[Input | None, tuple[Input, ...]]:
        """The base as it is listed among models, and the others; each of these must have a weight where weights are."""
        base = stated or self.base
        found = [(i, n) for i, n in listed if base is not None and i.ref == base.ref and self.use != "none"]
        if len(found) > 1:
            found[1][1].error(f"names the base a second time; {self.method} takes it once")
        for model, entry in found:
            if model.settings and self.use != "first":
                entry.warn("is the base, so its parameters have no effect, in mergekit neither")
        places = [id(model) for model, _ in found]
        inputs = tuple(model for model, _ in listed if id(model) not in places)
        for model, entry in listed:
            if id(model) not in places:
                self.weighed(entry, model, levels)
        if found and found[0][0].layers is not None:
            return Input(found[0][0].ref, found[0][0].layers), inputs
        return stated, inputs

    def added_base(self, levels: Sequence[Settings]) -> Input:
        assert self.base is not None
        node = self.document.mapping()["base_model"]
        if "weight" in PER_MODEL.get(self.method, ()) and not any("weight" in level for level in levels):
            node.error(
                f"{self.method} takes it as one more model, and it has no weight; "
                "list it under models with a weight, or leave it out"
            )
        else:
            node.warn(f"{self.method} takes it as one more model")
        return self.placed(Input(self.base.ref), node.place)

    def weighed(self, node: Node, model: Input, levels: Sequence[Settings]) -> None:
        if "weight" not in PER_MODEL.get(self.method, ()):
            return
        if not any("weight" in level for level in (model.settings, *levels)):
            node.error(f"weight is missing; in mergekit {self.method} has no default: parameters: {{weight: 1.0}}")

    def placed(self, thing: T, place: str) -> T:
        self.places[id(thing)] = place
        self.alive.append(thing)
        return thing

    # references

    def reference(self, node: Node) -> str:
        """A string, or a mapping `{model: {path, revision}, lora: {path, revision}}`, in our one form."""
        if not isinstance(node.value, dict):
            return self.origin.read(node)
        entries = node.fields(("model", "lora", "override_architecture"), "a model", lenient=self.lenient)
        if "override_architecture" in entries:
            entries["override_architecture"].warn("has no effect: names and shapes are taken from the files themselves")
        if "model" not in entries:
            node.error("model is missing")
        parts = [self.path(entries[key]) for key in ("model", "lora") if key in entries]
        return "+".join(parts) or node.place

    def path(self, node: Node) -> str:
        if not isinstance(node.value, dict):
            return self.origin.read(node)
        entries = node.fields(("path", "revision"), "a path with a revision", lenient=self.lenient)
        if "path" not in entries:
            node.error("path is missing")
            return node.place
        path = self.origin.read(entries["path"])
        revision = entries["revision"].string("a branch, a tag or a commit") if "revision" in entries else ""
        return f"{path}@{revision}" if revision else path

    # settings

    def settings(self, node: Node | None, *, model: bool = False) -> Settings:
        """Parameters at one level, in our words."""
        if node is None:
            return {}
        found: dict[str, Value] = {}
        for key, child in node.mapping("parameters by name").items():
            name = our_word(key, self.method)
            if self.method not in DIALECT_DEFAULTS:
                found[name] = child.setting()  # a method of ours, which the check looks at
            elif key in words_of(self.method, model=model):
                value = self.translated(child, name)
                if self.kept(child, name, value):
                    found[name] = value
            elif key in spelled(self.method) and key in taken(self.method):
                note = child.warn if self.lenient else child.error
                note(f"has no effect in mergekit, which calls it {spelled(self.method)[key]}")
            elif key in INERT or key in EVERY_WORD:
                child.warn(_NO_EFFECT)
            else:
                child.unknown(key, words_of(self.method, model=model), lenient=self.lenient)
        return found

    def translated(self, node: Node, name: str) -> Value:
        """A value in our words: quoted numbers and 0 or 1 for a truth value are as good in mergekit, too."""
        default = DIALECT_DEFAULTS[self.method].get(name, 1.0)
        factor = FACTORS.get(self.method, {}).get(name, 1)

        def one(value: Scalar) -> Scalar:
            if name in MEANT:
                if isinstance(value, bool) or value in (0, 1):
                    return MEANT[name][bool(value)]
                node.error(f"must be true or false, and is {kind_of(value)} {short(value)}")
                return default
            if isinstance(default, bool) and not isinstance(value, str) and value in (0, 1):
                return bool(value)
            if isinstance(value, str):
                try:
                    value = float(value)
                except ValueError:
                    return value
            return value if factor == 1 or isinstance(value, bool) else value * factor

        return mapped(node.setting(), one)

    def kept(self, node: Node, name: str, value: Value) -> bool:
        """Whether our method has the setting; where it has not, only a guard against dividing by 0 can be meant."""
        if self.rules is None or name == "weight" or name in self.rules.settings or value == NOTHING:
            return True
        if isinstance(value, bool | str | Choice | Gradient) or not 0 <= value <= GUARD:
            node.error(f"our {self.method} cannot do this; leave it out")
        elif value != DIALECT_DEFAULTS[self.method].get(name):
            node.warn("has no effect here: norms are divided by as they are")
        return False


_NO_EFFECT = "has no effect here, in mergekit neither"

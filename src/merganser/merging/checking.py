"""Whether a recipe fits its method, from the table of methods alone: no model is looked at.

Ranges are the methods' own business: they refuse a density of 1.5 themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from merganser.merging.lookup import Rules, merge_names, rules_of
from merganser.merging.post import check_posts
from merganser.merging.reading import kind_of, short, unknown
from merganser.merging.recipe import Input, Recipe, Settings, Slice
from merganser.merging.values import Choice, Gradient, Scalar, Value
from merganser.methods.joint import Joint

#: What the name of a method ends on that does with changes what another does with whole models.
DELTA = "_delta"


@dataclass(frozen=True)
class Words:
    """How a language of recipes calls things, so that a check names the place as the user wrote it.

    Attributes:
        method: key of the method.
        base: key of the base.
        settings: key of settings.
        own: what a model's own settings stand under; "" for directly beside the model.
        spelled: its word for a setting, where it is another than ours.
        places: place of an input or a slice by its `id`, where it is not that of its number.
    """

    method: str = "method"
    base: str = "base"
    settings: str = "settings"
    own: str = ""
    spelled: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[int, str] = field(default_factory=dict)

    def of(self, setting: str) -> str:
        """The language's word for a setting."""
        return self.spelled.get(setting, setting)


BaseUse = Literal["needed", "first", "none"]


def base_use(rules: Rules) -> BaseUse:
    """What a method does with a base: it needs one, takes it as the first model, or has no use for it."""
    if rules.base_is_model:
        return "first"
    return "needed" if rules.needs_base else "none"


def method_for(method: str, *, based: bool) -> str:
    """The method that a name means where a base is given, or none: nuslerp of changes is nuslerp_delta."""
    return f"{method}{DELTA}" if based and f"{method}{DELTA}" in merge_names() else method


def check_method(recipe: Recipe, words: Words | None = None) -> list[str]:
    """Everything in which a recipe does not fit its method.

    Args:
        recipe: as it was read.
        words: of its language; by default ours.

    Returns:
        One line a problem, "place: what is wrong"; none where all is well.
    """
    words = words or Words()
    names = merge_names()
    if recipe.method not in names:
        return [f"{words.method}: {short(recipe.method)} is {unknown(recipe.method, names)}"]
    check = _Check(recipe, rules_of(recipe.method), words)
    return [*check.bases(), *check.models(), *check.settings(), *check.adapters(), *check_posts(recipe.post)]


@dataclass(frozen=True)
class _Check:
    recipe: Recipe
    rules: Rules
    words: Words

    def bases(self) -> Iterable[str]:
        recipe, name = self.recipe, self.rules.name
        if recipe.adapter is not None:  # adapters are changes already; a base is where they belong, no more
            return
        use = base_use(self.rules)
        if use == "none":
            if recipe.base is not None and recipe.dialect == "paper":
                yield f"{self.words.base}: {name} takes no base; list it among the models, or leave it out"
            return
        if any(s.base is None and recipe.base is None for s in recipe.slices):
            what = "the first of its two models" if use == "first" else "what changes are taken against"
            yield f"{self.words.base}: missing; {name} needs {what}"
        for one in recipe.slices:
            base = one.base or recipe.base
            for i, model in enumerate(one.inputs):
                if base is not None and model.ref == base.ref and model.layers in (None, base.layers):
                    place = self.place_of_input(one, i)
                    if use == "first":
                        yield f"{place}: is the base, which {name} takes as its first model; leave it out here"
                    else:
                        yield f"{place}: is the base itself, so its change is zero; leave it out here"

    def models(self) -> Iterable[str]:
        least, most = self.rules.models
        beside = "" if base_use(self.rules) == "none" else " beside the base"
        if self.recipe.adapter is not None:
            beside, first = "", int(self.rules.base_is_model)  # of the base it needs, one adapter takes the place
            least, most = least + first, most if most is None else most + first
        wanted = _count(least, most)
        for one in self.recipe.slices:
            count = len(one.inputs)
            if count < least or (most is not None and count > most):
                place = self.place_of_slice(one) or "models"
                yield f"{place}: {self.rules.name} merges {wanted}{beside}, and here it is {count}"

    def settings(self) -> Iterable[str]:
        words, shared = self.words, [*self.rules.settings, *(["weight"] if self.rules.weighted else [])]
        yield from self.level(words.settings, self.recipe.settings, shared)
        modules: dict[str, Settings] = {}
        for one in self.recipe.slices:
            modules.setdefault(one.module, one.module_settings)
            yield from self.level(_join(self.place_of_slice(one), words.settings), one.settings, shared)
            for i, model in enumerate(one.inputs):
                yield from self.own(_join(self.place_of_input(one, i), words.own), model.settings)
        for module, settings in modules.items():
            place = f"modules.{module.removesuffix('.') or 'default'}.{words.settings}"
            yield from self.level(place, settings, shared)
        yield from self.missing()
        row = self.rules.method
        if self.recipe.post and isinstance(row, Joint) and "d" not in row.needs:
            yield (
                f"post: {self.rules.name} merges whole models, so there is no change to process; "
                "choose a method of changes, such as task_arithmetic"
            )
        for name, settings in self.recipe.post:
            for setting, value in settings.items():
                yield from _finite(f"post.{name}.{setting}", value)

    def adapters(self) -> Iterable[str]:
        """What a merge of adapters cannot have."""
        recipe = self.recipe
        if recipe.adapter is None:
            return
        if self.rules.measured:
            yield f"{self.words.method}: {self.rules.name} needs statistics of whole models, and adapters have none"
        if recipe.vocabulary is not None:
            yield "vocabulary: belongs to whole models; adapters share that of their base"
        if recipe.chat_template is not None:
            yield "chat_template: belongs to whole models; adapters share that of their base"
        if recipe.slices and not _is_whole(recipe):
            yield "slices: belong to whole models; list the adapters under models"
        for one in recipe.slices:
            if self.rules.base_is_model and len({model.ref for model in one.inputs}) < len(one.inputs):
                yield f"{self.place_of_slice(one) or 'models'}: the same adapter twice; {self.rules.name} needs two"
            for i, model in enumerate(one.inputs):
                if model.statistics is not None and not self.rules.measured:
                    yield f"{self.place_of_input(one, i)}.statistics: belongs to whole models; adapters have none"

    def level(self, place: str, settings: Settings, known: list[str]) -> Iterable[str]:
        for setting, value in settings.items():
            yield from self.setting(_join(place, self.words.of(setting)), setting, value, known)

    def own(self, place: str, settings: Settings) -> Iterable[str]:
        known = [*self.rules.per_model, *(["weight"] if self.rules.weighted else [])]
        for setting, value in settings.items():
            where = _join(place, self.words.of(setting))
            if setting in self.rules.settings and setting not in known:
                yield f"{where}: is one for all models; write it under {self.words.settings}"
            else:
                yield from self.setting(where, setting, value, known)

    def setting(self, place: str, setting: str, value: Value, known: list[str]) -> Iterable[str]:
        if setting not in known:
            if setting == "weight":
                yield f"{place}: {self.rules.name} takes no weights"
            else:
                yield f"{place}: {unknown(self.words.of(setting), [self.words.of(k) for k in known])}"
            return
        yield from _finite(place, value)
        kind = "number" if setting == "weight" else _kind(self.rules, setting)
        for one in _values(value):
            if (found := _mismatch(kind, one)) is not None:
                yield f"{place}: {found}"
                return
        if kind == "whole" and any(isinstance(v, Gradient) for v in _parts(value)):
            yield f"{place}: is a whole number, which cannot run over layers"

    def missing(self) -> Iterable[str]:
        """Settings without a default that no level gives to some model."""
        for setting in self.rules.required:
            for one in self.recipe.slices:
                if any(setting in level for level in (one.settings, one.module_settings, self.recipe.settings)):
                    continue
                if setting in self.rules.per_model and all(setting in i.settings for i in one.inputs):
                    continue
                yield f"{self.words.settings}: {self.words.of(setting)} is missing; {self.rules.name} needs it"
                break

    def place_of_slice(self, one: Slice) -> str:
        if id(one) in self.words.places:
            return self.words.places[id(one)]
        number = next(i for i, s in enumerate(self.recipe.slices) if s is one)
        return "" if _is_whole(self.recipe) else f"slices[{number}]"

    def place_of_input(self, one: Slice, number: int) -> str:
        model: Input = one.inputs[number]
        return self.words.places.get(id(model)) or _join(self.place_of_slice(one), f"models[{number}]")


def finite(value: Scalar) -> bool:
    """Whether a value is no number or one that fits a float."""
    if isinstance(value, str):
        return True
    try:
        return isfinite(value)
    except OverflowError:
        return False


def _finite(place: str, value: Value) -> Iterable[str]:
    for one in _values(value):
        if not finite(one):
            yield f"{place}: {short(one)} is not finite"
            return


def _parts(value: Value) -> list[Scalar | Gradient]:
    return [v for _, v in value.cases] if isinstance(value, Choice) else [value]


def _values(value: Value) -> list[Scalar]:
    return [s for part in _parts(value) for s in (part.values if isinstance(part, Gradient) else (part,))]


def _mismatch(kind: str, value: Scalar) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" and not is_number:
        return f"must be a number, and is {kind_of(value)} {short(value)}"
    if kind == "whole" and not (is_number and finite(value) and float(value).is_integer()):
        return f"must be a whole number, and is {kind_of(value)} {short(value)}"
    if kind == "flag" and not isinstance(value, bool):
        return f"must be true or false, and is {kind_of(value)} {short(value)}"
    if kind == "text" and not isinstance(value, str):
        return f"must be text, and is {kind_of(value)} {short(value)}"
    return None


def _kind(rules: Rules, setting: str) -> str:
    """What a setting takes, from its default, or from the first word of its annotation where it has none."""
    default = rules.settings[setting]
    if default is None or default is inspect.Parameter.empty:
        word = str(_annotation(rules, setting)).partition("|")[0].strip()
        return {"float": "number", "int": "whole", "bool": "flag", "str": "text"}.get(word, "any")
    for kind, name in ((bool, "flag"), (int, "whole"), (float, "number"), (str, "text")):
        if isinstance(default, kind):
            # An integer may be the default of what takes any number.
            return "number" if name == "whole" and "float" in str(_annotation(rules, setting)) else name
    return "any"


def _annotation(rules: Rules, setting: str) -> Any:
    for function in _functions(rules.method):
        parameters = inspect.signature(function).parameters
        if setting in parameters:
            return parameters[setting].annotation
    return ""


def _functions(method: object) -> list[Any]:
    return [f for f in (getattr(method, "function", None), getattr(method, "vector", None)) if f is not None]


def _is_whole(recipe: Recipe) -> bool:
    """Whether a recipe merges whole models, so that nobody wrote its one slice as a slice."""
    inputs = [i for s in recipe.slices for i in s.inputs]
    return len(recipe.slices) == 1 and bool(inputs) and all(i.layers is None for i in inputs)


def _join(place: str, word: str) -> str:
    return f"{place}.{word}" if place and word else place or word


def _count(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more models"
    if least == most:
        return "one model" if least == 1 else f"{least} models"
    return f"{least} to {most} models"

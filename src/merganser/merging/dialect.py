"""mergekit's settings in our words: which there are, what they are called, and what they are worth by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from merganser.merging.checking import DELTA
from merganser.merging.lookup import merge_names, rules_of
from merganser.merging.recipe import Recipe
from merganser.merging.values import Choice, Scalar, Value

_SUM: Mapping[str, Scalar] = {"scale": 1.0, "normalize": False}
_THINNED: Mapping[str, Scalar] = {**_SUM, "density": 1.0, "count": "floor", "cancelled": "plus"}
_PATH: Mapping[str, Scalar] = {"antipode": "lerp"}

#: What a setting of ours is worth where a recipe of mergekit's does not say it, by mergekit's name of the method. A
#: setting that our method does not have is skipped, and tells only which value of it changes nothing.
DIALECT_DEFAULTS: Mapping[str, Mapping[str, Scalar]] = {
    "linear": {"normalize": True},
    "slerp": {"lerp_above": 0.9995, **_PATH},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False, **_PATH},
    "multislerp": {"normalize": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "task_arithmetic": _SUM,
    "ties": {**_THINNED, "normalize": True, "rescale": "none"},
    "dare_linear": {**_THINNED, "rescale": "l1"},
    "dare_ties": {**_THINNED, "rescale": "l1"},
    "della": {**_THINNED, "normalize": True, "rescale": "l1", "epsilon": 0.3, "row": "last"},
    "della_linear": {**_THINNED, "rescale": "l1", "epsilon": 0.3, "row": "last"},
    "breadcrumbs": {**_THINNED, "gamma": 0.01, "rescale": "none", "excess": "density"},
    "breadcrumbs_ties": {**_THINNED, "gamma": 0.01, "rescale": "none", "excess": "density"},
    "sce": {"select_topk": 1.0, "count": "floor", "among": "differing", "cancelled": "plus"},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
    "model_stock": {"filter_wise": False, "negative": True},
    "nearswap": {},
    "arcee_fusion": {},
    "passthrough": {"factor": 1.0},
}
_THIN_FOR_ALL = ("scale", "normalize", "rescale")
#: What mergekit looks up once for all models, by method and in our words.
FOR_ALL: Mapping[str, tuple[str, ...]] = {
    "linear": ("normalize",),
    "slerp": ("t",),
    "nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("normalize", "eps"),
    "karcher": ("max_iter", "tol"),
    "task_arithmetic": ("scale", "normalize"),
    "ties": _THIN_FOR_ALL,
    "dare_linear": _THIN_FOR_ALL,
    "dare_ties": _THIN_FOR_ALL,
    "della": _THIN_FOR_ALL,
    "della_linear": _THIN_FOR_ALL,
    "breadcrumbs": _THIN_FOR_ALL,
    "breadcrumbs_ties": _THIN_FOR_ALL,
    "sce": ("select_topk",),
    "ram": ("epsilon",),
    "ramplus_tl": ("epsilon", "r", "alpha"),
    "model_stock": ("filter_wise",),
    "nearswap": ("t",),
}
#: What mergekit looks up for every model, by method and in our words. `weight` has no default there.
PER_MODEL: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "nuslerp": ("weight",),
    "multislerp": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_linear": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "della": ("weight", "density", "epsilon"),
    "della_linear": ("weight", "density", "epsilon"),
    "breadcrumbs": ("weight", "density", "gamma"),
    "breadcrumbs_ties": ("weight", "density", "gamma"),
    "passthrough": ("factor",),
}
#: mergekit's word by ours: under all methods, and under some.
SPELLED: Mapping[str, str] = {"scale": "lambda"}
SPELLED_UNDER: Mapping[str, Mapping[str, str]] = {
    "passthrough": {"factor": "scale"},
    "multislerp": {"normalize": "normalize_weights"},
}
#: What a truth value of mergekit's says in our words.
MEANT: Mapping[str, Mapping[bool, str]] = {"rescale": {True: "l1", False: "none"}}
#: What a number of mergekit's is multiplied by: its epsilon is half the range of chances, ours is all of it.
FACTORS: Mapping[str, Mapping[str, int]] = {"della": {"epsilon": 2}, "della_linear": {"epsilon": 2}}
#: Words of mergekit's, old or new, that change nothing under any method.
INERT = ("int8_mask", "residual_weight", "consensus_method", "embed_slerp", "input_model_parameters")


def with_defaults(recipe: Recipe, method: str | None = None) -> Recipe:
    """The recipe with mergekit's defaults for every setting that it does not say and that our method has.

    Args:
        recipe: in our words.
        method: mergekit's name of its method, where it is another.
    """
    method = method or recipe.method.removesuffix(DELTA)
    defaults = DIALECT_DEFAULTS.get(method, {})
    known = rules_of(recipe.method).settings if recipe.method in merge_names() else {}
    settings = dict(recipe.settings)
    for name, default in defaults.items():
        if name in known:
            settings[name] = _otherwise(settings.get(name), default)
    if known and rules_of(recipe.method).weighted and "weight" not in PER_MODEL.get(method, ()):
        settings["weight"] = _otherwise(settings.get("weight"), 1.0)  # it asks for none there
    return replace(recipe, settings=settings)


def _otherwise(value: Value | None, default: Scalar) -> Value:
    """A value, and the default for those tensors that no filter of it fits."""
    if value is None:
        return default
    if isinstance(value, Choice) and value.cases and all(fragment != "*" for fragment, _ in value.cases):
        return Choice((*value.cases, ("*", default)))
    return value


def spelled(method: str) -> Mapping[str, str]:
    """Words of mergekit's by ours, under a method."""
    return SPELLED_UNDER.get(method, SPELLED)


def our_word(key: str, method: str) -> str:
    """Our word for a parameter of mergekit's; the word itself where it is none of its."""
    return next((ours for ours, theirs in spelled(method).items() if theirs == key), key)


def taken(method: str, *, model: bool = False) -> tuple[str, ...]:
    """Settings that mergekit looks up for a method, at a model or elsewhere, in our words."""
    own = PER_MODEL.get(method, ())
    return own if model else (*own, *FOR_ALL.get(method, ()))


def words_of(method: str, *, model: bool = False) -> tuple[str, ...]:
    """The same in mergekit's words."""
    return tuple(spelled(method).get(name, name) for name in taken(method, model=model))


#: Every parameter of any method, in mergekit's words.
EVERY_WORD = frozenset(word for method in DIALECT_DEFAULTS for word in words_of(method))

"""A plan: what every tensor of the output is made of, from a recipe and headers alone. No tensor is read.

Everything that can be refused is refused here, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merganser.continual.roles import Role, assign_roles, matches
from merganser.errors import DtypeError, MissingTensorError, ParameterError, ShapeError
from merganser.merging.chosen_template import chat_template_of
from merganser.merging.drafts import Draft, drafts_of, models_of
from merganser.merging.layers import depth_of, depths, place_of
from merganser.merging.lookup import Rules, rules_of
from merganser.merging.post import check_posts
from merganser.merging.ranges import Ranges
from merganser.merging.recipe import Input, Recipe
from merganser.merging.statistics import statistics_of
from merganser.merging.ties import tied
from merganser.merging.values import Value, resolve
from merganser.merging.vocabulary import VocabularyPlan, vocabulary_views
from merganser.numerics import DTYPE_NAMES, TORCH_DTYPES
from merganser.types import FLOAT_DTYPES, Source, TensorInfo


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor of one model.

    Attributes:
        ref: of the model.
        name: of the stored tensor.
    """

    ref: str
    name: str


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What one tensor of the output is made of.

    Attributes:
        info: its shape and its type in the output.
        role: what it is to the method; "fixed" is copied from the donor.
        models: the models' tensors, in the recipe's order.
        base: the base's; None where there is no base.
        weight: one factor a model.
        settings: of the method; tuples where they differ from model to model.
        depth: 0 at the first layer of the output, 1 at the last.
        statistics: references of what was measured of the models, where the method asks for it.
    """

    info: TensorInfo
    role: Role
    models: tuple[Piece, ...]
    base: Piece | None
    weight: tuple[float, ...]
    settings: Mapping[str, Any]
    depth: float
    statistics: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What it is made of: the models' tensors, and behind them the base's."""
        return self.models if self.base is None else (*self.models, self.base)


@dataclass(frozen=True)
class Plan:
    """A recipe with its sources and what becomes of every tensor.

    Attributes:
        recipe: as written.
        rules: of its method.
        sources: by reference, the base first.
        tensors: by output name, sorted.
        aliases: tied names of the output.
        donor: reference of the model whose config and tokenizer the output gets.
        layers: number of layers of each stack of the output.
        vocabulary: of the output, where the recipe asks for one; the sources are seen through it.
        chat_template: of the output, where the recipe asks for one.
    """

    recipe: Recipe
    rules: Rules
    sources: Mapping[str, Source]
    tensors: Mapping[str, TensorPlan]
    aliases: Mapping[str, str]
    donor: str
    layers: Mapping[str, int]
    vocabulary: VocabularyPlan | None = None
    chat_template: str | None = None

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(t.info.nbytes for t in self.tensors.values())


def make_plan(recipe: Recipe, sources: Mapping[str, Source]) -> Plan:
    """Plan a merge.

    Args:
        recipe: what to merge.
        sources: the opened source of every reference of the recipe, its statistics included.

    Raises:
        MissingTensorError: If a model lacks a tensor.
        ExtraTensorError: If a model has a tensor that the donor lacks.
        ShapeError: If shapes differ.
        DtypeError: If a tensor cannot be merged.
        ParameterError: If a layer range or a setting does not fit.
    """
    rules = rules_of(recipe.method)
    if problems := check_posts(recipe.post):
        raise ParameterError("; ".join(problems))
    _refuse_idle(recipe, sources)
    sources = {**sources, **tied({ref: sources[ref] for ref in recipe.refs})}
    template = chat_template_of(recipe, sources)
    vocabulary = vocabulary_views(recipe, sources)
    if vocabulary is not None:
        sources = {**sources, **vocabulary.sources}
    donor = recipe.base.ref if recipe.base is not None else recipe.slices[0].inputs[0].ref
    roles = {ref: assign_roles(sources[ref], freeze=_fitting(recipe.keep, sources[ref])) for ref in recipe.refs}
    drafts = list(drafts_of(recipe, sources, rules, donor))
    stacks = depths(d.name for d in drafts)
    tensors: dict[str, TensorPlan] = {}
    ranges = Ranges(rules, recipe.post)
    for draft in drafts:
        if draft.name in tensors:
            raise ParameterError(f"{draft.name} would be made twice", "the slices overlap")
        tensors[draft.name] = tensor = _planned(recipe, rules, sources, roles, draft, stacks)
        if tensor.role not in ("fixed", "exact", "statistic"):
            weights = [(p.ref, w) for p, w in zip(tensor.models, tensor.weight, strict=True)]
            ranges.check(draft.name, tensor.role, tensor.info.shape, weights, tensor.settings)
    if not tensors:
        raise ParameterError("nothing would be merged", "the layer ranges are empty")
    aliases = {a: n for a, n in sources[donor].aliases.items() if n in tensors and a not in tensors}
    return Plan(recipe, rules, sources, dict(sorted(tensors.items())), aliases, donor, stacks, vocabulary, template)


def _refuse_idle(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    for pattern in recipe.keep:
        if not any(_fitting((pattern,), sources[ref]) for ref in recipe.refs):
            raise ParameterError(
                f"keep: no tensor of the models is called {pattern!r}", "patterns are shell-like: *.bias"
            )


def _fitting(patterns: Sequence[str], source: Source) -> list[str]:
    return [p for p in patterns if any(matches(name, (p,)) for name in source.infos)]


def _planned(
    recipe: Recipe,
    rules: Rules,
    sources: Mapping[str, Source],
    roles: Mapping[str, Mapping[str, Role]],
    draft: Draft,
    stacks: Mapping[str, int],
) -> TensorPlan:
    base, models = models_of(recipe, draft.slice, rules)
    base_piece = _piece(sources, base, draft.base_name) if base is not None and draft.base_name is not None else None
    if draft.copied:  # the others need not have it
        lead = base_piece or _piece(sources, models[0], draft.names[0])
        info = sources[lead.ref].infos[lead.name]
        info = TensorInfo(info.shape, _out_dtype(recipe, info, []))
        return TensorPlan(info, "fixed", () if base_piece else (lead,), base_piece, (), {}, 0.0)
    pieces = tuple(_piece(sources, i, n) for i, n in zip(models, draft.names, strict=True))
    lead = base_piece or pieces[0]
    infos = [sources[p.ref].infos[p.name] for p in pieces]
    lead_info, role = sources[lead.ref].infos[lead.name], roles[lead.ref][lead.name]
    _refuse_mixed(draft.name, [lead, *pieces], [lead_info, *infos])
    place = place_of(draft.name)
    depth = depth_of(place.index, stacks[place.stack]) if place is not None else 0.0
    weight, settings = _settings(recipe, rules, draft, models, depth if draft.depth is None else draft.depth)
    dtype = _out_dtype(recipe, lead_info, infos)
    measured = statistics_of(rules, sources, models, pieces, role) if rules.measured else ()
    return TensorPlan(TensorInfo(lead_info.shape, dtype), role, pieces, base_piece, weight, settings, depth, measured)


def _piece(sources: Mapping[str, Source], model: Input, name: str) -> Piece:
    source = sources[model.ref]
    stored = name if name in source.infos else source.aliases.get(name)
    if stored is None:
        raise MissingTensorError(f"{name} is not in {model.ref}", "the models of a slice need the same tensors")
    return Piece(model.ref, stored)


def _refuse_mixed(name: str, pieces: Sequence[Piece], infos: Sequence[TensorInfo]) -> None:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for piece, info in zip(pieces, infos, strict=False):
        refs = shapes.setdefault(info.shape, [])
        if piece.ref not in refs:
            refs.append(piece.ref)
    if len(shapes) > 1:
        listed = "; ".join(f"{shape} in {', '.join(refs)}" for shape, refs in shapes.items())
        raise ShapeError(
            f"{name} has {len(shapes)} shapes: {listed}",
            "where vocabularies differ, map them with vocabulary: union, or leave a model out",
        )
    if len({info.dtype in FLOAT_DTYPES for info in infos}) > 1:
        kinds = ", ".join(dict.fromkeys(info.dtype for info in infos))
        raise DtypeError(f"{name} is {kinds} in different models", "a quantised model must be dequantised first")


def _out_dtype(recipe: Recipe, lead: TensorInfo, infos: Sequence[TensorInfo]) -> str:
    if lead.dtype not in FLOAT_DTYPES:
        return lead.dtype
    if recipe.dtype is not None:
        return recipe.dtype
    dtype = TORCH_DTYPES[lead.dtype]
    for info in infos:
        dtype = torch.promote_types(dtype, TORCH_DTYPES[info.dtype])
    return DTYPE_NAMES[dtype]


def _settings(
    recipe: Recipe, rules: Rules, draft: Draft, models: Sequence[Input], depth: float
) -> tuple[tuple[float, ...], dict[str, Any]]:
    one = draft.slice
    shared: list[Mapping[str, Value]] = [one.settings, one.module_settings, recipe.settings]

    def levels(setting: str, *first: Mapping[str, Value]) -> list[Value | None]:
        return [level.get(setting) for level in (*first, *shared)]

    settings: dict[str, Any] = {}
    for setting in rules.settings:
        if setting in rules.per_model:
            found = [
                resolve(levels(setting, model.settings), name, depth)
                for model, name in zip(models, draft.names, strict=True)
            ]
            if any(value is not None for value in found):
                default = rules.settings[setting]
                settings[setting] = tuple(default if value is None else value for value in found)
        elif (value := resolve(levels(setting), draft.name, depth)) is not None:
            settings[setting] = value
    weights = []
    for model, name in zip(models, draft.names, strict=True):
        value = resolve(levels("weight", model.settings), name, depth)
        if value is None and rules.weighted and recipe.dialect == "mergekit":
            raise ParameterError(f"no weight of {model.ref} fits {name}", "add a last value without a filter")
        weights.append(_number(1.0 if value is None else value, "weight", model.ref))
    if recipe.dialect == "mergekit" and rules.needs_base and settings.get("normalize") and not any(weights):
        settings["normalize"] = False  # nothing is added to the base, so mergekit divides by nothing
    if missing := [n for n in rules.required if n not in settings]:
        raise ParameterError(f"{recipe.method} needs {missing[0]} for {draft.name}", f"settings: {{{missing[0]}: 0.5}}")
    return tuple(weights), settings


def _number(value: object, setting: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(f"{setting} of {where} is {value!r}; it is a number")
    return float(value)

"""Which tensors the output of a recipe has, and what each is called in every model: by names alone.

A tensor is left out only where the recipe says so: layers outside of all ranges, and what `keep` fits and the lead of a
slice, its base or else its first model, does not have.

Of several modules, a tensor belongs to the one with the longest prefix, so `default` takes what no other module does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from merganser.continual.roles import matches
from merganser.errors import ExtraTensorError, MissingTensorError, ParameterError, and_more
from merganser.merging.hints import patterns, prefix_hint
from merganser.merging.layers import Place, depth_of, depths, place_of, stands_before
from merganser.merging.lookup import Rules
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.types import Source


@dataclass(frozen=True, slots=True)
class Draft:
    """One tensor of the output before its settings are known.

    Attributes:
        name: in the output.
        slice: that makes it.
        names: in each model.
        base_name: in the base; None where there is none.
        depth: 0 at the first layer of the slice, 1 at the last; None where it is that of the whole stack.
        copied: whether it stays the lead's.
    """

    name: str
    slice: Slice
    names: tuple[str, ...]
    base_name: str | None
    depth: float | None
    copied: bool


def drafts_of(recipe: Recipe, sources: Mapping[str, Source], rules: Rules, donor: str) -> Iterator[Draft]:
    """Every tensor of the output.

    Args:
        recipe: what to merge.
        sources: by reference.
        rules: of its method.
        donor: reference of the model whose tensors outside of all modules `keep` takes.

    Raises:
        MissingTensorError: If a model lacks a tensor.
        ExtraTensorError: If a model has a tensor that its slice's lead lacks.
        ParameterError: If layer ranges do not fit, or a tensor is in no module.
    """
    groups: dict[str, list[Slice]] = {}
    for one in recipe.slices:
        groups.setdefault(one.module, []).append(one)
    names = {ref: _by_module(sources[ref], list(groups)) for ref in recipe.refs}
    for module, group in groups.items():
        if module and not any(found[module] for found in names.values()):
            raise ParameterError(f"no tensor is in module {module}", "merganser inspect --tensors lists their names")
        cut = _Cut(recipe, rules, sources, {ref: found[module] for ref, found in names.items()})
        if all(i.layers is None for s in group for i in s.inputs):
            if len(group) > 1:
                raise ParameterError("several slices need layer ranges", "write layer_range: [first, end]")
            yield from cut.whole(group[0])
        else:
            yield from cut.stacked(group)
    for ref in dict.fromkeys((donor, *recipe.refs)):
        outside = names[ref][None]
        if lost := [n for n in outside if not matches(n, recipe.keep)]:
            raise ParameterError(
                f"{lost[0]}{and_more(lost)} of {ref} is in no module: {', '.join(m or 'default' for m in groups)}",
                f"add a module default, which takes what no other does, or keep: {patterns(lost)}"
                + (f" takes it from {ref}" if ref == donor else " leaves it out"),
            )
        if ref == donor:
            alone = Slice((Input(donor),))
            based = rules.needs_base and recipe.base is not None
            yield from (Draft(n, alone, (n,), n if based else None, None, True) for n in outside)


def _by_module(source: Source, modules: Sequence[str]) -> dict[str | None, list[str]]:
    """Names of a model's tensors, the tied ones too, by module; under None those of its file that are in no module."""
    found: dict[str | None, list[str]] = {module: [] for module in (*modules, None)}
    for name in dict.fromkeys((*source.infos, *source.aliases)):
        module = max((m for m in modules if name.startswith(m)), key=len, default=None)
        if module is not None or name in source.infos:
            found[module].append(name)
    return found


def models_of(recipe: Recipe, one: Slice, rules: Rules) -> tuple[Input | None, list[Input]]:
    """Base and models of a slice; where the base is one of the models, it comes first among them."""
    base = (one.base or recipe.base) if rules.needs_base else None  # else it is the donor, no more
    models = list(one.inputs)
    if rules.base_is_model and base is not None:
        models = [base, *(i for i in models if (i.ref, i.layers) != (base.ref, base.layers))]
    return base, models


@dataclass(frozen=True)
class _Cut:
    """One module.

    Attributes:
        recipe: what to merge.
        rules: of its method.
        sources: by reference.
        names: of the module's tensors, tied ones included, by reference.
    """

    recipe: Recipe
    rules: Rules
    sources: Mapping[str, Source]
    names: Mapping[str, Sequence[str]]

    def whole(self, one: Slice) -> Iterator[Draft]:
        base, models = models_of(self.recipe, one, self.rules)
        lead = base.ref if base is not None else models[0].ref
        others = {i.ref: self.sources[i.ref] for i in models}
        names = self.leading(lead, others)
        known = frozenset(self.names[lead])
        for ref in others:
            self.refuse_extra([n for n in self.stored(ref) if n not in known], ref, lead)
        lacking = {
            ref: [n for n in names if n not in s.infos and n not in s.aliases and not matches(n, self.recipe.keep)]
            for ref, s in others.items()
        }
        for name in sorted(names):
            copied = matches(name, self.recipe.keep)
            if not copied:
                missing = [ref for ref, absent in lacking.items() if name in absent]
                if missing:
                    absent = lacking[missing[0]]
                    raise MissingTensorError(
                        f"{name}{and_more(absent)} is in {lead} and not in {', '.join(missing)}",
                        prefix_hint(absent, others[missing[0]]) or f"keep: {patterns(absent)} takes it from {lead}",
                    )
            yield Draft(name, one, (name,) * len(models), name if base is not None else None, None, copied)

    def stacked(self, group: Sequence[Slice]) -> Iterator[Draft]:
        position = 0
        ended: dict[str, str] = {}
        inputs = [models_of(self.recipe, one, self.rules) for one in group]
        every_ref = dict.fromkeys(i.ref for base, models in inputs for i in (base, *models) if i is not None)
        self.refuse_extra_ends([(base or models[0]).ref for base, models in inputs], every_ref)
        for number, (one, (base, models)) in enumerate(zip(group, inputs, strict=True)):
            every = [i for i in (base, *models) if i is not None]
            spans = [self.span(i, models[0] if i is base and i.layers is None else i) for i in every]
            lengths = {stop - start for start, stop in spans}
            if len(lengths) > 1:
                where = "; ".join(f"{i.ref} [{a}, {b})" for i, (a, b) in zip(every, spans, strict=True))
                raise ParameterError(f"the models of a slice have different numbers of layers: {where}")
            length = lengths.pop()
            lead, first = every[0].ref, spans[0][0]
            for stack, count in self.depths[lead].items():
                if stack in ended and first < count and length:
                    raise ParameterError(
                        f"{stack} would have a gap: {ended[stack]}, and a later slice goes on with it",
                        "stacks of different depths are cut apart with mergekit's modules: {encoder: {slices: ...}}",
                    )
                if first + length > count:
                    ended[stack] = f"it has {count} layers in {lead}, and a slice takes [{first}, {first + length})"
            self.refuse_extra_layers(every, spans)
            for name in self.leading(lead, every_ref):
                place = self.places[lead][name]
                if place is None:
                    if number == (0 if stands_before(name) else len(group) - 1):
                        other = name if base is not None else None
                        yield Draft(name, one, (name,) * len(models), other, 0.0, matches(name, self.recipe.keep))
                elif first <= place.index < first + length:
                    step = place.index - first
                    names = [place.moved(start + step) for start, _ in spans]
                    yield Draft(
                        place.moved(position + step),
                        one,
                        tuple(names[len(every) - len(models) :]),
                        names[0] if base is not None else None,
                        depth_of(step, length),
                        matches(name, self.recipe.keep),
                    )
            position += length

    @cached_property
    def places(self) -> dict[str, dict[str, Place | None]]:
        return {ref: {n: place_of(n) for n in names} for ref, names in self.names.items()}

    @cached_property
    def depths(self) -> dict[str, dict[str, int]]:
        return {ref: depths(self.stored(ref)) for ref in self.names}

    def stored(self, ref: str) -> list[str]:
        """Names of the module's tensors that are in a model's file."""
        return [n for n in self.names[ref] if n in self.sources[ref].infos]

    def leading(self, lead: str, refs: Iterable[str]) -> list[str]:
        """Names that the lead gives to the output: one that it ties and another model stores apart is stored apart."""
        found, source = [self.sources[ref] for ref in refs], self.sources[lead]
        ties = [(a, source.aliases[a]) for a in self.names[lead] if a not in source.infos]
        apart = [a for a, n in ties if any(a in s.infos and s.aliases.get(n) != a for s in found)]
        return [*self.stored(lead), *apart]

    def refuse_extra(self, extra: Sequence[str], ref: str, lead: str) -> None:
        if extra := [n for n in extra if not matches(n, self.recipe.keep)]:
            raise ExtraTensorError(
                f"{extra[0]}{and_more(extra)} is in {ref} and not in {lead}",
                prefix_hint(extra, self.sources[lead]) or f"leave it out with keep: {patterns(extra)}",
            )

    def refuse_extra_layers(self, every: Sequence[Input], spans: Sequence[tuple[int, int]]) -> None:
        """Refuse tensors of a slice's layers that its lead does not have in the same layer."""
        lead, first = every[0].ref, spans[0][0]
        known = frozenset(self.names[lead])
        for model, (start, stop) in zip(every, spans, strict=True):
            extra = [
                n
                for n in self.stored(model.ref)
                if (p := self.places[model.ref][n]) is not None
                and start <= p.index < stop
                and p.moved(first + p.index - start) not in known
            ]
            self.refuse_extra(extra, model.ref, lead)

    def refuse_extra_ends(self, leads: Sequence[str], refs: Iterable[str]) -> None:
        """Refuse tensors outside of all layers that the slice at their end, first or last, does not have."""
        for ref in refs:
            outside = [n for n in self.stored(ref) if self.places[ref][n] is None]
            for lead, before in ((leads[0], True), (leads[-1], False)):
                known = frozenset(self.names[lead])
                extra = [n for n in outside if n not in known and stands_before(n) == before]
                self.refuse_extra(extra, ref, lead)

    def span(self, model: Input, ranged: Input) -> tuple[int, int]:
        stacks = self.depths[model.ref]
        if not stacks:
            raise ParameterError(f"{model.ref} has no numbered layers, so it cannot be cut by layers")
        count = max(stacks.values())
        start, stop = ranged.layers if ranged.layers is not None else (0, count)
        if not 0 <= start <= stop <= count:
            raise ParameterError(f"layer_range [{start}, {stop}) of {model.ref}: it has {count} layers")
        return start, stop

"""A merge of adapters: which tensors are changed, and the merged change of each.

The engine is that of whole models, over a base of zeros: settings, gradients over layers, filters by name, noise and
post-processors mean the same. Layers are counted up to the last one that any adapter changes.

A method that counts directions sees cores of one size, the number of adapters times the largest rank of that weight,
filled up with zeros: as if no adapter had a lower rank, or left the weight alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from merganser.checkpoints.lora_edits import PREFIX, ROLES, Edit
from merganser.continual.kinds import THINNEST_FACTORED
from merganser.continual.roles import Role, assign_roles, is_matrix, literal, matches
from merganser.errors import AdapterError, ParameterError, ShapeError
from merganser.merging.adapters import AS_MODELS, Adapter, open_adapters
from merganser.merging.core_space import Factors, Frame, core_of, factors_of, frame_of
from merganser.merging.lookup import Rules, rules_of
from merganser.merging.merged import Merged
from merganser.merging.plan import Plan, make_plan
from merganser.merging.recipe import Input, Recipe
from merganser.methods import Factors as FactorsMethod
from merganser.methods.joint import Joint
from merganser.numerics import DTYPE_NAMES, TORCH_DTYPES
from merganser.types import FLOAT_DTYPES, Source, TensorInfo

#: Reference of the base of zeros.
ZERO = "no change"

Kind = Literal["core", "bias", "whole"]


@dataclass(frozen=True)
class Target:
    """One tensor of the model that is changed.

    Attributes:
        name: in the base, or by the adapters' own names where no base is given.
        kind: a low-rank change, a bias of a B, or a whole tensor.
        module: as the adapters call it; of a whole tensor, its own name there.
        shape: of the change: (out, in, kernel...) of a core.
        edits: of each adapter; None in one that leaves it alone.
        dtype: by safetensors name, the widest that any adapter stores it in.
        limit: of a core: the ranks of all adapters together, and no more than the weight can have.
        embedding: of a core: whether the module is an embedding.
    """

    name: str
    kind: Kind
    module: str
    shape: tuple[int, ...]
    edits: tuple[Edit | None, ...]
    dtype: str
    limit: int = 0
    embedding: bool = False


class Held:
    """A Source over tensors at hand, or over headers alone."""

    identity: str | None = None

    def __init__(self, ref: str, infos: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor] | None = None) -> None:
        self.ref, self.infos, self._tensors = ref, infos, tensors or {}
        self.aliases: Mapping[str, str] = {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor or rows of it."""
        return self._tensors[name] if rows is None else self._tensors[name][rows[0] : rows[1]]

    def companions(self) -> Sequence[Path]:
        """None."""
        return ()


@dataclass(frozen=True)
class AdapterMerge:
    """A planned merge of adapters.

    Attributes:
        recipe: as written.
        adapters: in the order of the models.
        base: what they were trained on, where the recipe says it.
        targets: what is changed, by name, sorted.
        ranks: of the output, by name of the core.
        plan: of the merge, with sizes by headers; the cores' own sizes may turn out less.
    """

    recipe: Recipe
    adapters: tuple[Adapter, ...]
    base: Source | None
    targets: Mapping[str, Target]
    ranks: Mapping[str, int]
    plan: Plan

    @cached_property
    def wrapped(self) -> frozenset[str]:
        """Modules with a low-rank change."""
        return frozenset(t.module for t in self.targets.values() if t.kind == "core")

    @cached_property
    def biased(self) -> frozenset[str]:
        """Modules whose B has a bias."""
        return frozenset(t.module for t in self.targets.values() if t.kind == "bias")

    def factors(self, name: str) -> tuple[Factors, Frame]:
        """The merged change of one weight at the rank of the output, and the frame that it was merged in.

        Raises:
            NonFiniteError: If an adapter holds NaN or infinity there.
            ParameterError: If the method refuses a setting.
        """
        target = self.targets[name]
        pairs = [self._pair(k, edit) for k, edit in enumerate(target.edits)]
        given = [pair for pair in pairs if pair is not None]
        frame = frame_of([up for up, _, _ in given], [down for _, down, _ in given])
        size = (frame.u.shape[1], frame.v.shape[1])
        zero = torch.zeros(size, dtype=torch.float64)
        cores = [zero if pair is None else core_of(*pair, frame) for pair in pairs]
        rows, columns = self._filled(target, size)
        cores = [pad(core, (0, columns - size[1], 0, rows - size[0])) for core in cores]
        merged = self._merged(name, cores)[: size[0], : size[1]]  # a rule of directions makes none beside those it got
        return factors_of(merged, frame, self.ranks[name]), frame

    def vector(self, name: str) -> Tensor:
        """A bias of a B, or a whole tensor, merged."""
        target = self.targets[name]
        if target.kind == "bias":
            return self._merged(name, [self._bias(k, edit, target) for k, edit in enumerate(target.edits)])
        wholes = [self._whole(k, edit) for k, edit in enumerate(target.edits)]
        first = next(x for x in wholes if x is not None)
        if self.plan.tensors[name].role == "fixed":  # a counter
            return first if self.base is None else self.base.read(self.base.aliases.get(name, name))
        if self.base is None or not first.is_floating_point():
            for adapter, x in zip(self.adapters, wholes, strict=True):
                if x is None or not torch.equal(x, first):
                    raise AdapterError(
                        f"{name}, which adapters hold as a whole, is another in {adapter.ref}",
                        "its change against the base can be merged: say base: PATH; "
                        f"keep: ['{literal(name)}'] leaves it out"
                        if first.is_floating_point()
                        else "integers cannot be merged: leave the adapter out",
                    )
            return first
        old = self.base.read(self.base.aliases.get(name, name)).double()
        changes = [torch.zeros_like(old) if x is None else x.double() - old for x in wholes]
        return old + self._merged(name, changes)

    def job_bytes(self, name: str) -> int:
        """Memory in bytes that merging one tensor takes at most."""
        target, models = self.targets[name], len(self.adapters)
        if target.kind != "core":
            return 8 * prod(target.shape) * (3 * models + 4) + (1 << 20)
        ends, ranks = target.shape[0] + prod(target.shape[1:]), sum(self._ranks(target))
        size = max(self._filled(target, (target.limit, target.limit)))
        return 8 * (5 * ends * ranks + (3 * models + 8) * size**2) + (1 << 20)

    def _filled(self, target: Target, size: tuple[int, int]) -> tuple[int, int]:
        """Size of the cores as the method sees them."""
        if not _counts_directions(self.plan.rules) or self.plan.tensors[target.name].role != "matrix":
            return size
        full = len(self.adapters) * max(self._ranks(target))
        if isinstance(self.plan.rules.method, FactorsMethod):
            full = max(full, THINNEST_FACTORED)
        return min(target.shape[0], full), min(prod(target.shape[1:]), full)

    def _ranks(self, target: Target) -> list[int]:
        """Of every adapter's change; 0 where it leaves the weight alone."""
        lows = [edit.low_rank if edit is not None else None for edit in target.edits]
        return [0 if x is None else a.info(x.down).shape[0] for a, x in zip(self.adapters, lows, strict=True)]

    def _pair(self, k: int, edit: Edit | None) -> tuple[Tensor, Tensor, float] | None:
        if edit is None or edit.low_rank is None:
            return None
        low = edit.low_rank
        return self.adapters[k].read(low.up).flatten(1), self.adapters[k].read(low.down).flatten(1), low.scaling

    def _bias(self, k: int, edit: Edit | None, target: Target) -> Tensor:
        if edit is None or edit.added is None:
            return torch.zeros(target.shape, dtype=torch.float64)
        key, factor = edit.added
        return self.adapters[k].read(key).double() * factor

    def _whole(self, k: int, edit: Edit | None) -> Tensor | None:
        return None if edit is None or edit.replaced is None else self.adapters[k].read(edit.replaced)

    def _merged(self, name: str, changes: Sequence[Tensor]) -> Tensor:
        """The rule on one tensor: a plan of nothing else, over the changes as they are at hand."""
        info = TensorInfo(tuple(changes[0].shape), "F64")
        held = {a.ref: Held(a.ref, {name: info}, {name: x}) for a, x in zip(self.adapters, changes, strict=True)}
        held[ZERO] = Held(ZERO, {name: info}, {name: torch.zeros_like(changes[0])})
        tensor = replace(self.plan.tensors[name], info=info)
        return Merged(replace(self.plan, tensors={name: tensor}, sources=held)).read(name)


def plan_adapters(recipe: Recipe, *, digests: bool = True) -> AdapterMerge:
    """Plan a merge of adapters from their headers; no tensor is read.

    Args:
        recipe: whose `adapter` says the rank of the output.
        digests: whether to keep a digest of what is read, for the receipt.

    Raises:
        MerganserError: Whatever is wrong with the recipe or an adapter.
    """
    assert recipe.adapter is not None
    adapters, base = open_adapters(recipe, digests=digests)
    targets = {t.name: t for t in _targets(adapters, recipe)}
    limit = max((t.limit for t in targets.values()), default=0)
    if not limit:
        raise AdapterError("no adapter changes a weight that is to be merged", "look at keep")
    rank = recipe.adapter.rank
    if rank is not None and rank > limit:
        raise ParameterError(
            f"adapter.rank is {rank}, and no weight's merged change has a rank above {limit}",
            "rank: keep cuts nothing off",
        )
    ranks = {n: min(rank or t.limit, t.limit) for n, t in targets.items() if t.kind == "core"}
    if base is None:
        _refuse_changed_wholes(targets, adapters)
    return AdapterMerge(recipe, adapters, base, targets, ranks, _plan(recipe, targets, [a.ref for a in adapters]))


def _plan(recipe: Recipe, targets: Mapping[str, Target], refs: Sequence[str]) -> Plan:
    """The plan over a base of zeros; where a method takes its base for a model, the first adapter is that."""
    rules, inputs = rules_of(recipe.method), list(recipe.slices[0].inputs)
    based: Input | None = Input(ZERO) if rules.needs_base else None
    if rules.base_is_model:
        based = inputs.pop(0)
    slices = (replace(recipe.slices[0], inputs=tuple(inputs), base=None),)
    inner = replace(recipe, base=based, slices=slices, dtype=None, keep=(), adapter=None)
    infos = {n: TensorInfo(_size(t), "F64") for n, t in targets.items()}
    plan = make_plan(inner, {ref: Held(ref, infos) for ref in (*refs, ZERO)})
    # What a weight is to a method is judged by the whole weight, not by its core.
    roles = assign_roles(Held("the adapters", {n: TensorInfo(_dense(t), "F64") for n, t in targets.items()}))
    tensors = {n: replace(p, role=_role(rules, targets[n], roles[n])) for n, p in plan.tensors.items()}
    return replace(plan, tensors=tensors)


def _size(target: Target) -> tuple[int, ...]:
    """Shape of what is merged, by headers."""
    return (target.limit, target.limit) if target.kind == "core" else target.shape


def _dense(target: Target) -> tuple[int, ...]:
    return target.shape[::-1] if target.embedding else target.shape


def _role(rules: Rules, target: Target, role: Role) -> Role:
    """What a method takes a target for: what it would take the whole weight for, but cores are always (out, in)."""
    if target.kind != "core" or not is_matrix(role):
        return role
    thin = min(target.shape[0], prod(target.shape[1:])) < THINNEST_FACTORED
    return "vector" if thin and isinstance(rules.method, FactorsMethod) else "matrix"


def _counts_directions(rules: Rules) -> bool:
    """Whether a method has a rule of its own for matrices."""
    row = rules.method
    return row.vector is not None if isinstance(row, Joint) else row.function is not row.vector


def _targets(adapters: Sequence[Adapter], recipe: Recipe) -> Iterator[Target]:
    names = sorted(dict.fromkeys(name for a in adapters for name in a.edits))
    for name in names:
        if matches(name, recipe.keep):
            continue
        edits = tuple(a.edits.get(name) for a in adapters)
        drafts = {a.ref: _target(name, a, e, edits) for a, e in zip(adapters, edits, strict=True) if e is not None}
        first, lead = next(iter(drafts.items()))
        for ref, other in drafts.items():
            if other.kind != lead.kind or other.embedding != lead.embedding:
                raise AdapterError(
                    f"{first} and {ref} change {name} in different ways: {_how(lead)}, {_how(other)}", AS_MODELS
                )
            if other.module != lead.module:
                raise AdapterError(
                    f"{name} is called {lead.module} in {first}, and {other.module} in {ref}",
                    "the adapters were trained on different classes of the model; no adapter fits both",
                )
            if other.shape != lead.shape:
                raise ShapeError(f"the change of {name} is {lead.shape} in {first}, and {other.shape} in {ref}")
        dtype = recipe.dtype
        if dtype is None or lead.dtype not in FLOAT_DTYPES:
            wide = TORCH_DTYPES[lead.dtype]
            for other in drafts.values():
                wide = torch.promote_types(wide, TORCH_DTYPES[other.dtype])
            dtype = DTYPE_NAMES[wide]
        ranks = sum(a.info(e.low_rank.down).shape[0] for a, e in zip(adapters, edits, strict=True) if e and e.low_rank)
        limit = min(lead.shape[0], prod(lead.shape[1:]), ranks) if lead.kind == "core" else 0
        yield replace(lead, dtype=dtype, limit=limit)


def _target(name: str, adapter: Adapter, edit: Edit, edits: tuple[Edit | None, ...]) -> Target:
    """A tensor as one adapter sees it."""
    if edit.replaced is not None:
        info = adapter.info(edit.replaced)
        module = edit.replaced.removeprefix(PREFIX).replace(".base_layer.", ".")
        return Target(name, "whole", module, info.shape, edits, info.dtype)
    if edit.added is not None:
        info = adapter.info(edit.added[0])
        return Target(name, "bias", _module_of(edit.added[0]), info.shape, edits, info.dtype)
    assert edit.low_rank is not None
    up, down = adapter.info(edit.low_rank.up), adapter.info(edit.low_rank.down)
    wide = torch.promote_types(TORCH_DTYPES[up.dtype], TORCH_DTYPES[down.dtype])
    shape = (up.shape[0], *down.shape[1:])
    embedding = edit.low_rank.down.endswith(".lora_embedding_A")
    return Target(name, "core", _module_of(edit.low_rank.up), shape, edits, DTYPE_NAMES[wide], embedding=embedding)


def _module_of(key: str) -> str:
    name = key.removeprefix(PREFIX)
    return name.removesuffix(next(s for s in ROLES if name.endswith(s)))


def _how(target: Target) -> str:
    if target.kind == "whole":
        return "as a whole"
    return "as an embedding" if target.embedding else "by a LoRA"


def _refuse_changed_wholes(targets: Mapping[str, Target], adapters: Sequence[Adapter]) -> None:
    for name, target in targets.items():
        if target.kind != "whole":
            continue
        if missing := [a.ref for a, edit in zip(adapters, target.edits, strict=True) if edit is None]:
            raise AdapterError(
                f"{name} is held as a whole by some adapters, and not by {', '.join(missing)}",
                f"its change against the base can be merged: say base: PATH; keep: ['{literal(name)}'] leaves it out",
            )

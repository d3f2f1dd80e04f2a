"""LoRA adapters merged with each other: which weights they change, and the merged change of each in core space.

| what an adapter holds | what becomes of it |
|---|---|
| the low-rank change of a weight | merged in core space; zero in an adapter that leaves the weight alone |
| the bias of a B (`lora_bias`) | merged as the vector that it is |
| a whole tensor (`bias`, `modules_to_save`) | its change against the base is merged, so the recipe must name the base |
| a copy of the base's weight beside its LoRA, as peft saves embeddings | left out, once it is seen to be one |
| integers of a whole module | must be equal |
| DoRA | refused: it rescales the base's weight, which is no low-rank change |

The engine is that of whole models: settings, gradients over layers, filters by name, noise and post-processors mean the
same, over a base of zeros. Layers are counted up to the last one that any adapter changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from merganser.checkpoints import local_path, open_source
from merganser.checkpoints.folder import open_weights
from merganser.checkpoints.lora_config import CONFIG_NAME, LoraConfig, read_config
from merganser.checkpoints.lora_edits import PREFIX, ROLES, Edit, place
from merganser.continual.roles import Role, assign_roles, is_matrix, matches
from merganser.errors import AdapterError, CheckpointError, NonFiniteError, ParameterError, RefError, ShapeError
from merganser.merging.core_space import Factors, Frame, core_of, factors_of, frame_of
from merganser.merging.digested import Digested
from merganser.merging.lookup import rules_of
from merganser.merging.merged import Merged
from merganser.merging.plan import Plan, make_plan
from merganser.merging.recipe import Input, Recipe
from merganser.numerics import DTYPE_NAMES, TORCH_DTYPES
from merganser.types import FLOAT_DTYPES, Source, TensorInfo

#: Reference of the base of zeros.
ZERO = "no change"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: What to do with an adapter that has no place among others.
AS_MODELS = "merge whole models: leave adapter out, and write BASE+ADAPTER for each"

Kind = Literal["core", "bias", "whole"]


@dataclass(frozen=True)
class Adapter:
    """One adapter, opened.

    Attributes:
        ref: as the user wrote it.
        source: its own tensors.
        config: what it means.
        settings: all that its adapter_config.json says.
        edits: what it does, by the name of the weight.
    """

    ref: str
    source: Source
    config: LoraConfig
    settings: Mapping[str, Any]
    edits: Mapping[str, Edit]

    def info(self, key: str) -> TensorInfo:
        """Header of one of its tensors."""
        return self.source.infos[self.source.aliases.get(key, key)]

    def read(self, key: str) -> Tensor:
        """One of its tensors.

        Raises:
            NonFiniteError: If it holds NaN or infinity.
        """
        value = self.source.read(self.source.aliases.get(key, key))
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{key} of {self.ref} holds NaN or infinity", "leave the adapter out")
        return value


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

    @property
    def limit(self) -> int:
        """The largest rank that any weight's change can have."""
        return max(t.limit for t in self.targets.values())

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
        return factors_of(self._merged(name, cores), frame, self.ranks[name]), frame

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
                        "its change against the base can be merged: say base: PATH"
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
        long, ranks = (
            target.shape[0] + prod(target.shape[1:]),
            sum(self._rank(k, e) for k, e in enumerate(target.edits)),
        )
        return 8 * (5 * long * ranks + (3 * models + 8) * target.limit**2) + (1 << 20)

    def _rank(self, k: int, edit: Edit | None) -> int:
        return 0 if edit is None or edit.low_rank is None else self.adapters[k].info(edit.low_rank.down).shape[0]

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
    refs = [i.ref for i in recipe.slices[0].inputs]
    base = _base_of(recipe, refs, digests)
    opened = {ref: _opened(ref, base, digests) for ref in dict.fromkeys(refs)}
    adapters = tuple(opened[ref] for ref in refs)
    if base is None:
        _refuse_other_bases(adapters)
    _refuse_other_tasks(adapters)
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
    return AdapterMerge(recipe, adapters, base, targets, ranks, _plan(recipe, targets, refs))


def common(adapters: Sequence[Adapter], key: str) -> Any:
    """What all adapters say of a setting that say anything, None where they differ."""
    said = [a.settings[key] for a in adapters if a.settings.get(key) is not None]
    return said[0] if said and all(one == said[0] for one in said) else None


def parts_of(ref: str) -> tuple[str | None, str]:
    """Base and adapter of BASE+ADAPTER; None and the reference itself where it is an adapter's."""
    if "+" not in ref or local_path(ref).exists():
        return None, ref
    base, _, adapter = ref.rpartition("+")
    return base, adapter


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
    tensors = {n: replace(p, role=_role(targets[n], roles[n])) for n, p in plan.tensors.items()}
    return replace(plan, tensors=tensors)


def _size(target: Target) -> tuple[int, ...]:
    """Shape of what is merged, by headers."""
    return (target.limit, target.limit) if target.kind == "core" else target.shape


def _dense(target: Target) -> tuple[int, ...]:
    return target.shape[::-1] if target.embedding else target.shape


def _role(target: Target, role: Role) -> Role:
    return "matrix" if target.kind == "core" and is_matrix(role) else role


def _base_of(recipe: Recipe, refs: Sequence[str], digests: bool) -> Source | None:
    """The base that the recipe or its references name.

    Raises:
        AdapterError: If they name different ones.
    """
    named = {} if recipe.base is None else {"the recipe": recipe.base.ref}
    named |= {ref: base for ref in refs if (base := parts_of(ref)[0]) is not None}
    if len({_place(base) for base in named.values()}) > 1:
        listed = "; ".join(f"{who} says {base}" for who, base in named.items())
        raise AdapterError(
            f"the adapters are on different bases: {listed}", "an adapter fits only the base that it was trained on"
        )
    if not named:
        return None
    source = open_source(next(iter(named.values())))
    return Digested(source) if digests else source


def _place(ref: str) -> str:
    path = local_path(ref)
    return str(path.resolve()) if path.exists() else ref.removeprefix("hf:")


def _opened(ref: str, base: Source | None, digests: bool) -> Adapter:
    folder = _folder_of(parts_of(ref)[1], ref)
    if not (folder / CONFIG_NAME).is_file():
        raise RefError(
            f"{ref} is no adapter: it holds no {CONFIG_NAME}",
            "a recipe with adapter merges adapters alone; to merge whole models, leave adapter out",
        )
    config = read_config(folder / CONFIG_NAME)
    if config.use_dora:
        raise AdapterError(f"{ref} is a DoRA, which rescales the base's weights by their norms", AS_MODELS)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")
    source = open_weights(weights, ref)
    own = dict(source.infos) | {alias: source.infos[name] for alias, name in source.aliases.items()}
    try:
        if base is None:
            edits = place(own, replace(config, fan_in_fan_out=False), _fitting(own), ref)
        else:
            known = dict(base.infos) | {alias: base.infos[name] for alias, name in base.aliases.items()}
            edits = place(own, config, known, base.ref)
    except AdapterError as error:
        raise AdapterError(f"{ref}: {error.message}", error.hint) from error
    settings = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    adapter = Adapter(ref, Digested(source) if digests else source, config, settings, edits)
    return replace(adapter, edits={name: _without_copy(adapter, name, edit, base) for name, edit in edits.items()})


def _without_copy(adapter: Adapter, name: str, edit: Edit, base: Source | None) -> Edit:
    """What an adapter does to a weight beyond holding the base's own, as peft saves it beside an embedding's LoRA.

    Raises:
        AdapterError: If the whole weight that stands beside a LoRA is another than the base's.
    """
    if edit.replaced is None or (edit.low_rank is None and edit.added is None):
        return edit
    if base is None:
        raise AdapterError(
            f"{adapter.ref} holds {name} as a whole beside a LoRA of it",
            "say base: PATH, to see whether it is the same",
        )
    held, old = adapter.read(edit.replaced), base.read(base.aliases.get(name, name))
    if not (torch.equal(held.double(), old.double()) or torch.equal(held, old.to(held.dtype))):
        raise AdapterError(f"{adapter.ref} trains {name} as a whole and by a LoRA as well", AS_MODELS)
    return replace(edit, replaced=None)


def _folder_of(ref: str, whole: str) -> Path:
    path = local_path(ref)
    if path.is_dir():
        return path
    if path.exists():
        raise RefError(f"{whole} is a file", f"an adapter is a folder that holds {CONFIG_NAME}")
    repo, _, revision = ref.removeprefix("hf:").partition("@")
    if ref.startswith("hf:") or (repo.count("/") == 1 and not path.parent.exists()):
        from merganser.checkpoints.hub import snapshot

        return snapshot(repo, revision or None)
    open_source(ref)  # says what is nearest to it
    raise RefError(f"{whole} is no adapter")


def _fitting(own: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Headers of a base that an adapter fits, as far as its own tensors tell."""
    found: dict[str, TensorInfo] = {}
    for key, info in own.items():
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in ROLES if name.endswith(s)), None)
        module = name.removesuffix(suffix or "")
        if suffix is None:
            found.setdefault(name.replace(".base_layer.", "."), info)
        elif suffix == ".lora_B.bias":
            found[f"{module}.bias"] = info
        elif suffix in (".lora_A.weight", ".lora_embedding_A"):
            up = own.get(key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
            outside = up.shape[0] if up is not None and up.shape else 0
            sizes = info.shape[1:]
            found[f"{module}.weight"] = TensorInfo(
                (*sizes, outside) if "embedding" in suffix else (outside, *sizes), "F32"
            )
        else:
            found.setdefault(f"{module}.weight", TensorInfo((), "F32"))
    return found


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


def _refuse_other_bases(adapters: Sequence[Adapter]) -> None:
    named = {
        a.ref: str(a.settings["base_model_name_or_path"]) for a in adapters if a.settings.get("base_model_name_or_path")
    }
    if len(set(named.values())) > 1:
        listed = "; ".join(f"{ref} on {base}" for ref, base in named.items())
        raise AdapterError(
            f"the adapters were trained on different bases: {listed}", "if these are one model, say which: base: PATH"
        )


def _refuse_other_tasks(adapters: Sequence[Adapter]) -> None:
    tasks = {a.ref: str(a.settings["task_type"]) for a in adapters if a.settings.get("task_type")}
    if len(set(tasks.values())) > 1:
        listed = "; ".join(f"{ref}: {task}" for ref, task in tasks.items())
        raise AdapterError(f"the adapters are for different tasks: {listed}", "their task_type must be one")


def _refuse_changed_wholes(targets: Mapping[str, Target], adapters: Sequence[Adapter]) -> None:
    for name, target in targets.items():
        if target.kind != "whole":
            continue
        if missing := [a.ref for a, edit in zip(adapters, target.edits, strict=True) if edit is None]:
            raise AdapterError(
                f"{name} is held as a whole by some adapters, and not by {', '.join(missing)}",
                "its change against the base can be merged: say base: PATH",
            )

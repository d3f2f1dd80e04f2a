"""LoRA adapters that are merged with each other: opened, placed on one base, or refused by name.

| what an adapter holds | what becomes of it |
|---|---|
| the low-rank change of a weight | merged in core space; zero in an adapter that leaves the weight alone |
| the bias of a B (`lora_bias`) | merged as the vector that it is |
| a whole tensor (`bias`, `modules_to_save`) | its change against the base is merged, so the recipe must name the base |
| a copy of the base's weight beside its LoRA, as peft saves embeddings | left out, once it is seen to be one |
| integers of a whole module | must be equal |
| DoRA | refused: it rescales the base's weight, which is no low-rank change |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints import base_and_adapter, local_path, open_source
from merganser.checkpoints.folder import open_weights
from merganser.checkpoints.lora_config import CONFIG_NAME, LoraConfig, read_config
from merganser.checkpoints.lora_edits import PREFIX, ROLES, Edit, place
from merganser.errors import AdapterError, CheckpointError, NonFiniteError, RefError
from merganser.merging.digested import Digested
from merganser.merging.recipe import Recipe
from merganser.numerics import all_finite
from merganser.types import Source, TensorInfo

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: What to do with an adapter that has no place among others.
AS_MODELS = "merge whole models: leave adapter out, and write BASE+ADAPTER for each"


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
        if not all_finite(value):
            raise NonFiniteError(f"{key} of {self.ref} holds NaN or infinity", "leave the adapter out")
        return value


def open_adapters(recipe: Recipe, *, digests: bool) -> tuple[tuple[Adapter, ...], Source | None]:
    """Open the models of a recipe, which are all adapters, and their base where the recipe names it.

    Args:
        recipe: of whole models, each an adapter.
        digests: whether to keep a digest of what is read, for the receipt.

    Returns:
        The adapters in the recipe's order, and the base.

    Raises:
        RefError: If a reference names no adapter.
        AdapterError: If one cannot be merged faithfully, or they do not belong to one base and one task.
    """
    refs = [i.ref for i in recipe.slices[0].inputs]
    base = _base_of(recipe, refs, digests)
    opened = {ref: _opened(ref, base, digests) for ref in dict.fromkeys(refs)}
    adapters = tuple(opened[ref] for ref in refs)
    if base is None:
        _refuse_other_bases(adapters)
    _refuse_other_tasks(adapters)
    return adapters, base


def common(adapters: Sequence[Adapter], key: str) -> Any:
    """What all adapters say of a setting that say anything, None where they differ."""
    said = [a.settings[key] for a in adapters if a.settings.get(key) is not None]
    return said[0] if said and all(one == said[0] for one in said) else None


def _base_of(recipe: Recipe, refs: Sequence[str], digests: bool) -> Source | None:
    """The base that the recipe or its references name.

    Raises:
        AdapterError: If they name different ones.
    """
    named = {} if recipe.base is None else {"the recipe": recipe.base.ref}
    named |= {ref: base for ref in refs if (base := base_and_adapter(ref)[0]) is not None}
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
    folder = _folder_of(base_and_adapter(ref)[1], ref)
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

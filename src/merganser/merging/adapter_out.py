"""The adapter that a merge of adapters makes, laid out so that peft loads it.

Every scaling is 1: alpha is the rank. `target_modules` are those of the adapters together, or whole names of modules
where these lists would fit more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from merganser.checkpoints import local_path
from merganser.checkpoints.lora_config import LoraConfig
from merganser.checkpoints.lora_edits import PREFIX
from merganser.checkpoints.writer import CheckpointWriter
from merganser.merging.adapter_plan import AdapterMerge, Target
from merganser.merging.adapters import common
from merganser.merging.digested import Digested
from merganser.types import TensorInfo

STEM = "adapter_model"


@dataclass(frozen=True)
class Cut:
    """What cutting one weight's change to the output's rank cost; rounding to the output's type is not in it.

    Attributes:
        rank: of the output.
        core: size of the core.
        lost: squared Frobenius norm of what was cut off.
        whole: squared Frobenius norm of the merged change.
    """

    rank: int
    core: tuple[int, int]
    lost: float
    whole: float

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


def infos_of(merge: AdapterMerge) -> dict[str, TensorInfo]:
    """Header of every tensor of the output."""
    return {key: info for name in merge.targets for key, info in _keys(merge, name).items()}


def write_target(merge: AdapterMerge, writer: CheckpointWriter, name: str) -> Cut | None:
    """Merge one tensor and write what the output holds of it.

    Returns:
        What the cut cost; None for what is not cut.
    """
    keys = _keys(merge, name)
    if name not in merge.ranks:
        writer.put(next(iter(keys)), merge.vector(name))
        return None
    factors, frame = merge.factors(name)
    (down, down_info), (up, up_info), *rest = keys.items()
    writer.put(down, factors.down.reshape(down_info.shape))
    writer.put(up, factors.up.reshape(up_info.shape))
    for key, info in rest:  # peft gives all biases or none
        writer.put(key, torch.zeros(info.shape))
    return Cut(merge.ranks[name], (frame.u.shape[1], frame.v.shape[1]), factors.lost, factors.whole)


def config_of(merge: AdapterMerge) -> dict[str, Any]:
    """adapter_config.json of the output."""
    ranks = {merge.targets[name].module: rank for name, rank in merge.ranks.items()}
    r, pattern = _patterns(ranks)
    base, revision = _base(merge)
    biases = [a.settings.get("bias") for a in merge.adapters]
    held = [f".{t.module}" for t in merge.targets.values() if t.kind == "whole"]
    listed = [m for a in merge.adapters for m in a.settings.get("modules_to_save") or ()]
    saved = [m for m in dict.fromkeys(listed) if any(f".{m}." in name for name in held)]
    return {
        "peft_type": "LORA",
        "task_type": common(merge.adapters, "task_type"),
        "auto_mapping": common(merge.adapters, "auto_mapping"),
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _target_modules(merge),
        "modules_to_save": saved or None,
        "bias": next((b for b in ("all", "lora_only") if b in biases and held), "none"),
        "fan_in_fan_out": any(a.config.fan_in_fan_out for a in merge.adapters),
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": bool(merge.biased),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def receipt_of(merge: AdapterMerge, cuts: Mapping[str, Cut | None]) -> dict[str, Any]:
    """What the receipt says of the merge beyond times and digests."""
    made = {name: cut for name, cut in cuts.items() if cut is not None}
    lost, whole = sum(c.lost for c in made.values()), sum(c.whole for c in made.values())
    inputs = {
        a.ref: {
            "config": asdict(a.config),
            "tensors": a.source.digests() if isinstance(a.source, Digested) else {},
        }
        for a in merge.adapters
    }
    if merge.base is not None:
        inputs[merge.base.ref] = {"tensors": merge.base.digests() if isinstance(merge.base, Digested) else {}}
    asked = merge.recipe.adapter.rank if merge.recipe.adapter is not None else None
    return {
        "method": merge.recipe.method,
        "dialect": merge.recipe.dialect,
        "seed": merge.recipe.seed,
        "inputs": inputs,
        "adapter": {
            "rank": asked if asked is not None else "keep",
            "truncation_error": (lost / whole) ** 0.5 if whole else 0.0,
            "weights": {
                n: {"rank": c.rank, "core": list(c.core), "truncation_error": c.error} for n, c in made.items()
            },
        },
    }


def card_of(merge: AdapterMerge) -> str:
    """A model card as the Hugging Face hub reads it."""
    recipe, base = merge.recipe, _base(merge)[0]
    front = [f"base_model: {base}"] if base is not None and not local_path(base).exists() else []
    header = "\n".join(["---", *front, "library_name: peft", "tags:", "- lora", "- merge", "- merganser", "---"])
    listed = "\n".join(f"- {ref}" for ref in dict.fromkeys(a.ref for a in merge.adapters))
    return f"""{header}
# {recipe.name or "A merged adapter"}

{len(merge.adapters)} LoRA adapters merged by `{recipe.method}` in core space:

{listed}

The receipt `merganser.json` holds the digest of every tensor that was read and written, and the truncation error of
every weight.

```yaml
{recipe.text.strip()}
```
"""


def _keys(merge: AdapterMerge, name: str) -> dict[str, TensorInfo]:
    """Header of what the output holds of one tensor, A before B, by its key."""
    target = merge.targets[name]
    module, dtype = target.module, target.dtype
    if target.kind == "whole":
        return {f"{PREFIX}{_whole_key(merge, target)}": TensorInfo(target.shape, dtype)}
    if target.kind == "bias":
        return {f"{PREFIX}{module}.lora_B.bias": TensorInfo(target.shape, dtype)}
    rank = merge.ranks[name]
    down = TensorInfo((rank, *target.shape[1:]), dtype)
    up = TensorInfo((target.shape[0], rank, *(1 for _ in target.shape[2:])), dtype)
    if target.embedding:
        return {f"{PREFIX}{module}.lora_embedding_A": down, f"{PREFIX}{module}.lora_embedding_B": up}
    keys = {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    if merge.biased and module not in merge.biased:
        keys[f"{PREFIX}{module}.lora_B.bias"] = TensorInfo(target.shape[:1], dtype)
    return keys


def _whole_key(merge: AdapterMerge, target: Target) -> str:
    """Name of a whole tensor in the model that peft builds: what LoRA wraps is one level down."""
    module, _, leaf = target.module.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in merge.wrapped else target.module


def _base(merge: AdapterMerge) -> tuple[str | None, str | None]:
    """Name and revision of the base: a hub's as it is, a folder's whole path, else what all adapters say."""
    if merge.base is None:
        return common(merge.adapters, "base_model_name_or_path"), common(merge.adapters, "revision")
    ref = merge.base.ref
    path = local_path(ref)
    if path.exists():
        return str(path.resolve()), None
    name, _, revision = ref.removeprefix("hf:").partition("@")
    return name, revision or None


def _patterns(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most frequent rank, and those of the other modules by name; of a rank, alpha is the same."""
    counts: dict[int, int] = {}
    for rank in ranks.values():
        counts[rank] = counts.get(rank, 0) + 1
    r = max(counts, key=lambda rank: (counts[rank], rank))
    longest_first = dict(sorted(ranks.items(), key=lambda item: (-len(item[0]), item[0])))
    for pattern in ({m: rank for m, rank in longest_first.items() if rank != r}, longest_first):
        config = LoraConfig(r, r, tuple(pattern.items()), tuple(pattern.items()))
        if all(config.rank(module) == rank for module, rank in ranks.items()):  # a name may end on another one
            break
    return r, pattern


def _target_modules(merge: AdapterMerge) -> list[str]:
    """What peft is told to wrap: exactly the modules that the output changes."""
    modules = [merge.targets[name].module for name in merge.ranks]
    listed: list[str] = []
    for adapter in merge.adapters:
        given = adapter.settings.get("target_modules")
        narrowed = any(
            adapter.settings.get(key) is not None
            for key in ("layers_to_transform", "layers_pattern", "exclude_modules")
        )
        if narrowed or not isinstance(given, list) or merge.recipe.keep:
            return modules
        listed += given
    short = sorted(dict.fromkeys(map(str, listed)))
    fits = all(any(m == t or m.endswith(f".{t}") for t in short) for m in modules)
    return short if fits else modules

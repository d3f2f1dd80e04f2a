"""Adapters as peft makes them and as they are written by hand, with a base in memory; shared by the adapter tests."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merganser.merging.native import read_recipes
from merganser.merging.run import plan_any, run
from merganser.numerics import DTYPE_NAMES
from merganser.types import TensorInfo

#: A base with one linear layer and one embedding.
Q = {"layer.q.weight": torch.zeros(3, 4), "layer.q.bias": torch.zeros(3), "embed.weight": torch.zeros(5, 4)}


class Held:
    """A Source over tensors in memory."""

    identity: str | None = None

    def __init__(self, tensors: dict[str, Tensor], aliases: dict[str, str] | None = None) -> None:
        self.ref, self.tensors, self.aliases = "base", tensors, aliases or {}
        self.infos = {n: TensorInfo(tuple(tensors[n].shape), DTYPE_NAMES[tensors[n].dtype]) for n in sorted(tensors)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]

    def companions(self) -> Sequence[Path]:
        return (Path("config.json"),)


class Mixed(nn.Module):
    """Layers of every kind that an adapter can sit on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 10)
        self.bare = nn.Linear(10, 6, bias=False)
        self.conv = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 5, 1)
        self.line = nn.Conv1d(4, 7, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


def randomise(model: nn.Module, seed: int, only: Callable[[str], bool] = lambda name: True) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point() and only(name):
                noise = torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5
                tensor.copy_(noise.abs() + 0.5 if "magnitude" in name or "running_var" in name else noise)


def trained(
    model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None, **settings: Any
) -> tuple[Held, dict[str, Tensor]]:
    """A random base, a random adapter saved in `folder`, and what peft itself merges them to."""
    randomise(model, 0)
    if dtype is not None:
        model.to(dtype)
    base = Held({name: tensor.clone() for name, tensor in model.state_dict().items()})
    ours = ("lora_", "modules_to_save") + ((".bias",) if settings.get("bias", "none") != "none" else ())
    only_lora = settings.get("bias") == "lora_only"
    with warnings.catch_warnings():  # peft and transformers warn of each other; our own code stays under "error"
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        randomise(adapted, 1, lambda n: any(p in n for p in ours) and (not only_lora or "lora_" in n or "base_la" in n))
        adapted.save_pretrained(folder)
        return base, adapted.merge_and_unload().state_dict()


def written(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """An adapter folder as peft lays it out, from tensors named without peft's prefix."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def pair(module: str, out: int, inside: int, rank: int = 2) -> dict[str, Tensor]:
    a = torch.arange(1, rank * inside + 1, dtype=torch.float32).reshape(rank, inside)
    b = torch.arange(1, out * rank + 1, dtype=torch.float32).reshape(out, rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def merge(folder: Path, text: str, *, threads: int = 1) -> dict[str, Any]:
    """Run a recipe that stands beside the models, to `out`; return its receipt."""
    (folder / "recipe.yaml").write_text(dedent(text), "utf-8")
    recipes, _ = read_recipes(folder / "recipe.yaml")
    run(plan_any(recipes), folder / "out", threads=threads, overwrite=True)
    return json.loads((folder / "out" / "merganser.json").read_text("utf-8"))


def two(folder: Path, **settings: Any) -> None:
    """Two adapters of one layer, the second with some settings of its own."""
    written(folder / "a0", pair("q", 6, 5), target_modules=["q"], base_model_name_or_path="org/base")
    given = {"target_modules": ["q"], "base_model_name_or_path": "org/base", **settings}
    written(folder / "a1", pair("q", 6, 5), **given)


LINEAR = "method: linear\nmodels: [a0, a1]\nadapter: {rank: 2}\n"


def train(model: nn.Module, folder: Path, seed: int, **settings: Any) -> dict[str, Tensor]:
    """A random adapter of a model, as peft saves it; what peft merges both to."""
    ours = [
        "lora_",
        "modules_to_save",
        {"all": ".bias", "lora_only": "base_layer.bias"}.get(settings.get("bias"), "lora_"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        randomise(adapted, seed, lambda name: any(part in name for part in ours))
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload().state_dict()
    return {name: x.detach().clone() for name, x in merged.items()}


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    """What peft makes of a model and an adapter folder; a tensor that it cannot place is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)


def combined(base: nn.Module, models: list[dict[str, Tensor]], factors: list[float]) -> dict[str, Tensor]:
    """Base + sum of the factors times the changes, in float64."""
    found = {}
    for name, old in base.state_dict().items():
        changes = [f * (m[name].double() - old.double()) for m, f in zip(models, factors, strict=True)]
        found[name] = old.double() + sum(changes)
    return found

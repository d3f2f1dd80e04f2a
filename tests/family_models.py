"""Tiny models of many families with two fine-tunes each on disk, and recipes over them by the command's own path."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merganser.merging.native import read_recipes
from merganser.merging.run import plan_recipes, run

sys.path.insert(0, str(Path(__file__).parent / "symmetry"))

from hub_architectures import HUB, PICTURE, TEXT, Only, hub, masked, seen
from tiny import Builder, tiny

WEIGHTS = (0.25, 1.5)
#: Decoders of text, which can be stacked, by the name of their stack of layers.
DECODERS = {
    "llama-3": "model.layers.",
    "mistral": "model.layers.",
    "qwen2": "model.layers.",
    "qwen3": "model.layers.",
    "gemma": "model.layers.",
    "gemma2": "model.layers.",
    "gemma3": "model.layers.",
    "phi": "model.layers.",
    "phi3": "model.layers.",
    "gpt2": "transformer.h.",
    "gpt-neox": "gpt_neox.layers.",
    "gpt-j": "transformer.h.",
    "opt": "model.decoder.layers.",
    "falcon": "transformer.h.",
    "bloom": "transformer.h.",
    "mpt": "transformer.blocks.",
    "mamba": "backbone.layers.",
    "mamba2": "backbone.layers.",
    "rwkv": "rwkv.blocks.",
    "gpt-neo": "transformer.h.",
    "mixtral": "model.layers.",
    "mixtral-fused": "model.layers.",
    "qwen3-moe": "model.layers.",
    "qwen3-moe-fused": "model.layers.",
}
OTHERS = (
    "bert", "bert-classifier", "roberta", "distilbert", "albert", "electra", "deberta-v2", "modernbert", "t5",
    "t5-gated", "bart", "whisper", "hub-vit", "dinov2", "hub-swin", "hub-convnext", "hub-resnet", "clip",
    "clip-vision", "clip-text", "siglip-vision", "segformer",
)  # fmt: skip
FAMILIES = (*DECODERS, *OTHERS)
#: Those whose fine-tunes are stored in bfloat16.
HALF = FAMILIES[::3]


def clip() -> nn.Module:
    towers = {"text_config": TEXT | {"num_hidden_layers": 3}, "vision_config": PICTURE, "projection_dim": 20}
    return hub("CLIPModel", "CLIPConfig", **towers)


EXTRA: dict[str, Builder] = {
    "clip": tiny(clip, lambda: {**masked(), **seen()}),
    "mixtral-fused": HUB["mixtral"],
    "qwen3-moe-fused": HUB["qwen3-moe"],
}


@dataclass
class Family:
    """A tiny network, a base and two fine-tunes of it on disk, and the tensors of all three in memory.

    Attributes:
        network: the base.
        inputs: of it.
        folders: base and fine-tunes.
        states: of the network, for each folder.
        tied: names of parameters that are one, by any of them.
    """

    network: nn.Module
    inputs: dict[str, Any]
    folders: list[Path]
    states: list[dict[str, Tensor]]
    tied: list[tuple[str, str]]


def tuned(network: nn.Module, seed: int) -> None:
    """Move every floating parameter and statistic."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*network.named_parameters(), *network.named_buffers()]:
            if x.is_floating_point() and x.dim() and "inv_freq" not in name:
                noise = 0.02 * torch.randn(x.shape, generator=generator)
                x.add_(noise.abs() if name.endswith("running_var") else noise)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in network.state_dict().items()}


def ties_of(network: nn.Module) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    pairs = []
    for name, x in network.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(x), name)) != name:
            pairs.append((other, name))
    return pairs


def built(name: str, root: Path) -> Family:
    network, _, inputs = (EXTRA[name] if name in EXTRA else HUB[name])()
    network = network.network if isinstance(network, Only) else network
    if name in HALF:
        network = network.to(torch.bfloat16)
    family = Family(network, inputs, [], [], ties_of(network))
    for number in range(3):
        if number:
            network.load_state_dict(family.states[0])
            tuned(network, number)
        folder = root / name / ("base", "one", "two")[number]
        network.save_pretrained(folder, save_original_format=not name.endswith("-fused"))
        family.folders.append(folder)
        family.states.append(state_of(network))
    return family


class Families:
    """Families by name, each made once.

    Args:
        root: folder to make them in.
    """

    def __init__(self, root: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._root = root
        self._made: dict[str, Family] = {}

    def __call__(self, name: str) -> Family:
        if name not in self._made:
            self._made[name] = built(name, self._root)
        return self._made[name]


def merge(text: str, out: Path) -> Path:
    """By the path that the command takes."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(text, "utf-8")
    recipes, warnings = read_recipes(file)
    assert warnings == ()
    return run(plan_recipes(recipes), out, threads=1)


def linear(folders: Sequence[Path], weights: Sequence[float] = WEIGHTS, **more: Any) -> str:
    models = [{"model": str(f), "weight": w} for f, w in zip(folders, weights, strict=True)]
    return json.dumps({"method": "linear", "models": models, **more})


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def loaded(network: nn.Module, folder: Path) -> nn.Module:
    """The folder as the network's class loads it, when nothing of it is missing, superfluous or new."""
    found, info = type(network).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return found.eval()


def runs(network: nn.Module, inputs: Mapping[str, Any]) -> None:
    with torch.no_grad():
        outputs = network.float()(**inputs)
    values = [x for x in outputs.to_tuple() if isinstance(x, Tensor) and x.is_floating_point()]
    assert values
    assert all(bool(torch.isfinite(x).all()) for x in values)


def check_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], ulps: float = 1.0) -> None:
    """As the expected values in float64 are, rounded to the type they are stored in."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        if x.is_floating_point():
            step = ulps * {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(x.dtype, 2**-22)
            size = expected[name].abs().max() if expected[name].numel() else 0.0
            torch.testing.assert_close(x.double(), expected[name], rtol=step, atol=float(size) * step / 2, msg=name)
        else:
            assert torch.equal(x, expected[name]), name


def mean_of(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """A plain loop in float64; counters and other integers are the first's."""
    total = sum(weights)
    return {
        name: sum(w * s[name].double() for w, s in zip(weights, states, strict=True)) / total
        if x.is_floating_point()
        else x
        for name, x in states[0].items()
    }


def store(tensors: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any], stem: str = "model") -> Path:
    folder.mkdir()
    save_file({n: x.contiguous() for n, x in tensors.items()}, folder / f"{stem}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder

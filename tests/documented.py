"""The models that README and guides speak of, and the commands that they show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "embed.weight": (40, 32),
    "layer.up.weight": (64, 32),
    "layer.up.bias": (64,),
    "layer.down.weight": (32, 64),
    "layer.mix.weight": (32, 32),
    "norm.weight": (32,),
    "head.weight": (10, 32),
}
#: A network of one's own: a function that gives it, and one that gives inputs.
NETWORK = """import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 6, generator=generator) for _ in range(4)]

def labelled():
    return [(x, torch.arange(len(x)) % 3) for x in batches()]
"""


def make_models(folder: Path) -> None:
    """Write models/base, legal and medical, adapters code-lora and chat-lora, and weights a, b and c of a network.

    b is a in another order; c is another network.
    """
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = {"base": base}
    for name in ("legal", "medical"):
        models[name] = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
    for name, tensors in models.items():
        (folder / "models" / name).mkdir(parents=True)
        save_file(tensors, folder / "models" / name / "model.safetensors")
        (folder / "models" / name / "config.json").write_text('{"model_type": "example"}')
    _make_adapter(folder / "models" / "code-lora", generator)
    (folder / "my_networks.py").write_text(NETWORK)
    a = {"0.weight": (16, 6), "0.bias": (16,), "2.weight": (3, 16), "2.bias": (3,)}
    one = {name: torch.randn(shape, generator=generator) for name, shape in a.items()}
    order = torch.randperm(16, generator=generator)
    two = {"0.weight": one["0.weight"][order], "0.bias": one["0.bias"][order], "2.weight": one["2.weight"][:, order]}
    save_file(one, folder / "a.safetensors")
    save_file({**two, "2.bias": one["2.bias"]}, folder / "b.safetensors")
    _make_adapter(folder / "models" / "chat-lora", generator)
    other = {name: torch.randn(shape, generator=generator) for name, shape in a.items()}
    save_file(other, folder / "c.safetensors")


def _make_adapter(folder: Path, generator: torch.Generator) -> None:
    folder.mkdir()
    factors = {
        "base_model.model.layer.up.lora_A.weight": torch.randn(4, 32, generator=generator),
        "base_model.model.layer.up.lora_B.weight": 0.1 * torch.randn(64, 4, generator=generator),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def console_blocks(page: Path) -> list[tuple[str, str]]:
    """(command, expected output) of every `$ merganser` line in the console blocks of a page, in order."""
    shown = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if command.startswith("merganser "):
                shown.append((command, output))
    return shown


def write_files(page: Path, folder: Path) -> None:
    """Write every YAML block of a page whose first line is a comment with a file's name."""
    for name, content in re.findall(r"```yaml\n# ([\w.-]+\.ya?ml)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        (folder / name).write_text(content, "utf-8")

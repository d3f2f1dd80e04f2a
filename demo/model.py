"""The network of the demo: a residual MLP over 64 pixels that answers by comparing with ten fixed "text" vectors.

    x_0 = stem(pixels)        x_{l+1} = x_l + down_l(gelu(up_l(norm_l(x_l))))
    logits = 10 cos(project(norm(x_L)), prototypes)

The prototypes play the part of CLIP's text embeddings: they are drawn once, saved in every checkpoint, never trained.
So all tasks share one head, and a merged model needs nothing beside its own weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """Widths and depth; they are written to config.json."""

    width: int = 192
    blocks: int = 3
    text_width: int = 64


class Block(nn.Module):
    """One residual step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the step has learnt to x, N x width."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class DigitReader(nn.Module):
    """Images, N x 8 x 8, to ten logits each."""

    prototypes: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.stem = nn.Linear(64, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.width)
        self.project = nn.Linear(sizes.width, sizes.text_width)
        drawn = torch.randn(10, sizes.text_width, generator=torch.Generator().manual_seed(7))
        self.register_buffer("prototypes", functional.normalize(drawn, dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Ten logits an image, in [-10, 10]."""
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = block(x)
        return 10 * functional.normalize(self.project(self.norm(x)), dim=1) @ self.prototypes.T


def save(model: DigitReader, folder: Path, **notes: str) -> None:
    """Write an ordinary checkpoint folder; config.json comes last, so a folder that has one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config = {"model_type": "merganser-demo", **asdict(model.sizes), **notes}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> DigitReader:
    """Read a checkpoint folder of one or several safetensors files back into a network."""
    config = json.loads((folder / "config.json").read_text())
    model = DigitReader(Sizes(config["width"], config["blocks"], config["text_width"]))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def accuracy_percent(model: DigitReader, images: Tensor, digits: Tensor) -> float:
    """Share of the images whose digit gets the largest logit, in percent."""
    return 100 * (model(images).argmax(1) == digits).double().mean().item()

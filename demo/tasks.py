"""What the eight tasks are: handwritten digits whose 16 patches of 2 x 2 pixels are laid out in another order.

Each task has an order of its own, so the digit 3 looks different in every task and no expert can read another's.
The images are scikit-learn's packaged digits (1797 of 8 x 8); nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TASKS = tuple(f"shuffle-{i}" for i in range(1, 9))
TRAIN_IMAGES = 1200


@dataclass(frozen=True)
class Split:
    """Images, N x 8 x 8 in [0, 1], and their digits, N."""

    images: Tensor
    digits: Tensor


def plain_digits() -> tuple[Split, Split]:
    """The fixed split into 1200 training and 597 test images, untouched by any task."""
    packaged = load_digits()
    images = torch.tensor(packaged.images, dtype=torch.float32) / 16
    digits = torch.tensor(packaged.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return Split(images[train], digits[train]), Split(images[test], digits[test])


def patch_order(task: str) -> Tensor:
    """Which of the 16 patches stands where; "plain" leaves them in place."""
    if task == "plain":
        return torch.arange(16)
    generator = torch.Generator().manual_seed(100 + TASKS.index(task))
    return torch.randperm(16, generator=generator)


def seen_by(task: str, split: Split) -> Split:
    """The same digits as `task` shows them."""
    patches = split.images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 2, 2)
    moved = patches[:, patch_order(task)].reshape(-1, 4, 4, 2, 2)
    return Split(moved.transpose(2, 3).reshape(-1, 8, 8), split.digits)

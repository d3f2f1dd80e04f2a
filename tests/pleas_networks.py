"""Small networks that `merganser pleas` merges in tests, and the code that makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Run = Callable[..., tuple[int, str, str]]

CODE = """
import torch
from torch import nn

def deep(classes=3):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))

def five():
    return deep(5)

def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

def other():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

def drawn(count, size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator) for _ in range(count)]

def batches():
    return drawn(3, 32)

def few():
    return drawn(1, 5)

def uneven():
    return [*drawn(2, 32), *drawn(1, 20)]

def nans():
    return [torch.full((32, 6), float("nan"))]

def labelled():
    return [(x, (x[:, 0] > 0).long()) for x in batches()]

def labelled_wrongly():
    return [(x, 7 * y) for x, y in labelled()]

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(s)) for s in ((6, 8), (8, 8), (8, 3)))

    def forward(self, x):
        return ((x @ self.a).relu() @ self.b).relu() @ self.c

def functional():
    return Functional()

def pictures():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), torch.zeros(2, 3, 4, 4)
"""  # noqa: E501

State = dict[str, Tensor]


def drawn(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def deep(seed: int, classes: int = 3) -> State:
    sizes = {"0": (8, 6), "2": (8, 8), "4": (classes, 8)}
    return drawn(
        seed, {f"{n}.{x}": s if x == "weight" else s[:1] for n, s in sizes.items() for x in ("weight", "bias")}
    )


def write_networks() -> None:
    """Networks a and b, c that is a in another order, d that is it with other labels, into the working folder."""
    Path("nets.py").write_text(CODE)
    a, b, head = deep(0), deep(1), deep(2, 5)
    first, second = (torch.randperm(8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    c = {
        "0.weight": a["0.weight"][first],
        "0.bias": a["0.bias"][first],
        "2.weight": a["2.weight"][second][:, first],
        "2.bias": a["2.bias"][second],
        "4.weight": a["4.weight"][:, second],
        "4.bias": a["4.bias"],
    }
    d = {**c, "4.weight": head["4.weight"][:, second], "4.bias": head["4.bias"]}
    networks = {"a": a, "b": b, "c": c, "d": d, "half-a": {n: x.half() for n, x in a.items()}}
    networks |= {"half-b": {n: x.half() for n, x in b.items()}}
    networks |= {"other": drawn(5, {"0.weight": (9, 6), "0.bias": (9,), "2.weight": (3, 9), "2.bias": (3,)})}
    for name, tensors in networks.items():
        save_file({n: x.contiguous() for n, x in tensors.items()}, f"{name}.safetensors")

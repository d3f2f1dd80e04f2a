"""Tiny networks that two of are merged in part, in float64, each with inputs, symmetries and two sets of weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from merganser.align.layout import Split, widened
from merganser.align.separable import separable
from merganser.study.networks import VisionTransformer
from merganser.study.small_networks import Perceptron, ResNet, Vgg
from merganser.symmetry import Spec, Symmetries, symmetries
from merganser.symmetry.checking import InDouble
from merganser.symmetry.record import tensors_of

sys.path.insert(0, str(Path(__file__).parents[1] / "symmetry"))

from hub_architectures import HUB
from tiny import Built, stir

State = dict[str, Tensor]


class Dense(nn.Module):
    """Convolutions that read all outputs before them, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (4, 7))
        self.layers = nn.ModuleList(nn.Conv2d(width, 3, 3, padding=1) for width in (4, 7))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(functional.relu(norm(x)))], 1)
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted bottlenecks: channels made by 1 x 1, a kernel of its own (twice two) for each, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.each = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.twice = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6, bias=False)
        self.down = nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = functional.relu(self.norm(self.up(x)))
        y = self.down(functional.relu(self.twice(self.each(y))))
        return self.head(functional.relu(y + functional.avg_pool2d(x, 2)).mean((2, 3)))


def pictures(network: nn.Module) -> Built:
    return network, (torch.randn(2, 8, 8, 3),), {}


def channels_first(network: nn.Module) -> Built:
    return network, (torch.randn(2, 3, 8, 8),), {}


NETWORKS: dict[str, Callable[[], Built]] = {
    "mlp": lambda: pictures(Perceptron(image=8, hidden=6, depth=2, width=5)),
    "vgg": lambda: pictures(Vgg(image=8, channels=2, width=5)),
    "resnet": lambda: pictures(ResNet(image=8, channels=4, blocks=1, width=5)),
    "resnet-group": lambda: pictures(ResNet(image=8, channels=6, blocks=1, norm="group", groups=3, width=5)),
    "dense": lambda: channels_first(Dense()),
    "depthwise": lambda: channels_first(Depthwise()),
    "small-vit": lambda: pictures(VisionTransformer(image=8, patch=4, hidden=12, depth=2, heads=3, width=5)),
    "vit": HUB["hub-vit"],
    "bert": HUB["bert"],
    "convnext": HUB["hub-convnext"],
}
#: Those that can be split whole.
WHOLE = ("mlp", "vgg", "resnet", "resnet-group", "dense", "depthwise")
TRANSFORMERS = ("vit", "bert", "convnext")


@dataclass
class Two:
    """One network and another of its architecture, which are in one order of units.

    Attributes:
        network: in evaluation mode.
        args: its inputs.
        kwargs: its named inputs.
        found: its symmetries, unchecked.
        a: its weights.
        b: the other's.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    found: Symmetries
    a: State
    b: State

    @property
    def spec(self) -> Spec:
        return self.found.spec

    def outer(self) -> list[str]:
        """Groups that lie within none."""
        return [name for name, g in self.spec.groups.items() if g.within is None and not g.fixed]

    def all_apart(self, groups: Iterable[str] | None = None) -> dict[str, Split]:
        sizes = {g: self.spec.groups[g].size for g in (self.outer() if groups is None else groups)}
        return {group: Split(size, tuple(range(size))) for group, size in sizes.items()}

    def some_apart(self, groups: Iterable[str] | None = None) -> dict[str, Split]:
        """Every other unit from the second on, and so more merged than apart where there is an odd number."""
        sizes = {g: self.spec.groups[g].size for g in (self.outer() if groups is None else groups)}
        return {group: Split(size, tuple(range(1, size, 2))) for group, size in sizes.items()}

    def wide(self, splits: Mapping[str, Split], b: State | None = None) -> State:
        """Weights of the wider network."""
        return {n: widened(self.spec, n, x, (b or self.b)[n], splits) for n, x in self.a.items()}

    def run(self, network: nn.Module) -> Tensor:
        """Its first output, in float64 throughout."""
        with torch.no_grad(), InDouble():
            return tensors_of(network(*self.args, **self.kwargs), None)[0]

    def outputs(self, state: State) -> Tensor:
        """What the network of one's size gives with these weights."""
        with torch.no_grad(), InDouble():
            result = torch.func.functional_call(self.network, state, self.args, dict(self.kwargs), tie_weights=False)
        return tensors_of(result, None)[0]


def stirred(state: Mapping[str, Tensor], seed: int) -> State:
    """Other weights of the same kind; tied ones stay one."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[int, Tensor] = {}
    for name, x in state.items():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        moved = x * torch.exp(0.3 * noise) if name.endswith("running_var") else x + 0.2 * noise
        known.setdefault(x.data_ptr(), moved if x.is_floating_point() else x.clone())
    return {name: known[x.data_ptr()] for name, x in state.items()}


@cache
def two(name: str) -> Two:
    torch.manual_seed(0)
    return of(*NETWORKS[name]())


@cache
def reasons_of(name: str) -> dict[str, str | None]:
    """Why each group cannot be split, or None where it can."""
    it = two(name)
    return separable(it.found, it.network, it.args, it.kwargs)


def free(name: str) -> list[str]:
    """Groups that can be split."""
    return [group for group, why in reasons_of(name).items() if why is None]


def of(network: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Two:
    """Two of a network."""
    network = network.double().eval()
    stir(network)
    args, kwargs = (tree_map_only(Tensor, _double, x) for x in (args, dict(kwargs or {})))
    found = symmetries(network, args, kwargs, check=False)
    state = {n: x.detach() for n, x in network.state_dict().items()}
    return Two(network, args, kwargs, found, state, stirred(state, 1))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def relative(one: Tensor, two: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert one.shape == two.shape
    return float((one - two).abs().max() / two.abs().max())

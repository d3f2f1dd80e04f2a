"""Small networks to train on pictures: ResNet-20 of any width, VGG without BatchNorm, and an MLP.

ResNet: He et al. 2016, arXiv:1512.03385, section 4.2; shortcuts are convolutions of 3 x 3, as where ZipIt and MuDSC
were measured. VGG-11: Simonyan & Zisserman 2015, arXiv:1409.1556, with one linear layer behind the convolutions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from merganser.errors import ParameterError
from merganser.study.networks import PixelEncoder, check_sizes

NORMS = ("batch", "group")


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, which is one too where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, outputs, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), _norm(norm, outputs, groups)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, inputs, side, side) to (n, outputs, side / stride, side / stride)."""
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def _norm(kind: str, channels: int, groups: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(groups, channels)


class ResNet(PixelEncoder):
    """Three stages of residual blocks, 6 blocks + 2 layers deep.

    Args:
        image: side of the pictures in pixels.
        channels: of the first stage; 16 is width 1, 64 is width 4.
        blocks: of each stage; 3 is ResNet-20.
        norm: "batch" or "group".
        groups: of GroupNorm.
        width: of the embedding.
    """

    def __init__(
        self,
        image: int = 32,
        channels: int = 16,
        blocks: int = 3,
        norm: str = "batch",
        groups: int = 8,
        width: int = 64,
    ) -> None:
        super().__init__()
        check_sizes(image=image, channels=channels, blocks=blocks, groups=groups, width=width)
        if norm not in NORMS:
            raise ParameterError(f"norm is {norm!r}; it is {' or '.join(NORMS)}")
        if norm == "group" and channels % groups:
            raise ParameterError(f"groups {groups} must divide channels {channels}")
        self.image, self.width = image, width
        self._sizes = {"channels": channels, "blocks": blocks, "norm": norm, "groups": groups}
        self.conv, self.norm = nn.Conv2d(3, channels, 3, 1, 1, bias=False), _norm(norm, channels, groups)
        made, inputs = [], channels
        for stage in range(3):
            for block in range(blocks):
                outputs = channels * 2**stage
                made.append(_Residual(inputs, outputs, 2 if stage and not block else 1, norm, groups))
                inputs = outputs
        self.blocks = nn.Sequential(*made)
        self.project = nn.Linear(inputs, width)

    def embed(self, prepared: list[Any] | Tensor) -> Tensor:
        """Convolve, take the mean over places, project."""
        x = functional.relu(self.norm(self.conv(self.pixels(prepared).movedim(-1, 1))))
        y: Tensor = self.project(self.blocks(x).mean((2, 3)))
        return y

    def config(self) -> dict[str, Any]:
        """Sizes."""
        return {"model_type": "merganser-resnet", "image": self.image, **self._sizes, "width": self.width}


class Vgg(PixelEncoder):
    """VGG-11 without a norm: convolutions, each pooled to half the side where the plan says so, and one linear layer.

    Args:
        image: side of the pictures in pixels, a power of 2.
        channels: of the first convolution; 64 is VGG-11 of width 1.
        width: of the embedding.
    """

    #: Multiples of `channels`, and whether the picture is halved after it.
    PLAN = ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True))

    def __init__(self, image: int = 32, channels: int = 64, width: int = 64) -> None:
        super().__init__()
        check_sizes(image=image, channels=channels, width=width)
        if image & (image - 1):
            raise ParameterError(f"image is {image}; it is a power of 2, since it is halved")
        self.image, self.width, self._channels = image, width, channels
        made: list[nn.Module] = []
        inputs, side = 3, image
        for factor, halves in self.PLAN:
            made += [nn.Conv2d(inputs, factor * channels, 3, 1, 1), nn.ReLU()]
            nn.init.kaiming_normal_(made[-2].get_parameter("weight"), nonlinearity="relu")
            inputs = factor * channels
            if halves and side > 1:
                made.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*made)
        self.project = nn.Linear(inputs, width)

    def embed(self, prepared: list[Any] | Tensor) -> Tensor:
        """Convolve, take the mean over places, project."""
        y: Tensor = self.project(self.features(self.pixels(prepared).movedim(-1, 1)).mean((2, 3)))
        return y

    def config(self) -> dict[str, Any]:
        """Sizes."""
        sizes = {"image": self.image, "channels": self._channels, "width": self.width}
        return {"model_type": "merganser-vgg", **sizes}


class Perceptron(PixelEncoder):
    """Linear layers over all pixels and colours, with ReLU between them.

    Args:
        image: side of the pictures in pixels.
        hidden: units of a layer.
        depth: hidden layers.
        width: of the embedding.
    """

    def __init__(self, image: int = 32, hidden: int = 512, depth: int = 3, width: int = 64) -> None:
        super().__init__()
        check_sizes(image=image, hidden=hidden, depth=depth, width=width)
        self.image, self.width = image, width
        self._sizes = {"image": image, "hidden": hidden, "depth": depth, "width": width}
        sides = [3 * image * image, *[hidden] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sides))
        self.project = nn.Linear(hidden, width)

    def embed(self, prepared: list[Any] | Tensor) -> Tensor:
        """Flatten, transform, project."""
        x = self.pixels(prepared).flatten(1)
        for layer in self.layers:
            x = functional.relu(layer(x))
        y: Tensor = self.project(x)
        return y

    def config(self) -> dict[str, Any]:
        """Sizes."""
        return {"model_type": "merganser-perceptron", **self._sizes}


SMALL: dict[str, type[PixelEncoder]] = {
    "merganser-resnet": ResNet,
    "merganser-vgg": Vgg,
    "merganser-perceptron": Perceptron,
}

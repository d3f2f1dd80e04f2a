"""Tiny convolutional networks with the structure of their papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import CLASSES, Builder, pictures, tiny
from torch import Tensor, nn
from torch.nn import functional


def conv(
    i: int, o: int, k: int = 3, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    layers: list[nn.Module] = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


def head(width: int) -> nn.Sequential:
    """Mean over all places, then logits."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Residual(nn.Module):
    """A branch added to a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut, self.last = branch, shortcut or nn.Identity(), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += self.shortcut(x)
        return self.last(y)


# plain


def vgg(norm: bool) -> nn.Module:
    """VGG; pictures are flattened with their places where there is no BatchNorm, and averaged where there is."""
    layers: list[nn.Module] = []
    for i, o in ((3, 16), (16, 16), (16, 24), (24, 24)):
        layers += [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU(inplace=True)]
        if i == o:
            layers.append(nn.MaxPool2d(2))
    hidden = [nn.Linear(24 if norm else 24 * 16, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1 if norm else 4), nn.Flatten(), *hidden)


# residual


class ZeroPadded(nn.Module):
    """Option A of He et al.: every other place, zeros for the channels that are not there."""

    def forward(self, x: Tensor) -> Tensor:
        more = x.shape[1] // 2
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))


def basic(i: int, o: int, stride: int, *, padded: bool = False) -> nn.Module:
    """Two 3x3 convolutions."""
    same = i == o and stride == 1
    shortcut = ZeroPadded() if padded else conv(i, o, 1, stride=stride, act=None)
    return Residual(
        nn.Sequential(conv(i, o, stride=stride), conv(o, o, act=None)),
        None if same else shortcut,
        nn.ReLU(inplace=True),
    )


def resnet(padded: bool = False) -> nn.Module:
    """ResNet of basic blocks."""
    blocks = [basic(i, o, s, padded=padded) for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 32, 1))]
    return nn.Sequential(conv(3, 16), *blocks, head(32))


def resnet_gn() -> nn.Module:
    """ResNet with GroupNorm."""

    def block(i: int, o: int, stride: int) -> nn.Module:
        first = [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(4, o), nn.ReLU()]
        branch = nn.Sequential(*first, nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.GroupNorm(4, o))
        shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.GroupNorm(4, o))
        return Residual(branch, None if i == o else shortcut, nn.ReLU())

    stem = [nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU()]
    return nn.Sequential(*stem, block(16, 16, 1), block(16, 24, 2), head(24))


class PreActivation(nn.Module):
    """Block of a wide ResNet: the shortcut starts after the first activation where widths differ."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(i), nn.ReLU())
        layers = [nn.BatchNorm2d(o), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(o, o, 3, 1, 1, bias=False)]
        self.branch = nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), *layers)
        self.shortcut = None if i == o else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.branch(y) + (x if self.shortcut is None else self.shortcut(y))


def wide_resnet() -> nn.Module:
    """Wide ResNet."""
    blocks = [PreActivation(8, 16, 1), PreActivation(16, 16, 1), PreActivation(16, 32, 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), *blocks, nn.BatchNorm2d(32), nn.ReLU(), head(32))


class SqueezeExcite(nn.Module):
    """A factor for every channel, from the means of all."""

    def __init__(
        self, width: int, inner: int, act: type[nn.Module] = nn.ReLU, gate: type[nn.Module] = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.factor = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, inner, 1), act(), nn.Conv2d(inner, width, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(x)


class EfficientChannels(nn.Module):
    """ECA: a factor for every channel, from its neighbours, so that the order of channels matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)).unsqueeze(1)
        return x * torch.sigmoid(self.conv(means)).transpose(1, 2).unsqueeze(-1)


def bottleneck(
    i: int, inner: int, o: int, *, stride: int = 1, groups: int = 1, last: nn.Module | None = None
) -> nn.Module:
    """1x1, 3x3, 1x1."""
    branch = [conv(i, inner, 1), conv(inner, inner, stride=stride, groups=groups), conv(inner, o, 1, act=None)]
    shortcut = None if i == o else conv(i, o, 1, stride=stride, act=None)
    return Residual(nn.Sequential(*branch, *([last] if last else [])), shortcut, nn.ReLU(inplace=True))


def bottlenecks(groups: int = 1, inner: int = 16, channels: Callable[[], nn.Module] | None = None) -> nn.Module:
    """ResNet-50, ResNeXt, RegNet, SE-ResNet or ECA-Net, by what its blocks hold."""
    blocks = [
        bottleneck(i, inner, 40, stride=s, groups=groups, last=channels() if channels else None)
        for i, s in ((24, 2), (40, 1))
    ]
    return nn.Sequential(conv(3, 24), nn.MaxPool2d(3, 2, 1), *blocks, head(40))


# concatenated


class Dense(nn.Module):
    """A layer of DenseNet: what it makes is put after what it was given."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, 2 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(2 * growth), nn.ReLU(), nn.Conv2d(2 * growth, growth, 3, 1, 1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def densenet() -> nn.Module:
    """DenseNet-BC of two blocks."""
    between = [nn.BatchNorm2d(28), nn.ReLU(), nn.Conv2d(28, 14, 1, bias=False), nn.AvgPool2d(2)]
    first, second = [Dense(16, 6), Dense(22, 6)], [Dense(14, 6), Dense(20, 6)]
    return nn.Sequential(conv(3, 16), *first, *between, *second, nn.BatchNorm2d(26), nn.ReLU(), head(26))


class Branches(nn.Module):
    """Branches side by side, one after the other along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def squeezenet() -> nn.Module:
    """SqueezeNet: fire modules, logits by a convolution."""

    def fire(i: int, squeezed: int, o: int) -> nn.Module:
        one = nn.Sequential(nn.Conv2d(squeezed, o, 1), nn.ReLU(inplace=True))
        three = nn.Sequential(nn.Conv2d(squeezed, o, 3, padding=1), nn.ReLU(inplace=True))
        return nn.Sequential(nn.Conv2d(i, squeezed, 1), nn.ReLU(inplace=True), Branches(one, three))

    last = [nn.Dropout(), nn.Conv2d(40, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(nn.Conv2d(3, 24, 3, 2), nn.ReLU(), pool, fire(24, 8, 16), fire(32, 10, 20), *last)


def inception() -> nn.Module:
    """GoogLeNet: modules of four branches."""

    def module(i: int) -> nn.Module:
        double = nn.Sequential(conv(i, 6, 1), conv(6, 10), conv(10, 10))
        pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(i, 6, 1))
        return Branches(conv(i, 8, 1), nn.Sequential(conv(i, 12, 1), conv(12, 16)), double, pooled)

    return nn.Sequential(conv(3, 16, stride=2), module(16), module(40), head(40))


# mobile


def inverted(
    i: int, inner: int, o: int, *, stride: int = 1, act: type[nn.Module] = nn.ReLU6, excite: nn.Module | None = None
) -> nn.Module:
    """Wide depthwise convolution between two narrow ends."""
    branch = nn.Sequential(
        *(conv(i, inner, 1, act=act), conv(inner, inner, stride=stride, groups=inner, act=act)),
        *([excite] if excite else []),
        conv(inner, o, 1, act=None),
    )
    return Residual(branch) if stride == 1 and i == o else branch


def mobilenet_v1() -> nn.Module:
    """MobileNet: depthwise, then pointwise."""
    pairs = ((16, 24, 1), (24, 40, 2), (40, 40, 1))
    layers = [nn.Sequential(conv(i, i, stride=s, groups=i), conv(i, o, 1)) for i, o, s in pairs]
    return nn.Sequential(conv(3, 16, stride=2), *layers, head(40))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2: inverted residuals."""
    blocks = [inverted(16, 32, 16), inverted(16, 48, 24, stride=2), inverted(24, 48, 24)]
    return nn.Sequential(conv(3, 16, stride=2, act=nn.ReLU6), *blocks, conv(24, 56, 1, act=nn.ReLU6), head(56))


def mobilenet_v3() -> nn.Module:
    """MobileNetV3: with squeeze-and-excitation, and a hidden layer before the logits."""
    excites = [SqueezeExcite(n, 8, gate=nn.Hardsigmoid) for n in (32, 48)]
    blocks = [
        inverted(16, 32, 16, act=nn.ReLU, excite=excites[0]),
        inverted(16, 48, 24, stride=2, act=nn.Hardswish, excite=excites[1]),
    ]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(56, 64), nn.Hardswish(), nn.Linear(64, CLASSES)]
    return nn.Sequential(conv(3, 16, act=nn.Hardswish), *blocks, conv(24, 56, 1, act=nn.Hardswish), *last)


def efficientnet() -> nn.Module:
    """EfficientNet: MBConv blocks."""
    blocks = [
        inverted(16, 32, 16, act=nn.SiLU, excite=SqueezeExcite(32, 4, nn.SiLU)),
        inverted(16, 48, 24, stride=2, act=nn.SiLU, excite=SqueezeExcite(48, 4, nn.SiLU)),
        inverted(24, 56, 24, act=nn.SiLU, excite=SqueezeExcite(56, 6, nn.SiLU)),
    ]
    return nn.Sequential(conv(3, 16, act=nn.SiLU), *blocks, conv(24, 64, 1, act=nn.SiLU), head(64))


class Shuffled(nn.Module):
    """Unit of ShuffleNetV2: half of the channels go through, then halves are shuffled."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        half, self.down = o // 2, i != o
        start, stride = (i, 2) if self.down else (half, 1)
        middle = conv(half, half, stride=stride, groups=half, act=None)
        self.right = nn.Sequential(conv(start, half, 1), middle, conv(half, half, 1))
        self.left = nn.Sequential(conv(i, i, stride=2, groups=i, act=None), conv(i, half, 1)) if self.down else None

    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.left(x), x) if self.left is not None else x.chunk(2, dim=1)
        y = torch.cat([one, self.right(two)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2."""
    return nn.Sequential(conv(3, 12), Shuffled(12, 32), Shuffled(32, 32), Shuffled(32, 32), conv(32, 40, 1), head(40))


# modern


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels of a picture."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NextBlock(nn.Module):
    """Block of ConvNeXt: depthwise 7x7, then an MLP with channels last, scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.mlp(y)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """ConvNeXt."""
    stem = [nn.Conv2d(3, 16, 4, 4), ChannelNorm(16)]
    down = [ChannelNorm(16), nn.Conv2d(16, 24, 2, 2)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, CLASSES)]
    return nn.Sequential(*stem, NextBlock(16), NextBlock(16), *down, NextBlock(24), *last)


class SelectiveKernels(nn.Module):
    """SKNet: a softmax between two branches, channel by channel."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv(width, width, k, groups=4) for k in (3, 5))
        self.squeeze, self.choose = nn.Linear(width, inner), nn.Linear(inner, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([branch(x) for branch in self.branches], 1)
        code = torch.relu(self.squeeze(both.sum(1).mean((2, 3))))
        share = self.choose(code).view(len(x), 2, -1).softmax(1)
        return (both * share[..., None, None]).sum(1)


def sknet() -> nn.Module:
    """SKNet."""
    return nn.Sequential(conv(3, 16), SelectiveKernels(16, 10), conv(16, 24, 1), head(24))


CONVOLUTIONAL: dict[str, Builder] = {
    "vgg": tiny(vgg, pictures, norm=False),
    "vgg-bn": tiny(vgg, pictures, norm=True),
    "resnet": tiny(resnet, pictures),
    "resnet-option-a": tiny(resnet, pictures, padded=True),
    "resnet-gn": tiny(resnet_gn, pictures),
    "wide-resnet": tiny(wide_resnet, pictures),
    "resnet-bottleneck": tiny(bottlenecks, pictures),
    "resnext": tiny(bottlenecks, pictures, groups=4),
    "regnet": tiny(bottlenecks, pictures, groups=5, inner=40),
    "se-resnet": tiny(bottlenecks, pictures, channels=lambda: SqueezeExcite(40, 10)),
    "eca-net": tiny(bottlenecks, pictures, channels=EfficientChannels),
    "densenet": tiny(densenet, pictures),
    "squeezenet": tiny(squeezenet, pictures),
    "inception": tiny(inception, pictures),
    "mobilenet-v1": tiny(mobilenet_v1, pictures),
    "mobilenet-v2": tiny(mobilenet_v2, pictures),
    "mobilenet-v3": tiny(mobilenet_v3, pictures),
    "efficientnet": tiny(efficientnet, pictures),
    "shufflenet-v2": tiny(shufflenet_v2, pictures),
    "convnext": tiny(convnext, pictures),
    "sknet": tiny(sknet, pictures),
}

"""Tiny networks that make pictures, with the structure of their papers."""

from __future__ import annotations

import torch
from attention_architectures import FusedAttention
from convolutional_architectures import Residual, conv
from tiny import Builder, pictures, tiny
from torch import Tensor, nn
from torch.nn import functional


class UNet(nn.Module):
    """U-Net of two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = (nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((3, 16), (16, 32)))
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = nn.Sequential(conv(32, 16), conv(16, 16), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = self.up(self.middle(functional.max_pool2d(skip, 2)))
        return self.last(torch.cat([skip, up], 1))


def super_resolution() -> nn.Module:
    """EDSR: residual blocks without a norm, then sub-pixel convolution."""

    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 16, 3, 1, 1)))

    body = Residual(nn.Sequential(block(), block(), nn.Conv2d(16, 16, 3, 1, 1)))
    up = [nn.Conv2d(16, 48, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU(12), nn.Conv2d(12, 3, 3, 1, 1)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), body, *up)


def generator() -> nn.Module:
    """DCGAN: transposed convolutions from a vector."""
    layers: list[nn.Module] = [nn.Unflatten(1, (12, 1, 1))]
    for i, o, stride, padding in ((12, 24, 1, 0), (24, 16, 2, 1)):
        layers += [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())


def autoencoder() -> nn.Module:
    """Convolutional autoencoder with a code of 20 numbers."""
    encoder = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    code = [nn.Linear(24 * 16, 20), nn.Linear(20, 24 * 16), nn.ReLU(), nn.Unflatten(1, (24, 4, 4))]
    decoder = [nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, 1, 1)]
    return nn.Sequential(*encoder, *code, *decoder)


class TimedBlock(nn.Module):
    """Residual block of a diffusion network: GroupNorm, SiLU, convolution, twice; the time is added in between."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, 1, 1), nn.Linear(28, o)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, 1, 1)
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(functional.silu(self.norm2(y)))


class DiffusionUNet(nn.Module):
    """U-Net of DDPM: sines of the time, attention in the middle, norms over what skips have joined."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(10, 28), nn.SiLU(), nn.Linear(28, 28), nn.SiLU())
        self.first, self.left, self.shrink = nn.Conv2d(3, 16, 3, 1, 1), TimedBlock(16, 16), nn.Conv2d(16, 16, 3, 2, 1)
        self.middle, self.norm, self.attention = TimedBlock(16, 24), nn.GroupNorm(4, 24), FusedAttention(24, 3)
        self.grow, self.right = nn.Conv2d(24, 24, 3, 1, 1), TimedBlock(40, 16)
        self.last = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, 1, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * 10 ** -torch.arange(5.0)
        t = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.left(self.first(x), t)
        y = self.middle(self.shrink(skip), t)
        n, c, h, w = y.shape
        y = y + self.attention(self.norm(y).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)
        y = self.grow(functional.interpolate(y, scale_factor=2, mode="nearest"))
        return self.last(self.right(torch.cat([y, skip], 1), t))


def style_transfer() -> nn.Module:
    """Johnson et al.: InstanceNorm, reflected borders."""

    def layer(i: int, o: int, k: int, stride: int = 1) -> list[nn.Module]:
        return [nn.ReflectionPad2d(k // 2), nn.Conv2d(i, o, k, stride), nn.InstanceNorm2d(o, affine=True)]

    block = Residual(nn.Sequential(*layer(24, 24, 3), nn.ReLU(), *layer(24, 24, 3)))
    up = [nn.Upsample(scale_factor=2), *layer(24, 16, 3), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(16, 3, 3)]
    return nn.Sequential(*layer(3, 16, 5), nn.ReLU(), *layer(16, 24, 3, 2), nn.ReLU(), block, *up)


class QuantisedAutoencoder(nn.Module):
    """VQ-VAE: every place gets the nearest of a table of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 20, 4, 2, 1))
        self.codes = nn.Embedding(13, 20)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(20, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x).permute(0, 2, 3, 1)
        table = self.codes.weight
        apart = z.pow(2).sum(-1, keepdim=True) - 2 * z @ table.T + table.pow(2).sum(1)
        return self.decoder(self.codes(apart.argmin(-1)).permute(0, 3, 1, 2))


GENERATIVE: dict[str, Builder] = {
    "unet": tiny(UNet, pictures),
    "super-resolution": tiny(super_resolution, pictures),
    "dcgan-generator": tiny(generator, lambda: torch.randn(2, 12)),
    "conv-autoencoder": tiny(autoencoder, pictures),
    "diffusion-unet": tiny(DiffusionUNet, lambda: (pictures(), torch.tensor([3.0, 7.0]))),
    "style-transfer": tiny(style_transfer, pictures),
    "vq-vae": tiny(QuantisedAutoencoder, pictures),
}

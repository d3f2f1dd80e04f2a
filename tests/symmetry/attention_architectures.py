"""Tiny vision transformers, and other networks that mix patches, with the structure of their papers."""

from __future__ import annotations

import torch
from tiny import CLASSES, Builder, pictures, tiny
from torch import Tensor, nn
from torch.nn import functional


class Patches(nn.Module):
    """A picture as a sequence of patches, with learned places and tokens before them."""

    def __init__(self, width: int, patch: int, count: int, extra: int = 0) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, extra, width))
        self.places = nn.Parameter(torch.randn(1, count + extra, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.extra.expand(len(x), -1, -1), y], 1) + self.places


class SeparateAttention(nn.Module):
    """Queries, keys and values by projections of their own; softmax written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (
            layer(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class FusedAttention(nn.Module):
    """All three by one projection, taken apart as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class CrossCovariance(nn.Module):
    """Attention of XCiT: between the units of a head, over normalised tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(n, t, c))


class TalkingHeads(SeparateAttention):
    """Scores and weights are mixed between heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3) for layer in (self.q, self.k, self.v)
        )
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1))
        weights = self.after(scores.softmax(-2)).permute(0, 3, 1, 2)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Two residual branches, each after a norm."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module, *norms: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp, (self.norm1, self.norm2) = mixer, mlp, norms

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def mlp(width: int, inner: int) -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def block(mixer: nn.Module, width: int, inner: int) -> nn.Module:
    """Block with LayerNorm."""
    return Block(mixer, mlp(width, inner), nn.LayerNorm(width), nn.LayerNorm(width))


class First(nn.Module):
    """Logits from the first token, or from the mean of two heads on the first two."""

    def __init__(self, width: int, distilled: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(1 + distilled))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.heads)]).mean(0)


class Mean(nn.Module):
    """Logits from the mean of all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


def vit(attention: type[nn.Module], distilled: bool = False) -> nn.Module:
    """ViT, or DeiT with its distillation token."""
    blocks = [block(attention(32, 4), 32, 48) for _ in range(2)]
    return nn.Sequential(Patches(32, 8, 4, 1 + distilled), *blocks, nn.LayerNorm(32), First(32, distilled))


# windows


class WindowAttention(nn.Module):
    """Attention of Swin in windows of 4x4, shifted or not, with a table of biases for relative places."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(49, heads))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None]) + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])
        parts = (torch.arange(side) >= side - 4).long() + (torch.arange(side) >= side - shift).long()
        region = self.windows((parts[:, None] * 3 + parts)[None, :, :, None].float()).squeeze(-1)
        self.register_buffer("mask", (region[:, None] != region[:, :, None]).float() * -100 if shift else None)

    def windows(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        return x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, c)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        y = x.view(n, self.side, self.side, c)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.windows(y)
        count = len(y)
        q, k, v = self.qkv(y).reshape(count, 16, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1).contiguous()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        if self.mask is not None:
            some = len(self.mask)
            scores = scores.view(-1, some, self.heads, 16, 16) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, 16, 16)
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, 16, c))
        per = self.side // 4
        y = y.view(n, per, per, 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(n, self.side, self.side, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return y.reshape(n, t, c)


class Merging(nn.Module):
    """Patch merging: four neighbours become one token."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(len(x), self.side, self.side, -1)
        y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(y.view(len(x), self.side**2 // 4, -1)))


class PlainPatches(nn.Module):
    """Patches with a norm, without places."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Conv2d(3, width, patch, patch), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(x).flatten(2).transpose(1, 2))


def swin() -> nn.Module:
    """Swin of two stages."""
    stages = [block(WindowAttention(24, 3, 8, s), 24, 40) for s in (0, 2)]
    last = block(WindowAttention(48, 6, 4, 0), 48, 56)
    return nn.Sequential(PlainPatches(24, 2), *stages, Merging(24, 8), last, nn.LayerNorm(48), Mean(48))


# without attention


class Turned(nn.Module):
    """A network over tokens instead of over their units."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.transpose(1, 2)).transpose(1, 2)


class Affine(nn.Module):
    """Scale and shift of ResMLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class GatedTokens(nn.Module):
    """Block of gMLP: half of the units, mixed over tokens, multiply the other half."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.gate_norm, self.mix = nn.LayerNorm(inner), nn.Conv1d(count, count, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = functional.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.mix(self.gate_norm(v)))


class Pooling(nn.Module):
    """Token mixer of PoolFormer."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


class PoolBlock(nn.Module):
    """Block of PoolFormer: GroupNorm of one group, scales of layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer = nn.GroupNorm(1, width), nn.GroupNorm(1, width), Pooling()
        self.mlp = nn.Sequential(nn.Conv2d(width, inner, 1), nn.GELU(), nn.Conv2d(inner, width, 1))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1[:, None, None] * self.mixer(self.norm1(x))
        return x + self.scale2[:, None, None] * self.mlp(self.norm2(x))


def mixer() -> nn.Module:
    """MLP-Mixer."""
    blocks = [block(Turned(mlp(4, 20)), 32, 48) for _ in range(2)]
    return nn.Sequential(PlainPatches(32, 8), *blocks, nn.LayerNorm(32), Mean(32))


def gmlp() -> nn.Module:
    """Vision gMLP."""
    blocks = [GatedTokens(24, 40, 4) for _ in range(2)]
    return nn.Sequential(PlainPatches(24, 8), *blocks, nn.LayerNorm(24), Mean(24))


def resmlp() -> nn.Module:
    """ResMLP: affine maps for norms."""
    blocks = [Block(Turned(nn.Linear(4, 4)), mlp(24, 40), Affine(24), Affine(24)) for _ in range(2)]
    return nn.Sequential(PlainPatches(24, 8), *blocks, Affine(24), Mean(24))


def poolformer() -> nn.Module:
    """PoolFormer of two stages."""
    last = [nn.GroupNorm(1, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)]
    down = nn.Conv2d(24, 32, 3, 2, 1)
    return nn.Sequential(nn.Conv2d(3, 24, 7, 4, 2), PoolBlock(24, 40), down, PoolBlock(32, 48), *last)


ATTENTION: dict[str, Builder] = {
    "vit": tiny(vit, pictures, attention=SeparateAttention),
    "vit-fused": tiny(vit, pictures, attention=FusedAttention),
    "deit": tiny(vit, pictures, attention=FusedAttention, distilled=True),
    "xcit": tiny(vit, pictures, attention=CrossCovariance),
    "cait": tiny(vit, pictures, attention=TalkingHeads),
    "swin": tiny(swin, pictures),
    "mlp-mixer": tiny(mixer, pictures),
    "gmlp": tiny(gmlp, pictures),
    "resmlp": tiny(resmlp, pictures),
    "poolformer": tiny(poolformer, pictures),
}

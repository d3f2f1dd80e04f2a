"""Tiny transformers of sequences: torch's own layers, and language models with the structure of their papers."""

from __future__ import annotations

import torch
from attention_architectures import Block, Mean, SeparateAttention, block
from tiny import VOCABULARY, Builder, sequences, tiny, tokens
from torch import Tensor, nn
from torch.nn import functional

# torch's own layers


def torch_encoder(norm_first: bool) -> nn.Module:
    """nn.TransformerEncoder."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first, activation="gelu")
    return nn.Sequential(nn.Linear(12, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), Mean(32))


class TorchTransformer(nn.Module):
    """nn.Transformer with encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 4, 1, 2, 48, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention alone, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(12, 32), nn.MultiheadAttention(32, 4), Mean(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).transpose(0, 1)
        return self.head(self.attention(y, y, y)[0].transpose(0, 1))


# language


class SplitAttention(nn.Module):
    """All three by one projection, split on the last axis as in nanoGPT; causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (y.view(n, t, self.heads, c // self.heads).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        weights = weights.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).contiguous().view(n, t, c))


class GPT(nn.Module):
    """GPT-2 as in nanoGPT: learned places, tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, 32), nn.Embedding(16, 32)
        self.blocks = nn.Sequential(*(block(SplitAttention(32, 4), 32, 48) for _ in range(2)))
        self.norm, self.lm_head = nn.LayerNorm(32), nn.Linear(32, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.lm_head(self.norm(self.blocks(x)))


class RootMeanSquare(nn.Module):
    """RMSNorm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def rotated(x: Tensor) -> Tensor:
    """Rotary places: halves of a head's units are turned against each other."""
    t, d = x.shape[-2:]
    angles = torch.arange(t)[:, None] / 100 ** (torch.arange(0, d, 2) / d)
    cos, sin = (torch.cat([f(angles), f(angles)], -1).to(x.dtype) for f in (torch.cos, torch.sin))
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class GroupedAttention(nn.Module):
    """Attention of Llama: two queries share each key and value."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.few, self.many, self.size = heads // shared, shared, width // heads
        self.wq, self.wo = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(width, width // shared, bias=False) for _ in range(2))

    def repeated(self, x: Tensor) -> Tensor:
        n, h, t, d = x.shape
        return x[:, :, None].expand(n, h, self.many, t, d).reshape(n, h * self.many, t, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, self.size).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        k, v = self.repeated(rotated(k)), self.repeated(v)
        y = functional.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(n, t, -1))


class SwiGLU(nn.Module):
    """Gated MLP of Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


def llama() -> nn.Module:
    """Llama with grouped queries."""
    norms = [RootMeanSquare(32) for _ in range(5)]
    blocks = [Block(GroupedAttention(32, 4, 2), SwiGLU(32, 48), *norms[2 * i : 2 * i + 2]) for i in range(2)]
    return nn.Sequential(nn.Embedding(VOCABULARY, 32), *blocks, norms[4], nn.Linear(32, VOCABULARY, bias=False))


class Perceiver(nn.Module):
    """Perceiver: learned latents look at the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.embed = nn.Parameter(torch.randn(1, 3, 32)), nn.Linear(12, 32)
        self.look, self.block, self.head = SeparateAttention(32, 4), block(SeparateAttention(32, 4), 32, 48), Mean(32)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(len(x), -1, -1)
        return self.head(self.block(z + self.look(z, self.embed(x))))


SEQUENCE: dict[str, Builder] = {
    "torch-encoder": tiny(torch_encoder, sequences, norm_first=False),
    "torch-encoder-norm-first": tiny(torch_encoder, sequences, norm_first=True),
    "torch-transformer": tiny(TorchTransformer, lambda: (tokens(), tokens()[:, :5])),
    "torch-attention": tiny(TorchAttention, sequences),
    "gpt": tiny(GPT, tokens),
    "llama": tiny(llama, tokens),
    "perceiver": tiny(Perceiver, sequences),
}

"""Networks that exist to mislead the rules: one formula each, most with `up` before it and `down` after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import CLASSES, Builder, sequences, tiny, vectors
from torch import Tensor, nn
from torch.nn import functional

Formula = Callable[..., Tensor]
STRESS: dict[str, Builder] = {}


class Network(nn.Module):
    """A formula over parts: modules, parameters and constants."""

    def __init__(self, formula: Formula, **parts: Callable[[], Any]) -> None:
        super().__init__()
        self.formula = formula
        for name, make in parts.items():
            setattr(self, name, make())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.formula(self, *inputs)


def linear(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


def weight(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*shape) / 3)


def stress(inputs: Callable[[], Any] = vectors, into: int = 24, **parts: Any) -> Callable[[Formula], Formula]:
    """Register a formula: `up` gives 24 units, `down` takes `into`; other parts by their names."""

    def keep(formula: Formula) -> Formula:
        own = {"up": linear(12, 24), "down": linear(into, CLASSES), **parts}
        used = {name: make for name, make in own.items() if make is not None}
        STRESS[formula.__name__] = tiny(lambda: Network(formula, **used), inputs)
        return formula

    return keep


def heads(it: Network, x: Tensor) -> Tensor:
    """Four heads of six units."""
    return it.up(x).view(len(x), 4, 6)


# heads and their units: who has an order of its own


@stress(into=16)
def products_of_heads(it, x):
    h = heads(it, x)
    return it.down((h @ h.mT).flatten(1))


@stress(into=36)
def products_of_units(it, x):
    h = heads(it, x)
    return it.down((h.mT @ h).flatten(1))


@stress()
def attention_among_heads(it, x):
    h = heads(it, x)
    return it.down(((h @ h.mT).softmax(-1) @ h).flatten(1))


@stress()
def softmax_over_heads(it, x):
    return it.down(heads(it, x).softmax(1).flatten(1))


@stress()
def norm_over_heads(it, x):
    return it.down(functional.layer_norm(heads(it, x).mT, (4,)).mT.flatten(1))


@stress()
def length_over_heads(it, x):
    h = heads(it, x)
    return it.down((h / h.norm(dim=1, keepdim=True)).flatten(1))


@stress(mix=weight(4, 4))
def mixed_heads(it, x):
    h = heads(it, x)
    return it.down((h * it.mix.softmax(-1).matmul(h)).flatten(1))


@stress(into=6)
def mean_over_heads(it, x):
    return it.down(heads(it, x).mean(1))


@stress(into=4)
def mean_over_units(it, x):
    return it.down(heads(it, x).mean(2))


@stress()
def norm_of_each_head(it, x):
    return it.down(functional.layer_norm(heads(it, x), (6,)).flatten(1))


@stress(scale=weight(4))
def scale_of_each_head_by_a_turned_view(it, x):
    h = heads(it, x)
    h.mT.mul_(it.scale)
    return it.down(h.flatten(1))


@stress()
def softmax_over_heads_that_are_regrouped(it, x):
    h = heads(it, x)
    return it.down((h.softmax(1) * h).view(len(x), 2, 2, 6).transpose(1, 2).reshape(len(x), 24))


@stress(into=6, one=linear(6, 8), two=linear(6, 8))
def heads_as_tokens(it, x):
    h = heads(it, x)
    return it.down(((it.one(h) @ it.two(h).mT).softmax(-1) @ h).mean(1))


@stress()
def batched_products_with_an_addend(it, x):
    h = heads(it, x)
    return it.down(torch.baddbmm(h @ h.mT @ h, h @ h.mT, h).flatten(1))


@stress(into=10)
def half_of_the_products_of_heads(it, x):
    h = heads(it, x)
    i, j = torch.triu_indices(4, 4)
    return it.down((h @ h.mT)[:, i, j])


@stress(sequences, key=linear(12, 12), value=linear(12, 12))
def grouped_queries(it, x):
    q = it.up(x).view(2, 7, 4, 6).transpose(1, 2)
    k, v = (part(x).view(2, 7, 2, 6).transpose(1, 2) for part in (it.key, it.value))
    return it.down(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


@stress(up=None, down=None, first=weight(3, 12, 8), last=weight(3, 8, 11))
def experts_of_their_own(it, x):
    return torch.einsum("neh,ehd->nd", torch.relu(torch.einsum("nd,edh->neh", x, it.first)), it.last)


@stress(into=9, up=None, first=weight(3, 12, 8))
def experts_that_are_compared(it, x):
    h = torch.einsum("nd,edh->neh", x, it.first)
    return it.down(torch.einsum("neh,nfh->nef", h, h).flatten(1))


@stress(up=None, down=None, first=weight(3, 24, 12), last=weight(3, 11, 24))
def ensemble_by_vmap(it, x):
    return torch.vmap(lambda up, down: torch.relu(x @ up.T) @ down.T)(it.first, it.last)


@stress(into=32, kernel=weight(32, 6, 1))
def grouped_convolution(it, x):
    return it.down(torch.relu(functional.conv1d(it.up(x)[..., None], it.kernel, groups=4)).flatten(1))


@stress(into=32, kernel=weight(24, 8, 1))
def grouped_transposed_convolution(it, x):
    return it.down(functional.conv_transpose1d(it.up(x)[..., None], it.kernel, groups=4).flatten(1))


@stress(other=linear(12, 24), into=48, norm=lambda: nn.GroupNorm(4, 48))
def group_norm_of_a_concatenation(it, x):
    return it.down(it.norm(torch.cat([it.up(x), it.other(x).sin()], 1)))


# which orders an operation sees


@stress()
def sorted_units(it, x):
    return it.down(it.up(x).sort(-1).values)


@stress()
def ranks(it, x):
    return it.down(it.up(x).argsort(-1).argsort(-1).float())


@stress()
def running_sums(it, x):
    return it.down(it.up(x).cumsum(-1))


@stress()
def turned_round(it, x):
    return it.down(it.up(x).roll(1, -1))


@stress()
def looked_up_backwards(it, x):
    return it.down(it.up(x)[:, torch.arange(24).flip(0)])


@stress(places=lambda: torch.arange(23, -1, -1))
def gathered_backwards(it, x):
    return it.down(it.up(x).gather(1, it.places.expand(len(x), -1)))


@stress(down=lambda: nn.Embedding(24, CLASSES))
def the_place_of_the_largest(it, x):
    return it.down(torch.relu(it.up(x)).max(-1).indices)


@stress(table=lambda: nn.Embedding(4, 4))
def the_place_of_the_largest_of_four(it, x):
    return it.down(it.table(it.up(x).view(len(x), 6, 4).max(-1).indices).flatten(1))


@stress(into=12)
def pooled_neighbours(it, x):
    return it.down(functional.max_pool1d(it.up(x)[:, None], 2)[:, 0])


@stress(kernel=weight(1, 1, 3))
def convolution_over_units(it, x):
    return it.down(functional.conv1d(it.up(x)[:, None], it.kernel, padding=1)[:, 0])


@stress()
def turned_inside_out(it, x):
    h = it.up(x)
    return it.down(torch.relu(h.view(-1, 4, 6).transpose(1, 2).reshape(-1, 24)) + h)


@stress()
def lower_triangle(it, x):
    return it.down(it.up(x) @ torch.ones(24, 24).tril())


@stress()
def fixed_noise(it, x):
    return it.down(it.up(x) + torch.linspace(0, 1, 24))


@stress(into=4)
def entries_here_and_there(it, x):
    return it.down(heads(it, x)[:, [0, 2, 1, 3], [1, 2, 3, 4]])


@stress(into=6)
def windows_of_units(it, x):
    return it.down(it.up(x).unfold(1, 4, 4).sum(-1))


@stress()
def a_branch_by_the_largest_unit(it, x):
    h = it.up(x)
    return it.down(h) if int(h[0].argmax()) % 2 else it.down(-h)


@stress()
def times_one_unit(it, x):
    h = it.up(x)
    return it.down(h * h[0, 0].item())


@stress()
def times_the_largest_unit(it, x):
    h = it.up(x)
    return it.down(h * h.max().item())


@stress()
def how_many_are_smaller(it, x):
    h = it.up(x)
    return it.down((h[:, :, None] > h[:, None, :]).float().mean(-1))


@stress()
def attention_among_units(it, x):
    h = it.up(x)[..., None]
    return it.down(((h @ h.mT).softmax(-1) @ h)[..., 0])

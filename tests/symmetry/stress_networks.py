"""Networks that exist to mislead the rules: one formula each, most with `up` before it and `down` after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import CLASSES, VOCABULARY, Builder, pictures, sequences, tiny, vectors
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


# halves, thirds, copies


@stress()
def halves_swapped(it, x):
    h = it.up(x)
    one, two = h.chunk(2, -1)
    return it.down(h + torch.cat([two, one], -1))


@stress()
def halves_turned_against_each_other(it, x):
    h = it.up(x)
    one, two = h.chunk(2, -1)
    return it.down(h + torch.cat([-two, one], -1))


@stress()
def pairs_taken_apart(it, x):
    one, two = it.up(x).view(len(x), 12, 2).unbind(-1)
    return it.down(torch.stack([one, two.sin()], 1).flatten(1))


@stress(into=12)
def one_half_gates_the_other(it, x):
    one, two = it.up(x).split([12, 12], -1)
    return it.down(one * torch.sigmoid(two))


@stress(into=48)
def repeated(it, x):
    return it.down(it.up(x).repeat(1, 2))


@stress(into=48)
def each_repeated(it, x):
    return it.down(it.up(x).repeat_interleave(2, 1))


@stress(into=32)
def padded_with_a_number(it, x):
    return it.down(functional.pad(it.up(x), (3, 5), value=0.7))


@stress()
def all_to_all_with_ones(it, x):
    return it.down(it.up(x) @ torch.ones(24, 24))


@stress(other=linear(12, 10), into=240)
def every_pair_of_two(it, x):
    return it.down(torch.einsum("ni,nj->nij", it.up(x), it.other(x)).flatten(1))


@stress(into=576)
def every_pair_of_one(it, x):
    h = it.up(x)
    return it.down(torch.einsum("ni,nj->nij", h, h).flatten(1))


@stress(sequences)
def thirds_shifted_in_time(it, x):
    h = it.up(x)
    y = torch.zeros_like(h)
    y[:, 1:, :8], y[:, :-1, 8:16], y[:, :, 16:] = h[:, :-1, :8], h[:, 1:, 8:16], h[:, :, 16:]
    return it.down(y)


@stress(sequences)
def shifted_in_time(it, x):
    h = it.up(x)
    return it.down(torch.cat([h[:, 1:], torch.zeros(2, 1, 24)], 1) + functional.pad(h, (0, 0, 1, -1)))


# writes in place


@stress()
def the_first_three_set_to_zero(it, x):
    h = it.up(x)
    h[:, :3] = 0
    return it.down(h)


@stress()
def every_other_entry_doubled_by_a_view(it, x):
    h = it.up(x)
    h.view(-1)[::2] *= 2
    return it.down(h)


@stress(up=None, one=linear(12, 12), two=linear(12, 12))
def halves_written_side_by_side(it, x):
    h = torch.zeros(len(x), 24)
    h[:, :12], h[:, 12:] = it.one(x), it.two(x)
    return it.down(torch.relu(h))


@stress(sequences, other=linear(12, 24))
def added_in_place_to_a_view(it, x):
    h = it.up(x)
    h += it.other(x)
    return it.down(torch.relu_(h))


@stress()
def every_other_unit_doubled_by_data(it, x):
    h = it.up(x)
    h.data[:, ::2] *= 2
    return it.down(h)


@stress()
def written_as_a_result(it, x):
    y = torch.empty(5, 24)
    torch.sin(it.up(x), out=y)
    return it.down(y)


@stress()
def written_as_a_result_and_flipped(it, x):
    h = it.up(x)
    y = torch.empty_like(h)
    torch.mul(h, h.flip(-1), out=y)
    return it.down(y)


@stress(lambda: (vectors(), torch.tensor([0, 0, 1, 2, 3])))
def rows_summed_into_others(it, x, edges):
    h = it.up(x)
    return it.down(torch.relu(torch.zeros_like(h).index_add_(0, edges, h)))


@stress()
def some_rows_set_to_a_number(it, x):
    h = it.up(x).clone()
    h[x[:, 0] > 0] = 0.5
    return it.down(h)


# weights made of weights


@stress()
def standardised_weights(it, x):
    w = it.up.weight
    return it.down(torch.relu(functional.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True))))


@stress(up=linear(12, 288))
def weights_made_by_a_network(it, x):
    return it.down(torch.relu(x @ it.up(x.mean(0)).view(24, 12).T))


@stress(first=weight(4, 12), last=weight(24, 4))
def low_rank_update(it, x):
    return it.down(torch.relu(it.up(x) + functional.linear(functional.linear(x, it.first), it.last)))


@stress(up=None, first=weight(6, 12), last=weight(24, 6))
def product_of_weights(it, x):
    return it.down(torch.relu(x @ (it.first.T @ it.last.T)))


@stress(up=None, into=12, first=weight(6, 12))
def product_of_a_weight_with_itself(it, x):
    return it.down(x @ (it.first.T @ it.first))


@stress(up=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(12, 24)))
def spectral_norm(it, x):
    return it.down(torch.relu(it.up(x)))


@stress(up=lambda: nn.utils.parametrizations.orthogonal(nn.Linear(12, 24)))
def orthogonal_weights(it, x):
    return it.down(torch.relu(it.up(x)))


@stress(codes=weight(9, 24), into=9)
def cosines_with_codes(it, x):
    return it.down(functional.cosine_similarity(it.up(x)[:, None], it.codes[None], dim=-1))


@stress(inner=linear(24, 24))
def the_same_layer_three_times(it, x):
    h = it.up(x)
    for _ in range(3):
        h = torch.tanh(it.inner(h))
    return it.down(h)


@stress(up=None, down=None, weights=weight(3, 12, 12))
def layers_in_one_parameter(it, x):
    for w in it.weights:
        x = torch.relu(x @ w)
    return x


# recurrent


@stress(sequences, into=20, up=lambda: nn.LSTMCell(12, 20))
def lstm_cell(it, x):
    h = c = x.new_zeros(len(x), 20)
    for step in x.unbind(1):
        h, c = it.up(step, (h, c))
    return it.down(h)


@stress(sequences, into=40, up=lambda: nn.LSTM(12, 20, 2, bidirectional=True, batch_first=True))
def lstm_of_two_directions(it, x):
    return it.down(it.up(x)[0])


@stress(sequences, into=9, up=lambda: nn.LSTM(12, 20, proj_size=9, batch_first=True))
def lstm_with_projection(it, x):
    return it.down(it.up(x)[0])


@stress(sequences, into=20, up=lambda: nn.LSTM(12, 20))
def lstm_of_packed_sequences(it, x):
    packed = nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), torch.tensor([7, 5]))
    return it.down(nn.utils.rnn.pad_packed_sequence(it.up(packed)[0])[0])


# ways of running


@stress()
def what_nothing_comes_from(it, x):
    h = torch.relu(it.up(x))
    _ = h[:, 3], h.cumsum(-1), h.sort(-1)
    return it.down(h)


@stress()
def inference_mode(it, x):
    with torch.inference_mode():
        return it.down(torch.relu(it.up(x)))


@stress()
def autocast(it, x):
    with torch.autocast("cpu", torch.bfloat16):
        return it.down(torch.relu(it.up(x))).float()


@stress()
def checkpointed(it, x):
    return it.down(torch.utils.checkpoint.checkpoint(lambda y: torch.relu(it.up(y)), x, use_reentrant=False))


@stress(inner=linear(24, 24))
def a_layer_that_a_branch_may_use(it, x):
    h = torch.relu(it.up(x))
    return it.down(it.inner(h) if bool(h.sum() > 1e9) else h)


@stress(lambda: torch.randint(0, VOCABULARY, (2, 7)), up=lambda: nn.EmbeddingBag(VOCABULARY, 24))
def bag_of_embeddings(it, x):
    return it.down(it.up(x))


@stress(pictures, into=16 * 9, up=lambda: nn.Conv2d(3, 16, 3, padding=1))
def unfolded_pictures(it, x):
    return it.down(functional.unfold(torch.relu(it.up(x)), 3, padding=1).mean(-1))

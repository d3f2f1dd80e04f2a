"""More networks that exist to mislead the rules: copies, writes in place, weights made of weights, ways of running."""

from __future__ import annotations

import torch
from stress_networks import STRESS, linear, stress, weight
from tiny import VOCABULARY, pictures, sequences, vectors
from torch import nn
from torch.nn import functional

__all__ = ["STRESS"]

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

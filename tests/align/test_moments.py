"""Joint second moments are sums over all rows, however they are computed, and serve what is linear in the inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from merganser.align import moments
from merganser.align.activations import Batch
from merganser.align.layout import Side
from merganser.align.moments import joint_groups, joint_moments
from merganser.align.renorm import layer_statistics


class Residual(nn.Module):
    """Convolutions of several kinds, two pairs of which take in the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.short = nn.Conv2d(4, 5, 1, stride=2)
        self.twin = nn.Conv2d(4, 5, 1, stride=2)
        self.wide = nn.Conv2d(5, 3, (1, 3), dilation=2, padding=(0, 2), padding_mode="circular")
        self.head = nn.Linear(3, 4)
        self.second = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = self.depth(self.down(x)) + self.short(x) + self.twin(x)
        x = functional.relu(self.wide(x)).mean((2, 3))
        return torch.cat([self.head(x), self.second(x)], dim=1)


def pair(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(make().to(dtype).eval())
    return networks[0], networks[1]


def pictures(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [((torch.randn(n, 2, 7, 8, generator=generator).to(dtype),), {}) for n in sizes]


def inputs_of(network: nn.Module, name: str, batches: list[Batch]) -> Tensor:
    """Rows that a layer takes in, by torch's own unfolding, in float64."""
    layer, seen = network.get_submodule(name), []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone().double()))
    with torch.no_grad():
        for args, kwargs in batches:
            network(*args, **kwargs)
    hook.remove()
    if isinstance(layer, nn.Linear):
        return torch.cat([x.flatten(0, -2) for x in seen])
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode == "circular":
        around = layer.padding[1]
        seen = [torch.cat([x[..., -around:], x, x[..., :around]], dim=-1) for x in seen]
    padding = 0 if layer.padding_mode == "circular" else layer.padding
    rows = [functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride) for x in seen]
    return torch.cat([x.movedim(1, -1).flatten(0, -2) for x in rows])


def by_loops(a: Tensor, b: Tensor) -> Tensor:
    """Sum of outer products, a row at a time."""
    total = torch.zeros(2 * a.shape[1] + 1, 2 * a.shape[1] + 1, dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        row = torch.cat([x, y, torch.ones(1, dtype=torch.float64)])
        total += torch.outer(row, row)
    return total


MEASURED = ("stem", "down", "short", "twin", "wide", "head", "second")


@pytest.mark.parametrize("chunk_bytes", [moments.CHUNK_BYTES, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_sums_over_all_rows_to_twelve_digits(
    dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "CHUNK_BYTES", chunk_bytes)
    one, two = pair(Residual, dtype)
    batches = pictures(3, 2, dtype=dtype)
    found = joint_moments(one, two, batches)
    assert tuple(found) == MEASURED  # in the network's order; a convolution in groups is none of them
    for name, joint in found.items():
        a, b = inputs_of(one, name, batches), inputs_of(two, name, batches)
        expected = by_loops(a, b)
        assert joint.count == len(a)
        scale = expected.diagonal().sqrt()
        assert bool(((joint.gram - expected).abs() <= 1e-12 * torch.outer(scale, scale)).all())
        assert torch.equal(joint.gram, joint.gram.T)
        torch.testing.assert_close(joint.ab, a.T @ b, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(joint.mean_a, a.mean(0), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(joint.mean_b, b.mean(0), rtol=1e-11, atol=1e-11)


def test_pictures_of_many_sizes_are_summed_together() -> None:
    one, two = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3)))
    generator = torch.Generator().manual_seed(6)  # the last is too small for shifts
    batches: list[Batch] = [((torch.randn(2, 2, *size, generator=generator),), {}) for size in [(9, 6), (5, 5), (3, 4)]]
    joint = joint_moments(one, two, batches)["0"]
    expected = by_loops(inputs_of(one, "0", batches), inputs_of(two, "0", batches))
    torch.testing.assert_close(joint.gram, expected, rtol=1e-12, atol=1e-12)
    assert joint.gram[-1, -1] == joint.count == 2 * (7 * 4 + 3 * 3 + 1 * 2)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(2, 6, 3, padding=1)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x).mT)


def test_layers_on_lines_and_within_fused_blocks_are_measured() -> None:
    one, two = pair(Line)
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(7))
    found = joint_moments(one, two, [((x,), {})])
    assert tuple(found) == ("embed", "block.linear1", "block.linear2")  # attention calls its own weights, not modules
    padded = functional.pad(x.double(), (1, 1))
    rows = torch.cat([padded[:, :, i : i + 3].flatten(1) for i in range(5)])
    torch.testing.assert_close(found["embed"].gram, by_loops(rows, rows), rtol=1e-12, atol=1e-12)
    assert found["block.linear1"].count == found["block.linear2"].count == 15
    assert torch.backends.mha.get_fastpath_enabled()


def test_padded_sentences_are_measured_as_they_stand() -> None:
    """An encoder packs them together where it may, out of which no row could be told."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    one, two = pair(lambda: nn.TransformerEncoder(layer, 2))
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(7))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    found = joint_moments(one, two, [((x,), {"src_key_padding_mask": mask})])
    assert {joint.count for joint in found.values()} == {15}


# sharing, grouping, drawing


def test_layers_that_take_in_the_same_share_their_moments() -> None:
    one, two = pair(Residual)
    found = joint_moments(one, two, pictures(2))
    assert found["short"] is found["twin"]
    assert found["head"] is found["second"]
    assert len({id(joint) for joint in found.values()}) == 5  # `down` looks at the same in another way


class Rewritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        return self.before(x) + self.after(x.relu_())


def test_a_tensor_that_is_written_to_between_two_layers_is_two() -> None:
    one, two = pair(Rewritten)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(8))
    found = joint_moments(one, two, [((x,), {})])
    x = x.double()
    torch.testing.assert_close(found["before"].ab, x.T @ x)
    torch.testing.assert_close(found["after"].ab, x.relu().T @ x.relu())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=self.layer(x))


@pytest.mark.parametrize("rows", [None, 7])
def test_a_layer_that_runs_twice_adds_the_rows_of_both_runs(rows: int | None) -> None:
    one, two = pair(Twice, torch.float64)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    joint = joint_moments(one, two, [((x,), {})], rows=rows)["layer"]
    assert joint.count == (rows or 12)
    if rows is None:
        with torch.no_grad():
            a, b = (torch.cat([x, network.layer(x)]) for network in (one, two))
        torch.testing.assert_close(joint.gram, by_loops(a, b))


@pytest.mark.parametrize("rows", [None, 40])
def test_passes_and_other_layers_change_no_bit(rows: int | None) -> None:
    one, two = pair(Residual)
    batches = pictures(3, 2)
    steps: list[tuple[int, int]] = []
    whole = joint_moments(one, two, batches, rows=rows)
    narrow = joint_moments(
        one, two, batches, rows=rows, memory_bytes=50_000, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    assert len(steps) >= 4  # two passes or more over two batches
    asked = joint_moments(one, two, batches, rows=rows, layers=["twin", "second", "down"])
    assert tuple(asked) == ("down", "twin", "second")
    for found in (narrow, asked):
        assert all(torch.equal(joint.gram, whole[name].gram) for name, joint in found.items())


def test_no_pass_holds_more_than_memory_allows() -> None:
    one, two = pair(Residual)
    for group in joint_groups(one, two, pictures(3, 2), memory_bytes=50_000):
        assert sum({id(j): j.gram.nbytes for j in group.values()}.values()) <= 50_000


def test_a_run_ends_where_all_that_a_pass_measures_was_seen() -> None:
    one, two = pair(Residual)
    ran: list[str] = []
    for network in (one, two):
        network.get_submodule("wide").register_forward_hook(lambda *_: ran.append("wide"))
    joint_moments(one, two, pictures(2, 2, 2), layers=["stem", "down"])
    assert len(ran) == 2  # once each, where it is found out what takes in what
    assert all(not module._forward_pre_hooks for network in (one, two) for module in network.modules())


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 60), seed=st.integers(0, 3), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_rows_are_drawn_evenly_and_none_twice(rows: int, seed: int, sizes: list[int]) -> None:
    """Every row is one-hot, so that the diagonal tells which were drawn."""
    count = sum(sizes)
    layer = nn.Linear(count, 1)
    batches: list[Batch] = [((part,), {}) for part in torch.eye(count).split(sizes)]
    joint = joint_moments(layer, layer, batches, rows=rows, seed=seed)[""]
    drawn = joint.aa.diagonal()
    assert set(drawn.tolist()) <= {0.0, 1.0}
    assert joint.count == int(drawn.sum()) <= rows
    for part, size in zip(drawn.split(sizes), sizes, strict=True):
        share = rows / len(sizes)
        assert min(size, int(share)) <= int(part.sum()) <= min(size, int(share) + 1)


def test_every_row_of_every_batch_is_drawn_by_some_seed_and_batches_draw_on_their_own() -> None:
    layer = nn.Linear(16, 1)
    batches: list[Batch] = [((part,), {}) for part in torch.eye(16).split(8)]
    drawn = torch.stack(
        [joint_moments(layer, layer, batches, rows=8, seed=seed)[""].aa.diagonal() for seed in range(12)]
    )
    assert bool((drawn.sum(0) > 0).all())
    assert bool((drawn.sum(0) < 12).all())
    assert not torch.equal(drawn[:, :8], drawn[:, 8:])


def test_the_seed_draws_other_rows_and_enough_rows_are_all() -> None:
    one, two = pair(Residual)
    batches = pictures(3, 2)
    drawn = [joint_moments(one, two, batches, rows=40, seed=seed)["stem"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].gram, drawn[1].gram)
    assert not torch.equal(drawn[0].gram, drawn[2].gram)
    assert all(joint.count == 40 for joint in drawn)
    whole, ample = (joint_moments(one, two, batches, rows=rows)["down"] for rows in (None, 10_000))
    assert torch.equal(whole.gram, ample.gram)


def test_drawn_windows_are_windows_of_both_networks_at_the_same_places() -> None:
    one, two = pair(Residual)
    batches = pictures(2)
    a, b = (inputs_of(network, "down", batches) for network in (one, two))
    joint = joint_moments(one, two, batches, layers=["down"], rows=1)["down"]
    row = joint.gram[:-1, -1]
    assert any(torch.allclose(row, torch.cat([x, y]), atol=1e-12) for x, y in zip(a, b, strict=True))


def test_half_of_the_rows_estimate_all_of_them_without_bias() -> None:
    one, two = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3)))
    batches = pictures(3)
    whole = joint_moments(one, two, batches)["0"]
    drawn = torch.stack(
        [joint_moments(one, two, batches, rows=whole.count // 2, seed=seed)["0"].gram for seed in range(60)]
    ) / (whole.count // 2)
    error = (drawn.mean(0) - whole.gram / whole.count)[:-1]
    deviation = drawn.std(0)[:-1] / 60**0.5
    assert float((error.abs() / deviation.clamp(min=1e-12)).max()) < 5


# what moments tell


def test_outputs_have_the_means_and_variances_of_a_run() -> None:
    one, two = pair(Residual)
    batches = pictures(3, 2)
    found = joint_moments(one, two, batches)
    for network, side in ((one, Side.FIRST), (two, Side.SECOND)):
        expected = layer_statistics(network, batches)
        for name, joint in found.items():
            layer = network.get_submodule(name)
            mean, variance = joint.outputs(layer.weight, layer.bias, side)
            torch.testing.assert_close((mean, variance.sqrt()), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["stem", "down", "short", "head"])
def test_units_are_compared_at_the_middle_of_windows(name: str) -> None:
    one, two = pair(Residual)
    batches = pictures(3, 2)
    joint = joint_moments(one, two, batches)[name]
    taps = joint.kernel[0] * joint.kernel[1]
    a, b = (inputs_of(network, name, batches)[:, taps // 2 :: taps] for network in (one, two))
    units = a.shape[1]
    torch.testing.assert_close(joint.of_units().cross, a.T @ b)
    torch.testing.assert_close(joint.unit_distances(), (a[:, :, None] - b[:, None]).square().mean(0))
    moving = (a.std(0) > 0)[:, None] & (b.std(0) > 0)
    expected = torch.from_numpy(np.corrcoef(a.T[a.std(0) > 0], b.T[b.std(0) > 0]))
    found = joint.of_units().pearson()[moving]
    across = expected[: int((a.std(0) > 0).sum()), int((a.std(0) > 0).sum()) :].reshape(-1)
    torch.testing.assert_close(found, across)
    assert joint.of_units().pearson().shape == (units, units)


def test_units_under_a_kernel_without_a_middle_are_compared_at_all_taps() -> None:
    one, two = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 2, stride=2)))
    generator = torch.Generator().manual_seed(4)
    batches: list[Batch] = [((torch.randn(3, 2, 6, 8, generator=generator),), {})]
    joint = joint_moments(one, two, batches)["1"]
    with torch.no_grad():
        a, b = (network[0](batches[0][0][0]).double().movedim(1, 0).flatten(1) for network in (one, two))
    assert joint.of_units().count == a.shape[1]  # every place once
    torch.testing.assert_close(joint.of_units().cross, a @ b.T)
    torch.testing.assert_close(joint.of_units().pearson(), torch.corrcoef(torch.cat([a, b]))[:3, 3:])


def test_networks_and_inputs_are_left_as_they_were() -> None:
    one, two = (network.train() for network in pair(Residual))
    two.get_submodule("norm").eval()
    before = [copy.deepcopy(network.state_dict()) for network in (one, two)]
    batches = pictures(3)
    x = batches[0][0][0].clone()
    joint_moments(one, two, batches)
    assert [module.training for module in one.modules()] == [True] * len(list(one.modules()))
    assert not two.get_submodule("norm").training
    assert two.training
    for state, network in zip(before, (one, two), strict=True):
        assert all(torch.equal(y, network.state_dict()[name]) for name, y in state.items())
    assert torch.equal(batches[0][0][0], x)
    assert all(not module._forward_pre_hooks for network in (one, two) for module in network.modules())

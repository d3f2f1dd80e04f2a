"""Windows are those that the convolution sees, and their moments by shifts are those of a loop over them."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from merganser.align import autocorrelation
from merganser.align.autocorrelation import Windows, add_by_shifts, pair_count, spread
from merganser.numerics import gram_of_rows, product


def by_loops(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Sum of the outer products of all windows of (images, height, width, channels), channels outer."""
    total = torch.zeros(x.shape[3] * kernel[0] * kernel[1], x.shape[3] * kernel[0] * kernel[1], dtype=torch.float64)
    for image in x:
        for top in range(x.shape[1] - kernel[0] + 1):
            for left in range(x.shape[2] - kernel[1] + 1):
                window = image[top : top + kernel[0], left : left + kernel[1]].permute(2, 0, 1).reshape(-1)
                total += torch.outer(window, window)
    return total


def by_shifts(x: Tensor, kernel: tuple[int, int], batches: int = 1) -> Tensor:
    sums = torch.zeros(pair_count(kernel), x.shape[3], x.shape[3], dtype=torch.float64)
    for part in x.chunk(batches):
        add_by_shifts(sums, part.permute(3, 0, 1, 2).contiguous(), kernel)
    size = x.shape[3] * kernel[0] * kernel[1]
    found = torch.zeros(size, size, dtype=torch.float64)
    spread(sums, kernel, found)
    return found


@pytest.mark.parametrize(
    ("kernel", "height", "width"),
    [((3, 3), 9, 7), ((3, 3), 4, 4), ((1, 3), 1, 8), ((3, 1), 5, 2), ((2, 3), 4, 6), ((4, 5), 7, 9), ((5, 4), 8, 6)],
)
def test_moments_by_shifts_are_those_of_all_windows(kernel: tuple[int, int], height: int, width: int) -> None:
    x = torch.randn(3, height, width, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(by_shifts(x, kernel), by_loops(x, kernel), rtol=1e-13, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    images=st.integers(1, 3),
)
def test_moments_by_shifts_of_integers_are_exact(kernel: tuple[int, int], more: tuple[int, int], images: int) -> None:
    height, width = (2 * k - 2 + max(m, 1) for k, m in zip(kernel, more, strict=True))  # a grid of k - 1 or more
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 9, (images, height, width, 2), generator=generator).double()
    assert torch.equal(by_shifts(x, kernel, batches=images), by_loops(x, kernel))


def test_moments_by_shifts_are_exactly_symmetric() -> None:
    x = torch.randn(2, 8, 8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = by_shifts(x, (3, 3))
    assert torch.equal(found, found.T)


LAYERS = {
    "plain": lambda: nn.Conv2d(3, 5, 3),
    "padded": lambda: nn.Conv2d(3, 5, (3, 5), padding=(1, 2)),
    "strided": lambda: nn.Conv2d(3, 5, 3, stride=(2, 3), padding=1),
    "dilated": lambda: nn.Conv2d(3, 5, (2, 3), dilation=(3, 2), padding=2),
    "same": lambda: nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(3, 5, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(3, 5, 5, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="replicate"),
    "patches": lambda: nn.Conv2d(3, 5, 4, stride=4),
    "line": lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2),
    "same line": lambda: nn.Conv1d(3, 5, 4, padding="same"),
    "circular line": lambda: nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("name", "one"), list(itertools.product(LAYERS, [False, True])))
def test_rows_of_windows_times_the_weight_are_the_outputs_of_the_convolution(name: str, one: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn((3, 12) if isinstance(layer, nn.Conv1d) else (3, 12, 11), dtype=torch.float64)
    x = x if one else torch.stack([x, x.flip(0)])
    windows = Windows.of(layer)
    rows = windows.view(windows.padded(x))
    with torch.no_grad():
        outputs = layer(x)
        found = rows.flatten(3) @ layer.weight.reshape(5, -1).T + layer.bias
    expected = (outputs[None] if one else outputs).movedim(1, -1)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("gathered", [1, 100, 1 << 18])
@pytest.mark.parametrize("name", LAYERS)
def test_chosen_windows_are_those_of_the_outputs_at_their_numbers(
    name: str, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autocorrelation, "GATHERED", gathered)
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    whole = torch.randn((5, 3, 12) if isinstance(layer, nn.Conv1d) else (5, 3, 12, 11), dtype=torch.float64)
    windows = Windows.of(layer)
    turned = whole.movedim(1, -1).contiguous().movedim(-1, 1)  # channels along memory
    for x in (whole, turned, whole[::2], whole[2]):
        with torch.no_grad():
            outputs = layer(x)
        outputs = (outputs if x.ndim == whole.ndim else outputs[None]).movedim(1, -1).reshape(-1, 5)
        assert prod(windows.windows_of(x)) == len(outputs)
        for chosen in (torch.arange(len(outputs)), torch.tensor([len(outputs) - 1]), torch.arange(3, len(outputs), 4)):
            found = windows.rows(x, chosen) @ layer.weight.detach().reshape(5, -1).T + layer.bias.detach()
            torch.testing.assert_close(found, outputs[chosen], rtol=1e-12, atol=1e-12)
        assert windows.rows(x, torch.arange(0)).shape == (0, 3 * windows.taps)


def test_of_pictures_without_a_chosen_window_nothing_is_read() -> None:
    x = torch.full((5, 2, 6, 6), torch.nan, dtype=torch.bfloat16)
    x[1:3] = 1.0
    rows = Windows((3, 3), padding=((1, 1), (1, 1))).rows(x, torch.tensor([36 + 14, 72 + 14]))
    assert rows.dtype == torch.bfloat16
    assert bool((rows == 1).all())


def test_padding_leaves_the_input_alone() -> None:
    x = torch.ones(1, 2, 4, 4)
    Windows((2, 2)).padded(x).zero_()
    assert bool((x == 1).all())


@pytest.mark.parametrize(
    ("layer", "size", "expected"),
    [
        (nn.Conv2d(1, 1, 3), (30, 30), True),
        (nn.Conv1d(1, 1, 5), (1, 30), True),
        (nn.Conv2d(1, 1, 1), (30, 30), False),
        (nn.Conv2d(1, 1, 3, stride=2), (30, 30), False),
        (nn.Conv2d(1, 1, 3, dilation=2), (30, 30), False),
        (nn.Conv2d(1, 1, 7), (12, 30), True),  # six windows, as many as rims may have
        (nn.Conv2d(1, 1, 7), (11, 30), False),
    ],
)
def test_shifts_are_for_neighbouring_windows_of_several_taps(
    layer: nn.Conv1d | nn.Conv2d, size: tuple[int, int], expected: bool
) -> None:
    assert Windows.of(layer).by_shifts(*size) is expected


def test_shifts_of_a_3_by_3_kernel_take_a_third_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []

    def gram(x: Tensor) -> Tensor:
        spent.append(x.shape[0] ** 2 * x.shape[1] / 2)  # half of a symmetric matrix
        return gram_of_rows(x)

    def general(x: Tensor, y: Tensor) -> Tensor:
        spent.append(x.shape[0] * x.shape[1] * y.shape[1])
        return product(x, y)

    monkeypatch.setattr(autocorrelation, "gram_of_rows", gram)
    monkeypatch.setattr(autocorrelation, "product", general)
    x = torch.randn(1, 58, 58, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_shifts(x, (3, 3))
    unfolded = 56 * 56 * (9 * 4) ** 2 / 2
    assert sum(spent) < 0.33 * unfolded

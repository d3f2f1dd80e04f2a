"""Loss on the line between two networks."""

from __future__ import annotations

import copy
from math import log

import pytest
import torch
from torch import Tensor, nn

from merganser.align.barrier import Line, loss_line
from merganser.align.costs import WeightCosts
from merganser.align.match import match
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import symmetries

Labelled = list[tuple[tuple[tuple[Tensor], dict[str, Tensor]], Tensor]]


def examples(count: int = 3, features: int = 4, classes: int = 3) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            ((torch.randn(20, features, generator=generator, dtype=torch.float64),), {}),
            torch.randint(classes, (20,), generator=generator),
        )
        for _ in range(count)
    ]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {n: x.detach().clone() for n, x in network.state_dict().items()}


def test_losses_and_accuracies_are_those_of_the_networks_between() -> None:
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
    given, before = examples(), state(one)
    line = loss_line(one, state(one), state(two), given, points=5)
    assert line.places == (0, 0.25, 0.5, 0.75, 1)
    assert line.items == 60
    for t, loss, accuracy in zip(line.places, line.losses, line.accuracies, strict=True):
        total, right = 0.0, 0
        for ((x,), _), classes in given:
            w = [(1 - t) * a + t * b for a, b in zip(one.parameters(), two.parameters(), strict=True)]
            logits = torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
            for row, label in zip(logits.tolist(), classes.tolist(), strict=True):
                total += log(sum(torch.tensor(row).double().exp().tolist())) - row[label]
                right += row.index(max(row)) == label
        assert loss == pytest.approx(total / 60, rel=1e-6)
        assert accuracy == pytest.approx(100 * right / 60)
    assert all(torch.equal(x, before[n]) for n, x in one.state_dict().items())


class Phases(nn.Module):
    """Logits are the real part of a product with complex numbers."""

    def __init__(self, phase: Tensor) -> None:
        super().__init__()
        self.phase = nn.Parameter(phase)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.phase.dtype) @ self.phase).real


def test_complex_parameters_lie_on_the_line_as_well() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 3, dtype=torch.complex128, generator=generator) for _ in range(2))
    given = examples()
    line = loss_line(Phases(a), {"phase": a}, {"phase": b}, given, points=3)
    middle = [(((x @ ((a + b) / 2).real).log_softmax(-1)), y) for ((x,), _), y in given]
    expected = -sum(float(logs[range(20), y].sum()) for logs, y in middle) / 60
    assert line.losses[1] == pytest.approx(expected, rel=1e-12)


def test_the_barrier_is_the_largest_rise_above_the_line_between_the_ends() -> None:
    assert Line((0, 0.25, 0.5, 0.75, 1), (1.0, 2.0, 4.0, 5.0, 3.0), (0,) * 5, 1).barrier == (2.5, 0.75)
    assert Line((0, 0.5, 1), (1.0, 0.5, 1.0), (0,) * 3, 1).barrier[0] == 0  # a valley has none


def test_a_convex_loss_has_no_barrier() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    assert loss_line(one, state(one), state(two), examples()).barrier[0] <= 1e-12


def test_a_permuted_copy_has_one_until_it_is_aligned() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        one[2].weight.mul_(30)
    ((x,), _), _ = examples()[0]
    given = [(((x,), {}), one(x).argmax(1))]
    found = symmetries(one, (x,))
    moved = found.spec.random(torch.Generator().manual_seed(1))
    a = state(one)
    b = {n: found.spec.apply(moved, n, y) for n, y in a.items()}
    assert loss_line(one, a, b, given).barrier[0] > 0.1
    orders = match(found.spec, WeightCosts(found.spec, a, b)).orders
    back = {n: found.spec.apply(orders, n, y) for n, y in b.items()}
    assert loss_line(one, a, back, given).barrier[0] == pytest.approx(0, abs=1e-12)


def test_statistics_of_batch_norm_are_measured_at_every_place_if_told() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    a, b = state(one), state(one)
    b["1.running_mean"] = torch.full((8,), 50.0, dtype=torch.float64)
    plain, anew = (loss_line(one, a, b, examples(), points=3, reset=reset) for reset in (False, True))
    assert max(anew.losses) - min(anew.losses) < 1e-9  # the weights are the same, and the statistics too, then
    assert max(plain.losses) - min(plain.losses) > 0.01
    ((x,), _), _ = examples()[0]
    expected = copy.deepcopy(one).train()
    for layer in expected.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum, layer.num_batches_tracked = None, torch.tensor(0)
    with torch.no_grad():
        expected(x)
        alone = loss_line(one, a, b, examples(1), points=3, reset=True)
        logits = expected.eval()(x)
    assert alone.losses[0] == pytest.approx(float(nn.functional.cross_entropy(logits, examples(1)[0][1])), rel=1e-6)


def test_bad_input_is_refused() -> None:
    one = nn.Linear(4, 3).double()
    a = state(one)
    ((x,), _), classes = examples()[0]
    with pytest.raises(ParameterError, match="points is 2"):
        loss_line(one, a, a, examples(), points=2)
    with pytest.raises(ParameterError, match="no batch"):
        loss_line(one, a, a, [])
    with pytest.raises(ShapeError, match=r"classes \(19,\)"):
        loss_line(one, a, a, [(((x,), {}), classes[1:])])
    with pytest.raises(ParameterError, match="0 to 7"):
        loss_line(one, a, a, [(((x[:2],), {}), torch.tensor([0, 7]))])
    with pytest.raises(ParameterError, match="no example"):
        loss_line(one, a, a, [(((x[:0],), {}), classes[:0])])
    with pytest.raises(ParameterError, match="no logits"):
        loss_line(nn.LSTM(4, 3).double(), *[state(nn.LSTM(4, 3).double())] * 2, examples())

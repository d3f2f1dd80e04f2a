"""Networks that take another way for other inputs, refitted in sequence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.partial import Pair, Settings
from merganser.align.sequence import refit_in_sequence
from merganser.errors import ParameterError
from merganser.symmetry import symmetries


class Branching(nn.Module):
    """One of two layers runs, as the mean of the inputs tells."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = (nn.Linear(i, o) for i, o in ((6, 16), (16, 16), (16, 16), (16, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.h(torch.relu(self.b(y) if float(x.mean()) > 0 else self.c(y)))


def pair_of(*batches: Tensor) -> Pair:
    torch.manual_seed(0)
    one, two = Branching().eval(), Branching().eval()
    given: list[Batch] = [((x,), {}) for x in batches]
    return Pair(symmetries(one, *given[0]), one, two, given, settings=Settings(match="weights"))


def drawn(mean: float, seed: int) -> Tensor:
    return 0.1 * torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize("first", [-0.5, 1.0])
def test_single_examples_may_take_another_way_than_their_batch(first: float) -> None:
    """Two rows alone say the other branch; all batches take the same one."""
    x = drawn(1.0, 0)
    x[0], x[1] = first, 0.5 - first
    made = pair_of(x, drawn(1.0, 1)).merged(1.2)
    assert set(made.refitted.residuals) <= {"a", "b", "h"}
    assert torch.isfinite(made.network(x)).all()


def test_batches_that_take_other_ways_are_refused_by_name() -> None:
    torch.manual_seed(0)
    one, two = Branching().eval(), Branching().eval()
    batches: list[Batch] = [((drawn(1.0, 0),), {}), ((drawn(-0.5, 1),), {})]
    spec = symmetries(one, *batches[0]).spec
    with pytest.raises(ParameterError, match="the layers that run differ between batches: b did not run in each"):
        refit_in_sequence(copy.deepcopy(one), one, two, spec, {}, batches, ridge=1e-3)


def test_a_layer_that_the_merged_network_does_not_reach_is_told() -> None:
    """Both networks take one branch on every batch; the merged one, which starts elsewhere, takes the other."""
    torch.manual_seed(0)
    one, two = Branching().eval(), Branching().eval()
    batches: list[Batch] = [((drawn(1.0, 0),), {})]
    spec = symmetries(one, *batches[0]).spec
    merged = copy.deepcopy(one)
    merged.register_forward_pre_hook(lambda module, args: (-args[0],))
    done = refit_in_sequence(merged, one, two, spec, {}, batches, ridge=1e-3)
    assert done.kept["b"] == "the merged network did not run it"
    assert list(done.residuals) == ["a", "h"]

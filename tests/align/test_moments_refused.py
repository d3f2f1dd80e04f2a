"""Inputs, layers and networks whose moments cannot be measured are refused, by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_moments import Line, Residual, pair, pictures
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.layout import Side
from merganser.align.moments import Joint, joint_moments
from merganser.errors import NonFiniteError, ParameterError, ShapeError


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": ["nothing"]}, "'nothing' is no layer of both"),
        ({"layers": ["depth"]}, "'depth' is no layer of both"),
        ({"layers": ["head", "head.weight"]}, r"'head\.weight'"),
        ({"rows": 0}, "rows is 0"),
        ({"memory_bytes": 1000}, "moments of stem take [0-9,]+ bytes, and memory_bytes is 1,000"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, object], match: str) -> None:
    one, two = pair(Residual)
    with pytest.raises(ParameterError, match=match):
        joint_moments(one, two, pictures(2), **settings)  # type: ignore[arg-type]


def test_no_batch_and_batches_without_rows_are_refused() -> None:
    one, two = pair(lambda: nn.Linear(3, 2))
    with pytest.raises(ParameterError, match="no batch"):
        joint_moments(one, two, [])
    with pytest.raises(ParameterError, match="no row"):
        joint_moments(one, two, [((torch.zeros(0, 3),), {})])


def test_a_layer_that_does_not_run_is_left_out_and_refused_where_it_is_asked_for() -> None:
    one, two = pair(Line)
    batches: list[Batch] = [((torch.randn(3, 2, 5),), {})]
    with pytest.raises(ParameterError, match=r"block\.self_attn\.out_proj does not run as a module"):
        joint_moments(one, two, batches, layers=["embed", "block.self_attn.out_proj"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 3, 3), lambda: nn.Conv2d(2, 3, 3, stride=2)])
def test_inputs_that_are_not_finite_are_refused(make: Callable[[], nn.Module], value: float) -> None:
    one, two = pair(lambda: nn.Sequential(make()))
    batches = pictures(2)
    batches[0][0][0][1, 1, 3, 3] = value
    with pytest.raises(NonFiniteError, match="the batches give 0 NaN or infinity"):
        joint_moments(one, two, batches)


def test_inputs_whose_squares_are_not_finite_are_refused() -> None:
    one, two = pair(lambda: nn.Linear(3, 2), torch.float64)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        joint_moments(one, two, [((torch.full((2, 3), 1e200, dtype=torch.float64),), {})])


def test_networks_that_take_in_other_shapes_are_refused() -> None:
    (one, _), (_, two) = (
        pair(lambda size=size: nn.Sequential(nn.Linear(4, size), nn.Linear(size, 2))) for size in (3, 5)
    )
    with pytest.raises(ShapeError, match="1 does not take in the same shapes"):
        joint_moments(one, two, [((torch.randn(2, 4),), {})])


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            x = self.layer(x)
        return self.last(x)


@pytest.mark.parametrize(("sizes", "match"), [((2, 3), "runs more often"), ((3, 2), "runs less often")])
def test_a_layer_that_runs_another_number_of_times_is_refused(sizes: tuple[int, int], match: str) -> None:
    one, two = pair(Sometimes)
    with pytest.raises(ShapeError, match=f"layer {match} in a batch than in the first"):
        joint_moments(one, two, [((torch.randn(n, 3),), {}) for n in sizes])


def test_outputs_of_another_layer_and_of_both_networks_are_refused() -> None:
    joint = Joint(torch.eye(7, dtype=torch.float64), 1)
    with pytest.raises(ShapeError, match="takes in 4 entries, and the moments are those of 3"):
        joint.outputs(torch.ones(2, 4), None, Side.FIRST)
    with pytest.raises(ParameterError, match="FIRST or SECOND"):
        joint.outputs(torch.ones(2, 3), None, Side.BOTH)

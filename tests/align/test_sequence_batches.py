"""What refits front to back refuse, and batches and statistics in odd forms."""

from __future__ import annotations

import statistics
from statistics import fmean

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.align import renorm
from merganser.align.activations import Batch
from merganser.align.layout import widened
from merganser.align.ran import joined
from merganser.align.renorm import measure_batch_norm
from merganser.align.sequence import Sampling, refit_in_sequence
from merganser.align.wider import widen
from merganser.errors import NonFiniteError, ParameterError, ShapeError
from sequence_helpers import fitted, small, vectors


def test_a_head_apart_is_fitted_to_the_outputs_of_each() -> None:
    torch.manual_seed(0)
    job = small(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    job.two[2] = nn.Linear(6, 3).double()  # type: ignore[index]
    merged, done = job.run(apart_heads=["2"], ridge=1e-2)
    x = joined(job.batches)[0][0][0]
    assert merged(x).shape == (60, 8)
    with torch.no_grad():
        y = torch.cat([job.one(x), job.two(x)], 1).numpy()
        inputs = merged[:2](x).numpy()  # type: ignore[index]
    prior = torch.cat([job.one[2].weight, job.two[2].weight]).detach().numpy()  # type: ignore[index]
    weight, bias = fitted(inputs, y, prior, 1e-2)
    np.testing.assert_allclose(done.tensors["2.weight"].numpy(), weight, atol=1e-9)
    np.testing.assert_allclose(done.tensors["2.bias"].numpy(), bias, atol=1e-9)


def test_progress_tells_of_every_layer() -> None:
    told: list[tuple[int, int]] = []
    small(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).run(progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]


def test_a_blend_of_a_layer_that_is_not_refitted_is_refused() -> None:
    job = small(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ParameterError, match="there is a blend for head, which is not refitted: the network has no"):
        job.run(blends={"head": torch.add})


def test_a_blend_of_another_shape_is_refused() -> None:
    job = small(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ShapeError, match=r"the blend for 2 gives \(60, 4\); its layer gives \(60, 2\)"):
        job.run(blends={"2": lambda a, b: torch.cat([a, b], 1)})


def test_inputs_that_are_not_finite_are_refused_and_momenta_stay() -> None:
    job = small(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, momentum=0.3), nn.ReLU(), nn.Linear(6, 2))
    job.batches[0][0][0][3, 1] = torch.nan
    a = job.one.state_dict()
    state = {name: widened(job.spec, name, x, job.two.state_dict()[name], {}) for name, x in a.items()}
    merged = widen(job.one, job.spec, {}, state)
    with pytest.raises(NonFiniteError, match="the batches give 0 NaN or infinity"):
        refit_in_sequence(merged, job.one, job.two, job.spec, {}, job.batches)
    assert merged[1].momentum == 0.3  # type: ignore[index]
    assert not any(m._forward_pre_hooks for m in merged.modules())


def test_batches_are_joined_whatever_holds_their_tensors() -> None:
    mask = torch.ones(3, 3)
    batches: list[Batch] = [
        (
            ({"x": torch.full((n, 2), float(n)), "scale": 2.0},),
            {"mask": mask.clone(), "flag": None, "y": [torch.ones(n)]},
        )
        for n in (2, 5)
    ]
    (args, kwargs), count = joined(batches)
    assert count == 7
    assert torch.equal(args[0]["x"], torch.cat([torch.full((2, 2), 2.0), torch.full((5, 2), 5.0)]))
    assert args[0]["scale"] == 2.0
    assert torch.equal(kwargs["mask"], mask)
    assert kwargs["flag"] is None
    assert torch.equal(kwargs["y"][0], torch.ones(7))


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "no example"),
        ([((torch.ones(0, 2),), {})], "no example"),
        ([((3,), {})], "no example"),
        ([((torch.ones(2, 2), 1), {}), ((torch.ones(2, 2), 2), {})], "differ in what is no tensor of examples"),
        ([((torch.ones(2, 2),), {}), ((torch.ones(2, 2),), {"y": 1})], "differ in which inputs"),
        ([((torch.ones(2, 2),), {}), ((torch.ones(2, 3),), {})], "cannot be joined"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(batches: list[Batch], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        joined(batches)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ParameterError, match="rows is 0"):
        Sampling(rows=0)


def test_one_value_of_a_unit_gives_batch_norm_no_variance() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ParameterError, match="the batches give 1 one value of each unit"):
        measure_batch_norm(network, vectors(1))


class Named(nn.Module):
    """A norm that is given its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(input=self.layer(input=x))
        return y


def test_batch_norm_that_is_given_its_input_by_name_is_measured() -> None:
    torch.manual_seed(0)
    network = Named().double()
    measure_batch_norm(network, vectors(30, 10))
    with torch.no_grad():
        y = network.layer(joined(vectors(30, 10))[0][0][0])
    torch.testing.assert_close(network.norm.running_mean, y.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.norm.running_var, y.var(0), rtol=1e-12, atol=1e-12)


def test_statistics_stay_where_they_cannot_be_measured() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    measure_batch_norm(network, vectors(30))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    network[1].weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="the batches give 2 NaN or infinity"):
        measure_batch_norm(network, vectors(20))
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items() if name != "1.weight")


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("shape", [(9, 3), (5, 3, 4), (6, 3, 4, 5), (1, 3, 7, 2)])
def test_variances_and_means_are_those_of_all_values(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renorm, "BLOCK", block)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 1e4
    x[:, 1] = 123.456  # never varies
    for given in (x, x.float(), x.to(torch.bfloat16), x.transpose(0, 1).contiguous().transpose(0, 1)):
        before = given.clone()
        variance, mean = renorm.var_mean(given)
        units = [u.flatten().tolist() for u in given.double().movedim(1, 0)]
        torch.testing.assert_close(
            mean, torch.tensor([fmean(u) for u in units], dtype=torch.float64), rtol=1e-13, atol=0
        )
        expected = torch.tensor([statistics.variance(u) for u in units], dtype=torch.float64)
        torch.testing.assert_close(variance, expected, rtol=1e-9, atol=1e-20)
        assert torch.equal(given, before)


def test_batch_norm_that_runs_twice_has_the_mean_of_both_runs() -> None:
    norm = nn.BatchNorm1d(4).double()
    network = nn.Sequential(norm, nn.Tanh(), norm)
    measure_batch_norm(network, vectors(30, 10))
    x = joined(vectors(30, 10))[0][0][0]
    y = ((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()).tanh()
    torch.testing.assert_close(norm.running_mean, (x.mean(0) + y.mean(0)) / 2)
    torch.testing.assert_close(norm.running_var, (x.var(0) + y.var(0)) / 2)
    assert norm.training

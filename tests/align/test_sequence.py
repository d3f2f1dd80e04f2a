"""Layers refitted one behind the other: by NumPy's least squares along the way, and by what is known beforehand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from partial_networks import Two, free, of, relative, stirred, two
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import Batch
from merganser.align.moments import joint_moments
from merganser.align.ran import joined, layers_run
from merganser.align.refit import refit
from merganser.align.sequence import Sampling
from merganser.symmetry import symmetries
from merganser.symmetry.spec import groups_in
from sequence_helpers import Job, fitted, job_of, small, vectors


def mean_of(job: Job, batch: Batch) -> Tensor:
    with torch.no_grad():
        first, second = (network(*batch[0], **batch[1]) for network in (job.one, job.two))
    mean: Tensor = (first + second) / 2
    return mean


def test_every_layer_is_fitted_to_the_mean_on_what_the_merged_layers_before_it_give() -> None:
    job = small(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    _, done = job.run(ridge=1e-2)
    x = merged_x = joined(job.batches)[0][0][0]
    for name, layer in enumerate(job.one):  # type: ignore[arg-type]
        if isinstance(layer, nn.Linear):
            parents = [n[: name + 1](x).detach().numpy() for n in (job.one, job.two)]  # type: ignore[index]
            prior = (layer.weight + job.two[name].weight).detach().numpy() / 2  # type: ignore[index]
            weight, bias = fitted(merged_x.numpy(), (parents[0] + parents[1]) / 2, prior, 1e-2)
            np.testing.assert_allclose(done.tensors[f"{name}.weight"].numpy(), weight, atol=1e-9)
            np.testing.assert_allclose(done.tensors[f"{name}.bias"].numpy(), bias, atol=1e-9)
            merged_x = merged_x @ torch.from_numpy(weight.T) + torch.from_numpy(bias)
        elif isinstance(layer, nn.BatchNorm1d):
            scale, shift = ((p + q) / 2 for p, q in zip(layer.parameters(), job.two[name].parameters(), strict=True))  # type: ignore[index]
            merged_x = (merged_x - merged_x.mean(0)) / (merged_x.var(0) + 1e-5).sqrt() * scale + shift
            merged_x = merged_x.detach()
        else:
            merged_x = layer(merged_x)
    assert list(done.residuals) == ["0", "2", "5"]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_one_layer_in_sequence_is_that_layer_refitted_from_moments(kind: str) -> None:
    if kind == "linear":
        job = small(nn.Linear(4, 3))
    else:
        images = [((torch.randn(n, 2, 6, 5, dtype=torch.float64),), {}) for n in (3, 4)]
        job = small(nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect"), batches=images)
    merged, done = job.run(ridge=1e-2)
    moments = joint_moments(job.one, job.two, job.batches)
    a, b = job.one.state_dict(), job.two.state_dict()
    other = refit(job.spec, a, b, {n: (a[n] + b[n]) / 2 for n in a}, moments, {}, ridge=1e-2)
    for name, x in other.tensors.items():
        torch.testing.assert_close(merged.state_dict()[name], x, rtol=0, atol=1e-10)
    assert done.residuals["0"] == pytest.approx(other.residuals["0"], abs=1e-10)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "resnet-group", "dense", "depthwise", "small-vit", "bert"])
def test_a_network_merged_with_itself_stays_as_it_is(name: str) -> None:
    it = two(name)
    job = job_of(it, b=it.a)
    merged, done = job.run()
    assert relative(it.run(merged), it.run(job.one)) < 1e-9
    assert done.residuals
    assert max(done.residuals.values()) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "resnet-group", "dense", "depthwise"])
def test_with_all_units_apart_the_network_gives_the_mean_of_both(name: str) -> None:
    it = two(name)
    job = job_of(it)
    merged, done = job.run(it.all_apart())
    assert relative(it.run(merged), mean_of(job, (it.args, it.kwargs))) < 1e-9
    assert max(done.residuals.values()) < 1e-12


def consumed(it: Two, name: str) -> set[str]:
    """Groups that a tensor reads."""
    axes = zip(it.spec.axes[name], it.spec.roles[name], strict=True)
    return {group for part, role in axes if role == "consumer" for group in groups_in(part)}


def given(it: Two, network: nn.Module, layer: str) -> Tensor:
    """What a layer gives in a run."""
    seen: list[Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _module, _args, y: seen.append(y))
    it.run(network)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["small-vit", "bert"])
def test_units_of_a_transformer_that_are_apart_give_the_mean_where_they_are_read(name: str) -> None:
    it = two(name)
    tied = {*it.spec.tied, *it.spec.tied.values()}
    for group in free(name):
        inside = {n for g in (group, *it.spec.inner(group)) for n, _ in it.spec.members(g)} - tied
        readers = [n for n in it.spec.axes if n in inside and consumed(it, n)]
        inside |= {n.replace("weight", "bias") for n in readers}
        job = job_of(it, b={n: it.b[n] if n in inside else x for n, x in it.a.items()})
        merged, done = job.run(it.all_apart([group]))
        reader = next(name.removesuffix(".weight") for name in readers if group in consumed(it, name))
        seen = [given(it, network, reader) for network in (job.one, job.two, merged)]
        assert relative(seen[2], (seen[0] + seen[1]) / 2) < 1e-9
        assert relative(seen[0], seen[1]) > 1e-3
        assert done.residuals[reader] < 1e-12


def test_batch_norm_has_the_statistics_of_all_inputs_and_its_momentum_again() -> None:
    job = small(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, momentum=0.3), nn.ReLU(), nn.Linear(6, 2))
    merged, done = job.run()
    y = joined(job.batches)[0][0][0] @ done.tensors["0.weight"].T
    norm = merged[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, y.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, y.var(0), rtol=1e-12, atol=1e-12)
    assert norm.momentum == 0.3
    assert not any(module.training for module in merged.modules())


def test_a_layer_before_batch_norm_is_fitted_about_the_means() -> None:
    job = small(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    x = joined(job.batches)[0][0][0] + 5
    job.batches = [((x,), {})]
    _, done = job.run(ridge=1e-2)
    a, b = (network[0].weight.detach() for network in (job.one, job.two))  # type: ignore[index]
    weight, _ = fitted(x.numpy(), (x @ (a + b).T / 2).numpy(), ((a + b) / 2).numpy(), 1e-2)
    np.testing.assert_allclose(done.tensors["0.weight"].numpy(), weight, atol=1e-9)


class Uses(nn.Module):
    """Convolutions whose outputs go to BatchNorm alone, to something else too, or changed on the way."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("alone", "shared", "changed", "given"):
            setattr(self, name, nn.Linear(4, 4, bias=False))
            setattr(self, f"{name}_norm", nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.alone_norm(self.alone(x)).relu()
        y = self.shared(x)
        y = y + self.shared_norm(y)
        x = self.changed_norm(functional.relu(self.changed(y), inplace=True))
        y = self.given(x)
        return self.given_norm(y), y


def test_only_what_goes_to_batch_norm_and_nowhere_else_is_free_of_its_mean() -> None:
    seen = layers_run(Uses(), ((torch.randn(8, 4),), {}))
    assert seen.free == {"alone"}
    assert seen.layers == ["alone", "shared", "changed", "given"]


def test_how_inputs_are_grouped_changes_no_more_than_rounding() -> None:
    inputs = torch.cat([x for (x,), _ in vectors(60)])
    results = []
    for sizes in ([60], [1, 40, 19], [20, 20, 20]):
        batches: list[Batch] = [((x,), {}) for x in torch.split(inputs, sizes)]
        job = small(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2), batches=batches)
        results.append(job.run(sampling=Sampling(rows=30))[0].state_dict())
    for name, x in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bytes_", [1, 5000])
def test_runs_of_the_parents_in_windows_of_memory_change_no_bit(bytes_: int) -> None:
    it = two("resnet")
    job = job_of(it)
    runs = 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    whole = job.run(it.some_apart())[0].state_dict()
    job.one.register_forward_hook(counted)
    parts, done = job.run(it.some_apart(), sampling=Sampling(memory_bytes=bytes_))
    assert all(torch.equal(x, parts.state_dict()[name]) for name, x in whole.items())
    assert runs > 3
    assert bytes_ > 1 or runs == 2 + len(done.residuals)  # a look at its layers, its copy's, and one for each


def test_rows_are_drawn_by_seed_and_layer_and_only_these_count() -> None:
    job = small(nn.Linear(4, 3), batches=vectors(200, 100))
    sampling = Sampling(rows=50, seed=1)
    drawn = sampling.drawn("0", 4, 300)
    assert len(drawn.unique()) == len(drawn) == 50
    assert torch.equal(drawn, drawn.sort().values)
    assert not torch.equal(drawn, sampling.drawn("1", 4, 300))
    assert not torch.equal(drawn, Sampling(rows=50, seed=2).drawn("0", 4, 300))
    assert len(sampling.drawn("0", 20, 300)) == 80  # 4 for each entry
    assert torch.equal(sampling.drawn("0", 100, 300), torch.arange(300))
    blend = {"0": lambda a, b: a.square() + b}  # no linear function meets it: the rows tell
    _, done = job.run(sampling=sampling, ridge=0.0, blends=blend)
    x = joined(job.batches)[0][0][0][drawn]
    with torch.no_grad():
        y = job.one(x).square() + job.two(x)
    weight, bias = fitted(x.numpy(), y.numpy(), np.zeros((3, 4)), 0.0)
    np.testing.assert_allclose(done.tensors["0.weight"].numpy(), weight, atol=1e-9)
    np.testing.assert_allclose(done.tensors["0.bias"].numpy(), bias, atol=1e-9)


def test_places_of_images_are_drawn_alike_from_what_is_taken_in_and_given() -> None:
    images = [((torch.randn(n, 2, 11, 10, dtype=torch.float64),), {}) for n in (3, 5)]
    job = small(nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), batches=images)
    sampling = Sampling(rows=80)
    _, done = job.run(sampling=sampling, ridge=0.0, blends={"0": lambda a, b: a.square() + b})
    x = joined(images)[0][0][0]
    with torch.no_grad():
        y = (job.one(x).square() + job.two(x)).movedim(1, -1).reshape(-1, 3)
    rows = functional.unfold(x, 3, 2, 1, 2).transpose(1, 2).reshape(len(y), -1)
    drawn = sampling.drawn("0", 18, len(y))
    assert 80 == len(drawn) < len(y)
    weight, bias = fitted(rows[drawn].numpy(), y[drawn].numpy(), np.zeros((3, 18)), 0.0)
    np.testing.assert_allclose(done.tensors["0.weight"].numpy().reshape(3, -1), weight, atol=1e-9)
    np.testing.assert_allclose(done.tensors["0.bias"].numpy(), bias, atol=1e-9)


class Turned(nn.Module):
    """Rows of all examples at a place stand together, as in networks that have time first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh()).transpose(0, 1)


def test_networks_that_put_places_before_examples_are_fitted_to_the_rows_of_the_same_places() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(24, 3, 4, dtype=torch.float64)
    results = []
    for sizes in ([24], [6, 12, 6]):
        batches: list[Batch] = [((x,), {}) for x in torch.split(inputs, sizes)]
        torch.manual_seed(1)
        job = job_of(of(Turned(), (inputs[:2],)), batches)
        results.append(job.run()[1])
    assert results[0].residuals["first"] < 1e-12
    for name, x in results[0].tensors.items():
        torch.testing.assert_close(results[1].tensors[name], x, rtol=1e-10, atol=1e-10)


class Standardised(nn.Conv2d):
    """A convolution that changes its weight before it uses it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Odd(nn.Module):
    """Layers that cannot be refitted one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.same = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same.bias = self.one.bias
        self.twice, self.each = nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=4)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.standard, self.unused = Standardised(4, 4, 1), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.same(self.one(x)).tanh()).tanh()).tanh()
        x = self.normed(self.each(x[..., None])[..., 0])
        x = functional.linear(x, self.unused.weight, self.unused.bias)
        return self.last(self.standard(x[..., None, None])[..., 0, 0])


def test_layers_that_cannot_be_refitted_are_left_and_named() -> None:
    torch.manual_seed(0)
    network = Odd().double().eval()
    batches = vectors(30)
    spec = symmetries(network, *batches[0], check=False).spec
    other = copy.deepcopy(network)
    other.load_state_dict(stirred(network.state_dict(), 1))
    job = Job(network, other, spec, batches)
    merged, done = job.run()
    assert done.kept == {
        "one": "its weight or bias is another tensor too",
        "same": "its weight or bias is another tensor too",
        "twice": "it runs 2 times",
        "each": "it is a convolution in groups",
        "normed": "its weight or bias is computed from others",
        "standard": "it computes something else than Conv2d",
        "unused": "it does not run as a module",
    }
    assert done.tensors.keys() == {"last.weight", "last.bias"}
    a, b = network.state_dict(), other.state_dict()
    for name, x in merged.state_dict().items():
        assert torch.equal(x, (a[name] + b[name]) / 2) or name in done.tensors


def test_parents_are_left_as_they_are() -> None:
    it = two("resnet")
    job = job_of(it)
    job.two.train()
    before = [copy.deepcopy(network.state_dict()) for network in (job.one, job.two)]
    job.run(it.some_apart())
    for network, state in zip((job.one, job.two), before, strict=True):
        assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(module.training for module in job.two.modules())

"""A head fitted to labels: scikit-learn's logistic regression from zero, stationary from anywhere, zeros stay zeros."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.probe import probe
from merganser.align.wider import Record
from merganser.errors import NonFiniteError, ParameterError


class Net(nn.Module):
    """Some features and a head."""

    def __init__(self, classes: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 6)
        self.head = nn.Linear(6, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def labelled(count: int = 120, batches: int = 3) -> list[tuple[Batch, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pairs: list[tuple[Batch, Tensor]] = []
    for _ in range(batches):
        x = torch.randn(count // batches, 5, generator=generator)
        noise = torch.rand(len(x), generator=generator) < 0.2
        pairs.append((((x,), {}), (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long() * ~noise))
    return pairs


def features(net: Net, pairs: list[tuple[Batch, Tensor]]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        x = torch.cat([torch.relu(net.body(args[0])) for (args, _), _ in pairs]).double()
    return x, torch.cat([classes for _, classes in pairs])


def test_from_a_head_of_zeros_it_is_logistic_regression_as_scikit_learn_has_it() -> None:
    from sklearn.linear_model import LogisticRegression

    net, pairs, ridge = Net(), labelled(), 0.02
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    found = probe(net, Record(), "head", pairs, ridge=ridge)
    x, classes = features(net, pairs)
    pull = ridge * float(x.square().mean())
    peer = LogisticRegression(C=1 / (pull * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), classes.numpy())
    logits = x @ found.weight.double().T + found.bias.double()  # type: ignore[union-attr]
    assert np.allclose(logits.softmax(1).numpy(), peer.predict_proba(x.numpy()), atol=1e-6)
    assert found.losses[0] == pytest.approx(math.log(3))
    assert found.examples == 120


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_what_it_finds_is_where_the_objective_has_no_slope(bias: bool, ridge: float) -> None:
    net, pairs = Net(bias=bias).double(), labelled()
    pairs = [(((args[0].double(),), {}), classes) for (args, _), classes in pairs]
    found = probe(net, Record(), "head", pairs, ridge=ridge)
    x, classes = features(net, pairs)
    weight = found.weight.clone().requires_grad_()
    shift = torch.zeros(3, dtype=torch.float64) if found.bias is None else found.bias.clone()
    shift.requires_grad_(bias)
    moved = (weight - net.head.weight.detach()).square().sum()
    loss = nn.functional.cross_entropy(x @ weight.T + shift, classes) + ridge * x.square().mean() / 2 * moved
    slopes = torch.autograd.grad(loss, [weight, shift] if bias else [weight])
    assert max(float(s.abs().max()) for s in slopes) < 1e-7
    assert found.losses[1] < found.losses[0]
    assert (found.bias is None) == (not bias)


def test_entries_of_blocks_that_are_zero_stay_zero() -> None:
    net, pairs = Net(), labelled()
    # rows: one of A's, one merged, one of B's; columns: two of each
    record = Record(sides={"head": ([[1, 1], [0, 1], [2, 1]], [[1, 2], [0, 2], [2, 2]])})
    with torch.no_grad():
        net.head.weight[0, 4:] = 0
        net.head.weight[2, :2] = 0
    found = probe(net, record, "head", pairs)
    changed = found.weight != net.head.weight
    assert not changed[0, 4:].any()
    assert not changed[2, :2].any()
    assert changed[0, :4].all()
    assert changed[1].all()
    assert changed[2, 2:].all()


def test_a_strong_pull_leaves_the_head_and_the_network_is_never_changed() -> None:
    net, pairs = Net(bias=False).train(), labelled()
    before = {n: x.clone() for n, x in net.state_dict().items()}
    found = probe(net, Record(), "head", pairs, ridge=1e9)
    assert torch.allclose(found.weight, before["head.weight"], atol=1e-6)
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())
    assert net.training
    assert not net.head._forward_pre_hooks


def test_batches_in_another_cut_give_the_same_head() -> None:
    net = Net()
    whole = labelled(batches=1)
    x, classes = whole[0][0][0][0], whole[0][1]
    parts: list[tuple[Batch, Tensor]] = [(((x[i : i + 7],), {}), classes[i : i + 7]) for i in range(0, len(x), 7)]
    one, many = (probe(net, Record(), "head", pairs) for pairs in (whole, parts))
    assert torch.allclose(one.weight, many.weight, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "classes", "message"),
    [
        ("tail", torch.zeros(4, dtype=torch.int64), "a probe is for a linear head, and tail: the network has no such"),
        ("", torch.zeros(4, dtype=torch.int64), "it is Net"),
        ("head", torch.tensor([0, 1, 2, 3]), "classes are 0 to 3, and head has 3 outputs"),
        ("head", torch.tensor([0, -1, 2, 1]), "classes are -1 to 2"),
        ("head", torch.zeros(4), "they are whole numbers"),
        ("head", torch.zeros(3, dtype=torch.int64), "head takes in 4 rows of a batch of 3 classes"),
    ],
)
def test_what_is_no_head_and_no_class_is_refused(layer: str, classes: Tensor, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        probe(Net(), Record(), layer, [(((torch.zeros(4, 5),), {}), classes)])


def test_no_example_a_bad_ridge_and_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ParameterError, match="there is no example"):
        probe(Net(), Record(), "head", [])
    with pytest.raises(ParameterError, match="ridge is -1"):
        probe(Net(), Record(), "head", labelled(), ridge=-1)
    with pytest.raises(NonFiniteError, match="head NaN or infinity"):
        probe(Net(), Record(), "head", [(((torch.full((2, 5), math.nan),), {}), torch.tensor([0, 1]))])

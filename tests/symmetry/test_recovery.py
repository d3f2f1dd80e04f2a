"""Matching finds the very order that a copy's units were brought into: for all kinds of networks, bit for bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor

from merganser.align.costs import Similarity, WeightCosts
from merganser.align.match import match
from merganser.symmetry import Spec, symmetries

NAMES = """
    mlp mlp-bn maxout highway tied-autoencoder siamese nerf moe-stacked moe-listed tcn wavenet lstm gru elman pointnet
    gat dlrm two-towers vgg resnet resnet-option-a resnet-gn resnext se-resnet densenet mobilenet-v3 shufflenet-v2
    convnext sknet unet super-resolution style-transfer vit-fused xcit cait mlp-mixer gmlp torch-encoder perceiver gpt
    bert albert gpt2 gpt-neox llama-3 gemma phi3 falcon-new mamba rwkv bloom
"""


@cache
def network(name: str) -> tuple[Spec, dict[str, Tensor]]:
    """Symmetries and weights."""
    built = ARCHITECTURES[name]()
    return symmetries(*built, check=False).spec, built[0].state_dict()


def permuted(spec: Spec, tensors: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random element of the group, and the tensors in that order."""
    orders = spec.random(torch.Generator().manual_seed(seed))
    return orders, {name: spec.apply(orders, name, x) for name, x in tensors.items()}


@pytest.mark.parametrize("kind", ["frobenius", "pearson"])
@pytest.mark.parametrize("name", NAMES.split())
def test_a_permuted_copy_is_brought_back_bit_for_bit(name: str, kind: Similarity) -> None:
    spec, a = network(name)
    _, b = permuted(spec, a, seed=5)
    assert any(not torch.equal(a[n], b[n]) for n in a)
    found = match(spec, WeightCosts(spec, a, b, kind))
    assert found.settled
    assert [n for n in a if not torch.equal(spec.apply(found.orders, n, b[n]), a[n])] == []


@pytest.mark.parametrize("name", ["mlp", "resnet", "resnext", "moe-stacked", "vit-fused", "gpt2", "llama-3", "bloom"])
def test_the_order_is_found_through_noise(name: str) -> None:
    """A twentieth of every tensor's size; what is found is the inverse of what was done, in every group."""
    spec, a = network(name)
    moved, b = permuted(spec, a, seed=6)
    generator = torch.Generator().manual_seed(7)
    for x in (x for x in b.values() if x.is_floating_point()):
        x += 0.05 * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)
    found = match(spec, WeightCosts(spec, a, b)).orders
    undone = spec.inverse(moved)
    assert [group for group in spec.groups if not torch.equal(found[group], undone[group])] == []


@pytest.mark.parametrize("name", ["resnet", "llama-3"])
def test_another_order_of_groups_in_a_sweep_finds_the_same(name: str) -> None:
    spec, a = network(name)
    _, b = permuted(spec, a, seed=8)
    one, two = (match(spec, WeightCosts(spec, a, b), seed=seed).orders for seed in (0, 1))
    assert all(torch.equal(one[group], two[group]) for group in spec.groups)


@pytest.mark.parametrize("name", ["resnext", "llama-3", "bloom", "cait"])
def test_orders_of_a_real_network_compose_and_undo(name: str) -> None:
    spec, a = network(name)
    first, b = permuted(spec, a, seed=9)
    then, c = permuted(spec, b, seed=10)
    both, undone = spec.compose(first, then), spec.inverse(first)
    for n, x in a.items():
        assert torch.equal(spec.apply(both, n, x), c[n]), n
        assert torch.equal(spec.apply(undone, n, b[n]), x), n

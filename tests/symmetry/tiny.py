"""What a tiny network of the tests is: a network in evaluation mode, and inputs to run it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: A network, its positional inputs, its named ones.
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Built]

CLASSES, VOCABULARY = 11, 97


def tiny(make: Callable[..., nn.Module], inputs: Callable[[], Any], **options: Any) -> Builder:
    """A builder that gives the same weights and inputs every time.

    Args:
        make: gives the network.
        inputs: gives one tensor, a tuple of positional inputs or a dict of named ones.
        options: of the network.
    """

    def build() -> Built:
        torch.manual_seed(0)
        network = make(**options).eval()
        stir(network)
        given = inputs()
        if isinstance(given, dict):
            return network, (), given
        return network, given if isinstance(given, tuple) else (given,), {}

    return build


def stir(network: nn.Module) -> None:
    """Noise on all weights and statistics: scales of one and biases of zero would hide a wrong order."""
    with torch.no_grad():
        for x in network.parameters():
            x += 0.1 * torch.randn_like(x)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= torch.exp(0.3 * torch.randn_like(module.running_var))


def pictures(side: int = 16, channels: int = 3) -> Tensor:
    """Two square pictures."""
    return torch.randn(2, channels, side, side)


def vectors() -> Tensor:
    """Five vectors."""
    return torch.randn(5, 12)


def tokens() -> Tensor:
    """Two texts of seven tokens."""
    return torch.randint(0, VOCABULARY, (2, 7))


def sequences() -> Tensor:
    """Two sequences of seven vectors."""
    return torch.randn(2, 7, 12)

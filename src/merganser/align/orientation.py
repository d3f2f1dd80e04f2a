"""Which way a layer's weight lies: outputs first, as in nn.Linear, or inputs first, as in transformers' Conv1D (GPT-2).

    nn.Linear, convolutions    y = x W^T + b    W: (outputs, inputs, taps ..)
    Conv1D                     y = x W + b      W: (inputs, outputs)

Least squares are done on outputs by entries, whichever way a weight lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.layout import MAKING
from merganser.symmetry import Spec


def is_turned(layer: nn.Module) -> bool:
    """Whether a module is transformers' linear layer whose weight has its inputs first."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def outputs_of(layer: nn.Module) -> int:
    """How many outputs a linear layer or convolution has."""
    weight: Any = layer.weight  # which may be computed from others
    return int(weight.shape[1 if is_turned(layer) else 0])


def entries_of(layer: nn.Module) -> int:
    """How many entries a row of its inputs has: inputs of one output, with all taps."""
    weight = layer.get_parameter("weight")
    return weight.shape[0] if is_turned(layer) else weight[0].numel()


def inputs_first(spec: Spec, name: str) -> bool:
    """Whether the symmetries say that a weight of two axes reads along the first and makes along the second."""
    roles = spec.roles.get(name, ())
    return len(roles) == 2 and roles[0] not in MAKING and roles[1] in MAKING


def matrix_of(weight: Tensor, *, turned: bool = False) -> Tensor:
    """A weight as outputs by entries, float64."""
    flat = weight.detach().T if turned else weight.detach().reshape(len(weight), -1)
    return flat.to("cpu", torch.float64)


def weight_of(matrix: Tensor, like: Tensor, *, turned: bool = False) -> Tensor:
    """A weight of some shape and type from outputs by entries."""
    return (matrix.T if turned else matrix.reshape(like.shape)).to(like)

"""What a network does on data: second moments of the inputs of its linear layers, and its Fisher information.

    gram/NAME    sum over examples and places of x x^T, x the input of the linear weight or convolution NAME   (in, in)
    fisher/NAME  mean over examples of the squared gradient of log p(y | example), y drawn from the model's own p

No labels are used. Sums are in float64; the result is stored as float32, whatever was fed.

Sources: Jin et al. 2023, arXiv:2212.09849 (RegMean), equation 2; Matena & Raffel 2022, arXiv:2111.09832, equation 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.errors import ParameterError

Kind = Literal["gram", "fisher"]
Output = Callable[[Any], Any]


def measure(
    network: nn.Module,
    batches: Iterable[Batch],
    kinds: Sequence[Kind],
    *,
    output: Output | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Statistics of a network on batches of inputs.

    Args:
        network: in evaluation mode, on the device where it shall run.
        batches: inputs; the first axis of every tensor counts examples.
        kinds: "gram", "fisher" or both.
        output: takes the logits (examples, ..., classes) out of what the network returns; needed for "fisher" where
            that is not a tensor.
        seed: of the draws of y.

    Returns:
        float32 tensors by `kind/name`; those of "gram" have shape (in, in) or (in * kernel, in * kernel).

    Raises:
        ParameterError: If there is no batch, or the network has nothing to measure or gives no logits.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    examples = 0
    for args, kwargs in batches:
        if "gram" in kinds:
            _add_grams(network, args, kwargs, sums)
        if "fisher" in kinds:
            examples += _add_fisher(network, args, kwargs, output, generator, sums)
        else:
            examples += 1
    if not examples:
        raise ParameterError("there is no batch to measure with")
    if not sums:
        raise ParameterError("the network has no linear layer and no convolution")
    means = {name: total / examples if name.startswith("fisher/") else total for name, total in sums.items()}
    return {name: x.float() for name, x in sorted(means.items())}


def _add_grams(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], sums: dict[str, Tensor]) -> None:
    names = {id(p): n for n, p in network.named_parameters()}

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        x = _columns(module, inputs[0]).double()
        key = f"gram/{names[id(weight)]}"
        gram = x.T @ x
        sums[key] = sums[key] + gram if key in sums else gram

    handles = [m.register_forward_pre_hook(hook) for m in network.modules() if _measured(m)]
    try:
        with torch.no_grad():
            network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _measured(module: nn.Module) -> bool:
    """Linear layers, in (out, in) or, as in GPT-2, in (in, out); convolutions without groups."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as rows of what its weight, seen as a matrix, multiplies."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.detach().reshape(-1, x.shape[-1])
    axes = len(module.kernel_size)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x.detach(), list(module._reversed_padding_repeated_twice), mode=mode)
    for i in range(axes):
        x = x.unfold(2 + i, reach[i], module.stride[i])
    for i in range(axes):
        taken = torch.arange(0, reach[i], module.dilation[i], device=x.device)
        x = x.index_select(2 + axes + i, taken)
    places = range(2, 2 + axes)
    kernel = range(2 + axes, 2 + 2 * axes)
    x = x.permute(0, *places, 1, *kernel)
    return x.flatten(1 + axes).flatten(0, axes)


def _add_fisher(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Output | None,
    generator: torch.Generator,
    sums: dict[str, Tensor],
) -> int:
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
    if not given:
        raise ParameterError("a batch holds no tensor")
    examples = given[0].shape[0]
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    for i in range(examples):

        def one(x: Any, i: int = i) -> Any:
            return x[i : i + 1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == examples else x

        network.zero_grad(set_to_none=True)
        result = network(*map(one, args), **{n: one(x) for n, x in kwargs.items()})
        logits = output(result) if output is not None else result
        if not isinstance(logits, Tensor):
            raise ParameterError(f"the network gives a {type(logits).__name__}; Fisher information needs logits")
        chances = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)
        drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator).to(chances.device)
        chances.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
        for name, p in parameters.items():
            if p.grad is not None:
                square = p.grad.detach().double().square()
                key = f"fisher/{name}"
                sums[key] = sums[key].add_(square) if key in sums else square
    network.zero_grad(set_to_none=True)
    for name, p in parameters.items():
        sums.setdefault(f"fisher/{name}", torch.zeros_like(p, dtype=torch.float64))
    return examples

"""A spec is believed when random elements of its group leave the network's output as it is, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from merganser.errors import ParameterError
from merganser.symmetry.record import Output, copied, tensors_of
from merganser.symmetry.spec import Spec

TOLERANCE = 1e-9
#: Numbers of less than double precision, and what they become.
NARROW = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


class InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Networks that cast to float32 on the way, as RMSNorm and attention often do, stay in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        args, kwargs = (tree_map(_widened_type if writes else _widened, x) for x in (args, kwargs or {}))
        return _grouped_mm(*args) if func is torch.ops.aten._grouped_mm.default else func(*args, **kwargs)


def _grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """What the fused kernel does, which knows no float64."""
    starts = [0, *ends.tolist()]
    return torch.cat([rows[a:b] @ matrix for a, b, matrix in zip(starts, starts[1:], matrices, strict=False)])


def _widened(x: Any) -> Any:
    return x.to(NARROW[x.dtype]) if isinstance(x, Tensor) and x.dtype in NARROW else _widened_type(x)


def _widened_type(x: Any) -> Any:
    return NARROW.get(x, x) if isinstance(x, torch.dtype) else x


def failing(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    spec: Spec,
    *,
    output: Output | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Groups that change the output; none where the spec is sound.

    Weights are taken with a little noise on all of them, since scales of one and biases of zero hide an order.

    Args:
        network: left as it is.
        args: positional inputs.
        kwargs: named inputs.
        spec: to check.
        output: what of the result must stay as it is; by default all of it.
        seed: of the noise and of the group element.
        tolerance: largest change, relative to the largest output.
    """
    if not spec.groups:
        return []
    judge = _Judge(network, args, kwargs, output, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    everything = spec.random(generator)
    if judge.change(spec, everything) <= tolerance:
        return []
    suspects = [name for name in spec.groups if judge.change(spec, _only(spec, everything, [name])) > tolerance]
    return suspects or list(spec.groups)  # sound one by one and not together: none can be kept


def _only(spec: Spec, orders: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {**spec.identity(), **{name: orders[name] for name in names}}


def _independent(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"the network cannot be copied: {error}") from error


class _Judge:
    """A network in float64, and what it gives."""

    def __init__(
        self,
        network: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        output: Output | None,
        seed: int,
    ) -> None:
        self.output = output
        self.network = _independent(network).double().eval()
        self.args, self.kwargs = (tree_map_only(Tensor, doubled, x) for x in (tuple(args), dict(kwargs or {})))
        generator = torch.Generator().manual_seed(seed)
        named = {
            **dict(self.network.named_parameters(remove_duplicate=False)),
            **dict(self.network.named_buffers(remove_duplicate=False)),
        }
        known: dict[int, Tensor] = {}
        for x in named.values():
            if id(x) not in known:
                known[id(x)] = stirred(x.detach(), generator)
        self.tensors = {name: known[id(x)] for name, x in named.items()}
        self.reference = self._run(self.tensors)

    def change(self, spec: Spec, orders: Mapping[str, Tensor]) -> float:
        """Largest change of an output, relative to the largest output; infinite where numbers come or go."""
        moved = {n: spec.apply(orders, n, x) if n in spec.axes else x for n, x in self.tensors.items()}
        return max(change_of(one, two) for one, two in zip(self.reference, self._run(moved), strict=True))

    def _run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        usual, wide = torch.get_default_dtype(), InDouble()  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), wide, torch.random.fork_rng([]):
                torch.manual_seed(0)
                network = copied(self.network)  # a run may keep things
                given = {name: x.clone() for name, x in tensors.items()}
                result = torch.func.functional_call(network, given, self.args, self.kwargs, tie_weights=False)
        finally:
            torch.set_default_dtype(usual)
        return tensors_of(result, self.output)


def change_of(one: Tensor, two: Tensor) -> float:
    """Largest difference of two tensors, as a share of the first one's largest entry."""
    if one.shape != two.shape or not one.numel():
        return 0.0 if one.shape == two.shape else inf
    if not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, two) else inf
    finite = torch.isfinite(one)
    if not torch.equal(torch.nan_to_num(one)[~finite], torch.nan_to_num(two)[~finite]):
        return inf
    if not torch.equal(finite, torch.isfinite(two)):
        return inf
    if not bool(finite.any()):
        return 0.0
    return float((one - two)[finite].abs().max()) / max(float(one[finite].abs().max()), 1e-300)


def doubled(x: Tensor) -> Tensor:
    """In float64, where it is a floating one."""
    return x.double() if x.is_floating_point() else x


def stirred(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a tenth of the tensor's size; variances and other positive tensors stay positive."""
    if not x.is_floating_point() or not x.numel():
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    if bool((x >= 0).all()) and bool((x > 0).any()):
        return x * torch.exp(0.1 * noise)
    scale = float(x.square().mean().sqrt()) or 0.1
    return x + 0.1 * scale * noise

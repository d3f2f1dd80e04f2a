"""A spec is believed when random elements of its group leave the network's output as it is, in float64.

How large a change of an entry is, is told by how much the entry differs between two draws of noise on the weights. Its
own size would not do: a mask that adds -1e9 or fills with the least number would hide what happens to the others, and
an entry that happens to be near zero would seem to have changed by a lot.

Whole numbers, such as of argmax, are compared exactly. They tell little of what they were made from, so that where an
output is of whole numbers, every tensor that some operation made whole numbers of is compared, too: as a bag of
numbers, since its units may be in another order. Where no such tensor is seen either, as behind numpy, more draws of
weights and of elements are tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from merganser.errors import ParameterError
from merganser.symmetry.record import Output, copied, tensors_of
from merganser.symmetry.spec import Spec

TOLERANCE = 1e-9
#: Rounding of an entry that was added to a large number, as a share of it: a few hundred times the last bit.
ROUNDING = 1e-13
#: Draws of weights and of elements where all that is seen are whole numbers.
DRAWS = 16
#: Entries from which noise is drawn in float32: tensors that a network computes with, rather than scales and biases.
LARGE = 1 << 16
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


class Deciding(InDouble):  # type: ignore[no-untyped-call]
    """Notes the numbers, sorted, of every tensor that an operation makes whole numbers of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        given = [x.clone() for x in given] if writes else given
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel()]
        if given and any(whole([x]) for x in made):
            self.noted += [x.double().flatten().sort().values for x in given if not whole([x])]
        return result


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
        tolerance: largest change of an entry, relative to what noise on the weights changes it by.
    """
    if not spec.groups:
        return []
    judge = _Judge(network, args, kwargs, output, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for draw in range(DRAWS if whole(judge.differences) else 1):
        if draw:
            judge.draw(seed + draw)
        everything = spec.random(generator)
        if judge.change(spec, everything) > tolerance:
            suspects = [name for name in spec.groups if judge.change(spec, _only(spec, everything, [name])) > tolerance]
            return suspects or list(spec.groups)  # sound one by one and not together: none can be kept
    return []


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
        self.deciding = False
        self.draw(seed)
        if any(whole([x]) for x in self.differences):
            self.deciding = True
            self.draw(seed)

    def draw(self, seed: int) -> None:
        """Take other noise, and run the network with it."""
        generator = torch.Generator().manual_seed(seed)
        self.tensors = self._stirred(generator)
        self.reference = self._run({name: x.clone() for name, x in self.tensors.items()})
        others = self._run({name: x.clone() for name, x in self._stirred(generator).items()})
        self.differences = differences(self.reference, others)
        self.scales = scales_of(self.reference, others)

    def change(self, spec: Spec, orders: Mapping[str, Tensor]) -> float:
        """Largest change of an output, as `change_of` counts it."""
        moved = {n: spec.apply(orders, n, x) if n in spec.axes else x for n, x in self.tensors.items()}
        moved = {n: y.clone() if y is self.tensors[n] else y for n, y in moved.items()}
        return largest_change(self.reference, self._run(moved), self.scales)

    def _stirred(self, generator: torch.Generator) -> dict[str, Tensor]:
        """All parameters and buffers with noise; tied ones stay one tensor."""
        named = {
            **dict(self.network.named_parameters(remove_duplicate=False)),
            **dict(self.network.named_buffers(remove_duplicate=False)),
        }
        known: dict[int, Tensor] = {}
        for x in named.values():
            if id(x) not in known:
                known[id(x)] = stirred(x.detach(), generator)
        return {name: known[id(x)] for name, x in named.items()}

    def _run(self, given: dict[str, Tensor]) -> list[Tensor]:
        """What comes out; the run may write to the tensors."""
        network = copied(self.network)  # a run may keep things
        mode = Deciding() if self.deciding else InDouble()  # type: ignore[no-untyped-call]
        with in_double(mode):
            result = torch.func.functional_call(network, given, self.args, self.kwargs, tie_weights=False)
        return tensors_of(result, self.output) + (mode.noted if isinstance(mode, Deciding) else [])


@contextmanager
def in_double(wide: InDouble | None = None) -> Iterator[None]:
    """Run networks in float64, without gradients, and with the same random numbers every time."""
    usual, wide = torch.get_default_dtype(), wide or InDouble()  # type: ignore[no-untyped-call]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), wide, torch.random.fork_rng([]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(usual)


def whole(results: Sequence[Tensor]) -> bool:
    """Whether all numbers are whole ones, zeros among them."""
    return not any(x.is_complex() or bool((x != x.round())[torch.isfinite(x)].any()) for x in map(_counted, results))


def differences(results: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """What every entry differs by between two draws of weights; the entry itself where shapes differ."""
    alike = len(results) == len(others) and all(x.shape == y.shape for x, y in zip(results, others, strict=True))
    return (
        [_counted(x) - _counted(y) for x, y in zip(results, others, strict=True)]
        if alike
        else [*map(_counted, results)]
    )


def scales_of(results: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """What a change of every entry of every result is large against.

    It is the entry's difference between two draws of weights, and where that happens to be small, what one in ten of
    the entries that differ at all stays under. Where no weight matters it is the entry itself.
    """
    return [_scale(x, y) for x, y in zip(results, differences(results, others), strict=True)]


def _scale(one: Tensor, difference: Tensor) -> Tensor:
    spread = torch.nan_to_num(difference.abs().double(), 0.0, 0.0)
    if not bool((spread > 0).any()):
        spread = torch.nan_to_num(_counted(one).abs().double(), 0.0, 0.0)
    some = spread[spread > 0]
    return torch.clamp_min(spread, float(some.kthvalue(1 + len(some) // 10).values) if len(some) else 0.0)


def _counted(x: Tensor) -> Tensor:
    return x if x.is_complex() else x.double()


def largest_change(results: Sequence[Tensor], others: Sequence[Tensor], scales: Sequence[Tensor]) -> float:
    """Largest change of any entry of any result; infinite where there are more or fewer results."""
    if len(results) != len(others):
        return inf
    return max(change_of(*three) for three in zip(results, others, scales, strict=True))


def change_of(one: Tensor, two: Tensor, scale: Tensor) -> float:
    """Largest difference of the entries of two tensors, each as a share of its scale.

    An entry's own rounding is no difference. Entries that are not finite have to be the same.

    Args:
        one: what there was.
        two: what there is.
        scale: of the first's entries, as `scales_of` gives it.

    Returns:
        The change; infinite where shapes differ, where whole numbers do, and where numbers come or go.
    """
    if one.shape != two.shape or not one.numel():
        return 0.0 if one.shape == two.shape else inf
    if not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, two) else inf
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(two)):
        return inf
    if not torch.equal(torch.nan_to_num(one)[~finite], torch.nan_to_num(two)[~finite]):
        return inf
    one, two, scale = one[finite], two[finite], scale[finite]
    change = (one - two).abs()
    moved = change > ROUNDING * one.abs()
    return float((change[moved] / scale[moved].clamp_min(1e-300)).max()) if bool(moved.any()) else 0.0


def doubled(x: Tensor) -> Tensor:
    """In float64, where it is a floating one."""
    return x.double() if x.is_floating_point() else x


def stirred(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a tenth of the tensor's size; variances and other positive tensors stay positive.

    For large tensors it is drawn in float32, which is five times as fast: it only has to tell entries apart.
    """
    if not x.is_floating_point() or not x.numel():
        return x
    drawn = torch.float32 if x.numel() >= LARGE else torch.float64
    noise = torch.randn(x.shape, generator=generator, dtype=drawn).to(x.device, torch.float64)
    least, most = x.aminmax()
    if bool(least >= 0) and bool(most > 0):
        return x * torch.exp(0.1 * noise)
    scale = float(torch.linalg.vector_norm(x)) / x.numel() ** 0.5 or 0.1
    return noise.mul_(0.1 * scale).add_(x)

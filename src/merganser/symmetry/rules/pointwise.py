"""Operations that work entry by entry, with broadcasting; and reductions along an axis."""

from __future__ import annotations

from collections.abc import Sequence

from merganser.symmetry.axes import ONE, Axis
from merganser.symmetry.flow import FACTORIES, Flow, Rule, values_in
from merganser.symmetry.record import Call, Value


def factory(flow: Flow, call: Call) -> None:
    """Equal entries, which any order leaves as they are."""
    for value in call.outputs:
        flow.set(value, [flow.uniform(size) for size in value.shape])


def entrywise(flow: Flow, call: Call) -> None:
    """Every entry of the result comes from the entries at its place: aligned axes are equal."""
    inputs = values_in(call.args)
    axes = broadcast(flow, inputs, call.outputs[0].shape)
    _note_roles(flow, call, inputs)
    for value in call.outputs:
        flow.set(value, axes)


def broadcast(flow: Flow, values: Sequence[Value], shape: Sequence[int]) -> list[Axis]:
    """Axes of a result of that shape, from values that are aligned at the last axis."""
    axes: list[Axis] = [ONE] * len(shape)
    for value in values:
        offset = len(shape) - len(value.shape)
        for i, axis in enumerate(flow.of(value)):
            if value.shape[i] == 1:
                continue
            if axes[offset + i] == ONE:
                axes[offset + i] = axis
            else:
                flow.unify(axes[offset + i], axis)
    return [flow.uniform(size) if axis == ONE and size > 1 else axis for axis, size in zip(axes, shape, strict=True)]


def prelu(flow: Flow, call: Call) -> None:
    """One slope for all channels, or one each: channels are the second axis."""
    x, slope = call.args["self"], call.args["weight"]
    if slope.shape and slope.shape[0] > 1:
        flow.unify(flow.of(slope)[0], flow.of(x)[1])
    flow.set(call.outputs[0], flow.of(x))


def _note_roles(flow: Flow, call: Call, inputs: Sequence[Value]) -> None:
    role = {"add": "additive", "sub": "additive", "mul": "scale", "div": "scale"}.get(call.op)
    for value in inputs:
        if role is not None and len(inputs) > 1:
            for axis in range(len(value.shape)):
                flow.role(value, axis, role)  # type: ignore[arg-type]


def reduction(flow: Flow, call: Call) -> None:
    """A sum, mean, norm or extreme does not see the order along the axes that it takes in."""
    source = call.args.get("self", call.args.get("input"))
    assert isinstance(source, Value)
    dims = call.args.get("dim")
    rank = len(source.shape)
    if dims is None or dims == []:
        dims = range(rank)
    taken = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()
    axes = flow.of(source)
    if call.op in ("max", "min") and len(call.outputs) == 2 and call.outputs[1].number in flow.read:
        for i in taken:
            flow.pin_axis(axes[i], f"places along it are given by {call.op}")
    keep = bool(call.args.get("keepdim", False))
    left = [ONE if i in taken else axis for i, axis in enumerate(axes) if keep or i not in taken]
    for value in call.outputs:
        flow.set(value, left)


def ordered(flow: Flow, call: Call) -> None:
    """The result depends on the order along one axis, or tells places along it: that axis is pinned."""
    source = call.args["self"]
    rank, dims = len(source.shape), call.args.get("dim", call.args.get("dims", -1))
    if dims is None or dims == []:
        flow.give_up(f"{call.op} over a flattened tensor")
        return
    axes = flow.of(source)
    told = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)} if rank else set()
    for dim in sorted(told):
        flow.pin_axis(axes[dim], f"{call.op} along it")
    flow.products.append([axis for dim, axis in enumerate(axes) if dim not in told])
    for value in call.outputs:
        fits = len(value.shape) == rank
        left = axes if fits else [axis for i, axis in enumerate(axes) if i != dims % rank]
        flow.set(
            value,
            [
                axis if flow.atoms.size(axis) == size else flow.atoms.new(size, pinned=f"{call.op} along it")
                for axis, size in zip(left, value.shape, strict=True)
            ],
        )


def gated(flow: Flow, call: Call) -> None:
    """One half of an axis gates the other: both halves are equal."""
    source = call.args["self"]
    dim = call.args["dim"] % len(source.shape)
    axes = list(flow.of(source))
    one, two = flow.atoms.cut(axes[dim], [source.shape[dim] // 2])
    flow.unify(one, two)
    axes[dim] = one
    flow.set(call.outputs[0], axes)


def along(flow: Flow, call: Call) -> None:
    """Softmax and its kind: every entry sees all others of its axis, in any order."""
    source = call.args["self"]
    axes = flow.of(source)
    dim = call.args["dim"] % max(len(axes), 1)
    flow.products.append([axis for i, axis in enumerate(axes) if i != dim])
    flow.set(call.outputs[0], axes)


def image(flow: Flow, call: Call) -> None:
    """Pooling and resizing: examples and channels stay, places in the picture are fixed."""
    source = call.args.get("self", call.args.get("input"))
    assert isinstance(source, Value)
    axes = flow.of(source)
    rank = {"1": 1, "2": 2, "3": 3}.get(next((c for c in call.op if c in "123"), "2"), 2)
    outer = len(axes) - rank
    for axis in axes[outer:]:
        flow.pin_axis(axis, f"{call.op} along it")
    for value in call.outputs:
        flow.set(value, [*axes[:outer], *(flow.atoms.new(n, pinned="a place") for n in value.shape[outer:])])


def _words(text: str) -> list[str]:
    return text.split()


ENTRYWISE = _words(
    """
    _prelu_kernel _to_copy abs acos add addcdiv addcmul alias asin atan atan2 bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max
    clamp_min clone copy cos cosh detach div elu eq erf erfc exp exp2 expm1 fill floor floor_divide fmod
    ge gelu gt hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp lift_fresh lift_fresh_copy
    log log1p log2 log_sigmoid_forward logaddexp logical_and logical_not logical_or logical_xor lt masked_fill
    maximum minimum mish mul nan_to_num ne neg pow reciprocal relu relu6 remainder round
    rsqrt rsub sgn sigmoid sign silu sin sinc sinh softplus softshrink special_expit sqrt
    square sub tan tanh threshold trunc where xlogy zero
    """
)
REDUCTIONS = _words(
    """
    all amax amin any count_nonzero linalg_vector_norm logsumexp max mean min norm prod std std_mean sum var
    var_mean
    """
)
ORDERED = _words(
    """
    argmax argmin argsort cummax cummin cumprod cumsum flip kthvalue logcumsumexp roll sort topk
    """
)
IMAGE = _words(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d
    max_pool2d max_pool2d_with_indices max_pool3d_with_indices reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    """
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(sorted(FACTORIES), factory),
    **dict.fromkeys(ENTRYWISE, entrywise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(ORDERED, ordered),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), along),
    **dict.fromkeys(IMAGE, image),
    "glu": gated,
    "prelu": prelu,
}

"""Operations that multiply: matrix products, convolutions, attention."""

from __future__ import annotations

from collections.abc import Sequence

from merganser.symmetry.axes import Axis, Product
from merganser.symmetry.flow import Flow, Rule
from merganser.symmetry.record import Call, Value
from merganser.symmetry.rules.pointwise import broadcast


def matrix(flow: Flow, call: Call) -> None:
    """mm, bmm, addmm, baddbmm, mv, dot: the inner axes are equal, batch axes are equal, the outer ones stay."""
    one = next(call.args[n] for n in ("mat1", "batch1", "mat", "self") if n in call.args)
    two = next(call.args[n] for n in ("mat2", "batch2", "vec", "tensor", "other") if n in call.args)
    a, b = flow.of(one), flow.of(two)
    flow.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    flow.role(one, len(a) - 1, "consumer")
    flow.role(two, max(len(b) - 2, 0), "consumer")
    flow.role(one, len(a) - 2, "producer")
    flow.role(two, len(b) - 1, "producer")
    batch = a[: len(a) - 2] if len(b) > 2 else []
    for x, y in zip(batch, b, strict=False):
        flow.unify(x, y)
    axes = [*batch, *a[len(batch) : -1], *b[len(b) - 1 :]] if len(b) > 1 else a[:-1]
    flow.products.append([*axes, a[-1]])
    flow.tap(one, two)
    (value,) = call.outputs
    added = call.args.get("self")
    flow.set(value, axes)
    if isinstance(added, Value) and added is not one:
        broadcast(flow, [value, added], value.shape)
        for axis in range(len(added.shape)):
            flow.role(added, axis, "additive")


def linear(flow: Flow, call: Call) -> None:
    """Give x W^T + b."""
    x, weight, bias = call.args["input"], call.args["weight"], call.args.get("bias")
    flow.tap(x)
    out, inside = flow.of(weight)
    flow.unify(flow.of(x)[-1], inside)
    flow.role(weight, 0, "producer")
    flow.role(weight, 1, "consumer")
    if isinstance(bias, Value):
        flow.unify(out, flow.of(bias)[0])
        flow.role(bias, 0, "additive")
    flow.products.append([*flow.of(x)[:-1], out, inside])
    flow.set(call.outputs[0], [*flow.of(x)[:-1], out])


def convolution(flow: Flow, call: Call) -> None:
    """Channels of groups; places in the picture and in the kernel are fixed."""
    x, weight, bias = call.args["input"], call.args["weight"], call.args.get("bias")
    (value,) = call.outputs
    groups, turned = call.args.get("groups", 1), bool(call.args.get("transposed", False))
    spatial = len(weight.shape) - 2
    flow.tap(x)
    steps, padding = call.args.get("stride", 1), call.args.get("padding", 0)
    apart = all(n == 1 for n in (*weight.shape[2:], *_each(steps))) and not any(_each(padding))
    for axis in () if apart else (*flow.of(x)[-spatial:], *flow.of(weight)[2:]):
        flow.pin_axis(axis, "a place")
    inputs, (first, second) = flow.of(x)[-spatial - 1], flow.of(weight)[:2]
    if groups == 1:
        inside, out = (first, second) if turned else (second, first)
        flow.unify(inputs, inside)
        mixed = [out, inside]
    else:
        g, inner = flow.atoms.split(inputs, groups)
        h, other = flow.atoms.split(first, groups)
        flow.unify(g, h)
        flow.unify(inner, other if turned else second)
        rest = second if turned else other
        out = Product((g, rest))
        mixed = [g, rest, inner]  # a group sees itself alone
    flow.role(weight, 1 if turned else 0, "producer")
    flow.role(weight, 0 if turned else 1, "consumer")
    if isinstance(bias, Value):
        flow.unify(out, flow.of(bias)[0])
        flow.role(bias, 0, "additive")
    if apart:
        flow.products.append([*flow.of(x)[: -spatial - 1], *mixed, *flow.of(x)[-spatial:]])
    fresh = [flow.atoms.new(n, pinned="a place") for n in value.shape[-spatial:]]
    flow.set(value, [*flow.of(x)[: -spatial - 1], out, *(flow.of(x)[-spatial:] if apart else fresh)])


def _each(sizes: object) -> list[int]:
    """A number for every axis; padding that is a word counts as some."""
    return list(sizes) if isinstance(sizes, list | tuple) else [sizes if isinstance(sizes, int) else 1]


def attention(flow: Flow, call: Call) -> None:
    """softmax(q k^T) v with any fused kernel; grouped keys and values serve a product of heads."""
    q, k, v = (flow.of(call.args[n]) for n in ("query", "key", "value"))
    flow.tap(call.args["query"], call.args["key"], call.args["value"])
    flow.unify(q[-1], k[-1])
    for axis in (q[-2], k[-2], v[-2]):
        flow.pin_axis(axis, "a place of a sequence")
    batch = [_heads(flow, a, b, c) for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True)]
    mask = call.args.get("attn_mask", call.args.get("attn_bias"))
    if isinstance(mask, Value):
        scores: Sequence[Axis] = [*batch, q[-2], k[-2]]
        for axis, size, other in zip(reversed(flow.of(mask)), reversed(mask.shape), reversed(scores), strict=False):
            if size > 1:
                flow.unify(axis, other)
    axes = [*batch, q[-2], v[-1]]
    flow.products += [[*batch, q[-2], k[-2], q[-1]], [*batch, q[-2], k[-2], v[-1]]]
    for i, value in enumerate(call.outputs):
        if i == 0:
            flow.set(value, axes)
        else:  # log-sum-exp, seeds: nothing of the network reads them
            flow.fix(value, "a by-product of attention")


def _heads(flow: Flow, q: Axis, k: Axis, v: Axis) -> Axis:
    flow.unify(k, v)
    few, many = flow.atoms.size(k), flow.atoms.size(q)
    if few not in (1, many):
        flow.unify(q, Product((k, flow.uniform(many // few))))
    elif few > 1:
        flow.unify(q, k)
    return q


def grouped(flow: Flow, call: Call) -> None:
    """_grouped_mm: stretches of rows, each with a matrix of its own."""
    one, two = call.args["self"], call.args["mat2"]
    a, b = flow.of(one), flow.of(two)
    if (len(a), len(b)) != (2, 3):
        flow.give_up("_grouped_mm of another form")
        return
    flow.pin_axis(a[0], "rows are dealt out")
    flow.pin_axis(b[0], "matrices are dealt out")
    flow.unify(a[1], b[1])
    flow.set(call.outputs[0], [a[0], b[2]])


def outer(flow: Flow, call: Call) -> None:
    """ger: every entry of one with every entry of the other."""
    flow.set(call.outputs[0], [*flow.of(call.args["self"]), *flow.of(call.args["vec2"])])


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "vdot"), matrix),
    **dict.fromkeys(("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution"), convolution),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        attention,
    ),
    "linear": linear,
    "_grouped_mm": grouped,
    "ger": outer,
}

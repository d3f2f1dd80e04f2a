"""Normalisation: the axis that is normalised may be in any order, as long as its scales are in the same."""

from __future__ import annotations

from merganser.symmetry.axes import NestingError
from merganser.symmetry.flow import Flow, Rule
from merganser.symmetry.record import Call, Value


def layer_norm(flow: Flow, call: Call) -> None:
    """LayerNorm and RMSNorm over the last axes."""
    x = call.args["input"]
    axes = flow.of(x)
    for name in ("weight", "bias"):
        scale = call.args.get(name)
        if isinstance(scale, Value):
            for i, axis in enumerate(flow.of(scale)):
                flow.unify(axis, axes[len(axes) - len(scale.shape) + i])
                flow.role(scale, i, "additive" if name == "bias" else "scale")
    flow.set(call.outputs[0], axes)
    count = len(call.args.get("normalized_shape", (1,)))
    flow.products.append(axes[: len(axes) - count])
    for value in call.outputs[1:]:
        kept = [flow.atoms.new(size, pinned="a statistic") for size in value.shape[len(axes) - count :]]
        flow.set(value, [*axes[: len(axes) - count], *kept])


def batch_norm(flow: Flow, call: Call) -> None:
    """One scale, shift, mean and variance a channel; where the batch gives them, over all places of the channel."""
    axes = flow.of(call.args["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        scale = call.args.get(name)
        if isinstance(scale, Value):
            flow.unify(flow.of(scale)[0], axes[1])
            flow.role(scale, 0, "additive" if name in ("bias", "running_mean") else "scale")
    measured = call.args.get("training", call.args.get("use_input_stats"))
    if measured or not isinstance(call.args.get("running_mean"), Value):
        flow.products.append([axes[1]])
    flow.set(call.outputs[0], axes)
    for value in call.outputs[1:]:
        flow.fix(value, "a statistic")


def group_norm(flow: Flow, call: Call) -> None:
    """Channels are groups of channels: groups may change places whole, and channels within a group."""
    axes = list(flow.of(call.args["input"]))
    groups = call.args.get("group", call.args.get("num_groups"))
    try:
        flow.atoms.split(axes[1], groups)
    except NestingError:  # a concatenation: groups stay in place, and what is in each may move
        size = flow.atoms.size(axes[1]) // groups
        flow.atoms.cut(axes[1], [size * i for i in range(1, groups)])
    for name in ("weight", "bias"):
        scale = call.args.get(name)
        if isinstance(scale, Value):
            flow.unify(flow.of(scale)[0], axes[1])
            flow.role(scale, 0, "additive" if name == "bias" else "scale")
    flow.set(call.outputs[0], axes)
    for value in call.outputs[1:]:
        flow.fix(value, "a statistic")


def weight_norm(flow: Flow, call: Call) -> None:
    """A weight as direction and length: lengths are along one axis, the others may be in any order."""
    direction, length, dim = call.args["v"], call.args["g"], call.args.get("dim", 0)
    axes = flow.of(direction)
    flow.unify(axes[dim], flow.of(length)[dim])
    flow.set(call.outputs[0], axes)
    for value in call.outputs[1:]:
        flow.set(value, flow.of(length))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit",
            "batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "_batch_norm_no_update",
        ),
        batch_norm,
    ),
    **dict.fromkeys(("native_group_norm", "group_norm"), group_norm),
    "_weight_norm_interface": weight_norm,
}

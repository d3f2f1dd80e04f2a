"""A program of torch.export as a network: its operations in order, in evaluation mode, its layers as modules again.

A program holds operations and named tensors. Where a linear layer, convolution, embedding or norm reads tensors that it
alone reads, under the names that it gives them, it becomes a module of that name: BatchNorm can be measured anew and
layers can be refitted as in the network that was exported.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from merganser.errors import ParameterError
from merganser.symmetry.program_layers import layer_of
from merganser.symmetry.program_network import Input, Made, ProgramNetwork, Step, Stored, Way

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def network_of(program: ExportedProgram) -> ProgramNetwork:
    """The network of a program, in evaluation mode: dropout does nothing, and BatchNorm goes by its statistics.

    Args:
        program: that torch.export made; left as it is, and its tensors are shared.

    Raises:
        ParameterError: If it holds objects, branches or operations that are none of PyTorch's own.
    """
    signature = program.graph_signature
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    bound: dict[fx.Node, Any] = {}
    inputs: list[Input] = []
    constants: dict[str, Tensor] = {}
    for node, spec in zip(nodes, signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            bound[node] = Stored(str(spec.target))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            bound[node] = Made(node.name)
            constants[node.name] = program.constants[str(spec.target)]
        elif spec.kind == InputKind.USER_INPUT:
            bound[node] = Made(node.name)
            inputs.append(_input(node, spec.arg))
        else:
            raise ParameterError(f"the program holds {spec.target}, which is no tensor", "export a network without it")
    steps: list[Step] = []
    given = _walk(program.graph_module, bound, steps)
    given = given if isinstance(given, tuple | list) else (given,)
    out = [
        x
        for x, spec in zip(given, signature.output_specs, strict=True)
        if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
    ]
    entry = program.module_call_graph[0].signature
    words = tuple((entry.forward_arg_names if entry is not None else None) or ())
    call = program.call_spec
    way = Way(tuple(steps), tuple(inputs), tuple(out), call.in_spec, call.out_spec, words, constants)
    return _with_tensors(way, program).eval()


def _input(node: fx.Node, argument: Any) -> Input:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return Input(str(node.target), tuple(n if isinstance(n, int) else None for n in value.shape))
    if isinstance(argument, ConstantArgument):
        return Input(str(node.target), None, argument.value)
    raise ParameterError(
        f"the program takes {node.target}, a {type(argument).__name__}", "export it with tensors alone"
    )


#: Operations of programs that only check.
_CHECKS = ("_assert", "sym_constrain_range")
#: Python's own operations on sizes.
_SIZES = {
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod),
    *(operator.neg, operator.pow, operator.abs, operator.lshift, operator.rshift, operator.and_, operator.or_),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.not_),
    *(math.ceil, math.floor, math.trunc, math.sqrt),
    *(torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sum),
}
#: BatchNorm of a program that was taken apart: it gives statistics as well.
_NORMS = (
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("_native_batch_norm_legit_functional", "_batch_norm_no_update"),
    *("_batch_norm_with_update", "_batch_norm_with_update_functional"),
)


def _walk(module: Any, bound: Mapping[fx.Node, Any], steps: list[Step], prefix: str = "") -> Any:
    """Add the steps of a graph; what it gives."""
    known = dict(bound)
    for node in module.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], known.__getitem__)
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))  # a graph within this one
        if node.op != "call_function":
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            places = args[1].graph.find_nodes(op="placeholder")
            known[node] = _walk(args[1], dict(zip(places, args[2:], strict=True)), steps, f"{prefix}{node.name}.")
        elif node.target is operator.getitem and isinstance(args[0], tuple | list):
            known[node] = args[0][args[1]]
        elif getattr(node.target, "_opname", None) in _NORMS:
            name = prefix + node.name
            known[node] = Made(name), *([None] * 4)  # statistics of the batch, which are no part of a result
            given = Step(name, node.target, tuple(args), dict(kwargs)).given
            taken = [given.get(n) for n in ("input", "weight", "bias", "running_mean", "running_var")]
            norm, measures = torch.ops.aten.batch_norm.default, taken[3] is None
            settings = measures, given["momentum"], given["eps"], False
            steps.append(Step(name, norm, (*taken, *settings), {}, _rank(node)))
        else:
            name = prefix + node.name
            known[node] = Made(name)
            if not str(getattr(node.target, "_opname", "")).startswith(_CHECKS):
                steps.append(_evaluating(Step(name, _allowed(node.target), tuple(args), dict(kwargs), _rank(node))))
    raise ParameterError("the program gives nothing")


def _rank(node: fx.Node) -> int:
    first = next(iter(node.all_input_nodes), None)
    value = first.meta.get("val") if first is not None else None
    return value.ndim if isinstance(value, Tensor) else 0


def _allowed(target: Any) -> Callable[..., Any]:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims"):
        if target._opname not in ("from_file", "_print"):
            return target
    elif target in _SIZES:
        return target  # type: ignore[no-any-return]
    raise ParameterError(f"the program calls {target}, which is not run here", "name the code of the network instead")


def _evaluating(step: Step) -> Step:
    """The step as it is in evaluation mode."""
    if not isinstance(step.call, torch._ops.OpOverload):
        return step
    given = step.given
    measures = "running_mean" in given and given["running_mean"] is None  # what it takes in, in any mode
    off = {n: False for n in ("train", "training") if given.get(n) is True and not measures}
    if given.get("dropout_p"):
        off["dropout_p"] = 0.0  # type: ignore[assignment]
    if not off:
        return step
    names = [a.name for a in step.call._schema.arguments]
    args = tuple(off.pop(n, x) for n, x in zip(names, step.args, strict=False))
    return replace(step, args=args, kwargs={**step.kwargs, **off})


def _with_tensors(way: Way, program: ExportedProgram) -> ProgramNetwork:
    """A network with the program's tensors: those of layers in modules, all others where their names say."""
    same: dict[Any, Tensor] = {}
    state: dict[str, Tensor] = {}
    passing = set(program.graph_signature.non_persistent_buffers)
    for name, x in {**program.state_dict, **{name: program.constants[name] for name in passing}}.items():
        memory = (x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), x.stride()) if x.numel() else name
        state[name] = same.setdefault(memory, x)
    read = {x.name for x in pytree.tree_leaves([(s.args, s.kwargs) for s in way.steps]) if isinstance(x, Made)}
    steps = [step for step in way.steps if step.name in read or not _counts(step)]
    layers = _layers(steps, state)
    steps = [_through(step, layers) for step in steps]
    network = ProgramNetwork(replace(way, steps=_forgetting(steps, way.result)))
    for name, x in state.items():
        owner: nn.Module = network
        *parts, last = name.split(".")
        for i, part in enumerate(parts, 1):
            if part not in owner._modules:
                owner.add_module(part, layers.get(".".join(parts[:i])) or nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(x, nn.Parameter):
            owner.register_parameter(last, x)
        else:
            owner.register_buffer(last, x, persistent=name not in passing)
    return network


def _counts(step: Step) -> bool:
    """Whether it counts the batches that BatchNorm has seen."""
    first = step.args[0] if step.args else None
    return isinstance(first, Stored) and first.name.endswith("num_batches_tracked")


def _layers(steps: Sequence[Step], state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Modules for tensors that one kind of layer in one setting reads, and nothing else does."""
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for owner in dict.fromkeys(_owners(step)):
            readers.setdefault(owner, []).append(step)
    names = Counter(id(x) for x in state.values())
    found: dict[str, nn.Module] = {}
    for owner, reading in readers.items():
        tensors = {n.removeprefix(f"{owner}."): x for n, x in state.items() if n.startswith(f"{owner}.")}
        settings = [(step.call, step.rank, _setting(step)) for step in reading]
        alone = all(set(_owners(step)) == {owner} for step in reading) and all(s == settings[0] for s in settings)
        if owner and alone and all(names[id(x)] == 1 for x in tensors.values()):
            given = {
                n: x.name.removeprefix(f"{owner}.") if isinstance(x, Stored) else x for n, x in settings[0][2].items()
            }
            layer = layer_of(str(reading[0].call._opname), given, tensors, reading[0].rank)
            found |= {owner: layer} if layer is not None else {}
    return found


def _owners(step: Step) -> list[str]:
    """Names of the modules whose tensors a step reads."""
    return [x.name.rpartition(".")[0] for x in pytree.tree_leaves((step.args, step.kwargs)) if isinstance(x, Stored)]


def _setting(step: Step) -> dict[str, Any]:
    """Arguments but for what flows through."""
    if not isinstance(step.call, torch._ops.OpOverload):
        return {}
    return {name: x for name, x in step.given.items() if not isinstance(x, Made)}


def _through(step: Step, layers: Mapping[str, nn.Module]) -> Step:
    """The step as a run of a module, where that is what it is."""
    owner = next((owner for owner in _owners(step) if owner in layers), None)
    if owner is None:
        return step
    (taken,) = (x for x in step.given.values() if isinstance(x, Made))
    return Step(step.name, owner, (taken,), {})


def _forgetting(steps: Sequence[Step], result: Any) -> tuple[Step, ...]:
    """Steps that let go of what no later one reads."""
    needed = {x.name for x in pytree.tree_leaves(result) if isinstance(x, Made)}
    done: list[Step] = []
    for step in reversed(steps):
        read = [x.name for x in pytree.tree_leaves((step.args, step.kwargs)) if isinstance(x, Made)]
        last = tuple(dict.fromkeys(name for name in (step.name, *read) if name not in needed))
        needed.update(last)
        done.append(replace(step, last=last))
    return tuple(done[::-1])

"""Which tensor of the base each tensor of an adapter changes, and how; every tensor is placed or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from merganser.checkpoints.lora_config import LoraConfig
from merganser.errors import AdapterError
from merganser.types import FLOAT_DTYPES, TensorInfo

PREFIX = "base_model.model."

#: End of an adapter's key -> what the tensor is to its module.
ROLES: Mapping[str, str] = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B.bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change s L R of one matrix.

    Attributes:
        down: adapter key of A.
        up: adapter key of B.
        scaling: s.
        transposed: the base stores (in, out): L is A transposed and R is B transposed; else L is B and R is A.
        magnitude: adapter key of DoRA's norms.
    """

    down: str
    up: str
    scaling: float
    transposed: bool
    magnitude: str | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """What an adapter does to one tensor: first replace it, then change it.

    Attributes:
        replaced: adapter key of the tensor that stands in for the base's.
        low_rank: a change of the matrix.
        added: adapter key of a vector to add, and its factor.
    """

    replaced: str | None = None
    low_rank: LowRank | None = None
    added: tuple[str, float] | None = None


class BaseNames:
    """Finds tensors of the base by the adapter's names, which may all have one prefix more or less.

    The first tensor that is found so says which prefix; a name that is there as it stands needs none.
    """

    def __init__(self, names: Iterable[str], ref: str) -> None:
        self._names, self._ref = dict.fromkeys(names), ref
        self._prefix: tuple[str, str] | None = None

    def find(self, name: str, what: str) -> str:
        """What the base calls a tensor.

        Args:
            name: the adapter's name for it.
            what: how an error calls it.

        Raises:
            AdapterError: If there is none, or several could be meant.
        """
        if name in self._names:
            return name
        found = self._with_other_prefix(name)
        if len(found) > 1:
            listed = ", ".join(found[:4])
            raise AdapterError(f"{what} of the adapter could be any of {listed} in {self._ref}")
        if not found:
            nearest = ", ".join(get_close_matches(name, list(self._names), n=3, cutoff=0.3))
            raise AdapterError(
                f"{what} of the adapter is not in {self._ref}",
                (f"the nearest tensors are {nearest}; " if nearest else "")
                + "is this the base that the adapter was trained on, with untied weights?",
            )
        self._prefix = self._prefix or _difference(name, found[0])
        return found[0]

    def _with_other_prefix(self, name: str) -> list[str]:
        if self._prefix is not None:
            lost, gained = self._prefix
            moved = gained + name.removeprefix(lost)
            return [moved] if name.startswith(lost) and moved in self._names else []
        longer = [known for known in self._names if known.endswith("." + name)]
        parts = name.split(".")
        shorter = [tail for k in range(1, len(parts) - 1) if (tail := ".".join(parts[k:])) in self._names]
        return longer + shorter


def _difference(name: str, known: str) -> tuple[str, str]:
    """Prefix that `name` has to lose and the one it has to gain; one of them is empty."""
    return (name[: -len(known)], "") if len(name) > len(known) else ("", known[: -len(name)])


@dataclass(frozen=True, slots=True)
class _Module:
    """One adapted module: its name, the keys of its tensors by role, and what they are looked up in."""

    name: str
    keys: Mapping[str, str]
    own: Mapping[str, TensorInfo]
    config: LoraConfig

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.keys or "lora_embedding_B" in self.keys


def place(
    own: Mapping[str, TensorInfo], config: LoraConfig, base: Mapping[str, TensorInfo], ref: str
) -> dict[str, Edit]:
    """Place every tensor of an adapter.

    Args:
        own: headers of the adapter's tensors.
        config: what its adapter_config.json says.
        base: headers of the base's tensors, tied names included.
        ref: what an error calls the base.

    Returns:
        Name in the base -> its edit; a tied tensor may be edited under several names.

    Raises:
        AdapterError: If a tensor cannot be placed, or does not fit where it belongs.
    """
    if not own:
        raise AdapterError("the adapter holds no tensors")
    names = BaseNames(base, ref)
    modules, whole = _sort_keys(own)
    edits: dict[str, Edit] = {}
    layouts: dict[str, set[bool]] = {}
    square: dict[str, LowRank] = {}
    for name, keys in sorted(modules.items()):
        module = _Module(name, keys, own, config)
        target = names.find(f"{name}.weight", f"module {name}")
        if target in edits:
            raise AdapterError(f"two modules of the adapter change {target}")
        low_rank = _low_rank(module, target, base[target])
        edits[target] = Edit(low_rank=low_rank)
        if len(base[target].shape) == 2 and not module.embedding:
            if base[target].shape[0] == base[target].shape[1]:
                square[target] = low_rank
            else:
                layouts.setdefault(_leaf(target), set()).add(low_rank.transposed)
        if config.lora_bias or "lora_B.bias" in keys:
            edits[target.removesuffix("weight") + "bias"] = _bias(module, target, base)
    for target, low_rank in square.items():
        transposed = _layout(target, layouts, config.fan_in_fan_out)
        edits[target] = Edit(low_rank=replace(low_rank, transposed=transposed))
    for name, key in whole.items():
        target = names.find(name, key)
        _check_replacement(key, own[key], target, base[target])
        edits[target] = replace(edits.get(target, Edit()), replaced=key)
    return edits


def _sort_keys(own: Mapping[str, TensorInfo]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Adapter keys by module and role, and those of whole tensors by the name that they have in the model."""
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in own:
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in ROLES if name.endswith(suffix)), None)
        if suffix is not None and ".base_layer." in name:
            raise AdapterError(
                f"{key} belongs to an nn.MultiheadAttention, whose output projection peft adds to twice",
                "merge it with the peft that trained it, and give the merged model (huggingface/peft#3774)",
            )
        if suffix is not None:
            shelf, label = modules.setdefault(name.removesuffix(suffix), {}), ROLES[suffix]
        elif any(part.startswith("lora_") for part in name.split(".")):
            raise AdapterError(f"{key} of the adapter is of a kind that is not known")
        else:
            shelf, label = whole, name.replace(".base_layer.", ".")
        if label in shelf:
            raise AdapterError(f"{key} and {shelf[label]} of the adapter are the same thing twice")
        shelf[label] = key
    return modules, whole


def _low_rank(module: _Module, target: str, found: TensorInfo) -> LowRank:
    """The change of a module's matrix, once the factors are known to fit it."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A", "lora_B")
    if a not in module.keys or b not in module.keys or (module.embedding and {"lora_A", "lora_B"} & {*module.keys}):
        listed = ", ".join(sorted(module.keys))
        raise AdapterError(f"module {module.name} of the adapter has {listed}; it needs {a} and {b}")
    down, up = module.keys[a], module.keys[b]
    for name, info in ((down, module.own[down]), (up, module.own[up]), (target, found)):
        if info.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                f"{name} is stored as {info.dtype}, to which nothing can be added", "dequantise it first"
            )
    transposed = _fits_transposed(module, target, module.own[down].shape, module.own[up].shape, found.shape)
    rank, said = module.own[down].shape[0], module.config.rank(module.name)
    if rank != said:
        raise AdapterError(
            f"module {module.name} has rank {rank}, and adapter_config.json says {said}",
            "its scaling depends on it: correct r or rank_pattern",
        )
    magnitude = _magnitude(module, found.shape, transposed)
    return LowRank(down, up, module.config.scaling(module.name), transposed, magnitude)


def _fits_transposed(
    module: _Module, target: str, down: tuple[int, ...], up: tuple[int, ...], found: tuple[int, ...]
) -> bool:
    """Whether the base stores the matrix B A transposed; a square one counts as not.

    Raises:
        AdapterError: If B A has the shape of neither the matrix nor its transpose.
    """
    if len(down) >= 2 and len(up) == len(down) and up[1] == down[0] and all(size == 1 for size in up[2:]):
        if not module.embedding and found == (up[0], *down[1:]):
            return False
        if len(down) == 2 and found == (down[1], up[0]):
            return True
    why = "; a grouped convolution cannot be folded" if len(down) > 2 else ""
    raise AdapterError(f"module {module.name} has A {down} and B {up}, which do not fit {target} {found}{why}")


def _magnitude(module: _Module, found: tuple[int, ...], transposed: bool) -> str | None:
    key = module.keys.get("lora_magnitude_vector")
    if (key is not None) != module.config.use_dora:
        has, said = ("no", "says") if key is None else ("a", "does not say")
        raise AdapterError(
            f"module {module.name} has {has} lora_magnitude_vector, and adapter_config.json {said} use_dora"
        )
    if key is None:
        return None
    if module.embedding or len(found) != 2:
        kind = "an embedding" if module.embedding else "a convolution"
        raise AdapterError(f"module {module.name} is {kind} with DoRA, which is folded on linear layers only")
    outputs = found[1] if transposed else found[0]
    if module.own[key].shape != (outputs,):
        raise AdapterError(f"{key} has shape {module.own[key].shape}; the module has {outputs} outputs")
    return key


def _bias(module: _Module, weight: str, base: Mapping[str, TensorInfo]) -> Edit:
    """The change of a module's bias by the bias of its B."""
    key, target = module.keys.get("lora_B.bias"), weight.removesuffix("weight") + "bias"
    if key is None or not module.config.lora_bias:
        has, said = ("no", "says") if key is None else ("a", "does not say")
        raise AdapterError(f"module {module.name} has {has} lora_B.bias, and adapter_config.json {said} lora_bias")
    if target not in base:
        raise AdapterError(f"module {module.name} has a lora_bias, and the base has no {target} to add it to")
    if module.own[key].shape != base[target].shape:
        raise AdapterError(f"{key} has shape {module.own[key].shape}, and {target} {base[target].shape}")
    return Edit(added=(key, module.config.scaling(module.name)))


def _layout(target: str, seen: Mapping[str, set[bool]], fan_in_fan_out: bool) -> bool:
    """Whether a square matrix is stored transposed, which its shape cannot tell.

    Other matrices of the same last name tell it, such as mlp.c_proj of attn.c_proj. Else the config tells it, unless
    it contradicts matrices whose shape does tell: the library that writes it overwrites it layer by layer.

    Raises:
        AdapterError: If neither tells.
    """
    alike = seen.get(_leaf(target), set())
    if len(alike) == 1:
        return next(iter(alike))
    if any(transposed != fan_in_fan_out for kinds in seen.values() for transposed in kinds):
        raise AdapterError(
            f"{target} is square, and by the adapter's other layers it could be stored either way",
            "merge it with peft, and give the merged model",
        )
    return fan_in_fan_out


def _leaf(target: str) -> str:
    return target.split(".")[-2]


def _check_replacement(key: str, info: TensorInfo, target: str, found: TensorInfo) -> None:
    if info.shape != found.shape:
        raise AdapterError(
            f"{key} has shape {info.shape}, and {target} of the base {found.shape}",
            "a vocabulary that grew is resized in the base first",
        )
    if info.dtype != found.dtype and not (info.dtype in FLOAT_DTYPES and found.dtype in FLOAT_DTYPES):
        raise AdapterError(f"{key} is {info.dtype}, and {target} of the base {found.dtype}")

"""What a tensor is to a fold: decided once, from names and headers alone, and written into the ledger.

| role | what | how it is merged |
|---|---|---|
| matrix | 2-D linear weights; convolutions, seen as (out, in * kernel) | the method's rule for 2-D weights |
| transposed | the same, stored as (in, out), as in GPT-2 | as above, transposed on the way in and out |
| vector | biases, norms, embeddings, heads of a vocabulary, anything else that floats | the method's rule for vectors |
| statistic | running means and variances of normalisation layers | mean weighted by abs(weight); outside all norms |
| exact | integers and booleans | must be equal in every model |
| fixed | counters of batches, and what `freeze` names | the base's, untouched |
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from merganser.checkpoints.folder import config_of
from merganser.errors import DtypeError, ParameterError
from merganser.types import EXACT_DTYPES, FLOAT_DTYPES, Source, TensorInfo

Role = Literal["matrix", "transposed", "vector", "statistic", "exact", "fixed"]

#: Modules whose weight is a lookup table: rows are addressed, not multiplied. Judged by the module's own name.
_TABLE = re.compile(
    r"(^|_)embed(ding)?s?$|embed_(tokens|positions|in|out)$|embd$|^(wte|wpe|shared|lm_head)$|relative_attention_bias",
    re.IGNORECASE,
)
#: Parameters that are linear weights although nothing in their name says weight; they multiply as x @ p.
_BARE_PROJECTION = re.compile(r"(^|_)proj(ection)?$", re.IGNORECASE)
_STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")
_COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
#: Architectures whose linear layers store (in, out), for the layers of which headers alone do not tell.
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def assign_roles(
    base: Source, *, freeze: Sequence[str] = (), matrix: Sequence[str] = (), vector: Sequence[str] = ()
) -> dict[str, Role]:
    """The role of every tensor of the base, sorted by name.

    Args:
        base: read for headers and its config.json only.
        freeze: shell patterns of names that stay the base's.
        matrix: patterns of names to treat as linear weights against the default.
        vector: patterns of names to treat as vectors against the default.

    Raises:
        DtypeError: If a tensor is quantised or complex, by name.
        ParameterError: If a pattern matches nothing, names a 0-D or 1-D tensor a matrix, or a tensor is named a matrix
            and a vector.
    """
    for pattern in (*freeze, *matrix, *vector):
        if not any(fnmatchcase(name, pattern) for name in base.infos):
            raise ParameterError(f"no tensor of {base.ref} is called {pattern!r}", "patterns are shell-like: *.bias")
    transposed = _stored_transposed(base)
    roles: dict[str, Role] = {}
    for name, info in base.infos.items():
        if matches(name, freeze):
            roles[name] = "fixed"
        elif info.dtype not in (*FLOAT_DTYPES, *EXACT_DTYPES):
            raise DtypeError(
                f"{name} of {base.ref} is {info.dtype}, which cannot be merged",
                "dequantise the model, or leave it as the base has it: --freeze, in a recipe keep",
            )
        elif matches(name, vector) and matches(name, matrix):
            raise ParameterError(f"{name} is named by --matrix and by --vector", "name it by one of them")
        elif matches(name, vector) and info.dtype in FLOAT_DTYPES:
            roles[name] = "vector"
        elif matches(name, matrix) and info.dtype in FLOAT_DTYPES:
            if len(info.shape) < 2:
                raise ParameterError(f"{name} has shape {info.shape}; a matrix needs at least 2 axes")
            roles[name] = "transposed" if name in transposed else "matrix"
        else:
            roles[name] = _default(name, info, name in transposed)
    return roles


def _default(name: str, info: TensorInfo, transposed: bool) -> Role:
    if _COUNTER.search(name):
        return "fixed"
    if info.dtype in EXACT_DTYPES:
        return "exact"
    if _STATISTIC.search(name):
        return "statistic"
    module, _, leaf = name.rpartition(".")
    axes = len(info.shape)
    if axes == 2 and "weight" not in leaf and _BARE_PROJECTION.search(leaf):
        return "transposed"
    if axes not in (2, 3, 4, 5) or "weight" not in leaf or (_TABLE.search(module.rpartition(".")[2]) and axes == 2):
        return "vector"
    if axes == 2:
        return "vector" if _is_vocabulary(info.shape) else "transposed" if transposed else "matrix"
    # A kernel over one channel has inputs of its own, unlike every other: there is no shared input space to merge in.
    return "vector" if info.shape[1] == 1 or "expert" in name else "matrix"


def _stored_transposed(base: Source) -> set[str]:
    """Names of 2-D weights that are stored (in, out).

    A bias as long as the second axis and not the first gives a weight away; square ones and those without a bias follow
    the layers of the same name elsewhere in the model, and the model's type where those do not tell either.
    """
    known: dict[str, bool] = {}
    unknown: list[str] = []
    alike: dict[str, bool] = {}  # by the layer's own name: whether all that tell are transposed
    for name, info in base.infos.items():
        if len(info.shape) != 2 or not name.endswith(".weight"):
            continue
        bias = base.infos.get(f"{name[: -len('weight')]}bias")
        rows, columns = info.shape
        if bias is None or rows == columns or bias.shape not in ((rows,), (columns,)):
            unknown.append(name)
        else:
            known[name] = bias.shape == (columns,)
            layer = name.split(".")[-2]
            alike[layer] = alike.get(layer, True) and known[name]
    by_type = _model_type(base) in _TRANSPOSED_MODELS
    for name in unknown:
        known[name] = alike.get(name.split(".")[-2], by_type and _TRANSPOSED.search(name) is not None)
    return {name for name, found in known.items() if found}


def _is_vocabulary(shape: tuple[int, ...]) -> bool:
    return max(shape) >= 16384 and max(shape) > 16 * min(shape)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits any of some shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def literal(name: str) -> str:
    """A shell pattern that fits this name only.

    >>> literal("layers[0].weight")
    'layers[[]0].weight'
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def quoted(name: str) -> str:
    """A name as a pattern on a command line, for a hint."""
    pattern = literal(name)
    return shlex.quote(pattern) if "'" in pattern else f"'{pattern}'"


def matrix_shape(role: Role, shape: Sequence[int]) -> tuple[int, int]:
    """(out, in) of a tensor in a matrix role."""
    rows = shape[0]
    columns = 1
    for size in shape[1:]:
        columns *= size
    return (columns, rows) if role == "transposed" else (rows, columns)


def is_matrix(role: Role) -> bool:
    """Whether the method's rule for 2-D weights applies."""
    return role in ("matrix", "transposed")


def count_roles(roles: Mapping[str, Role]) -> dict[str, int]:
    """How many tensors have each role, the most frequent first."""
    counts: dict[str, int] = {}
    for role in roles.values():
        counts[role] = counts.get(role, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _model_type(base: Source) -> str | None:
    return config_of(base.companions()).get("model_type")

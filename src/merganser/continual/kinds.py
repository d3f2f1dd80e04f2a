"""How one tensor's state grows and what it gives, for the three kinds of continual method.

The state of a tensor is a few named tensors, its slots: `d` (a sequential method's merged change), `s`, `g`, `b` (sums
over experts) or `u`, `s`, `v` (factors). On disk a slot of `layer.weight` is called `g/layer.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from merganser.continual.ledger import BaseRecord
from merganser.continual.roles import Role, is_matrix, matrix_shape
from merganser.errors import ParameterError, StateError
from merganser.methods import (
    METHODS,
    Factors,
    Method,
    Step,
    Sums,
    call,
    find_method,
    gram_terms,
    mean,
    settings_of,
)
from merganser.numerics import pack_symmetric, unpack_symmetric
from merganser.types import TensorInfo

Slots = dict[str, Tensor]

#: Bytes that folding an m x n weight takes: an entry, an entry of the square of the short side, and one of the input
#: side. Fitted to measured peaks (tests/continual/test_memory.py holds them to it).
FOLD_BYTES = {
    "opcm": (40, 40, 0),
    "ties": (44, 0, 0),
    "magmax": (26, 0, 0),
    "dop": (128, 0, 0),
    "nufilt": (98, 0, 0),
    "tsv_m": (48, 20, 0),
    "gram": (54, 0, 24),
    "sums": (36, 0, 0),
}

#: Matrices with a side shorter than this are vectors to a method of factors: their rank cannot be shared out.
THINNEST_FACTORED = 32


@dataclass(frozen=True)
class Kind:
    """The continual side of one method.

    Attributes:
        method: its row of the table.
        slots: names of the slots of a 2-D weight.
        given: its settings.
    """

    method: Method
    slots: tuple[str, ...]
    given: Mapping[str, Any]

    @property
    def removable(self) -> bool:
        """Whether an expert can be taken out again."""
        return isinstance(self.method, Sums)

    def treats_as_matrix(self, role: Role, shape: Sequence[int]) -> bool:
        """Whether the rule for 2-D weights applies to a tensor."""
        if not is_matrix(role):
            return False
        return not isinstance(self.method, Factors) or min(matrix_shape(role, shape)) >= THINNEST_FACTORED

    def slot_shapes(self, role: Role, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of a tensor's slots; none for a tensor that is not merged."""
        if role in ("exact", "fixed"):
            return {}
        if not self.treats_as_matrix(role, shape):
            return {"d" if isinstance(self.method, Step) and role != "statistic" else "s": tuple(shape)}
        m, n = matrix_shape(role, shape)
        h, p = (n + 1) // 2, min(m, n)
        if isinstance(self.method, Factors):
            return {"u": (m, p), "s": (p,), "v": (n, p)}
        shapes = {"d": (m, n), "s": (m, n), "g": (h, 2 * h + 1), "b": (m, n)}
        return {slot: shapes[slot] for slot in self.slots}

    def seen(self, role: Role, shape: Sequence[int], d: Tensor) -> Tensor:
        """A change as the method's rule sees it: (out, in) for a matrix, as it is for everything else."""
        if not self.treats_as_matrix(role, shape):
            return d
        flat = d.reshape(shape[0], prod(shape[1:]))
        return flat.T.contiguous() if role == "transposed" else flat

    def expected_slots(self, record: BaseRecord, dtype: str) -> dict[str, TensorInfo]:
        """Header of every slot of a state over a base, by its name on disk."""
        return {
            f"{slot}/{name}": TensorInfo(shape, dtype)
            for name, role in record.roles.items()
            for slot, shape in self.slot_shapes(role, record.shapes[name]).items()
        }

    def restored(self, role: Role, shape: Sequence[int], change: Tensor) -> Tensor:
        """The inverse of `seen`."""
        if not self.treats_as_matrix(role, shape):
            return change
        return (change.T if role == "transposed" else change).reshape(tuple(shape))

    def chunked(self, role: Role, shape: Sequence[int]) -> bool:
        """Whether a tensor may be folded by rows."""
        if isinstance(self.method, Step) and role != "statistic":
            return self.method.vector_locality == "element" and not is_matrix(role)
        return not self.treats_as_matrix(role, shape)

    def update(self, role: Role, shape: Sequence[int], state: Slots, d: Tensor, *, weight: float, t: int) -> Slots:
        """The state after one more change.

        Args:
            role: of the tensor.
            shape: of the whole tensor, of which `d` may be some rows.
            state: slots so far; empty before the first arrival.
            d: the change; (out, in) for a matrix.
            weight: its factor, or the change of it; negative to subtract it from sums.
            t: number of this arrival.
        """
        if isinstance(self.method, Sums) or role == "statistic":
            return self._add_to_sums(self.treats_as_matrix(role, shape), state, d, weight)
        d = d * weight if weight != 1 else d
        if isinstance(self.method, Factors):
            if not self.treats_as_matrix(role, shape):
                return {"s": state["s"] + d if state else d}
            p = min(d.shape)
            u, s, v = (
                (state[n] for n in ("u", "s", "v"))
                if state
                else (d.new_zeros(d.shape[0], p), d.new_zeros(p), d.new_zeros(d.shape[1], p))
            )
            return dict(zip(("u", "s", "v"), self.method.fold(u, s, v, d, t=t), strict=True))
        merged = state["d"].to(d.dtype) if state else torch.zeros_like(d)
        rule = self.method.function if is_matrix(role) else self.method.vector
        return {"d": call(rule, {"merged": merged, "d": d, "t": t}, self.given)}

    def _add_to_sums(self, matrix: bool, state: Slots, d: Tensor, weight: float) -> Slots:
        if not matrix:
            terms = {"s": d}
        else:
            terms = {"s": d} if "s" in self.slots else {}
            if "g" in self.slots:
                g, terms["b"] = gram_terms(d)
                terms["g"] = pack_symmetric(g)
        return {n: torch.add(state[n], x, alpha=weight) if state else x.double() * weight for n, x in terms.items()}

    def finalise(
        self,
        method: Method,
        role: Role,
        shape: Sequence[int],
        state: Slots,
        given: Mapping[str, Any],
        total: float,
        least: float = 0.0,
    ) -> Tensor:
        """The merged change of a tensor, or of some rows of it where it may be chunked.

        The trace of G is the sum of the weights of those experts that change the tensor: each term of it has trace 1.
        Below the least weight there is none of them, and what is left of the sums is the rounding of experts that were
        taken out.

        Args:
            method: this kind's own, or another whose sums are here.
            role: of the tensor.
            shape: of the whole tensor.
            state: its slots.
            given: settings of `method`.
            total: sum of the weights.
            least: the smallest of the weights in the sums; 0 where nothing was ever taken out.
        """
        if role == "statistic":
            return mean(state["s"], total=total) if total > 0 else torch.zeros_like(state["s"])
        if isinstance(method, Step):
            return state["d"]
        if not self.treats_as_matrix(role, shape):
            return _as_tensor(call(method.vector, {"s": state["s"], "total": total}, given))
        brought: dict[str, Any] = {**state, "total": total}
        if "g" in state:
            brought["g"] = unpack_symmetric(state["g"], matrix_shape(role, shape)[1])
            if float(brought["g"].double().trace()) < least / 2:
                return state["g"].new_zeros(matrix_shape(role, shape))
        return _as_tensor(call(method.function, brought, given))

    def fold_bytes(self, role: Role, shape: Sequence[int], *, float64: bool) -> int:
        """Memory in bytes that folding one whole tensor takes, inputs and results included."""
        if not self.treats_as_matrix(role, shape):
            return prod(shape) * (80 if float64 else 44)
        m, n = matrix_shape(role, shape)
        sums = "gram" if "g" in self.slots else "sums"
        full, short, wide = FOLD_BYTES[sums if isinstance(self.method, Sums) else method_name(self.method)]
        return (full + 36 * float64) * m * n + short * min(m, n) ** 2 + wide * n * n

    def export_bytes(self, role: Role, shape: Sequence[int]) -> int:
        """Memory in bytes that exporting one matrix takes, inputs and results included."""
        m, n = matrix_shape(role, shape)
        factors = 40 * (m * n + min(m, n) ** 2) if isinstance(self.method, Factors) else 0
        return 40 * m * n + factors + (36 * n * n if "g" in self.slots else 0)


def _as_tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def kind_of(name: str, given: Mapping[str, Any], slots: tuple[str, ...] | None = None) -> Kind:
    """The continual side of a method.

    Args:
        name: in the table.
        given: settings; checked by running the method once on a tiny example.
        slots: what a state already holds; by default what the method needs and, for sums, always `s`.

    Raises:
        ParameterError: If the method or a setting is unknown, or a value is out of range.
    """
    method = find_method(name)
    check_settings(name, given)
    if slots is None:
        needs: tuple[str, ...] = ("d",) if isinstance(method, Step) else method.needs
        slots = tuple(
            n for n in ("d", "u", "s", "v", "g", "b") if n in needs or (n == "s" and isinstance(method, Sums))
        )
    return Kind(method, slots, dict(given))


def check_settings(name: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that a method does not have, or values that it refuses.

    Raises:
        ParameterError: Names the setting and what the method takes.
    """
    method = find_method(name)
    known = settings_of(method)
    for setting, value in given.items():
        if setting not in known:
            takes = ", ".join(f"{k}={v}" for k, v in known.items()) or "no settings"
            raise ParameterError(f"{name} has no setting {setting!r}", f"it takes {takes}")
        if isinstance(value, int) and abs(value) > 1 << 53:
            raise ParameterError(f"{setting} is {str(value)[:20]}...; that is no sensible number")
        word = isinstance(known[setting], str)
        if isinstance(value, bool) or not isinstance(value, str if word else (int, float)):
            raise ParameterError(f"{setting} is {value!r}; {name} takes a {'word' if word else 'number'} there")
    one, eye = torch.ones(2, 2), torch.eye(2)
    brought = {"merged": one, "d": one, "t": 2, "s": one, "g": eye, "b": one, "total": 1.0}
    if isinstance(method, Factors):
        brought |= {"u": eye, "s": torch.ones(2), "v": eye}
    call(method.function, brought, given)


def method_name(method: Method) -> str:
    """First name of a row of the table."""
    return next(name for name, row in METHODS.items() if row is method)


def exports(kind: Kind) -> list[str]:
    """Names of all methods that a state of this kind can be exported with."""
    if not isinstance(kind.method, Sums):
        return [name for name, method in METHODS.items() if method is kind.method]
    return [name for name, m in METHODS.items() if isinstance(m, Sums) and set(m.needs) <= set(kind.slots)]


def finaliser(kind: Kind, name: str) -> Method:
    """Another method that a state's sums allow.

    Raises:
        StateError: If the state lacks what it needs.
    """
    method = find_method(name)
    if method is kind.method:
        return method
    if name not in (possible := exports(kind)):
        raise StateError(
            f"this state holds {', '.join(kind.slots)}, which cannot give {name}; it can give {', '.join(possible)}",
            f"merganser fold init BASE STATE --method {name}",
        )
    return method

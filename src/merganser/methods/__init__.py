"""The table of methods: one line a method, and everything else (tests, docs, command line) reads it.

A function's parameter names say what it needs. Those in `BROUGHT` are handed over by the caller; all others are the
method's settings, with the function's own defaults, and the function checks their ranges.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.dop import dop
from merganser.methods.gram import gram, gram_terms
from merganser.methods.gram_anchored import gram_anchored
from merganser.methods.iso_c import iso_c
from merganser.methods.linear import linear
from merganser.methods.magmax import magmax
from merganser.methods.mean import mean
from merganser.methods.nufilt import nufilt
from merganser.methods.opcm import opcm, opcm_scale
from merganser.methods.running import running_mean, running_sum
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.ties import ties
from merganser.methods.tsv_m import tsv_m, tsv_m_fold

__all__ = [
    "BROUGHT",
    "METHODS",
    "Factors",
    "Method",
    "Step",
    "Sums",
    "call",
    "describe",
    "described",
    "find_method",
    "gram_terms",
    "mean",
    "running_mean",
    "settings_of",
]

Rule = Callable[..., Tensor]

#: Parameters that the caller brings: sums and states, the change, the count of arrivals, the sum of weights.
BROUGHT = frozenset({"merged", "d", "t", "s", "g", "b", "u", "v", "total"})


@dataclass(frozen=True)
class Step:
    """A sequential rule: the state is one merged change, order matters, nothing can be removed.

    Attributes:
        function: (merged, d) -> merged, for 2-D weights.
        vector: the same for everything else, element by element.
        source: paper.
        scale: one factor on export from (norms of the changes whose weight is not 0, norm of the state), where the
            method has one.
        vector_locality: "element" if the vector rule may be given any rows of a tensor, "tensor" if it needs all.
    """

    function: Rule
    vector: Rule
    source: str
    scale: Callable[..., float] | None = None
    kind = "sequential"
    vector_locality: Literal["element", "tensor"] = "element"


@dataclass(frozen=True)
class Sums:
    """A finaliser of sums over experts: order does not matter, any expert can be removed again.

    Attributes:
        function: the sums that its signature names -> merged change, for 2-D weights.
        vector: the same for everything else, from s alone.
        source: paper.
        positive: whether every weight must be positive.
    """

    function: Rule
    vector: Rule
    source: str
    positive: bool = False
    kind = "sums"

    @property
    def needs(self) -> tuple[str, ...]:
        """Which of the sums s, g, b a 2-D weight needs."""
        return tuple(n for n in ("s", "g", "b") if n in inspect.signature(self.function).parameters)


@dataclass(frozen=True)
class Factors:
    """A rule whose state is a set of factors of constant size: order does not matter, nothing can be removed.

    Attributes:
        function: factors -> merged change, for 2-D weights.
        fold: (factors, d) -> factors.
        vector: finaliser of everything else, from s alone.
        source: paper.
    """

    function: Rule
    fold: Callable[..., tuple[Tensor, ...]]
    vector: Rule
    source: str
    needs = ("u", "s", "v")
    kind = "factors"


Method = Step | Sums | Factors

METHODS: Mapping[str, Method] = {
    # sequential
    "opcm": Step(opcm, running_sum, "arXiv:2501.09522", scale=opcm_scale),
    "ties": Step(ties, ties, "arXiv:2306.01708", vector_locality="tensor"),
    "magmax": Step(magmax, magmax, "arXiv:2407.06322"),
    "dop": Step(dop, running_mean, "OpenReview zD5cUX67b9, NeurIPS 2025"),
    "nufilt": Step(nufilt, running_mean, "arXiv:2509.21413"),
    # functions of sums over experts
    "mean": Sums(mean, mean, "arXiv:2203.05482"),
    "average": Sums(mean, mean, "arXiv:1803.05407"),
    "linear": Sums(linear, linear, "arXiv:2203.05482"),
    "task_arithmetic": Sums(task_arithmetic, task_arithmetic, "arXiv:2212.04089"),
    "iso_c": Sums(iso_c, mean, "arXiv:2502.04959"),
    "gram": Sums(gram, mean, "arXiv:2503.08099", positive=True),
    "gram_anchored": Sums(gram_anchored, mean, "arXiv:2503.08099, the anchor is ours", positive=True),
    # factors of constant size
    "tsv_m": Factors(tsv_m, tsv_m_fold, mean, "arXiv:2412.00081"),
}


def find_method(name: str, *, more: Sequence[str] = ()) -> Method:
    """The method of that name.

    Args:
        name: in the table.
        more: names of other tables, which may be the nearest where there is none.

    Raises:
        ParameterError: If there is none; names the nearest.
    """
    if name not in METHODS:
        known = list(dict.fromkeys((*METHODS, *more)))
        near = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ParameterError(f"there is no method {name!r}", hint)
    return METHODS[name]


def settings_of(method: Method) -> dict[str, Any]:
    """Settings of a method and their defaults."""
    functions = (method.function, method.vector)
    parameters = {k: p for f in functions for k, p in inspect.signature(f).parameters.items()}
    return {name: parameter.default for name, parameter in parameters.items() if name not in BROUGHT}


def describe(name: str) -> str:
    """Title, equation and source of a method, and what its settings mean.

    Raises:
        ParameterError: If there is no such method.
    """
    return described(find_method(name).function)


def described(function: Rule) -> str:
    """Title, equation and source of a method by its function, and what its settings mean."""
    module = inspect.getdoc(inspect.getmodule(function)) or ""
    return f"{module}\n\n{function.__name__}{inspect.signature(function)}\n\n{inspect.getdoc(function)}"


def call(function: Rule, brought: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Call a rule with those of `brought` and `given` that its signature names."""
    names = inspect.signature(function).parameters
    return function(**{n: v for n, v in (*brought.items(), *given.items()) if n in names})

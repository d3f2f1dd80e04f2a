"""The table of joint methods: all models are at hand, and one function merges one tensor of each.

A function's parameter names say what it needs. Those in `JOINT_BROUGHT` are handed over by the caller; all others are
the method's settings, with the function's own defaults, and the function checks their ranges. `x` and `d` are stacks
(K, *S) of the models or of the models minus the base, in the user's order. A method of `d` needs a base.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor

from merganser.methods.joint._keep import kept as kept
from merganser.methods.joint._keep import magnitude
from merganser.methods.joint._mean import mean_of_changes, mean_of_models
from merganser.methods.joint.arcee_fusion import arcee_fusion
from merganser.methods.joint.breadcrumbs import breadcrumbs, breadcrumbs_ranks, breadcrumbs_ties
from merganser.methods.joint.cart import cart
from merganser.methods.joint.consensus import consensus
from merganser.methods.joint.dare import dare_linear, dare_mask, dare_ties
from merganser.methods.joint.dc import dc
from merganser.methods.joint.della import della, della_linear, della_locality, della_mask
from merganser.methods.joint.fisher import fisher
from merganser.methods.joint.iso_cts import iso_cts
from merganser.methods.joint.karcher import karcher
from merganser.methods.joint.linear import linear
from merganser.methods.joint.magmax import magmax
from merganser.methods.joint.model_stock import model_stock, model_stock_locality
from merganser.methods.joint.multislerp import multislerp, multislerp_delta
from merganser.methods.joint.nearswap import nearswap
from merganser.methods.joint.nuslerp import nuslerp, nuslerp_delta, nuslerp_locality
from merganser.methods.joint.passthrough import passthrough
from merganser.methods.joint.pcb import pcb
from merganser.methods.joint.ram import ram, ramplus_tl
from merganser.methods.joint.regmean import regmean
from merganser.methods.joint.sce import sce, sce_ranks, sce_score
from merganser.methods.joint.slerp import slerp
from merganser.methods.joint.star import star
from merganser.methods.joint.task_arithmetic import task_arithmetic
from merganser.methods.joint.ties import ties, ties_ranks

Rule = Callable[..., Tensor]
Score = Callable[[Sequence[Tensor]], Sequence[Tensor] | Tensor]
Locality = Literal["element", "line", "row", "tensor"]

#: What the caller brings, by name.
#:
#: | name | shape | what |
#: |---|---|---|
#: | x | K *S | the models |
#: | d | K *S | the models minus the base |
#: | base | *S | the base |
#: | weight | K | one factor a model, float64 |
#: | u | K *S | noise, uniform on [0, 1) |
#: | keep | K *S or 1 *S | 1 at entries whose score has one of the kept ranks, else 0; or bool |
#: | dots | K K | inner products of the whole tensors in the stack that the function takes, float64 |
#: | energy | K | sum of squares of the kept entries of each whole change, float64 |
#: | stretch | K | L1 norm of each whole change over that of its masked entries, float64 |
#: | mask | K *S | what the row's `mask` gave when `stretch` was measured, where it was kept; then `u` is empty |
#: | gram | K n n | second moments of the inputs of a linear layer |
#: | fisher | K *S | diagonal of the Fisher information |
JOINT_BROUGHT = frozenset(
    {"x", "d", "base", "weight", "u", "keep", "dots", "energy", "stretch", "mask", "gram", "fisher"}
)


@dataclass(frozen=True)
class Joint:
    """A rule over all models at once.

    Attributes:
        function: stack -> merged tensor (of `x`) or merged change (of `d`).
        source: paper.
        locality: what the function may be given: any "element"s, whole "line"s along the last axis, whole "row"s of
            axis 0, or the whole "tensor"; or a function of the settings that says so. Everything it returns depends
            on nothing else, bit for bit.
        vector: rule for all but linear weights where the function is for matrices (m, n) only; None where it takes
            any shape.
        score: for a function of `keep`: (stack) -> K scores *S, or one where `shared`, not negative, element-wise.
        ranks: for a function of `keep`: (entries of a tensor, settings of one model) -> [start, stop) of the ranks
            that are kept, the largest score first.
        shared: whether one mask serves all models.
        mask: for a function of `stretch`: what its function masks with, called with the same arguments.
        per_model: settings that may differ from model to model: they come as tuples of K.
        models: fewest and most models beside the base.
        base_is_model: whether the base counts as the first of the models (as in slerp), which then stands in `x`.
    """

    function: Rule
    source: str
    locality: Locality | Callable[[Mapping[str, Any]], Locality] = "element"
    vector: Rule | None = None
    score: Score | None = None
    ranks: Callable[[int, Mapping[str, Any]], tuple[int, int]] | None = None
    shared: bool = False
    mask: Rule | None = None
    per_model: tuple[str, ...] = ()
    models: tuple[int, int | None] = (1, None)
    base_is_model: bool = False
    kind = "joint"

    @property
    def needs(self) -> tuple[str, ...]:
        """What of `JOINT_BROUGHT` the function names."""
        return tuple(n for n in inspect.signature(self.function).parameters if n in JOINT_BROUGHT)

    @property
    def needs_base(self) -> bool:
        """Whether a recipe must name a base."""
        return bool({"d", "base"} & set(self.needs)) or self.base_is_model


@cache
def names_of(function: Rule) -> frozenset[str]:
    """Names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


_TRIMMED: Mapping[str, Any] = {"score": magnitude, "ranks": ties_ranks, "per_model": ("density",)}
_CRUMBS: Mapping[str, Any] = {"score": magnitude, "ranks": breadcrumbs_ranks, "per_model": ("density", "gamma")}
_DROPPED: Mapping[str, Any] = {"mask": dare_mask, "per_model": ("density",)}
_BY_ROW: Mapping[str, Any] = {"locality": della_locality, "mask": della_mask, "per_model": ("density", "epsilon")}
_SPECTRAL: Mapping[str, Any] = {"locality": "tensor", "vector": mean_of_changes}
_OF_TWO: Mapping[str, Any] = {"models": (1, 1), "base_is_model": True}

MERGES: Mapping[str, Joint] = {
    # sums
    "linear": Joint(linear, "arXiv:2203.05482"),
    "task_arithmetic": Joint(task_arithmetic, "arXiv:2212.04089"),
    "passthrough": Joint(passthrough, "mergekit, documentation of passthrough", per_model=("factor",), models=(1, 1)),
    # sparse changes, elected signs
    "ties": Joint(ties, "arXiv:2306.01708", **_TRIMMED),
    "dare_linear": Joint(dare_linear, "arXiv:2311.03099", **_DROPPED),
    "dare_ties": Joint(dare_ties, "arXiv:2311.03099", **_DROPPED),
    "della_linear": Joint(della_linear, "arXiv:2406.11617", **_BY_ROW),
    "della": Joint(della, "arXiv:2406.11617", **_BY_ROW),
    "breadcrumbs": Joint(breadcrumbs, "arXiv:2312.06795", **_CRUMBS),
    "breadcrumbs_ties": Joint(breadcrumbs_ties, "arXiv:2312.06795", **_CRUMBS),
    "sce": Joint(sce, "arXiv:2408.07990", score=sce_score, ranks=sce_ranks, shared=True),
    "consensus": Joint(consensus, "arXiv:2405.07813", per_model=("tall",), models=(2, None)),
    "pcb": Joint(pcb, "arXiv:2410.02396", locality="tensor"),
    "magmax": Joint(magmax, "arXiv:2407.06322"),
    "ram": Joint(ram, "arXiv:2601.13572"),
    "ramplus_tl": Joint(ramplus_tl, "arXiv:2601.13572", locality="tensor"),
    # of two models
    "nearswap": Joint(nearswap, "mergekit, documentation of nearswap", **_OF_TWO),
    "arcee_fusion": Joint(arcee_fusion, "mergekit, documentation of arcee_fusion", locality="tensor", **_OF_TWO),
    # in the span of the models: coefficients from their inner products
    "slerp": Joint(slerp, "doi:10.1145/325334.325242", **_OF_TWO),
    "nuslerp": Joint(nuslerp, "arXiv:2403.13257", locality=nuslerp_locality, models=(2, 2)),
    "nuslerp_delta": Joint(nuslerp_delta, "arXiv:2403.13257", locality=nuslerp_locality, models=(2, 2)),
    "multislerp": Joint(multislerp, "arXiv:2403.13257", models=(2, None)),
    "multislerp_delta": Joint(multislerp_delta, "arXiv:2403.13257", models=(2, None)),
    "karcher": Joint(karcher, "doi:10.1002/cpa.3160300502", models=(2, None)),
    "model_stock": Joint(model_stock, "arXiv:2403.19522", locality=model_stock_locality, models=(2, None)),
    # by singular directions
    "iso_cts": Joint(iso_cts, "arXiv:2502.04959", **_SPECTRAL),
    "star": Joint(star, "arXiv:2502.10339", per_model=("eta",), **_SPECTRAL),
    "cart": Joint(cart, "arXiv:2412.12153", **_SPECTRAL),
    "dc": Joint(dc, "arXiv:2603.06242", **_SPECTRAL),
    # from measured statistics
    "fisher": Joint(fisher, "arXiv:2111.09832"),
    "regmean": Joint(regmean, "arXiv:2212.09849", locality="tensor", vector=mean_of_models),
}

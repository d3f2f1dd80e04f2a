"""The rules of a method by its name, joint or continual, as a recipe sees them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from merganser.errors import ParameterError
from merganser.methods import METHODS, Method, settings_of
from merganser.methods.joint import JOINT_BROUGHT, MERGES, Joint

#: Stands for the default of a setting that has none.
MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Rules:
    """What a recipe needs to know of a method.

    Attributes:
        name: in the table.
        method: its row; a continual method is folded over the models in the recipe's order.
        settings: and their defaults; `MISSING` where there is none.
        per_model: settings that may differ from model to model; `weight` is not among them.
        needs_base: whether a base must be given.
        base_is_model: whether the base is the first of the models.
        weighted: whether the models have weights.
        models: fewest and most models beside the base.
        measured: what must have been measured of every model: "gram" or "fisher".
    """

    name: str
    method: Joint | Method
    settings: Mapping[str, Any]
    per_model: tuple[str, ...]
    needs_base: bool
    base_is_model: bool
    weighted: bool
    models: tuple[int, int | None]
    measured: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Settings without a default."""
        return tuple(n for n, default in self.settings.items() if default is MISSING)


def merge_names() -> list[str]:
    """Every method that a recipe may name: the joint ones, then the continual ones."""
    return [*MERGES, *(name for name in METHODS if name not in MERGES)]


def joint_settings(row: Joint) -> dict[str, Any]:
    """Settings of a joint method and their defaults, those of its vector rule included."""
    functions = [row.function] if row.vector is None else [row.function, row.vector]
    parameters = {k: p for f in functions for k, p in inspect.signature(f).parameters.items()}
    return {name: p.default for name, p in parameters.items() if name not in JOINT_BROUGHT}


def rules_of(name: str) -> Rules:
    """The rules of a method.

    Raises:
        ParameterError: If there is none of that name; names the nearest.
    """
    if name in MERGES:
        row = MERGES[name]
        weighted = "weight" in row.needs
        return Rules(
            name,
            row,
            joint_settings(row),
            row.per_model,
            row.needs_base,
            row.base_is_model,
            weighted,
            row.models,
            tuple(n for n in ("gram", "fisher") if n in row.needs),
        )
    if name in METHODS:
        method = METHODS[name]
        return Rules(name, method, settings_of(method), (), True, False, True, (1, None))
    near = get_close_matches(name.lower(), merge_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else "merganser methods lists them"
    raise ParameterError(f"there is no method {name!r}", hint)

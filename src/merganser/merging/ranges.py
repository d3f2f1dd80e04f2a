"""Ranges of settings and weights, checked before any work by the functions that know them, on empty tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from math import fsum
from typing import Any

import torch

from merganser.continual.kinds import Kind, check_settings, kind_of
from merganser.continual.roles import Role, is_matrix
from merganser.errors import ParameterError
from merganser.merging.lookup import Rules
from merganser.merging.post import finished
from merganser.methods import Factors, Sums
from merganser.methods.joint import Joint, names_of

_NOTHING = (0, 4)


class Ranges:
    """What has been checked of one plan.

    Args:
        rules: of its method.
        post: its post-processors.
    """

    def __init__(self, rules: Rules, post: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self._rules, self._post = rules, post
        self._sound: set[tuple[Any, ...]] = set()

    def check(
        self,
        name: str,
        role: Role,
        shape: Sequence[int],
        weights: Sequence[tuple[str, float]],
        settings: Mapping[str, Any],
    ) -> None:
        """Refuse what the method would refuse of one tensor.

        Args:
            name: of the tensor.
            role: of it.
            shape: of it.
            weights: every model's reference and its factor.
            settings: of the method.

        Raises:
            ParameterError: With the tensor's name, and with the model's where its weight is to blame.
        """
        weight = [factor for _, factor in weights]
        matrix = is_matrix(role) if isinstance(self._rules.method, Joint) else self._kind.treats_as_matrix(role, shape)
        key = (matrix, tuple(weight), *sorted((n, repr(v)) for n, v in settings.items()))
        if key in self._sound:
            return
        try:
            self._call(role, weight, settings)
            self._check_weights(matrix, weights)
            finished(self._post, role, 0.5, torch.zeros(_NOTHING), [torch.zeros(_NOTHING)] * len(weight))
        except ParameterError as error:
            raise ParameterError(f"{name}: {error.message}", error.hint) from error
        self._sound.add(key)

    @cached_property
    def _kind(self) -> Kind:
        return kind_of(self._rules.name, {})

    def _check_weights(self, matrix: bool, weights: Sequence[tuple[str, float]]) -> None:
        """Refuse weights that a continual method cannot take."""
        method, name = self._rules.method, self._rules.name
        if not isinstance(method, Sums | Factors):
            return
        positive = isinstance(method, Sums) and method.positive
        for ref, weight in weights:
            if positive and weight < 0:
                raise ParameterError(f"the weight of {ref} is {weight}; {name} takes none below 0")
        total = fsum(weight for _, weight in weights)
        rule = method.function if matrix else method.vector
        if total <= 0 and (positive or "total" in signature(rule).parameters):
            listed = ", ".join(f"{weight} of {ref}" for ref, weight in weights)
            raise ParameterError(f"the weights add up to {total}, and {name} needs a sum above 0: {listed}")

    def _call(self, role: Role, weight: Sequence[float], settings: Mapping[str, Any]) -> None:
        row, models = self._rules.method, len(weight)
        if not isinstance(row, Joint):
            check_settings(self._rules.name, settings)
            return
        given = {**self._rules.settings, **settings}
        for k in range(models) if row.ranks is not None else ():
            assert row.ranks is not None
            row.ranks(100, {n: (v[k] if isinstance(v, tuple) else v) for n, v in given.items()})
        function = row.function if row.vector is None or is_matrix(role) else row.vector
        if {"gram", "fisher"} & names_of(function):
            return
        stack = [torch.zeros(_NOTHING)] * models
        numbers = torch.zeros(models, dtype=torch.float64)
        brought = {
            "d": stack,
            "x": stack,
            "base": stack[0],
            "weight": tuple(weight),
            "u": stack,
            "keep": stack,
            "dots": torch.zeros(models, models, dtype=torch.float64),
            "energy": numbers,
            "stretch": numbers + 1,
        }
        function(**{n: v for n, v in {**brought, **settings}.items() if n in names_of(function)})

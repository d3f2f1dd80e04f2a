"""Ranges of settings and weights, checked before any work by the functions that know them, on empty tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from merganser.continual.kinds import check_settings
from merganser.continual.roles import Role, is_matrix
from merganser.errors import ParameterError
from merganser.merging.lookup import Rules
from merganser.merging.post import finished
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

    def check(self, name: str, role: Role, weight: Sequence[float], settings: Mapping[str, Any]) -> None:
        """Refuse what the method would refuse of one tensor.

        Raises:
            ParameterError: With the tensor's name.
        """
        key = (is_matrix(role), tuple(weight), *sorted((n, repr(v)) for n, v in settings.items()))
        if key in self._sound:
            return
        try:
            self._call(role, weight, settings)
            finished(self._post, role, 0.5, torch.zeros(_NOTHING), [torch.zeros(_NOTHING)] * len(weight))
        except ParameterError as error:
            raise ParameterError(f"{name}: {error.message}", error.hint) from error
        self._sound.add(key)

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

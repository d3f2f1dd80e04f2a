"""The words of studies of decentralised runs: `kind: agents`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from merganser.decentral.words import RunConfig, read_config
from merganser.errors import ParameterError
from merganser.report import PALETTE
from merganser.study.words import Node, Positive

Whole = Annotated[int, Field(ge=0)]


class AgentsMethod(Node):
    """One way for agents to learn together, or apart.

    Attributes:
        label: in tables and pictures.
        run: what it says otherwise than the study's `base`; parts are put together key by key.
        drawn: in pictures: as a curve; as a level, its last accuracy alone, which others are seen against; or not.
    """

    label: str
    run: dict[str, Any] = Field(default_factory=dict)
    drawn: Literal["curve", "level", "none"] = "curve"


class AgentsNode(Node):
    """Agents learn by several methods, each from the same seeds, so that methods differ and nothing else does.

    Attributes:
        zoo: folder of what agents learn alone before they first merge; methods share it.
        seeds: of weights, shares of the data and order.
        base: configuration that all methods share, as `merganser decentral run` takes it, without name and seed.
        methods: by name, in order.
        only: names of the methods that run; all where it is left out.
        against: method that the others are compared with, seed by seed.
        shown: merges after which tables say how good agents are, counted from 1.
    """

    kind: Literal["agents"]
    name: str
    title: str
    zoo: str
    seeds: Annotated[tuple[Whole, ...], Field(min_length=1)] = (0, 1, 2)
    base: dict[str, Any]
    methods: Annotated[dict[str, AgentsMethod], Field(min_length=1)]
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    against: str | None = None
    shown: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)

    @property
    def chosen(self) -> dict[str, AgentsMethod]:
        """The methods that run, by name."""
        return {name: self.methods[name] for name in self.only or self.methods}

    def config(self, method: str, seed: int) -> RunConfig:
        """The run of a method from a seed.

        Raises:
            ParameterError: If it is no configuration of a run; names the method.
        """
        words = _joined(self.base, self.methods[method].run)
        try:
            return read_config({**words, "name": f"{self.name}: {method}", "seed": seed})
        except ParameterError as error:
            raise ParameterError(f"method {method}: {error.message}", error.hint) from None

    @model_validator(mode="after")
    def _runs(self) -> AgentsNode:
        for name, method in self.methods.items():
            if taken := {"name", "seed"} & {*self.base, *method.run}:
                raise ValueError(f"{min(taken)} is the study's to give, and base or methods.{name} names one")
            try:
                self.config(name, self.seeds[0])
            except ParameterError as error:
                raise ValueError(str(error)) from None
        for key, names in (("only", self.only or ()), ("against", (self.against,) if self.against else ())):
            if unknown := [name for name in names if name not in self.methods]:
                raise ValueError(f"{key} names {unknown[0]}, and the methods are {', '.join(self.methods)}")
        if sum(method.drawn == "curve" for method in self.chosen.values()) > len(PALETTE):
            raise ValueError(f"pictures tell {len(PALETTE)} curves apart; let others be drawn as level or none")
        return self


def _joined(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two configurations as one: the second has the last word, key by key."""
    found = dict(base)
    for key, value in over.items():
        was = found.get(key)
        found[key] = _joined(was, value) if isinstance(was, Mapping) and isinstance(value, Mapping) else value
    return found

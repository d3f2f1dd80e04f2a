"""The words of a decentralised run: what its configuration may say, checked before any work.

An unknown key, a value of another kind or one out of its range is an error that names the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merganser.errors import ParameterError, RefError

Positive = Annotated[int, Field(gt=0)]
Whole = Annotated[int, Field(ge=0)]
#: Some multiple of a seed is what torch draws by, and that must be below 2^64.
Seed = Annotated[int, Field(ge=0, lt=1 << 43)]
#: Weights of n agents are n x n numbers.
Agents = Annotated[int, Field(gt=0, le=2000)]
Kind = Literal["full", "ring", "star", "hub", "torus", "exponential", "one_peer_exponential", "random_matching", "file"]
Weights = Literal["metropolis", "uniform", "lazy"]
Rule = Literal["plain", "aligned", "aligned_once", "soft", "model_stock", "none"]
Algorithm = Literal["merge", "cdsgd", "sgp", "isolated", "centralised"]
Codec = Literal["fp32", "bf16"]
#: Rules that compare units, and so look at pictures.
MATCHING: tuple[Rule, ...] = ("aligned", "aligned_once")


class Word(BaseModel):
    """A part of a configuration: nothing but its own keys, and no value taken for another kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TopologyWords(Word):
    """Who is whose neighbour, and with what weight.

    Attributes:
        kind: of graph; `topology` says what each is.
        weights: metropolis 1 / (1 + max(deg_i, deg_j)), uniform 1 / (1 + largest degree), or lazy, (I + W) / 2 of the
            metropolis ones.
        seed: of random matchings.
        file: JSON with an adjacency and perhaps weights, for the kind "file".
    """

    kind: Kind = "ring"
    weights: Weights = "metropolis"
    seed: Seed = 0
    file: str | None = None

    @model_validator(mode="after")
    def _file(self) -> TopologyWords:
        if (self.kind == "file") != (self.file is not None):
            raise ValueError("kind is file where a file is named, and only there")
        return self


class Match(Word):
    """What units are compared by.

    Attributes:
        images: how many, unlabelled.
        data: "own" is the agent's own shard; "proxy" is the shared set `data.proxy`, which is no agent's.
    """

    images: Positive = 1000
    data: Literal["own", "proxy"] = "own"


class Merge(Word):
    """How an agent merges with its neighbours, and when.

    Attributes:
        rule: "plain" is the weighted mean; "aligned" brings every neighbour into the agent's own order first (DIMAT);
            "aligned_once" brings every agent into its parent's order once, along a spanning tree, and is plain
            afterwards; "soft" is own x + (1 - own) mean; "model_stock" shrinks the mean towards the last common merge;
            "none" exchanges nothing.
        own: share of the agent's own weights under "soft", 0.99 in PAPA.
        every: rounds from one merge to the next.
        start: first round that merges, from 0; late merging.
        final_global: whether the last merge is of all agents with equal weights, whatever the graph.
        match: what units are compared by, to merge and to say how far apart agents are.
    """

    rule: Rule = "plain"
    own: Annotated[float, Field(ge=0, le=1)] | None = None
    every: Positive = 1
    start: Whole = 0
    final_global: bool = False
    match: Match = Match()

    @model_validator(mode="after")
    def _own(self) -> Merge:
        if (self.rule == "soft") != (self.own is not None):
            raise ValueError("own belongs to the rule soft, which needs it")
        return self

    @property
    def matches(self) -> bool:
        """Whether the rule compares units."""
        return self.rule in MATCHING

    def at(self, round: int) -> bool:
        """Whether agents merge in a round, counted from 0.

        >>> [round for round in range(8) if Merge(every=3, start=1).at(round)]
        [1, 4, 7]
        """
        return self.rule != "none" and round >= self.start and (round - self.start) % self.every == 0


class Optimizer(Word):
    """How an agent's steps are taken.

    Attributes:
        name: Adam, or stochastic gradient descent.
        lr: learning rate, constant.
        momentum: of sgd.
        keep: whether its state outlives a round; the published code makes it anew every round.
    """

    name: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keep: bool = True

    @model_validator(mode="after")
    def _momentum(self) -> Optimizer:
        if self.momentum and self.name != "sgd":
            raise ValueError("momentum belongs to sgd")
        return self


class Augment(Word):
    """How training pictures are varied.

    Attributes:
        flip: left and right changed over, half of the time.
        crop: pixels that a picture is moved by at most, in both directions.
    """

    flip: bool = False
    crop: Whole = 0


class Data(Word):
    """What the agents learn from, and how it is shared out.

    Attributes:
        source: the examples, as a study's configuration names them, such as {"kind": "digits"}.
        domains: several sources by name, agent i has the (i mod number)th; for the split "domains".
        split: "iid" cuts every class evenly; "dirichlet" draws every class's shares; "classes" gives class c to agent
            c mod agents; "domains" gives every agent a source.
        alpha: concentration of the Dirichlet distribution.
        seed: of the shares, so that runs of several seeds may have the same ones; that of the run where it is left out.
        items: most training examples an agent has.
        test: most test examples; all where it is left out.
        shrink: side of the squares of pixels of which each becomes one, their mean; 1 leaves pictures as they are.
        proxy: training examples that are set aside for all to compare units by, and are in no shard.
    """

    source: dict[str, Any] | None = None
    domains: dict[str, dict[str, Any]] = {}
    split: Literal["iid", "dirichlet", "classes", "domains"] = "iid"
    alpha: Annotated[float, Field(gt=0)] | None = None
    seed: Seed | None = None
    items: Positive | None = None
    test: Positive | None = None
    shrink: Positive = 1
    proxy: Whole = 0

    @model_validator(mode="after")
    def _one_origin(self) -> Data:
        if (self.split == "domains") != bool(self.domains) or (self.source is None) != bool(self.domains):
            raise ValueError("name a source, or domains with split: domains")
        if (self.split == "dirichlet") != (self.alpha is not None):
            raise ValueError("alpha belongs to the split dirichlet, which needs it")
        return self


class Limits(Word):
    """What of a neighbour's snapshot is refused.

    Attributes:
        snapshot_bytes: largest size, looked at before anything is parsed.
        norm_ratio: largest ratio of its norm to that of the agent's own weights.
    """

    snapshot_bytes: Positive = 1 << 30
    norm_ratio: Annotated[float, Field(gt=0)] = 1e3


class RunConfig(Word):
    """A decentralised run.

    A round is: train, publish, collect, merge, recalibrate. The last step of a run is therefore a merge.

    Attributes:
        name: of the run, in its report and in every snapshot.
        agents: how many; 1 trains alone.
        topology: who is whose neighbour.
        rounds: how many.
        local_epochs: passes over its own shard that an agent trains in a round; may be a part of one.
        warmup_epochs: passes that every agent trains alone before the first round, which is then "merge first".
        merge: how and when.
        recalibrate: whether statistics of BatchNorm are taken again after every merge, on the agent's own shard.
        mode: "sync" merges snapshots of the same round; "async" those that are there.
        max_staleness: rounds that a snapshot may be older than the agent, in the mode async.
        deadline_s: seconds that an agent waits for its neighbours.
        codec: what floating tensors are sent as: fp32 sends them as they are, bf16 in half the bytes.
        optimizer: how steps are taken.
        augment: how training pictures are varied.
        batch: examples a step.
        seed: of everything that is drawn.
        same_start: whether all agents start from the same weights.
        network: as a study's configuration names it, such as {"kind": "resnet", "channels": 16}.
        data: what the agents learn from.
        algorithm: "merge", or what it is compared with: "cdsgd" mixes weights with every step, "sgp" pushes sums with
            every step, "isolated" exchanges nothing, "centralised" trains one model on all the data.
        limits: what of a neighbour's snapshot is refused.
    """

    name: Annotated[str, Field(min_length=1)] = "run"
    agents: Agents
    topology: TopologyWords = TopologyWords()
    rounds: Positive
    local_epochs: Annotated[float, Field(gt=0)] = 2.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    merge: Merge = Merge()
    recalibrate: bool = True
    mode: Literal["sync", "async"] = "sync"
    max_staleness: Whole = 0
    deadline_s: Annotated[float, Field(gt=0)] = 60.0
    codec: Codec = "fp32"
    optimizer: Optimizer = Optimizer()
    augment: Augment = Augment()
    batch: Positive = 100
    seed: Seed = 0
    same_start: bool = False
    network: dict[str, Any]
    data: Data
    algorithm: Algorithm = "merge"
    limits: Limits = Limits()

    @property
    def exchanges(self) -> bool:
        """Whether any model is ever sent."""
        if self.algorithm == "merge":
            return self.merge.rule != "none" or self.merge.final_global
        return self.algorithm in ("cdsgd", "sgp")

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.max_staleness and self.mode == "sync":
            raise ValueError("max_staleness belongs to the mode async")
        if self.algorithm != "merge" and self.merge.model_copy(update={"match": Match()}) != Merge():
            raise ValueError(f"algorithm {self.algorithm} takes no merge")
        if self.algorithm != "merge" and self.mode == "async":
            raise ValueError(f"algorithm {self.algorithm} is synchronous")
        if self.merge.rule != "none" and self.merge.start >= self.rounds:
            raise ValueError(f"merge.start is {self.merge.start}, and there are {self.rounds} rounds, from 0")
        if self.merge.match.data == "proxy" and not self.data.proxy:
            raise ValueError("merge.match.data is proxy, and data.proxy sets no examples aside")
        return self


def read_config(content: Mapping[str, Any]) -> RunConfig:
    """A run's configuration from what YAML says.

    Raises:
        ParameterError: If a key is unknown, a value is of the wrong kind or out of range, or two do not go together;
            names the place and the nearest key.

    >>> config = read_config({"agents": 5, "rounds": 3, "network": {"kind": "mlp"}, "data": {"source": {}}})
    >>> config.topology.kind, config.merge.rule
    ('ring', 'plain')
    """
    try:
        return RunConfig.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        message = f"{place}: {what}" if place else what
        if first["type"] == "extra_forbidden":
            message = f"{place}: there is no such key"
        elif first["type"] == "missing":
            message = f"{place} is missing"
        elif not isinstance(first["input"], Mapping):
            message = f"{message} ({first['input']!r})"
        raise ParameterError(message, _hint(first)) from None


def load_config(path: Path) -> RunConfig:
    """A run's configuration from a YAML file.

    Raises:
        RefError: If the file cannot be read.
        ParameterError: If it is not YAML, not a mapping, or not a configuration.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise RefError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ParameterError(f"{path} is nested too deeply to be read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not sound YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ParameterError(f"{path} is not a mapping of keys to values")
    try:
        return read_config(content)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error.message}", error.hint) from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key that stands twice is an error: of two values neither is meant."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping, as it is written."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(
                    f"{key.value} stands there twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.append(key.value)
        return node


def _hint(first: Mapping[str, Any]) -> str | None:
    """What to do about the first error of pydantic's."""
    if first["type"] == "extra_forbidden":
        known = _keys(first["loc"][:-1])
        near = get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"did you mean {near[0]}?" if near else f"the keys here: {', '.join(known)}"
    if first["type"] == "literal_error":
        choices = _choices(first["loc"])
        near = get_close_matches(str(first["input"]), choices, n=1)
        return f"did you mean {near[0]}?" if near else None
    if first["type"] in ("float_type", "int_type") and isinstance(first["input"], str):
        try:
            value = float(first["input"])
        except ValueError:
            return None
        return f"YAML reads {first['input']} as text; write {value}"
    return None


def _keys(place: tuple[str | int, ...]) -> list[str]:
    """Keys of the part of the configuration at a place."""
    part: type[Word] = RunConfig
    for key in place:
        part = part.model_fields[str(key)].annotation  # type: ignore[assignment]
    return list(part.model_fields)


def _choices(place: tuple[str | int, ...]) -> list[str]:
    """What the word at a place may be."""
    part: type[Word] = RunConfig
    for key in place[:-1]:
        part = part.model_fields[str(key)].annotation  # type: ignore[assignment]
    return [str(choice) for choice in get_args(part.model_fields[str(place[-1])].annotation)]

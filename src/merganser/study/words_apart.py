"""The words of studies whose networks started apart: `kind: halves` and `kind: lines`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from merganser.study.words import Node, PackedSource, Positive, Source, Training

#: Rules that give a network of the size of one, or both networks.
PLAIN = ("average", "weights", "activations", "dual", "zip", "dual_zip", "part_zip", "ensemble", "regmean")
#: Rules that merge in part: "refit" alone is of the size of one, "refit@1.2" may cost 1.2 of it.
IN_PART = ("pleas", "refit", "refit_answers")


def _known_rule(rule: str) -> str:
    name, at, budget = rule.partition("@")
    if name not in (IN_PART if at else (*PLAIN, *IN_PART)):
        raise ValueError(
            f"rule {rule!r} is none of {', '.join(PLAIN)}, nor of {', '.join(IN_PART)} with or without @1.2"
        )
    if at:
        try:
            if not 1 <= float(budget) <= 2:
                raise ValueError
        except ValueError:
            raise ValueError(f"rule {rule!r} has a budget of {budget!r}; it is in [1, 2]") from None
    return rule


Rule = Annotated[str, AfterValidator(_known_rule)]
LineRule = Literal["naive", "weights", "activations"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=0)]


class Pictures(Node):
    """How many pictures each step looks at; none of them with its label, but for the score.

    All but `test` are whole batches, since networks are traced on inputs of one shape.

    Attributes:
        compare: of training pictures, to compare units by.
        measure: of training pictures, for statistics of BatchNorm or layers.
        held_out: of validation pictures, to choose a balance by.
        test: of test pictures, to judge by; all where it is left out.
        batch: pictures at a time.
    """

    compare: Positive = 1000
    measure: Positive = 2000
    held_out: Positive = 1000
    test: Positive | None = None
    batch: Positive = 250

    @model_validator(mode="after")
    def _whole_batches(self) -> Pictures:
        for name in ("compare", "measure", "held_out"):
            if getattr(self, name) % self.batch:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a multiple of batch, {self.batch}")
        return self


class Codes(Node):
    """A fixed head that all networks share: orthonormal codes of the classes; logits are scale * cosine."""

    width: Positive = 64
    scale: Annotated[float, Field(gt=0)] = 16.0


class Zipping(Node):
    """Settings of the zips.

    Attributes:
        repeat: discount of units that were joined before.
        within: share of a network's joins that may be between its own units.
        share: of the groups that a partial zip joins, by depth.
    """

    repeat: Annotated[float, Field(gt=0, le=1)] = 0.5
    within: Fraction = 1.0
    share: Fraction = 0.67


class _Grown(Node):
    """A network and its training.

    Attributes:
        network: {"kind": "resnet", ...}, without sizes of pictures and answers: those are known.
        training: how.
        label: in tables.
    """

    network: dict[str, Any]
    training: Training
    label: str

    @model_validator(mode="after")
    def _known_sizes(self) -> _Grown:
        for name in ("image", "width"):
            if name in self.network:
                raise ValueError(f"network names its {name}, which the study knows")
        return self


class HalvesNetwork(_Grown):
    """A network that is trained on both halves of the classes.

    Attributes:
        splits: seeds of the halves, and of what is trained on them.
        rules: to merge by, where they are not the study's.
    """

    splits: Annotated[tuple[Whole, ...], Field(min_length=1)]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] | None = None


class LinesNetwork(_Grown):
    """A network that is trained on one task from several seeds.

    Attributes:
        pairs: of seeds, a line each.
    """

    pairs: Annotated[tuple[tuple[Whole, Whole], ...], Field(min_length=1)]


class Plane(Node):
    """The two-task loss surface of one pair.

    Attributes:
        network: its name.
        split: its split.
        points: along each side.
        margin: of the picture around the three networks, as a share of their extent.
        measure: pictures for BatchNorm's statistics at every place.
        test: test pictures.
    """

    network: str
    split: Whole
    points: Annotated[int, Field(ge=3)] = 9
    margin: Annotated[float, Field(ge=0)] = 0.3
    measure: Positive = 500
    test: Positive = 500


class HalvesNode(Node):
    """Two networks learn a half of the classes each, and one is made of both, by every rule.

    Attributes:
        data: pictures and their classes.
        seen: pictures that rules look at, where they are of other data than the networks learnt.
        zoo: folder of the trained networks.
        codes: the head.
        networks: by name, in order.
        rules: to merge by.
        balances: shares of the weights that are tried where weights and activations both count.
        zipping: settings of the zips.
        pictures: how many each step looks at.
        surface: of one pair.
    """

    kind: Literal["halves"]
    name: str
    title: str
    data: Source
    seen: Source | None = None
    zoo: str
    codes: Codes = Codes()
    networks: Annotated[dict[str, HalvesNetwork], Field(min_length=1)]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    balances: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.1, 0.3, 0.5, 0.7, 0.9)
    zipping: Zipping = Zipping()
    pictures: Pictures = Pictures()
    surface: Plane | None = None

    @model_validator(mode="after")
    def _surface_of_a_pair(self) -> HalvesNode:
        if self.surface is not None:
            network = self.networks.get(self.surface.network)
            if network is None or self.surface.split not in network.splits:
                raise ValueError(f"surface names {self.surface.network}, split {self.surface.split}: no such pair")
        return self


class DomainsNode(HalvesNode):
    """Two networks learn the same classes in a domain each, and one is made of both, by every rule.

    Attributes:
        data: pictures with domains, a packed file.
        pairs: of domains; split s of a network is of pair s modulo their number.
    """

    kind: Literal["domains"]  # type: ignore[assignment]
    data: PackedSource
    pairs: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_surface(self) -> DomainsNode:
        if self.surface is not None:
            raise ValueError("surface is of halves of classes")
        return self


class LinesNode(Node):
    """Two networks learn the same task from two seeds, and are judged on the straight line between them.

    Attributes:
        data: pictures and their classes.
        zoo: folder of the trained networks.
        networks: by name, in order.
        rules: that bring the second network into the order of the first.
        points: places on a line, both ends among them.
        pictures: how many each step looks at.
    """

    kind: Literal["lines"]
    name: str
    title: str
    data: Source
    zoo: str
    networks: Annotated[dict[str, LinesNetwork], Field(min_length=1)]
    rules: Annotated[tuple[LineRule, ...], Field(min_length=1)] = ("naive", "weights", "activations")
    points: Annotated[int, Field(ge=3)] = 11
    pictures: Pictures = Pictures()


#: What `kind` of a study may be, but for "fold", where experts arrive one by one.
KINDS: dict[str, type[HalvesNode] | type[LinesNode]] = {
    "halves": HalvesNode,
    "domains": DomainsNode,
    "lines": LinesNode,
}

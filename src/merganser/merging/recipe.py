"""A recipe: which models become one, by which method and with which settings. Frozen, checked, and read by nothing yet.

Two languages say it: ours (`native.py`) and mergekit's YAML (`mergekit.py`); both become the classes of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from merganser.merging.values import Value

Dialect = Literal["paper", "mergekit"]
Settings = Mapping[str, Value]


@dataclass(frozen=True)
class Input:
    """One model in one slice.

    Attributes:
        ref: any checkpoint reference, or the name of an earlier recipe of the same file.
        layers: [first, end) of its layers; None for the whole model.
        settings: this model's own: `weight`, and those that a method takes per model.
        statistics: reference of what `merganser measure` wrote of it, for methods that ask for it.
    """

    ref: str
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)
    statistics: str | None = None


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output and what they are made of. A recipe without slices is one slice of whole models.

    Attributes:
        inputs: in the user's order; all with ranges of one length, or all without.
        base: in this slice, where it is another than the recipe's.
        settings: of this slice.
        module: prefix of the tensors that the slice makes, such as "text."; "" for all that no other module has.
        module_settings: of the module that the slice belongs to.
    """

    inputs: tuple[Input, ...]
    base: Input | None = None
    settings: Settings = field(default_factory=dict)
    module: str = ""
    module_settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """Where the embedding of one token comes from.

    Attributes:
        kind: "model": the row of `model`; "token": the row of the token `token` (or of id `token`) of `model`;
            "zero": zeros.
        model: reference of one of the models.
        token: the token whose row is taken; None for the same token.
        force: even for models that have the token themselves.
    """

    kind: Literal["model", "token", "zero"]
    model: str | None = None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The output's vocabulary.

    Attributes:
        source: "union", "base", "intersection", or the reference of one of the models.
        tokens: exceptions by token.
        pad_to_multiple_of: rows of the embeddings are filled up to a multiple of this.
    """

    source: str
    tokens: Mapping[str, Token] = field(default_factory=dict)
    pad_to_multiple_of: int = 1


@dataclass(frozen=True)
class AdapterOut:
    """The adapter that a merge of adapters makes.

    Attributes:
        rank: of every weight's change, or less where the ranks that went in add up to less; None for no truncation.
    """

    rank: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        method: of the table (`merganser methods`).
        slices: at least one.
        base: what changes are taken against; None where the method needs none.
        settings: of the method, for the whole recipe.
        post: what is done to the merged change afterwards: names of post-processors with their settings, in order.
        dtype: of the floating tensors of the output, by safetensors name; None for each tensor's own.
        dialect: whose meaning counts where a paper and mergekit differ.
        seed: of the noise that stochastic methods draw.
        name: by which later recipes of a file may use the output; None for none.
        vocabulary: None where all models share one.
        chat_template: None to keep the donor's; "auto" for the most frequent; else the template itself.
        keep: shell patterns of names that stay the base's (or the first model's).
        adapter: where all models are LoRA adapters that are merged with each other; None for whole models.
        text: the recipe as it was written.
        written: references as they are written there, by what they were resolved to: a model's noise is drawn by its
            name in the recipe, wherever that is run.
    """

    method: str
    slices: tuple[Slice, ...]
    base: Input | None = None
    settings: Settings = field(default_factory=dict)
    post: tuple[tuple[str, Settings], ...] = ()
    dtype: str | None = None
    dialect: Dialect = "paper"
    seed: int = 0
    name: str | None = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    keep: tuple[str, ...] = ()
    adapter: AdapterOut | None = None
    text: str = ""
    written: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def refs(self) -> tuple[str, ...]:
        """Every reference to a model once: the base first, then the models in the order of the recipe."""
        inputs = [self.base, *(i for s in self.slices for i in (s.base, *s.inputs))]
        return tuple(dict.fromkeys(i.ref for i in inputs if i is not None))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Every reference to measured statistics once."""
        found = (i.statistics for s in self.slices for i in s.inputs)
        return tuple(dict.fromkeys(ref for ref in found if ref is not None))

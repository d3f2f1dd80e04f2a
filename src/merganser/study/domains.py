"""Pictures of two domains, for studies in which each network learns all classes in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.study.apart import Album
from merganser.study.data import Examples, Split
from merganser.study.words import PackedSource


@dataclass
class Domains(Album):
    """Pictures of two domains in turn, as long as both have some; test pictures one domain after the other.

    Attributes:
        pair: the domains of sides a and b.
    """

    source: PackedSource
    pair: tuple[str, str] = ("", "")

    @property
    def own_test(self) -> Mapping[str, Tensor]:
        """By side, which test pictures are of its domain."""
        first = torch.arange(len(self.test)) < min(len(self._of("test")[0]), len(self.test))
        return {"a": first, "b": ~first}

    def own_train(self, side: str) -> Examples:
        """Training pictures of a side's domain."""
        return self._of("train")["ab".index(side)]

    def learnt(self, side: str) -> dict[str, Any]:
        """The source with its domain, in words for JSON."""
        return {"data": self._source(self.pair["ab".index(side)]).model_dump(mode="json")}

    @cached_property
    def _known(self) -> dict[Split, tuple[Examples, Examples]]:
        return {}

    def _of(self, split: Split) -> tuple[Examples, Examples]:
        if split not in self._known:
            one, two = (self._examples(self._source(domain), split) for domain in self.pair)
            self._known[split] = one, two
        return self._known[split]

    def _source(self, domain: str) -> PackedSource:
        return self.source.model_copy(update={"domain": domain})

    def _read(self, split: Split) -> Examples:
        one, two = self._of(split)
        both = replace(
            one,
            items=np.concatenate([np.asarray(one.items), np.asarray(two.items)]),
            labels=np.concatenate([one.labels, two.labels]),
        )
        if split == "test":
            return both
        shared = min(len(one), len(two))
        turns = np.stack([np.arange(shared), len(one) + np.arange(shared)], axis=1).reshape(-1)
        rest = np.setdiff1d(np.arange(len(both)), turns)
        return both.take(np.concatenate([turns, rest]))

"""The table of post-processors: what may be done to a merged change, whatever merged it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merganser.methods.joint.post_lines import lines
from merganser.methods.joint.post_subspace_boosting import subspace_boosting
from merganser.methods.joint.post_svc import svc

#: What the caller brings: the merged change, the changes that it is a merge of, and the place of the layer.
POST_BROUGHT = frozenset({"merged", "d", "depth"})


@dataclass(frozen=True)
class Post:
    """A post-processor.

    Attributes:
        function: merged change -> merged change.
        source: paper.
        matrices: whether it is for linear weights (out, in) only; everything else stays as it is.
    """

    function: Callable[..., Tensor]
    source: str
    matrices: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Settings and their defaults; `inspect.Parameter.empty` where there is none."""
        parameters = inspect.signature(self.function).parameters
        return {name: p.default for name, p in parameters.items() if name not in POST_BROUGHT}


POSTS: Mapping[str, Post] = {
    "lines": Post(lines, "arXiv:2410.17146", matrices=False),
    "subspace_boosting": Post(subspace_boosting, "arXiv:2506.16506", matrices=True),
    "svc": Post(svc, "arXiv:2602.05536", matrices=True),
}

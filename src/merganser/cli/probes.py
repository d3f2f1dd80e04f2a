"""`merganser pleas --probe FILE:NAME`: the last layer fitted to labels, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from merganser.align.activations import Batch
    from merganser.align.partial import Pair, PartlyMerged


@dataclass(frozen=True)
class Probes:
    """Labels to fit a head to.

    Attributes:
        name: of what gives them.
        labelled: batches and their classes.
        ridge: pull to the head that the merge gave.
    """

    name: str
    labelled: Sequence[tuple[Batch, Tensor]]
    ridge: float

    def words(self) -> str:
        """What was done."""
        count = sum(classes.numel() for _, classes in self.labelled)
        return f"the last layer was fitted to {count:,} labelled examples of {self.name}"

    def receipt(self) -> dict[str, Any]:
        """What a receipt says of it."""
        return {"labelled": self.name, "examples": sum(classes.numel() for _, classes in self.labelled)}

    def finished(self, pair: Pair, made: PartlyMerged) -> PartlyMerged:
        """A merged network whose head is fitted to the labels: the one whose outputs stay apart, or the last layer.

        Raises:
            ParameterError: If several heads stay apart, or as `align.probe.probe`.
        """
        from copy import deepcopy

        from merganser.align.probe import probe
        from merganser.errors import ParameterError

        heads = pair.settings.heads or (pair.last,)
        if len(heads) > 1:
            raise ParameterError(f"--probe is for one head, and {' and '.join(heads)} stay apart", "leave --probe out")
        found = probe(made.network, made.record, heads[0], self.labelled, ridge=self.ridge)
        network = deepcopy(made.network)
        state = {f"{heads[0]}.weight": found.weight}
        if found.bias is not None:
            state[f"{heads[0]}.bias"] = found.bias
        network.load_state_dict({**network.state_dict(), **state})
        return replace(made, network=network)

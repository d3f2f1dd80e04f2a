"""`merganser pleas --noise N`: inputs where there is no data, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from merganser.align.activations import Batch
    from merganser.align.partial import Pair, PartlyMerged
    from merganser.align.surrogate import Noise


@dataclass(frozen=True)
class Surrogates:
    """Inputs that are noise.

    Attributes:
        batches: all of one size.
        noise: what BatchNorm told of the data; None where it told nothing.
        parents: both networks as they are, with the statistics of the data.
    """

    batches: list[Batch]
    noise: Noise | None
    parents: tuple[nn.Module, nn.Module]

    @property
    def count(self) -> int:
        """Number of inputs."""
        from merganser.align.ran import examples

        return sum(map(examples, self.batches))

    def words(self) -> str:
        """What they are."""
        if self.noise is None:
            return "no data was seen: inputs are surrogates, standard normal noise"
        first = self.noise.first
        return (
            f"no data was seen: inputs are surrogates, noise by which {first.layer} gives what {first.norm} remembers"
        )

    def receipt(self) -> dict[str, Any]:
        """What a receipt says of them."""
        told = self.noise
        return {
            "what": self.words(),
            "count": self.count,
            "layer": told and told.first.layer,
            "mean": told and told.mean.tolist(),
            "variance": told and told.variance.tolist(),
        }

    def finished(self, pair: Pair, made: PartlyMerged) -> PartlyMerged:
        """A network whose BatchNorm has the statistics of the data, as far as its parents' tell them."""
        from copy import deepcopy

        from merganser.align.surrogate import carried_over

        spec, state = pair.found.spec, made.network.state_dict()
        a, b = (network.state_dict() for network in self.parents)
        b = {n: spec.apply(pair.orders, n, x) if n in spec.axes else x for n, x in b.items()}
        found = carried_over(spec, made.splits, state, (pair.a, pair.b), (a, b), pair.settings.share)
        network = deepcopy(made.network)
        network.load_state_dict({**state, **found})
        return replace(made, network=network)


def surrogates_of(example: Batch, parents: tuple[nn.Module, nn.Module], count: int, seed: int) -> Surrogates:
    """Noise to compare and fit two networks by.

    Args:
        example: inputs of both.
        parents: both networks.
        count: how many inputs.
        seed: of the drawing.

    Raises:
        ParameterError: If they take in no floating numbers.
    """
    from merganser.align.surrogate import first_layer, matched_noise, surrogate_batches

    first = first_layer(parents[0], example)
    noise = matched_noise(first, parents) if first is not None else None
    return Surrogates(surrogate_batches(example, count, noise=noise, seed=seed), noise, parents)

"""What merging every few epochs is compared with: agents that mix weights with every batch, or never.

    CDSGD   x_i <- sum_j w_ij x_j + u_i(x_i)                       combine, then adapt
    SGP     x_j <- x_j + u_j(z_j);  x_i <- sum_j p_ij x_j;  y_i <- sum_j p_ij y_j;  z_i = x_i / y_i

u_i is what the agent's own optimizer adds for a batch, whatever optimizer it is, so that all algorithms have the same
one. Columns of p sum to 1, rows need not: without the weight y an agent that is given much would count for more than
one, and z would not be a mean. The mean of y over agents is 1 and must stay so, since a step counts 1 / y times in z: a
share that does not arrive stays with its sender, and both ends settle that as they do for merges. An isolated agent
exchanges nothing; a centralised one has everybody's data.

Sources: Jiang et al. 2017, arXiv:1706.07880, algorithm 1; Assran et al. 2019, arXiv:1811.10792, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.align.costs import is_statistic
from merganser.decentral.learner import Tensors
from merganser.decentral.words import RunConfig, TopologyWords
from merganser.errors import ParameterError

#: Under which a weight of push-sum travels beside the numerators: the bits of a float64, which no codec rounds.
PUSHED_WEIGHT = "merganser.push_sum_weight"


def combined(
    own: int, before: Mapping[int, Tensors], weights: Mapping[int, float], after: Tensors
) -> dict[str, Tensor]:
    """CDSGD: neighbours' weights from before the batch, mixed, and the change that the agent's own batch made.

    Args:
        own: number of the agent.
        before: models by agent, its own among them.
        weights: of each of them; they sum to 1.
        after: the agent's model after the batch.
    """
    found = {}
    for name, x in after.items():
        if not x.is_floating_point():
            found[name] = x.clone()
            continue
        mixed = x.double() - before[own][name].double()
        for j in sorted(before):
            mixed += weights[j] * before[j][name].double()
        found[name] = mixed.to(x.dtype)
    return found


@dataclass(frozen=True)
class Pushed:
    """What push-sum keeps for an agent.

    Attributes:
        numerators: as many as the model has tensors.
        weight: y, above 0; the mean over agents is 1.
    """

    numerators: Mapping[str, Tensor]
    weight: float = 1.0

    def adapted(self, before: Tensors, after: Tensors) -> Pushed:
        """With the change that a batch made to the model, in the precision that is sent."""
        changed = {
            name: (x.double() + after[name].double() - before[name].double()).to(x.dtype)
            if x.is_floating_point()
            else after[name].clone()
            for name, x in self.numerators.items()
        }
        return Pushed(changed, self.weight)

    def model(self) -> dict[str, Tensor]:
        """What trains and is judged: z = x / y."""
        return {
            name: (x.double() / self.weight).to(x.dtype) if x.is_floating_point() else x.clone()
            for name, x in self.numerators.items()
        }

    def with_statistics(self, model: Tensors) -> Pushed:
        """With statistics of BatchNorm that are those of a model."""
        numerators = {
            name: (model[name].double() * self.weight).to(x.dtype) if is_statistic(name) else x
            for name, x in self.numerators.items()
        }
        return Pushed(numerators, self.weight)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, to be sent or kept."""
        return {**self.numerators, PUSHED_WEIGHT: torch.tensor([self.weight], dtype=torch.float64).view(torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Pushed:
        """What `tensors` gave.

        Raises:
            ParameterError: If the weight is no positive number.
        """
        weight = float(tensors[PUSHED_WEIGHT].view(torch.float64))
        if not 0 < weight < float("inf"):
            raise ParameterError(f"a weight of push-sum is {weight}; it is above 0 and finite")
        return cls({name: x for name, x in tensors.items() if name != PUSHED_WEIGHT}, weight)


def readable(received: Mapping[int, Tensors]) -> dict[int, Pushed]:
    """What was pushed, by sender; one whose weight is no positive number is left out."""
    found = {}
    for sender, tensors in received.items():
        try:
            found[sender] = Pushed.from_tensors(tensors)
        except ParameterError:
            continue
    return found


def pushed_sum(own: int, received: Mapping[int, Pushed], shares: Mapping[int, float]) -> Pushed:
    """SGP: shares of numerators and weights, added up.

    Whatever shares are given, z is a weighted mean; that what is lost stays with its sender is for them to say.

    Args:
        own: number of the agent.
        received: by sender, its own among them.
        shares: of each of them: what it gives to this agent.
    """
    total: dict[str, Tensor] = {}
    for name, x in received[own].numerators.items():
        if x.is_floating_point():
            summed = torch.zeros(x.shape, dtype=torch.float64)
            for j in sorted(received):
                summed += shares[j] * received[j].numerators[name].double()
            total[name] = summed.to(x.dtype)
        else:
            total[name] = x.clone()
    return Pushed(total, sum(shares[j] * received[j].weight for j in sorted(received)))


def effective(config: RunConfig) -> RunConfig:
    """The run that an algorithm comes to: a centralised one is a single agent, with the data of all."""
    if config.algorithm != "centralised":
        return config
    return config.model_copy(update={"agents": 1, "topology": TopologyWords()})

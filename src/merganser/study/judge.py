"""How good a network is at a task: one number with its n and standard error, from fixed examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from merganser.errors import MerganserError, NonFiniteError, ParameterError
from merganser.numerics import all_finite
from merganser.study.data import Examples
from merganser.study.heads import HeadFunction
from merganser.study.networks import Encoder

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """A measured number.

    Attributes:
        value: in `unit`.
        n: how many examples.
        error: standard error over examples, in `unit`; NaN where none is known.
        unit: "%".
        digest: sha256 of the examples that were judged.
    """

    value: float
    n: int
    error: float
    unit: str
    digest: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Paper:
    """The examples and the head of one task, prepared once for networks of one kind.

    Args:
        examples: to judge by.
        head: of the task.
        metric: "accuracy" or "macro_f1".
    """

    def __init__(self, examples: Examples, head: HeadFunction, metric: str = "accuracy") -> None:
        self.examples, self.head, self.metric = examples, head, metric
        self._prepared: list[Any] | None = None
        self._digests: dict[int, str] = {}

    @torch.no_grad()
    def judge(
        self,
        encoder: Encoder,
        *,
        count: int | None = None,
        batch: int = 250,
        bfloat16: bool = False,
        progress: Progress | None = None,
    ) -> Score:
        """Score a network.

        Args:
            encoder: in evaluation mode, on any device.
            count: the first so many examples; None for all.
            batch: examples at a time; texts are taken in the order of their lengths.
            bfloat16: matrix products in bfloat16.
            progress: called as (examples done, examples in all).

        Raises:
            ParameterError: If there is no example.
            NonFiniteError: If the network answers NaN or infinity.
        """
        if self._prepared is None:
            self._prepared = encoder.prepare(self.examples.items)
        prepared = self._prepared[: len(self.examples) if count is None else count]
        if not prepared:
            raise ParameterError("there is no example to judge by")
        labels = torch.from_numpy(self.examples.labels[: len(prepared)])
        order = sorted(range(len(prepared)), key=lambda i: len(prepared[i]))  # stable: pictures keep their order
        answers = torch.empty(len(prepared), dtype=torch.int64)
        device = next(encoder.parameters()).device
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                x = encoder.embed([prepared[i] for i in places])
            logits = self.head(x.float())
            if not all_finite(logits):
                raise NonFiniteError("the network answers NaN or infinity, which cannot be judged")
            answers[places] = logits.argmax(1).cpu()
            if progress is not None:
                progress(min(start + batch, len(order)), len(order))
        value, error = _measure(self.metric, answers, labels, len(self.examples.classes))
        return Score(100 * value, len(labels), 100 * error, "%", self._digest(len(labels)))

    def _digest(self, count: int) -> str:
        """Of the first so many examples."""
        if count not in self._digests:
            self._digests[count] = self.examples.first(count).digest
        return self._digests[count]


def _measure(metric: str, answers: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """Value in [0, 1] and its standard error."""
    if metric == "accuracy":
        value = float((answers == labels).double().mean())
        return value, math.sqrt(value * (1 - value) / len(labels))
    try:
        from torchmetrics.functional.classification import multiclass_f1_score
    except ImportError as error:
        raise MerganserError(f"{metric} needs torchmetrics", 'pip install "merganser[study]"') from error
    return float(multiclass_f1_score(answers, labels, num_classes=classes, average="macro")), math.nan

"""What the layers of a network give at some rows, noted while it runs, for this or for something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.autocorrelation import Windows
from merganser.align.orientation import outputs_of
from merganser.align.ran import examples


@dataclass
class Outputs:
    """Outputs of layers, batch after batch.

    Attributes:
        drawn: numbers of the rows of all batches that are noted, ascending, by layer.
        places: rows of one example.
        found: what they gave, a part a run, shape (n, units).
    """

    drawn: Mapping[str, Tensor]
    places: Mapping[str, int]
    found: dict[str, list[Tensor]] = field(default_factory=dict)
    _start: int = 0

    @contextmanager
    def noting(self, network: nn.Module, batch: Batch) -> Iterator[None]:
        """Note what the network gives when it runs on the batch."""

        def ran(name: str, layer: nn.Module, _args: Any, y: Tensor) -> None:
            count, drawn, first = y.numel() // outputs_of(layer), self.drawn[name], self._start * self.places[name]
            here = drawn[torch.searchsorted(drawn, first) : torch.searchsorted(drawn, first + count)]
            self.found.setdefault(name, []).append(given_rows(layer, y, here - first))

        with ExitStack() as stack:
            for name in self.drawn:
                stack.callback(network.get_submodule(name).register_forward_hook(partial(ran, name)).remove)
            yield
        self._start += examples(batch)

    def at(self, name: str, rows: Tensor) -> Tensor | None:
        """What a layer gave at some rows, shape (n, units); None where one of them was not noted."""
        parts, drawn = self.found.get(name, []), self.drawn.get(name)
        if not parts or drawn is None:
            return None
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        y = parts[0]
        places = torch.searchsorted(drawn, rows)
        known = len(y) == len(drawn) and bool((places < len(drawn)).all()) and torch.equal(drawn[places], rows)
        return y[places.to(y.device)] if known else None


def given_rows(layer: nn.Module, y: Tensor, chosen: Tensor) -> Tensor:
    """Some rows of what a layer gives, a copy: shape (n, units)."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return Windows((1, 1), line=isinstance(layer, nn.Conv1d)).rows(y, chosen)
    return y.reshape(-1, y.shape[-1])[chosen.to(y.device)]

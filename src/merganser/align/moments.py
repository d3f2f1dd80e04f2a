"""Second moments of what two networks' layers take in on the same inputs, both together.

For the entries x of a layer's rows (a row is an example's features, or a window of a convolution) in networks A and B:

    G = sum_rows [x_A; x_B; 1] [x_A; x_B; 1]^T

What a layer gives is linear in x, so that G serves any least squares that has outputs of either network as targets, the
correlations of their units, and means and variances of their outputs. No output is stored, and data are passed once.

Both networks are in one order of units only if they were brought into it; nothing here assumes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.autocorrelation import Windows, add_by_shifts, pair_count, spread
from merganser.align.costs import Moments
from merganser.align.layout import Side
from merganser.align.match import Progress
from merganser.align.memory import give_back
from merganser.align.outputs import Outputs
from merganser.align.streams import Stream, grouped, run_watched, streams_of
from merganser.align.triangles import add_products, mirrored
from merganser.errors import NonFiniteError, ParameterError, ShapeError
from merganser.noise import drawn
from merganser.numerics import all_finite

#: Bytes of rows in float64 that are multiplied at once.
CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Joint:
    """Second moments of a layer's inputs in two networks.

    Attributes:
        gram: sum of products of [x_A; x_B; 1], float64, exactly symmetric, shape (2f + 1, 2f + 1). A row has f entries:
            channels by taps, channels outer, as in `weight.reshape(len(weight), -1)`.
        count: number of rows.
        kernel: taps along height and width; (1, 1) for a linear layer.
    """

    gram: Tensor
    count: int
    kernel: tuple[int, int] = (1, 1)

    @property
    def entries(self) -> int:
        """Entries of a row of one network."""
        return (len(self.gram) - 1) // 2

    @property
    def aa(self) -> Tensor:
        """Sum of x_A x_A^T, shape (f, f)."""
        return self.gram[: self.entries, : self.entries]

    @property
    def ab(self) -> Tensor:
        """Sum of x_A x_B^T, shape (f, f)."""
        return self.gram[: self.entries, self.entries : -1]

    @property
    def bb(self) -> Tensor:
        """Sum of x_B x_B^T, shape (f, f)."""
        return self.gram[self.entries : -1, self.entries : -1]

    @property
    def mean_a(self) -> Tensor:
        """Mean of x_A, shape (f,)."""
        return self.gram[: self.entries, -1] / self.count

    @property
    def mean_b(self) -> Tensor:
        """Mean of x_B, shape (f,)."""
        return self.gram[self.entries : -1, -1] / self.count

    def of_units(self) -> Moments:
        """Moments of channels: those at the tap in the middle, or at all taps where an even side has none."""
        taps = prod(self.kernel)
        odd = all(side % 2 for side in self.kernel)
        shown = [taps // 2] if odd else list(range(taps))
        places = [torch.arange(tap, self.entries, taps) for tap in shown]
        cross = torch.stack([self.ab[at][:, at] for at in places]).sum(0)
        sums = [self.count * sum((mean[at] for at in places[1:]), mean[places[0]]) for mean in self._means()]
        squares = [sum((x.diagonal()[at] for at in places[1:]), x.diagonal()[places[0]]) for x in (self.aa, self.bb)]
        return Moments(cross, (sums[0], sums[1]), (squares[0], squares[1]), self.count * len(shown))

    def unit_distances(self) -> Tensor:
        """Mean of (x_A - x_B)^2 for every channel of A (rows) and of B (columns)."""
        units = self.of_units()
        a, b = units.squares
        return ((a[:, None] + b[None] - 2 * units.cross) / units.count).clamp(min=0)

    def outputs(self, weight: Tensor, bias: Tensor | None, side: Side) -> tuple[Tensor, Tensor]:
        """Mean and variance of what a layer gives in one of the networks, each of shape (outputs,).

        Args:
            weight: of the layer, outputs first.
            bias: of the layer.
            side: whose inputs it takes in.

        Raises:
            ShapeError: If the weight takes in another number of entries.
            ParameterError: If the side is both.
        """
        w = weight.detach().reshape(len(weight), -1).to("cpu", torch.float64)
        if w.shape[1] != self.entries:
            raise ShapeError(f"the weight takes in {w.shape[1]} entries, and the moments are those of {self.entries}")
        if side == Side.BOTH:
            raise ParameterError("outputs are those of one network: FIRST or SECOND")
        block, mean = (self.aa, self.mean_a) if side == Side.FIRST else (self.bb, self.mean_b)
        variance = ((w @ (block / self.count - mean[:, None] * mean)) * w).sum(1).clamp(min=0)
        shift = 0.0 if bias is None else bias.detach().to("cpu", torch.float64)
        return w @ mean + shift, variance

    def _means(self) -> tuple[Tensor, Tensor]:
        return self.mean_a, self.mean_b


def joint_moments(
    one: nn.Module,
    two: nn.Module,
    batches: Sequence[Batch],
    *,
    layers: Sequence[str] | None = None,
    rows: int | None = None,
    memory_bytes: int = 1 << 30,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Joint]:
    """Second moments of what the layers of two networks take in, by the layer's name.

    Layers are nn.Linear, nn.Conv1d and nn.Conv2d (without groups) and transformers' Conv1D that are called as modules.
    Those that take in the same tensor in the same way share one `Joint`. Both networks run in evaluation mode and are
    left as they are.

    Args:
        one: network A.
        two: network B, of the same architecture.
        batches: inputs; every batch goes through both, more than once where memory asks for it.
        layers: names; by default all that run.
        rows: at most so many a layer, an equal share of every batch, drawn without replacement by the layer's name and
            the batch's number; by default all.
        memory_bytes: for sums, and inputs of one network that wait for the other's. Layers that do not fit together
            are measured in several passes over the batches. Work of about three times `CHUNK_BYTES`, a run's own
            activations and what was measured before come on top; `joint_groups` does not hold the last.
        seed: of the drawing.
        progress: called as (batches done, batches of all passes).

    Raises:
        ParameterError: If there is no batch, a layer is unknown or does not run, or one alone takes more memory.
        ShapeError: If the networks take in tensors of different shapes, or run a layer a different number of times.
        NonFiniteError: If a layer takes in NaN or infinity.
    """
    found: dict[str, Joint] = {}
    passes = joint_groups(
        one, two, batches, layers=layers, rows=rows, memory_bytes=memory_bytes, seed=seed, progress=progress
    )
    for group in passes:
        found.update(group)
    return {name: found[name] for name, _ in one.named_modules() if name in found}


def joint_groups(
    one: nn.Module,
    two: nn.Module,
    batches: Sequence[Batch],
    *,
    layers: Sequence[str] | None = None,
    rows: int | None = None,
    memory_bytes: int = 1 << 30,
    seed: int = 0,
    progress: Progress | None = None,
    noted: tuple[Outputs, Outputs] | None = None,
) -> Iterator[dict[str, Joint]]:
    """What `joint_moments` gives, a pass at a time in the order of the run, so that no more than one is in memory.

    The first pass also notes what layers of both networks give, where `noted` says which.

    Raises:
        ParameterError: As `joint_moments`; so are the others.
        ShapeError: See there.
        NonFiniteError: See there.
    """
    if not batches:
        raise ParameterError("there is no batch to measure inputs by")
    if rows is not None and rows < 1:
        raise ParameterError(f"rows is {rows}; it is how many a layer, at least 1")
    streams = streams_of(one, two, batches[0], layers, None if rows is None else -(-rows // len(batches)))
    groups = grouped(streams, memory_bytes)
    done, total = 0, len(groups) * len(batches)
    for group in groups:
        give_back()
        sums = {stream.names[0]: _Sums(stream) for stream in group}
        for number, batch in enumerate(batches):
            share = None if rows is None else rows * (number + 1) // len(batches) - rows * number // len(batches)
            _add_batch(one, two, batch, sums, _Draw(seed, number, share), noted if group is groups[0] else None)
            done += 1
            if progress is not None:
                progress(done, total)
        give_back()  # what the runs took, before these sums are worked on
        found: dict[str, Joint] = {}
        for stream in group:
            found |= dict.fromkeys(stream.asked, sums.pop(stream.names[0]).joint())
        yield found
        del found  # before the next pass


@dataclass(frozen=True)
class _Draw:
    """Which rows of a batch are measured, in both networks: `share` of a layer, or all where it is None."""

    seed: int
    batch: int
    share: int | None
    _known: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def rows(self, stream: Stream, call: int, count: int) -> Tensor | None:
        """Numbers of rows out of `count`, ascending; None stands for all."""
        if self.share is None:
            return None
        wanted = self.share * (call + 1) // stream.calls - self.share * call // stream.calls
        if wanted >= count:
            return None
        name = stream.names[0]
        if (name, call, count) not in self._known:
            self._known[name, call, count] = drawn(self.seed, f"batch {self.batch}, run {call}", name, count, wanted)
        return self._known[name, call, count]


class _Sums:
    """Sums over the rows of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.count = 0
        self.gram: Tensor | None = None  # its lower triangle
        self.pairs: Tensor | None = None  # what was not unfolded: second moments by pairs of taps,
        self.totals = torch.zeros(2 * stream.entries, dtype=torch.float64)  # and sums of entries

    def held(self, x: Tensor, call: int, draw: _Draw) -> Tensor:
        """A copy of what a layer takes in: rows, or padded images where all windows are measured."""
        stream = self.stream
        if stream.windows is None:
            rows = x.detach().reshape(-1, stream.entries)
            chosen = draw.rows(stream, call, len(rows))
            return rows.clone() if chosen is None else rows[chosen.to(x.device)]
        chosen = draw.rows(stream, call, prod(stream.windows.windows_of(x)))
        return stream.windows.padded(x) if chosen is None else stream.windows.rows(x, chosen)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add rows of both networks, in the form that they were held in."""
        if a.shape != b.shape:
            raise ShapeError(f"{self.stream.names[0]} takes in {tuple(a.shape)} in A, and {tuple(b.shape)} in B")
        self._check(a, b)
        windows, size = self.stream.windows, 2 * self.stream.entries + 1
        if windows is not None and a.ndim == 4 and self.stream.by_shifts:
            images, _, height, width = a.shape
            if windows.by_shifts(height, width, images):
                self._add_images(windows, a, b)
                return
        most = max(1, CHUNK_BYTES // (8 * size))
        for x, y in zip(_blocks(windows, a, most), _blocks(windows, b, most), strict=True):
            rows = torch.empty(len(x), size, dtype=torch.float64)
            rows[:, : self.stream.entries], rows[:, self.stream.entries : -1], rows[:, -1] = x, y, 1
            self.gram = torch.zeros(size, size, dtype=torch.float64) if self.gram is None else self.gram
            add_products(self.gram, rows)
            self.count += len(x)

    def _add_images(self, windows: Windows, a: Tensor, b: Tensor) -> None:
        images, channels, height, width = a.shape
        high, wide = windows.grid(height, width)
        if self.pairs is None:
            self.pairs = torch.zeros(pair_count(windows.kernel), 2 * channels, 2 * channels, dtype=torch.float64)
        totals = self.totals.view(2 * channels, *windows.kernel)
        most = max(1, CHUNK_BYTES // (16 * channels * height * width))
        for x, y in zip(torch.split(a, most), torch.split(b, most), strict=True):
            both = torch.cat([x, y], dim=1).transpose(0, 1).to("cpu", torch.float64).contiguous()
            add_by_shifts(self.pairs, both, windows.kernel)
            places = both.sum(1)
            for down in range(windows.kernel[0]):
                for right in range(windows.kernel[1]):
                    totals[:, down, right] += places[:, down : down + high, right : right + wide].sum((1, 2))
        self.count += images * high * wide

    def joint(self) -> Joint:
        """Moments of all that was added."""
        name, size = self.stream.names[0], 2 * self.stream.entries + 1
        if not self.count:
            raise ParameterError(f"the batches hold no row for {name}")
        gram = torch.zeros(size, size, dtype=torch.float64) if self.gram is None else mirrored(self.gram)
        if self.pairs is not None:
            assert self.stream.windows is not None
            spread(self.pairs, self.stream.windows.kernel, gram[:-1, :-1])
            gram[-1, :-1] += self.totals
            gram[:-1, -1] += self.totals
            gram[-1, -1] = self.count
        self._check(gram.diagonal())  # squares of large numbers
        return Joint(gram, self.count, (1, 1) if self.stream.windows is None else self.stream.windows.kernel)

    def _check(self, *tensors: Tensor) -> None:
        if not all(map(all_finite, tensors)):
            name = self.stream.names[0]
            raise NonFiniteError(f"the batches give {name} NaN or infinity", "see that they hold neither")


def _add_batch(
    one: nn.Module,
    two: nn.Module,
    batch: Batch,
    sums: Mapping[str, _Sums],
    draw: _Draw,
    noted: tuple[Outputs, Outputs] | None,
) -> None:
    """Run both networks and add what their layers take in."""
    waiting: dict[tuple[str, int], Tensor] = {}
    calls = {name: s.stream.calls for name, s in sums.items()}

    def first(name: str, x: Tensor, call: int) -> None:
        waiting[name, call] = sums[name].held(x, call, draw)

    def second(name: str, x: Tensor, call: int) -> None:
        sums[name].add(waiting.pop((name, call)), sums[name].held(x, call, draw))

    for side, (network, show) in enumerate(((one, first), (two, second))):
        with nullcontext() if noted is None else noted[side].noting(network, batch):
            run_watched(network, batch, show, calls, calls, whole=noted is not None)


def _blocks(windows: Windows | None, x: Tensor, most: int) -> Iterator[Tensor]:
    """Rows, no more than so many at once, or a line of windows if that is more."""
    if windows is None or x.ndim == 2:
        yield from torch.split(x, most)
        return
    view = windows.view(x)
    entries, wide = prod(view.shape[3:]), view.shape[2]
    if most >= prod(view.shape[1:3]):
        yield from (part.reshape(-1, entries) for part in torch.split(view, most // prod(view.shape[1:3])))
        return
    for image in view:
        yield from (part.reshape(-1, entries) for part in torch.split(image, max(1, most // wide)))

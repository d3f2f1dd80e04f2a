"""One pass: changes of arriving experts go by, tensor by tensor, and a new generation of the state is written.

Several experts may arrive in one pass: each tensor of the state is read once, takes in their changes in order, and is
written once. The bits are those of as many passes, since the state is rounded to its type on disk after each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.checkpoints.copying import renamed_by
from merganser.checkpoints.placed import PlacedWriter
from merganser.checkpoints.tied_head import with_head
from merganser.checkpoints.views import widened
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from merganser.continual.kinds import Kind, Slots
from merganser.continual.ledger import BaseRecord, Contributor, Ledger
from merganser.continual.measure import Read, Reading, change, equal, model_digest, norm, read_base, tensor_digest
from merganser.continual.pairing import pair, untied
from merganser.continual.roles import Role, is_matrix, quoted
from merganser.continual.state import CheckedSums, next_generation, open_sums
from merganser.continual.stream import Job, Progress, chunk_elements, chunks, peak_bytes, run_jobs
from merganser.errors import DtypeError, NonFiniteError, ParameterError, StateError, TensorError
from merganser.numerics import compute_dtype, narrowed, sum_of_squares
from merganser.types import ITEM_BYTES, Source, TensorInfo

NORMED: tuple[Role, ...] = ("matrix", "transposed", "vector")


@dataclass(frozen=True)
class Cost:
    """What a pass takes, known from headers alone.

    Attributes:
        peak_bytes: memory beside the interpreter and torch.
        read_bytes: from base, expert and sums.
        write_bytes: new sums.
    """

    peak_bytes: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True)
class Arrival:
    """One expert of a pass.

    Attributes:
        expert: under the base's names.
        found: base name -> the expert's stored tensor.
        factor: of the change: its weight, or the difference of two weights.
        statistic_factor: the same of the weights' sizes, for running statistics.
        t: its number among the arrivals.
        allow_nonfinite: count NaN and infinity as no change.
    """

    expert: Source
    found: Mapping[str, str]
    factor: float = 1.0
    statistic_factor: float = 1.0
    t: int = 1
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one tensor's job saw: the base, each expert, and sums of squares of the new merged change."""

    base: Read
    experts: tuple[Read, ...]
    merged_squares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a pass saw of one expert.

    Attributes:
        digest: of the expert.
        tensors: sha256 of each of its tensors.
        change_norm: Frobenius norm of its change, over matrices and vectors.
        distance: norm of the change over norm of the base, over matrices where there are any.
    """

    digest: str
    tensors: dict[str, str]
    change_norm: float
    distance: float


@dataclass(frozen=True)
class Result:
    """What a pass gives.

    Attributes:
        writer: the new generation, written and not committed.
        experts: what was seen of each, in order.
        merged_norm: Frobenius norm of a sequential method's new state, over matrices and vectors.
    """

    writer: CheckpointWriter
    experts: tuple[Seen, ...]
    merged_norm: float


@dataclass(frozen=True)
class Pass:
    """Everything that one pass needs to know.

    Attributes:
        state: folder of the state.
        ledger: of the state, as it is.
        record: what the state remembers of the base.
        kind: the method's continual side.
        base: the base.
        arrivals: the experts, in order.
        device: where the arithmetic runs.
    """

    state: Path
    ledger: Ledger
    record: BaseRecord
    kind: Kind
    base: Source
    arrivals: tuple[Arrival, ...]
    device: str = "cpu"

    def cost(self, threads: int) -> Cost:
        """What `run` will take."""
        written = sum(info.nbytes for info in self._slot_infos().values())
        read = sum(self.base.infos[n].nbytes for n in {n for a in self.arrivals for n in a.found})
        read += sum(a.expert.infos[stored].nbytes for a in self.arrivals for stored in a.found.values())
        return Cost(peak_bytes(self.jobs(), threads), read + (written if self.ledger.sums else 0), written)

    def run(self, threads: int, progress: Progress | None, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Result:
        """Do all the work up to, and without, the commit.

        Raises:
            TensorError: If a tensor cannot be merged.
            StateError: If the base has changed since init.
        """
        with self.begun(shard_bytes) as writer:
            return self.result(writer, run_jobs(self.jobs(writer), threads=threads, progress=progress))

    @contextmanager
    def begun(self, shard_bytes: int) -> Iterator[CheckpointWriter]:
        """The writer of the new generation, its files laid out; what fails in the context removes them again.

        Raises:
            TensorError: If what the base holds once differs in an expert that holds it twice.
        """
        for expert in (a.expert for a in self.arrivals):
            for alias, stored in untied(self.base, expert):
                if tensor_digest(expert, alias) != tensor_digest(expert, stored):
                    raise TensorError(f"{alias} and {stored} are one tensor in the base, and differ in {expert.ref}")
        writer = next_generation(self.state, self.ledger, self._slot_infos(), shard_bytes)
        try:
            yield writer
        except BaseException:
            writer.abort()
            raise

    def slots(self, name: str) -> tuple[str, ...]:
        """Names on disk of a tensor's slots; none for a tensor that is not merged."""
        return tuple(f"{s}/{name}" for s in self.kind.slot_shapes(self.record.roles[name], self.record.shapes[name]))

    def jobs(self, writer: CheckpointWriter | PlacedWriter | None = None) -> list[Job[Outcome]]:
        """The work, a job a tensor, independent of each other; without a writer they only tell their sizes."""
        sums = open_sums(self.state, self.ledger, self._slot_infos())
        item = ITEM_BYTES[self.ledger.sums_dtype]
        jobs = []
        for name, role in self.record.roles.items():
            info = self.base.infos[name]
            slot_bytes = item * sum(prod(s) for s in self.kind.slot_shapes(role, info.shape).values())
            float64 = self.ledger.float64 or info.dtype == "F64"
            if role in ("exact", "fixed"):
                needs = 2 * info.nbytes
            elif self.kind.chunked(role, info.shape):
                needs = chunk_elements(info.shape) * (72 if float64 else 48)
            else:
                needs = self.kind.fold_bytes(role, info.shape, float64=float64)
            run = partial(self._fold_tensor, name, role, sums, writer)
            jobs.append(Job(name, run, needs, 2 * info.nbytes * len(self.arrivals) + 2 * slot_bytes))
        return jobs

    def result(self, writer: CheckpointWriter, outcomes: Mapping[str, Outcome]) -> Result:
        """What the pass gives, of what the jobs of all tensors saw.

        Raises:
            NonFiniteError: If the norm of a change, or of the state, is beyond float64.
        """
        seen = tuple(self._seen(i, outcomes) for i in range(len(self.arrivals)))
        merged = {n: list(outcomes[n].merged_squares) for n, role in self.record.roles.items() if role in NORMED}
        return Result(writer, seen, _finite_norm(merged, f"the state {self.state} with {self.arrivals[-1].expert.ref}"))

    def _seen(self, i: int, outcomes: Mapping[str, Outcome]) -> Seen:
        expert, found = self.arrivals[i].expert, self.arrivals[i].found
        tensors = {name: outcomes[name].experts[i].digest for name in found}
        roles = {name: self.record.roles[name] for name in found}
        normed = [name for name, role in roles.items() if role in NORMED]
        # Norm weights near 1 would hide that two networks have nothing in common: only matrices tell.
        telling = [name for name, role in roles.items() if is_matrix(role)] or normed
        squares = {name: list(outcomes[name].experts[i].squares) for name in normed}
        change_norm = _finite_norm(squares, f"the change of {expert.ref}")
        telling_norm = norm([x for name in telling for x in squares[name]])
        base_norm = norm([x for name in telling for x in outcomes[name].base.squares])
        return Seen(
            expert.identity or model_digest({n: expert.infos[s] for n, s in found.items()}, tensors),
            tensors,
            change_norm,
            distance=telling_norm / base_norm if base_norm > 0 else 0.0,
        )

    def _slot_infos(self) -> dict[str, TensorInfo]:
        return self.kind.expected_slots(self.record, self.ledger.sums_dtype)

    def _fold_tensor(
        self, name: str, role: Role, sums: CheckedSums | None, writer: CheckpointWriter | PlacedWriter | None
    ) -> Outcome:
        assert writer is not None
        base, readings = Reading(), tuple(Reading() for _ in self.arrivals)
        if role in ("exact", "fixed"):
            for arrival, reading in zip(self.arrivals, readings, strict=True):
                self._compare_exact(arrival, name, reading)
            return Outcome(base.ended(), tuple(r.ended() for r in readings))
        shape, squares = self.base.infos[name].shape, []
        slots = self.kind.slot_shapes(role, shape)
        whole = not self.kind.chunked(role, shape)
        known, float64 = any(name in a.found for a in self.arrivals), self.ledger.float64
        for start, stop in [(0, 1)] if whole else chunks(shape):
            rows = None if whole or not shape else (start, stop)
            state = {s: sums.read(f"{s}/{name}", rows).to(self.device) for s in slots} if sums is not None else {}
            old = read_base(self.base, name, rows, base, float64=float64, device=self.device) if known else None
            for arrival, reading in zip(self.arrivals, readings, strict=True):
                d = self._change(arrival, name, rows, old, reading)
                state = self._updated(name, role, state, self.kind.seen(role, shape, d), arrival)
                del d
            del old
            if "d" in state:
                squares.append(sum_of_squares(state["d"]))
            for slot in slots:
                writer.put(f"{slot}/{name}", state.pop(slot), start)
        if known and base.hash.hexdigest() != self.record.tensors[name]:
            raise StateError(
                f"{name} of the base {self.base.ref} has changed since init", "put the original base back, or init anew"
            )
        return Outcome(base.ended(), tuple(r.ended() for r in readings), tuple(squares))

    def _updated(self, name: str, role: Role, state: Slots, d: Tensor, arrival: Arrival) -> Slots:
        """The slots after one change, in their type on disk."""
        factor = arrival.statistic_factor if role == "statistic" else arrival.factor
        try:
            new = self.kind.update(role, self.base.infos[name].shape, state, d, weight=factor, t=arrival.t)
        except ParameterError as error:
            raise ParameterError(f"{name}: {error.message}", error.hint) from error
        return {slot: narrowed(x, self.ledger.sums_dtype, f"{slot}/{name}") for slot, x in new.items()}

    def _change(
        self, arrival: Arrival, name: str, rows: tuple[int, int] | None, old: Tensor | None, reading: Reading
    ) -> Tensor:
        if old is None or name not in arrival.found:
            return self._no_change(name, rows)
        return change(
            arrival.expert,
            arrival.found[name],
            rows,
            old,
            reading,
            name=name,
            allow_nonfinite=arrival.allow_nonfinite,
        )

    def _no_change(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        info = self.base.infos[name]
        dtype = compute_dtype(torch.float64 if info.dtype == "F64" else torch.float32, float64=self.ledger.float64)
        shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _compare_exact(self, arrival: Arrival, name: str, reading: Reading) -> None:
        stored = arrival.found.get(name)
        if stored is not None and not equal(self.base, arrival.expert, name, stored, reading):
            raise DtypeError(
                f"{name} is {self.base.infos[name].dtype} and differs between {self.base.ref} and {arrival.expert.ref}",
                f"integers cannot be merged; leave it out with --ignore {quoted(name)}",
            )


def _finite_norm(squares: Mapping[str, list[float]], what: str) -> float:
    """Norm of several tensors as one.

    Raises:
        NonFiniteError: If it is beyond float64; names the largest.
    """
    found = norm([x for one in squares.values() for x in one])
    if not isfinite(found):
        largest = max(squares, key=lambda name: norm(squares[name]))
        raise NonFiniteError(
            f"the norm of {what} is beyond float64, {largest} being the largest part of it",
            f"values of 1e154 and more have no square: leave the tensor out with --ignore {quoted(largest)}",
        )
    return found


def open_expert(entry: Contributor, base: Source) -> Source:
    """Open an expert as the ledger describes it; an adapter is applied to the base.

    Where the base holds a head of its own and the expert's config ties its head to its embedding, that is the head.

    Raises:
        ParameterError: If a renaming is not OLD=NEW, or fits no name.
    """
    return with_head(renamed_by(open_source(entry.ref, base=widened(base)), entry.rename), base.infos)


def arrive(
    record: BaseRecord,
    base: Source,
    entry: Contributor,
    *,
    weights: tuple[float, float],
    t: int,
    allow_nonfinite: bool = False,
) -> Arrival:
    """Open the expert of an entry and match its tensors with the base's; its weight goes from weights[0] to [1].

    Raises:
        MerganserError: If it cannot be opened, or does not fit.
    """
    expert = open_expert(entry, base)
    found = pair(base, expert, record.roles, entry.ignore)
    before, after = weights
    return Arrival(expert, found, after - before, abs(after) - abs(before), t, allow_nonfinite)

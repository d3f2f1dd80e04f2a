"""One pass: an expert's change goes by, tensor by tensor, and a new generation of the state is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.checkpoints.copying import renamed_by
from merganser.checkpoints.views import widened
from merganser.checkpoints.writer import CheckpointWriter
from merganser.continual.kinds import Kind
from merganser.continual.ledger import BaseRecord, Contributor, Ledger
from merganser.continual.measure import Reading, changes, equal, model_digest, norm, tensor_digest
from merganser.continual.pairing import pair, untied
from merganser.continual.roles import Role, is_matrix
from merganser.continual.state import CheckedSums, next_generation, open_sums
from merganser.continual.stream import Job, Progress, checked_device, chunk_elements, chunks, peak_bytes, run_jobs
from merganser.errors import DtypeError, ParameterError, StateError, TensorError
from merganser.numerics import compute_dtype, sum_of_squares
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
class Outcome:
    """What one tensor's job saw: the reading, and sums of squares of the new merged change."""

    reading: Reading
    merged_squares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a pass gives.

    Attributes:
        writer: the new generation, written and not committed.
        digest: of the expert.
        tensors: sha256 of each of the expert's tensors.
        change_norm: Frobenius norm of the expert's change, over matrices and vectors.
        distance: norm of the change over norm of the base, over matrices where there are any.
        merged_norm: the same of a sequential method's new state.
    """

    writer: CheckpointWriter
    digest: str
    tensors: dict[str, str]
    change_norm: float
    distance: float
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
        expert: the expert, under the base's names.
        found: base name -> the expert's stored tensor.
        factor: of the change: its weight, or the difference of two weights.
        statistic_factor: the same of the weights' sizes, for running statistics.
        t: number of this arrival.
        allow_nonfinite: count NaN and infinity as no change.
        device: where the arithmetic runs.
    """

    state: Path
    ledger: Ledger
    record: BaseRecord
    kind: Kind
    base: Source
    expert: Source
    found: Mapping[str, str]
    factor: float
    statistic_factor: float
    t: int
    allow_nonfinite: bool = False
    device: str = "cpu"

    def cost(self, threads: int) -> Cost:
        """What `run` will take."""
        written = sum(info.nbytes for info in self._slot_infos().values())
        read = sum(self.base.infos[n].nbytes + self.expert.infos[stored].nbytes for n, stored in self.found.items())
        jobs = self._jobs(open_sums(self.state, self.ledger, self._slot_infos()), None)
        return Cost(peak_bytes(jobs, threads), read + (written if self.ledger.sums else 0), written)

    def run(self, threads: int, progress: Progress | None) -> Result:
        """Do all the work up to, and without, the commit.

        Raises:
            TensorError: If a tensor cannot be merged.
            StateError: If the base has changed since init.
        """
        for alias, stored in untied(self.base, self.expert):
            if tensor_digest(self.expert, alias) != tensor_digest(self.expert, stored):
                raise TensorError(f"{alias} and {stored} are one tensor in the base, and differ in {self.expert.ref}")
        writer = next_generation(self.state, self.ledger, self._slot_infos())
        try:
            jobs = self._jobs(open_sums(self.state, self.ledger, self._slot_infos()), writer)
            outcomes = run_jobs(jobs, threads=threads, progress=progress)
        except BaseException:
            writer.abort()
            raise
        tensors = {name: outcomes[name].reading.expert_hash.hexdigest() for name in self.found}
        digest = self.expert.identity or model_digest({n: self.expert.infos[s] for n, s in self.found.items()}, tensors)
        normed = [outcomes[name] for name, role in self.record.roles.items() if role in NORMED]
        # Norm weights near 1 would hide that two networks have nothing in common: only matrices tell.
        telling = [outcomes[name] for name, role in self.record.roles.items() if is_matrix(role)] or normed
        return Result(
            writer,
            digest,
            tensors,
            change_norm=norm([x for o in normed for x in o.reading.change_squares]),
            distance=_ratio(
                norm([x for o in telling for x in o.reading.change_squares]),
                norm([x for o in telling for x in o.reading.base_squares]),
            ),
            merged_norm=norm([x for o in normed for x in o.merged_squares]),
        )

    def _slot_infos(self) -> dict[str, TensorInfo]:
        return self.kind.expected_slots(self.record, self.ledger.sums_dtype)

    def _jobs(self, sums: CheckedSums | None, writer: CheckpointWriter | None) -> list[Job[Outcome]]:
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
            jobs.append(Job(name, run, needs, 2 * info.nbytes + 2 * slot_bytes))
        return jobs

    def _fold_tensor(self, name: str, role: Role, sums: CheckedSums | None, writer: CheckpointWriter | None) -> Outcome:
        assert writer is not None
        reading = Reading()
        if role in ("exact", "fixed"):
            self._compare_exact(name, reading)
            return Outcome(reading)
        shape, squares = self.base.infos[name].shape, []
        slots = self.kind.slot_shapes(role, shape)
        whole = not self.kind.chunked(role, shape)
        for start, d in self._changes(name, reading, whole):
            rows = None if whole or not shape else (start, start + d.shape[0])
            old = {s: sums.read(f"{s}/{name}", rows).to(self.device) for s in slots} if sums is not None else {}
            d = self.kind.seen(role, shape, d)
            factor = self.statistic_factor if role == "statistic" else self.factor
            try:
                new = self.kind.update(role, shape, old, d, weight=factor, t=self.t)
            except ParameterError as error:
                raise ParameterError(f"{name}: {error.message}", error.hint) from error
            del old, d
            if "d" in new:
                squares.append(sum_of_squares(new["d"]))
            for slot in slots:
                writer.put(f"{slot}/{name}", new.pop(slot), start)
        if name in self.found and reading.base_hash.hexdigest() != self.record.tensors[name]:
            raise StateError(
                f"{name} of the base {self.base.ref} has changed since init", "put the original base back, or init anew"
            )
        return Outcome(reading, tuple(squares))

    def _changes(self, name: str, reading: Reading, whole: bool) -> Iterator[tuple[int, Tensor]]:
        info = self.base.infos[name]
        if name in self.found:
            return changes(
                self.base,
                self.expert,
                name,
                self.found[name],
                reading,
                whole=whole,
                float64=self.ledger.float64,
                device=self.device,
                allow_nonfinite=self.allow_nonfinite,
            )
        dtype = compute_dtype(torch.float64 if info.dtype == "F64" else torch.float32, float64=self.ledger.float64)
        spans = [(0, info.rows)] if whole else chunks(info.shape)
        return (
            (start, torch.zeros((stop - start, *info.shape[1:]) if info.shape else (), dtype=dtype, device=self.device))
            for start, stop in spans
        )

    def _compare_exact(self, name: str, reading: Reading) -> None:
        stored = self.found.get(name)
        if stored is not None and not equal(self.base, self.expert, name, stored, reading):
            raise DtypeError(
                f"{name} is {self.base.infos[name].dtype} and differs between {self.base.ref} and {self.expert.ref}",
                f"integers cannot be merged; leave it out with --ignore '{name}'",
            )


def _ratio(change: float, base: float) -> float:
    return change / base if base > 0 else 0.0


def open_expert(entry: Contributor, base: Source) -> Source:
    """Open an expert as the ledger describes it; an adapter is applied to the base.

    Raises:
        ParameterError: If a renaming is not OLD=NEW, or fits no name.
    """
    return renamed_by(open_source(entry.ref, base=widened(base)), entry.rename)


def prepare(
    state: Path,
    ledger: Ledger,
    record: BaseRecord,
    kind: Kind,
    base: Source,
    entry: Contributor,
    *,
    weights: tuple[float, float],
    t: int,
    allow_nonfinite: bool = False,
    device: str = "cpu",
) -> Pass:
    """Open the expert of an entry and match its tensors with the base's; its weight goes from weights[0] to [1].

    Raises:
        MerganserError: If it cannot be opened, or does not fit.
    """
    expert = open_expert(entry, base)
    found = pair(base, expert, record.roles, entry.ignore)
    where = checked_device(device)
    before, after = weights
    sizes = abs(after) - abs(before)
    return Pass(state, ledger, record, kind, base, expert, found, after - before, sizes, t, allow_nonfinite, where)

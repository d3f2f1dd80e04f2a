"""Export: base plus the merged change, written as an ordinary checkpoint folder; one streaming pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import fsum
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints.overlap import refuse_overlap
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, peak_memory
from merganser.continual.kinds import Kind, check_settings, finaliser, kind_of
from merganser.continual.ledger import BaseRecord, Ledger, open_base, read_base_record
from merganser.continual.passing import NORMED
from merganser.continual.roles import Role
from merganser.continual.state import CheckedSums, locked, open_sums
from merganser.continual.stream import Job, Progress, checked_device, chunk_elements, chunks, run_jobs, usable_threads
from merganser.errors import NonFiniteError, ParameterError, StateError
from merganser.methods import Method, Step
from merganser.numerics import all_finite, compute_dtype, raw_bytes
from merganser.types import FLOAT_DTYPES, Source, TensorInfo
from merganser.version import __version__


@dataclass(frozen=True)
class _Export:
    """Everything that one export needs to know."""

    ledger: Ledger
    record: BaseRecord
    kind: Kind
    method: Method
    given: Mapping[str, Any]
    base: Source
    sums: CheckedSums | None
    writer: CheckpointWriter
    device: str

    def total(self, role: Role) -> float:
        """Sum of the weights; of their sizes for statistics, of which no negative multiple makes sense."""
        return fsum(abs(c.weight) if role == "statistic" else c.weight for c in self.ledger.contributors)

    @property
    def least(self) -> float:
        """The smallest of the weights."""
        return min((abs(c.weight) for c in self.ledger.contributors), default=0.0)

    @property
    def scale(self) -> float:
        if not isinstance(self.method, Step) or self.method.scale is None:
            return 1.0
        # A mean over the experts that take part: of weight 0, one is as if it had not come.
        return self.method.scale([c.norm for c in self.ledger.contributors if c.weight != 0], self.ledger.merged_norm)

    def tensor(self, name: str, role: Role) -> None:
        """Write one tensor of the merged model."""
        info = self.base.infos[name]
        slots = self.kind.slot_shapes(role, info.shape)
        whole = bool(slots) and not self.kind.chunked(role, info.shape)
        scale = self.scale if role in NORMED else 1.0
        hashed = hashlib.sha256()
        for start, stop in [(0, info.rows)] if whole else chunks(info.shape):
            rows = None if whole or not info.shape else (start, stop)
            old = self.base.read(name, rows)
            hashed.update(raw_bytes(old))
            if self.sums is None or not slots:
                self.writer.put(name, old, start)
                continue
            dtype = compute_dtype(old.dtype, float64=self.ledger.float64 or self.writer.infos[name].dtype == "F64")
            state = {s: self.sums.read(f"{s}/{name}", rows).to(self.device) for s in slots}
            change = self.kind.finalise(self.method, role, info.shape, state, self.given, self.total(role), self.least)
            change = change.to(dtype) * scale if scale != 1 else change.to(dtype)
            new = old.to(self.device, dtype) + self.kind.restored(role, info.shape, change)
            if not all_finite(new):
                raise NonFiniteError(f"the merged {name} is not finite", "the weights or the scale are too large")
            self.writer.put(name, new, start)
        if hashed.hexdigest() != self.record.tensors[name]:
            raise StateError(f"{name} of the base {self.base.ref} has changed since init", "put the original base back")

    def peak_bytes(self, name: str, role: Role) -> int:
        """Memory that one tensor's job needs at most."""
        info = self.base.infos[name]
        if self.kind.treats_as_matrix(role, info.shape):
            return self.kind.export_bytes(role, info.shape)
        return chunk_elements(info.shape) * 60


def export(
    state: Path,
    out: Path,
    method: str | None = None,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    base: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Path:
    """Write base plus merged change as a checkpoint folder, with the base's config and tokenizer and a receipt.

    Args:
        state: folder of the fold.
        out: folder to make.
        method: a finaliser that the state's sums allow; by default the state's own method.
        dtype: "F32", "BF16", "F16" or "F64" for every floating tensor; by default as in the base.
        shard_bytes: size in bytes at which the next file is begun.
        overwrite: replace a folder that is there.
        base: where the base is, if it has moved.
        device: where the arithmetic runs.
        threads: tensors at a time.
        progress: called as (bytes done, bytes in all).
        settings: of the method, over those given at init.

    Returns:
        `out`.

    Raises:
        StateError: If the sums do not allow the method, or the base is gone or changed.
        ParameterError: If a setting or the dtype is unknown or out of range.
        NonFiniteError: If a merged value does not fit the dtype.
        OutputError: If `out` may not be written.
    """
    began = time.perf_counter()
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ParameterError(f"dtype is {dtype}; it is one of {', '.join(FLOAT_DTYPES)}")
    with locked(state, write=False) as ledger:
        name = method or ledger.method
        given = {**(ledger.settings if name == ledger.method else {}), **settings}
        check_settings(name, given)
        kind = kind_of(ledger.method, ledger.settings, ledger.slots)
        rule = finaliser(kind, name)
        if isinstance(rule, Step) and settings:
            raise ParameterError(
                f"{name} took its settings at init; they cannot change on export: {', '.join(settings)}"
            )
        record = read_base_record(state)
        source = open_base(state, ledger, record, base)
        sums = open_sums(state, ledger, kind.expected_slots(record, ledger.sums_dtype))
        refuse_overlap(out, [str(state), source.ref, *(c.ref for c in ledger.contributors)])
        infos = {n: TensorInfo(i.shape, _out_dtype(i, dtype)) for n, i in source.infos.items()}
        with CheckpointWriter(
            out, infos, aliases=source.aliases, shard_bytes=shard_bytes, overwrite=overwrite
        ) as writer:
            work = _Export(ledger, record, kind, rule, given, source, sums, writer, checked_device(device))
            jobs = [
                Job(n, partial(work.tensor, n, role), work.peak_bytes(n, role), source.infos[n].nbytes)
                for n, role in record.roles.items()
            ]
            run_jobs(jobs, threads=usable_threads(threads), progress=progress)
            receipt = {
                "merganser": __version__,
                "torch": torch.__version__,
                "method": name,
                "settings": given,
                "base": {"ref": source.ref, "digest": ledger.base_digest, "tensors": record.tensors},
                "experts": [c.model_dump(mode="json") for c in ledger.contributors],
                "seed": None,
                "wall_s": round(time.perf_counter() - began, 3),
                "peak_bytes": peak_memory(),
                "outputs": writer.digests(),
            }
            writer.commit(receipt, source.companions())
    return out


def _out_dtype(info: TensorInfo, dtype: str | None) -> str:
    return dtype if dtype is not None and info.dtype in FLOAT_DTYPES else info.dtype

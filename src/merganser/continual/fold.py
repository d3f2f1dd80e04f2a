"""Fold: one merged model of a base and the experts that have arrived, in a state of constant size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merganser.checkpoints import open_source
from merganser.checkpoints.overlap import refuse_overlap
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, FolderTransaction
from merganser.continual.changing import How, arrivals, set_weight, take_in
from merganser.continual.combine import combine
from merganser.continual.entries import check_weight, default_sums, ledger_kind, new_entries
from merganser.continual.export import export
from merganser.continual.kinds import Kind, kind_of
from merganser.continual.ledger import (
    BASE_NAME,
    LEDGER_NAME,
    BaseRecord,
    Contributor,
    Ledger,
    absolute_ref,
    open_base,
    read_base_record,
    read_ledger,
    write_record,
)
from merganser.continual.measure import base_digest, model_digest
from merganser.continual.passing import Arrival, Cost, Pass
from merganser.continual.roles import assign_roles
from merganser.continual.state import bytes_on_disk, locked
from merganser.continual.stream import Job, Progress, run_jobs, usable_threads
from merganser.continual.verify import Finding, verify
from merganser.errors import ParameterError
from merganser.version import __version__


class Fold:
    """A continual merge on disk.

    Args:
        state: folder of the state.

    Raises:
        StateError: If the folder is no state.

    >>> Fold("no/such/state")
    Traceback (most recent call last):
    merganser.errors.StateError: no/such/state does not exist
    hint: merganser fold init BASE no/such/state
    """

    def __init__(self, state: str | Path) -> None:
        self.path = Path(state)
        self.ledger: Ledger = read_ledger(self.path)
        self.record: BaseRecord = read_base_record(self.path)

    @property
    def kind(self) -> Kind:
        """The continual side of this fold's method."""
        return ledger_kind(self.ledger)

    @property
    def state_bytes(self) -> int:
        """Size of the state on disk."""
        return bytes_on_disk(self.path)

    @classmethod
    def init(
        cls,
        base: str | Path,
        state: str | Path,
        method: str = "gram",
        *,
        freeze: Sequence[str] = (),
        matrix: Sequence[str] = (),
        vector: Sequence[str] = (),
        float64: bool = False,
        sums_dtype: Literal["F32", "F64"] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Fold:
        """Begin a fold over a base.

        Args:
            base: reference of the model that all experts were tuned from.
            state: folder to make.
            method: name in the table of methods.
            freeze: patterns of tensor names that stay the base's.
            matrix: patterns of names to merge as linear weights against the default.
            vector: patterns of names to merge as vectors against the default.
            float64: do all arithmetic in float64.
            sums_dtype: type of the state on disk; by default F64 for sums over experts, so that what was added can
                be removed without a trace, and F32 for other methods.
            threads: tensors at a time; by default one a core.
            progress: called as (bytes done, bytes in all).
            settings: of the method, such as alpha=0.5.

        Raises:
            ParameterError: If the method or a setting is unknown or out of range.
            RefError: If the base is not there.
            OutputError: If the state folder exists, or lies within the base.
        """
        kind = kind_of(method, settings)
        if sums_dtype not in (None, "F32", "F64"):
            raise ParameterError(f"sums_dtype is {sums_dtype!r}; it is F32 or F64")
        ref = absolute_ref(str(base))
        source = open_source(ref)
        roles = assign_roles(source, freeze=freeze, matrix=matrix, vector=vector)
        if freeze and all(role == "fixed" for role in roles.values()):
            raise ParameterError(f"nothing of {source.ref} is left to merge: --freeze takes all of it")
        refuse_overlap(Path(state), [ref])
        transaction = FolderTransaction(Path(state))
        try:
            jobs = [
                Job(name, partial(base_digest, source, name, roles[name]), 2 * info.nbytes, info.nbytes)
                for name, info in source.infos.items()
            ]
            digests = run_jobs(jobs, threads=usable_threads(threads), progress=progress)
            ledger = Ledger(
                version=__version__,
                method=method,
                settings=settings,
                slots=kind.slots,
                float64=float64,
                sums_dtype=sums_dtype or default_sums(kind, source, float64),
                base_ref=ref,
                base_digest=model_digest(source.infos, digests),
            )
            shapes = {name: info.shape for name, info in source.infos.items()}
            write_record(transaction.folder, BASE_NAME, BaseRecord(tensors=digests, roles=roles, shapes=shapes))
            write_record(transaction.folder, LEDGER_NAME, ledger)
            transaction.commit()
        except BaseException:
            transaction.abort()
            raise
        return cls(state)

    def add(
        self,
        expert: str | Path,
        *,
        weight: float = 1.0,
        name: str | None = None,
        ignore: Sequence[str] = (),
        rename: Sequence[str] = (),
        allow_nonfinite: bool = False,
        allow_distant: bool = False,
        base: str | Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: Progress | None = None,
    ) -> Contributor:
        """Take in one expert: one pass, memory of a few tensors.

        Args:
            expert: reference of a model tuned from the base, or of a LoRA adapter on it.
            weight: factor of its change, at most 1e6 in size; positive for `gram`.
            name: what the ledger calls it; by default the last part of the reference.
            ignore: patterns of tensor names to leave out.
            rename: prefixes to replace, each as "OLD=NEW".
            allow_nonfinite: count NaN and infinity in it as unchanged.
            allow_distant: accept a change that is larger than the base.
            base: where the base is, if it has moved.
            device: where the arithmetic runs, such as "cuda".
            threads: tensors at a time.
            shard_bytes: size in bytes at which the next file of the state is begun.
            progress: called as (bytes done, bytes in all).

        Returns:
            The ledger's new entry.

        Raises:
            StateError: If it is in already, or seems to be tuned from another base; the state is as it was.
            TensorError: If its tensors do not fit the base's.
        """
        entries = self.add_all(
            [expert],
            weight=weight,
            name=name,
            ignore=ignore,
            rename=rename,
            allow_nonfinite=allow_nonfinite,
            allow_distant=allow_distant,
            base=base,
            device=device,
            threads=threads,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        return entries[0]

    def add_all(
        self,
        experts: Sequence[str | Path],
        *,
        weight: float = 1.0,
        name: str | None = None,
        ignore: Sequence[str] = (),
        rename: Sequence[str] = (),
        allow_nonfinite: bool = False,
        allow_distant: bool = False,
        base: str | Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: Progress | None = None,
    ) -> tuple[Contributor, ...]:
        """Take in experts in order, in one pass: the bits of as many `add`, with the state read and written once.

        All of them come in, or none does. Memory does not depend on how many there are.

        Args:
            experts: references, at least one.
            weight: as for `add`, of each of them, and so the others.
            name: for one expert only.
            ignore: patterns of tensor names to leave out.
            rename: prefixes to replace.
            allow_nonfinite: count NaN and infinity as unchanged.
            allow_distant: accept a change that is larger than the base.
            base: where the base is, if it has moved.
            device: where the arithmetic runs.
            threads: tensors at a time.
            shard_bytes: size in bytes at which the next file of the state is begun.
            progress: called as (bytes done, bytes in all).

        Returns:
            The ledger's new entries.

        Raises:
            StateError: As for `add`, for any of them; the state is as it was.
            TensorError: If the tensors of one do not fit the base's.
        """
        check_weight(self.ledger, weight)
        entries = new_entries(experts, weight, name, ignore, rename, allow_nonfinite)
        how = How(base, device, threads, progress, shard_bytes)
        self.ledger, admitted = take_in(self.path, entries, how, allow_distant=allow_distant)
        return admitted

    def remove(
        self,
        expert: str | Path,
        *,
        base: str | Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: Progress | None = None,
    ) -> Contributor:
        """Take an expert out again, as if it had never come; its file is read once more.

        Args:
            expert: its name in the ledger, or where it is now if it has moved.
            base: as for `add`, and so the others.
            device: where the arithmetic runs.
            threads: tensors at a time.
            shard_bytes: size in bytes at which the next file of the state is begun.
            progress: called as (bytes done, bytes in all).

        Returns:
            The entry that was removed.

        Raises:
            StateError: If it is not in, its file has changed, or the method cannot remove; the state is as it was.
        """
        self.ledger, entry = set_weight(self.path, expert, None, How(base, device, threads, progress, shard_bytes))
        return entry

    def reweight(
        self,
        expert: str | Path,
        weight: float,
        *,
        base: str | Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: Progress | None = None,
    ) -> Contributor:
        """Give an expert another weight, as if it had come with it; its file is read once more.

        Args:
            expert: its name in the ledger, or where it is now if it has moved.
            weight: the new factor.
            base: as for `add`, and so the others.
            device: where the arithmetic runs.
            threads: tensors at a time.
            shard_bytes: size in bytes at which the next file of the state is begun.
            progress: called as (bytes done, bytes in all).

        Returns:
            The ledger's new entry.

        Raises:
            StateError: As for `remove`.
        """
        self.ledger, entry = set_weight(self.path, expert, weight, How(base, device, threads, progress, shard_bytes))
        return entry

    def cost(
        self,
        *experts: str | Path,
        weight: float = 1.0,
        name: str | None = None,
        ignore: Sequence[str] = (),
        rename: Sequence[str] = (),
        base: str | Path | None = None,
        threads: int | None = None,
    ) -> Cost:
        """What adding experts in one pass takes, from headers alone; nothing is written.

        Args:
            experts: as for `add_all`, and so the others.
            weight: of each of them.
            name: what the ledger would call it.
            ignore: patterns of tensor names to leave out.
            rename: prefixes to replace.
            base: where the base is, if it has moved.
            threads: tensors at a time.

        Raises:
            StateError: If an expert of that name is in already.
            ParameterError: If the method cannot take the weight.
            TensorError: If its tensors do not fit the base's.
        """
        check_weight(self.ledger, weight)
        with locked(self.path, write=False) as ledger:
            entries = new_entries(experts, weight, name, ignore, rename)
            step = arrivals(self.path, ledger, read_base_record(self.path), entries, base=base)
            return step.cost(usable_threads(threads))

    def cost_of_next(self, *, threads: int | None = None, base: str | Path | None = None) -> Cost:
        """What adding an expert of the base's own types takes; nothing but headers is read."""
        source = open_base(self.path, self.ledger, self.record, base)
        found = {name: name for name, role in self.record.roles.items() if role != "fixed"}
        step = Pass(self.path, self.ledger, self.record, self.kind, source, (Arrival(source, found),))
        return step.cost(usable_threads(threads))

    def export(self, out: str | Path, method: str | None = None, **options: Any) -> Path:
        """Write the merged model as an ordinary checkpoint folder; see `merganser.continual.export.export`."""
        return export(self.path, Path(out), method, **options)

    def verify(self, *, base: str | Path | None = None, threads: int | None = None) -> list[Finding]:
        """Hash again everything that the state rests on; see `merganser.continual.verify.verify`."""
        return verify(self.path, base=base, threads=threads)

    @classmethod
    def combine(cls, states: Sequence[str | Path], out: str | Path, *, threads: int | None = None) -> Fold:
        """Add up states over one base into a new one; see `merganser.continual.combine.combine`."""
        combine([Path(s) for s in states], Path(out), threads=threads)
        return cls(out)

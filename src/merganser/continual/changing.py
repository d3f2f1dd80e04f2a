"""Change a state: experts come in, get another weight, or go out; each change is one pass and one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES
from merganser.continual.entries import check_weight, find_entry, ledger_kind, refuse_known
from merganser.continual.ledger import BaseRecord, Contributor, Ledger, absolute_ref, open_base, read_base_record
from merganser.continual.passing import Pass, Result, arrive
from merganser.continual.state import advance, locked
from merganser.continual.stream import Progress, checked_device, usable_threads
from merganser.errors import ParameterError, StateError
from merganser.version import __version__


@dataclass(frozen=True)
class How:
    """How a pass is run.

    Attributes:
        base: where the base is, if it has moved.
        device: where the arithmetic runs.
        threads: tensors at a time; None for one a core.
        progress: called as (bytes done, bytes in all).
        shard_bytes: size in bytes at which the next file of the state is begun.
        run: does the work of a pass, up to its commit; None for this process.
    """

    base: str | Path | None = None
    device: str = "cpu"
    threads: int | None = None
    progress: Progress | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    run: Callable[[Pass], Result] | None = None

    def done(self, step: Pass) -> Result:
        """A pass, done but for its commit."""
        if self.run is not None:
            return self.run(step)
        return step.run(usable_threads(self.threads), self.progress, self.shard_bytes)


def arrivals(
    state: Path,
    ledger: Ledger,
    record: BaseRecord,
    entries: Sequence[Contributor],
    *,
    base: str | Path | None = None,
    device: str = "cpu",
) -> Pass:
    """A pass over new experts, opened and matched with the base.

    Raises:
        StateError: If the name of one is taken.
        ParameterError: If there is no expert.
        MerganserError: If one cannot be opened, or does not fit.
    """
    if not entries:
        raise ParameterError("no expert is given")
    refuse_known(state, ledger.contributors, entries)
    source = open_base(state, ledger, record, base)
    before = len(ledger.contributors)
    opened = tuple(
        arrive(record, source, entry, weights=(0.0, entry.weight), t=t, allow_nonfinite=entry.nonfinite)
        for t, entry in enumerate(entries, before + 1)
    )
    return Pass(state, ledger, record, ledger_kind(ledger), source, opened, checked_device(device))


def take_in(
    state: Path, entries: Sequence[Contributor], how: How, *, allow_distant: bool = False
) -> tuple[Ledger, tuple[Contributor, ...]]:
    """Add new experts in order: all of them, or none.

    Returns:
        The new ledger, and the experts' entries in it.

    Raises:
        StateError: If one is in already, or seems to be tuned from another base; the state is as it was.
        TensorError: If its tensors do not fit the base's.
    """
    with locked(state, write=True) as ledger:
        step = arrivals(state, ledger, read_base_record(state), entries, base=how.base, device=how.device)
        result = how.done(step)
        with result.writer:
            admitted: list[Contributor] = []
            for entry, seen in zip(entries, result.experts, strict=True):
                if twin := next((c for c in ledger.contributors if c.digest == seen.digest), None):
                    raise StateError(f"{entry.ref} is in {state} already, as {twin.name}", "nothing was changed")
                if twin := next((c for c in admitted if c.digest == seen.digest), None):
                    raise StateError(f"{twin.ref} and {entry.ref} are the same expert", "nothing was changed")
                if not seen.distance <= 1 and not allow_distant:
                    raise StateError(
                        f"the change of {entry.ref} is {seen.distance:.3g} times as large as the base, "
                        "so it was hardly tuned from it",
                        "check the base, or pass --allow-distant",
                    )
                norm = abs(entry.weight) * seen.change_norm
                admitted.append(entry.model_copy(update={"digest": seen.digest, "norm": norm}))
            contributors = (*ledger.contributors, *admitted)
            return _commit(state, ledger, result, contributors, admitted[-1]), tuple(admitted)


def weighable(state: Path, ledger: Ledger, expert: str | Path, weight: float | None) -> Contributor:
    """The entry of an expert that may get another weight, or None.

    Raises:
        StateError: If it is not in, or the method cannot remove.
        ParameterError: If the weight is out of range.
    """
    if not ledger_kind(ledger).removable:
        raise StateError(
            f"{ledger.method} cannot take an expert out of its state: every later step was built on it",
            "fold the others anew, or use a method of sums: merganser methods",
        )
    found = find_entry(ledger, expert, state)
    if weight is not None:
        check_weight(ledger, weight)
    return found


def weighing(
    state: Path,
    ledger: Ledger,
    record: BaseRecord,
    expert: str | Path,
    weight: float | None,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
) -> tuple[Pass, Contributor, Contributor]:
    """A pass that gives an expert another weight, or none, with its entry as it is and with where it is now.

    Raises:
        StateError: As `weighable`.
        MerganserError: If the weight is out of range, or the expert or the base cannot be opened.
    """
    old = weighable(state, ledger, expert, weight)
    entry = old if str(expert) == old.name else old.model_copy(update={"ref": absolute_ref(str(expert))})
    source = open_base(state, ledger, record, base)
    weights, t = (old.weight, weight or 0.0), len(ledger.contributors)
    arrival = arrive(record, source, entry, weights=weights, t=t, allow_nonfinite=old.nonfinite)
    step = Pass(state, ledger, record, ledger_kind(ledger), source, (arrival,), checked_device(device))
    return step, old, entry


def set_weight(state: Path, expert: str | Path, weight: float | None, how: How) -> tuple[Ledger, Contributor]:
    """Give an expert of a state another weight, or take it out.

    Args:
        state: folder of the fold.
        expert: its name in the ledger, or where it is now if it has moved.
        weight: the new factor; None removes the expert.
        how: the pass is run.

    Returns:
        The new ledger, and the expert's new entry, or its old one if it is out.

    Raises:
        StateError: If it is not in, its file has changed, or the method cannot remove; the state is as it was.
    """
    with locked(state, write=True) as ledger:
        known = weighable(state, ledger, expert, weight)
        others = tuple(c for c in ledger.contributors if c.name != known.name)
        if weight is None and not others:
            return _commit(state, ledger, None, (), known), known
        record = read_base_record(state)
        step, old, entry = weighing(state, ledger, record, expert, weight, base=how.base, device=how.device)
        result = how.done(step)
        with result.writer:
            (seen,) = result.experts
            if seen.digest != old.digest:
                raise StateError(f"{entry.ref} has changed since it was added as {old.name}", "nothing was changed")
            if weight is None:
                return _commit(state, ledger, result, others, old), old
            entry = entry.model_copy(update={"weight": weight, "norm": abs(weight) * seen.change_norm})
            after = tuple(entry if c.name == old.name else c for c in ledger.contributors)
            return _commit(state, ledger, result, after, entry), entry


def _commit(
    state: Path, ledger: Ledger, result: Result | None, contributors: tuple[Contributor, ...], entry: Contributor
) -> Ledger:
    """Make the new generation and its ledger the state; without a result, the state is empty again."""
    generation = ledger.generation + 1
    sums, merged_norm = (result.writer.target.name, result.merged_norm) if result is not None else (None, 0.0)
    changed = {"version": __version__, "generation": generation, "sums": sums, "merged_norm": merged_norm}
    after = Ledger.model_validate(dict(ledger) | changed | {"contributors": contributors})
    if result is not None:
        result.writer.commit(
            {
                "merganser": __version__,
                "generation": generation,
                "expert": {"name": entry.name, "ref": entry.ref, "tensors": result.experts[-1].tensors},
                "outputs": result.writer.digests(),
            }
        )
    advance(state, ledger, after)
    return after

"""Verify: hash again everything that a state rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from merganser.continual.kinds import kind_of
from merganser.continual.ledger import BaseRecord, Contributor, Ledger, open_base, read_base_record
from merganser.continual.measure import model_digest, tensor_digest
from merganser.continual.pairing import pair
from merganser.continual.passing import open_expert
from merganser.continual.roles import Role
from merganser.continual.state import locked, open_sums
from merganser.continual.stream import Job, run_jobs, usable_threads
from merganser.errors import MerganserError, RefError, StateError
from merganser.types import Source


@dataclass(frozen=True)
class Finding:
    """What verifying found of one part.

    Attributes:
        part: "base", "sums" or an expert's name.
        status: "ok"; "changed" if its bytes differ; "missing" if it is not there.
        detail: which tensor, or why.
        needed: whether the state is unsound without it; an expert is needed only to be removed.
    """

    part: str
    status: Literal["ok", "changed", "missing"]
    detail: str
    needed: bool


def verify(state: Path, *, base: str | Path | None = None, threads: int | None = None) -> list[Finding]:
    """Compare base, sums and experts with the digests that the state keeps.

    Args:
        state: folder of the fold.
        base: where the base is, if it has moved.
        threads: tensors at a time.

    Returns:
        One finding a part: base, sums, then each expert.

    Raises:
        StateError: If the ledger itself is damaged.
    """
    threads = usable_threads(threads)
    with locked(state, write=False) as ledger:
        record = read_base_record(state)
        findings = []
        source: Source | None = None
        try:
            source = open_base(state, ledger, record, base)
            findings.append(_compare("base", source, record.tensors, threads))
        except StateError as error:
            findings.append(Finding("base", "missing", error.message, needed=True))
        except MerganserError as error:
            findings.append(Finding("base", "changed", error.message, needed=True))
        findings += _sums(state, ledger, record, threads)
        for entry in ledger.contributors:
            found = Finding(entry.name, "missing", "cannot be checked without the base", needed=False)
            findings.append(found if source is None else _expert(entry, source, record.roles, threads))
    return findings


def _sums(state: Path, ledger: Ledger, record: BaseRecord, threads: int) -> list[Finding]:
    try:
        kind = kind_of(ledger.method, ledger.settings, ledger.slots)
        sums = open_sums(state, ledger, kind.expected_slots(record, ledger.sums_dtype))
    except MerganserError as error:
        return [Finding("sums", "changed", error.message, needed=True)]
    return [] if sums is None else [_compare("sums", sums.source, sums.digests, threads)]


def _compare(part: str, source: Source, expected: Mapping[str, str], threads: int) -> Finding:
    digests = _digests(source, list(source.infos), threads)
    changed = [name for name in source.infos if digests[name] != expected[name]]
    detail = f"{changed[0]} and {len(changed) - 1} more" if len(changed) > 1 else "".join(changed)
    return Finding(part, "changed" if changed else "ok", detail or f"{len(digests)} tensors", needed=True)


def _digests(source: Source, names: list[str], threads: int) -> dict[str, str]:
    jobs = [
        Job(n, partial(tensor_digest, source, n), 2 * source.infos[n].nbytes, source.infos[n].nbytes) for n in names
    ]
    return run_jobs(jobs, threads=threads)


def _expert(entry: Contributor, base: Source, roles: Mapping[str, Role], threads: int) -> Finding:
    try:
        expert = open_expert(entry, base)
        found = pair(base, expert, roles, entry.ignore)
    except RefError as error:
        return Finding(entry.name, "missing", error.message, needed=False)
    except MerganserError as error:
        return Finding(entry.name, "changed", error.message, needed=False)
    digest = expert.identity
    if digest is None:
        digests = _digests(expert, sorted(set(found.values())), threads)
        digest = model_digest({n: expert.infos[s] for n, s in found.items()}, {n: digests[s] for n, s in found.items()})
    return Finding(entry.name, "ok" if digest == entry.digest else "changed", entry.ref, needed=False)

"""Who is in a fold and who may come in: entries of the ledger, by name, reference and weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from merganser.continual.kinds import Kind, kind_of
from merganser.continual.ledger import Contributor, Ledger, absolute_ref, short_name
from merganser.errors import ParameterError, StateError
from merganser.methods import Sums
from merganser.types import Source

#: Larger factors would drown every other expert, and in time overflow.
LARGEST_WEIGHT = 1e6


def default_sums(kind: Kind, base: Source, float64: bool) -> Literal["F32", "F64"]:
    """F64 for sums over experts, which must come out as they went in, and where float64 is in play; F32 otherwise."""
    exact = float64 or isinstance(kind.method, Sums) or any(info.dtype == "F64" for info in base.infos.values())
    return "F64" if exact else "F32"


def new_entries(
    experts: Sequence[str | Path],
    weight: float,
    name: str | None,
    ignore: Sequence[str],
    rename: Sequence[str],
    nonfinite: bool = False,
) -> list[Contributor]:
    """Entries of experts that have not been read yet.

    Raises:
        ParameterError: If there is one name for several, or a name is empty or cannot be printed.
    """
    if name is not None and len(experts) != 1:
        raise ParameterError(f"--name {name} is for one expert, and {len(experts)} are given", "add them one by one")
    refs = [absolute_ref(str(expert)) for expert in experts]
    names = [short_name(ref) if name is None else name for ref in refs]
    for one in names:
        if not one.strip() or not one.isprintable():
            raise ParameterError(
                f"the name {one!r} is {'not printable' if one.strip() else 'empty'}", "give another one with --name"
            )
    return [
        Contributor(
            name=one,
            ref=ref,
            digest="",
            weight=weight,
            norm=0.0,
            ignore=tuple(ignore),
            rename=tuple(rename),
            nonfinite=nonfinite,
        )
        for one, ref in zip(names, refs, strict=True)
    ]


def ledger_kind(ledger: Ledger) -> Kind:
    """The continual side of a ledger's method."""
    return kind_of(ledger.method, ledger.settings, ledger.slots)


def refuse_known(state: Path, known: Sequence[Contributor], entries: Sequence[Contributor]) -> None:
    """Refuse new experts whose names are taken, by one that is in or by another new one.

    Raises:
        StateError: If a name is.
    """
    for i, entry in enumerate(entries):
        if any(c.name == entry.name for c in known):
            raise StateError(f"{entry.name} is in {state} already", "remove it first, or give another --name")
        for twin in (c for c in entries[:i] if c.name == entry.name):
            if twin.ref == entry.ref:
                raise StateError(f"{entry.ref} is given twice", "give it once")
            raise StateError(
                f"{twin.ref} and {entry.ref} would both be called {entry.name}",
                "add them one by one, one with a --name",
            )


def check_weight(ledger: Ledger, weight: float) -> None:
    """Refuse a weight that a ledger's method cannot take.

    Raises:
        ParameterError: Says what it takes.
    """
    method = ledger_kind(ledger).method
    positive = isinstance(method, Sums) and method.positive
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not abs(weight) <= LARGEST_WEIGHT or (positive and weight <= 0):
        wanted = f"a {'positive ' if positive else ''}number of at most {LARGEST_WEIGHT:g} in size"
        raise ParameterError(f"weight is {weight}; {ledger.method} needs {wanted}")


def find_entry(ledger: Ledger, expert: str | Path, state: Path) -> Contributor:
    """The entry of an expert given by name, by its old reference or by a new place of the same last part.

    Raises:
        StateError: If it is not in the ledger.
    """
    ref = absolute_ref(str(expert))
    for fits in (lambda c: c.name == str(expert), lambda c: c.ref == ref, lambda c: c.name == short_name(ref)):
        if found := next(filter(fits, ledger.contributors), None):
            return found
    names = ", ".join(c.name for c in ledger.contributors) or "no expert"
    raise StateError(f"{expert} was never added to {state}", f"in it: {names}")

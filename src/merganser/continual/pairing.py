"""Match an expert's tensors with the base's, before anything is read; whatever does not fit is an error by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from merganser.continual.roles import Role, matches, quoted
from merganser.errors import DtypeError, ExtraTensorError, MissingTensorError, ParameterError, ShapeError, and_more
from merganser.types import FLOAT_DTYPES, Source


def pair(base: Source, expert: Source, roles: Mapping[str, Role], ignore: Sequence[str] = ()) -> dict[str, str]:
    """Base name -> name of the expert's stored tensor, for every tensor that enters the fold.

    Args:
        base: the model that all experts were tuned from.
        expert: the arriving model.
        roles: role of every base tensor.
        ignore: patterns of names to leave out: extra ones are skipped, the base's own count as unchanged.

    Raises:
        MissingTensorError: If the expert lacks a tensor.
        ExtraTensorError: If the expert has a tensor that the base lacks.
        ShapeError: If shapes differ.
        DtypeError: If a tensor that floats in the base does not in the expert, or the reverse.
        ParameterError: If a pattern matches nothing.
    """
    names = [*base.infos, *expert.infos, *expert.aliases]
    for pattern in ignore:
        if not any(matches(name, (pattern,)) for name in names):
            raise ParameterError(f"no tensor of {expert.ref} or its base is called {pattern!r}")
    wanted = [name for name, role in roles.items() if role != "fixed" and not matches(name, ignore)]
    found = {name: stored for name in wanted if (stored := _stored_as(base, expert, name)) is not None}
    if missing := [name for name in wanted if name not in found]:
        raise MissingTensorError(
            f"{missing[0]}{and_more(missing)} is in the base and not in {expert.ref}",
            _rename_hint(missing, expert) or f"if it is unchanged, leave it out with --ignore {quoted(missing[0])}",
        )
    if not found:
        raise ParameterError(f"nothing of {expert.ref} is left to merge: --ignore takes all of it")
    _refuse_extra(base, expert, set(found.values()), ignore)
    for name, stored in found.items():
        ours, theirs = base.infos[name], expert.infos[stored]
        if ours.shape != theirs.shape:
            raise ShapeError(
                f"{name} has 2 shapes: {ours.shape} in {base.ref}; {theirs.shape} in {expert.ref}",
                f"leave it out with --ignore {quoted(name)}",
            )
        if (ours.dtype in FLOAT_DTYPES) != (theirs.dtype in FLOAT_DTYPES):
            raise DtypeError(
                f"{name} is {ours.dtype} in {base.ref} and {theirs.dtype} in {expert.ref}",
                "a quantised model must be dequantised first",
            )
    return found


def _stored(source: Source, name: str) -> str | None:
    return name if name in source.infos else source.aliases.get(name)


def _stored_as(base: Source, expert: Source, name: str) -> str | None:
    """The expert's tensor for one of the base's, under any of the names that the base ties to it."""
    tied = (alias for alias, held in base.aliases.items() if held == name)
    return next((stored for n in (name, *tied) if (stored := _stored(expert, n)) is not None), None)


def _refuse_extra(base: Source, expert: Source, used: set[str], ignore: Sequence[str]) -> None:
    known = {*base.infos, *base.aliases}
    extra = [n for n in expert.infos if n not in used and n not in known and not matches(n, ignore)]
    if extra:
        raise ExtraTensorError(
            f"{extra[0]}{and_more(extra)} is in {expert.ref} and not in the base",
            f"leave it out with --ignore {quoted(extra[0])}, or rename a prefix with --rename OLD=NEW",
        )


def untied(base: Source, expert: Source) -> list[tuple[str, str]]:
    """Names that the base ties and the expert stores apart, as (alias, name): they must be equal."""
    return [
        (alias, stored)
        for alias, name in base.aliases.items()
        if alias in expert.infos and (stored := _stored_as(base, expert, name)) is not None and stored != alias
    ]


def _rename_hint(missing: Sequence[str], expert: Source) -> str | None:
    """The one prefix change that would make every missing name be there, if there is one."""
    have: Iterable[str] = [*expert.infos, *expert.aliases]
    for name in have:
        if name.endswith(f".{missing[0]}"):
            old, new = name[: -len(missing[0])], ""
        elif missing[0].endswith(f".{name}"):
            old, new = "", missing[0][: -len(name)]
        else:
            continue
        if {old + m.removeprefix(new) for m in missing} <= set(have):
            return f"the names fit with --rename '{old}={new}'"
    return None

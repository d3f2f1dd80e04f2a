"""Axes of a spec as short text, a letter a group in the order that they are met in."""

from __future__ import annotations

from collections.abc import Iterable

from merganser.symmetry import Spec
from merganser.symmetry.spec import Part, groups_in


def letters(spec: Spec, tensors: Iterable[str]) -> dict[str, str]:
    """A letter for every group of some tensors."""
    met = dict.fromkeys(group for name in tensors for part in spec.axes[name] for group in groups_in(part))
    return dict(zip(met, "abcdefghijklmnopqrstuvwxyz", strict=False))


def words(spec: Spec, tensors: Iterable[str]) -> dict[str, str]:
    """Tensor -> its axes, such as `a*b + a*b + a*c | d`."""
    known = letters(spec, tensors)
    return {name: " | ".join(_word(part, known) for part in spec.axes[name]) for name in tensors}


def sizes(spec: Spec, tensors: Iterable[str]) -> str:
    """Groups of some tensors, such as `a 4, b 8 in a, c 3 fixed`."""
    known = letters(spec, tensors)
    groups = ((letter, spec.groups[name]) for name, letter in known.items())
    return ", ".join(
        f"{letter} {g.size}" + (f" in {known[g.within]}" if g.within else "") + (" fixed" if g.fixed else "")
        for letter, g in groups
    )


def _word(part: Part, known: dict[str, str], inside: bool = False) -> str:
    if not isinstance(part, dict):
        return known[part] if isinstance(part, str) else str(part)
    ((kind, parts),) = part.items()
    if kind == "product":
        return "*".join(_word(p, known, inside=True) for p in parts)
    text = " + ".join(_word(p, known) for p in parts)
    return f"({text})" if inside else text

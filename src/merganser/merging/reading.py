"""A small strict walker over YAML: it goes through a whole file, and one error lists everything that is wrong in it.

Every value knows its place ("models[1].parameters.density") and its line. How nodes come out of a file: `documents`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from merganser.errors import ParameterError
from merganser.merging.values import Choice, Gradient, Scalar, Value

#: What a setting that is wrong is worth.
NOTHING = Choice(())


@dataclass
class Problems:
    """What is wrong in a file, and what is odd.

    Attributes:
        errors: (line, text).
        warnings: (line, text).
    """

    errors: list[tuple[int, str]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, path: Path) -> None:
        """Raise one error of all of them.

        Raises:
            ParameterError: If there is any.
        """
        listed = _in_order(self.errors)
        if len(listed) == 1:
            raise ParameterError(f"{path}: {listed[0]}")
        if listed:
            raise ParameterError("\n  ".join([f"{path} has {len(listed)} problems", *listed]))

    def listed_warnings(self) -> tuple[str, ...]:
        """Every warning once, from the top of the file to its end."""
        return tuple(_in_order(self.warnings))

    def found(self, texts: Iterable[str], lines: Mapping[str, int]) -> None:
        """Add errors that say "place: what", with the line of the place, or of the nearest place around it.

        Where a line already has an error of the same place, that is enough.
        """
        known = {(line, text.partition(": ")[0]) for line, text in self.errors}
        for text in texts:
            place = text.partition(": ")[0]
            if (lines.get(place), place) in known:
                continue
            while place and place not in lines:
                place = place[: max(place.rfind("."), place.rfind("["), 0)]
            self.errors.append((lines.get(place, 1), text))


@dataclass(frozen=True)
class Node:
    """One value of a file.

    Attributes:
        value: a scalar, the entries of a list, or those of a mapping.
        place: where it stands in its document; "" for the document.
        line: where it stands in the file, from 1.
        text: a scalar as it was written; of a document, all of it.
        problems: where errors are collected.
        lines: of a document, the line of every place in it.
    """

    value: Scalar | tuple[Node, ...] | dict[str, Node] | None
    place: str
    line: int
    text: str
    problems: Problems = field(repr=False)
    lines: Mapping[str, int] = field(default_factory=dict, repr=False)

    def error(self, message: str) -> None:
        """Note that something is wrong here."""
        self.problems.errors.append((self.line, f"{self.place}: {message}" if self.place else message))

    def warn(self, message: str) -> None:
        """Note that something is odd here."""
        self.problems.warnings.append((self.line, f"{self.place}: {message}" if self.place else message))

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, tuple):
            return "a list"
        return kind_of(self.value)

    def mapping(self, what: str = "a mapping") -> dict[str, Node]:
        """Its entries by key; an error and none where it is no mapping."""
        if isinstance(self.value, dict):
            return self.value
        self.error(f"must be {what}, and is {self._shown}")
        return {}

    def fields(self, known: Collection[str], what: str = "a mapping", *, lenient: bool = False) -> dict[str, Node]:
        """Those of its entries that are not empty, by key; each unknown key is an error, or a warning if `lenient`."""
        entries = self.mapping(what)
        for key, node in entries.items():
            if key not in known:
                node.unknown(key, known, lenient=lenient)
        return {key: node for key, node in entries.items() if key in known and node.value is not None}

    def unknown(self, key: str, known: Iterable[str], *, lenient: bool = False) -> None:
        """Note that the key of this value is not known; name the nearest that is."""
        note = self.warn if lenient else self.error
        note(unknown(key, known) + (" (it has no effect)" if lenient else ""))

    def items(self, what: str = "a list") -> tuple[Node, ...]:
        """Entries of a list; an error and none where it is no list or an empty one."""
        if not isinstance(self.value, tuple):
            self.error(f"must be {what}, and is {self._shown}")
            return ()
        if not self.value:
            self.error(f"must be {what}, and is empty")
        return self.value

    def string(self, what: str = "text") -> str:
        """Text; an error and "" where it is anything else or empty."""
        if isinstance(self.value, str) and self.value.strip():
            return self.value
        if isinstance(self.value, bool | int | float):
            self.error(f"must be {what}, and is {self._shown}; put it in quotes if it is meant")
        else:
            self.error(f"must be {what}, and is {self._shown}")
        return ""

    def integer(self, least: int) -> int:
        """A whole number; an error and `least` where it is anything else or less."""
        if isinstance(self.value, int) and not isinstance(self.value, bool) and self.value >= least:
            return self.value
        self.error(f"must be a whole number from {least} on, and is {self._shown}")
        return least

    def flag(self) -> bool:
        """A truth value; an error and False where it is anything else."""
        if not isinstance(self.value, bool):
            self.error(f"must be true or false, and is {self._shown}")
        return self.value is True

    def one_of(self, known: Sequence[str]) -> str:
        """One of several words; an error and the first of them where it is another."""
        text = self.string(f"one of {', '.join(known)}")
        if text and text not in known:
            self.error(f"{short(text)} is {unknown(text, known)}")
        return text if text in known else known[0]

    def setting(self) -> Value:
        """A value as `merganser.merging.values` says it; an error and a choice without cases where it is none."""
        value: Value | None
        if isinstance(self.value, dict):
            case = self._case()
            value = None if case is None else Choice((case,))
        elif isinstance(self.value, tuple):
            value = self._choice() if any(isinstance(e.value, dict) for e in self.value) else self._gradient()
        else:
            value = self._scalar()
        return NOTHING if value is None else value

    def layers(self) -> tuple[int, int] | None:
        """A range [first, end); an error and None where it is none."""
        ends = self.value if isinstance(self.value, tuple) else ()
        first, end = (e.value for e in ends) if len(ends) == 2 else (None, None)
        if not (_is_whole(first) and _is_whole(end)):
            self.error("must be two whole numbers [first, end)")
            return None
        assert isinstance(first, int)
        assert isinstance(end, int)
        if not 0 <= first <= end:
            self.error(f"[{first}, {end}) is no range of layers: 0 <= first <= end")
            return None
        return first, end

    @property
    def _shown(self) -> str:
        if self.value is None:
            return "empty"
        return self.kind if isinstance(self.value, dict | tuple) else f"{self.kind} {short(self.value)}"

    def _scalar(self) -> Scalar | None:
        if self.value is None:
            self.error("is empty")
        return self.value if isinstance(self.value, bool | int | float | str) else None

    def _gradient(self) -> Gradient | None:
        entries = self.items("a value, or a list of values from the first layer to the last")
        if nested := [e for e in entries if isinstance(e.value, tuple)]:
            nested[0].error("is a list in a list; a gradient is a list of single values")
            return None
        values = tuple(v for e in entries if (v := e._scalar()) is not None)
        kinds = list(dict.fromkeys(kind_of(v) for v in values))
        if len(kinds) > 1:
            self.error(f"is a gradient of {' and '.join(kinds)}; its values must be of one kind")
        return Gradient(values) if len(kinds) == 1 and len(values) == len(entries) else None

    def _choice(self) -> Choice | None:
        cases: list[tuple[str, Scalar | Gradient]] = []
        entries = self.items()
        for entry in entries:
            if any(fragment == "*" for fragment, _ in cases):
                entry.warn("is never used: an entry above it fits every tensor")
            if (case := entry._case()) is not None:
                cases.append(case)
        return Choice(tuple(cases)) if len(cases) == len(entries) else None

    def _case(self) -> tuple[str, Scalar | Gradient] | None:
        if not isinstance(self.value, dict):
            other = self.setting()
            return None if isinstance(other, Choice) else ("*", other)
        entries = self.fields(("filter", "value"))
        fragment = entries["filter"].string("a part of the names of tensors") if "filter" in entries else "*"
        if "value" not in self.value:
            self.error("a filter needs a value")
            return None
        inner = self.value["value"]
        if isinstance(inner.value, dict) or (
            isinstance(inner.value, tuple) and any(isinstance(e.value, dict) for e in inner.value)
        ):
            inner.error("is a filter in a filter; a value is a number, or a list of numbers")
            return None
        value = inner.setting()
        return None if isinstance(value, Choice) or not fragment else (fragment, value)


def unknown(word: str, known: Iterable[str]) -> str:
    """What to say of an unknown word.

    >>> unknown("denisty", ["density", "weight"])
    'unknown; did you mean density?'
    """
    known = list(known)
    near = get_close_matches(word, known, n=1) or get_close_matches(word.lower(), known, n=1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; known: {', '.join(known) or 'none'}"


def kind_of(value: object) -> str:
    """What a scalar is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a truth value"
    return "a number" if isinstance(value, int | float) else "text"


def short(value: object) -> str:
    """A value as an error shows it: harmless on a terminal, and not long."""
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else _repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _in_order(notes: Sequence[tuple[int, str]]) -> list[str]:
    return list(dict.fromkeys(f"line {line}: {text}" for line, text in sorted(notes, key=lambda note: note[0])))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"

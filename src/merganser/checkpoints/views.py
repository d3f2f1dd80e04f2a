"""Sources that show another source differently, without reading it: renamed, cast, restricted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import TORCH_DTYPES
from merganser.types import FLOAT_DTYPES, Source, TensorInfo


class View:
    """A source under other names and types; base of what the functions of this module return."""

    def __init__(
        self,
        source: Source,
        origin: Mapping[str, str],
        dtype: str | None = None,
        *,
        only: Sequence[str] = FLOAT_DTYPES,
        anonymous: bool = False,
    ) -> None:
        self._source, self._dtype, self._only, self._anonymous = source, dtype, only, anonymous
        self._origin = {name: origin[name] for name in sorted(origin)}
        self.ref = source.ref
        self.infos: Mapping[str, TensorInfo] = {
            name: self._seen(source.infos[old]) for name, old in self._origin.items() if old in source.infos
        }
        shown = {old: name for name, old in self._origin.items()}
        self.aliases: Mapping[str, str] = {
            name: shown[source.aliases[old]] for name, old in self._origin.items() if old in source.aliases
        }

    @property
    def identity(self) -> str | None:
        """The source's identity, unless this view hides it."""
        return None if self._anonymous else self._source.identity

    def _seen(self, info: TensorInfo) -> TensorInfo:
        return TensorInfo(info.shape, self._dtype) if self._dtype and info.dtype in self._only else info

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor or rows of it, as this view shows it."""
        return self._source.read(self._origin[name], rows).to(TORCH_DTYPES[self.infos[name].dtype])

    def companions(self) -> Sequence[Path]:
        """The files beside the source."""
        return self._source.companions()


def _all_names(source: Source) -> list[str]:
    return sorted([*source.infos, *source.aliases])


def renamed(source: Source, rename: Callable[[str], str]) -> View:
    """Show every tensor under `rename(name)`.

    Raises:
        ParameterError: If two tensors get one name.
    """
    origin: dict[str, str] = {}
    for name in _all_names(source):
        new = rename(name)
        if new in origin:
            raise ParameterError(f"{source.ref}: {origin[new]} and {name} would both be called {new}")
        origin[new] = name
    return View(source, origin)


def prefix_replaced(source: Source, old: str, new: str) -> View:
    """Show names that start with `old` as starting with `new`; others as they are.

    Raises:
        ParameterError: If no name starts with `old`, or two tensors get one name.
    """
    if not any(name.startswith(old) for name in _all_names(source)):
        raise ParameterError(f"{source.ref}: no tensor's name starts with {old!r}")
    return renamed(source, lambda name: new + name[len(old) :] if name.startswith(old) else name)


def anonymous(source: Source) -> View:
    """Show a source without its identity, so that only the bytes read stand for it."""
    return View(source, {name: name for name in _all_names(source)}, anonymous=True)


def widened(source: Source) -> View:
    """Show half-precision tensors as F32, for arithmetic on them; others as they are."""
    return View(source, {name: name for name in _all_names(source)}, "F32", only=("F16", "BF16"))


def cast(source: Source, dtype: str) -> View:
    """Show every floating tensor as `dtype`, a name such as "BF16"; others as they are.

    Raises:
        ParameterError: If dtype is not F64, F32, F16 or BF16.
    """
    if dtype not in FLOAT_DTYPES:
        raise ParameterError(f"dtype is {dtype}; it is one of {', '.join(FLOAT_DTYPES)}")
    return View(source, {name: name for name in _all_names(source)}, dtype)

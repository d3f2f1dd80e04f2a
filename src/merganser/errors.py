"""The exception tree: every error says what, where and what to do.

MerganserError
├── ParameterError      a setting is unknown, of the wrong type or out of range
├── RefError            a reference names nothing that can be opened
├── CheckpointError     a file or folder is there, and is not a sound checkpoint
├── TensorError         tensors of two models do not fit together
│   ├── MissingTensorError
│   ├── ExtraTensorError
│   ├── ShapeError
│   ├── DtypeError
│   └── NonFiniteError
├── AdapterError        an adapter that cannot be applied faithfully
├── OutputError         the place to write to is taken, full or unwritable
├── ClusterError        machines that should share the work cannot, or stopped; nothing is there
└── StateError          a fold that the state cannot take; the state is as it was
"""

from __future__ import annotations

from collections.abc import Sequence


class MerganserError(Exception):
    """Base of all errors that bad input can cause; the command line exits with 2 on it.

    Args:
        message: what is wrong, and where.
        hint: what to do about it; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint


class ParameterError(MerganserError):
    """A setting is unknown, of the wrong type or out of range."""


class RefError(MerganserError):
    """A reference names nothing that can be opened."""


class CheckpointError(MerganserError):
    """A file or folder is there, and is not a sound checkpoint."""


class TensorError(MerganserError):
    """Tensors of two models do not fit together."""


class MissingTensorError(TensorError):
    """A model lacks a tensor that the base has."""


class ExtraTensorError(TensorError):
    """A model has a tensor that the base lacks."""


class ShapeError(TensorError):
    """One tensor name, two shapes."""


class DtypeError(TensorError):
    """A tensor of a kind that cannot be merged, or integers that differ."""


class NonFiniteError(TensorError):
    """A tensor holds NaN or infinity."""


class AdapterError(MerganserError):
    """An adapter that cannot be applied faithfully."""


class OutputError(MerganserError):
    """The place to write to is taken, full or unwritable."""


class ClusterError(MerganserError):
    """Machines that should share the work cannot, or stopped; nothing is there."""


class StateError(MerganserError):
    """A fold that the state cannot take; the state on disk is as it was."""


def and_more(names: Sequence[str]) -> str:
    """How many names there are beside the first, in brackets, for a message that names the first.

    >>> and_more(["a", "b", "c"])
    ' (and 2 more)'
    """
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

"""Merganser merges fine-tuned neural networks without retraining, as they arrive.

>>> import merganser
>>> sorted(merganser.__all__)[:3]
['Fold', 'MerganserError', '__version__']
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from merganser.errors import MerganserError
from merganser.version import __version__

if TYPE_CHECKING:
    from merganser.checkpoints import open_source
    from merganser.continual import Fold
    from merganser.merging.run import merge

# Read once, when torch takes its first large tensor and when numpy is loaded: large tensors come in huge pages, which
# take fewer page faults, and OpenBLAS's threads wait asleep, so that torch's have the processors.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

__all__ = ["Fold", "MerganserError", "__version__", "merge", "open_source"]

_HOMES = {
    "Fold": "merganser.continual",
    "merge": "merganser.merging.run",
    "open_source": "merganser.checkpoints",
}


def __getattr__(name: str) -> Any:
    """Bring in torch only when something that needs it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'merganser' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

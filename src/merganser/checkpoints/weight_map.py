"""The index of a sharded checkpoint: which tensor is in which file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from merganser.errors import CheckpointError


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of files that lie in the index's own folder.

    Raises:
        CheckpointError: If the index is not sound, or a file is missing or outside the folder.
    """
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a shard index: it has no sound weight_map") from error
    for file in sorted(set(pairs.values())):
        if Path(file).name != file or file in (".", ".."):
            raise CheckpointError(f"{index} names {file!r}, which is not a file of its own folder")
        if not os.path.isfile(index.parent / file):  # False for a name that no file can have
            raise CheckpointError(f"{index} names {file}, which is missing", "fetch the missing shard")
    return pairs

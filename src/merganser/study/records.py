"""Records of a study: JSON that is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.checkpoints.writer import write_json
from merganser.errors import ParameterError, StateError


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        StateError: If it is damaged.
        ParameterError: If it is none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} is damaged: {error}", "remove it; what it held is measured again") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path} holds no record")
    return content


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a record in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    write_json(beside, content)
    os.replace(beside, path)


def claim(out: Path, content: Mapping[str, Any]) -> None:
    """Write down what the study of a folder is; refuse to mix two.

    Raises:
        StateError: If the folder holds another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.json"
    if path.is_file() and (known := read_record(path)) != content:
        changed = [key for key in content if known.get(key) != content[key]]
        raise StateError(f"{out} holds a study with other {', '.join(changed)}", "name another folder with --out")
    write_record(path, content)

"""Files that a reference stands for: no output may replace, hold or lie within what it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from merganser.checkpoints import base_and_adapter, local_path
from merganser.errors import OutputError


def local_paths(ref: str) -> list[Path]:
    """What is on this machine of the parts of a reference, with links resolved."""
    base, last = base_and_adapter(ref)
    path = local_path(last.partition("::")[0])
    return [*(local_paths(base) if base is not None else ()), *([path.resolve()] if path.exists() else ())]


def stamp(refs: Iterable[str]) -> str:
    """One line that stands for the files of references as they are now: paths, sizes and times."""
    hashed = hashlib.sha256()
    for ref in refs:
        for path in local_paths(ref):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                status = file.stat()
                hashed.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return hashed.hexdigest()


def refuse_overlap(out: Path, inputs: Iterable[str]) -> None:
    """Refuse an output folder that is, holds or lies within one of the inputs, or holds what a link of one leads to.

    Args:
        out: folder to be made.
        inputs: references.

    Raises:
        OutputError: Names the input.
    """
    target = out.resolve()
    for ref in inputs:
        for path in local_paths(ref):
            if path.is_relative_to(target) or (path.is_dir() and target.is_relative_to(path)):
                raise OutputError(f"{out} is, holds or lies within what is read, {path}", "choose another place")
            for link in sorted(filter(Path.is_symlink, path.rglob("*"))) if path.is_dir() else []:
                if link.resolve().is_relative_to(target):
                    raise OutputError(f"{out} holds what {link} leads to, which is read", "choose another place")

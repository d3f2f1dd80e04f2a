"""Checkpoints: anything that weights come from, and the one way they are written.

A reference (`ref`) is one of

| ref | meaning |
|---|---|
| `path/to/folder` | a folder with one checkpoint: safetensors, sharded, Diffusers-style, `pytorch_model.bin` |
| `path/to/file.safetensors` | one file |
| `path/to/file.pt`, `.bin`, `.pth`, `.ckpt` | a torch file of tensors only |
| `path/to/file.pt::key` | the nested mapping `key` of a torch file |
| `path/to/adapter` | a LoRA folder, where the command knows the base |
| `BASE+ADAPTER` | a LoRA folder applied to a base, both refs |
| `hf:org/name`, `hf:org/name@revision`, `org/name` | a hub repository (extra `hub`); a local path of that name wins |
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from merganser.checkpoints.folder import open_folder, open_weights
from merganser.checkpoints.views import anonymous
from merganser.errors import RefError
from merganser.types import Source

__all__ = ["base_and_adapter", "local_path", "open_adapter", "open_source"]

_HUB_ID = re.compile(r"(?:hf:)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def open_source(ref: str | os.PathLike[str], *, base: Source | None = None) -> Source:
    """Open a checkpoint by reference; headers are read and checked, tensors are not.

    Args:
        ref: see the table in this module.
        base: what a bare adapter folder is applied to.

    Raises:
        RefError: If nothing is there, or it is ambiguous.
        CheckpointError: If what is there is not a sound checkpoint.
        AdapterError: If an adapter cannot be applied faithfully.
    """
    ref = os.fspath(ref)
    name, _, key = ref.partition("::")
    path = local_path(name)
    if path.is_dir():
        if key:
            raise RefError(
                f"{name} is a folder, which has no {key!r} to choose", f"name a torch file: {name}/FILE::{key}"
            )
        return _open_local_folder(path, ref, base)
    if path.exists():
        return open_weights(path, ref, key or None)
    base_ref, adapter_ref = base_and_adapter(ref)
    if base_ref is not None:
        # The base is the reference's own, so its bytes belong to what is read: no identity stands for them.
        return anonymous(open_adapter(adapter_ref, open_source(base_ref)))
    hub_id = _HUB_ID.fullmatch(ref)
    if ref.startswith("hf:") or (hub_id and not path.parent.exists()):
        if hub_id is None:
            raise RefError(
                f"{ref} is not a hub reference", "write hf:organisation/name or hf:organisation/name@revision"
            )
        from merganser.checkpoints.hub import snapshot

        return _open_local_folder(snapshot(hub_id["repo"], hub_id["revision"]), ref, base)
    raise RefError(f"{ref} does not exist", _nearest(path))


def base_and_adapter(ref: str, folder: Path = Path()) -> tuple[str | None, str]:
    """Base and adapter of BASE+ADAPTER; None and the reference itself where it is no such reference.

    Folders may have a plus in their names: it is cut at the last one behind which something is there, if there is one.

    Args:
        ref: a reference.
        folder: that relative paths are seen from.

    Raises:
        RefError: If no adapter is named behind a plus.

    >>> base_and_adapter("org/model+org/lora"), base_and_adapter("org/model")
    (('org/model', 'org/lora'), (None, 'org/model'))
    """
    if "+" not in ref or _is_there(folder, ref):
        return None, ref
    if ref.endswith("+"):
        raise RefError(f"{ref} names no adapter behind the plus", "write BASE+ADAPTER, or the base alone")
    pieces = ref.split("+")
    cuts = [("+".join(pieces[:i]), "+".join(pieces[i:])) for i in range(len(pieces) - 1, 0, -1)]
    return next((cut for cut in cuts if _is_there(folder, cut[1])), cuts[0])


def _is_there(folder: Path, ref: str) -> bool:
    return (folder / local_path(ref.partition("::")[0])).exists()


def open_adapter(ref: str, base: Source) -> Source:
    """Open an adapter on a base that is open.

    Args:
        ref: of the adapter.
        base: what it is applied to.

    Raises:
        RefError: If nothing is there, or no adapter.
        MerganserError: As `open_source`.
    """
    from merganser.checkpoints.adapter import AdapterSource

    found = open_source(ref, base=base)
    if not isinstance(found, AdapterSource):
        raise RefError(f"{ref} is no adapter, and only an adapter can be applied to {base.ref}")
    return found


def local_path(ref: str) -> Path:
    """A reference seen as a local path, which may or may not exist.

    Raises:
        RefError: If no file can have such a name.
    """
    try:
        ref.encode("utf-8")
        path = Path(ref).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise RefError(f"{ref[:80]!r} cannot be the name of a file: {error}"[:300]) from error
    return path


def _open_local_folder(folder: Path, ref: str, base: Source | None) -> Source:
    if (folder / "adapter_config.json").is_file():
        if base is None:
            raise RefError(f"{ref} is an adapter, which needs a base", f"write BASE+{ref}")
        from merganser.checkpoints.adapter import AdapterSource

        return AdapterSource(folder, base, ref)
    return open_folder(folder, ref)


def _nearest(path: Path) -> str:
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = get_close_matches(path.name, sorted(p.name for p in path.parent.iterdir()), n=1)
    return f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} has such a name"

"""A run's folder: whose it is, who works on it, and its journal.

    run.json       the configuration; who finds it there finds a run
    inputs.json    digests of what the configuration only names: the graph of a file, the examples
    journal.jsonl  a line of JSON a round
    agent-NUMBER/  checkpoints
    models/        at the end

One process works on a folder at a time: it holds a lock on it, which ends with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.decentral.durable import unwritten, write
from merganser.decentral.topology import Topology
from merganser.decentral.words import RunConfig
from merganser.errors import StateError
from merganser.numerics import raw_bytes

JOURNAL = "journal.jsonl"
CONFIG = "run.json"
INPUTS = "inputs.json"
#: One round as the journal has it.
Line = dict[str, Any]
#: Digests of what a configuration only names, by what it is; None for what nobody knows.
Inputs = Mapping[str, str | None]


@contextmanager
def claimed(config: RunConfig, folder: Path, *, resume: bool, inputs: Inputs) -> Iterator[list[Line]]:
    """Hold a folder for a run, and write down that it is this run's; gives the lines of the journal that is there.

    Raises:
        StateError: As `refuse_others`.
        OutputError: If it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error) from error
    with _held(folder):
        refuse_others(config, folder, resume=resume, inputs=inputs)
        if not (folder / CONFIG).is_file():
            write(folder / INPUTS, json.dumps(dict(inputs), sort_keys=True) + "\n")
            write(folder / CONFIG, config.model_dump_json(indent=1) + "\n")
            yield []
        else:
            yield journal(folder)


def refuse_others(config: RunConfig, folder: Path, *, resume: bool, inputs: Inputs | None = None) -> None:
    """Refuse a folder that another run has, or that is to be gone on with and may not be; nothing is written.

    Args:
        config: of the run.
        folder: of it, there or not.
        resume: whether to go on with the run that is there.
        inputs: digests of what the configuration names; what is None in either is not compared.

    Raises:
        StateError: If the folder holds a run and this is not to resume it, or holds one with another configuration or
            other inputs.
    """
    if not (folder / CONFIG).is_file():
        return
    known = config_of(folder)
    if not resume:
        raise StateError(f"{folder} holds a run already", "go on with it by --resume, or name another folder")
    if known.model_copy(update={"deadline_s": config.deadline_s}) != config:
        changed = [name for name in type(config).model_fields if getattr(known, name) != getattr(config, name)]
        raise StateError(f"{folder} holds a run with other {', '.join(changed)}", "name another folder")
    before = _inputs(folder)
    for what, digest in (inputs or {}).items():
        if None not in (digest, before.get(what)) and digest != before[what]:
            raise StateError(
                f"the {what} of the run in {folder} has changed since it was begun",
                "put it back as it was, or name another folder",
            )


def refuse_held(folder: Path) -> None:
    """Refuse a folder that another process works on; one that is not there is nobody's.

    Raises:
        StateError: If it is held.
        OutputError: If it is a file.
    """
    if folder.exists():
        with _held(folder):
            pass


def inputs_of(topology: Topology, data: str | None = None) -> Inputs:
    """Digests of what a run's configuration only names.

    Args:
        topology: of the run; where a file says it, the file's.
        data: of the examples, if anybody knows.
    """
    graph = hashlib.sha256(topology.at(0).weights.tobytes()).hexdigest() if topology.given is not None else None
    return {"graph": graph, "data": data}


def digest_of(tensors: Iterable[Tensor]) -> str:
    """One digest of the types, shapes and bytes of some tensors."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(json.dumps([str(x.dtype), list(x.shape)]).encode())
        found.update(raw_bytes(x))
    return found.hexdigest()


def journal(folder: Path) -> list[Line]:
    """The lines of a run's journal; one that was cut off does not count, nor what is behind it.

    Raises:
        StateError: If the folder holds no run, or it cannot be read.
    """
    try:
        text = (folder / JOURNAL).read_text("utf-8", errors="replace")
    except FileNotFoundError as error:
        if (folder / CONFIG).is_file():  # it was killed before its first round
            return []
        raise StateError(f"{folder} holds no run: {JOURNAL}: {error.strerror}") from error
    except OSError as error:
        raise StateError(f"{folder} holds no run: {JOURNAL}: {error.strerror}") from error
    found: list[Line] = []
    for text_line in text.split("\n")[:-1]:
        try:
            line = json.loads(text_line)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("round")) is not int or type(line.get("step")) is not int:
            break
        found.append(line)
    return found


def config_of(folder: Path) -> RunConfig:
    """The configuration of the run that a folder holds.

    Raises:
        StateError: If it holds none.
    """
    try:
        return RunConfig.model_validate_json((folder / CONFIG).read_bytes())
    except OSError as error:
        raise StateError(f"{folder} holds no run: {CONFIG}: {error.strerror}") from error
    except ValueError as error:
        line = " ".join(str(error).split())
        raise StateError(f"{folder} holds no run that this version reads: {CONFIG}: {line[:300]}") from error


def text_of(line: Line) -> str:
    """A line of a journal."""
    return json.dumps(line, allow_nan=False) + "\n"


def _inputs(folder: Path) -> Inputs:
    try:
        found = json.loads((folder / INPUTS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, as long as this process lives at most.

    Raises:
        StateError: If another process holds it.
        OutputError: If it is no folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise unwritten(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another process is working on {folder}", "wait for it to end") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)

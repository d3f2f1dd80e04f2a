"""Merges for clusters: models, recipes, what a folder holds, and workers that are this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints.placed import Place
from merganser.merging.cluster_jobs import LostError, Machine, Part
from merganser.merging.cluster_work import write_part
from merganser.merging.recipe import Input, Recipe, Slice
from support import make_base, save, tune

#: Small enough for several files, each of several tensors.
SHARD_BYTES = 2500
#: Seconds after which a test that waits has failed.
WAIT_S = 60.0
CONFIG = {"model_type": "bert", "num_hidden_layers": 2, "torch_dtype": "float32"}


def family(folder: Path) -> list[Path]:
    """A base and two fine-tunes, with tensors of every kind and four large enough for several chunks."""
    generator = torch.Generator().manual_seed(7)
    base = make_base() | {f"{letter}.table": torch.randn(450, 300, generator=generator) for letter in "amtz"}
    models = [base, tune(base, 1), tune(base, 2)]
    return [save(model, folder / f"m{i}", CONFIG) for i, model in enumerate(models)]


def recipe(method: str, models: Sequence[Path | str], base: Path | None = None, **options: Any) -> Recipe:
    """A recipe of whole models."""
    inputs = tuple(Input(str(m)) for m in models)
    return Recipe(method, (Slice(inputs),), Input(str(base)) if base is not None else None, text="a test", **options)


def content(folder: Path) -> dict[str, Any]:
    """Every file of a folder as bytes; the receipt as what it says, but for times and memory."""
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    receipt = json.loads(found["merganser.json"])
    found["merganser.json"] = {k: v for k, v in receipt.items() if k not in ("wall_s", "peak_bytes")}
    return found


def squares(merged: Any, name: str) -> tuple[float, ...]:
    """Squared Frobenius norm of every model's change of one tensor."""
    tensor, sources = merged.plan.tensors[name], merged.plan.sources
    base = sources[tensor.base.ref].read(tensor.base.name).double()
    models = [sources[piece.ref].read(piece.name).double() for piece in tensor.models]
    return tuple(float((x - base).square().sum()) for x in models)


def evened(recipes: Sequence[Recipe], sums: Sequence[float]) -> list[Recipe]:
    """The recipe with weights that make all models' whole changes equally large."""
    (one,) = recipes
    (part,) = one.slices
    inputs = [replace(i, settings={"weight": 1 / total**0.5}) for i, total in zip(part.inputs, sums, strict=True)]
    return [replace(one, slices=(replace(part, inputs=tuple(inputs)),))]


@dataclass
class InProcess:
    """Tasks run by this process, one after the other, when they are waited for.

    Attributes:
        dies: part, how often it was given out -> whether its worker dies.
        log: numbers of the parts in the order in which they were begun.
    """

    dies: Callable[[int, int], bool] = lambda _number, _time: False
    machines: Sequence[Machine] = (Machine(2, 1 << 34), Machine(2, 1 << 34))
    log: list[int] = field(default_factory=list)
    _waiting: dict[int, Any] = field(default_factory=dict)

    def share(self, value: Any) -> Any:
        return value

    def start(self, task: Callable[..., Any], *args: Any, label: str, threads: int, memory_bytes: int) -> int:
        handle = len(self.log)
        self.log.append(args[1].number)
        self._waiting[handle] = lambda: task(*args)
        return handle

    def now(self) -> float:
        return float(len(self.log))

    def ended(self, handles: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        return [*handles][:1]

    def result(self, handle: Any) -> Any:
        number = self.log[handle]
        result = self._waiting.pop(handle)()
        if self.dies(number, self.log[: handle + 1].count(number)):
            raise LostError("its process died")
        return result

    def stop(self, handles: Sequence[Any]) -> None:
        for handle in handles:
            self._waiting.pop(handle, None)


def half_then_gone(work: Any, part: Part, places: Mapping[str, Place], write: Callable[..., Any] = write_part) -> Any:
    """Write a part, and break every byte of its last file's second half: what a dead worker may have left."""
    result = write(work, part, places)
    path = Path(work.folder) / part.files[-1]
    data = bytearray(path.read_bytes())
    start = min(place.offset for place in places.values() if place.file == path.name)
    middle = (start + len(data)) // 2
    data[middle:] = bytes(255 - x for x in data[middle:])
    path.write_bytes(bytes(data))
    return result


def until(condition: Callable[[], Any], what: str) -> Any:
    """What a condition gives once it gives something."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {WAIT_S} seconds in vain until {what}")

"""How far does one coordinator carry a merge over many machines, and what does Ray cost on this one?

    python benchmarks/cluster.py [--ray] [--jobs 10000] [--rate 200] [--out FILE]

Without --ray nothing but this process is needed: the coordinator runs for real, with workers that are only a clock.
With it, a small merge is run in one process and over local Ray processes as well, and empty tasks are counted.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from merganser.checkpoints.writer import CheckpointWriter, plan_shards
from merganser.merging.cluster import merge_on
from merganser.merging.cluster_jobs import Part, coordinate, part_count, split
from merganser.merging.cluster_simulation import simulated
from merganser.merging.cluster_work import Work, Written
from merganser.merging.merged import Merged
from merganser.merging.plan import make_plan
from merganser.merging.recipe import Input, Recipe, Slice
from merganser.merging.run import plan_recipes, run
from merganser.types import TensorInfo


def llama(hidden: int, inner: int, layers: int, keys: int, vocabulary: int) -> dict[str, TensorInfo]:
    """Tensors of a Llama in bfloat16."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (keys, hidden) for n in "kv"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: TensorInfo(shape, "BF16") for name, shape in sorted(shapes.items())}


MODELS = {"8B": llama(4096, 14336, 32, 1024, 128256), "405B": llama(16384, 53248, 126, 1024, 128256)}


class Header:
    """A source that has headers only."""

    aliases: Mapping[str, str] = {}
    identity = None

    def __init__(self, ref: str, infos: Mapping[str, TensorInfo]) -> None:
        self.ref, self.infos = ref, infos

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Nothing is read of it."""
        raise NotImplementedError

    def companions(self) -> Sequence[Path]:
        """It has none."""
        return ()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield from ("", f"**{title}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head))
    yield from (f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)
    yield ""


def coordinator(jobs: int, number: int) -> Iterator[str]:
    """Jobs a second of the real coordinator: alone, and with the writer that takes over every digest."""
    infos = {f"t{i:05d}": TensorInfo((1,), "F32") for i in range(jobs)}
    parts = [Part(i, (name,), (f"{name}.safetensors",), 8) for i, name in enumerate(infos, 1)]
    rows = []
    for label, dying in (("alone", 0), ("1 % of the workers die", 100)):
        began = time.perf_counter()
        found = simulated(
            parts,
            number,
            lambda _: 1.0,
            is_lost=lambda p, n, every=dying: bool(every) and n == 1 and not p.number % every,
        )
        took = time.perf_counter() - began
        rows.append((f"{label} ({found.lost} given out again)", f"{took:.2f} s", f"{jobs / took:,.0f}"))
    with tempfile.TemporaryDirectory() as name, CheckpointWriter(Path(name) / "out", infos, resume="x") as writer:
        began = time.perf_counter()
        simulated(parts, number, lambda _: 1.0, done=lambda part: writer.take(part.names[0], "0" * 64))
        took = time.perf_counter() - began
        rows.append(("with the writer and its journal", f"{took:.2f} s", f"{jobs / took:,.0f}"))
    title = f"Coordinator: {jobs:,} jobs of nothing, {number:,} workers on paper"
    return table(title, ("", "time", "jobs a second"), rows)


def on_paper(rate: float, cost_s: float) -> Iterator[str]:
    """Merges of two models and a base over ever more workers."""
    rows = []
    for name, infos in MODELS.items():
        refs = ["base", "one", "two"]
        recipe = Recipe("ties", (Slice((Input("one"), Input("two"))),), Input("base"), settings={"density": 0.5})
        began = time.perf_counter()
        merged = Merged(make_plan(recipe, {ref: Header(ref, infos) for ref in refs}))
        plan_s = time.perf_counter() - began
        work = len(pickle.dumps(Work((recipe,), "0" * 64, os.getcwd(), "/shared/out", "/shared/out", 1)))
        sizes = {n: info.nbytes * 4 for n, info in merged.infos.items()}
        digests = [{n: f"{i}{k}".zfill(64) for i, n in enumerate(infos)} for k in range(4)]
        result = Written(digests[0], dict(zip(refs, digests[1:], strict=True)), 1 << 30)
        for shard_bytes in (5_000_000_000, 1_000_000_000):
            shards = plan_shards(infos, shard_bytes)
            files = {n: f"{i:05d}" for i, names in enumerate(shards) for n in names}
            for workers in (1, 8, 64, 1000):
                parts = split(sizes, files, part_count(sum(sizes.values()), workers))

                def seconds(part: Part, plan_s: float = plan_s) -> float:
                    return plan_s + part.size / (rate * 1e6)

                found = simulated(parts, workers, seconds, coordinator_s=cost_s)
                rows.append(
                    (
                        name,
                        f"{shard_bytes / 1e9:.0f} GB",
                        f"{workers:,}",
                        len(parts),
                        f"{found.wall_s:,.0f} s",
                        f"{found.busy:.0%}",
                        f"{sum(sizes.values()) / found.wall_s / 1e9:.1f} GB/s",
                        f"{len(parts) * cost_s:.2f} s",
                        f"{work / 1e3:.1f} kB + {len(pickle.dumps(result)) / len(parts) / 1e3:.1f} kB a part",
                    )
                )
        rows.append((f"{name}: planning, in each task", "", "", "", f"{plan_s:.2f} s", "", "", "", ""))
    title = (
        f"On paper: ties of two Llamas and a base, {rate:.0f} MB/s read and written a worker, "
        f"{cost_s * 1e3:.1f} ms of the coordinator a part"
    )
    head = ("model", "files", "workers", "parts", "time", "busy", "file system", "coordinator", "object store")
    tiny = [Part(i, (), (str(i),), 1) for i in range(10_000)]
    found = simulated(tiny, 1000, lambda _: 1.0, coordinator_s=cost_s)
    yield from table(title, head, rows)
    yield (
        f"10,000 jobs of one second on 1,000 workers, at {cost_s * 1e3:.2f} ms of the coordinator each: "
        f"{found.wall_s:.1f} s on paper, where 10 are the least; the workers are busy for {found.busy:.0%} of it."
    )


def nothing(*_: object) -> None:
    """A task."""


class Empty:
    """Ray's workers as the coordinator sees them, with tasks of nothing."""

    def __init__(self, tasks: Any) -> None:
        self.tasks = tasks
        self.now, self.ended, self.result, self.stop = tasks.now, tasks.ended, tasks.result, tasks.stop

    def start(self, part: Part) -> Any:
        """Give one out."""
        return self.tasks.start(nothing, label=part.label, threads=1, memory_bytes=1)


def over_ray(megabytes: int, jobs: int) -> tuple[list[str], float]:
    """A small merge in one process and over local Ray processes; and seconds of the coordinator a task of nothing."""
    from merganser.merging.cluster_ray import connected

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = torch.Generator().manual_seed(0)
        rows = megabytes * 250_000 // 1024 // 16
        base = {f"layers.{i}.weight": torch.randn(rows, 1024, generator=generator) for i in range(16)}
        for ref in ("base", "one", "two"):
            (folder / ref).mkdir()
            shift = 0.0 if ref == "base" else 0.01
            save_file(
                {n: x + shift * torch.randn(x.shape, generator=generator) for n, x in base.items()},
                folder / ref / "model.safetensors",
            )
        inputs = tuple(Input(str(folder / ref)) for ref in ("one", "two"))
        recipe = Recipe("ties", (Slice(inputs),), Input(str(folder / "base")), settings={"density": 0.3})
        options = {"shard_bytes": megabytes * 1_000_000 // 8, "overwrite": True}
        times: dict[str, list[float]] = {}

        def timed(label: str, do: Any) -> None:
            began = time.perf_counter()
            do()
            times.setdefault(label, []).append(time.perf_counter() - began)

        per_job = 0.0
        for workers in (1, 2):
            with connected("local", workers=workers) as tasks:
                merge_on(tasks, [recipe], folder / "warm", **options)  # workers have imported torch
                for _ in range(3):
                    timed(
                        "one process, 1 thread", lambda: run(plan_recipes([recipe]), folder / "a", threads=1, **options)
                    )
                    timed(
                        f"Ray, {workers} worker{'s' * (workers > 1)}",
                        lambda tasks=tasks: merge_on(tasks, [recipe], folder / "b", **options),
                    )
                if workers == 2:
                    parts = [Part(i, (), (str(i),), 1) for i in range(jobs)]
                    began, cpu = time.perf_counter(), time.process_time()
                    empty = Empty(tasks)
                    coordinate(parts, empty, empty.start, lambda *_: None, window=4)
                    took, per_job = time.perf_counter() - began, (time.process_time() - cpu) / jobs
                    shown = f"{jobs:,} tasks of nothing over Ray, 2 workers: {jobs / took:,.0f} a second, "
                    shown += f"{per_job * 1e3:.2f} ms of the coordinator's processor each"
    shares = [(k, f"{statistics.median(v):.2f} s", f"{min(v):.2f} to {max(v):.2f}") for k, v in times.items()]
    lines += table(f"ties of two models of {megabytes} MB and a base, 8 files", ("", "median", "range"), shares)
    return [*lines, shown], per_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="run Ray as well")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=400, help="of a model, with --ray")
    parser.add_argument("--rate", type=float, default=200.0, help="MB a second that a worker reads and writes")
    parser.add_argument("--cost-ms", type=float, default=1.0, help="of the coordinator a part; measured with --ray")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [*coordinator(args.jobs, 1000)]
    cost_s = args.cost_ms / 1e3
    if args.ray:
        real, cost_s = over_ray(args.megabytes, args.jobs // 5)
        lines += real
    lines += on_paper(args.rate, cost_s)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""`merganser merge` against mergekit 0.1.5's `mergekit-yaml`: the same recipes on the same files, in turn, in one run.

    python benchmarks/recipes.py                          # 0.1 billion parameters, 2 and 8 models, one core
    python benchmarks/recipes.py --size 0.5 --threads 2
    python benchmarks/recipes.py --tiny                   # 10,803 tensors of a few numbers: bookkeeping alone
    python benchmarks/recipes.py --methods ties linear --models 8 --rounds 3

Each run is a process of its own, on as many cores as it may use threads; both read files that are in the page cache.
"Merge only" is the whole process less the same program's merge of one small tensor (start-up, imports, bookkeeping).
"Bare" is ours with --no-digests: the receipt then has no sha256 of inputs, and mergekit has no receipt. Peak memory is
what the process holds for itself (anonymous pages), sampled every 20 ms: pages of the files that mergekit maps do not
count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _peers import environment

PEER = ("torch==2.13.0", "mergekit==0.1.5")
HERE = Path(__file__).resolve().parent
#: Width, inner width, layers and vocabulary by billions of parameters.
SIZES = {"0.1": (768, 2048, 12, 32000), "0.5": (896, 4864, 24, 151936)}
#: Method -> whether it takes a base, settings a model, settings of all; two models only where `pair`.
METHODS: dict[str, dict[str, object]] = {
    "linear": {"each": {"weight": 0.5}},
    "task_arithmetic": {"base": True, "each": {"weight": 0.5}},
    "ties": {"base": True, "each": {"weight": 0.5, "density": 0.5}},
    "dare_ties": {"base": True, "each": {"weight": 0.5, "density": 0.5}},
    "della": {"base": True, "each": {"weight": 0.5, "density": 0.5, "epsilon": 0.1}},
    "breadcrumbs": {"base": True, "each": {"weight": 0.5, "density": 0.9, "gamma": 0.01}},
    "sce": {"base": True, "all": {"select_topk": 0.5}},
    "karcher": {},
    "multislerp": {"each": {"weight": 0.5}},
    "model_stock": {"base": True},
    "slerp": {"base": True, "pair": True, "all": {"t": 0.4}},
}


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        wall_s: start to exit.
        cpu_s: user and system time.
        peak_mb: most anonymous memory seen, MB.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: Sequence[str], threads: int) -> Run:
    """Run one process to its end, watching its memory."""
    os.sync()
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | limits | {"HF_HUB_OFFLINE": "1"})
        os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:threads])
        peak = 0
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read()[-3000:]}\nexit {process.returncode}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, peak / 1e6)


def anonymous_bytes(pid: int) -> int:
    """What a process holds for itself now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def recipe(method: str, folders: Sequence[Path]) -> str:
    """A recipe in mergekit's language, of the base and the models."""
    entry = METHODS[method]
    base, *models = folders
    models = models[:1] if entry.get("pair") else models
    listed = [base, *models] if entry.get("pair") else models
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if entry.get("base"):
        lines.append(f"base_model: {base}")
    lines.append("models:")
    for model in listed:
        lines.append(f"- model: {model}")
        if each := entry.get("each"):
            lines.append(f"  parameters: {json.dumps(each)}")
    if every := entry.get("all"):
        lines.append(f"parameters: {json.dumps(every)}")
    return "\n".join(lines) + "\n"


class Bench:
    """Models, environments and places of one run of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work
        self.threads: int = args.threads
        self.peer = None if args.no_peer else environment(self.work / "mergekit", PEER)
        self.file, self.out = self.work / "recipe.yaml", self.work / "merged"

    def models(self, kind: str, count: int) -> list[Path]:
        """A base and models of a kind, made once."""
        folder = self.work / f"llama-{kind}"
        script = [sys.executable, str(HERE / "_llamas.py"), kind, str(folder), str(count + 1)]
        subprocess.run(script, check=True)
        return [folder / f"model-{i}" for i in range(count + 1)]

    def ours(self, *more: str) -> Run:
        """One merge by `merganser merge`."""
        shutil.rmtree(self.out, ignore_errors=True)
        command = [sys.executable, "-m", "merganser", "merge", str(self.file), str(self.out), *more]
        return measure([*command, "--threads", str(self.threads)], self.threads)

    def theirs(self) -> Run:
        """One merge by `mergekit-yaml`."""
        assert self.peer is not None
        shutil.rmtree(self.out, ignore_errors=True)
        command = [str(self.peer.parent / "mergekit-yaml"), str(self.file), str(self.out), "--no-copy-tokenizer"]
        return measure([*command, "--quiet", "--num-threads", str(self.threads), "--lazy-unpickle"], self.threads)

    def all(self, method: str, folders: Sequence[Path], rounds: int) -> tuple[list[Run], list[Run], list[Run]]:
        """Ours with and without digests of inputs, and the peer, in turn on one recipe."""
        self.file.write_text(recipe(method, folders))
        for folder in folders:
            for path in folder.glob("*.safetensors"):
                path.read_bytes()
        ours, bare, theirs = [], [], []
        for _ in range(rounds):
            ours.append(self.ours())
            bare.append(self.ours("--no-digests"))
            if self.peer is not None:
                theirs.append(self.theirs())
        return ours, bare, theirs


def middle(runs: Sequence[Run], part: str) -> float:
    return statistics.median(getattr(run, part) for run in runs)


def copying(folders: Sequence[Path], out: Path) -> float:
    """Seconds of reading all models and writing one with plain copies, flushed to disk."""
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    for folder in folders[1:]:
        data = (folder / "model.safetensors").read_bytes()
    with out.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1", help="billions of parameters")
    parser.add_argument("--models", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="and cores")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="one merge of 10,803 tiny tensors instead")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    start_up = bench.all("linear", bench.models("one", 2), max(3, args.rounds))
    started = [middle(runs, "cpu_s") if runs else 0.0 for runs in start_up]
    print(
        f"{args.threads} threads, {args.rounds} rounds; start-up {started[0]:.2f} CPU-s, mergekit's {started[2]:.2f}.\n"
    )
    print("| method | models | CPU-s | bare | mergekit | ratio | bare |", end="")
    print(" merge only | bare | mergekit | ratio | bare | wall s | mergekit | MB | mergekit |")
    print("|---|" + "---:|" * 15, flush=True)
    if args.tiny:
        cases = [("linear", 2, bench.models("tiny", 2))]
    else:
        folders = bench.models(args.size, max(args.models))
        counts = {m: [2] if METHODS[m].get("pair") else args.models for m in args.methods}
        cases = [(m, k, folders[: k + 1]) for m in args.methods for k in counts[m]]
    for method, count, chosen in cases:
        runs = bench.all(method, chosen, args.rounds)
        print(f"| {method} | {count} | {' | '.join(cells(runs, started))} |", flush=True)
    if not args.tiny:
        for count in args.models:
            wall = min(copying(folders[: count + 1], bench.work / "copy.bin") for _ in range(2))
            print(f"\nPlain copies: {wall:.1f} s of wall time for the same {count} models read and one written.")


def cells(runs: Sequence[Sequence[Run]], started: Sequence[float]) -> list[str]:
    """Figures of one method, as the table has them; empty where the peer did not run."""
    row = []
    for less in ([0.0] * 3, started):
        ours, bare, peer = (middle(of, "cpu_s") - start if of else None for of, start in zip(runs, less, strict=True))
        assert ours is not None
        assert bare is not None
        row += [f"{ours:.1f}", f"{bare:.1f}"]
        row += ["", "", ""] if peer is None else [f"{x:.1f}" for x in (peer, peer / ours, peer / bare)]
    for part, digits in (("wall_s", 1), ("peak_mb", 0)):
        row += [f"{middle(of, part):.{digits}f}" if of else "" for of in (runs[0], runs[2])]
    return row


if __name__ == "__main__":
    main()

"""Our `opcm` against FusionBench 0.2.33's in one run: wall time, CPU time, peak memory, and whether they agree.

    python benchmarks/fold.py                 # makes the models and the peer's environment once, then measures
    python benchmarks/fold.py --small         # the same in miniature, to see that everything works
    python benchmarks/fold.py --no-peer --scaling --out scaling.md

Each measured run is a process of its own, from start to exit. The runs take turns (A B A B), after one short warm-up
of each over two experts. This script imports nothing outside the standard library: a child of a large process would
inherit its peak memory.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _peers import environment

HERE = Path(__file__).resolve().parent
PEER = ("torch==2.13.0", "transformers<5", "huggingface_hub<1", "datasets<4", "fusion-bench==0.2.33")
#: The peer adds the patch convolution like a bias, so ours does the same where the two are compared.
LIKE_THE_PEER = ("--vector", "*.patch_embedding.weight")
SCALING = (2, 4, 8, 16)


@dataclass(frozen=True)
class Run:
    """One measured run: a process, or a session of several in turn.

    Attributes:
        wall_s: start to exit; a session's sum.
        cpu_s: user and system time.
        peak_mb: largest resident set in MB (10**6 bytes); a session's maximum.
        said: the JSON that the process printed last, if it printed any.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    said: dict[str, Any] = field(default_factory=dict)


def measure(command: Sequence[str], threads: int) -> Run:
    """Run one process to its end."""
    os.sync()  # what the previous run left to be written is not this one's to wait for
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=os.environ | limits)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{errors.read()[-3000:]}\nexit {process.returncode}")
        lines = out.read().splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(wall_s, usage.ru_utime + usage.ru_stime, peak_bytes / 1e6, said)


class Bench:
    """Models, environments and places of one run of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.threads: int = args.threads
        self.work: Path = args.work
        settings = {"small": args.small, "code": (HERE / "_models.py").read_text().split("def open_model")[0]}
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10]
        self.models = self.work / f"models-{digest}"
        self.state, self.ours, self.theirs = (self.work / name for name in ("state", "ours", "theirs"))
        count = max(args.experts, max(SCALING) if args.scaling else 0)
        print(f"generating a base and {count} experts, unless they are there ...", file=sys.stderr)
        generate = [sys.executable, str(HERE / "_models.py"), "generate", str(self.models), "--experts", str(count)]
        subprocess.run(generate + ["--small"] * args.small, check=True)
        self.base = str(self.models / "base")
        self.experts = [str(self.models / f"expert-{i:02d}") for i in range(1, count + 1)]
        self.model_mb = (self.models / "base" / "model.safetensors").stat().st_size / 1e6

    def fresh(self) -> None:
        """Remove what the last run of ours left."""
        for folder in (self.state, self.ours):
            shutil.rmtree(folder, ignore_errors=True)

    def one_pass(self, method: str, experts: Sequence[str], *options: str) -> Run:
        """Ours through the Python API, one process: all experts in order in one pass over the state."""
        self.fresh()
        script = [sys.executable, str(HERE / "_ours_fold.py"), self.base, str(self.state), str(self.ours), *experts]
        return measure([*script, "--method", method, "--threads", str(self.threads), *options], self.threads)

    def commands(self, experts: Sequence[str], *options: str) -> Run:
        """Ours through the command line: one process to begin, one an expert, one to export."""
        self.fresh()
        fold, state, limit = (
            [sys.executable, "-m", "merganser", "fold"],
            str(self.state),
            ["--threads", str(self.threads)],
        )
        settings = ["--method", "opcm", "--alpha", "0.5", "--diagonal", "drop", *options]
        session = [[*fold, "init", self.base, state, *settings, *limit]]
        session += [[*fold, "add", state, expert, *limit] for expert in experts]
        session += [[*fold, "export", state, str(self.ours), *limit]]
        runs = [measure(command, self.threads) for command in session]
        return Run(sum(r.wall_s for r in runs), sum(r.cpu_s for r in runs), max(r.peak_mb for r in runs))

    def peer(self, python: str, experts: Sequence[str]) -> Run:
        """FusionBench, one process."""
        shutil.rmtree(self.theirs, ignore_errors=True)
        script = [python, str(HERE / "_peer_opcm.py"), self.base, str(self.theirs), *experts]
        return measure([*script, "--threads", str(self.threads)], self.threads)

    def exact(self, python: str, experts: Sequence[str]) -> Path:
        """What FusionBench gives in float64, made once."""
        folder = self.models / f"exact-{len(experts)}"
        if not folder.exists():
            print("running the peer in float64, to judge by ...", file=sys.stderr)
            partial = folder.with_suffix(".partial")
            script = [python, str(HERE / "_peer_opcm.py"), self.base, str(partial), *experts, "--float64"]
            measure([*script, "--threads", str(self.threads)], self.threads)
            partial.rename(folder)
        return folder

    def compare(self, python: str, experts: Sequence[str]) -> dict[str, Any]:
        """The merged models of the last round, and ours in float64, against the peer's code in float64."""
        exact = self.exact(python, experts)
        last = self.work / "ours-last"
        shutil.rmtree(last, ignore_errors=True)
        self.ours.rename(last)
        self.one_pass("opcm", experts, "--float64", *LIKE_THE_PEER)
        script = [sys.executable, str(HERE / "_models.py"), "compare", self.base, *experts]
        return measure([*script, "--merged", *map(str, (last, self.theirs, self.ours, exact))], self.threads).said


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def interleave(rounds: int, runners: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """Every runner once a round, in turn."""
    found: dict[str, list[Run]] = {name: [] for name in runners}
    for i in range(rounds):
        for name, runner in runners.items():
            run = runner()
            found[name].append(run)
            print(f"round {i + 1}: {name}: {run.wall_s:.1f} s, {run.peak_mb:.0f} MB {run.said}", file=sys.stderr)
    return found


def run_table(found: dict[str, list[Run]]) -> list[str]:
    """Wall, CPU and peak of every runner."""
    lines = [row("", "wall s", "after imports s", "CPU s", "peak MB"), row("---", *["---:"] * 4)]
    for name, runs in found.items():
        inside = spread([r.said["inside_s"] for r in runs]) if runs[0].said else ""
        wall, cpu = spread([r.wall_s for r in runs]), spread([r.cpu_s for r in runs])
        lines.append(row(name, wall, inside, cpu, spread([r.peak_mb for r in runs], 0)))
    return lines


def ratio_table(found: dict[str, list[Run]], peer: str) -> list[str]:
    """The peer divided by each of ours, round by round."""
    lines = ["", row("peer / ours", "wall", "CPU", "peak memory"), row("---", *["---:"] * 3)]
    for name, runs in found.items():
        if name != peer:
            pairs = list(zip(found[peer], runs, strict=True))
            quotients = [[getattr(p, a) / getattr(o, a) for p, o in pairs] for a in ("wall_s", "cpu_s", "peak_mb")]
            lines.append(row(name, *(spread(values, 2) for values in quotients)))
    return lines


def agreement(found: dict[str, Any]) -> list[str]:
    """What the comparison means; see `_models.compare`."""
    lines = [
        "",
        row("merged change, relative to the peer's code in float64", "all tensors", "median", "worst", "factor"),
    ]
    lines.append(row("---", *["---:"] * 4))
    for i, label in enumerate(("ours, float32", "the peer, float32", "ours, `--float64`")):
        numbers = [found[key][i] for key in ("all", "median", "worst")]
        differences = [f"{x:.1e}" if x > 1e-7 else "< 1e-7" for x in numbers]  # as far as the comparison sees
        lines.append(row(label, *differences, f"{found['factor'][i]:+.0e}"))
    return [
        *lines,
        "",
        "Factor: the one global scale against the judge's, divided out of the rest. Left out: the class embedding, "
        "which the peer never merges and yet counts in its norms (its cosine with the first expert's is "
        f"{found['class_cosine']:.4f}). The patch convolution is a vector in both. "
        f"Experts' changes: {min(found['strength']):.1%} to {max(found['strength']):.1%} of the base's norm.",
    ]


def scaling_table(bench: Bench, rounds: int) -> list[str]:
    """Ours over the number of experts."""
    lines = ["", "### Number of experts", ""]
    lines += [row("experts", "method", "wall s", "s an add", "peak MB", "state MB"), row("---:", "---", *["---:"] * 4)]
    runners = {
        f"{n} | {method}": lambda n=n, method=method: bench.one_pass(method, bench.experts[:n])
        for n in SCALING
        for method in ("opcm", "gram")
    }
    for name, runs in interleave(rounds, runners).items():
        adds = [r.said["add_s"] / int(name.split()[0]) for r in runs]
        state_mb = runs[0].said["state_bytes"] / 1e6
        peak = spread([r.peak_mb for r in runs], 0)
        lines.append(row(name, spread([r.wall_s for r in runs]), spread(adds), peak, f"{state_mb:.0f}"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merganser-benchmark")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tower of 8 MB")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-python", type=Path, help="an environment that has the peer already")
    parser.add_argument("--scaling", action="store_true", help=f"also {SCALING} experts")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.experts < 2:
        parser.error("--experts must be at least 2: the first is taken as it is")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    lock = (args.work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"another run is at work in {args.work}")
    bench = Bench(args)
    experts = bench.experts[: args.experts]

    ours, sessions, peer = "merganser opcm, one pass", "merganser opcm, one command an expert", "FusionBench OPCM"
    matched = not args.no_peer
    options = LIKE_THE_PEER if matched else ()
    runners: dict[str, Callable[[], Run]] = {
        "merganser gram, one pass": lambda: bench.one_pass("gram", experts),
        sessions: lambda: bench.commands(experts, *options),
        ours: lambda: bench.one_pass("opcm", experts, *options),
    }
    bench.one_pass("opcm", experts[:2])
    if matched:
        python = str(args.peer_python or environment(args.work / "peer-env", PEER))
        bench.peer(python, experts[:2])
        runners[peer] = lambda: bench.peer(python, experts)
    found = interleave(args.rounds, runners)

    version = found[ours][0].said["torch"]
    shown = {name: found[name] for name in (peer, ours, sessions, "merganser gram, one pass") if name in found}
    lines = [
        f"### {args.experts} experts of {bench.model_mb:.0f} MB, float32",
        "",
        f"{os.cpu_count()} cores ({platform.machine()}), {args.threads} threads, Python {platform.python_version()}, "
        f"torch {version}; median (least-most) of {args.rounds} rounds in turn; MB = 10^6 bytes.",
        "",
        *run_table(shown),
    ]
    if matched:
        lines += ratio_table({name: runs for name, runs in shown.items() if "gram" not in name}, peer)
        lines += agreement(bench.compare(python, experts))
    if args.scaling:
        lines += scaling_table(bench, args.rounds)
    bench.fresh()
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

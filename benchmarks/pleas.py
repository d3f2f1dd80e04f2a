"""How long merging in part takes and how much memory, whether it beats Adam, and what blocks cost when they run.

    python benchmarks/pleas.py --threads 2           # an hour
    python benchmarks/pleas.py --small               # the same in miniature, to see that everything works
    python benchmarks/pleas.py --only adam closed --out table.md

Each measured run is a process of its own. The runs take turns, one at a time; the clock runs inside them, with networks
and pictures in memory, after all of it was done once on a network of four layers, so that what is imported late is not
counted. Weights are random by seed, BatchNorm is measured on the pictures first, and pictures are noise of several
scales: this measures time, memory and how well the objective is met, not accuracy.

Adam solves what PLeaS's authors solve, with their numbers (`_pleas_adam.py`), and least squares the same objective on
the same pictures, from the same order of units and the same splits. Neither side's clock runs for those. Both results
are judged by one function on all places of all pictures, most of which least squares did not draw, and on pictures
that neither saw.

This script imports nothing outside the standard library until it is a measured process: a child of a large process
would inherit its peak memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _pleas_runs import BUDGETS, RUNS, SMALL, STAGES, Sizes
from fold import Run, interleave, measure, row, spread

#: Runs that take minutes; once is enough.
LONG = ("resnet50-layers", "resnet50-sequence", "resnet50-adam", "sizes20", "sizes50")
LABELS = {
    "resnet20": "ResNet-20, `sequence`",
    "resnet50-layers": "ResNet-50, `layers`",
    "resnet50-sequence": "ResNet-50, `sequence`",
}


def said(runs: Sequence[Run], key: str) -> list[float]:
    """One number of every run."""
    return [run.said[key] for run in runs]


def targets(found: dict[str, list[Run]], sizes: Sizes) -> list[str]:
    """Every measure beside its target."""
    layers = [run.said["peak_mb"] / 1000 for run in found.get("resnet50-layers", [])]
    measures: list[tuple[str, list[float], str, float, int]] = [
        (f"ResNet-50's shape, {sizes.pictures} pictures, `layers`: peak GB", layers, "at most", 4, 2),
        (
            f"ResNet-20, {sizes.images:,} pictures, from two networks to one: s",
            said(found.get("resnet20", []), "seconds"),
            "at most",
            30,
            1,
        ),
    ]
    if "adam" in found and "closed" in found:
        pairs = list(zip(found["adam"], found["closed"], strict=True))
        label = f"ResNet-20, Adam of {sizes.steps} steps / least squares"
        measures.append((f"{label}: s", [a.said["seconds"] / c.said["seconds"] for a, c in pairs], "at least", 10, 1))
        for where, known in (("known", "all places of these pictures"), ("fresh", "other pictures")):
            ratios = [a.said[f"objective_{where}"] / c.said[f"objective_{where}"] for a, c in pairs]
            measures.append((f"the same: objective on {known}", ratios, "at least", 1, 3))
    lines = [row("", "measured", "target", "met"), row("---", "---:", "---:", "---")]
    for name, values, bound, target, digits in measures:
        if values:
            middle = statistics.median(values)
            met = middle <= target if bound == "at most" else middle >= target
            lines.append(row(name, spread(values, digits), f"{bound} {target:g}", "yes" if met else "no"))
    return lines


def stage_table(found: dict[str, list[Run]], budget: float) -> list[str]:
    """Seconds by stage, and the process's peak during each."""
    shown = {label: found[name] for name, label in LABELS.items() if name in found}
    if not shown:
        return []
    lines = ["", f"#### Stages, budget {budget:g}", ""]
    lines.append(row("", *(f"{label}: s | peak MB" for label in shown)))
    lines.append(row("---", *["---: | ---:"] * len(shown)))
    for stage in STAGES:
        cells = []
        for runs in shown.values():
            seconds = spread([run.said["stages"][stage] for run in runs], 1)
            cells.append(f"{seconds} | {spread([run.said['peaks'][stage] for run in runs], 0)}")
        lines.append(row(stage, *cells))
    whole = [f"{spread(said(runs, 'seconds'), 1)} | {spread(said(runs, 'peak_mb'), 0)}" for runs in shown.values()]
    lines.append(row("all", *whole))
    before = ", ".join(f"{label} {spread(said(runs, 'start_mb'), 0)}" for label, runs in shown.items())
    built = next(iter(shown.values()))[0].said
    return [
        *lines,
        "",
        f"MB before the first stage, networks and pictures in memory: {before}. BatchNorm: the parents', on these "
        "pictures. Groups: which of them can be split, tried in float64. Gains: second moments of what all layers take "
        "in, for the splits; with `sequence` also what the parents give at the places that the refit will draw, where "
        "memory holds it. Refit: with `layers`, second moments again where they were not held, a solve a layer, and "
        "BatchNorm's statistics; with `sequence`, what the parents give, if it is not known, and one run through the "
        f"merged network. The first network has {built['flops']:.3f} of a parent's FLOPs and "
        f"{built['parameters']:.3f} of its parameters.",
    ]


def adam_table(found: dict[str, list[Run]], sizes: Sizes) -> list[str]:
    """Least squares and Adam on one objective."""
    if "adam" not in found or "closed" not in found:
        return []
    head = ("objective, these pictures", "left of squares", "objective, other pictures", "left of squares")
    keys = ("objective_known", "share_known", "objective_fresh", "share_fresh")
    lines = ["", f"#### Least squares and Adam, ResNet-20, {sizes.images:,} pictures, budget {sizes.budget:g}", ""]
    lines += [row("", "s", *head, "process s", "peak MB"), row("---", *["---:"] * 7)]
    start = found["adam"][0].said["start"]
    lines.append(row("block average", "", *(f"{start[key]:.4f}" for key in keys), "", ""))
    for name, label in (("closed", "least squares"), ("adam", f"Adam, {sizes.steps} steps")):
        runs = found[name]
        numbers = [spread(said(runs, key), 4) for key in keys]
        whole = spread([r.wall_s for r in runs]), spread([r.peak_mb for r in runs], 0)
        lines.append(row(label, spread(said(runs, "seconds"), 2), *numbers, *whole))
    closed, adam = found["closed"], found["adam"]
    again = [a.said["seconds"] / c.said["again"] for a, c in zip(adam, closed, strict=True)]
    slow = [a.said["anew"] / c.said["seconds"] for a, c in zip(adam, closed, strict=True)]
    lines += [
        "",
        "Left of squares: the mean over layers of squared error over the target's squares. Least squares' s are "
        f"statistics of both parents on all pictures, {spread(said(closed, 'statistics'), 2)}, and the solution, "
        f"{spread(said(closed, 'solve'), 2)}. From the same statistics, without a picture, budget {sizes.another:g} is "
        f"solved in {spread(said(closed, 'again'), 2)} s: Adam, which would begin anew, takes {spread(again, 1)} times "
        f"that. Adam's s hold the parents' runs of its steps, {spread(said(adam, 'parents'), 1)} (measured alone); "
        "where every layer of the parents runs once more for the targets, as in the authors' code, Adam would take "
        f"{spread(said(adam, 'anew'), 1)} s by a tenth of the steps, {spread(slow, 1)} times statistics and solution.",
    ]
    if "resnet50-adam" in found and "resnet50-layers" in found:
        step = statistics.median(said(found["resnet50-adam"], "step"))
        ours = statistics.median(run.said["stages"]["refit"] for run in found["resnet50-layers"])
        peak = spread(said(found["resnet50-adam"], "peak_mb"), 0)
        lines.append(
            f"ResNet-50's shape: a step of Adam takes {step:.1f} s, so that {sizes.steps} would take "
            f"{sizes.steps * step:,.0f} s (not run), {sizes.steps * step / ours:.1f} times the refit of `layers`; "
            f"peak {peak} MB."
        )
    return lines


def size_table(found: dict[str, list[Run]]) -> list[str]:
    """What networks of several budgets cost when they run."""
    lines: list[str] = []
    for name, label in (("sizes20", "ResNet-20, 20 pictures"), ("sizes50", "ResNet-50's shape, 8 pictures")):
        if name not in found:
            continue
        ms, nbytes, share = ([run.said[key] for run in found[name]] for key in ("ms", "bytes", "share"))
        head = ("FLOPs", "ms", "of one parent's", "MB", "of one parent's", "built densely: ms", "MB")
        lines += ["", f"#### {label}", "", row("", *head), row("---", *["---:"] * 7)]

        def times(key: str, ms: Any = ms) -> tuple[str, str]:
            return spread([m[key] for m in ms], 1), spread([m[key] / m["one parent"] for m in ms], 2)

        one = nbytes[0]["one parent"]
        for parents in ("one parent", "two parents"):
            size = nbytes[0][parents]
            sizes = f"{size / 1e6:.2f}", f"{size / one:.2f}"
            lines.append(row(parents, f"{share[0][parents][0]:.2f}", *times(parents), *sizes, "", ""))
        for kind, label in (("blocks", "budget"), ("steps", "16 channels at a time, budget")):
            for budget in BUDGETS:
                key, dense = f"{kind} {budget:g}", f"dense {budget:g}"
                size, whole = nbytes[0][key], nbytes[0][dense]
                cells = *times(key), f"{size / 1e6:.2f}", f"{size / one:.2f}"
                built = (times(dense)[0], f"{whole / 1e6:.2f}") if kind == "blocks" else ("", "")
                lines.append(row(f"{label} {budget:g}", f"{share[0][key][0]:.2f}", *cells, *built))
    if lines:
        lines += ["", "Median of runs in turn; two parents run one after the other. MB: of all that is saved."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of what takes seconds; what takes minutes is run once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="small networks; the targets are for the large ones")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="some of the runs")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    sizes = SMALL if args.small else Sizes()

    def runner(name: str) -> Callable[[], Run]:
        script = Path(__file__).with_name("_pleas_runs.py").resolve()
        command = [sys.executable, str(script), name, "--threads", str(args.threads), *["--small"] * args.small]
        return lambda: measure(command, args.threads)

    chosen = [name for name in RUNS if not args.only or name in args.only]
    found = interleave(args.rounds, {name: runner(name) for name in chosen if name not in LONG})
    found |= interleave(1, {name: runner(name) for name in chosen if name in LONG})
    versions = " and ".join(sorted({run.said["torch"] for runs in found.values() for run in runs}))
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    text = "\n".join(
        [
            "### Merging in part" + ", in miniature: the targets are not for this" * args.small,
            "",
            f"{os.cpu_count()} cores ({platform.machine()}), {threads}, Python {platform.python_version()}, torch "
            f"{versions}; median (least-most) of {args.rounds} rounds in turn, of one for ResNet-50 and for sizes; "
            "MB = 10^6 bytes.",
            "",
            *targets(found, sizes),
            *stage_table(found, sizes.budget),
            *adam_table(found, sizes),
            *size_table(found),
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()

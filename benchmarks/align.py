"""How long aligning and zipping take, and how that compares with `rebasin` 0.0.47 on ResNet-18, in one run.

    python benchmarks/align.py                # makes the peer's environment once, then measures
    python benchmarks/align.py --small        # the same in miniature, to see that everything works
    python benchmarks/align.py --no-peer --out table.md
    python benchmarks/align.py --only-peer    # ResNet-18 alone

Each measured run is a process of its own. The runs take turns, one at a time; the clock runs inside them, with the
networks in memory. Before that, either side does all of it once on a network of two layers, so that what is imported
late is not counted: scipy by ours, and torch._dynamo, which torch imports at the first dispatch mode that runs. The
table says what that takes, and what the whole process takes. Nothing is trained: weights are random by seed, and the
same on every machine with the same torch.

Against the peer: from two networks in memory to the second one's weights in the order of the first one's units. Ours
is `symmetries`, `match` and `Spec.apply`; the peer's is `PermutationCoordinateDescent(a, b, x).rebasin()`, as its
readme says. Both get the same picture to trace by. The peer measures BatchNorm's statistics anew only when it is
asked to (`recalculate_batch_norms`), or when it interpolates; nobody asks, so neither side does. It needs that,
though: it moves BatchNorm's scales and biases and leaves running means and variances where they were, so that what it
gives is another function until they are measured anew ("output changed by"). Ours moves them. Ours also checks in
float64 that what it found are symmetries, which the peer does not; so ours runs with the check, which is what counts,
and without. Each matches what it may move, until a sweep changes nothing: ours in float64, the peer in float32. How
many sweeps that takes depends on the order of groups, which is another one in every round, by seed; so time a sweep
is given too. The peer works with torch 2.13.0, so both sides use the same one.

This script imports nothing outside the standard library until it is a measured process: a child of a large process
would inherit its peak memory, and the peer's environment has no merganser.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from _align_runs import OURS, RUNS, SMALL, THEIRS, UNCHECKED, Sizes
from _peers import environment
from fold import Run, interleave, measure, row, spread

PEER = ("torch==2.13.0", "rebasin==0.0.47")


def said(runs: Sequence[Run], key: str) -> list[float]:
    """One number of every run."""
    return [run.said[key] for run in runs]


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def target_table(found: dict[str, list[Run]], sizes: Sizes) -> list[str]:
    """Every measure beside its target."""
    channels = "/".join(str(sizes.width * c) for c in (16, 32, 64))
    (width, layers), images = sizes.vit, f"{sizes.images:,} images in batches of {sizes.batch}"
    shares = [run.said["seconds"] / run.said["forwards"] for run in found.get("activations", [])]
    seconds = {name: said(runs, "seconds") for name, runs in found.items()}
    measures = [
        (f"greedy zip, 2 x {sizes.units} units, s", seconds.get("zip"), "at most", 0.05, 3),
        (f"ResNet-20 of {channels}, weight matching, s", seconds.get("resnet20"), "at most", 2, 2),
        (f"the same pair, activations of {images} / two forwards", shares, "at most", 1.5, 2),
        (f"ViT, {width} wide, {layers} layers, weight matching, s", seconds.get("vit"), "at most", 60, 1),
    ]
    if THEIRS in found:
        ratios = quotients(seconds[THEIRS], seconds[OURS])
        measures.append(("ResNet-18 to rebased weights, rebasin / ours", ratios, "at least", 10, 2))
    lines = [row("", "measured", "target", "met"), row("---", "---:", "---:", "---")]
    for name, values, bound, target, digits in measures:
        if not values:
            continue
        middle = statistics.median(values)
        met = middle <= target if bound == "at most" else middle >= target
        lines.append(row(name, spread(values, digits), f"{bound} {target:g}", "yes" if met else "no"))
    return lines


def apart(found: dict[str, list[Run]]) -> list[str]:
    """What is not in the targets."""
    if "activations" not in found:
        return []
    lines = ["", row("not in the above", "finding symmetries s", "sweeps", "settled", "peak MB")]
    lines.append(row("---", *["---:"] * 4))
    for name, label in (("resnet20", "ResNet-20"), ("vit", "ViT")):
        runs = found[name]
        settled = "yes" if all(said(runs, "settled")) else "no"
        peak = spread([r.peak_mb for r in runs], 0)
        lines.append(row(label, spread(said(runs, "finding"), 2), runs[0].said["sweeps"], settled, peak))
    forwards, seconds = (spread(said(found["activations"], key), 1) for key in ("forwards", "seconds"))
    peak = spread([r.peak_mb for r in found["activations"]], 0)
    return [*lines, "", f"Activations: two forwards {forwards} s, with statistics {seconds} s, peak {peak} MB."]


def peer_table(found: dict[str, list[Run]]) -> list[str]:
    """ResNet-18, every side."""
    labels = {
        THEIRS: "rebasin 0.0.47",
        OURS: "merganser",
        UNCHECKED: "merganser, no self-check",
    }
    shown = {labels[name]: found[name] for name in labels if name in found}
    head = (
        "ResNet-18",
        "to rebased weights s",
        "CPU s",
        "of it tracing s",
        "sweeps",
        "groups",
        "first use s",
        "process s",
    )
    more = ("peak MB", "MB before", "distance after", "output changed by", "s a sweep")
    lines = ["", row(*head, *more), row("---", *["---:"] * 12)]
    for label, runs in shown.items():
        sweeps = said(runs, "sweeps")
        matching_s = [run.said["seconds"] - run.said["finding"] for run in runs]
        times = [spread(said(runs, key), 2) for key in ("seconds", "cpu", "finding")]
        whole = [spread(said(runs, "warm"), 2), spread([r.wall_s for r in runs])]
        memory = [spread(said(runs, key), 0) for key in ("peak_mb", "start_mb")]
        outcome = [spread(said(runs, "after"), 2), f"{max(said(runs, 'change')):.0e}"]
        outcome.append(spread(quotients(matching_s, sweeps), 2))
        lines.append(row(label, *times, spread(sweeps, 0), runs[0].said["groups"], *whole, *memory, *outcome))
    if THEIRS in found:
        pairs = [(label, found[name]) for name, label in labels.items() if name != THEIRS]
        lines += ["", row("rebasin / ours", "to rebased weights", "CPU", "peak memory")]
        lines.append(row("---", *["---:"] * 3))
        for label, runs in pairs:
            both = [quotients(said(found[THEIRS], key), said(runs, key)) for key in ("seconds", "cpu", "peak_mb")]
            lines.append(row(label, *(spread(values, 2) for values in both)))
    before = found[OURS][0].said["before"]
    return [
        *lines,
        "",
        f"Distance of the parameters before: {before:.2f}. MB before: the peak with both networks in memory and one "
        "forward done; peak: when the weights are there. First use: imports and a network of two layers, before the "
        "clock runs. Process: from start to exit, all included. CPU: of all threads, while the "
        "clock runs. BatchNorm is not measured anew on either side.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merganser-benchmark")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="small networks; the targets are for the large ones")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--only-peer", action="store_true", help="ResNet-18 alone, both sides")
    parser.add_argument("--peer-python", type=Path, help="an environment that has the peer already")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    sizes = SMALL if args.small else Sizes()
    args.work.mkdir(parents=True, exist_ok=True)
    compared = (THEIRS, OURS, UNCHECKED)
    names = [n for n in RUNS if not (args.no_peer and n == THEIRS) and not (args.only_peer and n not in compared)]
    pythons = dict.fromkeys(names, sys.executable)
    if not args.no_peer:
        pythons[THEIRS] = str(args.peer_python or environment(args.work.resolve() / "rebasin-env", PEER))

    def runner(name: str) -> Callable[[], Run]:
        script = Path(__file__).with_name("_align_runs.py").resolve()
        command = [pythons[name], str(script), name, "--threads", str(args.threads)]
        orders = itertools.count()
        more = ["--small"] * args.small
        return lambda: measure([*command, *more, "--order", str(next(orders))], args.threads)

    found = interleave(args.rounds, {name: runner(name) for name in names})
    versions = " and ".join(sorted({run.said["torch"] for runs in found.values() for run in runs}))
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    text = "\n".join(
        [
            "### Time of alignment" + ", in miniature: the targets are not for this" * args.small,
            "",
            f"{os.cpu_count()} cores ({platform.machine()}), {threads}, Python {platform.python_version()}, "
            f"torch {versions}; median (least-most) of {args.rounds} rounds in turn; MB = 10^6 bytes.",
            "",
            *target_table(found, sizes),
            *apart(found),
            *peer_table(found),
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()

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
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fold import Run, interleave, measure, row, spread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merganser.symmetry import Spec

PEER = ("torch==2.13.0", "rebasin==0.0.47")
OURS, UNCHECKED, THEIRS = "resnet18", "resnet18-unchecked", "rebasin"


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        units: of each of two networks that are zipped.
        width: of ResNet-20, in multiples of 16 channels.
        images: to compare activations on.
        batch: images of one batch.
        vit: width and layers.
        channels: of ResNet-18's first stage.
        order: seed of the order of groups, where sides are compared.
        picture: side of a picture for ViT and ResNet-18.
    """

    units: int = 512
    width: int = 4
    images: int = 1000
    batch: int = 100
    vit: tuple[int, int] = (384, 12)
    channels: int = 64
    picture: int = 224
    order: int = 0


SMALL = Sizes(units=64, width=1, images=40, batch=20, vit=(96, 2), channels=8, picture=64)


# measured processes


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def peak_mb() -> float:
    """Largest resident set of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def state(network: nn.Module) -> dict[str, Tensor]:
    """Tensors by name, not copied."""
    return {name: x.detach() for name, x in network.state_dict().items()}


def distance(one: nn.Module, two: nn.Module) -> float:
    """Frobenius norm of the difference of all parameters."""
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return sum(float((a.detach().double() - b.detach().double()).square().sum()) for a, b in pairs) ** 0.5


def resnet20(seed: int, width: int) -> nn.Module:
    """ResNet-20 for 32x32 pictures, random weights."""
    import torch
    from _resnet18 import stage
    from torch import nn

    torch.manual_seed(seed)
    a, b, c = (width * channels for channels in (16, 32, 64))
    stem = [nn.Conv2d(3, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(inplace=True)]
    stages = [stage(a, a, 1, 3), stage(a, b, 2, 3), stage(b, c, 2, 3)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)).eval()


def matching(spec: Spec, one: nn.Module, two: nn.Module) -> dict[str, Any]:
    """Weight matching until nothing changes."""
    from merganser.align.costs import WeightCosts
    from merganser.align.match import match

    seconds, matched = timed(lambda: match(spec, WeightCosts(spec, state(one), state(two))))
    return {"seconds": seconds, "sweeps": matched.sweeps, "settled": matched.settled}


def two_layers(seed: int) -> nn.Module:
    """The least that has units to move."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def warm_up(peer: bool) -> None:
    """All of it on a network of two layers."""
    import torch

    one, two, x = two_layers(0), two_layers(1), torch.randn(2, 3)
    if peer:
        from rebasin import PermutationCoordinateDescent

        PermutationCoordinateDescent(one, two, x).rebasin()
    else:
        from merganser.symmetry import symmetries

        matching(symmetries(one, (x,)).spec, one, two)


def run_zip(sizes: Sizes) -> dict[str, Any]:
    """Greedy zip of two networks; the median of five."""
    import torch

    from merganser.align.zip import zip_units

    count = 2 * sizes.units
    shown = torch.randn(count, 2 * count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    similarity = torch.corrcoef(shown)
    return {"seconds": statistics.median(timed(lambda: zip_units(similarity, 2))[0] for _ in range(5))}


def run_resnet20(sizes: Sizes) -> dict[str, Any]:
    """Symmetries, and weight matching."""
    import torch

    from merganser.symmetry import symmetries

    one, two = (resnet20(seed, sizes.width) for seed in (0, 1))
    finding, found = timed(lambda: symmetries(one, (torch.randn(2, 3, 32, 32),)))
    return {"finding": finding, **matching(found.spec, one, two)}


def run_activations(sizes: Sizes) -> dict[str, Any]:
    """Statistics of activations, and the same two forwards alone; a batch of each before the clock runs."""
    import torch

    from merganser.align.activations import activation_costs
    from merganser.symmetry import symmetries

    one, two = (resnet20(seed, sizes.width) for seed in (0, 1))
    images = torch.randn(sizes.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [((x,), {}) for x in images.split(sizes.batch)]
    found = symmetries(one, batches[0][0], check=False)

    def forwards(several: Sequence[Any]) -> None:
        with torch.no_grad():
            for args, _ in several:
                one(*args)
                two(*args)

    forwards(batches[:1])
    activation_costs(found, one, two, batches[:1])
    alone, _ = timed(lambda: forwards(batches))
    seconds, _ = timed(lambda: activation_costs(found, one, two, batches))
    return {"seconds": seconds, "forwards": alone}


def run_vit(sizes: Sizes) -> dict[str, Any]:
    """Symmetries, and weight matching, of ViT-S/16."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from merganser.symmetry import symmetries

    width, layers = sizes.vit
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=4 * width,
        image_size=sizes.picture,
    )

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ViTForImageClassification(config).eval()

    one, two = network(0), network(1)
    pictures = {"pixel_values": torch.randn(1, 3, sizes.picture, sizes.picture)}
    finding, found = timed(lambda: symmetries(one, (), pictures))
    return {"finding": finding, **matching(found.spec, one, two)}


def rebased(sizes: Sizes, rebase: Callable[[nn.Module, nn.Module, Tensor], dict[str, Any]]) -> dict[str, Any]:
    """Time of bringing one ResNet-18 into the order of another, and what that did to it."""
    import torch
    from _resnet18 import resnet18

    one, two = (resnet18(seed, sizes.channels) for seed in (0, 1))
    x = torch.randn(1, 3, sizes.picture, sizes.picture, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = two(x)
    said = {"before": distance(one, two), "start_mb": peak_mb()}
    seconds, more = timed(lambda: rebase(one, two, x))
    said |= {"seconds": seconds, "peak_mb": peak_mb(), "after": distance(one, two), **more}
    with torch.no_grad():
        after = two(x)
    return {**said, "change": float((after - before).abs().max() / before.abs().max())}


def run_ours(sizes: Sizes, *, check: bool = True) -> dict[str, Any]:
    """Ours on ResNet-18."""
    import torch

    from merganser.align.costs import WeightCosts
    from merganser.align.match import match
    from merganser.symmetry import symmetries

    def rebase(one: nn.Module, two: nn.Module, x: Tensor) -> dict[str, Any]:
        finding, found = timed(lambda: symmetries(one, (x,), check=check))
        spec, tensors = found.spec, state(two)
        matched = match(spec, WeightCosts(spec, state(one), tensors), seed=sizes.order)
        with torch.no_grad():
            two.load_state_dict({n: spec.apply(matched.orders, n, t) for n, t in tensors.items()})
        return {"finding": finding, "sweeps": matched.sweeps, "groups": len(spec.groups)}

    return rebased(sizes, rebase)


def run_rebasin(sizes: Sizes) -> dict[str, Any]:
    """The peer on ResNet-18; its sweeps are counted on the way."""
    import torch
    from rebasin import PermutationCoordinateDescent

    class Counted(PermutationCoordinateDescent):
        sweeps = 0

        def _calculate_permutations_step(self, *args: Any) -> bool:
            self.sweeps += 1
            return super()._calculate_permutations_step(*args)

    def rebase(one: nn.Module, two: nn.Module, x: Tensor) -> dict[str, Any]:
        finding, descent = timed(lambda: Counted(one, two, x))
        torch.manual_seed(sizes.order)  # it draws orders from torch's global generator
        descent.rebasin()
        groups = len(descent.pinit.model_graph.permutation_to_info)
        return {"finding": finding, "sweeps": descent.sweeps, "groups": groups}

    return rebased(sizes, rebase)


RUNS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "zip": run_zip,
    "resnet20": run_resnet20,
    "activations": run_activations,
    "vit": run_vit,
    THEIRS: run_rebasin,
    OURS: run_ours,
    UNCHECKED: lambda sizes: run_ours(sizes, check=False),
}


def one_run(name: str, sizes: Sizes, threads: int) -> None:
    """What a measured process does."""
    import torch

    torch.set_num_threads(threads)
    warm, _ = timed(lambda: warm_up(name == THEIRS))
    print(json.dumps(RUNS[name](sizes) | {"torch": torch.__version__, "warm": warm}))


# the process that starts them


def peer_python(work: Path, given: Path | None) -> str:
    """The interpreter of the peer's environment, which is made once."""
    if given:
        return str(given)
    folder = work / "rebasin-env"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (folder / "ready").exists():
        print("making the peer's environment ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER], check=True)
        (folder / "ready").touch()
    return str(python)


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
    head = ("ResNet-18", "to rebased weights s", "of it tracing s", "sweeps", "groups", "first use s", "process s")
    more = ("peak MB", "MB before", "distance after", "output changed by", "s a sweep")
    lines = ["", row(*head, *more), row("---", *["---:"] * 11)]
    for label, runs in shown.items():
        sweeps = said(runs, "sweeps")
        matching_s = [run.said["seconds"] - run.said["finding"] for run in runs]
        times = [spread(said(runs, "seconds"), 2), spread(said(runs, "finding"), 2)]
        whole = [spread(said(runs, "warm"), 2), spread([r.wall_s for r in runs])]
        memory = [spread(said(runs, key), 0) for key in ("peak_mb", "start_mb")]
        outcome = [spread(said(runs, "after"), 2), f"{max(said(runs, 'change')):.0e}"]
        outcome.append(spread(quotients(matching_s, sweeps), 2))
        lines.append(row(label, *times, spread(sweeps, 0), runs[0].said["groups"], *whole, *memory, *outcome))
    if THEIRS in found:
        pairs = [(label, found[name]) for name, label in labels.items() if name != THEIRS]
        lines += ["", row("rebasin / ours", "to rebased weights", "peak memory"), row("---", "---:", "---:")]
        for label, runs in pairs:
            both = [quotients(said(found[THEIRS], key), said(runs, key)) for key in ("seconds", "peak_mb")]
            lines.append(row(label, *(spread(values, 2) for values in both)))
    before = found[OURS][0].said["before"]
    return [
        *lines,
        "",
        f"Distance of the parameters before: {before:.2f}. MB before: the peak with both networks in memory and one "
        "forward done; peak: when the weights are there. First use: imports and a network of two layers, before the "
        "clock runs. Process: from start to exit, all included. BatchNorm is not measured anew on either side.",
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
    parser.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--order", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = replace(SMALL if args.small else Sizes(), order=args.order)
    if args.measure:
        one_run(args.measure, sizes, args.threads)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    compared = (THEIRS, OURS, UNCHECKED)
    names = [n for n in RUNS if not (args.no_peer and n == THEIRS) and not (args.only_peer and n not in compared)]
    pythons = dict.fromkeys(names, sys.executable)
    if not args.no_peer:
        pythons[THEIRS] = peer_python(args.work.resolve(), args.peer_python)

    def runner(name: str) -> Callable[[], Run]:
        command = [pythons[name], str(Path(__file__).resolve()), "--measure", name, "--threads", str(args.threads)]
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

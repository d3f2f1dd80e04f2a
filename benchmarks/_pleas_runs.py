"""The measured processes of `pleas.py`: python _pleas_runs.py NAME --threads N [--small]."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _align_runs import peak_mb, resnet20, timed

if TYPE_CHECKING:
    from _pleas_adam import Problem
    from torch import Tensor, nn

    from merganser.align.partial import Pair

BUDGETS = (1.0, 1.2, 1.55, 1.8, 2.0)
STAGES = ("symmetries", "BatchNorm", "matching", "groups", "gains", "splits", "refit")


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        budget: of the network that is fitted, in parents' FLOPs.
        another: budget that is solved for from the same statistics.
        width: of ResNet-20, in multiples of 16 channels.
        images: for ResNet-20.
        batch: of these.
        channels: of ResNet-50's stem.
        depths: blocks of its stages.
        pictures: for ResNet-50.
        side: of these.
        few: pictures of one run of it.
        steps: of Adam.
        tried: steps of Adam on ResNet-50, of which one's time is told.
        repeats: of a measured forward.
    """

    budget: float = 1.2
    another: float = 1.55
    width: int = 1
    images: int = 1000
    batch: int = 100
    channels: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 3)
    pictures: int = 200
    side: int = 224
    few: int = 10
    steps: int = 400
    tried: int = 4
    repeats: int = 15


SMALL = Sizes(images=120, batch=40, channels=8, depths=(1, 1, 1, 1), pictures=24, side=64, few=8, steps=10, repeats=3)


def pictures(count: int, side: int, seed: int) -> Tensor:
    """Noise of several scales, so that neighbours are alike as in pictures.

    Returns:
        Shape (count, 3, side, side), variance 1.
    """
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, 3, side, side)
    cell = side
    while cell >= 2:
        coarse = torch.randn(count, 3, -(-side // cell), -(-side // cell), generator=generator)
        x += functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        cell //= 2
    return (x - x.mean()) / x.std()


def batches(x: Tensor, size: int) -> list[Any]:
    """Inputs as a pair of networks takes them."""
    return [((part,), {}) for part in x.split(size)]


class Clock:
    """Seconds by stage, and the largest resident set during each, where Linux tells; else until then."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def __call__(self, stage: str, action: Callable[[], Any]) -> Any:
        """Do it and note what it took."""
        forget_peak()
        self.seconds[stage], result = timed(action)
        self.peaks[stage] = peak_since()
        return result


def forget_peak() -> None:
    """Let the kernel begin anew with the largest resident set of this process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_since() -> float:
    """MB of the largest resident set since `forget_peak`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return peak_mb()


def traced(network: nn.Module, first: Tensor) -> Any:
    """Symmetries, checked on two pictures, with what a batch's run shows of them."""
    from merganser.symmetry import symmetries

    found = symmetries(network, (first[:2],))
    return replace(found, taps=symmetries(network, (first,), check=False).taps)


def stages(networks: tuple[nn.Module, nn.Module], inputs: list[Any], way: Any, sizes: Sizes) -> dict[str, Any]:
    """From two networks and pictures in memory to one network, by stage."""
    from merganser.align.partial import Pair, Settings

    clock, before = Clock(), peak_mb()
    start = time.perf_counter()
    found = clock("symmetries", lambda: traced(networks[0], inputs[0][0][0]))
    pair: Pair = clock("BatchNorm", lambda: Pair(found, *networks, inputs, settings=Settings(way=way)))
    clock("matching", lambda: pair.b)
    clock("groups", lambda: (pair.groups, pair.layers))
    clock("gains", lambda: pair.gains)
    splits = clock("splits", lambda: pair.splits(sizes.budget))
    merged = clock("refit", lambda: pair.laid_out(splits))
    return {
        "seconds": time.perf_counter() - start,
        "stages": clock.seconds,
        "peaks": clock.peaks,
        "start_mb": before,
        "peak_mb": max(before, *clock.peaks.values()),
        "flops": merged.costs.flops / merged.costs.parent_flops,
        "parameters": merged.costs.parameters / merged.costs.parent_parameters,
        "fitted": len(merged.refitted.residuals),
        "residual": statistics.mean(merged.refitted.residuals.values()),
    }


def large(sizes: Sizes) -> tuple[tuple[nn.Module, nn.Module], list[Any]]:
    """The pair of ResNet-50's shape, and pictures."""
    from _resnet50 import resnet50

    one, two = (resnet50(seed, sizes.channels, sizes.depths) for seed in (0, 1))
    return (one, two), batches(pictures(sizes.pictures, sizes.side, 0), sizes.few)


def small(sizes: Sizes) -> tuple[tuple[nn.Module, nn.Module], list[Any]]:
    """The pair of ResNet-20's, and pictures."""
    one, two = (resnet20(seed, sizes.width) for seed in (0, 1))
    return (one, two), batches(pictures(sizes.images, 32, 0), sizes.batch)


def quick(networks: tuple[nn.Module, nn.Module], inputs: list[Any], rows: int = 2000) -> Pair:
    """A pair whose units are matched by weights, and valued by some rows of some pictures."""
    from merganser.align.partial import Pair, Settings
    from merganser.align.sequence import Sampling

    how = Settings(way="none", match="weights", sampling=Sampling(rows=rows))
    return Pair(traced(networks[0], inputs[0][0][0]), *networks, inputs, settings=how)


def problem(pair: Pair, budget: float) -> Problem:
    """What least squares and Adam both solve."""
    from _pleas_adam import problem_of

    return problem_of(pair, pair.splits(budget))


def run_closed(sizes: Sizes) -> dict[str, Any]:
    """Least squares on ResNet-20: statistics and solve; the order and the splits are there.

    `again` is the solve for another budget, from the same statistics.
    """
    networks, inputs = small(sizes)
    pair = quick(networks, inputs)
    asked, another = (problem(pair, budget) for budget in (sizes.budget, sizes.another))
    statistics_s, moments = timed(asked.measured)
    solve_s, tensors = timed(lambda: asked.solved(moments))
    again_s, _ = timed(lambda: another.solved(moments))
    parts = {"seconds": statistics_s + solve_s, "statistics": statistics_s, "solve": solve_s, "again": again_s}
    return {**parts, **asked.judged(tensors, inputs, pictures(sizes.images, 32, 1))}


def run_adam(sizes: Sizes) -> dict[str, Any]:
    """Adam on the same.

    `parents` is what the parents' runs alone take in as many steps, and `anew` what Adam takes where their layers run
    again for the targets; both from some of the steps.
    """
    from _pleas_adam import BATCH

    networks, inputs = small(sizes)
    asked = problem(quick(networks, inputs), sizes.budget)
    seconds, tensors = timed(lambda: asked.descended(sizes.steps))
    start = asked.judged(asked.start(), inputs, pictures(sizes.images, 32, 1))
    found = asked.judged(tensors, inputs, pictures(sizes.images, 32, 1))
    some, x = -(-sizes.steps // 10), inputs[0][0][0][:BATCH]
    parents = sum(timed(lambda: bool(asked.seen(x)))[0] for _ in range(some))
    anew, _ = timed(lambda: asked.descended(some, anew=True))
    parts = {"seconds": seconds, "parents": parents * sizes.steps / some, "anew": anew * sizes.steps / some}
    return {**parts, **found, "start": start}


def run_large_adam(sizes: Sizes) -> dict[str, Any]:
    """Seconds of one step of Adam on ResNet-50; the first one is not counted."""
    networks, inputs = large(replace(sizes, pictures=sizes.few))
    asked = problem(quick(networks, inputs), sizes.budget)
    first, _ = timed(lambda: asked.descended(1))
    several, _ = timed(lambda: asked.descended(1 + sizes.tried))
    return {"step": (several - first) / sizes.tried, "peak_mb": peak_mb()}


def sized(networks: tuple[nn.Module, nn.Module], inputs: list[Any], x: Tensor, repeats: int) -> dict[str, Any]:
    """Time of a run, and bytes, of networks of several budgets, as blocks and densely built, against the parents.

    `steps` are blocks of which 16 channels at a time were kept apart.
    """
    import torch

    pair = quick(networks, inputs)
    runs: dict[str, Callable[[], Any]] = {
        "one parent": lambda: pair.one(x),
        "two parents": lambda: (pair.one(x), pair.two(x)),
    }
    nbytes = {"one parent": held(pair.one), "two parents": held(pair.one) + held(pair.two)}
    counted = {"one parent": (1.0, 1.0), "two parents": (2.0, 2.0)}
    for budget in BUDGETS:
        merged = pair.merged(budget)
        costs = merged.costs
        share = costs.flops / costs.parent_flops, costs.parameters / costs.parent_parameters
        for kind, network in (("blocks", merged.blocks()), ("dense", merged.network)):
            runs[f"{kind} {budget:g}"] = lambda network=network: network(x)
            nbytes[f"{kind} {budget:g}"] = held(network)
            counted[f"{kind} {budget:g}"] = share
    pair.settings = replace(pair.settings, multiple=16)
    for budget in BUDGETS:
        merged = pair.merged(budget)
        costs, network = merged.costs, merged.blocks()
        runs[f"steps {budget:g}"] = lambda network=network: network(x)
        nbytes[f"steps {budget:g}"] = held(network)
        counted[f"steps {budget:g}"] = costs.flops / costs.parent_flops, costs.parameters / costs.parent_parameters
    keep_memory()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for name, run in runs.items():
                took, _ = timed(run)
                if turn:  # the first warms up
                    seconds[name].append(took)
    return {"ms": {n: 1000 * statistics.median(t) for n, t in seconds.items()}, "bytes": nbytes, "share": counted}


def keep_memory() -> None:
    """Let glibc keep up to 62 MB that are freed: 31 MB at once are the most that moves its threshold (mallopt(3)).

    Otherwise a wide network's tensors are given back to the system after every layer where a narrow one's are not, and
    asking for them again takes as long as some layers.
    """
    import torch

    torch.zeros(31 * 2**20, dtype=torch.uint8)


def held(network: nn.Module) -> int:
    """Bytes of what a network would save."""
    return sum(x.numel() * x.itemsize for x in network.state_dict().values())


def run_sizes_small(sizes: Sizes) -> dict[str, Any]:
    """ResNet-20's, by budget."""
    networks, inputs = small(sizes)
    return sized(networks, inputs, inputs[0][0][0][: 2 * sizes.few], 3 * sizes.repeats)


def run_sizes_large(sizes: Sizes) -> dict[str, Any]:
    """ResNet-50's, by budget."""
    networks, inputs = large(replace(sizes, pictures=sizes.few))
    return sized(networks, inputs, inputs[0][0][0][:8], -(-sizes.repeats // 2))


def warm_up() -> None:
    """All of it on a network of four layers, so that what is imported late is not counted."""
    import torch
    from torch import nn

    def tiny(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*stem, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()

    networks, inputs = (tiny(0), tiny(1)), batches(torch.randn(16, 3, 4, 4), 8)
    for way in ("sequence", "layers"):
        stages(networks, inputs, way, Sizes(budget=1.5))
    asked = problem(quick(networks, inputs), 1.5)
    asked.descended(2, anew=True)
    asked.solved(asked.measured())


RUNS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "resnet20": lambda sizes: stages(*small(sizes), "sequence", sizes),
    "closed": run_closed,
    "adam": run_adam,
    "resnet50-layers": lambda sizes: stages(*large(sizes), "layers", sizes),
    "resnet50-sequence": lambda sizes: stages(*large(sizes), "sequence", sizes),
    "resnet50-adam": run_large_adam,
    "sizes20": run_sizes_small,
    "sizes50": run_sizes_large,
}


def one_run(name: str, sizes: Sizes, threads: int) -> None:
    """What a measured process does."""
    import_module("merganser")  # before torch and numpy, as the command does: it sets how these wait and allocate
    import torch

    torch.set_num_threads(threads)
    warm, _ = timed(warm_up)
    print(json.dumps(RUNS[name](sizes) | {"torch": torch.__version__, "warm": warm}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    one_run(given.name, SMALL if given.small else Sizes(), given.threads)

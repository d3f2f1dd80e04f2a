"""The measured processes of `align.py`: python _align_runs.py NAME --threads N [--small] [--order SEED]."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merganser.symmetry import Spec

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
    cpu = time.process_time()
    seconds, more = timed(lambda: rebase(one, two, x))
    cpu = time.process_time() - cpu
    said |= {"seconds": seconds, "cpu": cpu, "peak_mb": peak_mb(), "after": distance(one, two), **more}
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--order", type=int, default=0)
    given = parser.parse_args()
    one_run(given.name, replace(SMALL if given.small else Sizes(), order=given.order), given.threads)

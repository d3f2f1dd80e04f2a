"""Networks that nobody here trained: pairs and all of them merged at the middle, by every kind of alignment.

    python benchmarks/strangers.py --data DIR [--pairs 6] [--images 10000] [--out table.md]

DIR/weights holds checkpoints for CIFAR-10 by different people, DIR/cifar10_full.npz its pictures. Similarities are
measured on 1,000 training pictures, BatchNorm and REPAIR on 2,000 others, the balance of weights and activations is
chosen on 1,000 more by the distance to the parents' mean output; no label is used but for the scores.

Barrier: the largest over t of L((1-t) a + t b) - ((1-t) L(a) + t L(b)), L the mean cross entropy, t = 1/4, 1/2, 3/4.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cifar import LeNet, ResNet
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import activation_costs
from merganser.align.balancing import choose_balance
from merganser.align.costs import DualCosts, WeightCosts
from merganser.align.many import mean_of, merge_many, star
from merganser.align.match import match
from merganser.align.renorm import layer_statistics, repair, reset_batch_norm
from merganser.align.universe import universe
from merganser.align.zipping import zip_networks
from merganser.checkpoints import open_source
from merganser.symmetry import symmetries

FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...], tuple[float, ...]]] = {
    "resnet20": (lambda: ResNet(3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "resnet56": (lambda: ResNet(9), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "lenet": (LeNet, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
BATCH = 250
PLACES = (0.25, 0.5, 0.75)
State = dict[str, Tensor]


class Family:
    """Checkpoints of one architecture, and the pictures as they take them."""

    def __init__(self, name: str, data: Path, images: int) -> None:
        make, mean, deviation = FAMILIES[name]
        with np.load(data / "cifar10_full.npz", allow_pickle=False) as file:
            train, test = (
                (opened(file, part, count) - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
                for part, count in (("train", 4000), ("test", images))
            )
            self.labels = torch.from_numpy(file["y_test"]).long()[:images]
        self.test = list(zip(test.split(BATCH), self.labels.split(BATCH), strict=True))
        self.compared, self.held, self.measured = (
            [((x,), {}) for x in part.split(BATCH)] for part in (train[:1000], train[1000:2000], train[2000:])
        )
        self.networks: list[nn.Module] = []
        for path in sorted((data / "weights" / f"{name}_cifar10").glob("*.safetensors")):
            source, network = open_source(str(path)), make()
            network.load_state_dict({n: source.read(n) for n in source.infos}, strict=False)
            self.networks.append(network.eval())
        self.found = symmetries(self.networks[0], *self.compared[0])

    @torch.no_grad()
    def judge(self, network: nn.Module) -> tuple[float, float]:
        """Accuracy in percent, and mean cross entropy."""
        right, loss = 0, 0.0
        for x, y in self.test:
            logits = network(x)
            right += int((logits.argmax(1) == y).sum())
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
        return 100 * right / len(self.labels), loss / len(self.labels)

    def of(self, state: State) -> nn.Module:
        """A network with these tensors."""
        network = copy.deepcopy(self.networks[0])
        network.load_state_dict(state)
        return network

    def renormed(self, network: nn.Module, parents: Sequence[nn.Module]) -> nn.Module:
        """With statistics from data: BatchNorm's, or REPAIR where there is none. Parents: in its order of units."""
        network = copy.deepcopy(network)
        if not reset_batch_norm(network, self.measured):
            repair(network, [layer_statistics(p, self.measured) for p in parents], self.measured)
        return network


def opened(file: Mapping[str, Any], part: str, count: int) -> Tensor:
    """The first pictures of a part, (count, 3, 32, 32), in [0, 1]."""
    packed, ends = file[f"bytes_{part}"].tobytes(), file[f"offsets_{part}"][: count + 1]
    pictures = [np.asarray(Image.open(io.BytesIO(packed[a:b])).convert("RGB")) for a, b in pairwise(ends)]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous().float() / 255


def between(family: Family, states: Sequence[State], t: float) -> State:
    """(1 - t) a + t b."""
    a, b = states
    return {n: torch.lerp(x, b[n], t) if x.is_floating_point() else x for n, x in a.items()}


def orders_of(family: Family, one: nn.Module, two: nn.Module) -> dict[str, State]:
    """Orders of the second network, by method."""
    spec = family.found.spec
    a, b = ({n: x.detach() for n, x in net.state_dict().items()} for net in (one, two))
    seen = activation_costs(family.found, one, two, family.compared)
    start = match(spec, seen).orders
    alike = WeightCosts(spec, a, b, "pearson")
    found: dict[float, State] = {}

    def merge(balance: float) -> nn.Module:
        found[balance] = match(spec, DualCosts(alike, seen, balance), start=start).orders
        ordered = ordered_state(family, b, found[balance])
        return family.renormed(family.of(between(family, (a, ordered), 0.5)), [one, family.of(ordered)])

    chosen = choose_balance(merge, [one, two], family.held)
    return {
        "naive": spec.identity(),
        "weights (Git Re-Basin)": match(spec, WeightCosts(spec, a, b)).orders,
        "activations": start,
        "both (MuDSC), balance without labels": found[chosen.balance],
    }


def ordered_state(family: Family, state: State, orders: State) -> State:
    """A network's tensors in another order."""
    return {n: family.found.spec.apply(orders, n, x) if n in family.found.spec.axes else x for n, x in state.items()}


def one_pair(family: Family, one: nn.Module, two: nn.Module) -> dict[str, tuple[float, ...]]:
    """Accuracy at the middle and barrier, as it is and with statistics from data, by method."""
    a, b = ({n: x.detach() for n, x in net.state_dict().items()} for net in (one, two))
    (_, loss_a), (_, loss_b) = family.judge(one), family.judge(two)
    rows: dict[str, tuple[float, ...]] = {}
    for method, orders in orders_of(family, one, two).items():
        ordered = ordered_state(family, b, orders)
        parents, numbers = [one, family.of(ordered)], []
        for renorm in (False, True):
            barrier, middle = -np.inf, 0.0
            for t in PLACES:
                network = family.of(between(family, (a, ordered), t))
                if renorm:
                    network = family.renormed(network, parents)
                accuracy, loss = family.judge(network)
                barrier = max(barrier, loss - ((1 - t) * loss_a + t * loss_b))
                middle = accuracy if t == 0.5 else middle
            numbers += [middle, float(barrier)]
        rows[method] = tuple(numbers)
    for label, balance in (("zip by activations (ZipIt)", 0.0), ("zip by both, balance 0.5 (MuDSC)", 0.5)):
        numbers = []
        for renorm in (False, True):
            zipped = zip_networks(family.found, [one, two], family.compared, balance=balance, repairs=renorm)
            count = reset_batch_norm(zipped, family.measured)
            numbers += [np.nan if count and not renorm else family.judge(zipped)[0], np.nan]
        rows[label] = tuple(numbers)
    return rows


def all_at_once(family: Family) -> dict[str, tuple[float, ...]]:
    """Accuracy of the mean of all networks, as it is and with statistics from data, by method."""
    spec = family.found.spec
    states = [{n: x.detach() for n, x in net.state_dict().items()} for net in family.networks]
    rows = {}
    for method, make in {
        "naive": lambda: [spec.identity()] * len(states),
        "each to the first (star)": lambda: star(spec, states),
        "MergeMany": lambda: merge_many(spec, states),
        "C2M3, rounded": lambda: universe(spec, states, starts=1, improve=False).orders,
        "C2M3, three starts, coordinate ascent": lambda: universe(spec, states).orders,
    }.items():
        began = time.perf_counter()
        orders = make()
        seconds = time.perf_counter() - began
        merged = family.of(mean_of(spec, states, orders))
        parents = [family.of(ordered_state(family, s, o)) for s, o in zip(states, orders, strict=True)]
        rows[method] = (family.judge(merged)[0], family.judge(family.renormed(merged, parents))[0], seconds)
    return rows


def cell(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over pairs."""
    if any(np.isnan(values)):
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def report(name: str, data: Path, pairs: int, images: int) -> list[str]:
    """The tables of one family."""
    began = time.perf_counter()
    family = Family(name, data, images)
    own = [family.judge(net)[0] for net in family.networks]
    chosen = list(combinations(range(len(own)), 2))
    chosen = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))[:pairs]]
    found = [one_pair(family, family.networks[i], family.networks[j]) for i, j in chosen]
    lines = [
        f"### {name}: {len(own)} networks, accuracy {min(own):.1f} to {max(own):.1f}",
        "",
        f"{len(chosen)} pairs: {', '.join(f'{i}+{j}' for i, j in sorted(chosen))}; {len(family.labels)} test pictures; "
        f"mean ± standard deviation over pairs.",
        "",
    ]
    if found:
        lines += ["| | middle, % | barrier | middle, statistics from data | barrier |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for method in found[0] if found else ():
        cells = [cell([pair[method][i] for pair in found], d) for i, d in enumerate((1, 2, 1, 2))]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| all at once | as it is, % | statistics from data | s |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {m} | {a:.1f} | {b:.1f} | {s:.1f} |" for m, (a, b, s) in all_at_once(family).items()]
    return [*lines, "", f"{time.perf_counter() - began:.0f} s.", ""]


def main() -> None:
    """All families, and their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_full.npz and weights/")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="by default all")
    parser.add_argument("--pairs", type=int, default=6, help="0: all at once alone")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for needed in (args.data / "cifar10_full.npz", args.data / "weights"):
        if not needed.exists():
            parser.error(f"{needed} does not exist")
    lines: list[str] = []
    for name in args.family or FAMILIES:
        lines += report(name, args.data, args.pairs, args.images)
        print("\n".join(lines), flush=True)
        if args.out:
            args.out.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    main()

"""What aligning is worth: MNIST in two halves of five classes, two MLPs from different starts, one merged network.

    python benchmarks/alignment.py --data DIR [--splits 5] [--out table.md]

Every network gives an embedding of 64 numbers; logits are 16 times its cosine with fixed orthonormal codes of the
classes, trained on its own five. Joint: argmax over all ten; task: over the five of the digit's own half. The balance
of weights and activations is chosen on training examples that were held out, never on test digits.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import activation_costs
from merganser.align.balancing import choose_balance
from merganser.align.costs import DualCosts, WeightCosts
from merganser.align.many import mean_of
from merganser.align.match import match
from merganser.align.renorm import reset_batch_norm
from merganser.align.zipping import zip_networks
from merganser.symmetry import symmetries

WIDTH, EPOCHS, BATCH, HELD_OUT = 512, 20, 125, 1000
BALANCES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Digits:
    """Pictures as rows of numbers, and labels."""

    x: Tensor
    y: Tensor

    def of(self, classes: Tensor) -> Digits:
        """Those of some classes."""
        chosen = torch.isin(self.y, classes)
        return Digits(self.x[chosen], self.y[chosen])


def mlp(pixels: int, seed: int) -> nn.Sequential:
    """Three hidden layers with BatchNorm."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (pixels, WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 64))


def logits(network: nn.Module, x: Tensor, codes: Tensor) -> Tensor:
    """Sixteen times the cosines with the codes of all classes."""
    return 16 * functional.normalize(network(x), dim=1) @ codes.T


def train(network: nn.Module, digits: Digits, classes: Tensor, codes: Tensor, seed: int) -> nn.Module:
    """Adam with a cosine schedule, cross entropy over the network's own classes."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(digits.y) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    own = torch.searchsorted(classes, digits.y)
    network.train()
    for _ in range(EPOCHS):
        for places in torch.randperm(len(own), generator=generator)[: steps // EPOCHS * BATCH].split(BATCH):
            loss = functional.cross_entropy(logits(network, digits.x[places], codes[classes]), own[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def scores(answers: Tensor, digits: Digits, halves: list[Tensor]) -> tuple[float, float]:
    """Joint accuracy, and the mean over halves of the accuracy within a half, in percent."""
    joint = float((answers.argmax(1) == digits.y).double().mean())
    within = []
    for classes in halves:
        chosen = torch.isin(digits.y, classes)
        within.append(float((classes[answers[chosen][:, classes].argmax(1)] == digits.y[chosen]).double().mean()))
    return 100 * joint, 100 * sum(within) / len(within)


def one_split(train_set: Digits, test: Digits, split: int) -> dict[str, tuple[float, float]]:
    """Train two networks on halves of the classes, merge them in several ways, judge."""
    generator = torch.Generator().manual_seed(split)
    halves = [h.sort().values for h in torch.randperm(10, generator=generator).split(5)]
    codes = torch.linalg.qr(torch.randn(64, 10, generator=generator)).Q.T
    held, kept = (
        Digits(train_set.x[:HELD_OUT], train_set.y[:HELD_OUT]),
        Digits(train_set.x[HELD_OUT:], train_set.y[HELD_OUT:]),
    )
    one, two = (
        train(mlp(train_set.x.shape[1], 2 * split + i), kept.of(h), h, codes, split) for i, h in enumerate(halves)
    )
    batches = [((x,), {}) for x in kept.x[:5000].split(BATCH)]
    for network in (one, two):
        reset_batch_norm(network, batches)
    found = symmetries(one, *batches[0])
    a, b = ({n: x.detach() for n, x in network.state_dict().items()} for network in (one, two))

    def merged(orders: dict[str, Tensor]) -> nn.Module:
        network = copy.deepcopy(one)
        network.load_state_dict(mean_of(found.spec, [a, b], [found.spec.identity(), orders]))
        reset_batch_norm(network, batches)
        return network

    def judged(network: nn.Module, digits: Digits) -> tuple[float, float]:
        with torch.no_grad():
            return scores(logits(network, digits.x, codes), digits, halves)

    weights, alike = (WeightCosts(found.spec, a, b, kind) for kind in ("frobenius", "pearson"))
    seen = activation_costs(found, one, two, batches[:8])
    start = match(found.spec, seen).orders
    dual = {x: merged(match(found.spec, DualCosts(alike, seen, x), start=start).orders) for x in BALANCES}
    best = max(BALANCES, key=lambda x: judged(dual[x], held)[0])
    unseen = [((held.x,), {})]
    without = choose_balance(dual.__getitem__, [one, two], unseen, balances=BALANCES)
    zips = {x: zip_networks(found, [one, two], batches[:8], balance=x) for x in (0.0, *BALANCES)}
    chosen = choose_balance(zips.__getitem__, [one, two], unseen, balances=list(zips))
    labelled = max(zips, key=lambda x: judged(zips[x], held)[0])
    with torch.no_grad():
        both = [logits(network, test.x, codes) for network in (one, two)]
        ensemble = torch.stack([functional.softmax(z, 1) for z in both]).sum(0)
    own = [scores(z[torch.isin(test.y, h)], test.of(h), [h])[1] for z, h in zip(both, halves, strict=True)]
    return {
        "networks, each on its own half": (float("nan"), sum(own) / len(own)),
        "both, softmax summed": scores(ensemble, test, halves),
        "average": judged(merged(found.spec.identity()), test),
        "aligned by weights (Git Re-Basin)": judged(merged(match(found.spec, weights).orders), test),
        "aligned by weights, Pearson": judged(merged(match(found.spec, alike).orders), test),
        "aligned by activations": judged(merged(start), test),
        "aligned by both (MuDSC), balance by held-out joint accuracy": judged(dual[best], test),
        "aligned by both (MuDSC), balance without labels": judged(without.network, test),
        "zipped by activations (ZipIt), repeat 0.5": judged(zips[0.0], test),
        "zipped by both (MuDSC), balance by held-out joint accuracy": judged(zips[labelled], test),
        "zipped by both (MuDSC), balance without labels": judged(chosen.network, test),
        "balance": (best, float("nan")),
        "balance without labels": (without.balance, float("nan")),
        "balance of the zip": (labelled, float("nan")),
        "balance of the zip without labels": (chosen.balance, float("nan")),
    }


def main() -> None:
    """All splits, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    with np.load(args.data / "mnist.npz", allow_pickle=False) as file:
        sets = []
        for part in ("train", "test"):
            x = torch.from_numpy(file[f"x_{part}"]).float().flatten(1) / 127.5 - 1
            sets.append(Digits(x, torch.from_numpy(file[f"y_{part}"].astype(np.int64))))
    rows = [one_split(*sets, split) for split in range(args.splits)]
    lines = ["| | joint % | task % |", "| --- | ---: | ---: |"]
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        mean, deviation = values.mean(0), values.std(0) if len(rows) > 1 else torch.zeros(2)
        if name.startswith("balance"):
            lines.append(f"\nChosen, {name}: {', '.join(f'{row[name][0]:.1f}' for row in rows)}.")
        else:
            cells = [
                "" if math.isnan(m) else f"{m:.1f} ± {d:.1f}"
                for m, d in zip(mean.tolist(), deviation.tolist(), strict=True)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = f"{len(sets[0].y):,} training and {len(sets[1].y):,} test digits"
    lines.append(
        f"\nn = {len(rows)} splits (seeds 0 to {len(rows) - 1}), {sizes}, {time.perf_counter() - began:.0f} s."
    )
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Float32 or float64 sums? The same random adds, removals and reweightings in both, against sums made from scratch.

    python benchmarks/sums.py [--experts 8] [--moves 50] [--seed 0] [--out FILE]

Prints, for each type of the sums on disk: state bytes, the largest error of the sums and of each export relative to the
largest entry, after the moves, and the same after everything but the first expert was removed again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merganser import Fold

SHAPES = {
    "attention.weight": (512, 512),
    "up.weight": (1024, 256),
    "down.weight": (256, 1024),
    "norm.weight": (512,),
    "conv.weight": (64, 32, 3, 3),
}
EXPORTS = {"mean": {}, "iso_c": {}, "gram .1": {"eps": 0.1}, "gram .01": {"eps": 0.01}, "gram .001": {"eps": 0.001}}


def write_models(folder: Path, experts: int, seed: int) -> list[str]:
    """A base, and experts of low-rank plus dense change whose norms spread over a factor of 10."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in SHAPES.items()}
    names = [f"expert-{i}" for i in range(experts)]
    for i, name in enumerate(["base", *names]):
        model = dict(base)
        if name != "base":
            size = 10 ** (i / experts) * 1e-3
            for key, shape in SHAPES.items():
                flat = model[key].reshape(shape[0], -1)
                low = torch.randn(flat.shape[0], 8, generator=generator) @ torch.randn(
                    8, flat.shape[1], generator=generator
                )
                noise = torch.randn(flat.shape, generator=generator)
                model[key] = (flat + size * (low / 3 + 0.2 * noise)).reshape(shape)
        (folder / name).mkdir(parents=True)
        save_file(model, folder / name / "model.safetensors")
    return names


def sums_of(fold: Fold) -> dict[str, torch.Tensor]:
    """The slots of a state, in float64."""
    return {k: v.double() for k, v in load_file(fold.path / fold.ledger.sums / "sums.safetensors").items()}


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference relative to the largest entry, over all tensors."""
    return max(float((found[k].double() - w.double()).abs().max() / w.double().abs().max()) for k, w in wanted.items())


def export_changes(fold: Fold, folder: Path, base: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The merged change by every method, in float64."""
    changes = {}
    for label, settings in EXPORTS.items():
        fold.export(folder / label, label.split()[0], dtype="F64", overwrite=True, **settings)
        model = load_file(folder / label / "model.safetensors")
        changes[label] = {k: model[k].double() - base[k].double() for k in base}
    return changes


def run(folder: Path, sums: str, experts: int, moves: int, seed: int) -> dict[str, float]:
    """One type of sums through all moves."""
    names = write_models(folder, experts, seed)
    base = load_file(folder / "base" / "model.safetensors")
    fold = Fold.init(folder / "base", folder / "state", "gram", sums_dtype=sums)
    began = time.perf_counter()
    dice, weights = random.Random(seed), dict.fromkeys(names, 1.0)
    for name in names:
        fold.add(folder / name)
    for _ in range(moves):
        name = dice.choice(names)
        if name not in weights:
            weights[name] = dice.uniform(0.2, 3)
            fold.add(folder / name, weight=weights[name])
        elif dice.random() < 0.5 and len(weights) > 2:
            del weights[name]
            fold.remove(name)
        else:
            weights[name] = dice.uniform(0.2, 3)
            fold.reweight(name, weights[name])
    seconds = time.perf_counter() - began
    result = {"state bytes": float(fold.state_bytes), "s a move": seconds / (experts + moves)}
    result |= compare(folder, fold, weights, base, "after the moves")
    first = next(iter(weights))
    for name in list(weights)[1:]:
        fold.remove(name)
    return result | compare(folder, fold, {first: weights[first]}, base, "all but one removed")


def compare(
    folder: Path, fold: Fold, weights: dict[str, float], base: dict[str, torch.Tensor], when: str
) -> dict[str, float]:
    """Errors against a state of the same experts made from scratch, in float64 throughout."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        exact = Fold.init(folder / "base", Path(scratch) / "state", "gram", float64=True)
        for name, weight in weights.items():
            exact.add(folder / name, weight=weight)
        found, wanted = export_changes(fold, folder / "out", base), export_changes(exact, Path(scratch), base)
        errors = {f"{when}: sums": error(sums_of(fold), sums_of(exact))}
        return errors | {f"{when}: {label}": error(found[label], wanted[label]) for label in EXPORTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--moves", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    columns = {}
    for sums in ("F32", "F64"):
        with tempfile.TemporaryDirectory() as folder:
            columns[sums] = run(Path(folder), sums, args.experts, args.moves, args.seed)
    head = f"{args.experts} experts, {args.moves} random moves, seed {args.seed}; largest error / largest entry"
    lines = [head, "", "| | F32 sums | F64 sums |", "|---|---|---|"]
    for row in columns["F32"]:
        shown = [f"{columns[s][row]:,.0f}" if row == "state bytes" else f"{columns[s][row]:.1e}" for s in columns]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Which symmetries of how many architectures are found, in what time: writes docs/results/symmetry.md.

    python benchmarks/symmetry.py

Every network of tests/symmetry is built at tiny size, traced, and checked twice: with the rules alone, and by the
self-check. "Unsound" counts groups that the rules gave and the check refused.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "symmetry"))

PAGE = """# Symmetries found by tracing

`python benchmarks/symmetry.py` on {date}, torch {torch}, transformers {transformers}, 1 thread: {count} architectures
at tiny size ([tests/symmetry](../../tests/symmetry)), one run each, random weights of seed 0.

- **{traced} of {count} are traced, {unsound} groups are unsound**: random elements of all groups together leave the
  float64 output as it is, every entry to 1e-9 of what other weights change it by.
- Coverage is the share of the parameters that some group moves: at least 95 % for {covered} of them. What cannot move
  is pinned by name: `merganser symmetry show MODEL --pinned`.
- log10 |G|: how many orders there are of the same function, as a power of ten.

| network | parameters | groups | coverage | log10 of G | s | operations without a rule |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
{rows}
"""


def size_of_group(found: object) -> float:
    """log10 of the number of orders."""
    total = 0.0
    spec = found.spec  # type: ignore[attr-defined]
    for group in spec.groups.values():
        if not group.fixed:
            places = spec.groups[group.within].size if group.within else 1
            total += places * float(torch.lgamma(torch.tensor(group.size + 1.0, dtype=torch.float64)))
    return total / 2.302585092994046


def main() -> None:
    """Trace them all."""
    warnings.simplefilter("ignore")
    import transformers
    from architectures import ARCHITECTURES

    from merganser.symmetry import symmetries

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, traced, unsound, covered = [], 0, 0, 0
    for name, make in ARCHITECTURES.items():
        network, args, kwargs = make()
        count = sum(p.numel() for p in network.parameters())
        began = time.perf_counter()
        found = symmetries(network, args, kwargs)
        seconds = time.perf_counter() - began
        traced += 1
        unsound += len(found.unsound)
        covered += found.coverage >= 0.95
        groups = sum(not g.fixed for g in found.spec.groups.values())
        cells = (name, f"{count:,}", groups, f"{found.coverage:.1%}", f"{size_of_group(found):.0f}", f"{seconds:.2f}")
        rows.append(f"| {' | '.join(map(str, cells))} | {', '.join(found.unknown)} |")
        print(rows[-1], flush=True)
    page = PAGE.format(
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        count=len(ARCHITECTURES),
        traced=traced,
        unsound=unsound,
        covered=covered,
        rows="\n".join(rows),
    )
    (ROOT / "docs" / "results" / "symmetry.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()

"""How much of Gram's state is needed: sums kept at a fraction of their rank, judged on the validation split of a study.

    python benchmarks/gram_sketch.py --study text8 --zoo zoo/text --data DIR

Full state: G (n x n) and B (m x n) a weight. Sketch of rank r: eigenvectors V (n x r) and eigenvalues of G, and B V
(m x r), cut back to r after every arrival; along what was cut off the changes add up, as the anchor says. Both are
exported as gram_anchored with its defaults, and judged on every tenth training example, which training left out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.continual.roles import assign_roles, is_matrix
from merganser.methods import gram_terms
from merganser.methods.gram_anchored import gram_anchored
from merganser.study.composing import plan_of
from merganser.study.data import load_examples
from merganser.study.heads import make_head
from merganser.study.judge import Paper
from merganser.study.networks import folder_of, load_encoder

NOISE, EPS = 0.25, 1e-3


@dataclass
class Sketch:
    """Sums of one weight at rank r; r = n keeps all."""

    v: Tensor
    values: Tensor
    bv: Tensor
    s: Tensor

    @classmethod
    def empty(cls, m: int, n: int) -> Sketch:
        """Nothing merged."""
        wide = {"dtype": torch.float64}
        return cls(
            torch.zeros(n, 0, **wide), torch.zeros(0, **wide), torch.zeros(m, 0, **wide), torch.zeros(m, n, **wide)
        )

    def add(self, d: Tensor, rank: int) -> None:
        """One more change, and the sketch cut back to its rank."""
        g, b = gram_terms(d)
        values, vectors = torch.linalg.eigh((self.v * self.values) @ self.v.T + g)
        v = vectors.flip(1)[:, :rank]
        self.bv = self.bv @ (self.v.T @ v) + b @ v
        self.v, self.values = v, values.flip(0)[:rank].clamp(min=0)
        self.s = self.s + d.double()

    def merged(self) -> Tensor:
        """gram_anchored along what is kept, the sum along the rest."""
        n = self.v.shape[0]
        if len(self.values) == n:
            return gram_anchored(self.s, (self.v * self.values) @ self.v.T, self.bv @ self.v.T, noise=NOISE, eps=EPS)
        kept = max(1, int((1 - NOISE) * len(self.values)))
        rho = max(EPS * float(self.values.sum()) / n, float(self.values[kept - 1]))
        sv = self.s @ self.v
        return self.s + ((self.bv + rho * sv) / (self.values + rho) - sv) @ self.v.T


def main() -> None:
    """Every fraction, one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", required=True)
    parser.add_argument("--zoo", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--items", type=int, default=600, help="validation items a task, at most")
    args = parser.parse_args()
    plan = plan_of([f"study={args.study}", f"zoo_folder={args.zoo}"])
    papers = {}
    for name, task in plan.tasks.tasks.items():
        examples = load_examples(name, task, "validation", args.data).first(args.items)
        papers[name] = Paper(examples, make_head(name, task, examples.classes), task.metric)
    base_folder = folder_of(plan.models.base)
    base = open_source(base_folder)
    experts = [open_source(folder_of(ref)) for ref in plan.models.models.values()]
    encoder = load_encoder(base_folder)
    network = getattr(encoder, "model", encoder)
    names = [n for n in network.state_dict() if n in base.infos and base.infos[n].dtype == "F32"]
    roles = assign_roles(base)
    print("| rank kept | state of G and B, MB | ACC % | s an arrival |\n| ---: | ---: | ---: | ---: |")
    for fraction in (1.0, 0.5, 0.25, 0.125, 0.0625):
        state, held, seconds = {}, 0, 0.0
        for name in names:
            x = base.read(name)
            changes = [expert.read(name).double() - x.double() for expert in experts]
            if not is_matrix(roles[name]):
                state[name] = x + (sum(changes) / len(changes)).float()
                continue
            m, n = x.shape
            sketch, began = Sketch.empty(m, n), time.perf_counter()
            for d in changes:
                sketch.add(d, max(1, round(fraction * n)))
            seconds += time.perf_counter() - began
            held += 8 * (n * n // 2 + m * n if fraction == 1 else sketch.v.numel() + sketch.bv.numel() + n)
            state[name] = x + sketch.merged().float()
        network.load_state_dict(state, strict=False)
        accuracy = sum(paper.judge(encoder, bfloat16=True).value for paper in papers.values()) / len(papers)
        print(f"| {fraction:.4g} | {held / 1e6:.0f} | {accuracy:.1f} | {seconds / len(experts):.2f} |", flush=True)


if __name__ == "__main__":
    main()

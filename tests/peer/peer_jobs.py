"""What both programs merge, by name, and how results are fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

from peer_models import FAMILIES
from peer_recipes import CHANCE, DIFFERENCES, IMPOSSIBLE, METHODS, REFUSED, SETTINGS, TOKENIZERS
from safetensors.torch import load_file
from torch import Tensor

from merganser.merging.merged import Merged
from merganser.merging.native import read_recipes
from merganser.merging.run import plan_recipes, run

IN_FLOAT32 = "dtype: float32\nout_dtype: bfloat16\n"
SEEDS = range(20)


@dataclass(frozen=True)
class Job:
    """One recipe.

    Attributes:
        models: folder that `M/` stands for in the text.
        text: in mergekit's language.
        seed: of mergekit's noise.
        options: of mergekit.
    """

    models: str
    text: str
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def in_float32(self) -> Job:
        """The same with arithmetic in float32 and results in bfloat16, in every document."""
        documents = [dedent(d).strip() for d in dedent(self.text).split("---\n")]
        return replace(self, text="\n---\n".join(f"{d}\n{IN_FLOAT32}" for d in documents))


def _jobs() -> dict[str, Job]:
    jobs = {f"{family} {name}": Job(f"{family}.f32", text) for family in FAMILIES for name, text in METHODS.items()}
    jobs |= {f"llama {name}": Job("llama.f32", text) for name, text in SETTINGS.items()}
    halved = {name: replace(job, models=job.models.replace("f32", "bf16")) for name, job in jobs.items()}
    jobs |= {f"bf16 {name}": job.in_float32() for name, job in halved.items()}
    jobs |= {f"native {name}": Job("llama.bf16", text) for name, text in METHODS.items()}
    jobs |= {name: Job(models, text) for name, (models, text) in {**DIFFERENCES, **IMPOSSIBLE}.items()}
    jobs |= {name: Job("llama.f32", text) for name, (text, _) in REFUSED.items()}
    jobs |= {f"{name} {seed}": Job("wide.f32", text, seed) for name, text in CHANCE.items() for seed in SEEDS}
    return jobs | {f"vocabulary {name}": Job("words", text) for name, text in TOKENIZERS.items()}


JOBS: Mapping[str, Job] = _jobs()


class Merges:
    """Results of both programs.

    Args:
        root: folder that holds `models` and everything that is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def text(self, job: Job) -> str:
        """The recipe with the folders of its models."""
        return dedent(job.text).replace("M/", f"{self.root / 'models' / job.models}/")

    def options(self, job: Job) -> dict[str, Any]:
        """mergekit's options."""
        return {"copy_tokenizer": False, "lora_merge_cache": str(self.root / "lora"), **job.options}

    def theirs_at(self, name: str) -> Path:
        """Folder of mergekit's result."""
        return self.root / "theirs" / str([*JOBS].index(name))

    def error(self, name: str) -> str | None:
        """What mergekit ended with; None where it merged."""
        found: str | None = json.loads(Path(f"{self.theirs_at(name)}.json").read_text("utf-8"))
        return found

    def theirs(self, name: str) -> dict[str, Tensor]:
        """mergekit's tensors."""
        assert self.error(name) is None, self.error(name)
        return load(self.theirs_at(name))

    def planned(self, name: str, *, lenient: bool = False, seed: int = 0) -> Merged:
        """Our plan of the same text."""
        path = self.root / "recipe.yaml"
        path.write_text(self.text(JOBS[name]), "utf-8")
        recipes, _ = read_recipes(path, lenient=lenient)
        return plan_recipes([replace(r, seed=seed) for r in recipes])

    def ours_at(self, name: str) -> Path:
        """Folder of our result."""
        return run(self.planned(name), self.root / "ours" / str([*JOBS].index(name)), threads=1, overwrite=True)

    def ours(self, name: str) -> dict[str, Tensor]:
        """Our tensors."""
        return load(self.ours_at(name))


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}

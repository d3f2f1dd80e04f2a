"""Where both programs mean the same, they give the same: within 1e-6 of a tensor's scale, or one step of bfloat16.

In bfloat16 the comparison is with mergekit's arithmetic in float32, which is ours always; see `test_differences.py`
for mergekit's own in bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from peer_jobs import Merges
from peer_models import FAMILIES
from peer_recipes import IMPOSSIBLE, METHODS, SETTINGS
from peer_steps import steps_apart
from torch import Tensor

from merganser.errors import MerganserError
from merganser.merging.merged import Merged
from merganser.merging.plan import TensorPlan
from merganser.methods.joint import Joint

#: Of the old buffers of GPT-NeoX nobody has a change: see `test_what_nobody_changed_stays`.
NEVER = ("neox multislerp of changes",)
_EACH = [f"{f} {m}" for f in FAMILIES for m in METHODS if f"{f} {m}" not in NEVER]
NAMES = [*_EACH, *(f"llama {s}" for s in SETTINGS)]
#: Share of a tensor's largest entry.
BOUND = 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_float32(merges: Merges, name: str) -> None:
    compare(merges, name)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(merges: Merges, name: str) -> None:
    compare(merges, f"bf16 {name}")


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_neither_merges(merges: Merges, name: str) -> None:
    assert merges.error(name) is not None
    with pytest.raises(MerganserError):
        merges.ours(name)


def compare(merges: Merges, name: str) -> None:
    theirs, ours, merged = merges.theirs(name), merges.ours(name), merges.planned(name)
    assert ours.keys() == theirs.keys()
    for tensor, x in ours.items():
        y = theirs[tensor]
        assert x.shape == y.shape
        if not x.is_floating_point():
            assert torch.equal(x, y.to(x.dtype)), tensor
            continue
        assert x.dtype == y.dtype
        near = (x.double() - y.double()).abs() <= BOUND * y.abs().max()
        if x.dtype == torch.bfloat16:
            near |= steps_apart(x, y) <= 1
        assert bool((near | undecided(merged, tensor)).all()), tensor


def undecided(merged: Merged, name: str) -> Tensor:
    """Entries of which several have the same rank, of which some must be kept: either choice is right."""
    row, tensor = merged.plan.rules.method, merged.plan.tensors[name]
    none = torch.zeros(tensor.info.shape, dtype=torch.bool)
    if not isinstance(row, Joint) or row.ranks is None or row.score is None:
        return none
    assert tensor.base is not None
    base = merged.plan.sources[tensor.base.ref].read(tensor.base.name, None).float()
    changes = [merged.plan.sources[p.ref].read(p.name, None).float() - base for p in tensor.models]
    found = none
    for k, score in enumerate(row.score(changes)):
        given = settings_of(merged, tensor, k)
        counted = int(torch.count_nonzero(score)) if given.get("among") == "differing" else score.numel()
        start, stop = row.ranks(counted, given)
        ordered = score.flatten().sort(descending=True).values
        for edge in (start, stop):
            if 0 < edge < len(ordered):
                found = found | ((score - ordered[edge]).abs() <= ties_within(row) * ordered[edge]) & (
                    (ordered[edge - 1] - ordered[edge]) <= ties_within(row) * ordered[edge]
                )
    return found


def ties_within(row: Joint) -> float:
    """Magnitudes are exact; variances over models are rounded."""
    return 1e-5 if row.shared else 0.0


def settings_of(merged: Merged, tensor: TensorPlan, k: int) -> dict[str, object]:
    given = {**merged.plan.rules.settings, **tensor.settings}
    return {n: (v[k] if isinstance(v, tuple) else v) for n, v in given.items()}

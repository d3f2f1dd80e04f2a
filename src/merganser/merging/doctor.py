"""What speaks against a recipe before it is merged: each finding with its figures, the models and what to do.

| kind | found where |
|---|---|
| `nonfinite` | a model holds NaN or infinity: it cannot be merged |
| `equal` | a model is equal to the base, or to another model |
| `norms` | the norms of two weighted changes are more than 4 times apart |
| `signs` | more than 0.6 of what two changes have in common has opposing signs; unrelated ones have 0.5 |
| `overlap` | two changes share more than half of their leading input directions beyond chance |
| `interference` | singular vectors of all changes, the rank over the number of models of each, do likewise |
| `density` | fewer than 8 entries of a tensor of 64 or more are kept |
| `resolution` | more than 0.2 of the changed entries are below half a unit in the last place of the output |
| `config` | the configs differ in what the weights mean |

What is above chance alone is no fault: fine-tunes of one network on images of other things share 0.3 to 0.45 of their
leading input directions, and two sets of handwritten digits 0.53 (chance 0.06).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from math import fsum
from typing import Any

from merganser.continual.roles import is_matrix
from merganser.continual.stream import Progress
from merganser.merging.configs import differing
from merganser.merging.conflicts import Conflicts, OfLayer, OfModel, labels_of, measure
from merganser.merging.merged import Merged
from merganser.merging.plan import Plan, TensorPlan
from merganser.methods.joint import Joint

NORM_RATIO = 4.0
OPPOSING = 0.6
OVERLAP = 0.5
LOST = 0.2
FEW_ENTRIES = 8
MANY_ENTRIES = 64
#: Settings that are the share of entries kept.
DENSITIES = ("density", "select_topk")
#: Methods that keep the directions of changes apart by themselves.
SEPARATING = ("tsv_m", "iso_c", "iso_cts", "gram", "gram_anchored", "dc", "opcm", "dop", "nufilt", "regmean")


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against a recipe.

    Attributes:
        kind: of the table in this module.
        message: what is the matter, with figures and models.
        advice: what to do about it.
        models: labels of the models that it is about.
        figures: by name.
        fatal: whether the merge would be refused.
    """

    kind: str
    message: str
    advice: str
    models: tuple[str, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    fatal: bool = False


@dataclass(frozen=True)
class Examination:
    """One recipe, examined.

    Attributes:
        name: of the recipe.
        method: of the recipe.
        conflicts: what was measured.
        findings: by kind, in the order of the table; of pairs, the worst first.
        notes: what could not be measured.
    """

    name: str
    method: str
    conflicts: Conflicts
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def examine(
    merged: Merged, *, layers: int | None = None, threads: int | None = None, progress: Progress | None = None
) -> list[Examination]:
    """Examine a planned merge and, before it, every merge that it reads from; stops where one cannot be merged.

    Args:
        merged: of `merganser.merging.run.plan_recipes`.
        layers: how many layers of each stack to look at, evenly spread; None for all.
        threads: tensors at a time.
        progress: called as (bytes done, bytes in all) of each recipe.

    Raises:
        MerganserError: If a model cannot be read, or a setting is refused.
    """
    found = []
    for stage in merged.stages():
        conflicts = measure(stage, layers=layers, threads=threads, progress=progress)
        plan = stage.plan
        findings = [
            *_nonfinite(conflicts),
            *_equal(plan, conflicts),
            *_norms(plan, conflicts),
            *_signs(plan, conflicts),
            *_overlaps(plan, conflicts),
            *_interference(plan, conflicts),
            *_densities(plan),
            *_resolution(plan, conflicts),
            *_configs(plan),
        ]
        notes = []
        if all(t.base is None for t in plan.tensors.values()):
            notes.append("there is no base, so changes were not compared; name one with base: to have them examined")
        if layers is not None:
            notes.append(f"{conflicts.tensors} of {len(plan.tensors)} tensors were measured")
        found.append(Examination(stage.ref, plan.recipe.method, conflicts, tuple(findings), tuple(notes)))
        if any(finding.fatal for finding in findings):
            break
    return found


def _nonfinite(conflicts: Conflicts) -> Iterator[Finding]:
    for label, tensors in conflicts.nonfinite.items():
        total = sum(tensors.values())
        yield Finding(
            "nonfinite",
            f"{label} holds {_counted(total, 'value')} that {'is' if total == 1 else 'are'} NaN or infinite, in "
            f"{_counted(len(tensors), 'tensor')}; the first is {next(iter(tensors))}",
            "leave the model out, or fetch it again",
            (label,),
            {"entries": total, "tensors": len(tensors)},
            fatal=True,
        )


def _equal(plan: Plan, conflicts: Conflicts) -> Iterator[Finding]:
    based = any(t.base is not None for t in plan.tensors.values())
    for label, model in conflicts.models.items():
        if based and not model.changed:
            yield Finding(
                "equal",
                f"{label} is equal to the base in all tensors that were measured ({conflicts.tensors})",
                "leave it out; check that it is the fine-tuned model, and the base its base",
                (label,),
            )
    for pair, figures in conflicts.pairs.items():
        unchanged = based and not any(conflicts.models[label].changed for label in pair)
        if figures.equal and not unchanged:
            yield Finding(
                "equal",
                f"{pair[0]} and {pair[1]} are equal in all tensors that were measured: what they bring counts twice",
                "leave one of them out, or say so with a weight",
                pair,
            )


def _norms(plan: Plan, conflicts: Conflicts) -> Iterator[Finding]:
    sizes = {label: model.weighted for label, model in conflicts.models.items() if model.weighted > 0}
    if len(sizes) < 2:
        return
    most, least = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    ratio = sizes[most] / sizes[least]
    if ratio > NORM_RATIO:
        listed = ", ".join(f"{label} {size:.4g}" for label, size in sizes.items())
        yield Finding(
            "norms",
            f"the weighted change of {most} is {ratio:.1f} times as large as that of {least} (norms: {listed})",
            _weights(plan, conflicts.models, sizes)
            if plan.rules.weighted
            else f"{plan.recipe.method} takes no weights: choose a method that does, such as task_arithmetic",
            tuple(sizes),
            {"ratio": ratio, **{f"norm of {label}": size for label, size in sizes.items()}},
        )


def _weights(plan: Plan, models: Mapping[str, OfModel], sizes: Mapping[str, float]) -> str:
    """Weights that make all weighted changes equally large and leave the sum of the effective weights as it is."""
    now = {label: size / models[label].norm for label, size in sizes.items()}
    equal = {label: 1 / models[label].norm for label in sizes}
    factor = fsum(now.values()) / fsum(equal.values())
    listed = ", ".join(f"{label} {factor * share:.3g}" for label, share in equal.items())
    return f"if that is not meant, give weights that even them out: {listed}"


def _signs(plan: Plan, conflicts: Conflicts) -> Iterator[Finding]:
    electing = plan.recipe.method.endswith("ties") or plan.recipe.method in ("sce", "della")
    advice = (
        f"{plan.recipe.method} keeps one sign an entry, so much of one model is lost: weight the one that matters more"
        if electing
        else "much of both is cancelled: use ties, which keeps one sign an entry, or leave one out"
    )
    for pair, figures in sorted(conflicts.pairs.items(), key=lambda item: -(item[1].opposing or 0.0)):
        if figures.opposing is not None and figures.opposing > OPPOSING:
            yield Finding(
                "signs",
                f"{pair[0]} and {pair[1]} pull in opposite directions in {figures.opposing:.0%} of what both change, "
                f"by size; 50 % is chance (cosine {figures.cosine:.2f})",
                advice,
                pair,
                {"opposing": figures.opposing, "cosine": figures.cosine or 0.0},
            )


def _overlaps(plan: Plan, conflicts: Conflicts) -> Iterator[Finding]:
    method = plan.recipe.method
    for pair, figures in sorted(conflicts.pairs.items(), key=lambda item: -(item[1].overlap or 0.0)):
        if figures.equal or figures.overlap is None or figures.chance is None:
            continue
        if _beyond(figures.overlap, figures.chance) > OVERLAP:
            worst = max(
                (name for name, layer in conflicts.layers.items() if pair in layer.overlap),
                key=lambda name: conflicts.layers[name].overlap[pair],
            )
            yield Finding(
                "overlap",
                f"{pair[0]} and {pair[1]} share {figures.overlap:.2f} of their leading input directions "
                f"(chance {figures.chance:.2f}; most in {worst}: {conflicts.layers[worst].overlap[pair]:.2f})",
                f"{method} keeps directions apart; judge the result on both tasks"
                if method in SEPARATING
                else f"{method} adds up what they share: use tsv_m, iso_c or gram, or smaller weights",
                pair,
                {"overlap": figures.overlap, "chance": figures.chance},
            )


def _interference(plan: Plan, conflicts: Conflicts) -> Iterator[Finding]:
    layers = conflicts.layers
    if not layers:
        return
    means = mean_interference(layers)
    beyond = max(_beyond(means[f"{side}_share"], means[f"{side}_chance"]) for side in ("left", "right"))
    if beyond > OVERLAP:
        worst = max(layers, key=lambda name: layers[name].left_share + layers[name].right_share)
        yield Finding(
            "interference",
            f"singular vectors of the changes interfere: ||U^T U - I|| is {means['left']:.2f} and ||V^T V - I|| "
            f"{means['right']:.2f} in the mean over {_counted(len(layers), 'linear weight')}, "
            f"{means['left_share']:.2f} and {means['right_share']:.2f} of the most there can be "
            f"(chance {means['left_chance']:.2f} and {means['right_chance']:.2f}; most in {worst})",
            "whitening will bend them far from what was trained: compare with iso_c and with fewer models"
            if plan.recipe.method == "tsv_m"
            else "judge the result on every task"
            if plan.recipe.method in SEPARATING
            else "tsv_m whitens them, iso_c evens the spectrum out; compare either with the plain mean",
            tuple(conflicts.models),
            means,
        )


def mean_interference(layers: Mapping[str, OfLayer]) -> dict[str, float]:
    """Every figure of the interference, in the mean over layers."""
    names = ("left", "right", "left_share", "right_share", "left_chance", "right_chance")
    return {name: fsum(getattr(layer, name) for layer in layers.values()) / len(layers) for name in names}


def _beyond(share: float, chance: float) -> float:
    """What a share has beyond chance, of what there could be; 0 where chance alone fills it."""
    return (share - chance) / (1 - chance) if chance < 1 else 0.0


def _densities(plan: Plan) -> Iterator[Finding]:
    few: dict[str, list[tuple[str, int, float]]] = {}
    for name, tensor in plan.tensors.items():
        if tensor.role not in ("fixed", "exact", "statistic") and tensor.info.numel >= MANY_ENTRIES:
            for label, kept in _kept(plan, tensor):
                if kept < FEW_ENTRIES:
                    few.setdefault(label, []).append((name, tensor.info.numel, kept))
    for label, tensors in few.items():
        name, numel, kept = min(tensors, key=lambda found: found[2])
        yield Finding(
            "density",
            f"{plan.recipe.method} keeps fewer than {FEW_ENTRIES} entries of {_counted(len(tensors), 'tensor')} of "
            f"{label}: {kept:.3g} of the {numel} of {name}",
            f"raise the density there, to {FEW_ENTRIES / numel:.2g} or more; a filter sets it for some names only",
            (label,),
            {"tensors": len(tensors), "kept": kept, "entries": numel},
        )


def _kept(plan: Plan, tensor: TensorPlan) -> Iterator[tuple[str, float]]:
    """How many entries of one tensor are kept of each model; nothing where the method keeps all."""
    row = plan.rules.method
    function = row.function if isinstance(row, Joint) else None
    if isinstance(row, Joint) and row.vector is not None and not is_matrix(tensor.role):
        function = row.vector
    given = {**plan.rules.settings, **tensor.settings}
    setting = next((s for s in DENSITIES if s in given), None)
    if setting is None or (function is not None and setting not in signature(function).parameters):
        return
    for label, k in labels_of(plan, tensor).items():
        own: dict[str, Any] = {n: v[k] if isinstance(v, tuple) else v for n, v in given.items()}
        if isinstance(row, Joint) and row.ranks is not None:
            start, stop = row.ranks(tensor.info.numel, own)
            yield label, stop - start
        elif isinstance(own[setting], int | float):
            yield label, own[setting] * tensor.info.numel


def _resolution(plan: Plan, conflicts: Conflicts) -> Iterator[Finding]:
    types = ", ".join(dict.fromkeys(t.info.dtype for t in plan.tensors.values() if t.info.dtype in ("BF16", "F16")))
    for label, model in conflicts.models.items():
        if model.changed and model.lost / model.changed > LOST:
            share = model.lost / model.changed
            yield Finding(
                "resolution",
                f"{share:.0%} of the entries that {label} changes are below half a unit in the last place of the "
                f"output ({types}), so each alone is rounded away",
                "write a wider type, dtype: float32, or check that the model changed as much as it should",
                (label,),
                {"share": share, "entries": model.lost},
            )


def _configs(plan: Plan) -> Iterator[Finding]:
    for key, values in differing(plan.sources).items():
        if plan.recipe.vocabulary is not None and key.endswith("vocab_size"):
            continue  # the recipe says what becomes of it
        listed = "; ".join(f"{value} in {', '.join(refs)}" for value, refs in values.items())
        yield Finding(
            "config",
            f"{key} differs between the models' configs: {listed}",
            f"the output gets that of {plan.donor}; merge models of one base, or leave out those that differ",
            tuple(ref for refs in values.values() for ref in refs),
        )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def gravest(examinations: Sequence[Examination]) -> int:
    """The exit code: 0 healthy, 1 where there are findings, 2 where one of them is fatal."""
    findings = [finding for one in examinations for finding in one.findings]
    return 2 if any(finding.fatal for finding in findings) else int(bool(findings))

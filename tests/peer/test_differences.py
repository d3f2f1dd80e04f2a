"""Where we differ from mergekit 0.1.5 on purpose: both results, and why."""

from __future__ import annotations

import json
from math import pi, sin

import pytest
import torch
from peer_jobs import JOBS, Merges, load
from peer_recipes import METHODS, REFUSED
from peer_steps import steps_apart
from torch import Tensor

from merganser.errors import ParameterError

ZERO, SAME = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"


def models(merges: Merges, folder: str, *names: str) -> list[dict[str, Tensor]]:
    """Tensors of models, in float64."""
    found = [load(merges.root / "models" / folder / name) for name in names]
    return [{n: x.double() for n, x in tensors.items()} for tensors in found]


def close(x: Tensor, y: Tensor, bound: float = 1e-6) -> bool:
    return bool((x.double() - y.double()).abs().max() <= bound * y.abs().max())


# arithmetic


@pytest.mark.parametrize("name", METHODS)
def test_arithmetic_is_in_float32_whatever_the_models_are_stored_in(merges: Merges, name: str) -> None:
    """mergekit computes most methods in bfloat16 where models are; we round once, at the end."""
    exact = merges.theirs(f"bf16 llama {name}")
    theirs, ours = merges.theirs(f"native {name}"), merges.ours(f"native {name}")
    apart = [sum(int((steps_apart(x.bfloat16(), exact[n]) > 1).sum()) for n, x in of.items()) for of in (ours, theirs)]
    assert apart[0] <= apart[1]
    several_of_equal_rank = name in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
    assert apart[0] <= (40 if several_of_equal_rank else 3)  # of 9,360; three are sums that cancel
    if name not in EXACT:
        assert apart[1] > 100


#: What mergekit computes in float32 too, or what is exact.
EXACT = ("linear", "linear sum", "slerp", "passthrough")


def test_types_of_the_models_are_those_of_the_output(merges: Merges) -> None:
    """mergekit's ramplus_tl makes float32 of bfloat16."""
    theirs, ours = merges.theirs("native ramplus_tl"), merges.ours("native ramplus_tl")
    assert {x.dtype for x in theirs.values()} == {torch.float32}
    assert {x.dtype for x in ours.values()} == {torch.bfloat16}


# tensors


def test_integers_and_truth_values_are_not_cast(merges: Merges) -> None:
    """mergekit's dtype is for every tensor; a mask of truth values becomes float32."""
    theirs, ours = merges.theirs("buffers"), merges.ours("buffers")
    name = "gpt_neox.layers.0.attention.bias"
    assert (theirs[name].dtype, ours[name].dtype) == (torch.float32, torch.bool)
    assert torch.equal(theirs[name].bool(), ours[name])


def test_every_stored_tensor_is_merged(merges: Merges) -> None:
    """mergekit asks transformers for names, no longer those of stored ViTs, and drops what it does not find."""
    theirs, ours = merges.theirs("vit as stored"), merges.ours("vit as stored")
    a, b = models(merges, "vit.published.f32", "a", "b")
    assert (len(theirs), len(ours), len(a)) == (8, 56, 56)
    assert all(torch.equal(x, ours[n]) for n, x in theirs.items())
    assert all(close(x, (0.7 * a[n] + 0.4 * b[n]) / 1.1) for n, x in ours.items())


@pytest.mark.parametrize(("name", "missing"), [("neox as stored", "attention.bias"), ("bert without pooler", "pooler")])
def test_no_tensor_is_asked_for_that_the_models_do_not_have(merges: Merges, name: str, missing: str) -> None:
    """mergekit's list of GPT-NeoX's tensors holds buffers of years ago, and that of BertForMaskedLM a pooler."""
    error = merges.error(name)
    assert error is not None
    assert "required but not present" in error
    assert missing in error
    first = next(iter(merges.planned(name).plan.sources.values()))
    assert merges.ours(name).keys() == first.infos.keys()


# small changes: what fine-tuning with a small learning rate leaves


def test_model_stock_takes_the_angle_of_small_changes_too(merges: Merges) -> None:
    """mergekit divides by no product of norms below 1e-6, so small changes look orthogonal and the base comes out."""
    theirs, ours = merges.theirs("small model_stock"), merges.ours("small model_stock")
    base, a, b = models(merges, "small.f32", "base", "a", "b")
    for name in base:
        d, e = a[name] - base[name], b[name] - base[name]
        product, inner = float(d.norm() * e.norm()), float((d * e).sum())
        for found, norms in ((ours, product), (theirs, max(product, 1e-6))):
            c = inner / norms
            assert close(found[name], base[name] + 2 * c / (1 + c) * (d + e) / 2), name
    d, e = a["lm_head.weight"] - base["lm_head.weight"], b["lm_head.weight"] - base["lm_head.weight"]
    assert d.norm() * e.norm() < 1e-6


def test_sce_weighs_small_changes_by_energy_too(merges: Merges) -> None:
    """mergekit weighs models alike where the mean squares add up to less than 1e-6: in every fine-tune by 1e-4."""
    theirs, ours = merges.theirs("small sce"), merges.ours("small sce")
    base, a, b = models(merges, "small.f32", "base", "a", "b")
    name = "model.layers.2.mlp.up_proj.weight"
    d = torch.stack([a[name] - base[name], b[name] - base[name]])
    alike, energy = torch.ones(2, 1, 1).double(), d.square().sum((1, 2), keepdim=True)
    for found, weight in ((ours, energy / energy.sum()), (theirs, alike / 2)):
        agree = (d.sign() == torch.where(d.sum(0) >= 0, 1, -1)) * weight
        # mergekit's mean is over 1e-6 at least, which no sum of weights comes near
        expected = (d * agree).sum(0) / agree.sum(0).clamp(min=1e-6)
        assert (found[name] - base[name] - expected).abs().max() < 2e-8  # a float32 step of the base


def test_nearswap_reaches_the_other_model_below_1e_6_too(merges: Merges) -> None:
    """mergekit divides t by no difference below 1e-6."""
    theirs, ours = merges.theirs("small nearswap"), merges.ours("small nearswap")
    base, a = models(merges, "small.f32", "base", "a")
    x, y = base["lm_head.weight"], a["lm_head.weight"]
    step = (y - x).abs()
    for found, least in ((ours, 0.0), (theirs, 1e-6)):
        share = (1e-7 / step.clamp(min=max(least, 1e-30))).clamp(max=1)
        assert (found["lm_head.weight"] - (x + share * (y - x))).abs().max() < 2e-8
    assert not torch.equal(theirs["lm_head.weight"], ours["lm_head.weight"])


# zeros


def test_a_zero_tensor_has_no_direction(merges: Merges) -> None:
    """mergekit takes it as orthogonal to all, so a third of the way is sin 27 degrees; ours is the straight line."""
    theirs, ours = merges.theirs("zero slerp"), merges.ours("zero slerp")
    (a,) = models(merges, "odd.f32", "a")
    assert close(theirs[ZERO], sin(0.3 * pi / 2) * a[ZERO])
    assert close(ours[ZERO], 0.3 * a[ZERO])
    assert all(close(x, theirs[n]) for n, x in ours.items() if n != ZERO)


def test_a_model_without_change_has_no_direction(merges: Merges) -> None:
    """The same with nuslerp's changes: what one of two models left as it was."""
    theirs, ours = merges.theirs("zero nuslerp"), merges.ours("zero nuslerp")
    base, b = models(merges, "odd.f32", "base", "b")
    t = 0.4 / 1.1
    assert close(theirs[SAME], base[SAME] + sin(t * pi / 2) * (b[SAME] - base[SAME]))
    assert close(ours[SAME], base[SAME] + t * (b[SAME] - base[SAME]))
    assert all(close(x, theirs[n]) for n, x in ours.items() if n != SAME)


def test_what_nobody_changed_stays(merges: Merges) -> None:
    """mergekit's multislerp ends with an error where no model changed a tensor, as with a frozen embedding."""
    error = merges.error("zero multislerp")
    assert error is not None
    assert "weighted sum of the input tensors is zero" in error
    ours, (base,) = merges.ours("zero multislerp"), models(merges, "still.f32", "base")
    assert torch.equal(ours[SAME].double(), base[SAME])


def test_della_of_a_row_of_one_entry_has_the_mean_chance(merges: Merges) -> None:
    """mergekit divides 0 by 0 there, so it merges no ViT, whose class token is (1, 1, width)."""
    error = merges.error("della of one entry")
    assert error is not None
    assert "p_in" in error
    ours = merges.ours("della of one entry")
    assert all(bool(torch.isfinite(x).all()) for x in ours.values())


# ranks and signs


def test_a_lone_negative_model_stays_negative(merges: Merges) -> None:
    """mergekit divides by the sum of weights, so weight -1 adds the change that it should subtract."""
    theirs, ours = merges.theirs("ties, lone negative"), merges.ours("ties, lone negative")
    base, a = models(merges, "llama.f32", "base", "a")
    for name in base:
        assert close(theirs[name], a[name]), name
        assert close(ours[name], 2 * base[name] - a[name]), name


def test_breadcrumbs_keep_one_entry_at_least(merges: Merges) -> None:
    """mergekit's ties do, its breadcrumbs do not: at density 0.05 a tensor of 16 entries is the base's."""
    theirs, ours = merges.theirs("one entry, breadcrumbs"), merges.ours("one entry, breadcrumbs")
    (base,) = models(merges, "odd.f32", "base")
    norm = "model.norm.weight"
    assert torch.equal(theirs[norm].double(), base[norm])
    assert 1 <= int((ours[norm].double() != base[norm]).sum()) <= 2


def test_sce_keeps_one_entry_at_least(merges: Merges) -> None:
    """mergekit's share of 0.4 of two entries is none of them, so the base's bias comes out."""
    theirs, ours = merges.theirs("one entry, sce"), merges.ours("one entry, sce")
    (base,) = models(merges, "bert.f32", "base")
    bias = "classifier.bias"
    assert torch.equal(theirs[bias].double(), base[bias])
    assert int((ours[bias].double() != base[bias]).sum()) == 1


def test_rows_of_a_convolution_are_filters(merges: Merges) -> None:
    """mergekit's filter_wise takes lines of the last axis of a tensor (out, in, height, width) for its rows."""
    theirs, ours = merges.theirs("rows of a convolution"), merges.ours("rows of a convolution")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    base, a, b = models(merges, "vit.f32", "base", "a", "b")
    d, e = a[name] - base[name], b[name] - base[name]
    for found, axes in ((ours, (1, 2, 3)), (theirs, (3,))):
        lengths = d.square().sum(axes, keepdim=True).sqrt() * e.square().sum(axes, keepdim=True).sqrt()
        c = (d * e).sum(axes, keepdim=True) / lengths.clamp(min=1e-6)
        near = (found[name] - base[name] - c / (1 + c) * (d + e)).abs() < 1e-5
        assert float(near.double().mean()) > 0.9  # where 1 + c is not near 0
    plain = [n for n, x in ours.items() if x.ndim == 2]
    assert all(close(ours[n], theirs[n], 1e-5) for n in plain)


def test_lines_of_a_convolution_lie_along_its_last_axis(merges: Merges) -> None:
    """mergekit's della ranks along the second axis, across input channels; of a matrix that is the last one."""
    name = "vit.embeddings.patch_embeddings.projection.weight"
    base, a = models(merges, "vit.f32", "base", "a")
    size = (a[name] - base[name]).abs()
    for found, axis in ((merges.ours("lines of a convolution"), -1), (merges.theirs("lines of a convolution"), 1)):
        largest = size == size.amax(axis, keepdim=True)
        kept = found[name] != base[name]
        assert float(kept[largest & (size > 0)].double().mean()) > 0.97  # the chance is 0.999
        other = 1 if axis == -1 else -1
        largest = size == size.amax(other, keepdim=True)
        assert float(kept[largest & (size > 0)].double().mean()) < 0.9


def test_arcee_fusion_takes_the_same_entries_but_for_the_threshold(merges: Merges) -> None:
    """mergekit's quartiles are entries, ours lie between two; its divergences are in float32, with 1e-8 added."""
    theirs, ours = merges.theirs("arcee_fusion"), merges.ours("arcee_fusion")
    base, a = models(merges, "llama.f32", "base", "a")
    same = total = 0
    for name, x in ours.items():
        assert bool(((x == base[name]) | (x == a[name])).all()), name
        same, total = same + int(((theirs[name] - x).abs() < 1e-6).sum()), total + x.numel()
    assert same / total > 0.99


# what surrounds the weights


def test_a_head_of_its_own_is_not_tied_away(merges: Merges) -> None:
    """mergekit writes the merged head and a config that ties it to the embedding, so that nobody reads it."""
    ours, theirs = merges.ours_at("tied and untied"), merges.theirs_at("tied and untied")
    tied = [json.loads((f / "config.json").read_text("utf-8")).get("tie_word_embeddings") for f in (ours, theirs)]
    assert tied == [False, True]
    x, y = load(ours), load(theirs)
    assert x.keys() == y.keys()
    assert all(close(x[n], y[n]) for n in x)
    assert not torch.equal(x["lm_head.weight"], x["model.embed_tokens.weight"])


def test_a_type_has_several_names(merges: Merges) -> None:
    """mergekit knows bfloat16 only."""
    assert merges.error("short name of a type") is not None
    assert {x.dtype for x in merges.ours("short name of a type").values()} == {torch.bfloat16}


# words


def test_a_misspelt_word_is_an_error(merges: Merges) -> None:
    """mergekit ignores what it does not know: density 0.1 is 1 there."""
    theirs = merges.theirs("misspelt")
    (a,) = models(merges, "llama.f32", "a")
    assert all(close(x, a[n]) for n, x in theirs.items())
    with pytest.raises(ParameterError, match=r"denisty: unknown; did you mean density"):
        merges.planned("misspelt")
    assert merges.planned("misspelt", lenient=True).plan.recipe.method == "ties"


def test_the_last_of_several_values_may_be_bare(merges: Merges) -> None:
    """mergekit asks for {value: 0.5}."""
    error = merges.error("a bare last value")
    assert error is not None
    assert error.startswith("ValidationError")
    assert len(merges.ours("a bare last value")) == 39


@pytest.mark.parametrize("name", REFUSED)
def test_settings_out_of_range_are_refused(merges: Merges, name: str) -> None:
    """mergekit merges them: to infinities, past the models, by all or by nothing."""
    assert merges.error(name) is None, merges.error(name)
    assert JOBS[name].models == "llama.f32"
    with pytest.raises(ParameterError) as caught:
        merges.ours(name)
    assert REFUSED[name][1] in str(caught.value)
    if name == "weights that cancel, linear":
        assert not any(bool(torch.isfinite(x).all()) for x in merges.theirs(name).values())

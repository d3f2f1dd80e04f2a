"""Fine-tunes of many model families become one that the family's own class loads: whole, tied, and as deep as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from family_models import (
    DECODERS,
    FAMILIES,
    WEIGHTS,
    Families,
    check_close,
    config_of,
    linear,
    loaded,
    mean_of,
    merge,
    runs,
    ties_of,
)
from support import load


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_linear_merge_loads_as_the_float64_mean_of_its_fine_tunes(
    name: str, families: Families, tmp_path: Path
) -> None:
    family = families(name)
    out = merge(linear(family.folders[1:]), tmp_path / "out")
    network = loaded(family.network, out)
    check_close(network.state_dict(), mean_of(family.states[1:], WEIGHTS))
    assert {x.dtype for x in network.parameters()} == {x.dtype for x in family.network.parameters()}
    assert ties_of(network) == family.tied
    assert config_of(out) == config_of(family.folders[1])
    assert load(out).keys() == load(family.folders[1]).keys()
    runs(network, family.inputs)


def thinned(d: Tensor, density: float) -> Tensor:
    """The largest entries by size, earlier ones first among equals."""
    flat = d.flatten()
    order = flat.float().abs().argsort(descending=True, stable=True)[: max(1, round(density * flat.numel()))]
    kept = torch.zeros_like(flat)
    kept[order] = flat[order]
    return kept.view_as(d)


def elected(changes: Sequence[Tensor]) -> Tensor:
    """The mean of the entries whose sign is that of the sum."""
    stack = torch.stack(list(changes))
    agree = stack * stack.sum(0) > 0
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_changes_are_added_to_the_base_and_load(name: str, families: Families, tmp_path: Path) -> None:
    """By ties and task_arithmetic in turn, against float64 loops over the files."""
    family = families(name)
    ties = FAMILIES.index(name) % 2 == 0
    settings = {"density": 0.4} if ties else {"scale": 0.7}
    text = {
        "method": "ties" if ties else "task_arithmetic",
        "base": str(family.folders[0]),
        "models": [str(f) for f in family.folders[1:]],
        "settings": settings,
    }
    out = merge(json.dumps(text), tmp_path / "out")
    base, *models = (load(f) for f in family.folders)
    expected = {}
    for tensor, x in base.items():
        changes = [m[tensor].double() - x.double() for m in models]
        if "running_" in tensor:
            expected[tensor] = x.double() + sum(changes) / 2
        elif not x.is_floating_point():
            expected[tensor] = x
        elif ties:
            expected[tensor] = x.double() + elected([thinned(d, 0.4) for d in changes])
        else:
            expected[tensor] = x.double() + 0.7 * sum(changes)
    check_close(load(out), expected, ulps=2)
    network = loaded(family.network, out)
    assert ties_of(network) == family.tied
    assert config_of(out) == config_of(family.folders[0])
    runs(network, family.inputs)


@pytest.mark.parametrize("name", DECODERS)
def test_stacked_layers_are_counted_in_the_config_and_load(name: str, families: Families, tmp_path: Path) -> None:
    family = families(name)
    one, two = family.folders[1:]
    slices = [(one, (0, 2)), (two, (1, 2)), (two, (1, 2))]
    parts = [{"models": [{"model": str(f), "layers": list(span)}]} for f, span in slices]
    out = merge(json.dumps({"method": "passthrough", "slices": parts}), tmp_path / "out")
    network = loaded(family.network, out)
    assert network.config.num_hidden_layers == 4
    layers = [(1, 0), (1, 1), (2, 1), (2, 1)]
    found, stack = load(out), DECODERS[name]
    models = [load(f) for f in family.folders]
    for i, (model, layer) in enumerate(layers):
        inside = {n: x for n, x in models[model].items() if n.startswith(f"{stack}{layer}.")}
        assert inside
        for tensor, x in inside.items():
            assert torch.equal(found[tensor.replace(f"{stack}{layer}.", f"{stack}{i}.", 1)], x), tensor
    for tensor in (n for n in models[1] if not n.startswith(stack)):
        before = any(word in tensor for word in ("embed_tokens", "embed_in", "embeddings", "wte", "wpe", "position"))
        assert torch.equal(found[tensor], models[1 if before else 2][tensor]), tensor
    before, after = config_of(one), config_of(out)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "layer_types", "attention_layers"}
    assert before.keys() == after.keys()
    assert ties_of(network) == family.tied
    runs(network, family.inputs)


#: Recipe's slices of both fine-tunes, and the config's numbers of layers before and after.
STACKED = {
    "bert": [(0, 2), (1, 2)],
    "bert-classifier": [(0, 1), (1, 2), (1, 2)],
    "distilbert": [(0, 2), (1, 2)],
    "deberta-v2": [(0, 2), (1, 2)],
    "albert": [(0, 1), (0, 1)],
    "modernbert": [(0, 2), (1, 2)],
    "hub-vit": [(0, 2), (1, 2)],
    "clip-vision": [(0, 2), (1, 2)],
    "siglip-vision": [(0, 2), (1, 2)],
    "t5": [(0, 2), (1, 2)],
    "bart": [(0, 2), (1, 2)],
    "whisper": [(0, 2), (1, 2)],
    "clip": [(0, 2), (1, 3)],
}
NUMBERS: dict[str, dict[str, int]] = {
    "albert": {"num_hidden_layers": 2, "num_hidden_groups": 2},
    "distilbert": {"n_layers": 3},
    "siglip-vision": {"vision_config.num_hidden_layers": 3, "text_config.num_hidden_layers": 2},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    "bart": {"encoder_layers": 1, "decoder_layers": 3},
    "whisper": {"encoder_layers": 1, "decoder_layers": 3},
    "clip": {"vision_config.num_hidden_layers": 3, "text_config.num_hidden_layers": 4},
}


@pytest.mark.parametrize("name", STACKED)
def test_each_stack_of_a_model_is_counted_where_its_config_counts_it(
    name: str, families: Families, tmp_path: Path
) -> None:
    family = families(name)
    parts = [
        {"models": [{"model": str(family.folders[1 + i % 2]), "layers": list(span)}]}
        for i, span in enumerate(STACKED[name])
    ]
    out = merge(json.dumps({"method": "passthrough", "slices": parts}), tmp_path / "out")
    config = config_of(out)
    for path, number in NUMBERS.get(name, {"num_hidden_layers": 3}).items():
        node = config
        for key in path.split(".")[:-1]:
            node = node[key]
        assert node[path.split(".")[-1]] == number, path
    network = loaded(family.network, out)
    assert ties_of(network) == family.tied
    runs(network, family.inputs)


@pytest.mark.parametrize("name", ["t5", "whisper", "clip"])
def test_a_gradient_runs_over_each_stack_by_itself(name: str, families: Families, tmp_path: Path) -> None:
    family = families(name)
    one, two = (str(f) for f in family.folders[1:])
    models = [{"model": one, "weight": 1.0}, {"model": two, "weight": [0.0, 1.0]}]
    text = {"method": "linear", "models": models, "settings": {"normalize": False}}
    found = load(merge(json.dumps(text), tmp_path / "out"))
    first, second = (load(f) for f in family.folders[1:])
    stacks = ("encoder.block.", "decoder.block.", "encoder.layers.", "decoder.layers.")
    count: dict[str, int] = {}
    for tensor in first:
        for stack in stacks:
            head, _, rest = tensor.partition(stack)
            if rest:
                count[head + stack] = max(count.get(head + stack, 0), int(rest.split(".")[0]) + 1)
    assert len(count) == 2
    expected = {}
    for tensor, x in first.items():
        share = 0.0
        for stack, layers in count.items():
            if tensor.startswith(stack):
                share = int(tensor[len(stack) :].split(".")[0]) / (layers - 1) if layers > 1 else 1.0
        expected[tensor] = x.double() + share * second[tensor].double() if x.is_floating_point() else x
    check_close(found, expected)


def test_a_stack_that_feeds_another_merge_is_counted_too(families: Families, tmp_path: Path) -> None:
    family = families("qwen2")
    documents: list[dict[str, Any]] = []
    for name, folder in (("a", family.folders[1]), ("b", family.folders[2])):
        parts = [{"models": [{"model": str(folder), "layers": list(span)}]} for span in ((0, 2), (1, 2))]
        documents.append({"name": name, "method": "passthrough", "slices": parts})
    documents.append({"method": "linear", "models": ["a", "b"], "dtype": "float16"})
    out = merge("\n---\n".join(json.dumps(d) for d in documents), tmp_path / "out")
    network = loaded(family.network, out)
    assert network.config.num_hidden_layers == 3
    assert {x.dtype for x in network.parameters()} == {torch.float16}
    before, after = config_of(family.folders[1]), config_of(out)
    assert {key for key in before if before[key] != after[key]} == {"num_hidden_layers", "layer_types", "dtype"}
    runs(network, family.inputs)


@pytest.mark.parametrize("name", ["clip", "whisper", "qwen3-moe"])
def test_another_type_is_written_into_the_config(name: str, families: Families, tmp_path: Path) -> None:
    family = families(name)
    out = merge(linear(family.folders[1:], dtype="float16"), tmp_path / "out")
    network = loaded(family.network, out)
    assert {x.dtype for x in network.parameters()} == {torch.float16}
    check_close(network.state_dict(), mean_of(family.states[1:], WEIGHTS), ulps=2)

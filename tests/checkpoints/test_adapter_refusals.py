from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from adapter_helpers import Held, Mixed, Q, pair, trained, written
from merganser.checkpoints.adapter import AdapterSource
from merganser.checkpoints.lora_config import LoraConfig as Settings
from merganser.errors import AdapterError, CheckpointError

MISFITS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "absent": (
        pair("layer.query", 3, 4),
        {},
        r"module layer\.query of the adapter is not in base\nhint: .*layer\.q\.w",
    ),
    "shape": (
        pair("layer.q", 3, 5),
        {},
        r"module layer\.q has A \(2, 5\) and B \(3, 2\), .* layer\.q\.weight \(3, 4\)",
    ),
    "rank": (pair("layer.q", 3, 4, rank=1), {}, r"module layer\.q has rank 1, and adapter_config\.json says 2"),
    "half-a-pair": ({"layer.q.lora_A.weight": torch.ones(2, 4)}, {}, "has lora_A; it needs lora_A and lora_B"),
    "unknown-role": (
        pair("layer.q", 3, 4) | {"layer.q.lora_diag": torch.ones(2)},
        {},
        r"layer\.q\.lora_diag .* not known",
    ),
    "named-adapter": ({"layer.q.lora_A.default.weight": torch.ones(2, 4)}, {}, "not known"),
    "unknown-tensor": ({"score.weight": torch.ones(2)}, {}, r"score\.weight of the adapter is not in base"),
    "token-rows": ({"embed.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}, {}, "is not in base"),
    "grown-vocabulary": ({"embed.weight": torch.ones(6, 4)}, {}, r"\(6, 4\), and embed\.weight of the base \(5, 4\)"),
    "integer": ({"embed.weight": torch.ones(5, 4, dtype=torch.int8)}, {}, r"is I8, and embed\.weight of the base F32"),
    "twice": (pair("layer.q", 3, 4) | pair("x.layer.q", 3, 4), {}, r"two modules .* change layer\.q\.weight"),
    "whole-twice": ({"q.base_layer.bias": torch.ones(3), "q.bias": torch.ones(3)}, {}, "the same thing twice"),
    "empty": ({}, {}, "holds no tensors"),
    "no-magnitude": (pair("layer.q", 3, 4), {"use_dora": True}, r"layer\.q has no lora_magnitude_vector"),
    "magnitude-shape": (
        pair("layer.q", 3, 4) | {"layer.q.lora_magnitude_vector": torch.ones(4)},
        {"use_dora": True},
        r"has shape \(4,\); the module has 3 outputs",
    ),
    "undeclared-dora": (
        pair("layer.q", 3, 4) | {"layer.q.lora_magnitude_vector": torch.ones(3)},
        {},
        "not say use_dora",
    ),
    "undeclared-bias": (pair("layer.q", 3, 4) | {"layer.q.lora_B.bias": torch.ones(3)}, {}, "does not say lora_bias"),
    "missing-bias": (pair("layer.q", 3, 4), {"lora_bias": True}, r"has no lora_B\.bias"),
    "no-bias-to-add-to": (
        pair("embed", 5, 4) | {"embed.lora_B.bias": torch.ones(5)},
        {"lora_bias": True},
        r"module embed has a lora_bias, and the base has no embed\.bias",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    own, settings, message = MISFITS[case]
    with pytest.raises(AdapterError, match=message):
        AdapterSource(written(tmp_path, own, **settings), Held(Q), "adapter")


def test_an_ambiguous_module_is_refused_by_name(tmp_path: Path) -> None:
    base = Held({"text.q.weight": torch.zeros(3, 4), "image.q.weight": torch.zeros(3, 4)})
    with pytest.raises(AdapterError, match=r"module q .* any of image\.q\.weight, text\.q\.weight in base"):
        AdapterSource(written(tmp_path, pair("q", 3, 4)), base, "adapter")


def test_a_quantised_base_is_refused_by_name(tmp_path: Path) -> None:
    base = Held({"q.weight": torch.zeros(3, 4, dtype=torch.int8)})
    with pytest.raises(AdapterError, match=r"q\.weight is stored as I8"):
        AdapterSource(written(tmp_path, pair("q", 3, 4)), base, "adapter")


VARIANTS: dict[str, Any] = {
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"n": 1},
    "velora_config": {"num_groups": 2},
    "use_bdlora": {"nblocks": 2},
    "trainable_token_indices": [3],
    "megatron_config": {"x": 1},
    "a_setting_of_tomorrow": True,
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"(": 2},
    "alpha_pattern": {"q": "2"},
    "r": 0,
    "lora_alpha": None,
    "use_rslora": "yes",
}


@pytest.mark.parametrize("setting", VARIANTS)
def test_variants_that_cannot_be_folded_are_refused_by_setting(tmp_path: Path, setting: str) -> None:
    with pytest.raises(AdapterError, match=rf"{setting}"):
        AdapterSource(written(tmp_path, pair("layer.q", 3, 4), **{setting: VARIANTS[setting]}), Held(Q), "adapter")


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_starts_that_change_the_base_are_refused_with_the_way_out(tmp_path: Path, start: str) -> None:
    folder = written(tmp_path, pair("layer.q", 3, 4), init_lora_weights=start)
    with pytest.raises(AdapterError, match="changes the base's weights") as refusal:
        AdapterSource(folder, Held(Q), "adapter")
    assert "path_initial_model_for_weight_conversion" in str(refusal.value.hint)


@pytest.mark.parametrize("kind", [k.value for k in peft.PeftType if k.value != "LORA"] + [None])
def test_every_other_peft_type_is_refused_by_name(tmp_path: Path, kind: str | None) -> None:
    folder = written(tmp_path, pair("layer.q", 3, 4), peft_type=kind)
    with pytest.raises(AdapterError, match=f"peft_type is {kind!r}; only LORA"):
        AdapterSource(folder, Held(Q), "adapter")


def test_every_setting_that_peft_writes_is_known(tmp_path: Path) -> None:
    from merganser.checkpoints.lora_config import REFUSED, WITHOUT_EFFECT

    known = {*REFUSED, *WITHOUT_EFFECT, *Settings.__slots__}
    assert set(peft.LoraConfig().to_dict()) <= known


@pytest.mark.parametrize(
    ("target", "kind"), [("embed", "an embedding"), ("conv", "a convolution"), ("line", "a convolution")]
)
def test_dora_on_other_layers_is_refused_by_name(tmp_path: Path, target: str, kind: str) -> None:
    base, _ = trained(Mixed(), tmp_path, r=2, use_dora=True, target_modules=["lin", target])
    with pytest.raises(AdapterError, match=rf"module {target} is {kind} with DoRA"):
        AdapterSource(tmp_path, base, "adapter")


def test_grouped_convolutions_and_attention_modules_are_refused_by_name(tmp_path: Path) -> None:
    for target, message in (("grouped", "module grouped .* a grouped convolution"), ("attention", "nn.MultiheadAtt")):
        model = Mixed()
        base = Held({name: tensor.clone() for name, tensor in model.state_dict().items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target]))
            adapted.save_pretrained(tmp_path / target)
        with pytest.raises(AdapterError, match=message):
            AdapterSource(tmp_path / target, base, "adapter")


def test_a_square_layer_that_could_be_stored_either_way_is_refused(tmp_path: Path) -> None:
    own = pair("proj", 4, 4) | pair("wide", 6, 4)
    base = Held({"proj.weight": torch.zeros(4, 4), "wide.weight": torch.zeros(4, 6)})
    with pytest.raises(AdapterError, match=r"proj\.weight is square"):
        AdapterSource(written(tmp_path, own, fan_in_fan_out=False), base, "adapter")
    source = AdapterSource(written(tmp_path, own, fan_in_fan_out=True), base, "adapter")
    a, b = own["proj.lora_A.weight"], own["proj.lora_B.weight"]
    assert torch.equal(source.read("proj.weight"), (b @ a).T)


def test_a_square_layer_is_stored_like_others_of_its_name(tmp_path: Path) -> None:
    own = pair("attn.proj", 4, 4) | pair("mlp.proj", 6, 4)
    base = Held({"attn.proj.weight": torch.zeros(4, 4), "mlp.proj.weight": torch.zeros(4, 6)})
    source = AdapterSource(written(tmp_path, own, fan_in_fan_out=False), base, "adapter")
    a, b = own["attn.proj.lora_A.weight"], own["attn.proj.lora_B.weight"]
    assert torch.equal(source.read("attn.proj.weight"), (b @ a).T)


TIED = {"embed.weight": torch.zeros(5, 4)}


@pytest.mark.parametrize(
    "own",
    [
        pair("lm_head", 5, 4),
        {"embed.lora_embedding_A": torch.ones(2, 5), "embed.lora_embedding_B": torch.ones(4, 2)},
        {"lm_head.weight": torch.ones(5, 4)},
        {"lm_head.weight": torch.ones(5, 4), "embed.weight": torch.zeros(5, 4)},
        pair("lm_head", 5, 4)
        | {"embed.lora_embedding_A": torch.ones(2, 5), "embed.lora_embedding_B": torch.ones(4, 2)},
    ],
    ids=["alias", "canonical", "replaced", "replaced-differently", "changed-differently"],
)
def test_what_would_untie_tensors_is_refused_by_name(tmp_path: Path, own: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterError, match=r"lm_head\.weight") as refusal:
        AdapterSource(written(tmp_path, own), Held(TIED, {"lm_head.weight": "embed.weight"}), "adapter")
    assert "untie" in str(refusal.value)


def test_tied_tensors_that_change_alike_stay_tied(tmp_path: Path) -> None:
    base = Held(TIED, {"lm_head.weight": "embed.weight"})
    both = pair("lm_head", 5, 4)
    a, b = both["lm_head.lora_A.weight"], both["lm_head.lora_B.weight"]
    both |= {"embed.lora_embedding_A": b.T, "embed.lora_embedding_B": a.T}
    source = AdapterSource(written(tmp_path, both), base, "adapter")
    assert torch.equal(source.read("embed.weight"), b @ a)
    assert torch.equal(source.read("lm_head.weight"), b @ a)
    assert source.aliases == {"lm_head.weight": "embed.weight"}
    whole = {"lm_head.weight": torch.ones(5, 4), "embed.weight": torch.ones(5, 4)}
    assert torch.equal(AdapterSource(written(tmp_path, whole), base, "adapter").read("embed.weight"), torch.ones(5, 4))


def test_a_folder_that_is_no_sound_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        AdapterSource(tmp_path, Held(Q), "adapter")
    config = tmp_path / "adapter_config.json"
    for text, message in (("{", "not sound JSON"), ("[]", "not a JSON object"), ('{"peft_type": "LORA"', "not sound")):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            AdapterSource(tmp_path, Held(Q), "adapter")
    config.write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor"):
        AdapterSource(tmp_path, Held(Q), "adapter")

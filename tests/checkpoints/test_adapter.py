from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from adapter_helpers import Held, Mixed, Q, pair, trained, written
from merganser.checkpoints.adapter import AdapterSource
from merganser.errors import AdapterError


def llama() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def bert() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=2))


def gpt2() -> nn.Module:
    return transformers.GPT2Model(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def assert_same(source: AdapterSource, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(source.infos) == set(expected)
    for name, tensor in expected.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype, name
        assert read.shape == tensor.shape == source.infos[name].shape, name
        torch.testing.assert_close(read, tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 7, "target_modules": QV}),
    "all-linear": (llama, {"r": 3, "target_modules": "all-linear"}),
    "head": (llama, {"r": 3, "target_modules": ["lm_head", "q_proj"]}),
    "rslora": (llama, {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEAR}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 7, r"layers\.0\..*k_proj": 3, "proj": 9},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "v_proj": 32, "down_proj": 0, "rs.1.mlp.up_proj": 50},
        },
    ),
    "patterns-rslora": (
        llama,
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": QV,
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "lora-bias": (bert, {"r": 4, "lora_bias": True, "target_modules": ["query", "dense"]}),
    "bias-all": (bert, {"r": 4, "bias": "all", "target_modules": ["query"]}),
    "bias-lora-only": (bert, {"r": 4, "bias": "lora_only", "target_modules": ["query"]}),
    "bias-all-and-lora-bias": (bert, {"r": 4, "bias": "all", "lora_bias": True, "target_modules": ["query"]}),
    "modules-to-save": (bert, {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "task-type": (bert, {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "conv1d": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-square": (gpt2, {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "conv1d-unsaid": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "vision": (vit, {"r": 4, "target_modules": "all-linear"}),
    "vision-patches": (vit, {"r": 4, "target_modules": ["projection", "query"], "modules_to_save": ["classifier"]}),
    "dora": (llama, {"r": 4, "use_dora": True, "target_modules": LINEAR}),
    "dora-rslora": (llama, {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": QV}),
    "dora-conv1d": (gpt2, {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "layers": (llama, {"r": 4, "target_modules": QV, "layers_to_transform": [1]}),
    "embedding": (Mixed, {"r": 4, "lora_alpha": 3, "target_modules": ["embed", "lin"]}),
    "embedding-of-a-transformer": (llama, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "convolutions": (Mixed, {"r": 4, "lora_alpha": 3, "target_modules": ["conv", "point", "line"]}),
    "convolutions-lora-bias": (Mixed, {"r": 2, "lora_bias": True, "target_modules": ["conv", "line"]}),
    "batchnorm-saved": (Mixed, {"r": 4, "target_modules": ["lin"], "modules_to_save": ["norm", "head"]}),
    "gaussian": (llama, {"r": 4, "target_modules": QV, "init_lora_weights": "gaussian"}),
    "orthogonal": (llama, {"r": 4, "target_modules": QV, "init_lora_weights": "orthogonal"}),
    "mica": (llama, {"r": 4, "target_modules": QV, "init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_adapter_equals_pefts_own_merge(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    base, expected = trained(make(), tmp_path, **settings)
    source = AdapterSource(tmp_path, base, "adapter")
    assert_same(source, expected)
    assert any(not torch.equal(expected[name], base.tensors[name]) for name in expected)
    assert source.infos == base.infos
    assert source.companions() == base.companions()


@pytest.mark.parametrize("case", ["plain", "dora", "bias-all", "embedding", "convolutions"])
def test_a_torch_file_serves_as_well_as_safetensors(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    base, expected = trained(make(), tmp_path, **settings)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same(AdapterSource(tmp_path, base, "adapter"), expected)


def test_pefts_reloaded_adapter_merges_to_the_same(tmp_path: Path) -> None:
    make, settings = CASES["patterns"]
    base, expected = trained(make(), tmp_path, **settings)
    model = make()
    model.load_state_dict(base.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict()
    for name, tensor in reloaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_bases_are_rounded_once_from_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    base, _ = trained(llama(), tmp_path, dtype=dtype, r=4, lora_alpha=8, target_modules=QV)
    own = load_file(tmp_path / "adapter_model.safetensors")
    source = AdapterSource(tmp_path, base, "adapter")
    for name in base.tensors:
        if any(module in name for module in QV):
            stem = "base_model.model." + name.removesuffix(".weight")
            a, b = own[f"{stem}.lora_A.weight"].double(), own[f"{stem}.lora_B.weight"].double()
            exact = base.tensors[name].double() + 2 * (b @ a)
            spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
            assert source.read(name).dtype == dtype
            assert ((source.read(name).double() - exact).abs() <= 0.5001 * spacing + 1e-7).all()
        else:
            assert torch.equal(source.read(name), base.tensors[name])


def test_a_float64_base_is_added_to_in_float64(tmp_path: Path) -> None:
    base, _ = trained(llama(), tmp_path, r=4, target_modules=QV, lora_alpha=4)
    wide = Held({name: tensor.double() + 1e-12 for name, tensor in base.tensors.items()})
    own = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stem = "base_model.model." + name.removesuffix(".weight")
    a, b = own[f"{stem}.lora_A.weight"], own[f"{stem}.lora_B.weight"]
    expected = [
        [float(wide.tensors[name][i, j]) + sum(float(b[i, k]) * float(a[k, j]) for k in range(4)) for j in range(16)]
        for i in range(16)
    ]
    read = AdapterSource(tmp_path, wide, "adapter").read(name)
    torch.testing.assert_close(read, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


TALL = {"out": 700, "in": 33}


class Tall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(TALL["in"], TALL["out"])
        self.turned = transformers.pytorch_utils.Conv1D(TALL["in"], TALL["out"])
        self.embed = nn.Embedding(TALL["out"], TALL["in"])
        self.conv = nn.Conv2d(5, TALL["out"], 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lin", "turned", "embed", "conv"]},
        {"target_modules": ["lin", "turned"], "use_dora": True},
        {"target_modules": ["lin", "conv"], "lora_bias": True},
    ],
    ids=["lora", "dora", "bias"],
)
def test_a_slice_has_the_bits_of_the_whole(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, expected = trained(Tall(), tmp_path, r=19, **settings)
    source = AdapterSource(tmp_path, base, "adapter")
    assert_same(source, expected, 2e-6)
    for name in source.infos:
        whole = source.read(name)
        assert torch.equal(whole, source.read(name))
        rows = source.infos[name].rows
        cuts = [(0, 1), (0, rows), (255, 257), (256, 512), (rows - 1, rows), (13, 600), (1, 3), (7, 7), (511, rows)]
        for start, stop in cuts:
            assert torch.equal(AdapterSource(tmp_path, base, "adapter").read(name, (start, stop)), whole[start:stop])
        parts = [source.read(name, (k, min(k + 37, rows))) for k in range(0, rows, 37)]
        assert torch.equal(torch.cat(parts), whole)


def test_the_sum_is_w_plus_alpha_over_r_b_a(tmp_path: Path) -> None:
    own = {"m.lora_A.weight": torch.tensor([[1.0, 2.0, 0.0]]), "m.lora_B.weight": torch.tensor([[3.0], [4.0]])}
    base = Held({"m.weight": torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 5.0]])})
    source = AdapterSource(written(tmp_path, own, r=1, lora_alpha=0.5), base, "adapter")
    assert source.read("m.weight").tolist() == [[2.5, 4.0, 1.0], [2.0, 4.0, 5.0]]
    assert source.read("m.weight", (1, 2)).tolist() == [[2.0, 4.0, 5.0]]
    assert source.read("m.weight", (1, 1)).shape == (0, 3)


@pytest.mark.parametrize(
    ("adapter_name", "base_name"),
    [("model.layers.0.q", "layers.0.q"), ("layers.0.q", "model.layers.0.q"), ("layers.0.q", "layers.0.q")],
)
def test_a_base_saved_with_another_prefix_is_matched(tmp_path: Path, adapter_name: str, base_name: str) -> None:
    own = pair(adapter_name, 3, 4) | {adapter_name.replace("0.q", "norm") + ".weight": torch.ones(3)}
    base = {f"{base_name}.weight": torch.zeros(3, 4), base_name.replace("0.q", "norm") + ".weight": torch.zeros(3)}
    source = AdapterSource(written(tmp_path, own), Held(base), "adapter")
    b, a = own[f"{adapter_name}.lora_B.weight"], own[f"{adapter_name}.lora_A.weight"]
    assert torch.equal(source.read(f"{base_name}.weight"), b @ a)
    assert source.read(base_name.replace("0.q", "norm") + ".weight").tolist() == [1.0, 1.0, 1.0]


def test_a_module_is_never_matched_by_another_prefix_than_the_first(tmp_path: Path) -> None:
    own = pair("a.q", 3, 4) | pair("b.k", 3, 4)
    base = Held({"text.a.q.weight": torch.zeros(3, 4), "image.b.k.weight": torch.zeros(3, 4)})
    with pytest.raises(AdapterError, match=r"module b\.k of the adapter is not in base"):
        AdapterSource(written(tmp_path, own), base, "adapter")


def test_identity_is_of_the_tensors_the_settings_that_count_and_the_base(tmp_path: Path) -> None:
    def identity(tensors: dict[str, Tensor], held: Held | None = None, **settings: Any) -> str | None:
        return AdapterSource(written(tmp_path, tensors, **settings), held or Held(Q), "adapter").identity

    own = pair("layer.q", 3, 4)
    first = identity(own)
    assert first is not None
    assert len(first) == 64
    assert identity(dict(reversed(own.items())), lora_dropout=0.5, base_model_name_or_path="elsewhere") == first
    other = {name: tensor + (name.endswith("B.weight")) for name, tensor in own.items()}
    half = {name: tensor.half() for name, tensor in own.items()}
    inherited = Held(Q)
    inherited.identity = "base"
    others = [
        identity(other),
        identity(half),
        identity(own, lora_alpha=3),
        identity(own, use_rslora=True),
        identity(own, rank_pattern={"q": 2}),
        identity(own, alpha_pattern={"q": 1, "k": 1}),
        identity(own, alpha_pattern={"k": 1, "q": 1}),
        identity(own, inherited),
    ]
    assert len({first, *others}) == 9

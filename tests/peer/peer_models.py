"""Tiny random checkpoints of five families: a base and models tuned from it, in float32 and in bfloat16.

Their layout is one that mergekit 0.1.5 merges: GPT-NeoX with the buffers that its old checkpoints hold, and ViT under
the names that transformers 5 gives its tensors in memory. "neox.published" and "vit.published" are as they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from vocabulary_helpers import MERGES, MORE, bpe, embeddings, save_tokenizer

#: Models of a family; "base" is what the others were tuned from.
NAMES = ("base", "a", "b", "c")
#: By family: class of its configuration, class of its model, settings.
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4},
    ),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 12},
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "image_size": 8, "patch_size": 4, "num_labels": 5},
    ),
}  # fmt: skip
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def save_models(root: Path) -> None:
    """Write every model as ROOT/family.dtype/name."""
    for number, (family, (config, model, settings)) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        folder = root / f"{family}.made"
        made.save_pretrained(folder)
        text = (folder / "config.json").read_text("utf-8")
        stored = load_file(folder / "model.safetensors")
        layouts = {"": {"vit": made.state_dict()}.get(family, stored)}
        if family in ("neox", "vit"):
            layouts["published."] = stored
        for layout, tensors in layouts.items():
            base = {name: x + 0.05 * torch.randn(x.shape) for name, x in tensors.items()}
            fixed = neox_buffers() if family == "neox" and not layout else {}
            for k, name in enumerate(NAMES):
                tuned = {n: tuned_from(x, number, k, n) for n, x in base.items()} | fixed
                for dtype, torch_dtype in DTYPES.items():
                    save_model(root / f"{family}.{layout}{dtype}" / name, tuned, torch_dtype, text)
    save_adapter(root)
    save_wide(root)
    save_odd(root)
    save_masked(root)
    save_tied(root)
    save_words(root)


def neox_buffers(layers: int = 2) -> dict[str, Tensor]:
    """What checkpoints of GPT-NeoX held once beside their weights, and mergekit asks for."""
    held = {
        "bias": torch.ones(12, 12, dtype=torch.bool).tril().reshape(1, 1, 12, 12),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.tensor([1.0, 0.01]),
    }
    return {f"gpt_neox.layers.{i}.attention.{n}": x.clone() for i in range(layers) for n, x in held.items()}


def tuned_from(base: Tensor, number: int, k: int, name: str) -> Tensor:
    """A tensor of model k: a third of the base's entries stay as they are, and norms of changes differ by model."""
    if k == 0:
        return base
    generator = torch.Generator().manual_seed(1000 * number + 10 * k + sum(map(ord, name)))
    change = torch.randn(base.shape, generator=generator) * 0.01 * (1 + k / 2)
    changed = torch.rand(base.shape, generator=generator) < 2 / 3
    return base + change * (changed if base.numel() > 8 else 1)


def save_model(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, config: str) -> None:
    """One checkpoint of a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {n: (x.to(dtype) if x.is_floating_point() else x).contiguous().clone() for n, x in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(config, "utf-8")


def save_adapter(root: Path) -> None:
    """ROOT/llama.*/adapter, of rank 2."""
    generator = torch.Generator().manual_seed(7)
    names = [f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj", "mlp.down_proj")]
    for dtype, torch_dtype in DTYPES.items():
        base = load_file(root / f"llama.{dtype}" / "base" / "model.safetensors")
        folder = root / f"llama.{dtype}" / "adapter"
        folder.mkdir()
        held = {}
        for name in names:
            out, inner = base[f"{name}.weight"].shape
            held[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, inner, generator=generator).to(torch_dtype)
            held[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator).to(torch_dtype)
        save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 0.05, "bias": "none",
            "target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": str(root / f"llama.{dtype}/base"),
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")


def save_wide(root: Path, width: int = 40) -> None:
    """ROOT/wide.f32: no base, and the same change in every matrix, so that each matrix is a draw of its own."""
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=1
    )
    made = transformers.LlamaForCausalLM(config)
    made.save_pretrained(root / "wide.made")
    text = (root / "wide.made" / "config.json").read_text("utf-8")
    zeros = {n: torch.zeros_like(x) for n, x in load_file(root / "wide.made" / "model.safetensors").items()}
    save_model(root / "wide.f32" / "base", zeros, torch.float32, text)
    for k, name in enumerate("ab"):
        change = torch.randn(width, width, generator=torch.Generator().manual_seed(k)) * 0.02
        change += 0.002 * change.sign()  # a kept entry is never mistaken for a dropped one
        tensors = {n: change if x.shape == change.shape else x for n, x in zeros.items()}
        save_model(root / "wide.f32" / name, tensors, torch.float32, text)


def save_odd(root: Path) -> None:
    """Models of one odd property each, for what the programs do differently."""
    config = (root / "llama.f32" / "base" / "config.json").read_text("utf-8")
    models = {n: load_file(root / "llama.f32" / n / "model.safetensors") for n in NAMES}
    base = models["base"]
    zero, same = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    for name in NAMES:
        small = {n: base[n] + (x - base[n]) * 1e-5 for n, x in models[name].items()}
        save_model(root / "small.f32" / name, small, torch.float32, config)
        odd = dict(models[name])
        odd[zero] = odd[zero] * (name != "base")  # the base is zero there
        odd[same] = base[same] if name == "a" else odd[same]  # model a did not change that
        save_model(root / "odd.f32" / name, odd, torch.float32, config)
        still = models[name] | {same: base[same]}  # nobody did
        save_model(root / "still.f32" / name, still, torch.float32, config)


def save_masked(root: Path) -> None:
    """ROOT/maskedlm.f32: BERT as `BertForMaskedLM` stores it, without a pooler."""
    made = transformers.BertForMaskedLM(transformers.BertConfig(**FAMILIES["bert"][2]))
    for name in ("a", "b"):
        made.bert.embeddings.word_embeddings.weight.data.normal_(std=0.02)
        made.save_pretrained(root / "maskedlm.f32" / name)


def save_tied(root: Path) -> None:
    """ROOT/tied.f32: model a ties its head to its embedding, model b does not."""
    for name in ("a", "b"):
        folder = root / "qwen2.f32" / name
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if name == "b":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
            config["tie_word_embeddings"] = False
        save_model(root / "tied.f32" / name, tensors, torch.float32, json.dumps(config))


def save_words(root: Path) -> None:
    """ROOT/words: one architecture, and vocabularies of 64, of 66, and of 64 with four unused rows."""
    config = json.loads((root / "llama.f32" / "base" / "config.json").read_text("utf-8"))
    layers = {n: x for n, x in load_file(root / "llama.f32" / "a" / "model.safetensors").items() if "layers" in n}
    tokenizers = {"small": (bpe(), 64), "large": (bpe((*MERGES, *MORE), turned=5), 66), "unused": (bpe(), 68)}
    for k, (name, (tokenizer, rows)) in enumerate(tokenizers.items()):
        tensors = embeddings(k + 1, rows, 16)
        tensors = {n: x for n, x in tensors.items() if "layers" not in n} | layers
        save_model(root / "words" / name, tensors, torch.float32, json.dumps(config | {"vocab_size": rows}))
        save_tokenizer(tokenizer, root / "words" / name)

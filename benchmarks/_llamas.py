"""Random Llamas in bfloat16: python _llamas.py KIND FOLDER COUNT makes a base and fine-tunes; what is there stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Width, inner width, layers, vocabulary, experts a layer.
KINDS = {
    "one": (8, 8, 1, 16, 0),
    "tiny": (8, 8, 1200, 16, 0),
    "0.1": (768, 2048, 12, 32000, 0),
    "0.5": (896, 4864, 24, 151936, 0),
}


def model(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights of one model; seed 0 is the base."""
    width, inner, layers, vocabulary, _ = KINDS[kind]
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(100 + seed)
    made = {}

    def weight(name: str, *shape: int) -> None:
        x = 0.02 * torch.randn(shape, generator=shared)
        if seed:
            x += 0.002 * torch.randn(shape, generator=own)
        made[name] = x.to(torch.bfloat16)

    weight("model.embed_tokens.weight", vocabulary, width)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for part in "qkvo":
            weight(f"{prefix}self_attn.{part}_proj.weight", width, width)
        for part in ("gate", "up"):
            weight(f"{prefix}mlp.{part}_proj.weight", inner, width)
        weight(f"{prefix}mlp.down_proj.weight", width, inner)
        for part in ("input", "post_attention"):
            weight(f"{prefix}{part}_layernorm.weight", width)
    weight("model.norm.weight", width)
    return made


def main() -> None:
    kind, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    width, inner, layers, vocabulary, _ = KINDS[kind]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for number in range(count):
        place = folder / f"model-{number}"
        if (place / "config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        save_file(model(kind, number), place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()

"""Where configs of models differ in what the weights mean; shapes tell nothing of heads, angles or norms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from merganser.checkpoints.folder import config_of
from merganser.types import Source

#: Keys, at any depth, that say what the weights mean.
KEYS = (
    "architectures", "model_type", "hidden_size", "n_embd", "d_model", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "hidden_act", "hidden_activation",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "vocab_size",
    "tie_word_embeddings", "rms_norm_eps", "layer_norm_eps", "num_experts", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip


def differing(sources: Mapping[str, Source]) -> dict[str, dict[str, list[str]]]:
    """Every key of `KEYS` with more than one value: key -> value as JSON -> references of the models that have it.

    Models without a config.json, and keys that a config leaves out, say nothing.
    """
    configs = {
        ref: dict(_meaning(config, "")) for ref, source in sources.items() if (config := config_of(source.companions()))
    }
    found: dict[str, dict[str, list[str]]] = {}
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values: dict[str, list[str]] = {}
        for ref, config in configs.items():
            if key in config:
                values.setdefault(json.dumps(config[key], sort_keys=True), []).append(ref)
        if len(values) > 1:
            found[key] = values
    return found


def _meaning(config: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in KEYS:
            yield above + key, value
        elif isinstance(value, dict):
            yield from _meaning(value, f"{above}{key}.")

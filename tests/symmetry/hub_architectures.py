"""Tiny networks of transformers, from configurations of their own; nothing is downloaded.

Transformers is imported when a network is built, not before.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tiny import CLASSES, VOCABULARY, Builder, pictures, tiny, tokens
from torch import Tensor, nn


class Only(nn.Module):
    """One output of a network that also gives its hidden states."""

    def __init__(self, network: nn.Module, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, **inputs: Any) -> Tensor:
        return self.network(**inputs)[self.output]


def hub(model: str, config: str, only: str | None = None, **options: Any) -> nn.Module:
    """A network of transformers by the names of its class and of its configuration's, and of its output."""
    import transformers

    network = getattr(transformers, model)(getattr(transformers, config)(**options))
    return Only(network, only) if only else network


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOOPED = {"experts_implementation": "eager"}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "only": "logits",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


SPEECH = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 20],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 4,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "only": "logits",
}


def masked() -> dict[str, Any]:
    """Two texts, the second with padding at its end."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tokens().clamp(min=3) * mask, "attention_mask": mask}


def cached_not() -> dict[str, Any]:
    """The same, for networks that would keep keys and values."""
    return {**masked(), "use_cache": False}


def unmasked() -> dict[str, Any]:
    """Texts for state-space networks."""
    return {"input_ids": tokens(), "use_cache": False}


def many() -> dict[str, Any]:
    """Texts long enough that every expert is asked."""
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 23)), "use_cache": False}


def translated() -> dict[str, Any]:
    """A text, and the beginning of another."""
    return {**masked(), "decoder_input_ids": tokens()[:, :5], "use_cache": False}


def seen(side: int = 16) -> dict[str, Any]:
    """Two pictures by their name."""
    return {"pixel_values": pictures(side)}


def heard() -> dict[str, Any]:
    """Two spectrograms, and the beginning of a text."""
    return {
        "input_features": torch.randn(2, 10, 14),
        "decoder_input_ids": tokens()[:, :5],
        "use_cache": False,
    }


def spoken() -> dict[str, Any]:
    """Two sounds."""
    return {"input_values": torch.randn(2, 400)}


def text(model: str, config: str | None = None, inputs: Any = masked, **options: Any) -> Builder:
    """A network of text: its model class, the configuration's where it is not of the same family."""
    return tiny(hub, inputs, model=model, config=config or _config(model), **(TEXT | options))


def picture(model: str, **options: Any) -> Builder:
    """A network of pictures."""
    return tiny(hub, seen, model=model, config=_config(model), **(PICTURE | {"num_labels": CLASSES} | options))


def other(model: str, inputs: Any, **options: Any) -> Builder:
    """A network with settings of its own."""
    return tiny(hub, inputs, model=model, config=_config(model), **options)


def _config(model: str) -> str:
    return re.split("For(?=[A-Z])|LMHeadModel|MTModel", model)[0] + "Config"


STAGES = {"num_labels": CLASSES, "hidden_sizes": [16, 24], "depths": [2, 1]}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
HUB: dict[str, Builder] = {
    # encoders of text
    "bert": text("BertForMaskedLM"),
    "bert-classifier": text("BertForSequenceClassification", num_labels=CLASSES, attn_implementation="eager"),
    "roberta": text("RobertaForMaskedLM", pad_token_id=0),
    "distilbert": other(
        "DistilBertForSequenceClassification",
        masked,
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
    ),
    "albert": text("AlbertForMaskedLM", embedding_size=20),
    "electra": text("ElectraForMaskedLM", embedding_size=20),
    "deberta-v2": text(
        "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=CLASSES
    ),
    "mpnet": text("MPNetForMaskedLM", pad_token_id=1),
    "modernbert": text("ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2, local_attention=4),
    "xlm-roberta": text("XLMRobertaForTokenClassification", num_labels=CLASSES),
    # decoders of text
    "gpt2": other("GPT2LMHeadModel", cached_not, vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "opt": text("OPTForCausalLM", inputs=cached_not, ffn_dim=48, word_embed_proj_dim=32),
    "opt-projected": text("OPTForCausalLM", inputs=cached_not, ffn_dim=48, word_embed_proj_dim=20),
    "gpt-neo": other(
        "GPTNeoForCausalLM",
        cached_not,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=3,
        max_position_embeddings=40,
    ),
    "gpt-neox": text("GPTNeoXForCausalLM", inputs=cached_not),
    "gpt-j": other(
        "GPTJForCausalLM",
        cached_not,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=40,
    ),
    "bloom": other("BloomForCausalLM", cached_not, vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "llama-3": text("LlamaForCausalLM", inputs=cached_not, **GROUPED),
    "llama-eager": text("LlamaForCausalLM", inputs=cached_not, attn_implementation="eager", **GROUPED),
    "mistral": text("MistralForCausalLM", inputs=cached_not, sliding_window=4, **GROUPED),
    "qwen2": text("Qwen2ForCausalLM", inputs=cached_not, **GROUPED),
    "qwen3": text("Qwen3ForCausalLM", inputs=cached_not, head_dim=8, **GROUPED),
    "gemma": text("GemmaForCausalLM", inputs=cached_not, head_dim=10, num_key_value_heads=1),
    "gemma2": text("Gemma2ForCausalLM", inputs=cached_not, head_dim=10, sliding_window=4, **GROUPED),
    "gemma3": text("Gemma3ForCausalLM", "Gemma3TextConfig", inputs=cached_not, head_dim=10, **GROUPED),
    "phi": text("PhiForCausalLM", inputs=cached_not, partial_rotary_factor=0.5),
    "phi3": text("Phi3ForCausalLM", inputs=cached_not, **GROUPED),
    "falcon": text("FalconForCausalLM", inputs=cached_not, multi_query=True, new_decoder_architecture=False),
    "falcon-new": text("FalconForCausalLM", inputs=cached_not, new_decoder_architecture=True, num_kv_heads=2),
    "stablelm": text("StableLmForCausalLM", inputs=cached_not, **GROUPED),
    "olmo2": text("Olmo2ForCausalLM", inputs=cached_not, **GROUPED),
    "cohere": text("CohereForCausalLM", inputs=cached_not, **GROUPED),
    "granite": text("GraniteForCausalLM", inputs=cached_not, residual_multiplier=0.5, **GROUPED),
    "smollm3": text("SmolLM3ForCausalLM", inputs=cached_not, **GROUPED),
    "mpt": other(
        "MptForCausalLM",
        cached_not,
        vocab_size=VOCABULARY,
        d_model=32,
        n_layers=2,
        n_heads=4,
        expansion_ratio=2,
        max_seq_len=40,
    ),
    "mixtral": text("MixtralForCausalLM", inputs=many, num_local_experts=4, **LOOPED, **GROUPED),
    "qwen2-moe": text(
        "Qwen2MoeForCausalLM", inputs=many, shared_expert_intermediate_size=28, **EXPERTS, **LOOPED, **GROUPED
    ),
    "qwen3-moe": text("Qwen3MoeForCausalLM", inputs=many, head_dim=8, **EXPERTS, **LOOPED, **GROUPED),
    "qwen3-moe-grouped": text("Qwen3MoeForCausalLM", inputs=many, head_dim=8, **EXPERTS, **GROUPED),
    "qwen3-moe-batched": text(
        "Qwen3MoeForCausalLM", inputs=many, head_dim=8, experts_implementation="batched_mm", **EXPERTS, **GROUPED
    ),
    # encoders with decoders
    "t5": other("T5ForConditionalGeneration", translated, **T5),
    "t5-gated": other(
        "T5ForConditionalGeneration", translated, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5
    ),
    "bart": other("BartForConditionalGeneration", translated, max_position_embeddings=40, **ENCODER_DECODER),
    "marian": other("MarianMTModel", translated, max_position_embeddings=40, **ENCODER_DECODER),
    "whisper": other(
        "WhisperForConditionalGeneration",
        heard,
        num_mel_bins=10,
        max_source_positions=7,
        max_target_positions=12,
        **ENCODER_DECODER,
    ),
    # without attention
    "mamba": other(
        "MambaForCausalLM",
        unmasked,
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=5,
        time_step_rank=3,
    ),
    "mamba2": other(
        "Mamba2ForCausalLM",
        unmasked,
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_heads=6,
        head_dim=8,
        state_size=5,
        n_groups=2,
        chunk_size=4,
    ),
    "rwkv": other(
        "RwkvForCausalLM", unmasked, vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, context_length=12
    ),
    # pictures
    "hub-vit": picture("ViTForImageClassification"),
    "hub-deit": picture("DeiTForImageClassificationWithTeacher"),
    "beit": picture("BeitForImageClassification", layer_scale_init_value=0.5, use_relative_position_bias=True),
    "data2vec-vision": picture("Data2VecVisionForImageClassification", layer_scale_init_value=0.5),
    "dinov2": picture("Dinov2ForImageClassification", mlp_ratio=2),
    "dinov2-swiglu": picture("Dinov2ForImageClassification", mlp_ratio=2, use_swiglu_ffn=True),
    "hub-swin": other("SwinForImageClassification", seen, num_labels=CLASSES, **WINDOWS),
    "swinv2": other("Swinv2ForImageClassification", seen, num_labels=CLASSES, **WINDOWS),
    "segformer": other(
        "SegformerForSemanticSegmentation",
        seen,
        num_labels=5,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 24],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        decoder_hidden_size=20,
    ),
    "hub-convnext": other("ConvNextForImageClassification", seen, layer_scale_init_value=0.5, num_stages=2, **STAGES),
    "convnextv2": other("ConvNextV2ForImageClassification", seen, num_stages=2, **STAGES),
    "hub-resnet": other("ResNetForImageClassification", seen, embedding_size=16, **STAGES),
    "hub-regnet": other("RegNetForImageClassification", seen, groups_width=8, embedding_size=16, **STAGES),
    "hub-mobilenet-v2": other(
        "MobileNetV2ForImageClassification", lambda: seen(32), num_labels=CLASSES, depth_multiplier=0.1, image_size=32
    ),
    "hub-poolformer": other(
        "PoolFormerForImageClassification",
        seen,
        num_labels=CLASSES,
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        layer_scale_init_value=0.5,
    ),
    "levit": other(
        "LevitForImageClassification",
        lambda: seen(32),
        num_labels=CLASSES,
        image_size=32,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[5, 5, 5],
        down_ops=[["Subsample", 5, 3, 2, 2, 2], ["Subsample", 5, 4, 2, 2, 2]],
    ),
    # several kinds of input
    "clip-vision": tiny(
        hub,
        seen,
        model="CLIPVisionModelWithProjection",
        config="CLIPVisionConfig",
        only="image_embeds",
        projection_dim=20,
        **PICTURE,
    ),
    "clip-text": text(
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        only="text_embeds",
        projection_dim=20,
        hidden_act="quick_gelu",
        eos_token_id=2,
    ),
    "siglip-vision": picture("SiglipForImageClassification", vision_config=PICTURE, text_config=TEXT),
    "vilt": tiny(
        hub,
        lambda: {**masked(), **seen()},
        model="ViltForQuestionAnswering",
        config="ViltConfig",
        num_labels=CLASSES,
        **(TEXT | PICTURE),
    ),
    "wav2vec2": other("Wav2Vec2ForCTC", spoken, **SPEECH),
    "hubert": other("HubertForCTC", spoken, **SPEECH),
}

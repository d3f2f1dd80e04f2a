"""Tiny networks of transformers at random, saved as that library saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

#: Sizes of a BERT-like network that is built in no time.
TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 60,
}
WORDS = ("a", "photo", "of", "cat", "dog", "eel", "good", "bad", ".")
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, with the marks of BERT."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*MARKS, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), MARKS, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def saved_model(model: Any, folder: Path) -> Any:
    """A network of transformers, in evaluation mode and on disk."""
    model.eval().save_pretrained(folder)
    return model


def tiny_bert(folder: Path, seed: int = 0, **sizes: Any) -> Any:
    """A BERT at random, with its tokenizer."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**TINY, **sizes})
    model = saved_model(transformers.BertModel(config), folder)
    tokenizer(folder)
    return model


def tiny_clip(folder: Path) -> Any:
    """Both towers of CLIP at random, with tokenizer and processor."""
    torch.manual_seed(3)
    text = {**TINY, "projection_dim": 6, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision_sizes(), projection_dim=6)
    model = saved_model(transformers.CLIPModel(config), folder)
    tokenizer(folder)
    processor(folder)
    return model


def vision_sizes() -> dict[str, int]:
    """Sizes of a tiny vision tower."""
    sizes = {"image_size": 8, "patch_size": 4, "projection_dim": 6}
    return sizes | {k: TINY[k] for k in TINY if k not in ("vocab_size", "max_position_embeddings")}


def processor(folder: Path) -> Any:
    """CLIP's image processor for 8 x 8 pixels."""
    made = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    made.save_pretrained(folder)
    return made

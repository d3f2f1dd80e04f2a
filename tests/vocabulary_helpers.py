"""Small tokenizers made by the library that reads them, models whose rows say whose they are, and recipes of them."""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.merging.recipe import Input, Recipe, Slice, Vocabulary
from merganser.merging.vocabulary import VocabularyPlan, vocabulary_views
from merganser.types import Source

SPECIALS = ("<unk>", "<s>", "</s>")
#: 40 tokens without merges, and 24 merges: a vocabulary of 64.
LETTERS = (*SPECIALS, "▁", *string.ascii_lowercase, *string.digits)
MERGES = tuple(("▁", letter) for letter in string.ascii_lowercase[:24])
#: Two more, which make the 66.
MORE = (("t", "h"), ("th", "e"))


def bpe(
    merges: Sequence[tuple[str, str]] = MERGES,
    added: Sequence[str | AddedToken] = (),
    *,
    letters: Sequence[str] = LETTERS,
    turned: int = 0,
    stride: int = 1,
) -> Tokenizer:
    """A BPE over words that begin with ▁; `turned` and `stride` move ids behind the special ones."""
    tokens = [*letters[len(SPECIALS) :], *(a + b for a, b in merges)]
    moved = dict(sorted(((turned + i * stride) % len(tokens), token) for i, token in enumerate(tokens)))
    tokens = [*letters[: len(SPECIALS)], *moved.values()]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges), unk_token="<unk>")
    return finished(Tokenizer(model), added)


def finished(tokenizer: Tokenizer, added: Sequence[str | AddedToken] = ()) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "merged_with_next"), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([t for t in SPECIALS if tokenizer.token_to_id(t) is not None])
    tokenizer.add_tokens(list(added))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def embeddings(number: int, rows: int, width: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Row i of model k holds 100 k + i (and half more in the head), in steps of 1/8 from column to column."""
    table = (100.0 * number + torch.arange(rows)).reshape(-1, 1) + torch.arange(width) / 8
    return {
        "model.embed_tokens.weight": table.to(dtype),
        "lm_head.weight": (table + 0.5).to(dtype),
        "model.layers.0.mlp.up_proj.weight": torch.full((7, width), float(number)),
        "model.norm.weight": torch.full((width,), float(number)),
    }


def save_model(folder: Path, tokenizer: Tokenizer | None, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(next(iter(tensors.values())))}), "utf-8")
    return save_tokenizer(tokenizer, folder, **settings) if tokenizer is not None else folder


def recipe_of(base: Path | None, others: Sequence[Path], vocabulary: Vocabulary | None, **settings: Any) -> Recipe:
    inputs = tuple(Input(str(path)) for path in others)
    return Recipe("linear", (Slice(inputs),), Input(str(base)) if base else None, vocabulary=vocabulary, **settings)


def planned(recipe: Recipe) -> tuple[VocabularyPlan, dict[str, Source]]:
    sources = {ref: open_source(ref) for ref in recipe.refs}
    plan = vocabulary_views(recipe, sources)
    assert plan is not None
    return plan, sources


def put_down(plan: VocabularyPlan, folder: Path) -> Path:
    """The files of the output's tokenizer, in a folder."""
    folder.mkdir()
    for name, content in plan.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


def auto(folder: Path) -> Any:
    """The tokenizer as its users load it."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(str(folder))


def ids_of(folder: Path, text: str) -> list[int]:
    return list(auto(folder)(text, add_special_tokens=False)["input_ids"])


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def family_at(folder: Path) -> dict[str, Path]:
    """The base (64), two more tokens and other ids (66), four rows that no token has (64 + 4), an added token."""
    return {
        "base": save_model(folder / "base", bpe(), embeddings(0, 64)),
        "more": save_model(folder / "more", bpe((*MERGES, *MORE), turned=5), embeddings(1, 66)),
        "wide": save_model(folder / "wide", bpe(turned=3), embeddings(2, 68)),
        "chat": save_model(
            folder / "chat", bpe(added=[AddedToken("<|end|>", special=True, normalized=False)]), embeddings(3, 65)
        ),
    }

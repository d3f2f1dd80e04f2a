"""Small tokenizers of every kind, in pairs that know different words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from merganser.merging.vocabulary import VocabularyPlan
from vocabulary_helpers import (
    MERGES,
    MORE,
    SPECIALS,
    auto,
    bpe,
    embeddings,
    finished,
    save_model,
)

EMBED = "model.embed_tokens.weight"
END = AddedToken("<|end|>", special=True, normalized=False)


def word_level(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    vocab = {t: i for i, t in enumerate([*SPECIALS, *words])}
    tokenizer = finished(Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), added)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_piece(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    vocab = {t: i for i, t in enumerate([*SPECIALS, *words])}
    tokenizer = finished(Tokenizer(models.WordPiece(vocab, unk_token="<unk>")), added)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return tokenizer


def unigram(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    vocab = [*((t, 0.0) for t in SPECIALS), *((t, -float(i)) for i, t in enumerate(words, 2))]
    tokenizer = finished(Tokenizer(models.Unigram(vocab, unk_id=0)), added)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def byte_level(merges: Sequence[tuple[str, str]], added: Sequence[AddedToken] = ()) -> Tokenizer:
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = finished(Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges))), added)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


#: Kind -> two tokenizers, the second of which knows more in another order, and a text.
PAIRS: dict[str, tuple[Tokenizer, Tokenizer, str]] = {
    "WordLevel": (word_level(["a", "b", "cat"]), word_level(["dog", "cat", "b", "a"], [END]), "a dog cat<|end|> b"),
    "WordPiece": (
        word_piece(["a", "b", "cat", "##s"]),
        word_piece(["dog", "cat", "##s", "a", "b"], [END]),
        "cats dogs<|end|> b",
    ),
    "Unigram": (
        unigram(["▁a", "▁b", "▁cat", "a", "▁"]),
        unigram(["▁dog", "▁cat", "▁a", "▁b", "a", "▁"], [END]),
        "cat dog<|end|> b",
    ),
    "BPE": (bpe(added=["[X]"]), bpe((*MERGES, *MORE), [END], turned=9), "the cat<|end|> bathes"),
    "ByteLevel": (
        byte_level([("Ġ", "a"), ("t", "h")], ["[X]"]),
        byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a")], [END]),
        "a the<|end|> café the",
    ),
}
EVERY_KIND = pytest.mark.parametrize("kind", PAIRS)


def pair(kind: str, folder: Path, **settings: Any) -> tuple[Path, Path]:
    first, second, _ = PAIRS[kind]
    sizes = [t.get_vocab_size(with_added_tokens=True) for t in (first, second)]
    return (
        save_model(folder / "first", first, embeddings(0, sizes[0]), **settings),
        save_model(folder / "second", second, embeddings(10, sizes[1]), **settings),
    )


def check_ids(plan: VocabularyPlan, out: Path) -> None:
    """The library gives every token the id that the plan says, and knows no others."""
    assert auto(out).get_vocab() == {token: i for i, token in enumerate(plan.tokens)}

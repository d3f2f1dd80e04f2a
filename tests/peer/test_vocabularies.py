"""Vocabularies of 64, of 66 in another order, and of 64 with four unused rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peer_jobs import Merges, load
from peer_recipes import TOKENIZERS
from tokenizers import Tokenizer


def ids(folder: Path) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_of_every_token_are_the_same(merges: Merges, name: str) -> None:
    """By token: mergekit adds the new tokens of a union in the order of a Python set, which differs from run to run."""
    job = f"vocabulary {name}"
    assert merges.error(job) is None
    ours, theirs = merges.ours_at(job), merges.theirs_at(job)
    mine, other = ids(ours), ids(theirs)
    assert mine.keys() == other.keys()
    assert sorted(mine.values()) == sorted(other.values())
    a, b = load(ours), load(theirs)
    assert a.keys() == b.keys()
    rows = [mine[token] for token in mine], [other[token] for token in mine]
    for tensor, x in a.items():
        y = b[tensor]
        assert x.shape == y.shape, tensor
        if tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            x, y = x[rows[0]], y[rows[1]]
        assert float((x - y).abs().max() / y.abs().max()) <= 1e-6, tensor
    sizes = [json.loads((f / "config.json").read_text("utf-8"))["vocab_size"] for f in (ours, theirs)]
    assert sizes[0] == sizes[1] == len(a["lm_head.weight"])


def test_rows_that_pad_are_a_mean(merges: Merges) -> None:
    """Of each model's own rows, before any is copied to where it lacks a token; mergekit's mean is taken after that."""
    ours, theirs = merges.ours("vocabulary padded"), merges.theirs("vocabulary padded")
    models = [load(merges.root / "models" / "words" / name) for name in ("small", "large")]
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        x, y = ours[tensor], theirs[tensor]
        assert len(x) == len(y) == 96
        own = sum(m[tensor].mean(0) for m in models) / 2
        for found, mean in ((x, own), (y, y[:66].mean(0))):
            assert float((found[66:] - mean).abs().max() / mean.abs().max()) < 1e-6

"""Rows of a mapped vocabulary as they are read: in chunks, by threads, in the right type."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merganser.checkpoints import open_source
from merganser.merging import vocabulary_rows
from merganser.merging.recipe import Vocabulary
from merganser.merging.vocabulary import vocabulary_views
from vocabulary_helpers import (
    EMBED,
    HEAD,
    MERGES,
    MORE,
    bpe,
    embeddings,
    family_at,
    planned,
    recipe_of,
    save_model,
)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return family_at(tmp_path)


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_thin_chunks_equal_the_whole(family: dict[str, Path], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_rows, "BLOCK_ELEMENTS", 12)
    models = [family["wide"], family["more"], family["chat"]]
    plan, _ = planned(recipe_of(None, models, Vocabulary("union", pad_to_multiple_of=16)))
    for folder in models:
        view = plan.sources[str(folder)]
        whole = view.read(HEAD)
        parts = [view.read(HEAD, (i, min(i + rows, 80))) for i in range(0, 80, rows)]
        assert torch.equal(torch.cat(parts), whole)
        assert view.read(HEAD, (5, 5)).shape == (0, 4)


class Counted:
    """A source that notes how many rows are asked for at once."""

    identity: str | None = "something"

    def __init__(self, ref: str) -> None:
        self.source = open_source(ref)
        self.ref, self.infos, self.aliases = ref, self.source.infos, self.source.aliases
        self.companions = self.source.companions
        self.asked: list[int] = []

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        start, stop = rows if rows is not None else (0, self.infos[name].rows)
        self.asked.append(stop - start)
        return self.source.read(name, rows)


def test_reading_rows_reads_at_most_twice_as_many(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_rows, "BLOCK_ELEMENTS", 16)
    apart = save_model(tmp_path / "apart", bpe(stride=5), embeddings(6, 64))
    vocabulary = Vocabulary("union", pad_to_multiple_of=9)
    recipe = recipe_of(None, [family["wide"], family["more"], apart], vocabulary)
    sources = {ref: Counted(ref) for ref in recipe.refs}
    plan = vocabulary_views(recipe, sources)
    assert plan is not None
    assert all(not s.asked for s in sources.values())
    for ref in recipe.refs:
        assert plan.sources[ref].identity is None
        for start in range(0, plan.vocab_size, 4):
            plan.sources[ref].read(EMBED, (start, min(start + 4, plan.vocab_size)))
    assert max(max(s.asked) for s in sources.values()) <= 8


def test_other_tensors_pass_as_they_are(family: dict[str, Path]) -> None:
    plan, sources = planned(recipe_of(family["base"], [family["more"]], Vocabulary("union")))
    view = plan.sources[str(family["base"])]
    source = sources[str(family["base"])]
    assert [n for n in view.infos if view.infos[n] != source.infos[n]] == [HEAD, EMBED]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(view.read(name, (2, 4)), source.read(name, (2, 4)))
    assert view.companions() == source.companions()


def test_source_may_bring_files_of_its_own(family: dict[str, Path]) -> None:
    """So an earlier merge of the same recipe file can say what its tokens are."""
    recipe = recipe_of(family["base"], [family["more"]], Vocabulary("union"))
    first, sources = planned(recipe)
    stage = first.sources[str(family["base"])]
    stage.tokenizer_files = first.files  # type: ignore[attr-defined]
    second = vocabulary_views(recipe, {**sources, str(family["base"]): stage})
    assert second is not None
    assert second.tokens == first.tokens
    assert second.sources[str(family["base"])] is stage


def test_threads_read_the_same(family: dict[str, Path]) -> None:
    recipe = recipe_of(None, [family["wide"], family["more"]], Vocabulary("union", pad_to_multiple_of=32))
    whole = planned(recipe)[0].sources[str(family["more"])].read(EMBED)
    view = planned(recipe)[0].sources[str(family["more"])]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: view.read(EMBED, (i, i + 8))})) for i in range(0, 96, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([found[i] for i in sorted(found)]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_take_the_type_of_the_model_they_enter(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_model(tmp_path / "base", bpe(), embeddings(0, 64, dtype=dtype))
    more = save_model(tmp_path / "more", bpe((*MERGES, *MORE)), embeddings(1, 66))
    plan, _ = planned(recipe_of(base, [more], Vocabulary("union")))
    found = plan.sources[str(base)].read(EMBED)
    assert found.dtype == dtype
    assert torch.equal(found[64:], embeddings(1, 66)[EMBED][64:].to(dtype))

"""Where a merge may not be written is said before any tensor is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merganser.errors import NonFiniteError, OutputError
from merganser.merging.run import merge
from support import save


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """A recipe that fails at the first tensor that is read."""
    for number in range(2):
        save({"a.weight": torch.full((2, 2), float("nan"))}, tmp_path / f"m{number}")
    (tmp_path / "recipe.yaml").write_text("method: linear\nmodels: [m0, m1]\n")
    with pytest.raises(NonFiniteError):
        merge(tmp_path / "recipe.yaml", tmp_path / "out")
    return tmp_path / "recipe.yaml"


def test_the_working_folder_is_refused(unreadable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = unreadable.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for out in (".", "../here", here):
        with pytest.raises(OutputError, match="is the folder that this runs in"):
            merge(unreadable, out)
    assert [*here.iterdir()] == []
    assert sorted(p.name for p in unreadable.parent.iterdir()) == ["here", "m0", "m1", "recipe.yaml"]


def test_a_failed_merge_leaves_no_folders_above_its_place(unreadable: Path) -> None:
    with pytest.raises(NonFiniteError):
        merge(unreadable, unreadable.parent / "deep" / "er" / "out")
    assert not (unreadable.parent / "deep").exists()

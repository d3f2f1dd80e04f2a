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


def test_a_folder_that_a_link_of_an_input_leads_into_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = save({"a.weight": torch.ones(2, 2)}, tmp_path / "kept")
    other = save({"a.weight": torch.zeros(2, 2)}, tmp_path / "other")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(kept / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text("method: linear\nmodels: [linked, other]\n")
    before = (kept / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"kept holds what .*linked/model\.safetensors leads to"):
        merge("recipe.yaml", "kept", overwrite=True)
    assert (kept / "model.safetensors").read_bytes() == before
    assert merge("recipe.yaml", "out").exists()
    assert other.exists()

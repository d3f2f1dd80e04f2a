"""Recipes as text."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from merganser.errors import ParameterError
from merganser.merging.native import read_recipes
from merganser.merging.recipe import Recipe


def read(folder: Path, text: str, *, lenient: bool = False) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """Recipes of a text, and warnings."""
    path = folder / "recipe.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return read_recipes(path, lenient=lenient)


def read_one(folder: Path, text: str, *, lenient: bool = False) -> Recipe:
    """The one recipe of a text that gives no warnings."""
    (recipe,), warnings = read(folder, text, lenient=lenient)
    assert warnings == ()
    return recipe


def refused(folder: Path, text: str, *, lenient: bool = False) -> str:
    """What is said of a text that is no recipe, with the name of the file left out."""
    with pytest.raises(ParameterError) as caught:
        read(folder, text, lenient=lenient)
    return str(caught.value).replace(f"{folder / 'recipe.yaml'}", "recipe.yaml")


def weights(recipe: Recipe) -> list[Any]:
    """Weight of every model, slice by slice."""
    return [i.settings.get("weight") for s in recipe.slices for i in s.inputs]

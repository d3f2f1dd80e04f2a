"""A state with an expert in it, and what must hold when a command is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from merganser.cli import main
from merganser.continual import Fold
from merganser.errors import (
    MerganserError,
)
from support import Model, load, save, save_family, tree


class Shop:
    """A base, four experts and a state that the first two are in."""

    def __init__(self, root: Path, method: str = "gram") -> None:
        self.root = root
        self.base, *self.experts = save_family(root / "models", 4)
        self.fold = Fold.init(self.base, root / "state", method)
        for expert in self.experts[:2]:
            self.fold.add(expert)
        self.state = self.fold.path

    def variant(self, name: str, edit: Callable[[Model], object], source: int = 2) -> Path:
        """A copy of an expert with something changed."""
        model = load(self.experts[source])
        edit(model)
        return save(model, self.root / name)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        before = tree(self.root)
        yield
        assert tree(self.root) == before


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@contextmanager
def refused(kind: type[MerganserError], message: str, hint: str | None = None) -> Iterator[None]:
    """The error is of exactly this kind, and its message and hint hold these parts."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert (hint is None) == (caught.value.hint is None), caught.value.hint
    assert hint is None or hint in str(caught.value.hint)


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["merganser", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Model], object]:
    def apply(model: Model) -> None:
        model[name] = change(model[name])

    return apply

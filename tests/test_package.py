"""The package as a whole: what `import merganser` gives and takes, the version, the tree of errors."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys

import pytest

import merganser
from merganser import errors
from merganser.version import __version__

PUBLIC = ["Fold", "MerganserError", "__version__", "merge", "open_source"]


def test_the_public_names_are_exactly_the_documented_ones_and_all_are_there() -> None:
    assert sorted(merganser.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(merganser, name) is not None
    from merganser.checkpoints import open_source
    from merganser.continual import Fold
    from merganser.merging.run import merge

    assert merganser.Fold is Fold
    assert merganser.merge is merge
    assert merganser.open_source is open_source
    assert merganser.MerganserError is errors.MerganserError


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from merganser import *", names)
    assert set(names) - {"__builtins__"} == set(PUBLIC)


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'merganser' has no attribute 'Fodl'"):
        merganser.Fodl  # noqa: B018


def test_import_merganser_takes_no_other_package_and_fold_brings_torch() -> None:
    script = (
        "import sys, json; before = set(sys.modules); import merganser; merganser.MerganserError;"
        "after = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "merganser.Fold; print(json.dumps([sorted(after), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["merganser"], True]


@pytest.mark.parametrize("own", [None, "26"])
def test_import_merganser_has_openblas_wait_asleep_unless_the_user_says_how_it_waits(own: str | None) -> None:
    code = "import merganser, os; print(os.environ['OPENBLAS_THREAD_TIMEOUT'])"
    others = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
    given = others if own is None else others | {"OPENBLAS_THREAD_TIMEOUT": own}
    found = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True).stdout
    assert found.strip() == (own or "4")


def test_the_version_is_that_of_the_installed_package() -> None:
    assert merganser.__version__ == __version__ == importlib.metadata.version("merganser")


def error_classes() -> list[type[Exception]]:
    return [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def drawn_tree() -> dict[str, str | None]:
    """Class -> parent, as drawn in the docstring of merganser.errors."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│ ]*)(?:[├└]── )?(\w+(?:Error))\b", line)
        if found is None:
            continue
        depth = 0 if "── " not in line else 1 + len(found[1]) // 4
        del above[depth:]
        parents[found[2]] = above[-1] if above else None
        above.append(found[2])
    return parents


def test_every_error_class_stands_in_the_drawn_tree_below_its_base() -> None:
    actual = {c.__name__: c.__base__.__name__ if c.__base__ is not Exception else None for c in error_classes()}
    assert drawn_tree() == actual
    assert len(actual) == 14


@pytest.mark.parametrize("kind", error_classes(), ids=lambda c: c.__name__)
def test_every_error_has_a_docstring_and_carries_message_and_hint(kind: type[errors.MerganserError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != (kind.__base__.__doc__ if kind.__base__ else None)
    assert issubclass(kind, merganser.MerganserError)
    error = kind("x is wrong", "mend x")
    assert (error.message, error.hint, str(error)) == ("x is wrong", "mend x", "x is wrong\nhint: mend x")
    bare = kind("x is wrong")
    assert (bare.message, bare.hint, str(bare)) == ("x is wrong", None, "x is wrong")

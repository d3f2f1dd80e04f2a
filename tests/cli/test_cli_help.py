"""Help, usage and exit codes: what the command line says before any command has run."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

import merganser
from merganser.cli import app
from merganser.methods import METHODS
from merganser.methods.joint import MERGES
from merganser.methods.joint.posts import POSTS

Run = Callable[..., tuple[int, str, str]]


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
FOLD = ("init", "add", "remove", "reweight", "combine", "export", "show", "verify")


def test_the_commands_are_those_of_the_readme() -> None:
    groups = {("fold",), ("zoo",), ("symmetry",), ("decentral",), ()}
    alone = {("methods",), ("inspect",), ("convert",), ("align",), ("zip",), ("meet",), ("barrier",), ("study",)}
    alone |= {("merge",), ("plan",), ("doctor",), ("diff",), ("measure",), ("pleas",)}
    inside = {("zoo", "train"), ("symmetry", "show"), *(("decentral", name) for name in ("run", "show", "topology"))}
    assert set(COMMANDS) - groups == {*alone, *inside, *(("fold", name) for name in FOLD)}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: " ".join(p) or "merganser")
def test_help_of_every_command_says_what_it_does_and_names_every_argument_and_option(
    run: Run, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    command = COMMANDS[path]
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert (command.help or "").split(".")[0].split("\n")[0] in out
    for parameter in command.params:
        assert (parameter.help or "").strip(), f"{parameter.name} has no help text"
        assert parameter.help.strip().endswith("."), f"help of {parameter.name} is a sentence"
        assert (parameter.metavar or parameter.opts[0]).lower() in out.lower()
    for name in getattr(command, "commands", {}):
        assert name in out


def test_help_of_every_command_brings_in_none_of_the_heavy_libraries() -> None:
    script = """
        import contextlib, io, json, sys
        from merganser.cli import app
        for path in json.loads(sys.argv[1]):
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
                app([*path, "--help"])
            assert "Usage" in out.getvalue(), path
        heavy = ("torch", "numpy", "safetensors", "huggingface_hub", "transformers", "matplotlib", "peft")
        print(json.dumps([name for name in heavy if name in sys.modules]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(list(COMMANDS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_commands_docstrings_and_the_epilog_state_the_exit_codes(run: Run) -> None:
    _, out, _ = run("--help")
    assert "Exit codes: 0 done; 1 a check found something wrong; 2" in " ".join(out.split())


def test_python_dash_m_and_the_installed_command_print_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "merganser", "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{merganser.__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("fold",),
        ("nonsense",),
        ("fold", "nonsense"),
        ("inspect",),
        ("convert", "a"),
        ("convert", "a", "b", "--shard-bytes", "0"),
        ("convert", "a", "b", "--shard-bytes", "many"),
        ("inspect", "a", "--nonsense"),
        ("fold", "init", "a"),
        ("fold", "add", "a", "b", "--weight", "heavy"),
        ("fold", "add", "a", "b", "--threads", "0"),
        ("fold", "export", "a", "b", "--dtype", "F8"),
        ("fold", "init", "a", "b", "--sums", "BF16"),
        ("fold", "reweight", "a", "b"),
    ],
    ids=" ".join,
)
def test_a_usage_error_exits_with_2_and_says_how_to_use_it(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert "Usage:" in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", dict.fromkeys((*METHODS, *MERGES, *POSTS)))
def test_methods_explains_every_method_by_equation_settings_and_source(run: Run, name: str) -> None:
    code, out, err = run("methods", name)
    assert (code, err) == (0, "")
    assert " = " in out
    assert "Source: " in out
    assert "Args:" in out


def test_methods_gram_prints_its_equation_and_source_as_they_stand_in_the_code(run: Run) -> None:
    _, out, _ = run("methods", "gram")
    assert "D = B (G + eps tr(G)/n I)^-1" in out
    assert "||(D - d_i) d_i^T||_F^2" in out
    assert "arXiv:2503.08099" in out
    assert "eps: float = 0.01" in out.replace("'float'", "float")


def test_methods_prints_a_row_of_the_table_for_every_method_in_its_order(run: Run) -> None:
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    header, *rows = [line.split() for line in out.splitlines() if line.strip()]
    assert header == ["method", "kind", "remove", "settings", "source"]
    assert [row[0] for row in rows] == [*METHODS, *MERGES, *POSTS]
    by_name = {row[0]: row for row in rows[: len(METHODS)]}
    assert by_name["opcm"][1:3] == ["sequential", "no"]
    assert by_name["gram"][1:4] == ["sums", "yes", "eps=0.01"]


def test_a_misspelt_method_names_the_nearest(run: Run) -> None:
    assert run("methods", "grma") == (
        2,
        "",
        "ParameterError: there is no method 'grma'\nhint: did you mean gram?\n",
    )

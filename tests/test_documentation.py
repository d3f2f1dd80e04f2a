import doctest
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from documented import console_blocks, make_models, write_files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.xdist_group("ray") if p.name == "cluster.md" else (), id=p.name) for p in PAGES],
)
def test_commands_of_a_page_print_what_it_shows(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    make_models(tmp_path)
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shown = console_blocks(page)
    assert shown, "a page without a command teaches nothing"
    for command, expected in shown:
        if "--ray" in command:  # Ray is started and ended there; the rest runs here, where torch is loaded already
            printed = in_a_process(command)
        else:
            monkeypatch.setattr(sys, "stderr", sys.stdout)
            _, printed, _ = run(*shlex.split(command)[1:])
            sys.modules.pop("my_networks", None)
        same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert same, f"$ {command}\n{printed}\nbut {page.name} shows\n{expected}"


def in_a_process(command: str) -> str:
    """What `merganser ...` prints, on both channels."""
    run = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return run.stdout


def test_every_link_of_the_pages_leads_somewhere() -> None:
    import re

    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"

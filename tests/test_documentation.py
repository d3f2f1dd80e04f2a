import doctest
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from documented import console_blocks, make_models, write_files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    make_models(tmp_path)
    write_files(page, tmp_path)
    shown = console_blocks(page)
    assert shown, "a page without a command teaches nothing"
    for command, expected in shown:
        run = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        same = doctest.OutputChecker().check_output(
            expected, run.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
        assert same, f"$ {command}\n{run.stdout}\nbut {page.name} shows\n{expected}"


def test_every_link_of_the_pages_leads_somewhere() -> None:
    import re

    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""Gather the reports of finished studies into pages of docs/results: `python docs/collect.py STUDIES [PAGE...]`.

STUDIES holds one folder a study, as `merganser study --out STUDIES/NAME` left it. What is said about the figures is in
docs/results/PAGE.intro.md and is written by people; everything else is what the studies wrote.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: Of every page: studies with pictures, in full; then those of which the table of methods is enough.
PAGES = {
    "continual": (
        ("text8", "vision8", "vision10"),
        ("text8-settings", "vision8-settings", "text8-hot", "text8-long", "text8-smooth"),
    ),
    "cifar5x5": (("cifar5x5", "barrier"), ()),
    "pleas": (
        ("pleas_disjoint", "pleas_domains", "pleas_kinds"),
        ("pleas_disjoint-50", "pleas_disjoint-200", "pleas_disjoint-other"),
    ),
    "dimat": (("dimat",), ("dimat-full", "dimat-same", "dimat-dirichlet", "dimat-batch16")),
}


def main() -> None:
    """Write the pages that are named, or all, and copy their pictures."""
    for page in sys.argv[2:] or PAGES:
        collect(page, Path(sys.argv[1]))


def collect(page: str, studies: Path) -> None:
    """Write a page."""
    whole, short = PAGES[page]
    parts = [(RESULTS / f"{page}.intro.md").read_text("utf-8").rstrip()]
    for name in (*whole, *short):
        report = studies / name / "report.md"
        if not report.is_file():
            continue
        text = re.sub(r"^#", "##", report.read_text("utf-8"), flags=re.MULTILINE)
        if name in short:
            parts.append(_first_table(text))
            continue
        parts.append(re.sub(r"\]\(([\w-]+\.png)\)", rf"]({name}-\1)", text.rstrip()))
        for picture in sorted((studies / name).glob("*.png")):
            shutil.copyfile(picture, RESULTS / f"{name}-{picture.name}")
            if f"({picture.name})" not in text:  # a report that shows its own pictures does so in its order
                parts.append(f"![{name}, {picture.stem}]({name}-{picture.name})")
    (RESULTS / f"{page}.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _first_table(report: str) -> str:
    """The title of a report and its first table."""
    title = report.partition("\n")[0]
    table = re.search(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    return f"{title}\n\n{table.group(0).rstrip() if table else ''}"


if __name__ == "__main__":
    main()

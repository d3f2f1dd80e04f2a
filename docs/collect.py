"""Gather the reports of finished studies into docs/results/continual.md: `python docs/collect.py STUDIES`.

STUDIES holds one folder a study, as `merganser study --out STUDIES/NAME` left it. What is said about the figures is in
docs/results/continual.intro.md and is written by people; everything else is what the studies wrote.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: Studies with pictures, in full; then those of which the table of methods is enough.
WHOLE = ("text8", "vision8", "vision10")
SHORT = ("text8-settings", "vision8-settings", "text8-hot", "text8-long", "text8-smooth")


def main() -> None:
    """Write the page and copy its pictures."""
    studies = Path(sys.argv[1])
    parts = [(RESULTS / "continual.intro.md").read_text("utf-8").rstrip()]
    for name in (*WHOLE, *SHORT):
        report = studies / name / "report.md"
        if not report.is_file():
            continue
        text = re.sub(r"^# ", "## ", report.read_text("utf-8"), flags=re.MULTILINE)
        if name in SHORT:
            parts.append(_first_table(text))
            continue
        parts.append(text.rstrip())
        for picture in sorted((studies / name).glob("*.png")):
            shutil.copyfile(picture, RESULTS / f"{name}-{picture.name}")
            parts.append(f"![{name}, {picture.stem}]({name}-{picture.name})")
    (RESULTS / "continual.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _first_table(report: str) -> str:
    """The title of a report and its first table."""
    title = report.partition("\n")[0]
    table = re.search(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    return f"{title}\n\n{table.group(0).rstrip() if table else ''}"


if __name__ == "__main__":
    main()

"""`merganser methods`: the table of methods, and one of them in full."""

from __future__ import annotations

from typing import Annotated

import typer

from merganser.cli.show import console


def methods(name: Annotated[str | None, typer.Argument(help="Of one method, to read its equation.")] = None) -> None:
    """List the merge methods, or explain one: equation, settings, source."""
    from rich.table import Table

    from merganser.methods import METHODS, Sums, describe, find_method, settings_of

    out = console()
    if name is not None:
        find_method(name)
        out.print(describe(name), soft_wrap=True)
        return
    table = Table("method", "kind", "remove", "settings", "source", box=None)
    for row, method in METHODS.items():
        given = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings_of(method).items())
        table.add_row(row, method.kind, "yes" if isinstance(method, Sums) else "no", given, method.source)
    out.print(table)

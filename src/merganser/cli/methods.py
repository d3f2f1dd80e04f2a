"""`merganser methods`: the table of methods, and one of them in full."""

from __future__ import annotations

from typing import Annotated

import typer

from merganser.cli.show import console


def methods(name: Annotated[str | None, typer.Argument(help="Of one method, to read its equation.")] = None) -> None:
    """List the merge methods, or explain one: equation, settings, source."""
    from rich.markup import escape
    from rich.table import Table

    from merganser.methods import METHODS, Sums, describe, find_method

    out = console()
    if name is not None:
        find_method(name)
        out.print(escape(describe(name)), soft_wrap=True)
        return
    table = Table("method", "kind", "remove", "settings", "source", box=None)
    for row, method in METHODS.items():
        from merganser.methods import settings_of

        given = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings_of(method).items())
        table.add_row(row, method.kind, "yes" if isinstance(method, Sums) else "no", given, method.source)
    out.print(table)

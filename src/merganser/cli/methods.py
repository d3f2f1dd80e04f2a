"""`merganser methods`: the tables of methods, and one of them in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from merganser.cli.show import console


def methods(name: Annotated[str | None, typer.Argument(help="Of one method, to read its equation.")] = None) -> None:
    """List the merge methods, or explain one: equation, settings, source.

    Continual methods take models as they arrive (`merganser fold`), joint ones take all at hand (`merganser merge`);
    a recipe may name both, and a joint one counts where two have one name. Post-processors stand under `post`.
    """
    from rich.table import Table

    from merganser.merging.lookup import joint_settings
    from merganser.methods import METHODS, Sums, settings_of
    from merganser.methods.joint import MERGES
    from merganser.methods.joint.posts import POSTS

    out = console()
    if name is not None:
        out.print(_explained(name), soft_wrap=True)
        return
    table = Table("method", "kind", "remove", "settings", "source", box=None)
    for row, method in METHODS.items():
        removable = "yes" if isinstance(method, Sums) else "no"
        table.add_row(row, method.kind, removable, settings_text(settings_of(method)), method.source)
    for row, joint in MERGES.items():
        table.add_row(row, joint.kind, "no", settings_text(joint_settings(joint)), joint.source)
    for row, post in POSTS.items():
        table.add_row(row, "post", "no", settings_text(post.settings), post.source)
    out.print(table)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings with their defaults, as in a call.

    >>> settings_text({"density": 0.25, "normalize": True})
    'density=0.25, normalize=True'
    """
    from inspect import Parameter

    def shown(value: object) -> str:
        return f"={value:g}" if isinstance(value, float) else "" if value is Parameter.empty else f"={value}"

    return ", ".join(f"{name}{shown(value)}" for name, value in settings.items())


def _explained(name: str) -> str:
    """A method of any table in full; where two have one name, both."""
    from merganser.methods import METHODS, described, find_method
    from merganser.methods.joint import MERGES
    from merganser.methods.joint.posts import POSTS

    functions = [table[name].function for table in (METHODS, MERGES, POSTS) if name in table]
    if not functions:
        find_method(name, more=(*MERGES, *POSTS))
    return "\n\n\n".join(described(function) for function in functions)

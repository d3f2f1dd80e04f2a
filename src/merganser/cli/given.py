"""Options that were given and would not be used."""

from __future__ import annotations

import typer


def refuse_unused(ctx: typer.Context, names: tuple[str, ...], why: str, hint: str) -> None:
    """Refuse options that a person gave in spite of others that leave them without use.

    Args:
        ctx: the command's.
        names: of its parameters.
        why: they have no use, behind their name.
        hint: what to do.

    Raises:
        ParameterError: Names the first that was given.
    """
    from merganser.errors import ParameterError

    for parameter in ctx.command.params:
        if parameter.name in names and was_given(ctx, parameter.name):
            raise ParameterError(f"{parameter.opts[0]} {why}", hint)


def was_given(ctx: typer.Context, name: str) -> bool:
    """Whether a person gave an option, rather than its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

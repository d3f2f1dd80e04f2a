"""The command line: one module a family of commands. Nothing here imports torch before a command runs."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from merganser.cli.align import align
from merganser.cli.barrier import barrier
from merganser.cli.checkpoint import convert, inspect
from merganser.cli.decentral import app as decentral_app
from merganser.cli.diff import diff
from merganser.cli.doctor import doctor
from merganser.cli.fold import app as fold_app
from merganser.cli.measure import measure
from merganser.cli.meet import meet
from merganser.cli.merge import merge, plan
from merganser.cli.methods import methods
from merganser.cli.pleas import pleas
from merganser.cli.study import study
from merganser.cli.symmetry import app as symmetry_app
from merganser.cli.zip import zip_
from merganser.cli.zoo import app as zoo_app
from merganser.version import __version__


class _Commands(TyperGroup):
    """The commands, with one way to be interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; nothing was changed\n")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="merganser",
    cls=_Commands,
    help="Merge fine-tuned neural networks without retraining, as they arrive.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done; 1 a check found something wrong; 2 the input cannot be used, and nothing was changed.",
)
app.add_typer(fold_app, name="fold")
app.command()(merge)
app.command()(plan)
app.command()(doctor)
app.command()(diff)
app.command()(measure)
app.add_typer(symmetry_app, name="symmetry")
app.add_typer(zoo_app, name="zoo")
app.command()(align)
app.command()(meet)
app.command("zip")(zip_)
app.command()(pleas)
app.command()(barrier)
app.add_typer(decentral_app, name="decentral")
app.command()(study)
app.command()(methods)
app.command()(inspect)
app.command()(convert)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it."),
) -> None:
    pass


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    from merganser.errors import MerganserError

    try:
        app()
    except MerganserError as error:
        from rich.console import Console
        from rich.text import Text

        console = Console(stderr=True, soft_wrap=True)
        console.print(Text.assemble((type(error).__name__, "bold red"), f": {error.message}"))
        if error.hint:
            console.print(Text.assemble(("hint", "cyan"), f": {error.hint}"))
        sys.exit(2)

"""Settings of methods on the command line: `--set name=value`, and options for the common ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from merganser.errors import ParameterError

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the method; repeat it.")
]
Alpha = Annotated[float | None, typer.Option(help="opcm: share blocked; dop: weight of the past; tsv_m: factor.")]
Diagonal = Annotated[str | None, typer.Option(help="opcm: drop or keep the diagonal behind the block.")]
Density = Annotated[float | None, typer.Option(help="ties: fraction of entries kept, in (0, 1].")]
Scale = Annotated[float | None, typer.Option(help="task_arithmetic, ties, iso_c: factor of the merged change.")]
Eps = Annotated[float | None, typer.Option(help="gram, dop: ridge, as a share of the mean eigenvalue.")]


def collect(pairs: Sequence[str] | None, **named: float | str | None) -> dict[str, float | int | str]:
    """Settings that were given, by name.

    Raises:
        ParameterError: If a pair is not NAME=VALUE, or a name is given twice.
    """
    given: dict[str, float | int | str] = {name: value for name, value in named.items() if value is not None}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ParameterError(f"--set {pair}: it is written NAME=VALUE")
        if name in given:
            raise ParameterError(f"{name} is given twice")
        given[name] = _value(value)
    return given


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

"""Options of commands whose files may be written by a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from merganser.errors import ParameterError

ShardBytes = Annotated[int, typer.Option(min=1, help="Bytes at which the next file is begun.")]
Ray = Annotated[
    str | None,
    typer.Option(metavar="local|HOST:PORT", help="Have the files written by a Ray cluster, or by local processes."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="With --ray: tasks at a time; all that there is room for by default.")
]


def refuse_workers(workers: int | None, ray: str | None) -> None:
    """Refuse `--workers` where there are none.

    Raises:
        ParameterError: If it is given without `--ray`.
    """
    if workers is not None and ray is None:
        raise ParameterError("--workers is for --ray", "--threads is how many tensors one process works on at a time")

"""What a command runs networks on: batches that code gives, or pictures of folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.given import refuse_unused

if TYPE_CHECKING:
    from merganser.align.activations import Batch
    from merganser.cli.subject import Subject

Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="Pictures instead: a folder, or .npy and .npz files; repeat it."),
]
Examples = Annotated[int, typer.Option(min=1, help="With --data: pictures of all folders together.")]
PixelScale = Annotated[
    str | None,
    typer.Option(metavar="MEAN/DEVIATION", help="With --data: pixels of 0 to 1 become (x - mean) / deviation."),
]


def refuse_two(ctx: typer.Context, batches: str | None, data: list[Path] | None) -> None:
    """Refuse batches and pictures together, and settings of pictures without any.

    Raises:
        ParameterError: If both are given, or neither is used by an option.
    """
    from merganser.errors import ParameterError

    if batches is not None and data:
        raise ParameterError("--batches and --data both give inputs", "leave one of both out")
    if not data:
        refuse_unused(ctx, ("examples", "scale"), "is for pictures", "leave it out, or give --data DIR")


def with_inputs(
    model: str,
    shape: tuple[int, ...] | None,
    batches: str | None,
    data: list[Path] | None,
    examples: int,
    scale: str | None,
) -> tuple[Subject, list[Batch] | None]:
    """The network, with the first batch for its inputs, and all batches; None where neither kind is given.

    Args:
        model: as a command takes it.
        shape: of one input, where neither batches nor the model give any.
        batches: code that gives them.
        data: folders or files of pictures.
        examples: pictures of all folders together.
        scale: of their pixels, as it was written.

    Raises:
        MerganserError: If the network, a batch or a picture cannot be had.
    """
    from merganser.cli.pictures import picture_batches, scale_of
    from merganser.cli.subject import batches_of, subject

    inputs = batches_of(batches) if batches is not None else None
    it = subject(model, shape, inputs[0] if inputs else None)
    if data:
        inputs = picture_batches(data, it, model, count=examples, scale=scale_of(scale) if scale else None)
        it = replace(it, args=tuple(inputs[0][0]), kwargs=inputs[0][1])
    return it, inputs

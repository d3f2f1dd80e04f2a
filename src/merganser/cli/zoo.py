"""`merganser zoo`: train the models of a study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.show import console, progress_bar

if TYPE_CHECKING:
    from merganser.study.judge import Progress

app = typer.Typer(
    help="Train the base and the experts of a study, as ordinary checkpoint folders.", no_args_is_help=True
)

Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Folder of packed data sets.")]
Folder = Annotated[Path | None, typer.Option("--zoo", metavar="DIR", help="Folder of the zoo; default: zoo/NAME.")]
ConfigDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Groups of your own, beside those that are shipped.")
]


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A name in the group zoo: vision, text, digits.")],
    data: Data = None,
    zoo: Folder = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    config_dir: ConfigDir = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train what is not there yet; an interrupted run goes on from its last epoch."""
    from merganser.study.composing import zoo_of
    from merganser.study.zoo import missing, train_zoo

    node, tasks = zoo_of(name, extra=config_dir)
    folder = zoo or Path("zoo") / node.name
    todo = missing(node, tasks, folder)
    if not quiet:
        console().print(f"{folder}: " + (f"to train: {', '.join(todo)}" if todo else "all models are there"))

    @contextmanager
    def bar(label: str) -> Iterator[Progress | None]:
        with progress_bar(f"training {label}", quiet=quiet, unit="steps") as progress:
            yield progress
        if not quiet:
            console().print(f"{folder}: {label} is trained")

    train_zoo(node, tasks, folder, data=data, seed=seed, device=device, bar=bar)

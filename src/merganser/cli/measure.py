"""`merganser measure`: what a network does on data, for the merge methods that ask for it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from merganser.cli.show import console, counted


class Measured(str, Enum):
    """What is measured."""

    gram = "gram"
    fisher = "fisher"
    both = "both"


def measure(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The model's weights.")],
    batches: Annotated[str, typer.Argument(metavar="FILE:NAME", help="Code that gives batches of inputs; no labels.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What it is the weights of; default: CHECKPOINT, if it has a config.json."),
    ] = None,
    kind: Annotated[
        Measured, typer.Option(help="gram: inputs of linear layers, for regmean; fisher: for fisher.")
    ] = Measured.gram,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws of labels from the model itself (fisher).")] = 0,
) -> None:
    """Measure a model on unlabelled inputs: what regmean and fisher need of every model that they merge.

    merganser measure models/a data.py:batches measured/a
    # then, in a recipe:   - {model: models/a, statistics: measured/a}
    """
    from merganser.checkpoints import open_source
    from merganser.checkpoints.writer import CheckpointWriter
    from merganser.cli.network import check_out
    from merganser.cli.stored import stored_names
    from merganser.cli.subject import batches_of, loaded, running, subject
    from merganser.merging.measuring import measure as run
    from merganser.numerics import DTYPE_NAMES
    from merganser.types import TensorInfo
    from merganser.version import __version__

    check_out(out, [checkpoint], model, overwrite=False)
    source, inputs = open_source(checkpoint), batches_of(batches)
    it = subject(model or checkpoint, None, inputs[0])
    network = loaded(it.network, source)
    with running(model or checkpoint):
        found = run(
            network,
            inputs,
            ["gram", "fisher"] if kind is Measured.both else [kind.value],
            output=it.output,
            seed=seed,
        )
    names = stored_names(network, source)
    found = {
        f"{what}/{names.get(n, n)}": x for (what, _, n), x in ((key.partition("/"), x) for key, x in found.items())
    }
    infos = {n: TensorInfo(tuple(x.shape), DTYPE_NAMES[x.dtype]) for n, x in found.items()}
    with CheckpointWriter(out, infos) as writer:
        for name, x in found.items():
            writer.put(name, x)
        receipt = {"merganser": __version__, "model": checkpoint, "batches": batches, "kind": kind.value, "seed": seed}
        writer.commit({**receipt, "outputs": writer.digests()})
    console().print(f"wrote {out}: statistics of {counted(len(found), 'tensor')}, {counted(len(inputs), 'batch')}")

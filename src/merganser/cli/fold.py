"""`merganser fold`: continual merging, one command an arrival."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from merganser.cli.clusters import Ray, ShardBytes, Workers, refuse_workers
from merganser.cli.settings import Alpha, Density, Diagonal, Eps, Scale, Set, collect
from merganser.cli.show import console, progress_bar, size

if TYPE_CHECKING:
    from merganser.continual.ledger import Contributor
    from merganser.continual.passing import Cost

app = typer.Typer(
    help="""Merge models as they arrive, in a state of constant size.

    merganser fold init BASE STATE;  merganser fold add STATE EXPERT (each time one arrives);
    merganser fold export STATE OUT (whenever you want the merged model)""",
    no_args_is_help=True,
)


class Dtype(str, Enum):
    """Floating types of an exported checkpoint."""

    F32 = "F32"
    BF16 = "BF16"
    F16 = "F16"
    F64 = "F64"


class SumsDtype(str, Enum):
    """Floating types of a state."""

    F32 = "F32"
    F64 = "F64"


State = Annotated[Path, typer.Argument(help="Folder of the fold's state.")]
Expert = Annotated[str, typer.Argument(help="A model tuned from the base: folder, file, hub id, or LoRA folder.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Tensors at a time; default: one a core.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, cuda:1.")]
Base = Annotated[str | None, typer.Option("--base", help="Where the base is now, if it has moved.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def init(
    base: Annotated[str, typer.Argument(help="The model that all experts were tuned from: folder, file or hub id.")],
    state: Annotated[Path, typer.Argument(help="Folder to make.")],
    method: Annotated[str, typer.Option("--method", "-m", help="See `merganser methods`.")] = "gram",
    alpha: Alpha = None,
    diagonal: Diagonal = None,
    density: Density = None,
    scale: Scale = None,
    eps: Eps = None,
    set_: Set = None,
    freeze: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that stay the base's.")] = None,
    matrix: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to merge as linear weights.")
    ] = None,
    vector: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to merge as vectors.")] = None,
    float64: Annotated[bool, typer.Option("--float64", help="All arithmetic and sums in float64.")] = False,
    sums: Annotated[SumsDtype | None, typer.Option(help="Type of the state on disk; default: by method.")] = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Begin a fold over a base. Nothing is merged yet."""
    from merganser.continual import Fold
    from merganser.continual.kinds import check_settings
    from merganser.continual.roles import count_roles

    given = collect(set_, alpha=alpha, diagonal=diagonal, density=density, scale=scale, eps=eps)
    check_settings(method, given)
    with progress_bar("reading the base", quiet=quiet) as progress:
        fold = Fold.init(
            base,
            state,
            method,
            freeze=freeze or (),
            matrix=matrix or (),
            vector=vector or (),
            float64=float64,
            sums_dtype=sums.value if sums else None,
            threads=threads,
            progress=progress,
            **given,
        )
    if not quiet:
        roles = ", ".join(f"{n} {role}" for role, n in count_roles(fold.record.roles).items())
        console().print(f"{state}: {method} over {base} ({roles})")


@app.command()
def add(
    state: State,
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERT...", help="Models tuned from the base, in order: folder, file, hub id, LoRA."),
    ],
    weight: Annotated[float, typer.Option("--weight", "-w", help="Factor of the expert's change.")] = 1.0,
    name: Annotated[
        str | None, typer.Option(help="What the ledger calls it; default: the last part of EXPERT.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to leave out.")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW", help="Replace a prefix of names.")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Count NaN and infinity as unchanged.")
    ] = False,
    allow_distant: Annotated[
        bool, typer.Option("--allow-distant", help="Accept a change larger than the base.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check names and shapes, print the cost, change nothing.")
    ] = False,
    base: Base = None,
    device: Device = "cpu",
    threads: Threads = None,
    shard_bytes: ShardBytes = 5_000_000_000,
    ray: Ray = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Take in an expert, or several in order: one pass, in the memory of a few tensors.

    Several come in together or not at all: the same bits as one by one, in less time.
    """
    from merganser.continual import Fold

    _refuse_apart(ray, workers, device)
    fold = Fold(state)
    which: dict[str, Any] = {
        "weight": weight,
        "name": name,
        "ignore": ignore or (),
        "rename": rename or (),
        "base": base,
    }
    if dry_run or not quiet or ray is not None:  # what cannot succeed is refused before any process is begun
        cost = fold.cost(*experts, threads=threads if ray is None else threads or 1, **which)
        if not quiet:
            _print_cost(cost, "" if ray is None else "of a task ")
    if dry_run:
        return
    before = len(fold.ledger.contributors)
    label = experts[0] if len(experts) == 1 else f"{len(experts)} experts"
    which |= {"allow_nonfinite": allow_nonfinite, "allow_distant": allow_distant, "shard_bytes": shard_bytes}
    if ray is not None:
        from merganser.merging.cluster_fold import add_on
        from merganser.merging.cluster_ray import connected
        from merganser.merging.cluster_tasks import Limits

        limits = Limits(workers=workers, threads=threads)
        with (
            connected(ray, workers=workers, threads=threads) as tasks,
            progress_bar(f"adding {label}", quiet=quiet) as progress,
        ):
            entries = add_on(tasks, state, experts, limits=limits, progress=progress, **which)
    else:
        with progress_bar(f"adding {label}", quiet=quiet) as progress:
            entries = fold.add_all(experts, device=device, threads=threads, progress=progress, **which)
    if not quiet:
        for number, entry in enumerate(entries, before + 1):
            console().print(f"{state}: {entry.name} is in, as number {number}")


@app.command()
def remove(
    state: State,
    expert: Expert,
    base: Base = None,
    device: Device = "cpu",
    threads: Threads = None,
    shard_bytes: ShardBytes = 5_000_000_000,
    ray: Ray = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Take an expert out again, as if it had never come. Its file is read once more and must be the same."""
    where = _Where(device, threads, ray, workers, quiet)
    entry = _weighed(state, expert, None, where, base=base, shard_bytes=shard_bytes)
    if not quiet:
        console().print(f"{state}: {entry.name} is out")


@app.command(context_settings={"ignore_unknown_options": True})  # a weight may be negative
def reweight(
    state: State,
    expert: Expert,
    weight: Annotated[float, typer.Argument(help="The new factor of its change.")],
    base: Base = None,
    device: Device = "cpu",
    threads: Threads = None,
    shard_bytes: ShardBytes = 5_000_000_000,
    ray: Ray = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Give an expert another weight, as if it had come with it."""
    where = _Where(device, threads, ray, workers, quiet)
    entry = _weighed(state, expert, weight, where, base=base, shard_bytes=shard_bytes)
    if not quiet:
        console().print(f"{state}: {entry.name} now has weight {entry.weight:g}")


@app.command()
def combine(
    states: Annotated[
        list[Path], typer.Argument(metavar="STATE STATE... OUT", help="States over one base, then the new one.")
    ],
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Add up states of sums into a new one, as if all their experts had been added to it."""
    from merganser.continual import Fold

    fold = Fold.combine(states[:-1], states[-1], threads=threads)
    if not quiet:
        console().print(f"{states[-1]}: {len(fold.ledger.contributors)} experts of {len(states) - 1} states")


@app.command()
def export(
    state: State,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Any finaliser that the state's sums allow.")
    ] = None,
    alpha: Alpha = None,
    scale: Scale = None,
    eps: Eps = None,
    set_: Set = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of floating tensors; default: as in the base.")] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Begin the next file at this size in bytes.")] = 5_000_000_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    base: Base = None,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Write the merged model as an ordinary checkpoint folder, with the base's config and a receipt."""
    from merganser.continual import Fold
    from merganser.continual.kinds import check_settings

    fold = Fold(state)
    given = collect(set_, alpha=alpha, scale=scale, eps=eps)
    check_settings(method or fold.ledger.method, given)
    with progress_bar("exporting", quiet=quiet) as progress:
        fold.export(
            out,
            method,
            dtype=dtype.value if dtype else None,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            base=base,
            device=device,
            threads=threads,
            progress=progress,
            **given,
        )
    if not quiet:
        console().print(f"{out}: written")


@app.command()
def show(
    state: State, as_json: Annotated[bool, typer.Option("--json", help="The ledger, for programs.")] = False
) -> None:
    """Print what a state is, who is in it, and what it takes."""
    from rich.table import Table
    from rich.text import Text

    from merganser.continual import Fold
    from merganser.continual.kinds import exports
    from merganser.continual.roles import count_roles
    from merganser.errors import MerganserError

    fold = Fold(state)
    ledger = fold.ledger
    possible = exports(fold.kind)
    if as_json:
        content = ledger.model_dump(mode="json") | {"state_bytes": fold.state_bytes, "exports": possible}
        typer.echo(json.dumps(content, indent=2))
        return
    out = console()
    settings = ", ".join(f"{k}={v}" for k, v in ledger.settings.items()) or "default settings"
    summary = f": {ledger.method} ({settings}), {size(fold.state_bytes)} on disk in {ledger.sums_dtype}"
    out.print(Text.assemble((str(state), "bold"), summary))
    out.print(f"base     {ledger.base_ref}")
    out.print(f"tensors  {', '.join(f'{n} {role}' for role, n in count_roles(fold.record.roles).items())}")
    out.print(f"exports  {', '.join(possible)}")
    try:
        cost = fold.cost_of_next()
        out.print(f"next add peak memory about {size(cost.peak_bytes)} beside Python and torch")
    except MerganserError as error:
        out.print(Text.assemble(("warning  ", "yellow"), error.message))
    table = Table("#", "expert", "weight", "norm of change", "digest", "from", box=None)
    for number, entry in enumerate(ledger.contributors, 1):
        table.add_row(str(number), entry.name, f"{entry.weight:g}", f"{entry.norm:.4g}", entry.digest[:12], entry.ref)
    out.print(table if ledger.contributors else "no expert yet: merganser fold add STATE EXPERT")


@app.command()
def verify(state: State, base: Base = None, threads: Threads = None) -> None:
    """Hash again the base, the sums and every expert; exit with 1 if the state is unsound."""
    from rich.text import Text

    from merganser.continual import Fold

    findings = Fold(state).verify(base=base, threads=threads)
    colours = {"ok": "green", "changed": "red", "missing": "yellow"}
    for finding in findings:
        status = (f"{finding.status:8}", colours[finding.status])
        console().print(Text.assemble(status, f"{finding.part}  {finding.detail}"), soft_wrap=True)
    if any(f.needed and f.status != "ok" for f in findings):
        raise typer.Exit(1)


class _Where(NamedTuple):
    """Who does the work: this process, or a cluster."""

    device: str
    threads: int | None
    ray: str | None
    workers: int | None
    quiet: bool


def _weighed(state: Path, expert: str, weight: float | None, where: _Where, **which: Any) -> Contributor:
    """Give an expert another weight, or None to take it out; its entry."""
    from merganser.continual import Fold

    device, threads, ray, workers, quiet = where
    _refuse_apart(ray, workers, device)
    fold, label = Fold(state), f"{'removing' if weight is None else 'reweighting'} {expert}"
    if ray is None:
        with progress_bar(label, quiet=quiet) as progress:
            how = {"device": device, "threads": threads, "progress": progress, **which}
            return fold.remove(expert, **how) if weight is None else fold.reweight(expert, weight, **how)
    from merganser.continual.changing import weighable
    from merganser.merging.cluster_fold import set_weight_on
    from merganser.merging.cluster_ray import connected
    from merganser.merging.cluster_tasks import Limits

    weighable(state, fold.ledger, expert, weight)  # what cannot succeed is refused before any process is begun
    limits = Limits(workers=workers, threads=threads)
    with connected(ray, workers=workers, threads=threads) as tasks, progress_bar(label, quiet=quiet) as progress:
        return set_weight_on(tasks, state, expert, weight, limits=limits, progress=progress, **which)


def _refuse_apart(ray: str | None, workers: int | None, device: str) -> None:
    """Refuse options that belong to one process where a cluster is to do it, and the other way round."""
    from merganser.errors import ParameterError

    refuse_workers(workers, ray)
    if ray is not None and device != "cpu":
        raise ParameterError(f"--device {device} is for one process", "leave it out, or --ray")


def _print_cost(cost: Cost, whose: str) -> None:
    console().print(
        f"reads {size(cost.read_bytes)}, writes {size(cost.write_bytes)}, "
        f"peak memory {whose}about {size(cost.peak_bytes)} beside Python and torch"
    )

"""`merganser decentral`: agents that train on data of their own and merge with their neighbours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merganser.cli.show import console
from merganser.cli.zoo import Data

if TYPE_CHECKING:
    from rich.table import Table

    from merganser.study import agents

app = typer.Typer(help="Agents that train on data of their own and merge with their neighbours.", no_args_is_help=True)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a name: cifar10-ring, digits-ring.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run: journal, checkpoints, report.")],
    said: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="What CONFIG says otherwise: merge.rule=aligned.")
    ] = None,
    data: Data = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of that of the configuration.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that DIR holds.")] = False,
    faults: Annotated[
        str, typer.Option(metavar="PLAN", help="Fail on purpose: AGENT:ROUND:PHASE:ACTION[:SECONDS],...")
    ] = "",
    ray: Annotated[
        str | None,
        typer.Option(metavar="local|HOST:PORT", help="A process for every agent, here or on a Ray cluster."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run all rounds, and write a report.

    A run that was interrupted, or killed, goes on with --resume as if nothing had happened.

    merganser decentral run examples/decentral/digits.yaml --out runs/digits
    merganser decentral run cifar10-ring merge.rule=aligned topology.kind=full --data DIR --out runs/full

    With --ray an agent that dies begins again from its last checkpoint while the others go on. All machines of the
    cluster see DIR under the same name.
    """
    from merganser.decentral.baselines import effective
    from merganser.decentral.faults import parse_faults
    from merganser.decentral.folder import refuse_held, refuse_others
    from merganser.decentral.rounds import Crew, together
    from merganser.decentral.rounds import run as run_rounds
    from merganser.decentral.words import read_config
    from merganser.study.agents import Learners
    from merganser.study.agents_page import write_report
    from merganser.study.composing import run_of

    words = run_of(config, said or ())
    if seed is not None:
        words = read_config(words.model_dump(mode="json") | {"seed": seed})
    shared, words = words, effective(words)
    plan = parse_faults(faults, words.limits, agents=words.agents)
    refuse_others(words, out, resume=resume)  # before anything is read, or begun
    refuse_held(out)
    learners = Learners(shared, data)
    failed: dict[int, str] = {}
    with ExitStack() as stack:
        if ray is None:
            crew: Crew = together(words, learners, folder=out, hook=plan.hook, tamper=plan.tamper)
        else:
            from merganser.decentral.ray_crew import on_ray
            from merganser.merging.cluster_ray import connected

            stack.enter_context(connected(ray))
            crew = on_cluster = stack.enter_context(on_ray(words, learners, out, faults=plan))
            stack.callback(lambda: failed.update(on_cluster.failures()))
        plan.refuse_late(len(crew.plan()))
        progress = stack.enter_context(_live(quiet))
        lines = run_rounds(words, crew, out, resume=resume, progress=progress, data=_digest(learners))
    write_report(words, lines, out)
    if not quiet:
        _print(lines)
        console().print(f"{out / 'report.html'}: written")
    for agent, why in failed.items():
        typer.echo(f"agent {agent} did not end the run: {why}", err=True)


@app.command()
def show(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs.")],
) -> None:
    """Print the rounds of a run, or the last rounds of several with spread over agents and over seeds apart.

    merganser decentral show runs/digits
    merganser decentral show runs/seed-0 runs/seed-1 runs/seed-2
    """
    from merganser.decentral.folder import config_of, journal
    from merganser.decentral.page import SEEDS_HEADER, cost, outcome, over_seeds, setting

    runs = [(config_of(folder), journal(folder)) for folder in folders]
    if len(runs) == 1:
        ((config, lines),) = runs
        _print(lines)
        console().print(f"{outcome(lines)}\n{setting(config)}\n{cost(lines)}")
        return
    table = _table(SEEDS_HEADER)
    for row in over_seeds(runs):
        table.add_row(*row)
    console().print(table)


@app.command()
def topology(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="ring, full, star, hub, torus, exponential, ...")],
    agents: Annotated[int, typer.Argument(metavar="N", min=1, help="How many agents.")],
    weights: Annotated[str, typer.Option(help="metropolis, uniform or lazy.")] = "metropolis",
    seed: Annotated[int, typer.Option(min=0, help="Of random matchings.")] = 0,
    file: Annotated[str | None, typer.Option(metavar="FILE", help="JSON; for the kind file.")] = None,
) -> None:
    """Print a graph's mixing weights, lambda2 and spectral gap.

    merganser decentral topology ring 5
    """
    from merganser.decentral.describing import describe
    from merganser.decentral.topology import topology_of
    from merganser.decentral.words import read_config

    words: dict[str, Any] = {"kind": kind, "weights": weights, "seed": seed, "file": file}
    config = read_config({"agents": agents, "rounds": 1, "network": {}, "data": {"source": {}}, "topology": words})
    console().print(describe(topology_of(config.topology, agents)))


@contextmanager
def _live(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A table that grows by a round at a time, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live

    from merganser.decentral.page import HEADER, row

    table = _table(HEADER)
    with Live(table, console=Console(stderr=True), transient=True, auto_refresh=False) as live:

        def progress(line: dict[str, Any]) -> None:
            table.add_row(*row(line))
            live.refresh()

        yield progress


def _digest(learners: agents.Learners) -> str:
    """Of all examples, however they are shared out."""
    from merganser.decentral.folder import digest_of

    parts = [x for part in (*learners.shards, learners.test) for x in (part.x, part.y)]
    return digest_of(parts if learners.proxy is None else [*parts, learners.proxy])


def _print(lines: Sequence[dict[str, Any]]) -> None:
    from merganser.decentral.page import HEADER, row

    table = _table(HEADER)
    for line in lines:
        table.add_row(*row(line))
    console().print(table)


def _table(header: Sequence[str]) -> Table:
    from rich.table import Table

    return Table(*header, box=None, pad_edge=False)

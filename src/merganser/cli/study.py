"""`merganser study`: merge models as they arrive, or networks that started apart, judge them, write a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.show import console, progress_bar
from merganser.cli.zoo import ConfigDir, Data

if TYPE_CHECKING:
    from merganser.study.apart_page import Table
    from merganser.study.composing import Plan
    from merganser.study.judge import Progress
    from merganser.study.words_agents import AgentsNode
    from merganser.study.words_apart import HalvesNode, LinesNode
    from merganser.study.zoo import Bar


def study(
    words: Annotated[
        list[str],
        typer.Argument(metavar="GROUP=NAME...", help="study=NAME, or method=, modelpool=, taskpool= and seed=."),
    ],
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Take lists apart: method=opcm,gram seed=0,1,2.")
    ] = False,
    data: Data = None,
    zoo: Annotated[
        Path | None, typer.Option("--zoo", metavar="DIR", help="Where trained models are; default: zoo/NAME.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the study; default: studies/NAME.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where networks run: cpu, cuda.")] = "cpu",
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Judge with matrix products in bfloat16: faster, hardly different.")
    ] = False,
    config_dir: ConfigDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be compared, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Merge a pool's models as they arrive, judge after every arrival, and write a report.

    A study that was interrupted goes on where it stood. Models that a zoo can train are trained first.

    merganser study study=vision8 --data DIR
    merganser study study=cifar5x5 --data DIR
    merganser study study=dimat --data DIR
    merganser study method=opcm method.settings.alpha=0.2 modelpool=text8 taskpool=text8 seed=1 --data DIR
    """
    from merganser.errors import ParameterError
    from merganser.study.composing import Plan, expanded, merged_plans, study_of
    from merganser.study.words_agents import AgentsNode

    if zoo is not None:
        words = [*words, f"zoo_folder={zoo}"]
    found = [study_of(one, extra=config_dir) for one in (expanded(words) if multirun else [words])]
    plans = merged_plans([plan for plan in found if isinstance(plan, Plan)])
    apart = [node for node in found if not isinstance(node, Plan)]
    if out is not None and len(plans) + len(apart) > 1:
        raise ParameterError(
            f"--out is one folder, and this is {len(plans) + len(apart)} studies", "sweep over method and seed only"
        )
    for plan in plans:
        _describe(plan, quiet=quiet and not dry_run)
        if not dry_run:
            _run(plan, out or Path("studies") / plan.study.name, data, device, bfloat16, config_dir, quiet)
    for node in apart:
        _describe_apart(node, quiet=quiet and not dry_run)
        if dry_run:
            continue
        if isinstance(node, AgentsNode):
            _run_agents(node, out or Path("studies") / node.name, data, device, bfloat16, quiet)
        else:
            _run_apart(node, out or Path("studies") / node.name, data, device, bfloat16, quiet)


def _bar(quiet: bool) -> Bar:
    @contextmanager
    def bar(label: str) -> Iterator[Progress | None]:
        with progress_bar(label, quiet=quiet, unit="steps") as progress:
            yield progress

    return bar


def _run(
    plan: Plan, out: Path, data: Path | None, device: str, bfloat16: bool, config_dir: Path | None, quiet: bool
) -> None:
    from merganser.study.page import write_report
    from merganser.study.running import Study
    from merganser.study.summary import HEADER, rows
    from merganser.study.zoo import train_needed

    bar = _bar(quiet)
    train_needed(plan, data=data, device=device, bar=bar, extra=config_dir)
    Study(plan, out, data, device, bfloat16, bar).run()
    summary = write_report(plan, out)
    if not quiet:
        _print(HEADER, rows(summary))
        console().print(f"{out / 'report.html'}: written")


def _run_apart(
    node: HalvesNode | LinesNode, out: Path, data: Path | None, device: str, bfloat16: bool, quiet: bool
) -> None:
    from merganser.errors import ParameterError
    from merganser.study.apart import Work
    from merganser.study.apart_page import write_page
    from merganser.study.halves import Halves
    from merganser.study.lines import Lines
    from merganser.study.words_apart import HalvesNode

    work = Work(out, Path(node.zoo), data, device, bfloat16, _bar(quiet))
    if isinstance(node, HalvesNode):
        Halves(node, work, lambda: write_page(node, out, draws=False)).run()
    elif bfloat16:
        raise ParameterError(f"study {node.name} judges losses, and these in float32", "leave --bfloat16 out")
    else:
        Lines(node, work, lambda: write_page(node, out, draws=False)).run()
    _print_tables(write_page(node, out), out, quiet)


def _run_agents(node: AgentsNode, out: Path, data: Path | None, device: str, bfloat16: bool, quiet: bool) -> None:
    from merganser.errors import ParameterError
    from merganser.study.agents_study import AgentsStudy
    from merganser.study.agents_study_page import write_agents_page
    from merganser.study.apart import Work

    if bfloat16 or device != "cpu":
        what = "--bfloat16" if bfloat16 else f"--device {device}"
        raise ParameterError(f"agents of study {node.name} train in float32 on the CPU", f"leave {what} out")
    work = Work(out, Path(node.zoo), data, device, bfloat16, _bar(quiet))
    AgentsStudy(node, work, lambda: write_agents_page(node, out, draws=False)).run()
    _print_tables(write_agents_page(node, out), out, quiet)


def _print_tables(tables: Sequence[Table], out: Path, quiet: bool) -> None:
    if quiet:
        return
    for table in tables:
        console().print(table.title)
        _print(table.header, table.rows)
    console().print(f"{out / 'report.md'}: written")


def _print(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for line in rows:
        table.add_row(*line)
    console().print(table)


def _describe(plan: Plan, *, quiet: bool) -> None:
    if not quiet:
        orders = ", ".join(map(str, plan.study.seeds))
        console().print(
            f"{plan.study.title}: {len(plan.models.models)} models of {plan.models.name}, "
            f"{', '.join(plan.methods)}; orders {orders}; {plan.study.split} split"
        )


def _describe_apart(node: HalvesNode | LinesNode | AgentsNode, *, quiet: bool) -> None:
    from merganser.study.words_agents import AgentsNode

    if quiet:
        return
    if isinstance(node, AgentsNode):
        console().print(f"{node.title}: {', '.join(node.chosen)}; seeds {', '.join(map(str, node.seeds))}")
    else:
        console().print(f"{node.title}: {', '.join(node.networks)}; {', '.join(node.rules)}")

"""`merganser study`: merge models as they arrive, judge every step, write a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli.show import console, progress_bar
from merganser.cli.zoo import ConfigDir, Data

if TYPE_CHECKING:
    from merganser.study.composing import Plan
    from merganser.study.judge import Progress


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
    merganser study method=opcm method.settings.alpha=0.2 modelpool=text8 taskpool=text8 seed=1 --data DIR
    """
    from merganser.study.composing import expanded, merged_plans, plan_of

    if zoo is not None:
        words = [*words, f"zoo_folder={zoo}"]
    plans = merged_plans([plan_of(one, extra=config_dir) for one in (expanded(words) if multirun else [words])])
    if out is not None and len(plans) > 1:
        from merganser.errors import ParameterError

        raise ParameterError(
            f"--out is one folder, and this is {len(plans)} studies", "sweep over method and seed only"
        )
    for plan in plans:
        _describe(plan, quiet=quiet and not dry_run)
        if not dry_run:
            _run(plan, out or Path("studies") / plan.study.name, data, device, bfloat16, config_dir, quiet)


def _run(
    plan: Plan, out: Path, data: Path | None, device: str, bfloat16: bool, config_dir: Path | None, quiet: bool
) -> None:
    from merganser.study.page import write_report
    from merganser.study.running import Study
    from merganser.study.summary import HEADER, rows
    from merganser.study.zoo import train_needed

    @contextmanager
    def bar(label: str) -> Iterator[Progress | None]:
        with progress_bar(label, quiet=quiet, unit="steps") as progress:
            yield progress

    train_needed(plan, data=data, device=device, bar=bar, extra=config_dir)
    Study(plan, out, data, device, bfloat16, bar).run()
    summary = write_report(plan, out)
    if not quiet:
        from rich.table import Table

        table = Table(*HEADER, box=None, pad_edge=False)
        for line in rows(summary):
            table.add_row(*line)
        console().print(table)
        console().print(f"{out / 'report.html'}: written")


def _describe(plan: Plan, *, quiet: bool) -> None:
    if not quiet:
        orders = ", ".join(map(str, plan.study.seeds))
        console().print(
            f"{plan.study.title}: {len(plan.models.models)} models of {plan.models.name}, "
            f"{', '.join(plan.methods)}; orders {orders}; {plan.study.split} split"
        )

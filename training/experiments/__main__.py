"""The command: `python -m attnres.training.experiments run STUDY`, and `... report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...configuration_attnres import AttnResError
from .runner import RESULTS, run_study
from .studies import STUDIES

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


@app.command()
def run(
    study: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}, or all.")],
    preset: Annotated[str, typer.Option(help="smoke, cpu or gpu.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Results are kept in OUTPUT/STUDY-PRESET.")] = RESULTS,
    workers: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of each process.", show_default=False)] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Start no run after so long; those that go on are finished.", show_default=False),
    ] = None,
) -> None:
    """Do the runs of a study that have no result yet."""
    for name in STUDIES if study == "all" else (study,):
        missing = run_study(
            name, preset, output=output, workers=workers, threads=threads, minutes=minutes, report=console.print
        )
        console.print(f"{name}: {missing} runs are missing." if missing else f"{name}: complete.")


@app.command()
def report(
    preset: Annotated[str, typer.Option(help="smoke, cpu or gpu.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Where results are kept.")] = RESULTS,
) -> None:
    """Make the tables and figures of docs/evidence.md from the results."""
    from .evidence import write

    for path in write(preset, output):
        console.print(f"Written: {path}", soft_wrap=True)


if __name__ == "__main__":
    try:
        app()
    except AttnResError as error:
        sys.exit(f"Error: {error}")

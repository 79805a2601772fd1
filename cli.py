"""The command `attnres`. Each subcommand is one call into the package."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from .configuration_attnres import AttnResError

app = typer.Typer(
    name="attnres",
    help="Attention Residuals (arXiv 2603.15031) for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
error_console = Console(stderr=True)
state = {"debug": False}


class Mix(StrEnum):
    sum = "sum"
    mean = "mean"


class Verify(StrEnum):
    full = "full"
    sample = "sample"
    none = "none"


def _print_version(value: bool) -> None:
    if value:
        console.print(f"attnres {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    state["debug"] = debug


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a Hub id.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False)],
    num_blocks: Annotated[
        int | None, typer.Option(help="N, the number of blocks (8 if nothing is given).", show_default=False)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="S, sublayers per block, instead of --num-blocks.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Full AttnRes, the same as --block-size 1.")] = False,
    mix: Annotated[Mix, typer.Option(help="sum: lossless for every architecture; mean: the paper's read.")] = Mix.sum,
    verify: Annotated[
        Verify, typer.Option(help="Compare the whole model, its first layers (if it does not fit), or nothing.")
    ] = Verify.full,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at DESTINATION.")] = False,
) -> None:
    """Make an AttnRes checkpoint of an existing one, without changing what it computes."""
    from .conversion import ConversionError
    from .conversion import convert as convert_checkpoint
    from .conversion.converter import report_table

    if full and (block_size is not None or num_blocks is not None):
        raise ConversionError("--full stands for --block-size 1; give only one of --full, --block-size, --num-blocks.")
    report = convert_checkpoint(
        source,
        destination,
        num_blocks=num_blocks,
        block_size=1 if full else block_size,
        mix=mix.value,
        verify=verify.value,
        overwrite=overwrite,
        revision=revision,
        progress=True,
    )
    console.print(report_table(report))
    console.print(f"Ready: from_pretrained({escape(repr(str(destination)))}, trust_remote_code=True)", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory to write to; made anew.")] = Path("demo-output"),
) -> None:
    """Convert a small trained checkpoint, verify it, and generate from both: offline, in about a minute."""
    from .examples.demo import run

    run(output, console)


def main() -> None:
    """Runs the command; an [`AttnResError`] is printed as a message, without a traceback, and exits with 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half-written is removed
    try:
        app()
    except AttnResError as error:
        if state["debug"]:
            raise
        error_console.print("[bold red]Error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

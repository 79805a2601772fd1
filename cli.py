"""The command `attnres`. Each subcommand is one call into the package."""

from __future__ import annotations

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
kimi_k3 = typer.Typer(help="Checkpoints in the layout of Kimi K3.", no_args_is_help=True)
app.add_typer(kimi_k3, name="kimi-k3")
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
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin with weights_only; rewrite as safetensors.")
    ] = False,
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
        allow_pickle=allow_pickle,
        revision=revision,
        progress=True,
    )
    console.print(report_table(report))
    console.print(f"Ready: from_pretrained({escape(repr(str(destination)))}, trust_remote_code=True)", soft_wrap=True)


@kimi_k3.command("export")
def kimi_k3_export(
    source: Annotated[Path, typer.Argument(help="Directory of an AttnRes checkpoint over Kimi Linear.")],
    destination: Annotated[Path, typer.Argument(help="Directory to make.")],
) -> None:
    """Write an AttnRes checkpoint over Kimi Linear in the layout of Kimi K3."""
    from .conversion.kimi_k3 import export_checkpoint

    export_checkpoint(source, destination)


@kimi_k3.command("import")
def kimi_k3_import(
    source: Annotated[Path, typer.Argument(help="Directory of a checkpoint in the layout of Kimi K3.")],
    destination: Annotated[Path, typer.Argument(help="Directory to make.")],
) -> None:
    """Make an AttnRes checkpoint of one in the layout of Kimi K3, if its decoder is Transformers' Kimi Linear."""
    from .conversion.kimi_k3 import import_checkpoint

    import_checkpoint(source, destination)
    console.print(f"Ready: from_pretrained({escape(repr(str(destination)))}, trust_remote_code=True)", soft_wrap=True)


@app.command()
def card(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of an AttnRes checkpoint.", show_default=False)],
    results: Annotated[
        Path | None, typer.Option(help="Directory that `attnres eval` wrote, for its table.", show_default=False)
    ] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Hub repository to name in the example.", show_default=False)
    ] = None,
) -> None:
    """Write the model card of a checkpoint, or bring it up to date; what was written by hand stays."""
    from .model_cards import update_card

    console.print(f"Written: {escape(str(update_card(checkpoint, results, repo_id=repo_id)))}", soft_wrap=True)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of an AttnRes checkpoint.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, user/name; made if new.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if new.", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and show what would be uploaded.")] = False,
) -> None:
    """Check a checkpoint and upload it to the Hugging Face Hub; the same command resumes an interrupted upload."""
    from .model_cards import push as push_checkpoint

    commit = push_checkpoint(
        checkpoint,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        console=console,
    )
    console.print(
        "Dry run: nothing was sent." if commit is None else f"Ready: {escape(commit.pr_url or commit.commit_url)}",
        soft_wrap=True,
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory to write to; made anew.")] = Path("demo-output"),
) -> None:
    """Convert a small trained checkpoint, verify it, and generate from both: offline, in about a minute."""
    from .examples.demo import run

    run(output, console)


def main() -> None:
    """Runs the command; an [`AttnResError`] is printed as a message, without a traceback, and exits with 2."""
    try:
        app()
    except AttnResError as error:
        if state["debug"]:
            raise
        error_console.print("[bold red]Error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

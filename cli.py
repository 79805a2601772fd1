"""The command `attnres`. Each subcommand is one call into the package."""

from __future__ import annotations

import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from . import __version__
from .configuration_attnres import AttnResError, printable

if TYPE_CHECKING:
    from .training import TrainingReport

app = typer.Typer(
    name="attnres",
    help="Attention Residuals (arXiv 2603.15031) for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
kimi_k3 = typer.Typer(help="Checkpoints in the layout of Kimi K3.", no_args_is_help=True)
app.add_typer(kimi_k3, name="kimi-k3")


class TerminalConsole(Console):
    """Prints text that may come from anyone, such as names of files, and may be cut off from its reader."""

    def render_str(self, text: str, **kwargs: Any) -> Text:
        return super().render_str(printable(text), **kwargs)

    def print(self, *objects: Any, **kwargs: Any) -> None:
        try:
            super().print(*objects, **kwargs)
        except OSError as error:  # for example a full disk
            raise AttnResError(f"the output cannot be written: {error}") from error


console = TerminalConsole()
error_console = TerminalConsole(stderr=True)
state = {"debug": False}


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
    mix: Annotated[str, typer.Option(help="sum: lossless for every architecture; mean: the paper's read.")] = "sum",
    num_heads: Annotated[int, typer.Option(help="H, the depth heads; lossless, and no parameter more.")] = 1,
    verify: Annotated[
        str, typer.Option(help="What is compared. full: the whole model; sample: its first layers; none: nothing.")
    ] = "full",
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
        mix=mix,
        num_heads=num_heads,
        verify=verify,
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


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint, or a Hub id; none for --check.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The model to compare it with, under the same settings.", show_default=False)
    ] = None,
    tasks: Annotated[str, typer.Option(help="core, paper, sample, or names of tasks, with commas between.")] = "core",
    limit: Annotated[
        int | None, typer.Option(help="Ask only the first so many questions of each task.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in each prompt, instead of each task's own number.", show_default=False)
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences per forward pass; auto: as many as fit.")] = "8",
    device: Annotated[
        str | None, typer.Option(help="As PyTorch names it, else the first accelerator or the CPU.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: the checkpoint's, but float32 on a CPU.")] = "auto",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Of generation, as temperature=0.6,top_p=0.9.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write to (NAME-eval if not given).", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --output.")] = False,
    backend: Annotated[str, typer.Option("--model", help="The harness's model class: hf, vllm, ...")] = "hf",
    model_args: Annotated[
        str | None, typer.Option(help="Further arguments of that class, as a=1,b=2.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")
    ] = False,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run programs of the model even where there is no sandbox.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Directory of data sets, each in a folder of its name on the Hub.", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only try whether the tasks can be run here.")] = False,
) -> None:
    """Score a model on the paper's benchmarks, beside the model it came from."""
    from . import eval as evaluation

    if not state["debug"]:
        evaluation.quiet()
    if check:
        found = evaluation.check(evaluation.select(tasks), unsafe_code, data)
        for access in found:
            console.print(access.line, style=None if access.tasks else "yellow", markup=False, soft_wrap=True)
        raise typer.Exit(0 if all(access.tasks for access in found) else 1)
    if model is None:
        raise evaluation.EvaluationError("MODEL is missing: give a directory or a Hub id, or --check.")
    output = output or Path(f"{Path(model).name}-eval")
    report = evaluation.evaluate(
        model,
        baseline,
        tasks=tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        gen_kwargs=gen_kwargs,
        output=output,
        resume=resume,
        backend=backend,
        model_args=model_args,
        trust_remote_code=trust_remote_code,
        unsafe_code=unsafe_code,
        data=data,
    )
    if report is None:  # not the first of several processes
        return
    console.print(report.terminal_table())
    for missing in report.missing:
        console.print(f"Not run: {missing.line}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"Written: {output / 'report.html'}, and report.md, report.json beside it.", markup=False, soft_wrap=True
    )


@app.command()
def finetune(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Directory or Hub id of a converted checkpoint, or of a plain one.", show_default=False),
    ],
    data: Annotated[list[str], typer.Option(help="File, directory or Hub id to train on; repeat it for several.")],
    output: Annotated[Path, typer.Option(help="Directory to write to; the same command goes on there.")],
    train: Annotated[
        str, typer.Option(help="full: all parameters; lora: depth and an adapter; depth: depth parameters alone.")
    ] = "full",
    validation: Annotated[
        list[str] | None, typer.Option(help="The same, to measure on; or the share held out, as 0.02.")
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="N, of a plain checkpoint.", show_default=False)] = None,
    block_size: Annotated[int | None, typer.Option(help="S, of a plain checkpoint.", show_default=False)] = None,
    depth: Annotated[
        list[str] | None, typer.Option(help="Another field of AttnResConfig, as mix=mean.", show_default=False)
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Train a plain checkpoint as it is, to compare with.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter of --train lora into the weights.")] = False,
    split: Annotated[str, typer.Option(help="Of data sets of the Hub.")] = "train",
    text_column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.", show_default=False)] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences per device and forward.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Forwards per optimizer step.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence (1024, or the model's positions).", show_default=False)
    ] = None,
    packing: Annotated[
        str, typer.Option(help="wrapped, bfd or none; auto: wrapped for plain text, else none.")
    ] = "auto",
    assistant_only: Annotated[bool, typer.Option("--assistant-only", help="Loss on the assistant's turns.")] = False,
    completion_only: Annotated[
        bool | None, typer.Option(help="Loss on completions alone (if there are prompts).", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak, of all but depth parameters.", show_default=False)
    ] = None,
    depth_learning_rate: Annotated[
        float | None, typer.Option(help="Peak, of depth parameters.", show_default=False)
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.01,
    optimizer: Annotated[str, typer.Option(help="adamw; muon: of matrices, AdamW for the rest.")] = "adamw",
    schedule: Annotated[str, typer.Option(help="Of the learning rates: cosine or warmup_stable_decay.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which they rise.")] = 0.05,
    decay: Annotated[float, typer.Option(help="Share in which warmup_stable_decay lets them fall.")] = 0.2,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to it; 0: never.")] = 1.0,
    precision: Annotated[str, typer.Option(help="bf16 or fp32; auto: bf16 where an accelerator has it.")] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in the backward.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    lora_alpha: Annotated[int, typer.Option(help="Of the adapter.")] = 32,
    lora_dropout: Annotated[float, typer.Option(help="Of the adapter.")] = 0.0,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations (before and after if not given).", show_default=False)
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option(help="Steps that a logged loss is the mean of.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the order of the data and of dropout.")] = 42,
    tensorboard: Annotated[bool, typer.Option(help="Write logs to OUTPUT/runs.")] = True,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the optimizer's states in the end.")
    ] = False,
    pipeline: Annotated[int, typer.Option(help="Processes that hold one model together, each a stage.")] = 1,
    virtual_stages: Annotated[int, typer.Option(help="Stages on each process of a pipeline.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in OUTPUT.")] = False,
) -> None:
    """Train a checkpoint further; a plain one is retrofitted meanwhile. Interrupted, the same command goes on."""
    from . import training

    fields = _depth_fields(depth) | {
        name: value for name, value in (("num_blocks", num_blocks), ("block_size", block_size)) if value is not None
    }
    report = training.finetune(
        checkpoint,
        data=data,
        output=output,
        train=train,
        validation=_share_or_paths(validation),
        depth=fields,
        plain=plain,
        merge=merge,
        split=split,
        text_column=text_column,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        sequence_length=sequence_length,
        packing=packing,
        assistant_only=assistant_only,
        completion_only=completion_only,
        learning_rate=learning_rate,
        depth_learning_rate=depth_learning_rate,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        decay=decay,
        max_grad_norm=max_grad_norm,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
        tensorboard=tensorboard,
        keep_checkpoints=keep_checkpoints,
        pipeline=pipeline,
        virtual_stages=virtual_stages,
        revision=revision,
        overwrite=overwrite,
        console=error_console,
    )
    _print_training(report, output)


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file that says what is trained, and how.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Directory to write to, instead of the file's.", show_default=False)
    ] = None,
    pipeline: Annotated[
        int | None, typer.Option(help="Processes that hold one model together, each a stage.", show_default=False)
    ] = None,
    virtual_stages: Annotated[
        int | None, typer.Option(help="Stages on each process of a pipeline.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run there.")] = False,
) -> None:
    """Train a model from scratch: AttnRes, a variant of it, or a baseline, over any decoder."""
    from . import training

    run = training.RunConfig.read(config)
    given: dict[str, Any] = {"pipeline": pipeline, "virtual_stages": virtual_stages}
    settings = replace(run.training, **{name: value for name, value in given.items() if value is not None})
    run = replace(run, training=settings)
    output = output or Path(run.output)
    _print_training(training.train(run, output=output, overwrite=overwrite, console=error_console), output)


def _depth_fields(pairs: list[str] | None) -> dict[str, Any]:
    """The fields that `--depth NAME=VALUE` gives, each value read as YAML reads it."""
    from .training import TrainingError

    fields = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator:
            raise TrainingError(f"--depth {pair!r}: NAME=VALUE was expected, as mix=mean.")
        fields[name] = yaml.safe_load(value)
    return fields


def _share_or_paths(values: list[str] | None) -> list[str] | float | None:
    if values and len(values) == 1:
        try:
            return float(values[0])
        except ValueError:
            return list(values)
    return values


def _print_training(report: TrainingReport, output: Path) -> None:
    from .training.engine import process_state
    from .training.report import report_table

    if process_state().is_main_process:
        console.print(report_table(report))
        console.print(f"Written: {escape(str(output))}", soft_wrap=True)


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="Directory of an AttnRes checkpoint, or a Hub id.", show_default=False)
    ],
    text: Annotated[Path | None, typer.Option(help="File to take statistics over.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Tokens to show one by one, else the first of the text.", show_default=False)
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second checkpoint, AttnRes or the plain source.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write to (NAME-inspect if not given).", show_default=False)
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Measure gradients too.")] = False,
    drop_source: Annotated[
        bool, typer.Option("--drop-source", help="Measure the loss without each source; runs the model very often.")
    ] = False,
    read: Annotated[int | None, typer.Option(help="Read whose tokens are drawn, from 0.", show_default=False)] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window of the text.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 4,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: the checkpoint's, but float32 on a CPU.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread the model over devices.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier inspection.")] = False,
) -> None:
    """Show where every layer reads from: figures, their numbers, and a page to explore."""
    from .analysis import inspect_checkpoint

    output = output or Path(f"{Path(checkpoint).name}-inspect")
    inspect_checkpoint(
        checkpoint,
        text=text,
        prompt=prompt,
        compare=compare,
        output=output,
        gradients=gradients,
        drop=drop_source,
        read=read,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dtype=dtype,
        device_map=device_map,
        overwrite=overwrite,
        console=error_console,
    )
    console.print(f"Written: {output / 'report.html'}, and its figures beside it.", markup=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory to write to; made anew.")] = Path("demo-output"),
) -> None:
    """Convert a small trained checkpoint, verify it, generate from both and evaluate both: offline, in a minute."""
    from .examples.demo import run

    run(output, console)


def main() -> None:
    """Runs the command; an [`AttnResError`] is printed as a message, without a traceback, and exits with 2."""
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(format_warning(*args, **kwargs))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half-written is removed
    try:
        app()
    except AttnResError as error:
        if state["debug"]:
            raise
        with suppress(AttnResError):  # there is no output to report to
            error_console.print("[bold red]Error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

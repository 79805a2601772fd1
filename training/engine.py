"""The run itself, the same for fine-tuning and for training from scratch: claim the output, train or go on, save."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from ..configuration_attnres import AttnResError
from ..model_cards.card import TRAINING_REPORT
from .data import Data
from .errors import TrainingError
from .pipeline import PipelineTrainer
from .report import TrainingReport
from .settings import TrainingSettings
from .trainer import DepthTrainer, LastStep, ProgressBar, sync_tree

CHECKPOINTS = "checkpoints"
RUNS = "runs"
RESULT = ".result"  # where the result is made
NEVER = 10**9


def process_state() -> PartialState:
    """Which of several processes this one is; the first call makes them a group."""
    return PartialState(cpu=not torch.cuda.is_available())


def num_replicas(settings: TrainingSettings) -> int:
    """How many copies of the model are trained together: processes, or pipelines of several.

    Raises:
        TrainingError: the processes do not make whole pipelines, or were launched for FSDP.
    """
    world = process_state().num_processes
    if settings.pipeline > 1 and _env_says("ACCELERATE_USE_FSDP"):
        raise TrainingError("A pipeline and FSDP do not go together here; launch the pipeline with torchrun.")
    if world % settings.pipeline:
        raise TrainingError(
            f"pipeline={settings.pipeline} needs that many processes, or a multiple of them, and there are {world}; "
            f"start it with torchrun --nproc-per-node {settings.pipeline} -m attnres.training ..."
        )
    return world // settings.pipeline


def runs_in_bfloat16(settings: TrainingSettings) -> bool:
    """Whether the forward runs under bfloat16 autocast, see [`TrainingSettings`]."""
    if settings.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return settings.precision == "bf16"


def _env_says(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def check_output(output: Path) -> None:
    """Checks that a training may write there, before anything is loaded.

    Several processes do not start at the same moment. The main one may already write its report when another one
    comes here, so only the main process looks at what the directory holds.

    Raises:
        TrainingError: it holds something else, or its parent directory is missing.
    """
    if not output.parent.is_dir():
        raise TrainingError(f"output {output}: its parent directory does not exist; create it first.")
    if not process_state().is_main_process:
        return
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise TrainingError(f"output {output} is not a directory; choose another.")
    if output.is_dir() and any(output.iterdir()) and TrainingReport.read(output) is None:
        raise TrainingError(f"output {output} holds something that no training wrote; choose another, or move that.")


@contextmanager
def claimed(output: Path, report: TrainingReport, overwrite: bool) -> Iterator[TrainingReport]:
    """Makes the output the place of this run, for as long as the context lasts.

    Args:
        output (`Path`): the directory.
        report (`TrainingReport`): what is to be run.
        overwrite (`bool`): whether an earlier run there makes way.

    Yields:
        `TrainingReport`: the report that is there: finished, if there is nothing left to do.

    Raises:
        TrainingError: another process trains there, or the run that is there has other settings.
    """
    state = process_state()
    with ExitStack() as stack:
        if state.is_main_process:
            output.mkdir(exist_ok=True)
            descriptor = os.open(output, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(f"another process trains into {output}: {error}") from error
            earlier = TrainingReport.read(output)
            if overwrite and earlier is not None:
                clear(output, earlier)
                earlier = None
            if earlier is None:
                report.write(output)
            elif difference := _difference(earlier.fixed(), report.fixed()):
                raise TrainingError(
                    f"output {output} holds a run with other settings ({difference}), which cannot be resumed with "
                    "these. Give the same ones, another output, or --overwrite to start again."
                )
        state.wait_for_everyone()
        yield TrainingReport.read(output) or report


def clear(output: Path, report: TrainingReport) -> None:
    """Removes what a run wrote.

    Raises:
        TrainingError: there is something else; nothing was removed.
    """
    ours = {CHECKPOINTS, RUNS, RESULT, TRAINING_REPORT, *report.files}
    paths = list(output.iterdir())
    if others := sorted(path.name for path in paths if path.name not in ours):
        raise TrainingError(f"output {output} holds {others[0]!r}, which no training wrote; move it elsewhere.")
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    shown = [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def run(
    model: Any,
    tokenizer: Any,
    data: Data,
    settings: TrainingSettings,
    *,
    learning_rates: tuple[float, float],
    output: Path,
    report: TrainingReport,
    save: Callable[[DepthTrainer, Path], None],
    peft_config: Any = None,
    console: Console | None = None,
) -> TrainingReport:
    """Trains a model, from the last checkpoint if there is one, and writes the result.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        data (`Data`): what it is trained on.
        settings (`TrainingSettings`): of the run.
        learning_rates (`tuple[float, float]`): peak, of all but the depth parameters, and of those.
        output (`Path`): a directory that is claimed for this run.
        report (`TrainingReport`): of the run, as it was claimed.
        save: writes the result of a trainer into a directory; all processes call it, the main one writes.
        peft_config (*optional*): of an adapter to train instead of the model.
        console (`Console`, *optional*): where to show progress; nothing is shown without it.

    Raises:
        TrainingError: the data do not fit the model, a loss is not finite, or something cannot be written.
    """
    started = time.perf_counter()
    checkpoints = output / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    last = get_last_checkpoint(str(checkpoints))
    state = process_state()
    arguments = _arguments(data, settings, learning_rates[0], checkpoints, last is None)
    set_seed(settings.seed)  # of new weights: those of an adapter
    bar = ProgressBar(console) if console is not None and state.is_main_process else None
    try:
        trainer = (PipelineTrainer if settings.pipeline > 1 else DepthTrainer)(
            settings=settings,
            learning_rates=learning_rates,
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[LastStep()],
        )
    except AttnResError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        raise TrainingError(f"The model cannot be trained on these data: {error}") from error
    prepared: tuple[tuple[Any, str], ...] = ((trainer.train_dataset, "training"), (trainer.eval_dataset, "validation"))
    for rows, what in prepared:
        if rows is not None and not any(label != -100 for labels in rows["labels"] for label in labels[1:]):
            raise TrainingError(f"The {what} data have no token that counts for the loss.")
    trainer.remove_callback(PrinterCallback)
    if bar is not None:
        trainer.add_callback(bar)
    if settings.tensorboard and state.is_main_process:
        trainer.add_callback(_tensorboard(output / RUNS))
    with ExitStack() as stack:
        if bar is not None:
            stack.enter_context(bar.shown())
        trainer.train(resume_from_checkpoint=last)
    finished = _deliver(trainer, _finished(report, trainer, time.perf_counter() - started), output, save)
    if state.is_main_process and not settings.keep_checkpoints:
        shutil.rmtree(checkpoints)
    state.wait_for_everyone()
    return finished


def _arguments(data: Data, settings: TrainingSettings, learning_rate: float, directory: Path, is_new: bool) -> Any:
    packing = settings.packing
    if packing == "auto":
        packing = "wrapped" if data.kind == "text" else "none"
    is_pipeline = settings.pipeline > 1  # one batch of all microbatches, which have one shape
    # FSDP's own recomputation is switched on in its configuration, and both at once are one too many.
    is_recomputed = _env_says("FSDP_ACTIVATION_CHECKPOINTING")
    try:
        return SFTConfig(
            output_dir=str(directory),
            per_device_train_batch_size=settings.batch_size * (settings.accumulation if is_pipeline else 1),
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=1 if is_pipeline else settings.accumulation,
            pad_to_multiple_of=settings.sequence_length if is_pipeline else None,
            max_steps=settings.steps or -1,
            num_train_epochs=settings.epochs,
            learning_rate=learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type=settings.schedule,
            max_grad_norm=settings.max_grad_norm,
            bf16=runs_in_bfloat16(settings),
            gradient_checkpointing=settings.gradient_checkpointing and not is_recomputed,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,  # the trainer stops instead
            save_steps=settings.save_every,
            eval_strategy="no" if data.validation is None else "steps",
            eval_steps=settings.eval_every or NEVER,
            eval_on_start=is_new and data.validation is not None,
            seed=settings.seed,
            data_seed=settings.seed,
            max_length=settings.sequence_length,
            packing=packing != "none",
            packing_strategy="wrapped" if packing == "none" else packing,
            completion_only_loss=settings.completion_only,
            assistant_only_loss=settings.assistant_only,
            include_num_input_tokens_seen="non_padding",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise TrainingError(f"These settings cannot be used here: {error}") from error


def _tensorboard(directory: Path) -> TensorBoardCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(f'{error}; pip install ".[train]", or leave it out (--no-tensorboard).') from error
    return TensorBoardCallback(SummaryWriter(str(directory)))


@contextmanager
def quiet() -> Iterator[None]:
    """One progress bar is enough, so those of the libraries are off, and warnings about their own future."""
    loggers = {name: logging.getLogger(name).level for name in ("trl", "accelerate", "datasets")}
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # for checkpoints of one process
            yield
    finally:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if had_bars[0]:
            transformers_logging.enable_progress_bar()
        if not had_bars[1]:
            datasets.enable_progress_bars()


def _finished(report: TrainingReport, trainer: DepthTrainer, seconds: float) -> TrainingReport:
    """The report with what came out, of which the trainer's state keeps account across resumptions."""
    state = trainer.state
    losses = tuple((int(entry["step"]), entry["loss"]) for entry in state.log_history if "loss" in entry)
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    validation = None
    if evaluations:
        validation = {
            when: {
                name.removeprefix("eval_"): entry[name] for name in ("eval_loss", "eval_bits_per_byte") if name in entry
            }
            for when, entry in (("before", evaluations[0]), ("after", evaluations[-1]))
        }
    return replace(
        report,
        finished=True,
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        train_loss=losses[-1][1] if losses else None,
        validation=validation,
        seconds=round(seconds, 2),
        losses=losses,
        evaluations=tuple((int(entry["step"]), entry["eval_loss"]) for entry in evaluations),
    )


def _deliver(
    trainer: DepthTrainer, report: TrainingReport, output: Path, save: Callable[[DepthTrainer, Path], None]
) -> TrainingReport:
    """Writes the result beside its place, then moves it there file by file. The report that says "finished" is last, so
    a run that is killed meanwhile does this again."""
    stage = output / RESULT
    try:
        if trainer.args.should_save:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            report.write(stage)
        trainer.accelerator.wait_for_everyone()
        save(trainer, stage)
        if trainer.args.should_save:
            (stage / TRAINING_REPORT).unlink()
            sync_tree(stage)
            report = replace(report, files=tuple(sorted(path.name for path in stage.iterdir())))
            for path in sorted(stage.iterdir()):
                if (output / path.name).is_dir():
                    shutil.rmtree(output / path.name)
                os.replace(path, output / path.name)
            stage.rmdir()
            report.write(output)
        trainer.accelerator.wait_for_everyone()
    except OSError as error:
        raise TrainingError(f"The result cannot be written to {output}: {error}") from error
    return report


__all__ = ["check_output", "claimed", "num_replicas", "process_state", "quiet", "run", "runs_in_bfloat16"]

"""The trainer: TRL's for supervised fine-tuning, with what is about depth, whole checkpoints, and loud failures."""

from __future__ import annotations

import copy
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from .data import tokens_per_byte
from .errors import TrainingError
from .optimizers import make_optimizer, parameter_groups
from .settings import TrainingSettings

STATE = "state"  # the parameters that learn, and what the optimizer knows of them, by their names in memory
UNFINISHED = ".unfinished"
CHECKPOINTS_KEPT = 2
WRAPPERS = frozenset(("_checkpoint_wrapped_module", "_orig_mod"))  # of activation checkpointing and compilation


class DepthTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with a learning rate for depth parameters. Differences from it:

    - a checkpoint appears at once and whole, and holds only the parameters that learn, by their names in memory, so
      another number of processes can go on from it;
    - a loss or a gradient that is not finite raises [`TrainingError`] before it reaches the weights;
    - `evaluate` gives the mean loss per token and bits per byte, over every example once;
    - nothing is told to anybody else.

    Args:
        settings (`TrainingSettings`): of the run.
        learning_rates (`tuple[float, float]`): peak, of all but the depth parameters, and of those.
        kwargs: of `SFTTrainer`.
    """

    # The library declares most of these as optional; here there are all of them.
    args: Any
    callback_handler: Any
    control: Any
    data_collator: Any
    eval_dataset: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: Any

    def __init__(self, *, settings: TrainingSettings, learning_rates: tuple[float, float], **kwargs: Any):
        self.settings, self.learning_rates = settings, learning_rates
        self._run_directory: Path | None = None
        self._tokens_per_byte: float | None = None
        super().__init__(**kwargs)
        # TRL's head also takes the entropy of every prediction, which is a fifth of the step of a small model.
        add_fused_lm_head(self._decoder, outputs=("log_probs",))
        # Wrappers of modules will change their names, and PEFT looks for the names that it knows.
        self.outline: Any = without_tensors(self.model) if self.is_fsdp_enabled else None
        if self.eval_dataset is not None:
            self._tokens_per_byte = tokens_per_byte(self.eval_dataset, self._tokenizer)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written with the finished checkpoint."""

    # -- optimizer and schedule ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._parameter_groups(self.model if model is None else model))
        return self.optimizer

    def _parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        return parameter_groups(
            model,
            frozenset(self.get_decay_parameter_names(model)),
            *self.learning_rates,
            weight_decay=self.settings.weight_decay,
            with_muon=self.settings.optimizer == "muon",
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.args.warmup_steps = math.ceil(self.settings.warmup * num_training_steps)
        if self.settings.schedule == "warmup_stable_decay":
            self.args.lr_scheduler_kwargs = {"num_decay_steps": round(self.settings.decay * num_training_steps)}
        return super().create_scheduler(num_training_steps, optimizer)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that was killed between its last checkpoint and its result has no step left, and the library would do
        one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # -- losses that are not finite ------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The mean loss per token of the optimizer step, and the loss over routers where the model has one."""
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **extra, use_cache=False, fused_lm_head=True)
        num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(num_tokens).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # they are counted over all, and gradients are averaged
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite(loss, "loss", model, inputs)
        self._last_inputs = inputs
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite(torch.as_tensor(norm, device=self.args.device), "norm of the gradient", model, None)
        return norm

    def _check_finite(self, value: torch.Tensor, what: str, model: Any, inputs: Any) -> None:
        value = value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach()
        is_bad = (~torch.isfinite(value)).float().reshape(1)
        if self.accelerator.num_processes > 1:  # all of them stop, or the others wait for ever
            is_bad = self.accelerator.reduce(is_bad, "sum")
        if not is_bad.item():
            return
        rates = ", ".join(f"{group['lr']:.3g}" for group in self.optimizer.param_groups)
        largest = self._largest_activation(model, self._last_inputs if inputs is None else inputs)
        raise TrainingError(
            f"Step {self.state.global_step + 1}: the {what} is {value.item()}, at the learning rates {rates}. "
            f"{largest} The last checkpoint, of the step before or earlier, is in {self.args.output_dir}. Look at the "
            "data of this step, or start again into another output with smaller learning rates."
        )

    def _largest_activation(self, model: Any, inputs: Any) -> str:
        def forward() -> None:
            with self.compute_loss_context_manager():
                model(**{k: v for k, v in self._prepare_inputs(dict(inputs)).items() if k != "labels"})

        return largest_activation(model, forward)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean loss per token (nats) and bits per byte of the validation data; each row counts once.

        Returns:
            `dict[str, float]`: `eval_loss`, and `eval_bits_per_byte` where the data have text.
        """
        loss_sum, num_tokens = self._evaluation_totals()
        loss = loss_sum / num_tokens
        metrics = {f"{metric_key_prefix}_loss": loss}
        if self._tokens_per_byte is not None:
            metrics[f"{metric_key_prefix}_bits_per_byte"] = loss / math.log(2) * self._tokens_per_byte
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_totals(self) -> tuple[float, float]:
        """The sum of the losses of all tokens of the validation data, and their number."""
        model = self.model
        totals = torch.zeros(2, dtype=torch.float64)
        was_training = model.training
        model.eval()
        batch_size = self.args.per_device_eval_batch_size
        for inputs in self._evaluation_batches(self.args.process_index, self.args.world_size, batch_size):
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(inputs), use_cache=False, fused_lm_head=True)
            totals += torch.stack([-outputs.log_probs.double().sum(), outputs.label_mask.double().sum()]).cpu()
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals.to(self.args.device), "sum")
        model.train(was_training)
        loss_sum, num_tokens = totals.tolist()
        return loss_sum, num_tokens

    def _evaluation_batches(self, replica: int, num_replicas: int, batch_size: int) -> DataLoader:
        """The share of the validation data that one of several copies of the model has; all have as many batches."""
        rows: Any = list(self.eval_dataset.select(range(replica, len(self.eval_dataset), num_replicas)))
        if len(rows) < math.ceil(len(self.eval_dataset) / num_replicas):
            filler = dict(self.eval_dataset[0])
            rows.append({**filler, "labels": [-100] * len(filler["labels"])})
        return DataLoader(rows, batch_size=batch_size, collate_fn=self.data_collator)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_directory or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Makes a checkpoint under another name, and renames it when all of it is on the disk."""
        root = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._run_directory = root / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(self._run_directory, ignore_errors=True)
            self._run_directory.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sync_tree(self._run_directory)
                shutil.rmtree(root / name, ignore_errors=True)
                os.replace(self._run_directory / name, root / name)
                sync(root)
                rotate_checkpoints(output_dir=str(root), save_total_limit=CHECKPOINTS_KEPT, use_mtime=False)
        except OSError as error:
            raise TrainingError(f"The checkpoint of step {self.state.global_step} cannot be saved: {error}") from error
        finally:
            self._run_directory = None
        self.accelerator.wait_for_everyone()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that learn and are on this process, or a part of them, by their names in memory."""
        return {plain_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}

    def whole_state(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The model without what it is wrapped in, and its state dict. Where processes hold parts of it, this model has
        no tensors, and the main process alone has the state. All processes call it."""
        if self.is_fsdp_enabled:
            return self.outline, self.accelerator.get_state_dict(self.model)
        model = self.accelerator.unwrap_model(self.model)
        return model, model.state_dict()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Parameters are saved with the state of the optimizer."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves the parameters that learn and the optimizer's state, each process what it holds of them."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.trained_parameters().items():
            state[name] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                state[f"{key} of {name}"] = value
        distributed_checkpoint.save(state, checkpoint_id=os.path.join(output_dir, STATE), no_dist=self._is_alone)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Parameters are loaded with the state of the optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads what [`_save_optimizer_and_scheduler`] saved, on any number of processes."""
        if checkpoint is None:
            return
        reader = distributed_checkpoint.FileSystemReader(os.path.join(checkpoint, STATE))
        try:
            saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{checkpoint} is no checkpoint of such a training: {error}") from error
        parameters = self.trained_parameters()
        # The model has the names of all parameters, also where this process holds a part of them.
        names = {plain_name(name) for name, p in self.model.named_parameters() if p.requires_grad}
        if others := names ^ {entry for entry in saved if " of " not in entry}:
            raise TrainingError(f"{checkpoint} has other parameters than the model, first {min(others)!r}.")
        state: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
        for entry, value in saved.items():
            key, _, name = entry.partition(" of ")
            if name in parameters:
                own = state[name]
                like = own if value.size == own.shape else torch.empty(value.size)
                state[entry] = torch.zeros_like(like, dtype=value.properties.dtype)
                self.optimizer.state[parameters[name]][key] = state[entry]
        distributed_checkpoint.load(state, storage_reader=reader, no_dist=self._is_alone)
        # Learning rates follow from the step alone.
        self.lr_scheduler.last_epoch = self.state.global_step - 1
        with warnings.catch_warnings():
            # The optimizer has done its steps in another process.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()

    @property
    def _decoder(self) -> Any:
        """The model without an adapter around it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def _is_alone(self) -> bool:
        return self.args.world_size == 1


def without_tensors(model: Any) -> Any:
    """A copy of a model, with parameters and buffers on the device `meta`."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of its modules add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until all that is in a directory is on the disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


@torch.no_grad()
def largest_activation(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Runs a forward and says which module of a model gives the largest value, and the first that gives one that is not
    finite."""
    largest, where, first_bad = 0.0, "", ""

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            nonlocal largest, where, first_bad
            for tensor in output if isinstance(output, tuple) else (output,):
                if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                    continue
                finite = torch.isfinite(tensor)
                if not first_bad and not finite.all():
                    first_bad = name
                value = tensor.abs().where(finite, 0).max().item() if tensor.numel() else 0.0
                if value > largest:
                    largest, where = value, name

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    text = f"The largest activation is {largest:.4g}, of {where}." if where else "No activation is finite."
    return text + (f" The first that is not finite is of {first_bad}." if first_bad else "")


class LastStep(TrainerCallback):
    """Logs and evaluates after the last step, so that the last checkpoint holds the results."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.do_eval


class ProgressBar(TrainerCallback):
    """One bar: steps, loss, validation loss, and tokens per second of this process' run.

    Args:
        console (`Console`): where to draw it.
    """

    def __init__(self, console: Console):
        whole = Column(no_wrap=True, min_width=9)
        columns = (BarColumn(20), MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole))
        self.progress = Progress(*columns, TextColumn("{task.fields[seen]}"), console=console)
        self.task: TaskID | None = None
        self.seen = {"loss": "", "eval_loss": "", "rate": ""}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar, also if something is raised meanwhile."""
        with self.progress:
            yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("Training", total=state.max_steps, completed=state.global_step, seen="")
        self.tokens_before = state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.task is not None
        elapsed = self.progress.tasks[self.task].elapsed
        if elapsed:
            rate = (state.num_input_tokens_seen - self.tokens_before) / elapsed
            self.seen["rate"] = f"{rate:,.0f} tokens/s"
        self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key, label in (("loss", "loss"), ("eval_loss", "validation")):
            if key in (logs or {}):
                self.seen[key] = f"{label} {logs[key]:.4f}"
        self._show(state.global_step)

    def _show(self, step: int) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=step, seen="  ".join(filter(None, self.seen.values())))

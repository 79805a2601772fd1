"""Training with the layers of one model divided among processes: the trainer on [`attnres.distributed`] pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.utils.data import DataLoader

from ..distributed import reduce_shared_gradients, split
from .errors import TrainingError
from .optimizers import make_optimizer
from .settings import TrainingSettings
from .trainer import DepthTrainer, largest_activation, plain_name, without_tensors


class PipelineTrainer(DepthTrainer):
    """[`DepthTrainer`] for a model whose decoder layers are divided among processes.

    `settings.pipeline` processes hold one model, each one stage of it (1F1B) or `settings.virtual_stages` (interleaved
    1F1B). What is learned is the same as in one process: a batch holds all sequences of an optimizer step, and its
    microbatches are the forwards that one process would accumulate. With more processes there are several such
    pipelines, each with a share of the sequences, and the gradients are summed over them.

    Args:
        settings (`TrainingSettings`): of the run.
        model: the whole model, in host memory; what is on no stage of this process is freed.
        kwargs: of [`DepthTrainer`].

    Attributes:
        modules (`nn.ModuleList`): the stages of this process.
        model: the whole model without its tensors (on the device `meta`), which says how it is saved.

    Raises:
        AttnResError: the model cannot be cut into so many stages.
    """

    def __init__(self, *, settings: TrainingSettings, model: Any, **kwargs: Any):
        super().__init__(settings=settings, model=model, **kwargs)
        if self.aux_loss_enabled:
            raise TrainingError(
                "The loss of this model adds up the routers of all layers, which a pipeline divides. Train it with "
                "FSDP2, or without that loss: set router_aux_loss_coef to 0 in its config.json."
            )
        whole: Any = self.model
        world, ranks = self.args.world_size, settings.pipeline
        mesh = init_device_mesh(self.args.device.type, (world // ranks, ranks), mesh_dim_names=("data", "pipeline"))
        self.group, self.data_group = mesh["pipeline"].get_group(), mesh["data"].get_group()
        self.replica, self.num_replicas = mesh["data"].get_local_rank(), world // ranks
        self.names = {id(p): plain_name(name) for name, p in whole.named_parameters()}
        decoder: Any = self._decoder
        self.prefix = "" if decoder is whole else "base_model.model."  # of names with an adapter around the decoder
        decoder.__dict__.pop("forward", None)  # the one that TRL put there takes the head with it
        self.stages = split(
            decoder,
            ranks * settings.virtual_stages,
            (settings.batch_size, self.args.max_length),
            device=self.args.device,
            group=self.group,
        )
        self.modules = nn.ModuleList(stage.submod for stage in self.stages)
        self.num_labels = torch.ones((), device=self.args.device)  # that the loss of a step is the mean over
        schedule: Any = Schedule1F1B if settings.virtual_stages == 1 else ScheduleInterleaved1F1B
        self.schedule = schedule(
            self.stages[0] if settings.virtual_stages == 1 else self.stages,
            n_microbatches=settings.accumulation,
            loss_fn=self._microbatch_loss,
            scale_grads=False,
        )
        self.outline = self.model = self.model_wrapped = self.callback_handler.model = without_tensors(whole)
        own = {id(p) for p in self.modules.parameters()}
        # The whole model tells which parameters are of embeddings and norms.
        groups = [{**g, "params": [p for p in g["params"] if id(p) in own]} for g in self._parameter_groups(whole)]
        self.optimizer = make_optimizer([group for group in groups if group["params"]])
        for parameter in whole.parameters():
            if id(parameter) not in own:
                parameter.data = parameter.data.new_empty(0)
        self.modules.to(self.args.device)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Stages are moved to it, not the whole model."""

    # -- one step ------------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.create_scheduler(num_training_steps=max_steps)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        self.callback_handler.train_dataloader = train_dataloader
        return self.modules, train_dataloader

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this pipeline; all its processes see the same ones."""
        dataset: Any = self._remove_unused_columns(self.train_dataset, description="training")
        loader: DataLoader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=self._get_train_sampler(dataset),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=self.num_replicas,
            process_index=self.replica,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    def _microbatch_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The share of one microbatch in the mean loss of the step."""
        logits = logits[:, :-1].flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / self.num_labels

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._last_inputs = inputs
        self.modules.train()
        self.num_labels = (inputs["labels"][:, 1:] != -100).sum()
        dist.all_reduce(self.num_labels, group=self.data_group)
        loss = self._run(self.schedule.step, inputs)
        reduce_shared_gradients(self.stages)
        if self.num_replicas > 1:
            for parameter in self.modules.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.data_group)
        dist.all_reduce(loss, group=self.data_group)
        self._check_finite(loss, "loss", model, inputs)
        return loss

    def _run(self, step: Callable[..., Any], inputs: Any) -> torch.Tensor:
        """Does all microbatches of a batch.

        Args:
            step: a method of the schedule.
            inputs: `input_ids`, `labels`, `[sequences, sequence]`, and what else there is; at most as many sequences as
                one step has. Sequences that are missing count for nothing.

        Returns:
            `torch.Tensor`: the sum of the losses of the microbatches, float32 `[]`, on all ranks of the pipeline.
        """
        batch = {name: self._filled(name, tensor) for name, tensor in self._prepare_inputs(inputs).items()}
        tokens, labels = batch.pop("input_ids"), batch.pop("labels")
        losses: list[torch.Tensor] = []
        args = (tokens,) if self.stages[0].is_first else ()
        targets: dict[str, Any] = {"target": labels, "losses": losses} if self.stages[-1].is_last else {}
        kwargs = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            step(*args, **targets, return_outputs=False, **kwargs)
        loss = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.args.device)
        dist.broadcast(loss, group=self.group, group_src=dist.get_world_size(self.group) - 1)
        return loss

    def _filled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        missing = self.settings.batch_size * self.settings.accumulation - len(tensor)
        filler = tensor[:1] if name != "labels" else torch.full_like(tensor[:1], -100)
        return torch.cat([tensor, filler.expand(missing, *tensor.shape[1:])]) if missing else tensor

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm = self._norm()
        nn.utils.clip_grads_with_norm_(self.modules.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = self._norm() if grad_norm is None else grad_norm
        self._check_finite(norm, "norm of the gradient", model, None)
        return norm.item()

    def _norm(self) -> torch.Tensor:
        """The norm of the gradient of the whole model, float32 `[]`; what several ranks hold counts once."""
        elsewhere = {id(p) for p, group in self.stages[0].local.shared if dist.get_rank(group) != 0}
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None and id(p) not in elsewhere]
        square = nn.utils.get_total_norm(gradients).float().to(self.args.device).square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def _largest_activation(self, model: Any, inputs: Any) -> str:
        with torch.no_grad():
            return largest_activation(self.modules, lambda: self._run(self.schedule.eval, inputs))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        mask = inputs.get("attention_mask")
        number = torch.tensor(inputs["input_ids"].numel() if mask is None else mask.sum(), device=self.args.device)
        dist.all_reduce(number, group=self.data_group)
        self.state.num_input_tokens_seen += int(number.item())

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluation_totals(self) -> tuple[float, float]:
        totals = torch.zeros(2, dtype=torch.float64)
        self.modules.eval()
        self.num_labels = torch.ones((), device=self.args.device)
        size = self.settings.batch_size * self.settings.accumulation
        for inputs in self._evaluation_batches(self.replica, self.num_replicas, size):
            with torch.no_grad():
                loss = self._run(self.schedule.eval, inputs)
            totals += torch.stack([loss.double().cpu(), (inputs["labels"][:, 1:] != -100).sum().double()])
        totals = totals.to(self.args.device)
        dist.all_reduce(totals, group=self.data_group)
        loss_sum, num_tokens = totals.tolist()
        return loss_sum, num_tokens

    # -- checkpoints and the result ------------------------------------------------------------------------------------

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {self.names[id(p)]: p for p in self.modules.parameters() if p.requires_grad}

    def whole_state(self) -> tuple[Any, dict[str, torch.Tensor]]:
        own = {
            self.prefix + plain_name(name): tensor
            for module in self.modules
            for name, tensor in module.model.state_dict().items()  # type: ignore[union-attr]
        }
        ranks = dist.get_world_size(self.group)
        names: list[Any] = [None] * ranks
        dist.all_gather_object(names, sorted(own), group=self.group)
        rank, state = dist.get_rank(self.group), {}
        for name, tensor in self.outline.state_dict().items():
            holders = [other for other in range(ranks) if name in names[other]]
            if not holders:
                raise TrainingError(f"No stage has {name!r} of the model; this is a fault of attnres.training.")
            if holders[0] != 0 and rank == holders[0]:
                dist.send(own[name].contiguous(), group=self.group, group_dst=0)
            elif rank == 0:
                received = own.get(name)
                if received is None:
                    received = torch.empty_like(tensor, device=self.args.device)
                    dist.recv(received, group=self.group, group_src=holders[0])
                state[name] = received.cpu()
        return self.outline, state

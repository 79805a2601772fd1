"""Stages for the schedules of `torch.distributed.pipelining`, with the paper's cross-stage caching.

A finished source never changes. So a rank that runs several stages (virtual stages) can keep, for each microbatch, the
sources that it has seen, and its later stages need only be sent the new ones. What is sent over one hop, in tensors of
one microbatch, follows from the number of sublayers before the hop alone:

    cache       what a later stage of the rank finds there          traffic, in sources of `[batch, sequence, hidden]`
    "none"      nothing                                             C (C-1) / 2 N_p + (C-1)                    (Eq. 7)
    "received"  what was sent to an earlier stage of the rank       P (P-1) / 2 N_p + (V-1) P^2 N_p + (P-1)    (Eq. 8)
    "all"       that, and what an earlier stage itself finished     P (P-1) / 2 N_p + (V-1) P (P-1) N_p + (P-1)

for P ranks with V stages each, C = P V, and N_p blocks per stage that end with it. The last term is the embedding,
which the equations leave out. A partial sum, if a stage ends inside a block, is one tensor more for each hop.

In the backward, the gradient of a source that came from the cache stays on the rank. The stage that brought the source
to the rank adds it to its own gradient: to what it sends to the stage before it, or, for a source that it finished
itself, to what it is sent by the stage behind it. Schedules run the backward of a later stage first, so the sum is
complete then, and is sent once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from ..configuration_attnres import AttnResError
from ..rewiring import decoder_layers
from .stages import Placeholder, StageModule, cut

CACHES = ("none", "received", "all")
PLACEMENTS = ("loop", "v")


class SourceCache:
    """What one rank keeps of each microbatch.

    Attributes:
        sources (`dict[int, dict[int, torch.Tensor]]`):
            By microbatch and index of the source, `[batch, sequence, hidden]`, without a graph; until the forward of
            the rank's last stage.
        gradients (`dict[int, dict[int, torch.Tensor]]`):
            By microbatch and index of the source, the sum of gradients of those stages that took it from the cache;
            until the backward of the stage that brought it.
    """

    def __init__(self) -> None:
        self.sources: dict[int, dict[int, torch.Tensor]] = {}
        self.gradients: dict[int, dict[int, torch.Tensor]] = {}

    def keep(self, microbatch: int, index: int, source: torch.Tensor) -> None:
        self.sources.setdefault(microbatch, {})[index] = source.detach()

    def add_gradient(self, microbatch: int, index: int, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            gradients = self.gradients.setdefault(microbatch, {})
            gradients[index] = gradients[index] + gradient if index in gradients else gradient

    def take_gradient(self, microbatch: int, index: int) -> torch.Tensor | None:
        """The sum, which is then forgotten; `None` if no stage took the source from the cache."""
        gradients = self.gradients.get(microbatch, {})
        gradient = gradients.pop(index, None)
        if not gradients:
            self.gradients.pop(microbatch, None)
        return gradient

    def clear(self) -> None:
        self.sources.clear()
        self.gradients.clear()


class Plan:
    """Which rank runs which stage, and which sources each stage finds in the cache of its rank.

    Attributes:
        known (`list[int]`): for each stage the number of sources that it finds in the cache; they are the first ones.
        kept (`list[int]`): for each stage the number of first sources that its rank still needs after it.
    """

    def __init__(self, modules: Sequence[StageModule], num_ranks: int, cache: str, placement: str):
        self.num_stages, self.num_ranks = len(modules), num_ranks
        self.placement = placement
        self.known = [0] * len(modules)
        self.kept = [0] * len(modules)
        for stage in range(len(modules)):
            # Neighbours on one rank hand tensors over without sending them.
            earlier = [other for other in self.stages_of(self.rank_of(stage)) if other < stage - 1]
            if cache == "none" or not earlier:
                continue
            before = modules[earlier[-1]]
            depth = before.first_sublayer if cache == "received" else before.next_sublayer
            self.known[stage] = before.finished(depth)
            self.kept[earlier[-1]] = max(self.kept[earlier[-1]], self.known[stage])

    def rank_of(self, stage: int) -> int:
        lap, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.placement == "v" and lap % 2 else place

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]


class LocalStages:
    """What the stages of one rank have in common.

    Attributes:
        cache (`SourceCache`): the sources that the rank keeps.
        shared (`list[tuple[nn.Parameter, dist.ProcessGroup | None]]`):
            Parameters that stages of several ranks hold, each with the group of these ranks; on all of them in the same
            order.
        whole (`list[nn.Parameter]`): parameters that [`shard`] left whole, so that FSDP2 does not average gradients.
        data_groups (`list[dist.ProcessGroup]`): over which FSDP2 averages the gradients of all others.
        reshards (`bool`): whether FSDP2 frees whole parameters after a forward.
    """

    def __init__(self) -> None:
        self.stages: list[AttnResPipelineStage] = []
        self.cache = SourceCache()
        self.shared: list[tuple[nn.Parameter, Any]] = []
        self.whole: list[nn.Parameter] = []
        self.data_groups: list[Any] = []
        self.reshards = False
        self.scaled: set[int] = set()  # stages whose gradients were scaled in this step

    def scale_gradients(self, stage: AttnResPipelineStage, factor: int) -> None:
        """Divides the gradients of a stage. Those of parameters that several stages of this rank hold are divided once,
        after the last of these stages."""
        self.scaled.add(stage.stage_index)
        others = [other for other in self.stages if other.stage_index not in self.scaled]
        waiting = {id(parameter) for other in others for parameter in other.submod.parameters()}
        for parameter in stage.submod.parameters():
            if id(parameter) not in waiting and parameter.grad is not None:
                parameter.grad.div_(factor)


class NoView(torch.autograd.Function):
    """The same tensor, which is no view for autograd. Zero bubble schedules detach outputs of a stage in place, and
    FSDP2 makes views of those that were inputs."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class AttnResPipelineStage(PipelineStage):
    """A stage of a pipeline that sends what the next rank lacks, and takes the rest from the cache of its own rank.

    Made by [`split`]. Its `submod` is a [`StageModule`], or DDP around one.
    """

    def __init__(
        self,
        module: StageModule,
        index: int,
        plan: Plan,
        local: LocalStages,
        device: torch.device,
        group: dist.ProcessGroup | None,
        input_args: tuple[torch.Tensor, ...],
        output_args: tuple[torch.Tensor, ...],
    ):
        super().__init__(
            module, index, plan.num_stages, device, input_args=input_args, output_args=output_args, group=group
        )
        self.stage_index_to_group_rank = {stage: plan.rank_of(stage) for stage in range(plan.num_stages)}
        self.local, self.cache, self.passage = local, local.cache, module.passage
        self.known = plan.known[index]
        self.kept = plan.kept[index]
        self.known_to_next = 0 if self.is_last else plan.known[index + 1]
        self.num_entering = 0 if self.is_first else module.finished(module.first_sublayer)
        self.num_leaving = 0 if self.is_last else module.finished(module.next_sublayer)
        own_stages = plan.stages_of(plan.rank_of(index))
        self.is_last_of_rank = index == own_stages[-1]
        self.leaves: dict[int, list[torch.Tensor]] = {}
        self.queries: dict[int, torch.Tensor] = {}
        self.microbatch = 0
        local.stages.append(self)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.microbatch = fwd_chunk_id
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self.is_last_of_rank:
            self.cache.sources.pop(fwd_chunk_id, None)
        return output

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """The module on what the cache has and what was sent; returns what the next stage shall be sent."""
        cached = []
        if self.known:
            sources = self.cache.sources[self.microbatch]
            needs_grad = self.has_backward and torch.is_grad_enabled()
            cached = [sources[index].detach().requires_grad_(needs_grad) for index in range(self.known)]
            if needs_grad:
                self.leaves[self.microbatch] = cached
        wire = (*cached, *args)
        with warnings.catch_warnings():
            # FSDP2 makes views of sources that pass through a module. Nothing changes them in place.
            warnings.filterwarnings("ignore", ".*returned a view tensor")
            outputs = super().forward_maybe_with_nosync(*wire, **kwargs)
        query, self.passage.query = self.passage.query, None
        if query is not None and query.requires_grad and self.has_backward:
            self.queries[self.microbatch] = query
        if self.is_last:
            self.keep(wire)
            return outputs
        if self.kept or self.known_to_next:
            self.check_unchanged(wire[: self.num_entering], outputs)
        self.keep(outputs)
        return tuple(NoView.apply(output) if output._is_view() else output for output in outputs[self.known_to_next :])

    def keep(self, wire: Sequence[torch.Tensor]) -> None:
        for index in range(self.known, self.kept):
            self.cache.keep(self.microbatch, index, wire[index])

    def check_unchanged(self, entering: Sequence[torch.Tensor], leaving: Sequence[torch.Tensor]) -> None:
        if any(before.data_ptr() != after.data_ptr() for before, after in zip(entering, leaving)):
            raise AttnResError(
                f"stage {self.stage_index} changed sources that were finished before it (this backbone scales its "
                'residual stream), so they cannot be cached; call split(..., cache="none").'
            )

    def check_split_backward(self) -> None:
        """Refuses what would leave gradients out where those of parameters are computed apart (zero bubble)."""
        if isinstance(self.submod, DistributedDataParallel):
            raise AttnResError(
                f"stage {self.stage_index} is wrapped in DDP, and the schedule computes gradients of parameters apart "
                "from those of inputs (zero bubble). DDP does not see such gradients, and would not average them. Use "
                "FSDP2, attnres.distributed.shard(stages, mesh), or another schedule."
            )
        if self.local.reshards:
            raise AttnResError(
                f"stage {self.stage_index} frees its parameters after a forward, and the schedule computes gradients "
                "of parameters apart from those of inputs (zero bubble), for which it has to find them. Call "
                "shard(stages, mesh) without reshard_after_forward, or use another schedule."
            )

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor | None, ...]:
        """Adds the gradients of later stages of this rank to those of sources that this stage finished."""
        gradients = list(super()._retrieve_recv_grads(bwd_chunk_id))
        for index in range(self.num_entering, self.num_leaving):
            kept = self.cache.take_gradient(bwd_chunk_id, index)
            sent = gradients[index - self.known_to_next]
            if kept is not None and sent is not None:
                gradients[index - self.known_to_next] = sent + kept
        return tuple(gradients)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not full_backward:
            self.check_split_backward()
        leaves, query = self.leaves.pop(bwd_chunk_id, []), self.queries.pop(bwd_chunk_id, None)
        is_split = self.has_backward and not full_backward and not self.is_first
        if is_split:
            # The backward for inputs alone computes gradients of those that it is told of. The queries are among them,
            # because all reads share them, and the backward for weights goes through each part of a graph once.
            outputs, inputs = self.fwd_cache[bwd_chunk_id]
            self.fwd_cache[bwd_chunk_id] = (outputs, [*inputs, *leaves, *([] if query is None else [query])])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            if is_split and query is not None:
                groups = self.backward_state[bwd_chunk_id][1]
                groups[:] = [group for group in groups if "grads" in group]  # not those behind the queries
                gradient, query.grad = query.grad, None
                if gradient is not None:
                    query.backward(gradient)
        if not self.has_backward or self.is_first:
            return
        for index, leaf in enumerate(leaves):
            self.cache.add_gradient(bwd_chunk_id, index, leaf.grad)
            leaf.grad = None
        gradients = list(self.bwd_cache[bwd_chunk_id])
        for index in range(self.known, self.num_entering):
            kept = self.cache.take_gradient(bwd_chunk_id, index)
            sent = gradients[index - self.known]
            gradients[index - self.known] = sent if kept is None else kept if sent is None else sent + kept
        self.bwd_cache[bwd_chunk_id] = tuple(gradients)

    def scale_grads(self, grad_scale_factor: int) -> None:
        self.local.scale_gradients(self, grad_scale_factor)

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.cache.clear()
        self.leaves.clear()
        self.queries.clear()
        self.local.scaled.clear()


def split(
    model: Any,
    num_stages: int,
    input_shape: tuple[int, int],
    starts: Sequence[int] | None = None,
    cache: str = "all",
    placement: str = "loop",
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[AttnResPipelineStage]:
    """The pipeline stages of this rank, for the schedules of `torch.distributed.pipelining`.

    All ranks of the group call this, with the same model and arguments. Each then moves its stages to its device, and
    may drop the model. Token ids are the argument of `schedule.step` on the rank of stage 0; what else the backbone's
    forward takes, such as `attention_mask`, is a keyword argument on every rank. After a step,
    [`reduce_shared_gradients`] sums the gradients of parameters that several ranks hold.

    Args:
        model (`AttnResForCausalLM`): the model. It is not changed; the stages share its parameters.
        num_stages (`int`): number of stages, V for each of the P ranks of the group.
        input_shape (`tuple[int, int]`): microbatch size and sequence length, of every microbatch.
        starts (`Sequence[int]`, *optional*): index of the first decoder layer of each stage, see [`cut`].
        cache (`str`, defaults to `"all"`):
            What a rank keeps of each microbatch for its later stages: `"all"` sources that it was sent or finished,
            those `"received"` (Eq. 8), or `"none"` (Eq. 7).
        placement (`str`, defaults to `"loop"`):
            Which rank runs a stage. `"loop"`: stage i is on rank i % P, as for `ScheduleInterleaved1F1B`. `"v"`: every
            second lap goes backwards, as for `ScheduleZBVZeroBubble`.
        device (`torch.device` or `str`, *optional*): where the stages run; by default where the parameters are.
        group (`ProcessGroup`, *optional*): the ranks of the pipeline; by default all.

    Returns:
        `list[AttnResPipelineStage]`: the stages of this rank. Schedules for one stage take the only entry.

    Raises:
        AttnResError: the layers or stages cannot be divided like this, or an argument has another value.
        UnsupportedBackboneError: layers of the backbone hand each other more than the state of depth.
    """
    for name, value, values in (("cache", cache, CACHES), ("placement", placement, PLACEMENTS)):
        if value not in values:
            raise AttnResError(f"split({name}={value!r}): give one of {', '.join(map(repr, values))}.")
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    if num_stages % num_ranks != 0:
        raise AttnResError(f"{num_stages} stages cannot be divided among {num_ranks} ranks; give a multiple of that.")
    modules = cut(model, num_stages, starts)
    plan = Plan(modules, num_ranks, cache, placement)
    device = torch.device(device if device is not None else next(model.parameters()).device)
    hidden_size, dtype = model.config.hidden_size, model.get_input_embeddings().weight.dtype

    def wire(stage: int) -> tuple[torch.Tensor, ...]:
        """What the stage is sent, without memory."""
        if stage == 0:
            return (torch.empty(input_shape, dtype=torch.int64, device="meta"),)
        if stage == num_stages:
            return (torch.empty(*input_shape, model.config.vocab_size, dtype=dtype, device="meta"),)
        number = modules[stage].wire_size(modules[stage].first_sublayer) - plan.known[stage]
        shape = (*input_shape, hidden_size)
        return tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for _ in range(number))

    local = LocalStages()
    local.shared = shared_parameters(modules, plan, rank, group)
    return [
        AttnResPipelineStage(modules[stage], stage, plan, local, device, group, wire(stage), wire(stage + 1))
        for stage in plan.stages_of(rank)
    ]


def shared_parameters(
    modules: Sequence[StageModule], plan: Plan, rank: int, group: dist.ProcessGroup | None
) -> list[tuple[nn.Parameter, Any]]:
    """The parameters of this rank that other ranks hold too, each with the group of these ranks."""
    holders: dict[nn.Parameter, set[int]] = {}
    for stage, module in enumerate(modules):
        for parameter in module.parameters():
            holders.setdefault(parameter, set()).add(plan.rank_of(stage))
    groups: dict[tuple[int, ...], Any] = {tuple(range(plan.num_ranks)): group}
    shared = []
    for parameter, ranks in holders.items():
        if len(ranks) == 1 or rank not in ranks:
            continue
        members = tuple(sorted(ranks))
        if members not in groups:
            whole = group if group is not None else dist.group.WORLD
            global_ranks = [dist.get_global_rank(whole, member) for member in members]  # type: ignore[arg-type]
            groups[members] = dist.new_group(global_ranks, use_local_synchronization=True)
        shared.append((parameter, groups[members]))
    return shared


def shard(stages: Sequence[AttnResPipelineStage], mesh: DeviceMesh, **options: Any) -> None:
    """Shards the stages of this rank over data parallel ranks (FSDP2), in place. Each decoder layer is a group, and
    what else the stage has is another.

    Parameters that are in several stages stay whole on each rank: those of depth attention, and a word embedding that
    is tied to the head. FSDP2 could shard them for one stage only. [`reduce_shared_gradients`] averages their gradients
    over the data parallel ranks. All gradients are then those of the mean over these ranks.

    Args:
        stages (`Sequence[AttnResPipelineStage]`): what [`split`] returned on this rank.
        mesh (`DeviceMesh`): the ranks that have the same stages and other data, one or two dimensions (HSDP).
        options:
            What else `fully_shard` takes. `reshard_after_forward` is `False` by default: it is the schedule that says
            when a stage is needed no longer. `True` saves memory, and zero bubble schedules refuse it.

    Raises:
        AttnResError: `mp_policy` has a dtype of parameters; what stages send each other has the dtype of the model.
    """
    if options.get("mp_policy", MixedPrecisionPolicy()).param_dtype is not None:
        raise AttnResError(
            "shard(mp_policy=...): FSDP2 would cast what stages send each other, whose dtype was fixed by split(). "
            "Leave param_dtype out, and compute the step under torch.autocast, or load the model in that dtype."
        )
    local = stages[0].local
    options = {"reshard_after_forward": False, **options}
    local.whole, local.data_groups = parameters_of_several_stages(local), mesh.get_all_groups()
    local.reshards = options["reshard_after_forward"] is not False
    for stage in stages:
        part: Any = stage.submod.model
        layers = [layer for layer in decoder_layers(part) if not isinstance(layer, Placeholder)]
        for module in (*layers, stage.submod):
            fully_shard(module, mesh=mesh, ignored_params=set(local.whole), **options)


def parameters_of_several_stages(local: LocalStages) -> list[nn.Parameter]:
    """The parameters of this rank that other stages have too, on this rank or on others."""
    found = {parameter: 2 for parameter, _ in local.shared}
    for stage in local.stages:
        for parameter in stage.submod.parameters():
            found[parameter] = found.get(parameter, 0) + 1
    return [parameter for parameter, number in found.items() if number > 1]


def reduce_shared_gradients(stages: Sequence[AttnResPipelineStage]) -> None:
    """Sums the gradients of parameters that stages of several ranks hold: those of depth attention, of which each stage
    uses the rows of its own reads, and a word embedding that is tied to the head. All ranks call this after a step,
    before gradients are clipped. Then each rank has the gradient of the whole, and replicas stay equal.

    The parameters of depth attention are not divided among stages, because they are small, and because their shapes
    depend on the kind of query. So a stage has all tensors that a checkpoint has under these names.

    Args:
        stages (`Sequence[AttnResPipelineStage]`): what [`split`] returned on this rank.

    Raises:
        AttnResError: the stages were sharded with `fully_shard`, not with [`shard`].
    """
    local = stages[0].local
    if not local.data_groups and any(
        isinstance(part, FSDPModule) for stage in stages for part in stage.submod.modules()
    ):
        raise AttnResError(
            "the stages were sharded with fully_shard(), which does not know that they share parameters. Shard them "
            "with attnres.distributed.shard(stages, mesh)."
        )
    for parameter in local.whole:
        for group in local.data_groups:
            if (gradient := gradient_or_zeros(parameter)) is not None:
                dist.all_reduce(gradient, group=group)
                gradient.div_(dist.get_world_size(group))
    for parameter, group in local.shared:
        if (gradient := gradient_or_zeros(parameter)) is not None:
            dist.all_reduce(gradient, group=group)


def gradient_or_zeros(parameter: nn.Parameter) -> torch.Tensor | None:
    """The gradient, which is made if there is none, because other ranks may have one; `None` for a frozen parameter."""
    if parameter.requires_grad and parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad if parameter.requires_grad else None


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a causal language model for one microbatch, the mean over its labels; for `loss_fn` of a schedule.

    Args:
        logits (`torch.Tensor`): `[batch, sequence, vocabulary]`.
        labels (`torch.Tensor`): `[batch, sequence]`, the tokens themselves; -100 where there is no label.
    """
    logits = logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels[:, 1:].flatten())

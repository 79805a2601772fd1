"""A program for `test_distributed.py`: one rank of a pipeline, which runs cases and compares them with one process.

    python run_pipeline.py RANK NUM_RANKS DIRECTORY [TIMEOUT_S VICTIM]

`DIRECTORY/cases.json` holds the cases, and rank 0 writes `DIRECTORY/results.json`. With a victim, that rank kills
itself inside a step.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import random_tokens, retrofit, tiny_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from attnres.distributed import next_token_loss, reduce_shared_gradients, shard, split

SENT = {"forward": 0, "backward": 0}
SINGLE = ("ScheduleGPipe", "Schedule1F1B")


def count_sent() -> None:
    """Counts the elements of all tensors that a schedule hands to send operations."""
    batch_p2p = schedules._batch_p2p

    def counted(ops: list[Any], *args: Any, **kwargs: Any) -> Any:
        for op in ops:
            if op.op is dist.isend:
                SENT[op.direction] += op.tensor.numel()
        return batch_p2p(ops, *args, **kwargs)

    schedules._batch_p2p = counted


def marked(stage: Any) -> Any:
    """The stage, whose operations say which way they go."""
    for method, direction in (("get_fwd_send_ops", "forward"), ("get_bwd_send_ops", "backward")):
        get_ops = getattr(stage, method)

        def get_marked_ops(chunk: int, get_ops: Any = get_ops, direction: str = direction) -> Any:
            ops = get_ops(chunk)
            for op in ops:
                op.direction = direction
            return ops

        setattr(stage, method, get_marked_ops)
    return stage


class CacheWatch:
    """Looks into the cache of a rank after each forward and backward of its stages.

    Attributes:
        most (`int`): the largest number of microbatches of which the cache held sources or gradients.
        stale (`int`): how often it held those of a microbatch that no later stage of the rank, or earlier one in the
            backward, could still ask for.
    """

    def __init__(self, stages: list[Any]):
        self.cache = stages[0].cache
        self.forwards = {stage.stage_index: set() for stage in stages}
        self.backwards = {stage.stage_index: set() for stage in stages}
        self.most = self.stale = 0
        for stage in stages:
            self.watch(stage, "forward_one_chunk", self.forwards)
            self.watch(stage, "backward_one_chunk", self.backwards)

    def watch(self, stage: Any, name: str, done: dict[int, set[int]]) -> None:
        run = getattr(stage, name)

        def watched(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            result = run(microbatch, *args, **kwargs)
            done[stage.stage_index].add(microbatch)
            self.look()
            return result

        setattr(stage, name, watched)

    def look(self) -> None:
        sources, gradients = set(self.cache.sources), set(self.cache.gradients)
        self.most = max(self.most, len(sources), len(gradients))
        self.stale += len(sources & set.intersection(*self.forwards.values()))
        self.stale += len(gradients & set.intersection(*self.backwards.values()))

    def begin_step(self) -> None:
        for done in (*self.forwards.values(), *self.backwards.values()):
            done.clear()


def wrap(stages: list[Any], kind: str, mesh: DeviceMesh, reshards: bool) -> None:
    """Makes the stages data parallel."""
    if kind == "fsdp2":
        shard(stages, mesh, reshard_after_forward=reshards)
        assert all(any(isinstance(p, DTensor) for p in stage.submod.parameters()) for stage in stages)
    elif kind == "ddp":
        for stage in stages:
            stage.submod = DistributedDataParallel(stage.submod, process_group=mesh.get_group())


def whole_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def make_model(case: dict[str, Any]) -> Any:
    backbone = tiny_model(case["family"], num_hidden_layers=case["layers"], **case["backbone"])
    model = retrofit(backbone, random_queries=True, block_size=case["block_size"], **case["depth"])
    model.to(getattr(torch, case["dtype"])).train()
    if case["frozen"]:
        model.requires_grad_(False)
        model.depth_attention.requires_grad_(True)
    if case["checkpointing"] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"] == "reentrant"})
    return model


def difference(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if actual is None or expected is None:
        return 0.0 if actual is None and (expected is None or not expected.any()) else float("inf")
    return ((actual - expected).abs().max() / max(1.0, expected.abs().max().item())).item()


def kill_itself(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(case: dict[str, Any], dies: bool) -> dict[str, Any]:
    """One step of a schedule, twice, and the same in this process alone."""
    model = make_model(case)
    whole = copy.deepcopy(model)
    num_data = case["data"]
    mesh = init_device_mesh("cpu", (num_data, dist.get_world_size() // num_data), mesh_dim_names=("data", "pipeline"))
    tokens = random_tokens(batch=2 * case["microbatches"] * num_data, length=7)
    kwargs = {}
    if case["padded"]:
        kwargs["attention_mask"] = torch.ones_like(tokens)
        kwargs["attention_mask"][:, :3] = 0
    precision = torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"])
    with precision:
        logits = whole(tokens, use_cache=False, **kwargs).logits
    expected = next_token_loss(logits, tokens)
    expected.backward()

    stages: list[Any] = split(
        model,
        case["stages"],
        (2, 7),
        cache=case["cache"],
        placement=case["placement"],
        starts=case["starts"],
        group=mesh["pipeline"].get_group(),
    )
    del model
    wrap(stages, case["wrapped"], mesh["data"], case["reshards"])
    stages = [marked(stage) for stage in stages]
    watch = CacheWatch(stages)
    schedule = getattr(schedules, case["schedule"])(
        stages[0] if case["schedule"] in SINGLE else stages, case["microbatches"], loss_fn=next_token_loss
    )
    if dies:
        stages[0].submod.register_forward_pre_hook(kill_itself)
    tokens = tokens.chunk(num_data)[mesh["data"].get_local_rank()]
    errors: dict[str, float] = {}
    for step in range(2):  # what is left of the first would disturb the second
        for stage in stages:
            stage.submod.zero_grad()
        watch.begin_step()
        SENT.update(forward=0, backward=0)
        losses: list[torch.Tensor] = []
        has_first, has_last = any(s.is_first for s in stages), any(s.is_last for s in stages)
        args = (tokens,) if has_first else ()
        ends = dict(target=tokens, losses=losses) if has_last else {}
        with precision:
            schedule.step(*args, **ends, **kwargs)
        reduce_shared_gradients(stages)
        if has_last:
            loss = torch.stack(losses).mean()
            dist.all_reduce(loss, group=mesh["data"].get_group())
            errors[f"loss of step {step}"] = difference(loss / num_data, expected)
        wanted = dict(whole.named_parameters(remove_duplicate=False))
        for stage in stages:
            module = stage.submod.module if case["wrapped"] == "ddp" else stage.submod
            for name, parameter in module.model.named_parameters():
                errors[f"{name} of step {step}"] = difference(whole_gradient(parameter), wanted[name].grad)
    if case["evaluates"]:
        watch.begin_step()
        evaluated = schedule.eval(*args, **(ends | {"losses": None} if ends else {}), **kwargs)
        if has_last:
            errors["logits"] = difference(evaluated, logits)
    cache = stages[0].cache
    return {
        "error": max(errors.values()),
        "where": max(errors, key=errors.__getitem__),
        "sent": dict(SENT),
        "most": watch.most,
        "stale": watch.stale,
        "left": len(cache.sources)
        + len(cache.gradients)
        + sum(len(stage.leaves) + len(stage.queries) for stage in stages),
    }


def main() -> None:
    rank, num_ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    timeout, victim = map(int, sys.argv[4:6]) if len(sys.argv) > 4 else (60, -1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout),
    )
    count_sent()
    cases = json.loads((directory / "cases.json").read_text())
    results = {}
    for name, case in cases.items():
        results[name] = run(case, dies=rank == victim)
    gathered: list[Any] = [None] * num_ranks
    dist.all_gather_object(gathered, results)
    if rank == 0:
        text = json.dumps({name: [each[name] for each in gathered] for name in cases})
        (directory / "results.json").write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

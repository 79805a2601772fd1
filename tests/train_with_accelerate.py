"""A program that `test_ecosystem_accelerate.py` runs in several processes: trains the plain model and ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from ecosystem import freeze_depth
from shard_on_cpus import shard_on_cpus
from tiny import random_tokens, retrofit, tiny_model
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

STEPS, ACCUMULATION = 4, 2


def batches(rank: int, processes: int) -> list[torch.Tensor]:
    """What a process sees: of each step's eight sequences its share, in as many batches as are accumulated."""
    share = random_tokens(batch=8, length=12).chunk(processes)[rank]
    return list(share.chunk(ACCUMULATION)) * STEPS


def train(model: Any, mode: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of each step, over all processes, and the queries in the end."""
    model.train()
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accelerator = None if mode is None else make(mode)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, FSDPModule if mode == "fsdp2" else DistributedDataParallel), type(model)
    losses, total = [], 0.0
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for index, input_ids in enumerate(batches(rank, processes)):
        if accelerator is None:
            loss = model(input_ids, labels=input_ids, use_cache=False).loss
            (loss / ACCUMULATION).backward()
        else:
            with accelerator.accumulate(model):
                loss = model(input_ids, labels=input_ids, use_cache=False).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            loss = accelerator.reduce(loss.detach(), "mean")
        total += loss.item() / ACCUMULATION
        if (index + 1) % ACCUMULATION == 0:
            losses.append(total)
            total = 0.0
            if accelerator is None:
                optimizer.step()
                optimizer.zero_grad()
    state = model.state_dict() if accelerator is None else accelerator.get_state_dict(model)
    query = next((value for name, value in state.items() if name.endswith("depth_attention.query")), None)
    return torch.tensor(losses), query


def make(mode: str) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    accumulation = GradientAccumulationPlugin(num_steps=ACCUMULATION)
    if mode == "ddp":
        return Accelerator(cpu=True, gradient_accumulation_plugin=accumulation)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        activation_checkpointing=True,
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_plugin=accumulation)


def main(directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    alone = train(retrofit(tiny_model("llama")), None)[0]
    found = {}
    for mode in ("ddp", "fsdp2"):
        if mode == "fsdp2":
            shard_on_cpus()
        found[mode] = {"alone": alone, "plain": train(tiny_model("llama"), mode)[0]}
        found[mode]["ours"] = train(freeze_depth(retrofit(tiny_model("llama"))), mode)[0]
        found[mode]["learning"], found[mode]["query"] = train(retrofit(tiny_model("llama")), mode)
    if torch.distributed.get_rank() == 0:
        torch.save(found, directory / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

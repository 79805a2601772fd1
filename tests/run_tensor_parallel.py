"""A program for `test_distributed.py`: one of several ranks that hold shards of one model, and train it.

    torchrun --nproc-per-node 4 run_tensor_parallel.py FSDP_SIZE DIRECTORY...

Tensor parallel ranks share a batch. With an FSDP_SIZE of 2, each such group has half of the batch, and a rank half of
each shard (FSDP2).
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tiny import random_tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import attnres  # noqa: F401


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


dist.init_process_group("gloo")
fsdp_size, tp_size = int(sys.argv[1]), dist.get_world_size() // int(sys.argv[1])
for directory in sys.argv[2:]:
    whole = AutoModelForCausalLM.from_pretrained(directory)
    config = DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size)
    sharded = AutoModelForCausalLM.from_pretrained(directory, distributed_config=config)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (whole, sharded)]
    for step in range(2):
        tokens = random_tokens(batch=4, seed=step)
        part = tokens.chunk(fsdp_size)[dist.get_rank() // tp_size]
        expected = whole(tokens, labels=tokens, use_cache=False)
        found = sharded(part, labels=part, use_cache=False)
        logits = expected.logits.chunk(fsdp_size)[dist.get_rank() // tp_size]
        torch.testing.assert_close(full(found.logits), logits, atol=1e-5, rtol=1e-5)
        loss = found.loss.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / dist.get_world_size(), expected.loss.detach(), atol=1e-5, rtol=1e-5)
        for optimizer, output in zip(optimizers, (expected, found)):
            optimizer.zero_grad()
            output.loss.backward()
        wanted = dict(whole.named_parameters())
        num_shards = 0
        for name, parameter in sharded.named_parameters():
            gradient = parameter.grad
            if wanted[name].grad is None:  # a bias that only selects experts
                assert gradient is None, name
                continue
            if isinstance(gradient, DTensor):
                num_shards += gradient.to_local().numel() < gradient.numel()
            assert (fsdp_size == 1) or isinstance(gradient, DTensor), name
            torch.testing.assert_close(
                full(gradient), wanted[name].grad, atol=1e-5, rtol=1e-4, msg=f"{directory} {name}"
            )
        assert num_shards > 10, num_shards
        for optimizer in optimizers:
            optimizer.step()
dist.destroy_process_group()

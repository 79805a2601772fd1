"""A program for `test_context_parallel.py`: one of several ranks that each have a part of every sequence.

    torchrun --nproc-per-node 2 run_context_parallel.py [PROGRAM ARGUMENT...]

Without a program it compares models with one process. With one, it runs that.

Torch's own context parallelism (ring attention) runs the SDPA kernels of GPUs only. `allow_cpu_kernel` lets it run the
CPU's; the ring, its order of tokens and the sums are torch's.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist
from tiny import random_tokens, retrofit, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SEQUENCE = 2  # its dimension in `[batch, heads, sequence, head]`
CALLS = {FORWARD: 0, BACKWARD: 0}


def allow_cpu_kernel() -> None:
    """Adds the CPU's kernel to those that torch has a ring for."""
    _attention.custom_ops.update({FORWARD: ring_forward, BACKWARD: ring_backward})


def ring_forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    query, key, value, *flags = args
    dropout, is_causal = (*flags, *(0.0, False)[len(flags) :])
    CALLS[op] += 1
    outputs = _attention._templated_ring_attention(
        query.device_mesh.get_group(),
        SEQUENCE,
        op,
        *map(local, (query, key, value)),
        is_causal=is_causal,
        dropout_p=dropout,
        **kwargs,
    )
    return distributed(outputs, query)


def ring_backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    gradient, query, key, value, output, log_sum_exp, dropout, is_causal = args
    CALLS[op] += 1
    gradients = _attention._templated_ring_attention_backward(
        query.device_mesh.get_group(),
        SEQUENCE,
        op,
        grad_out=local(gradient),
        grad_out_name="grad_out",
        query=local(query),
        key=local(key),
        value=local(value),
        out=local(output),
        logsumexp=local(log_sum_exp),
        is_causal=is_causal,
        dropout_p=dropout,
        **kwargs,
    )
    return distributed(gradients, query)


def local(tensor: Any) -> torch.Tensor:
    return tensor._local_tensor


def distributed(tensors: tuple[torch.Tensor, ...], like: DTensor) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(t, like.device_mesh, [Shard(SEQUENCE)], run_check=False) for t in tensors)


def compare(family: str, depth: dict[str, Any]) -> None:
    """Logits, loss and all gradients, of all ranks together and of this process alone."""
    models = [retrofit(tiny_model(family), random_queries=True, block_size=3, **depth).train() for _ in range(2)]
    tokens = random_tokens(length=32)
    labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    number = (labels != -100).sum()
    expected = models[0](tokens, labels=tokens, shift_labels=labels, num_items_in_batch=number, use_cache=False)
    expected.loss.backward()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert models[1].supports_context_parallel
    # Without a mask, the library would take the jumps of positions for ends of packed sequences.
    own = [tokens.clone(), labels, torch.arange(32).repeat(2, 1), torch.ones_like(tokens)]
    with context_parallel(mesh, buffers=own, buffer_seq_dims=[1] * len(own)):
        part, part_labels, part_positions, part_mask = (buffer.clone() for buffer in own)
        assert part.shape == (2, 32 // dist.get_world_size())
        found = models[1](
            part,
            attention_mask=part_mask,
            position_ids=part_positions,
            labels=part,
            shift_labels=part_labels,
            num_items_in_batch=number,
            use_cache=False,
        )
        found.loss.backward()
    logits = expected.logits.gather(1, part_positions[..., None].expand_as(found.logits))
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-5, msg=lambda m: f"{family} {depth} {m}")
    loss = found.loss.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected.loss.detach(), atol=1e-5, rtol=1e-5)
    wanted = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        if parameter.grad is None:
            assert wanted[name].grad is None, name
            continue
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(
            parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{family} {name} {m}"
        )


def main() -> None:
    torch.set_num_threads(1)
    allow_cpu_kernel()
    if sys.argv[1:]:
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    dist.init_process_group("gloo")
    compare("llama", {})
    compare("llama", dict(query="input", num_heads=2))
    compare("qwen3", dict(depth_attention_implementation="eager"))
    compare("qwen3_moe", dict(window=1))
    assert set(CALLS.values()) == {4 * 4}, CALLS  # each layer of each model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

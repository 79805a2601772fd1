"""A program for `test_distributed.py`: one of several ranks that hold shards of one model (`tp_plan="auto"`).

torchrun --nproc-per-node 2 run_tensor_parallel.py DIRECTORY...
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tiny import random_tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import attnres  # noqa: F401

dist.init_process_group("gloo")
for directory in sys.argv[1:]:
    tokens = random_tokens()
    inputs = dict(input_ids=tokens, labels=tokens, use_cache=False)
    whole = AutoModelForCausalLM.from_pretrained(directory)
    sharded = AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")
    outputs = [model(**inputs) for model in (sharded, whole)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.loss.backward()
    wanted = dict(whole.named_parameters())
    num_shards = 0
    for name, parameter in sharded.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            num_shards += gradient.to_local().shape != gradient.shape
            gradient = gradient.full_tensor()
        if wanted[name].grad is None:  # a bias that only selects experts
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, wanted[name].grad, atol=1e-5, rtol=1e-4, msg=f"{directory} {name}")
    assert num_shards > 10, num_shards
dist.destroy_process_group()

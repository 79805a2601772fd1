"""Fine-tune a converted `examples/tiny-qwen3` for some minutes, so that its reads have something to show.

    attnres convert examples/tiny-qwen3 converted --block-size 2
    python examples/fine_tune_tiny_qwen3.py converted trained

With `--from-scratch`, the same model starts from nothing, which takes a larger learning rate:

    attnres convert examples/tiny-qwen3 converted --full --mix mean
    python examples/fine_tune_tiny_qwen3.py converted scratch --from-scratch --steps 600 --learning-rate 4e-3

The data are those of `train_tiny_qwen3.py`: the standard library of Python without the held-out files. Depth parameters
have a learning rate of their own, because they start from zero while all other weights are trained already.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from train_tiny_qwen3 import SEED, PackedDataset, standard_library
from transformers import AutoTokenizer

from attnres import AttnResForCausalLM

SEQUENCE_LENGTH = 256


def parameter_groups(model: Any, learning_rate: float, depth_learning_rate: float) -> list[dict[str, Any]]:
    """The parameters of a model as AdamW takes them, depth parameters apart."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups["depth_attention" in name].append(parameter)
    return [
        {"params": groups[False], "lr": learning_rate},
        {"params": groups[True], "lr": depth_learning_rate, "weight_decay": 0.0},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the converted checkpoint")
    parser.add_argument("destination", type=Path, help="directory to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4, help=f"sequences of {SEQUENCE_LENGTH} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the decoder's weights")
    parser.add_argument("--depth-learning-rate", type=float, default=1e-2, help="of queries and key norms")
    parser.add_argument("--from-scratch", action="store_true", help="keep the configuration, but none of the weights")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    model: Any = AttnResForCausalLM.from_pretrained(arguments.source, dtype=torch.float32)
    if arguments.from_scratch:
        model = AttnResForCausalLM(model.config).float()
    dataset = PackedDataset(tokenizer, [text for _, text in standard_library(held_out=False)])
    windows = dataset.windows.reshape(-1, SEQUENCE_LENGTH)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, arguments.learning_rate, arguments.depth_learning_rate), betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=arguments.steps, pct_start=0.05
    )
    model.train()
    order = torch.randperm(len(windows))
    for step in range(arguments.steps):
        chosen = [order[(step * arguments.batch_size + i) % len(order)] for i in range(arguments.batch_size)]
        input_ids = windows[torch.stack(chosen)].long()
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    model.save_pretrained(arguments.destination)
    tokenizer.save_pretrained(arguments.destination)


if __name__ == "__main__":
    main()

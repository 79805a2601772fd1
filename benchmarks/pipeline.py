"""What a pipeline sends with cross-stage caching and without, and how long a step takes; and a model of large cases.

    python benchmarks/pipeline.py measure --ranks 2 --laps 2
    python benchmarks/pipeline.py model

`measure` runs one step of `ScheduleInterleaved1F1B` in gloo processes of this machine. `model` divides the bytes that
the busiest rank sends by a bandwidth, and compares that with the time of its arithmetic. It assumes that nothing
overlaps, so it is an upper bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B, schedules
from transformers import Qwen3Config

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.distributed import next_token_loss, split
from attnres.distributed.pipeline import CACHES, Plan

BATCH, LENGTH, HIDDEN_SIZE, STEPS = 1, 256, 256, 5


def plan_of(num_layers: int, num_ranks: int, laps: int, block_size: int, cache: str) -> tuple[Plan, list[int]]:
    """The plan, and the number of tensors that each stage is sent."""
    num_stages = num_ranks * laps
    size, remainder = divmod(num_layers, num_stages)
    starts = [stage * size + min(stage, remainder) for stage in range(num_stages + 1)]

    def finished(depth: int) -> int:
        return 1 + depth // block_size

    modules: list[Any] = [
        SimpleNamespace(first_sublayer=2 * start, next_sublayer=2 * end, finished=finished)
        for start, end in itertools.pairwise(starts)
    ]
    plan = Plan(modules, num_ranks, cache, "loop")
    sent = [0]
    for module, known in list(zip(modules, plan.known))[1:]:
        depth = module.first_sublayer
        sent.append(finished(depth) + (depth % block_size != 0) - known)
    return plan, sent


# -- measured ----------------------------------------------------------------------------------------------------------


def measure(num_ranks: int, laps: int, block_size: int, microbatches: int) -> None:
    for cache in CACHES:
        with tempfile.TemporaryDirectory() as directory:
            arguments = [directory, str(num_ranks), str(laps), str(block_size), str(microbatches), cache]
            program = [sys.executable, __file__, "rank"]
            ranks = [subprocess.Popen([*program, str(rank), *arguments]) for rank in range(num_ranks)]
            if any(rank.wait() for rank in ranks):
                raise SystemExit(1)
            found = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(num_ranks)]
        sent = sum(each["sent"] for each in found)
        _, tensors = plan_of(2 * num_ranks * laps, num_ranks, laps, block_size, cache)
        modelled = 2 * sum(tensors) * microbatches * BATCH * LENGTH * HIDDEN_SIZE * 4
        print(
            f"P={num_ranks} V={laps} cache={cache:8}  sent {sent / 1e6:7.2f} MB  modelled {modelled / 1e6:7.2f} MB  "
            f"step {max(each['seconds'] for each in found) * 1e3:6.0f} ms",
            flush=True,
        )


def run_rank(
    rank: int, directory: str, num_ranks: int, laps: int, block_size: int, microbatches: int, cache: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=num_ranks)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2 * num_ranks * laps,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = AttnResForCausalLM(AttnResConfig(backbone_config=config, block_size=block_size)).train()
    stages = split(model, num_ranks * laps, (BATCH, LENGTH), cache=cache)
    if laps == 1:
        schedule: Any = Schedule1F1B(stages[0], microbatches, loss_fn=next_token_loss)
    else:
        schedule = ScheduleInterleaved1F1B(stages, microbatches, loss_fn=next_token_loss)  # type: ignore[arg-type]
    batch_p2p, sent = schedules._batch_p2p, [0]

    def counted(ops: list[Any], *args: Any, **kwargs: Any) -> Any:
        sent[0] += sum(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return batch_p2p(ops, *args, **kwargs)

    schedules._batch_p2p = counted
    tokens = torch.randint(512, (BATCH * microbatches, LENGTH))
    seconds = []
    for _ in range(STEPS):
        sent[0] = 0
        dist.barrier()
        start = time.perf_counter()
        schedule.step(*([tokens] if stages[0].is_first else []), **({"target": tokens} if stages[-1].is_last else {}))
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    found = {"sent": sent[0], "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2]}
    Path(directory, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# -- modelled ----------------------------------------------------------------------------------------------------------


def model(bandwidth: float, flops: float, active_parameters: float) -> None:
    """Kimi Linear's width, S = 6, bfloat16. Its 27 decoder layers make no 32 stages, so V = 4 has 32 layers."""
    print(f"bandwidth {bandwidth:g} GB/s for each rank and direction, {flops:g} TFLOP/s, nothing overlaps")
    hidden_size, block_size, num_ranks = 2304, 6, 8
    for num_layers, laps in ((27, 1), (27, 2), (27, 3), (32, 4)):
        # 2 FLOP for each parameter and token forward, 4 backward.
        compute = 6 * active_parameters * 1e9 * num_layers / 27 / num_ranks / (flops * 1e12)
        for cache in CACHES:
            plan, tensors = plan_of(num_layers, num_ranks, laps, block_size, cache)
            # A rank sends forward what the next stage lacks, and backward a gradient of all that it was sent.
            ahead, back = [0] * num_ranks, [0] * num_ranks
            for stage in range(1, num_ranks * laps):
                ahead[plan.rank_of(stage - 1)] += tensors[stage]
                back[plan.rank_of(stage)] += tensors[stage]
            busiest = max(a + b for a, b in zip(ahead, back)) * hidden_size * 2
            standard = 2 * laps * hidden_size * 2  # one stream, as in a plain decoder
            print(
                f"L={num_layers} P={num_ranks} V={laps} cache={cache:8}  {sum(tensors):4} tensors over all hops;  "
                f"busiest rank {busiest / 1024:7.1f} KiB a token, {busiest / (bandwidth * 1e9) / compute:6.1%} of "
                f"compute; plain {standard / (bandwidth * 1e9) / compute:.1%}"
            )


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        rank, directory, *numbers, cache = sys.argv[2:]
        run_rank(int(rank), directory, *map(int, numbers), cache)  # type: ignore[call-arg]
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("--ranks", type=int, default=2)
    measured.add_argument("--laps", type=int, default=2, help="V, the stages of each rank")
    measured.add_argument("--block-size", type=int, default=4)
    measured.add_argument("--microbatches", type=int, default=4)
    modelled = commands.add_parser("model")
    modelled.add_argument("--bandwidth", type=float, default=50, help="GB/s of each rank and direction")
    modelled.add_argument("--flops", type=float, default=400, help="TFLOP/s that a rank achieves")
    modelled.add_argument("--active-parameters", type=float, default=3, help="in 1e9, of a token in 27 layers")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.ranks, arguments.laps, arguments.block_size, arguments.microbatches)
    else:
        model(arguments.bandwidth, arguments.flops, arguments.active_parameters)


if __name__ == "__main__":
    main()

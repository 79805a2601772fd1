"""What depth attention costs: the time and memory of an AttnRes model over those of its backbone alone.

    python benchmarks/model_overhead.py --output results.json
    python benchmarks/model_overhead.py --dtype bfloat16 --task decode --implementation two_phase "two_phase, compiled"

Backbone and AttnRes share one set of weights in one process and run in turn, A B B A ..., after a warm-up; each figure
is the median of the ratios of neighbouring runs, with their quartiles. "Compiled" is against the compiled backbone, and
decodes with a static cache; "reduce-overhead" replays it as a CUDA graph. `--output` is written after every row, and a
row that fails says why. Peak memory is that of all tensors, the weights with them: on a CPU the sum over the
allocations that PyTorch's profiler saw in one run, which is exact and depends on nothing else that runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Qwen3Config, StaticCache

from attnres import AttnResConfig, AttnResForCausalLM

SHAPES = {  # configuration, decoder layers, hidden, MLP, heads, key-value heads, head, vocabulary, tied head
    "qwen3-0.6b": (Qwen3Config, 28, 1024, 3072, 16, 8, 128, 151936, True),
    "llama-8b": (LlamaConfig, 32, 4096, 14336, 32, 8, 128, 128256, False),
    "tiny": (Qwen3Config, 4, 128, 256, 4, 2, 32, 1024, True),
}
BLOCKS: dict[str, dict[str, Any]] = {
    "block": {"num_blocks": 8},
    "full": {"block_size": 1},
    "heads": {"num_blocks": 8, "depth_attention": {"num_heads": 8}},
}
CONTEXT, DECODED = 512, 4
COMPILED, REDUCED = ", compiled", ", reduce-overhead"


def make_backbone(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    config_class, layers, hidden, intermediate, heads, kv_heads, head, vocabulary, tied = SHAPES[shape]
    config = config_class(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_attnres(backbone: PreTrainedModel, kind: str, implementation: str) -> AttnResForCausalLM:
    """An AttnRes model over the very tensors of `backbone`, with queries that are not zero."""
    config = AttnResConfig(
        backbone_config=backbone.config, mix="sum", depth_attention_implementation=implementation, **BLOCKS[kind]
    )
    with torch.device("meta"):
        model = AttnResForCausalLM(config)
    model.load_state_dict(backbone.state_dict(), assign=True, strict=False)
    model.tie_weights()
    for name, source in backbone.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, source)
    depth, device = model.depth_attention, next(backbone.parameters()).device
    depth.query = torch.nn.Parameter(0.02 * torch.randn(depth.query.shape, device=device))
    depth.key_norm = torch.nn.Parameter(torch.ones(depth.key_norm.shape, device=device))
    return model.eval()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compiled(model: Any, mode: str, **kwargs: Any) -> Any:
    """The model as it is, compiled, or compiled into CUDA graphs."""
    if mode:
        model = torch.compile(model, dynamic=False, mode="reduce-overhead" if mode == REDUCED else None, **kwargs)
    return model


def prefill(model: Any, length: int, device: str, mode: str) -> Callable[[], Any]:
    input_ids = torch.randint(0, 1000, (1, length), device=device)
    model = compiled(model, mode)

    @torch.no_grad()
    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        model(input_ids, logits_to_keep=1, use_cache=False)

    return run


def decode(model: Any, length: int, device: str, mode: str) -> Callable[[], Any]:
    """Some tokens at a context of `length`."""
    token = torch.randint(0, 1000, (1, 1), device=device)
    config = model.config.get_text_config()
    cache = StaticCache(config, max_cache_len=length + DECODED) if mode else DynamicCache(config=config)
    positions = [torch.tensor([[length + step]], device=device) for step in range(DECODED)]
    with torch.no_grad():
        model(torch.randint(0, 1000, (1, length), device=device), past_key_values=cache, logits_to_keep=1)
    if mode:
        model = compiled(model, mode, fullgraph=True)
        lengths = [layer.cumulative_length.clone() for layer in cache.layers]

    @torch.no_grad()
    def run() -> None:
        for position in positions:
            torch.compiler.cudagraph_mark_step_begin()
            model(token, past_key_values=cache, position_ids=position)
        if not mode:
            cache.crop(-DECODED)
        else:
            for layer, written in zip(cache.layers, lengths):
                layer.cumulative_length.copy_(written)

    return run


def train(model: Any, length: int, device: str, mode: str) -> Callable[[], Any]:
    input_ids = torch.randint(0, 1000, (1, length), device=device)
    step = compiled(model, mode)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(input_ids, labels=input_ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


TASKS: dict[str, tuple[Callable[..., Any], int]] = {
    "prefill 512": (prefill, 512),
    "prefill 2048": (prefill, 2048),
    "decode": (decode, CONTEXT),
    "training step": (train, 512),
}


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory that tensors take during a run beyond those that were there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    taken = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            peak = max(peak, taken)
    return peak


def ratios(
    baseline: Callable[[], Any], other: Callable[[], Any], device: str, repeats: int
) -> tuple[list[float], float]:
    """Times both in turn; returns the ratio of each pair, and the median seconds of the baseline."""
    for run in (baseline, other, baseline, other):
        run()
    pairs = []
    for index in range(repeats):
        seconds = {}
        for run in (baseline, other) if index % 2 == 0 else (other, baseline):
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            seconds[run] = time.perf_counter() - started
        pairs.append((seconds[baseline], seconds[other]))
    return [b / a for a, b in pairs], statistics.median(a for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--kind", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--implementation", nargs="+", default=["eager", "two_phase", f"two_phase{COMPILED}"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--machine", default=platform.machine(), help="what to call the machine in the report")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    console = Console()
    for dtype in arguments.dtype:
        backbone = make_backbone(arguments.shape, getattr(torch, dtype), arguments.device)
        for name in arguments.task:
            for kind in arguments.kind:
                for implementation in arguments.implementation:
                    row = {"dtype": dtype, "task": name, "kind": kind, "implementation": implementation}
                    try:
                        row |= measure(backbone, name, kind, implementation, arguments.device, arguments.repeats)
                    except Exception as error:  # memory, or what a compiler raises; the other rows are worth having
                        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    rows.append(row)
                    console.print(row)
                    if arguments.output:
                        write(arguments.output, rows, arguments)
        del backbone
    console.print(table(rows))


def measure(
    backbone: PreTrainedModel, name: str, kind: str, implementation: str, device: str, repeats: int
) -> dict[str, Any]:
    """One row: the ratios of time and of peak memory, and what the backbone took."""
    task, length = TASKS[name]
    mode = next((suffix for suffix in (COMPILED, REDUCED) if implementation.endswith(suffix)), "")
    model = make_attnres(backbone, kind, implementation.removesuffix(mode))
    torch._dynamo.reset()
    runs = [task(m, length, device, mode) for m in (backbone, model)]
    values, seconds = ratios(*runs, device, repeats)
    low, middle, high = statistics.quantiles(values, n=4)
    weights = sum(p.nbytes for p in backbone.parameters())
    peaks = [weights + peak_bytes(run, device) for run in runs]
    return {
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "backbone_seconds": round(seconds, 5),
        "peak_memory_ratio": round(peaks[1] / peaks[0], 4),
        "backbone_peak_bytes": peaks[0],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("dtype", "task", "AttnRes", "implementation", "time", "quartiles", "backbone", "peak memory")
    for row in rows:
        names = [row[name] for name in ("dtype", "task", "kind", "implementation")]
        if "failure" in row:
            made.add_row(*names, row["failure"])
            continue
        quartiles = "{:.3f} to {:.3f}".format(*row["quartiles"])
        backbone = f"{row['backbone_seconds'] * 1e3:.1f} ms"
        made.add_row(*names, f"{row['ratio']:.3f}", quartiles, backbone, f"{row['peak_memory_ratio']:.3f}")
    return made


def write(output: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    report = {
        "hardware": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.machine,
        "threads": torch.get_num_threads(),
        "shape": arguments.shape,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

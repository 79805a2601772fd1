"""The operation alone: all reads of one block, against how released models and libraries compute them.

    python benchmarks/depth_attention.py --dtype float32 bfloat16 --output results.json

One block of S reads over n finished sources of T tokens, with S - 1 sublayer outputs added to the partial sum between.
Every candidate is first checked against float64, in its output and, where it has the same mathematics, its gradients.
Then all run in turn, and each figure is the median over rounds of the candidate's time over that of `two_phase`. The
share of the copy bandwidth is what Table 1 says has to be moved ((n/S + 5) T d elements per read, forward), over the
time it took, over what copying memory reached in the same run.
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
from rich.console import Console
from rich.table import Table
from torch import nn

from attnres.depth_attention import DEPTH_ATTENTION_FUNCTIONS, DepthSettings, DepthState, read

EPS = 1e-6
Reads = Callable[[tuple[torch.Tensor, ...], list[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def stacked_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    """The form of Kimi K3's published code: stack, up-cast, normalise, softmax, weighted sum, at every read."""
    stack = torch.stack(values).to(torch.promote_types(values[0].dtype, torch.float32))
    keys = stack * torch.rsqrt(stack.pow(2).mean(-1, keepdim=True) + EPS)
    weights = torch.einsum("nbtd,d->nbt", keys, query.to(stack.dtype)).softmax(0)
    return torch.einsum("nbt,nbtd->btd", weights, stack).to(values[0].dtype)


def read_by_read(one_read: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]) -> Reads:
    def reads(sources: tuple[torch.Tensor, ...], outputs: list[torch.Tensor], queries: torch.Tensor) -> Any:
        partial_sum, results = None, [one_read(list(sources), queries[0])]
        for output, query in zip(outputs, queries[1:]):
            partial_sum = output if partial_sum is None else partial_sum + output
            results.append(one_read([*sources, partial_sum], query))
        return results

    return reads


def ours(implementation: str) -> Reads:
    def reads(sources: tuple[torch.Tensor, ...], outputs: list[torch.Tensor], queries: torch.Tensor) -> Any:
        settings = DepthSettings(len(queries), "mean", EPS, DEPTH_ATTENTION_FUNCTIONS[implementation])
        state, results = DepthState(sources), []
        for index in range(len(queries)):
            if index:
                state = state.write(outputs[index - 1], closes_block=False)
            hidden_states, state = read(queries, state, index, settings)
            results.append(hidden_states)
        return results

    return reads


def candidates(hidden: int, dtype: torch.dtype) -> dict[str, Reads]:
    torch._dynamo.reset()
    found: dict[str, Reads] = {
        "two_phase": ours("two_phase"),
        "two_phase, compiled": torch.compile(ours("two_phase")),
        "eager": ours("eager"),
        "Kimi K3 form": read_by_read(stacked_read),
        "Kimi K3 form, compiled": torch.compile(read_by_read(stacked_read)),
    }
    from transformers.models.inkling2.modeling_inkling2 import Inkling2BlockAttentionResidual

    config = type("Config", (), {"hidden_size": hidden})
    inkling = Inkling2BlockAttentionResidual(config)

    def inkling_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
        inkling.query = nn.Parameter(query.detach())
        return inkling(torch.stack(values[:-1] or values, dim=-2), values[-1])[0].to(dtype)

    found["Inkling 2 (its own mathematics)"] = read_by_read(inkling_read)
    try:
        from fla.ops.attnres.naive import naive_attnres
    except ImportError:
        return found
    ones = torch.ones(hidden, dtype=dtype)
    found["flash-linear-attention, naive"] = read_by_read(
        lambda values, query: naive_attnres(query, values, ones, rms_eps=EPS)
    )
    return found


def copy_bandwidth(num_bytes: int = 2**28) -> float:
    """Bytes per second, read and written, of copying a tensor much larger than the caches."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / statistics.median(seconds)


def forward_backward(reads: Reads) -> Reads:
    def run(sources: Any, outputs: Any, queries: Any) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in (*sources, *outputs, queries)]
        results = reads(tuple(leaves[: len(sources)]), leaves[len(sources) : -1], leaves[-1])
        weights = torch.linspace(0.5, 1.5, len(results)).tolist()
        sum((w * r).sum() for w, r in zip(weights, results)).backward()
        return [leaf.grad for leaf in leaves]

    return run


def error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--reads", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tokens, hidden, reads = arguments.tokens, arguments.hidden, arguments.reads
    bandwidth = copy_bandwidth()
    console, rows = Console(), []
    for dtype_name in arguments.dtype:
        dtype = getattr(torch, dtype_name)
        generator = torch.Generator().manual_seed(0)
        sources = tuple(torch.randn(1, tokens, hidden, generator=generator).to(dtype) for _ in range(arguments.sources))
        outputs = [torch.randn(1, tokens, hidden, generator=generator).to(dtype) for _ in range(reads - 1)]
        queries = torch.randn(reads, hidden, generator=generator) * hidden**-0.5
        exact = ([s.double() for s in sources], [o.double() for o in outputs], queries.double())
        for direction in ("forward", "forward and backward"):
            found = candidates(hidden, dtype)
            if direction != "forward":
                found = {n: forward_backward(f) for n, f in found.items() if not n.startswith(("Inkling", "flash"))}
            reference = read_by_read(stacked_read)
            if direction != "forward":
                reference = forward_backward(reference)
            expected = reference(tuple(exact[0]), exact[1], exact[2])
            seconds: dict[str, list[float]] = {name: [] for name in found}
            errors = {}
            with torch.set_grad_enabled(direction != "forward"):
                for name, function in found.items():
                    errors[name] = error(function(sources, outputs, queries), expected)
                    function(sources, outputs, queries)
                for _ in range(arguments.rounds):
                    for name, function in found.items():
                        started = time.perf_counter()
                        function(sources, outputs, queries)
                        seconds[name].append(time.perf_counter() - started)
            moved = (arguments.sources / reads + 5) * reads * tokens * hidden * dtype.itemsize
            for name, values in seconds.items():
                pairs = [value / base for value, base in zip(values, seconds["two_phase"])]
                rows.append(
                    {
                        "dtype": dtype_name,
                        "direction": direction,
                        "candidate": name,
                        "milliseconds": round(statistics.median(values) * 1e3, 2),
                        "over_two_phase": round(statistics.median(pairs), 2),
                        "relative_error": float(f"{errors[name]:.1e}"),
                        "share_of_copy_bandwidth": round(moved / statistics.median(values) / bandwidth, 3)
                        if direction == "forward"
                        else None,
                    }
                )
    table = Table(
        "dtype", "direction", "candidate", "ms", "times two_phase", "error to float64", "share of copy bandwidth"
    )
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)
    console.print(f"copying memory: {bandwidth / 1e9:.1f} GB/s; {torch.get_num_threads()} threads")
    if arguments.output:
        report = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        report |= {"copy_bytes_per_second": round(bandwidth), "rows": rows}
        report |= {name: getattr(arguments, name) for name in ("tokens", "hidden", "sources", "reads")}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

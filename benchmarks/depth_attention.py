"""The operation alone: all reads of one block, against how released models and libraries compute them.

    python benchmarks/depth_attention.py --dtype float32 bfloat16 --output results.json
    python benchmarks/depth_attention.py --device cuda --output results.json

One block of S reads over n finished sources of T tokens, with S - 1 sublayer outputs added to the partial sum between.
Every candidate is first checked against float64 on the first tokens, in its output and, where it has the same
mathematics, its gradients. Then all run in turn, and each figure is the median over rounds of the candidate's time over
that of the first. The share of the copy bandwidth is what Table 1 says has to be moved ((n/S + 5) T d elements per
read, forward), over the time it took, over what copying memory reached in the same run.

On a CUDA device (16384 tokens, hidden sizes 2048 and 7168, 4 sources, bfloat16) the kernels of flash-linear-attention,
liger-kernel, flash-attn-res and fast-attnres are candidates, each where its package can be imported. One that fails (a
hidden size or dtype it does not take, memory) is listed with its error. flash-attn-res is given its sources stacked,
because a model built on it keeps them so; liger-kernel stacks at every read, because the partial sum is one of its
sources. fast-attnres is a package that is called attnres too: name the directory that it is installed in by
`--fast-attnres`. `--output` is written after every hidden size and direction.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from attnres.depth_attention import DEPTH_ATTENTION_FUNCTIONS, read
from attnres.depth_state import DepthSettings, DepthState

EPS = 1e-6
CHECKED_TOKENS = 256
DEFAULTS = {
    "cpu": dict(tokens=512, hidden=[1024], sources=8, dtype=["float32", "bfloat16"]),
    "cuda": dict(tokens=16384, hidden=[2048, 7168], sources=4, dtype=["bfloat16"]),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels then run on a CPU too
PACKAGES = {  # by the module that tells whether it is there
    "torch": "torch",
    "triton": "triton",
    "fla": "fla-core",
    "liger_kernel": "liger-kernel",
    "flash_attn_res": "flash-attn-res",
    "fast_attnres": "fast-attnres",
}
Reads = Callable[[tuple[torch.Tensor, ...], list[torch.Tensor], torch.Tensor], list[torch.Tensor]]


@dataclass
class Candidate:
    """A way to compute the reads of a block.

    Attributes:
        reads: from sources, sublayer outputs and queries, the hidden states of each read.
        stacked: whether it is given one source, `[sources, batch, tokens, hidden]`.
        with_backward: whether its gradients are compared and timed.
    """

    reads: Reads
    stacked: bool = False
    with_backward: bool = True


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
        block = len(queries)
        settings = DepthSettings(block, "mean", EPS, DEPTH_ATTENTION_FUNCTIONS[implementation], group_size=block)
        depth = (len(sources) - 1) * block  # sublayers that made these sources; their queries are not used any more
        queries = torch.cat([queries.new_zeros(depth, queries.shape[1]), queries])
        state, results = DepthState(sources, depth=depth), []
        for index in range(block):
            if index:
                state = state.write(outputs[index - 1], block)
            hidden_states, state = read(queries, state, settings)
            results.append(hidden_states)
        return results

    return reads


# Other packages are imported where they are called, so that one that cannot be does not stop the run.


def fla_naive_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    from fla.ops.attnres.naive import naive_attnres

    return naive_attnres(query, values, torch.ones_like(query), rms_eps=EPS)


def fla_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    from fla.ops.attnres import fused_attnres

    return fused_attnres(query, values, torch.ones_like(query), rms_eps=EPS)


def liger_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerAttnResFunction

    return LigerAttnResFunction.apply(torch.stack(values), query, torch.ones_like(query), EPS)


def flash_attn_res_reads(sources: Any, outputs: list[torch.Tensor], queries: torch.Tensor) -> Any:
    from flash_attn_res import phase_1_batched_attention_triton_op, phase_2_online_softmax_merge_triton_op

    normalised, log_sum_exps = phase_1_batched_attention_triton_op(sources[0], queries, EPS)
    results, partial_sum = [normalised[0]], None
    for index, output in enumerate(outputs, start=1):
        partial_sum = output if partial_sum is None else partial_sum + output
        merged = phase_2_online_softmax_merge_triton_op(
            partial_sum, queries[index], normalised[index], log_sum_exps[index], EPS
        )
        results.append(merged)
    return results


def load_fast_attnres(directory: Path) -> None:
    """Imports the package `attnres` of fast-attnres under the name `fast_attnres`, since ours has that name."""
    package = directory / "attnres"
    spec = importlib.util.spec_from_file_location("fast_attnres", package / "__init__.py")
    if spec is None or spec.loader is None or not (package / "api.py").is_file():
        raise SystemExit(f"{directory} does not hold the package of fast-attnres.")
    sys.modules["fast_attnres"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fast_attnres"])


def fast_attnres_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    from fast_attnres import attnres

    return attnres(values, query.to(values[0].dtype), eps=EPS)


def candidates(hidden: int, dtype: torch.dtype, device: str) -> dict[str, Candidate]:
    torch._dynamo.reset()
    found = {}
    if device == "cuda" or INTERPRETED:
        found["triton"] = Candidate(ours("triton"))
    found["two_phase"] = Candidate(ours("two_phase"))
    found["two_phase, compiled"] = Candidate(torch.compile(ours("two_phase"), dynamic=False))
    found["eager"] = Candidate(ours("eager"))
    found["Kimi K3 form"] = Candidate(read_by_read(stacked_read))
    found["Kimi K3 form, compiled"] = Candidate(torch.compile(read_by_read(stacked_read), dynamic=False))

    if find_spec("transformers.models.inkling2"):
        from transformers.models.inkling2.modeling_inkling2 import Inkling2BlockAttentionResidual

        config = type("Config", (), {"hidden_size": hidden})
        inkling = Inkling2BlockAttentionResidual(config).to(device)

        def inkling_read(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
            inkling.query = nn.Parameter(query.detach())
            return inkling(torch.stack(values[:-1] or values, dim=-2), values[-1])[0].to(dtype)

        found["Inkling 2 (its own mathematics)"] = Candidate(read_by_read(inkling_read), with_backward=False)
    for module, name, one_read, needs_cuda, with_backward in (
        ("fla", "flash-linear-attention, naive", fla_naive_read, False, False),
        ("fla", "flash-linear-attention", fla_read, True, True),
        ("liger_kernel", "liger-kernel", liger_read, True, True),
    ):
        if find_spec(module) and needs_cuda == (device == "cuda"):
            found[name] = Candidate(read_by_read(one_read), with_backward=with_backward)
    if find_spec("flash_attn_res") and device == "cuda":
        found["flash-attn-res"] = Candidate(flash_attn_res_reads, stacked=True)
    if "fast_attnres" in sys.modules and device == "cuda":
        found["fast-attnres"] = Candidate(read_by_read(fast_attnres_read))
    return found


def stopwatch(device: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds that a call takes, on the device itself if it is not the CPU."""

    def of_cpu(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def of_cuda(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return of_cuda if device == "cuda" else of_cpu


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copying a tensor much larger than the caches."""
    num_bytes = 2**32 if device == "cuda" else 2**28
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [stopwatch(device)(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * num_bytes / statistics.median(seconds)


def forward_backward(reads: Reads) -> Reads:
    def run(sources: Any, outputs: Any, queries: Any) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in (*sources, *outputs, queries)]
        results = reads(tuple(leaves[: len(sources)]), leaves[len(sources) : -1], leaves[-1])
        grads = [torch.full_like(result, 0.5 + index / len(results)) for index, result in enumerate(results)]
        torch.autograd.backward(results, grads)
        return [leaf.grad for leaf in leaves]

    return run


def error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative error of any tensor; gradients of stacked sources are compared one by one."""
    actual = [part for tensor in actual for part in (tensor if tensor.dim() == 4 else (tensor,))]
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def measure(
    found: dict[str, Candidate],
    sources: tuple[torch.Tensor, ...],
    outputs: list[torch.Tensor],
    queries: torch.Tensor,
    rounds: int,
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, str]]:
    """Errors, seconds and failures of each candidate, in both directions if gradients are enabled."""
    with_backward, device = torch.is_grad_enabled(), queries.device.type

    def arguments(candidate: Candidate, tokens: slice) -> Any:
        few = tuple(source[:, tokens] for source in sources)
        return (torch.stack(few),) if candidate.stacked else few, [output[:, tokens] for output in outputs], queries

    def run(candidate: Candidate) -> Reads:
        return forward_backward(candidate.reads) if with_backward else candidate.reads

    exact = Candidate(read_by_read(stacked_read))
    few, some, _ = arguments(exact, slice(CHECKED_TOKENS))
    expected = run(exact)(tuple(t.double() for t in few), [t.double() for t in some], queries.double())
    errors, calls, failures = {}, {}, {}
    for name, candidate in found.items():
        try:
            errors[name] = error(run(candidate)(*arguments(candidate, slice(CHECKED_TOKENS))), expected)
            call = partial(run(candidate), *arguments(candidate, slice(None)))
            call()
        except Exception as failure:  # of whatever kind another package's kernels raise
            failures[name] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        else:
            calls[name] = call
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(stopwatch(device)(call))
    return errors, seconds, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--sources", type=int)
    parser.add_argument("--reads", type=int, default=8)
    parser.add_argument("--dtype", nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--candidate", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--fast-attnres", type=Path, help="directory that fast-attnres is installed in")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.fast_attnres:
        load_fast_attnres(arguments.fast_attnres)
    for name, default in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    device, tokens, reads = arguments.device, arguments.tokens, arguments.reads
    bandwidth = copy_bandwidth(device)
    console, rows = Console(), []
    for dtype_name, hidden in ((dtype, hidden) for dtype in arguments.dtype for hidden in arguments.hidden):
        dtype = getattr(torch, dtype_name)
        generator = torch.Generator(device).manual_seed(0)
        made = torch.randn(arguments.sources + reads - 1, 1, tokens, hidden, generator=generator, device=device)
        sources, outputs = made.to(dtype).split((arguments.sources, reads - 1))
        queries = torch.randn(reads, hidden, generator=generator, device=device) * hidden**-0.5
        moved = (arguments.sources / reads + 5) * reads * tokens * hidden * dtype.itemsize
        del made
        for direction in ("forward", "forward and backward"):
            found = candidates(hidden, dtype, device)
            if arguments.candidate:
                found = {name: candidate for name, candidate in found.items() if name in arguments.candidate}
            if direction != "forward":
                found = {name: candidate for name, candidate in found.items() if candidate.with_backward}
            with torch.set_grad_enabled(direction != "forward"):
                errors, seconds, failures = measure(
                    found, sources.unbind(0), list(outputs.unbind(0)), queries, arguments.rounds
                )
            first = next(iter(seconds.values()), [])
            for name in found:
                row = {"dtype": dtype_name, "hidden": hidden, "direction": direction, "candidate": name}
                if name in failures:
                    rows.append({**row, "failure": failures[name]})
                    continue
                median = statistics.median(seconds[name])
                rows.append(
                    {
                        **row,
                        "milliseconds": round(median * 1e3, 3),
                        "over_first": round(statistics.median(t / base for t, base in zip(seconds[name], first)), 2),
                        "relative_error": float(f"{errors[name]:.1e}"),
                        "share_of_copy_bandwidth": round(moved / median / bandwidth, 3)
                        if direction == "forward"
                        else None,
                    }
                )
            if arguments.output:
                write(arguments.output, rows, bandwidth, arguments)
    console.print(table(rows))
    console.print(f"{machine(device)}: copying memory: {bandwidth / 1e9:.1f} GB/s; {torch.get_num_threads()} threads")


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(
        "dtype", "d", "direction", "candidate", "ms", "times first", "error to float64", "share of copy bandwidth"
    )
    for row in rows:
        made.add_row(*("" if value is None else str(value) for value in row.values()))
    return made


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def write(output: Path, rows: list[dict[str, Any]], bandwidth: float, arguments: argparse.Namespace) -> None:
    versions = {}
    for module, package in PACKAGES.items():
        if module in sys.modules or find_spec(module):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:  # its files are there without the notes that an installer leaves
                versions[package] = "unknown"
    report = {"machine": machine(arguments.device), "threads": torch.get_num_threads(), "versions": versions}
    report |= {"copy_bytes_per_second": round(bandwidth), "rows": rows}
    report |= {name: getattr(arguments, name) for name in ("tokens", "hidden", "sources", "reads")}
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

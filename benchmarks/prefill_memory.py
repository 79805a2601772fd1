"""Memory of a long prefill: what AttnRes takes beyond its backbone, against N T d, at once and in chunks.

    python benchmarks/prefill_memory.py --output results.json

One token is generated from T tokens. The peak is that of all tensors but the weights (see `model_overhead.py`). Depth
attention has to hold the N + 1 sources, (N + 1) T d elements of the model's dtype, and phase one of one group, a
float32 output for each of its reads; `prefill_chunk_size` puts the chunk in the place of T.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from model_overhead import BLOCKS, SHAPES, make_attnres, make_backbone, peak_bytes
from rich.console import Console
from rich.table import Table


def generation_peak(model: Any, length: int, chunk: int | None, device: str) -> int:
    input_ids = torch.randint(0, 1000, (1, length), device=device)
    kwargs = {} if chunk is None else {"prefill_chunk_size": chunk}
    return peak_bytes(
        lambda: model.generate(input_ids, max_new_tokens=1, do_sample=False, eos_token_id=-1, **kwargs), device
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--kind", nargs="+", choices=BLOCKS, default=["block"])
    parser.add_argument("--machine", default=platform.machine(), help="what to call the machine in the report")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    backbone = make_backbone(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
    models = {kind: make_attnres(backbone, kind, "auto") for kind in arguments.kind}
    rows = []
    for chunk in (None, *arguments.chunk):
        base = generation_peak(backbone, arguments.tokens, chunk, arguments.device)
        for kind, model in models.items():
            settings = model.model.layers[0].depth_settings
            num_blocks = -(-model.config.num_sublayers // settings.block_size)
            one_source = (chunk or arguments.tokens) * backbone.config.hidden_size
            more = generation_peak(model, arguments.tokens, chunk, arguments.device) - base
            phase_one = settings.group_size * one_source * 4
            sources = num_blocks * one_source * backbone.dtype.itemsize
            rows.append(
                {
                    "kind": kind,
                    "chunk": chunk,
                    "backbone_peak_bytes": base,
                    "bytes_more": more,
                    "blocks_x_tokens_x_hidden_bytes": sources,
                    "phase_one_bytes": phase_one,
                }
            )
    table = Table("AttnRes", "chunk", "backbone", "AttnRes more", "N T d", "phase one", "more / N T d")
    for row in rows:
        kind, chunk, *sizes = row.values()
        megabytes = (f"{size / 2**20:.1f} MiB" for size in sizes)
        table.add_row(kind, str(chunk or "all"), *megabytes, f"{sizes[1] / sizes[2]:.2f}")
    Console().print(table)
    if arguments.output:
        report = {name: getattr(arguments, name) for name in ("machine", "shape", "dtype", "tokens")}
        arguments.output.write_text(json.dumps({**report, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

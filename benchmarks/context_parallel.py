"""Memory of the sources of depth attention where a sequence is split over ranks, and prefilled in chunks.

    python benchmarks/context_parallel.py --output results.json

A long prefill runs in gloo processes of this machine: P ranks have T/P tokens each, all at once or chunk by chunk. A
rank has P-th parts of all chunks. Depth attention is local to a token, so it is the same code for all P. Attention is
between tokens: here a rank gathers the keys and values of all ranks.

Sources are measured in each forward of a decoder layer, after each write: the bytes of the storages of all finished
blocks and of the partial sum, which all are alive then. The paper's N (T / P) d counts the N blocks; the embedding is
one source more, and is a column of its own. "More" is the peak of all tensors of the run (PyTorch's profiler), less the
same for the backbone without depth attention. All are the maximum over ranks.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from model_overhead import make_attnres, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, Qwen3Config

from attnres.depth_state import DepthState

BLOCKS, LAYERS, HIDDEN_SIZE = 8, 8, 128  # a block is one layer
PAPER = dict(blocks=8, tokens=128 * 1024, hidden_size=7168, itemsize=2)  # "15 GB", which fits this width


# -- one rank ----------------------------------------------------------------------------------------------------------


class GatheredAttention:
    """Attention of the tokens of this rank to those of all ranks, as a function for Transformers.

    Attributes:
        positions (`torch.Tensor`): positions of all tokens so far, `[ranks, sequence]`, in the order of the caches.
    """

    positions: torch.Tensor

    def __call__(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        length = query.shape[2]
        own = self.positions[dist.get_rank(), -length:]
        mask = self.positions.flatten() <= own[:, None]
        output = nn.functional.scaled_dot_product_attention(
            query, self.gather(key), self.gather(value), attn_mask=mask, scale=kwargs["scaling"], enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    @staticmethod
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        if dist.get_world_size() == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        time.sleep(0.002)  # until the thread of gloo has let go of the tensors, too, or peaks vary
        return torch.cat(parts, dim=2)


ATTENTION = GatheredAttention()


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """The logits behind the last token of this rank, `[vocabulary]`."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    cache = DynamicCache(config=model.config)
    # `[chunks, ranks, tokens]`
    positions = torch.arange(len(tokens)).view(-1, num_ranks, chunk // num_ranks)
    for index in range(len(positions)):
        ATTENTION.positions = positions[: index + 1].transpose(0, 1).flatten(1)
        own = positions[index, rank]
        logits = model(tokens[None, own], position_ids=own[None], past_key_values=cache, logits_to_keep=1).logits
    return logits[0, -1]


class SourceWatch:
    """The most bytes that finished blocks and the partial sum took, and the embedding, at one time."""

    def __init__(self) -> None:
        self.blocks = self.embedding = 0
        self.write = DepthState.write

    def __enter__(self) -> SourceWatch:
        def write(state: DepthState, output: torch.Tensor, block_size: int) -> DepthState:
            written = self.write(state, output, block_size)
            embedding, *blocks = written.sources
            self.blocks = max(self.blocks, storage_bytes([*blocks, written.partial_sum, written.addend]))
            self.embedding = max(self.embedding, storage_bytes([embedding]))
            return written

        DepthState.write = write  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: Any) -> None:
        DepthState.write = self.write  # type: ignore[method-assign]


def storage_bytes(tensors: list[torch.Tensor | None]) -> int:
    """The bytes of the memory behind tensors, each piece of it once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run_rank(directory: Path, rank: int, num_ranks: int, length: int, chunk: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=num_ranks)
    AttentionInterface.register("gathered", ATTENTION)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=length,
        attn_implementation="gathered",
    )
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    model = make_attnres(backbone, "block", "auto")
    tokens = torch.randint(512, (length,))
    with SourceWatch() as watch:
        logits = prefill(model, tokens, chunk)
    peaks = [peak_bytes(lambda m=m: prefill(m, tokens, chunk), "cpu") for m in (backbone, model)]
    found = {
        "blocks": watch.blocks,
        "embedding": watch.embedding,
        "more": peaks[1] - peaks[0],
        "backbone": peaks[0],
        "logits": logits.tolist(),
    }
    (directory / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# -- all ranks ---------------------------------------------------------------------------------------------------------


def measure(num_ranks: int, length: int, chunk: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        program = [sys.executable, __file__, "--rank"]
        arguments = [str(number) for number in (num_ranks, length, chunk)]
        ranks = [subprocess.Popen([*program, directory, str(rank), *arguments]) for rank in range(num_ranks)]
        exits = [rank.wait() for rank in ranks]
        if any(exits):
            raise SystemExit(1)
        found = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(num_ranks)]
    largest = {name: max(each[name] for each in found) for name in ("blocks", "embedding", "more", "backbone")}
    return largest | {"logits": found[-1]["logits"]}


def formula(blocks: int, tokens: int, hidden_size: int, itemsize: int, num_ranks: int) -> int:
    """N (T / P) d, in bytes."""
    return blocks * tokens // num_ranks * hidden_size * itemsize


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        directory, *numbers = sys.argv[2:]
        rank, num_ranks, length, chunk = map(int, numbers)
        run_rank(Path(directory), rank, num_ranks, length, chunk)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="T")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="P; 1 has to be among them")
    parser.add_argument("--machine", default=platform.machine(), help="what to call the machine in the report")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    rows = []
    reference: torch.Tensor | None = None
    for chunk in (arguments.tokens, arguments.chunk):
        for num_ranks in arguments.ranks:
            row = measure(num_ranks, arguments.tokens, chunk)
            logits = torch.tensor(row.pop("logits"))
            reference = logits if reference is None else reference
            row["difference_of_logits"] = (logits - reference).abs().max().item()
            row["formula"] = formula(BLOCKS, chunk, HIDDEN_SIZE, 4, num_ranks)
            rows.append({"ranks": num_ranks, "chunk": chunk} | row)
    table = Table("P", "chunk", "N (T / P) d", "blocks", "embedding", "AttnRes more", "backbone", "logits differ by")
    for row in rows:
        sizes = (f"{row[name] / 2**20:.2f} MiB" for name in ("formula", "blocks", "embedding", "more", "backbone"))
        table.add_row(str(row["ranks"]), str(row["chunk"]), *sizes, f"{row['difference_of_logits']:.1e}")
    Console().print(table)
    paper = [
        {"ranks": num_ranks, "chunk": chunk, "formula": formula(**(PAPER | {"tokens": chunk}), num_ranks=num_ranks)}
        for num_ranks, chunk in ((1, PAPER["tokens"]), (8, PAPER["tokens"]), (8, 16 * 1024))
    ]
    for row in paper:
        print(f"the paper's case by formula: P = {row['ranks']}, chunk {row['chunk']}: {row['formula'] / 1e9:.2f} GB")
    if arguments.output:
        report = {
            "machine": arguments.machine,
            "tokens": arguments.tokens,
            "blocks": BLOCKS,
            "layers": LAYERS,
            "hidden_size": HIDDEN_SIZE,
            "dtype": "float32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rows": rows,
            "paper": paper,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

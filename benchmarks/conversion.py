"""What a conversion costs: seconds and memory at the shape of Kimi Linear 48B, whose shards are sparse files.

    python benchmarks/conversion.py
    python benchmarks/conversion.py --verify sample --runs 1

The checkpoint has the names, shapes and config of the released one, about 98 GB of bfloat16 in 20 or more shards, of
which only the headers take room on disk. Each run is a process of its own: its peak memory is that of the conversion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from attnres import convert

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
READ_FIRST = ("embed_tokens.weight", "model.norm.weight", "lm_head.weight")
VALUES = torch.randn(2**21, generator=torch.Generator().manual_seed(0)).bfloat16()
FULL_ATTENTION_LAYERS = [4, 8, 12, 16, 20, 24, 27]  # counted from 1, as in the released config


def kimi_linear_48b() -> PreTrainedConfig:
    """27 decoder layers, KDA and MLA 3:1, 8 of 256 routed experts and a shared one behind one dense layer."""
    return AutoConfig.for_model(
        "kimi_linear",
        architectures=["KimiLinearForCausalLM"],
        dtype="bfloat16",
        vocab_size=163840,
        hidden_size=2304,
        intermediate_size=9216,
        moe_intermediate_size=1024,
        num_hidden_layers=27,
        num_attention_heads=32,
        num_key_value_heads=32,
        num_experts=256,
        num_experts_per_token=8,
        num_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        linear_attn_config={
            "full_attn_layers": FULL_ATTENTION_LAYERS,
            "kda_layers": [layer for layer in range(1, 28) if layer not in FULL_ATTENTION_LAYERS],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
    )


def make_sparse_checkpoint(config: PreTrainedConfig, directory: Path) -> int:
    """Writes config, index and shards that are all header: what follows is a hole. Returns their size in bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    tensors = revert_weight_conversion(model, model.state_dict())  # as on disk: every expert by itself
    shards: list[dict[str, Any]] = [{}]
    sizes = [0]
    for name, tensor in tensors.items():
        tensor = tensor.to(torch.bfloat16)  # which some models keep in float32 once they are loaded
        if sizes[-1] + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        end = sizes[-1] + tensor.nbytes
        shards[-1][name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [sizes[-1], end]}
        sizes[-1] = end
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    weight_map = {}
    for number, (shard, size) in enumerate(zip(shards, sizes), start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        with (directory / file_name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = file.tell()
            file.truncate(start + size)
            for name, entry in shard.items():  # with zeros alone, all logits would be equal
                if name.endswith(READ_FIRST):
                    begin, end = entry["data_offsets"]
                    file.seek(start + begin)
                    file.write(VALUES[: (end - begin) // VALUES.itemsize].view(torch.uint8).numpy())
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return sum(sizes)


def peak_bytes() -> int:
    """Largest resident memory of this process so far; `getrusage` would count that of its parent before the fork."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def measure(source: Path, verify: str, block_size: int | None) -> dict[str, Any]:
    """Converts in this process; returns what the conversion reported, its seconds, and the peak memory in bytes."""
    started = time.perf_counter()
    report = convert(source, source.with_name("converted"), block_size=block_size, verify=verify, overwrite=True)
    return {
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
        "linked": report.bytes_linked,
        "copied": report.bytes_copied,
        "written": report.bytes_written,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--verify", choices=("none", "sample"), default="none")
    parser.add_argument("--block-size", type=int, help="S, sublayers per block; 8 blocks if it is not given")
    parser.add_argument("--output", type=Path, help="write all figures there, as JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.verify, arguments.block_size)))
        return
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        size = make_sparse_checkpoint(kimi_linear_48b(), source)
        shards = len(list(source.glob("*.safetensors")))
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(source)]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(arguments.runs)]
    print(
        f"{size / 1e9:.1f} GB in {shards} shards, verify={arguments.verify}; {len(runs)} runs, each in a new process:"
    )
    for name, unit, scale in (
        ("seconds", "s", 1),
        ("peak_bytes", "MB", 1e6),
        ("copied", "MB", 1e6),
        ("written", "MB", 1e6),
    ):
        values = [run[name] / scale for run in runs]
        print(f"{name:12} median {statistics.median(values):8.2f} {unit}, {min(values):.2f} to {max(values):.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"bytes": size, "shards": shards, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A conversion reads headers: its time and memory do not grow with the weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import INDEX
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_utils import load_state_dict

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.conversion import loading

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "conversion.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conversion_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(source: Path, verify: str = "none", *options: str) -> dict[str, Any]:
    """A conversion in a process of its own, so that its peak memory is that of the conversion."""
    command = [sys.executable, BENCHMARK, "--verify", verify, "--measure", source, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout)


def test_kimi_linear_48b(benchmark: ModuleType, tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    size = benchmark.make_sparse_checkpoint(benchmark.kimi_linear_48b(), source)
    shards = sorted(source.glob("*.safetensors"))
    assert size > 96e9
    assert len(shards) >= 20
    before = [(path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]

    measured = measure(source)
    assert measured["seconds"] < 60  # 10 s where nothing else runs: see the benchmark
    assert measured["peak_bytes"] <= 1e9
    assert measured["linked"] == sum(path.stat().st_size for path in shards) > size
    assert measured["copied"] == 0
    assert measured["written"] < 1.1e6  # two float32 vectors of 2304 for each of 55 reads
    linked = [converted / path.name for path in shards]
    assert [(path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in linked] == before
    assert sum(512 * path.stat().st_blocks for path in converted.iterdir()) < 2e7, "holes were filled"

    config = AutoConfig.from_pretrained(converted)
    assert isinstance(config, AttnResConfig)
    assert (config.num_sublayers, config.num_reads) == (54, 55)
    weight_map = json.loads((converted / INDEX).read_text())["weight_map"]
    tensors: dict[str, Any] = {}
    for shard in set(weight_map.values()):  # the library would read the weights, only to put them on the meta device
        tensors |= load_state_dict(converted / shard, map_location="meta")
    assert tensors.keys() == weight_map.keys()
    model, info = AttnResForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, device_map="meta", dtype="auto", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert sum(parameter.nbytes for parameter in model.parameters()) > 96e9


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kimi_linear_48b_sampled(benchmark: ModuleType, tmp_path: Path) -> None:
    """The first two blocks and a layer more, where a layer with its 256 experts alone takes 7 GB in float32."""
    if loading.available_memory() < 16e9:
        pytest.skip("needs 16 GB of free memory")
    source = tmp_path / "source"
    benchmark.make_sparse_checkpoint(benchmark.kimi_linear_48b(), source)
    measured = measure(source, "sample")
    assert measured["peak_bytes"] < 24e9, "that of the whole is 98 GB, in float32 196 GB"
    assert measured["copied"] == 0


def test_a_sample_loads_one_layer_at_a_time(benchmark: ModuleType, tmp_path: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        dtype="bfloat16",
    )
    size = benchmark.make_sparse_checkpoint(config, tmp_path / "source")
    sampled = measure(tmp_path / "source", "sample", "--block-size", "4")
    verification = json.loads((tmp_path / "converted" / "attnres_conversion.json").read_text())["verification"]
    assert verification["num_hidden_layers"] == 5  # of 64: two blocks of 4 sublayers, and where the third begins
    assert sampled["peak_bytes"] < 1e9 < (2 * size) / 4


# -- how much memory there is ------------------------------------------------------------------------------------------

GB = 2**30
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
GROUPS: list[tuple[str, dict[str, str], int]] = [
    ("no control groups", {}, 64 * GB),
    ("v2 without a limit", {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n"}, 64 * GB),
    (
        "v2, of which a quarter is page cache",
        {
            "proc/self/cgroup": "0::/job\n",
            f"{V2}/job/memory.max": f"{8 * GB}\n",
            f"{V2}/job/memory.current": f"{4 * GB}\n",
            f"{V2}/job/memory.stat": f"anon {3 * GB}\ninactive_file {GB}\n",
        },
        5 * GB,
    ),
    (
        "v2, by the group above",
        {
            "proc/self/cgroup": "0::/pod/job\n",
            f"{V2}/pod/memory.max": f"{2 * GB}\n",
            f"{V2}/pod/memory.current": f"{GB}\n",
            f"{V2}/pod/memory.stat": "inactive_file 0\n",
            f"{V2}/pod/job/memory.max": "max\n",
        },
        GB,
    ),
    (
        "v1",
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
            f"{V1}/job/memory.limit_in_bytes": f"{8 * GB}\n",
            f"{V1}/job/memory.usage_in_bytes": f"{6 * GB}\n",
            f"{V1}/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB}\n",
        },
        3 * GB,
    ),
    (
        "v1 without a limit",
        {
            "proc/self/cgroup": "4:memory:/\n",
            f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V1}/memory.usage_in_bytes": f"{GB}\n",
            f"{V1}/memory.stat": "total_inactive_file 0\n",
        },
        64 * GB,
    ),
    (
        "v1 in a container, which sees its own group as the root",
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n",
            f"{V1}/memory.limit_in_bytes": f"{4 * GB}\n",
            f"{V1}/memory.usage_in_bytes": f"{5 * GB}\n",
            f"{V1}/memory.stat": "total_inactive_file 0\n",
        },
        0,
    ),
]


@pytest.mark.parametrize(("files", "expected"), [group[1:] for group in GROUPS], ids=[group[0] for group in GROUPS])
def test_available_memory(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GB}))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert loading.available_memory(tmp_path) == expected

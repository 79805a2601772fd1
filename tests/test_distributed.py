"""Pipelines of several processes compute what one process does, and send what the paper's equations say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import VARIATIONS, random_tokens, retrofit, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from attnres import AttnResError, convert
from attnres.configuration_attnres import UnsupportedBackboneError
from attnres.distributed import cut, reduce_shared_gradients, shard, split
from attnres.rewiring import decoder_layers

HERE = Path(__file__).parent

# -- stages, without processes -----------------------------------------------------------------------------------------

PER_LAYER = ("plain", "switched", "reordered", "single", "no_experts")
SHARED_LAYERS = dict.fromkeys(("shared_layers", "shared_layer"), "num_kv_shared_layers")
REFUSED: dict[str, dict[str, str]] = {
    "gemma4_text": dict.fromkeys(PER_LAYER, "hidden_size_per_layer_input") | SHARED_LAYERS,
    "gemma4_unified_text": SHARED_LAYERS,
    "glm_moe_dsa": {"shared_indexer": "shared indexers"},
    "zaya": dict.fromkeys(("plain", *VARIATIONS["zaya"]), "routers"),
}


@torch.no_grad()
@pytest.mark.parametrize("family", VARIATIONS)
def test_stages_in_a_row_are_the_model(family: str) -> None:
    """Every architecture that is supported, and its variations, cut behind each layer, or refused by name."""
    for name, overrides in {"plain": {}, **VARIATIONS[family]}.items():
        backbone = tiny_model(family, **overrides)
        model = retrofit(backbone, random_queries=True, block_size=1 if name == "single" else 3)
        num_stages = len(decoder_layers(model))
        if reason := REFUSED.get(family, {}).get(name):
            with pytest.raises(UnsupportedBackboneError, match=reason):
                cut(model, num_stages)
            continue
        stages = cut(model, num_stages)
        tokens = random_tokens()
        expected = model(tokens).logits
        wire: Any = (tokens,)
        for stage in stages:
            assert all(type(tensor) is torch.Tensor for tensor in wire)
            wire = stage(*wire)
        tolerance = 2e-5 * max(1.0, expected.std().item())
        torch.testing.assert_close(wire, expected, atol=tolerance, rtol=1e-5, msg=f"{family} {name}")


def test_only_the_first_stage_embeds_and_only_the_last_has_a_head() -> None:
    """The names are those of the whole model, each is on one stage, and no parameter is a copy."""
    model = retrofit(tiny_model("llama"), block_size=2)
    whole = dict(model.named_parameters())
    stages = cut(model, 4)
    names = [{name for name, _ in stage.model.named_parameters()} for stage in stages]
    assert set.union(*names) == whole.keys()
    for index, stage in enumerate(stages):
        for name, parameter in stage.model.named_parameters():
            assert parameter is whole[name]
        assert ("model.embed_tokens.weight" in names[index]) == (index == 0)
        assert ("model.norm.weight" in names[index]) == (index == 3)
        assert ("lm_head.weight" in names[index]) == (index == 3)
        others = set.union(*names[:index], *names[index + 1 :])
        assert {name.rpartition(".")[0] for name in names[index] & others} == {"model.depth_attention"}


@pytest.mark.parametrize(
    ("num_stages", "starts"), [(0, None), (5, None), (2, [0]), (2, [1, 2]), (2, [0, 0]), (2, [2, 0]), (2, [0, 4])]
)
def test_cuts_that_are_refused(num_stages: int, starts: list[int] | None) -> None:
    with pytest.raises(AttnResError, match="4 decoder layers cannot be cut"):
        cut(retrofit(tiny_model("llama")), num_stages, starts)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_auxiliary_loss_over_routers_is_refused(family: str) -> None:
    """It is a sum over the layers of all stages."""
    model = retrofit(tiny_model(family, output_router_logits=True))
    with pytest.raises(UnsupportedBackboneError, match="output_router_logits=True"):
        cut(model, 2)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sources_that_a_backbone_scales_are_not_cached() -> None:
    """Doge multiplies its residual stream, so that a finished source is another one behind each layer."""
    model = retrofit(tiny_model("doge"), block_size=2)
    tokens = random_tokens(length=7)
    stages = split(model, 4, (2, 7))
    wire = stages[0].forward_maybe_with_nosync(tokens)
    with pytest.raises(AttnResError, match='stage 1 changed sources .* cache="none"'):
        stages[1].forward_maybe_with_nosync(*wire)


@pytest.mark.usefixtures("one_rank")
def test_what_data_parallel_stages_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    stages = split(retrofit(tiny_model("llama")), 2, (2, 7))
    with pytest.raises(AttnResError, match="torch.autocast"):
        shard(stages, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(stages[1].submod, mesh=mesh)
    with pytest.raises(AttnResError, match=r"attnres.distributed.shard\(stages, mesh\)"):
        reduce_shared_gradients(stages)

    stages = split(retrofit(tiny_model("llama")), 2, (2, 7))
    shard(stages, mesh, reshard_after_forward=True)
    with pytest.raises(AttnResError, match="stage 1 frees its parameters"):
        stages[1].backward_one_chunk(0, full_backward=False)

    stages = split(retrofit(tiny_model("llama")), 2, (2, 7))
    stages[1].submod = DistributedDataParallel(stages[1].submod)
    with pytest.raises(AttnResError, match="DDP does not see such gradients"):
        stages[1].backward_one_chunk(0, full_backward=False)


def test_other_models_are_refused() -> None:
    with pytest.raises(AttnResError, match="no language model head"):
        cut(retrofit(tiny_model("llama")).model, 2)
    with pytest.raises(AttnResError, match="no AttnRes model"):
        cut(tiny_model("llama"), 2)


# -- pipelines of processes --------------------------------------------------------------------------------------------

BASE: dict[str, Any] = dict(
    family="llama",
    backbone={},
    layers=4,
    stages=2,
    block_size=3,
    depth={},
    dtype="float64",
    schedule="ScheduleInterleaved1F1B",
    microbatches=4,
    cache="all",
    placement="loop",
    starts=None,
    checkpointing=None,
    padded=False,
    frozen=False,
    evaluates=False,
    autocast=False,
    data=1,
    wrapped="no",
    reshards=False,
)


def traffic_case(num_ranks: int, laps: int, blocks: int, kept: str) -> dict[str, Any]:
    """One layer of two sublayers a stage, so that N_p is 1 or 2 blocks."""
    stages = num_ranks * laps
    case = dict(layers=stages, stages=stages, block_size=2 // blocks, cache=kept, microbatches=num_ranks)
    return case | dict(schedule="ScheduleInterleaved1F1B" if laps > 1 else "Schedule1F1B")


TRAFFIC = {
    f"traffic, V={laps}, N_p={blocks}, cache {kept}": (laps, blocks, kept)
    for laps in (1, 2, 3)
    for blocks, kept in [(1, "none"), (1, "received"), (1, "all"), (2, "received"), (2, "none")]
    if laps == 2 or blocks == 1
}
V_STAGES = dict(stages=4, placement="v", microbatches=4)
LAPS = dict(stages=4, backbone=dict(tie_word_embeddings=True))
EAGER = dict(depth=dict(depth_attention_implementation="eager"))
KIMI = dict(family="kimi_linear", stages=4, dtype="float32")
ZERO_BUBBLE = dict(schedule="ScheduleInterleavedZeroBubble")
MANY = LAPS | dict(microbatches=12, dtype="float32")
SHARDED, REPLICATED = dict(data=2, wrapped="fsdp2"), dict(data=2, wrapped="ddp")
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "gpipe": dict(schedule="ScheduleGPipe"),
        "1f1b": dict(schedule="Schedule1F1B", family="qwen3"),
        "float32": dict(dtype="float32", schedule="Schedule1F1B"),
        "one stage a layer, caches": LAPS | dict(evaluates=True),
        "depth parameters alone": LAPS | dict(frozen=True),
        "no cache": LAPS | dict(cache="none"),
        "cache received": LAPS | dict(cache="received"),
        "looped bfs": LAPS | dict(schedule="ScheduleLoopedBFS"),
        "full attnres": LAPS | dict(block_size=1),
        "a block longer than a stage": LAPS | dict(block_size=8),
        "three laps": dict(layers=7, stages=6, block_size=5),
        "uneven": dict(layers=6, stages=4, starts=[0, 1, 4, 5], block_size=4),
        "recomputed": LAPS | dict(checkpointing="non-reentrant"),
        "recomputed, reentrant": LAPS | dict(checkpointing="reentrant"),
        "eager": LAPS | EAGER,
        "input queries, heads": LAPS | dict(depth=dict(query="input", num_heads=2)),
        "padded": LAPS | dict(padded=True),
        "kimi linear": KIMI,
        "qwen3 moe": dict(family="qwen3_moe", stages=4, dtype="float32"),
        "gpt2": dict(family="gpt2", stages=4, backbone=dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
        "interleaved zero bubble": LAPS | dict(schedule="ScheduleInterleavedZeroBubble"),
        "zero bubble, eager": LAPS | EAGER | dict(schedule="ScheduleInterleavedZeroBubble"),
        "zero bubble, kimi linear": KIMI | dict(schedule="ScheduleInterleavedZeroBubble"),
        "zero bubble, recomputed": LAPS | dict(schedule="ScheduleInterleavedZeroBubble", checkpointing="non-reentrant"),
        "zero bubble v": V_STAGES | dict(schedule="ScheduleZBVZeroBubble"),
        "zero bubble v, tied": V_STAGES | LAPS | dict(schedule="ScheduleZBVZeroBubble"),
        "dual pipe v": V_STAGES | dict(schedule="ScheduleDualPipeV", family="qwen3"),
        "scaled streams, no cache": dict(family="doge", stages=4, cache="none"),
        "many microbatches": MANY,
        "many microbatches, zero bubble": MANY | ZERO_BUBBLE,
    },
    4: {
        "laps": dict(layers=8, stages=8, block_size=3, backbone=dict(tie_word_embeddings=True)),
        "1f1b": dict(schedule="Schedule1F1B", stages=4, family="qwen3"),
        "fsdp2, 1f1b": SHARDED | dict(schedule="Schedule1F1B"),
        "fsdp2, laps": SHARDED | LAPS,
        "fsdp2, resharded": SHARDED | LAPS | dict(reshards=True),
        "fsdp2, zero bubble": SHARDED | LAPS | ZERO_BUBBLE,
        "fsdp2, zero bubble v": SHARDED | V_STAGES | dict(schedule="ScheduleZBVZeroBubble"),
        "fsdp2, experts, recomputed": SHARDED
        | dict(family="qwen3_moe", stages=4, dtype="float32", checkpointing="non-reentrant"),
        "fsdp2, autocast": SHARDED | LAPS | dict(dtype="float32", autocast=True),
        "fsdp2, depth parameters alone": SHARDED | LAPS | dict(frozen=True),
        "ddp, 1f1b": REPLICATED | dict(schedule="Schedule1F1B"),
        "ddp, laps": REPLICATED | LAPS,
    },
}
for _num_ranks, _cases in CASES.items():
    _cases |= {name: traffic_case(_num_ranks, *row) for name, row in TRAFFIC.items()}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def start(num_ranks: int, directory: Path, cases: dict[str, dict[str, Any]], *more: str) -> list[subprocess.Popen]:
    (directory / "cases.json").write_text(json.dumps({name: BASE | case for name, case in cases.items()}))
    program = [sys.executable, str(HERE / "run_pipeline.py")]
    return [
        subprocess.Popen(
            [*program, str(rank), str(num_ranks), str(directory), *more],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def torchrun(num_ranks: int, program: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [program, *arguments]
    return subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=200)


@cache
def results(num_ranks: int) -> dict[str, list[dict[str, Any]]]:
    """By case, what each rank found. All cases run in the same processes, which take seconds to start."""
    with TemporaryDirectory() as directory:
        processes = start(num_ranks, Path(directory), CASES[num_ranks])
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        for process, output in zip(processes, outputs):
            assert process.returncode == 0, output[-6000:]
        return json.loads(Path(directory, "results.json").read_text())


@pytest.mark.parametrize(("num_ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_a_pipeline_computes_what_one_process_does(num_ranks: int, name: str) -> None:
    """Losses and all gradients, twice in a row. A cache holds no microbatch that it could drop, and none in the end."""
    case = BASE | CASES[num_ranks][name]
    bound = 2e-2 if case["autocast"] else 1e-10 if case["dtype"] == "float64" else 1e-5
    for rank in results(num_ranks)[name]:
        assert rank["error"] < bound, rank["where"]
        assert rank["stale"] == rank["left"] == 0


@pytest.mark.parametrize("name", ["many microbatches", "many microbatches, zero bubble"])
def test_a_cache_is_freed_within_a_step(name: str) -> None:
    """It holds those microbatches that are on their way, not all of the step."""
    for rank in results(2)[name]:
        assert 0 < rank["most"] <= 4 < CASES[2][name]["microbatches"]


@pytest.mark.parametrize("num_ranks", CASES)
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_is_that_of_the_equations(num_ranks: int, name: str) -> None:
    """Elements that ranks handed to send operations, forward and backward, per token and channel."""
    laps, blocks, kept = TRAFFIC[name]
    stages = num_ranks * laps
    first_lap = num_ranks * (num_ranks - 1) // 2 * blocks
    expected = {
        "none": stages * (stages - 1) // 2 * blocks,  # Eq. 7
        "received": first_lap + (laps - 1) * num_ranks**2 * blocks,  # Eq. 8
        "all": first_lap + (laps - 1) * num_ranks * (num_ranks - 1) * blocks,
    }[kept]
    embedding = stages - 1 if kept == "none" else num_ranks - 1  # the equations leave it out
    for direction in ("forward", "backward"):
        sent = sum(rank["sent"][direction] for rank in results(num_ranks)[name])
        case = BASE | CASES[num_ranks][name]
        tokens, hidden_size = 2 * 7 * case["microbatches"], 32
        assert sent == (expected + embedding) * tokens * hidden_size


def test_a_killed_rank_stops_the_others(tmp_path: Path) -> None:
    processes = start(4, tmp_path, {"laps": CASES[4]["laps"]}, "10", "2")
    began = time.monotonic()
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert time.monotonic() - began < 60
    for rank, (process, output) in enumerate(zip(processes, outputs)):
        assert process.returncode == (-9 if rank == 2 else 1), output[-3000:]
        assert rank == 2 or "Error" in output
    assert not (tmp_path / "results.json").exists()


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    page = (HERE.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    (tmp_path / "pipeline.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    convert(HERE.parent / "examples" / "tiny-qwen3", tmp_path / "model", num_blocks=4, verify="none")
    finished = torchrun(2, "pipeline.py", "model", directory=tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("loss") == 3


# -- tensor parallel ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp_size", [1, 2])
def test_tensor_parallel_ranks_compute_what_one_process_does(tmp_path: Path, fsdp_size: int) -> None:
    """Two tensor parallel ranks, alone and times two of FSDP2: dense, experts, latent attention. Logits, loss, and all
    gradients, before a step and after it."""
    families = ("llama", "qwen3_moe", "deepseek_v3")
    for family in families:
        retrofit(tiny_model(family), random_queries=True, block_size=3).save_pretrained(tmp_path / family)
    program = str(HERE / "run_tensor_parallel.py")
    finished = torchrun(2 * fsdp_size, program, str(fsdp_size), *families, directory=tmp_path)
    assert finished.returncode == 0, finished.stderr[-6000:]

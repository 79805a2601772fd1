"""Accelerate: several processes, offloading and dispatch, as for the plain model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from ecosystem import row
from tiny import random_tokens, retrofit, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from attnres import AttnResForCausalLM


@row("Accelerate", "`load_checkpoint_and_dispatch` from empty weights; blocks are not split")
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_load_checkpoint_and_dispatch(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    input_ids = random_tokens()
    for model in (plain, retrofit(plain, random_queries=True)):
        directory = tmp_path / type(model).__name__
        # Accelerate fills parameters by their names. Experts have other names on disk, where asked for.
        model.save_pretrained(directory, save_original_format=False)
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        empty.tie_weights()
        device_map = {"": "cpu"} | dict.fromkeys(("model.layers.1", "model.layers.2"), "disk")
        loaded = load_checkpoint_and_dispatch(
            empty, directory, device_map=split(device_map), offload_folder=tmp_path / "offload"
        )
        assert type(loaded).__name__ == type(model).__name__
        torch.testing.assert_close(loaded.eval()(input_ids).logits, model(input_ids).logits)


def split(device_map: dict[str, str]) -> dict[str, str]:
    """Accelerate wants each module to be named once."""
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    layers = {f"model.layers.{i}": device_map.get(f"model.layers.{i}", "cpu") for i in range(4)}
    return others | layers | {"model.depth_attention": "cpu"}


@row("Accelerate", '`device_map="auto"` with offloading to disk')
def test_device_map_with_offloading(tmp_path: Path) -> None:
    model = retrofit(tiny_model("llama"), random_queries=True)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 80_000}, offload_folder=tmp_path / "offload"
    )
    assert isinstance(loaded, AttnResForCausalLM)
    assert {"cpu", "disk"} <= set(loaded.hf_device_map.values())
    input_ids = random_tokens()
    torch.testing.assert_close(loaded.eval()(input_ids).logits, model(input_ids).logits)


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What `train_with_accelerate.py` found in two processes, by mode."""
    directory = tmp_path_factory.mktemp("accelerate")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(here / "train_with_accelerate.py"), str(directory)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return torch.load(directory / "found.pt")


@row("Accelerate", "DDP with gradient accumulation, two processes")
def test_ddp_with_accumulation(found: dict[str, dict[str, torch.Tensor]]) -> None:
    check(found["ddp"])


@row("Accelerate", "FSDP2 with activation checkpointing and accumulation, two processes")
def test_fsdp2_with_activation_checkpointing(found: dict[str, dict[str, torch.Tensor]]) -> None:
    check(found["fsdp2"])


def check(found: dict[str, torch.Tensor]) -> None:
    """The losses of the plain model, of ours with frozen queries, and of ours that learns, which are also those of one
    process."""
    plain, ours, learning = found["plain"], found["ours"], found["learning"]
    assert plain[-1] < plain[0] - 0.1
    torch.testing.assert_close(ours, plain, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(learning[0], plain[0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(learning, found["alone"], atol=2e-4, rtol=2e-4)
    assert found["query"].any(), "the queries did not learn"

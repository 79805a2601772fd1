"""docs/training.md: the commands of its recipes run on tiny models, and its formula of memory is what PyTorch keeps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import retrofit, tiny_model
from transformers import AutoTokenizer

pytest.importorskip("trl", reason="TRL is in the extra `train`")

from attnres.cli import main
from attnres.training import baselines
from attnres.training.from_scratch import RESIDUALS
from attnres.training.optimizers import make_optimizer, parameter_groups
from attnres.training.report import TrainingReport

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "training.md").read_text(encoding="utf-8")
SOURCE = HERE.parent / "examples" / "tiny-qwen3"
# The family of each recipe, and what a tiny model needs instead of what the page says; the last of two options counts.
RECIPES = {"Qwen3-0.6B on one GPU": "qwen3", "Kimi Linear 48B with FSDP2 and LoRA": "kimi_linear"}
TINY = "--steps 2 --batch-size 1 --accumulation 2 --sequence-length 32 --log-every 1 --no-tensorboard"


def commands(recipe: str) -> list[list[str]]:
    """The commands of a recipe, each as a list of arguments."""
    section = PAGE.split(f"## Recipe: {recipe}\n", 1)[1].split("\n## ", 1)[0]
    code = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    assert len(code) == 1
    return [shlex.split(line) for line in code[0].replace("\\\n", " ").strip().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command, with Hub ids replaced by a tiny model of the same architecture, and sizes by tiny ones."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(RECIPES[recipe], vocab_size=4096).to(torch.bfloat16)
    model.save_pretrained("stand-in")
    AutoTokenizer.from_pretrained(SOURCE).save_pretrained("stand-in")
    import datasets

    rows = [{"text": f"def f{i}(a, b):\n    return a * {i} + b - {i * i}\n" * 3} for i in range(20)]
    datasets.Dataset.from_list(rows).to_parquet("corpus.parquet")
    outputs = []
    for command in commands(recipe):
        command = [
            "stand-in" if ("/" in part and part[0].isupper()) or part.startswith("moonshotai/") else part
            for part in command
        ]
        if "finetune" in command:
            command[command.index("--validation") + 1] = "0.2"  # it can be repeated, so the last does not count alone
            command += TINY.split()
            outputs.append(command[command.index("--output") + 1])
        if command[0] == "accelerate":
            launch(command)
        else:
            assert command[0] == "attnres"
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code
    assert outputs
    for output in outputs:
        report = TrainingReport.read(Path(output))
        assert report is not None
        assert report.finished
        assert report.steps == 2


def launch(command: list[str]) -> None:
    """Runs `accelerate launch` in two processes, which shard on CPUs."""
    at = command.index("-m")
    assert command[:2] == ["accelerate", "launch"]
    assert command[at + 1] == "attnres.training"
    options = [part.replace("training/configs", str(HERE.parent / "training" / "configs")) for part in command[2:at]]
    program = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2"]
    program += ["--main_process_port", str(31500 + os.getpid() % 2000), str(HERE / "train_with_fsdp2.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(program + command[at + 2 :], env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-6000:]


def test_every_baseline_is_on_the_page() -> None:
    section = PAGE.split("## From scratch\n", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)[1:] == list(RESIDUALS)
    assert baselines.__doc__ is not None
    assert all(f'"{kind}"' in baselines.__doc__ for kind in baselines.BASELINES)


def kept_activations(model: Any, tokens: int) -> float:
    """What autograd keeps for the backward of a decoder under recomputation, in hidden states of the whole batch."""
    model.train()
    model.gradient_checkpointing_enable()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(torch.randint(3, 60, (1, tokens)), use_cache=False).last_hidden_state
    del output
    return sum(storage.nbytes() for storage in kept.values()) / (4 * tokens * model.config.hidden_size)


@pytest.mark.parametrize("layers", [4, 8, 12])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 6])
def test_formula_of_activations(layers: int, block_size: int) -> None:
    plain = tiny_model("llama", num_hidden_layers=layers, max_position_embeddings=1024)
    blocks = -(-2 * layers // block_size)
    inside = sum(depth % block_size != 0 for depth in range(2, 2 * layers, 2))
    measured = kept_activations(retrofit(plain, block_size=block_size), 512)
    # The block that is cut short by the end of the model is a partial sum until the output read.
    assert measured == pytest.approx(blocks + 2 + inside, rel=0.1)
    control = kept_activations(plain, 512)
    assert control == pytest.approx(layers + 2, rel=0.05)
    if block_size % 2 == 0:
        assert measured == pytest.approx(control, rel=0.1)


@pytest.mark.parametrize(("with_muon", "per_parameter"), [(False, 16), (True, 12)])
def test_formula_of_states(with_muon: bool, per_parameter: int) -> None:
    model = retrofit(tiny_model("qwen3"))
    decayed = {name for name, p in model.named_parameters() if p.ndim == 2 and "depth" not in name}
    groups = parameter_groups(model, decayed, 1e-3, 1e-3, 0.0, with_muon)
    in_muon = sum(p.numel() for group in groups if group["use_muon"] for p in group["params"])
    optimizer = make_optimizer(groups)
    input_ids = torch.randint(3, 60, (1, 8))
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    own = list(model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    measured = sum(t.numel() * t.element_size() for t in [*own, *(p.grad for p in own if p.grad is not None), *states])
    total = sum(p.numel() for p in own)
    assert measured == per_parameter * in_muon + 16 * (total - in_muon)

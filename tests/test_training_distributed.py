"""Training in two processes, launched by Accelerate with the configurations that are included, as in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres import convert

pytest.importorskip("trl", reason="TRL is in the extra `train`")

from attnres.training.report import TrainingReport

HERE = Path(__file__).parent
SOURCE = HERE.parent / "examples" / "tiny-qwen3"
CONFIGS = HERE.parent / "training" / "configs"
# Eight sequences a step: in one process, or half of them in each of two.
COMMON = "--steps 4 --sequence-length 32 --log-every 1 --save-every 2 --warmup 0 --validation 0.3 --precision fp32"
COMMON += " --learning-rate 1e-3 --no-tensorboard --keep-checkpoints"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of two layers, and text."""
    directory = tmp_path_factory.mktemp("distributed")
    model = AutoModelForCausalLM.from_pretrained(SOURCE, num_hidden_layers=2, dtype=torch.float32)
    model.config.layer_types = model.config.layer_types[:2]
    model.save_pretrained(directory / "plain")
    AutoTokenizer.from_pretrained(SOURCE).save_pretrained(directory / "plain")
    convert(directory / "plain", directory / "converted", num_blocks=2, verify="none")
    text = "".join(f"def f{i}(a, b):\n    return a * {i} + b - {i * i}\n" for i in range(20))
    (directory / "text").mkdir()
    for i in range(8):
        (directory / "text" / f"{i}.py").write_text(text.replace("f", "g" * i), encoding="utf-8")
    return directory


def start(directory: Path, output: str, *more: str, config: str | None = None) -> TrainingReport:
    """What `attnres finetune` reports, of one process or of two."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "attnres.training"]
    if config is not None:
        program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
        # The port of the test's own worker, so that several can run at once.
        port = 29500 + os.getpid() % 2000
        program += ["--num_processes", "2", "--main_process_port", str(port)]
        program += [str(HERE / "train_with_fsdp2.py")] if config == "fsdp2.yaml" else ["-m", "attnres.training"]
    arguments = ["--debug", "finetune", "converted", "--data", "text", "--output", output, *COMMON.split(), *more]
    arguments += ["--batch-size", "8" if config is None else "4"]
    finished = subprocess.run(
        program + arguments, env=environment, cwd=directory, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    report = TrainingReport.read(directory / output)
    assert report is not None
    assert report.finished
    return report


def assert_same(actual: TrainingReport, expected: TrainingReport) -> None:
    torch.testing.assert_close(torch.tensor(actual.losses), torch.tensor(expected.losses), atol=2e-4, rtol=2e-4)
    assert actual.tokens == expected.tokens
    assert expected.validation is not None
    assert actual.validation is not None
    for when, metrics in expected.validation.items():
        assert actual.validation[when] == pytest.approx(metrics, abs=2e-4)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("ddp.yaml", []),
        ("fsdp2.yaml", []),
        pytest.param("fsdp2.yaml", ["--optimizer", "muon"], marks=pytest.mark.slow),
        pytest.param("fsdp2.yaml", ["--train", "lora", "--merge", "--learning-rate", "1e-2"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2", "fsdp2, muon", "fsdp2, lora"],
)
def test_two_processes_train_as_one(config: str, more: list[str], directory: Path) -> None:
    name = "-".join(["out", config, *more])
    expected = start(directory, f"{name}-alone", *more)
    actual = start(directory, f"{name}-two", *more, config=config)
    assert expected.validation is not None
    assert expected.validation["after"]["loss"] < expected.validation["before"]["loss"]
    assert_same(actual, expected)
    ours, theirs = tensors(directory / f"{name}-two"), tensors(directory / f"{name}-alone")
    assert ours.keys() == theirs.keys() == tensors(directory / "converted").keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-3, rtol=1e-3)
    if config == "fsdp2.yaml" and not more:
        check_resumed(directory, f"{name}-two", actual)


def check_resumed(directory: Path, output: str, whole: TrainingReport) -> None:
    """The run as it was after two of its four steps goes on, and ends at the same losses."""
    resumed = directory / "resumed"
    resumed.mkdir()
    report = json.loads((directory / output / "attnres_training.json").read_text(encoding="utf-8"))
    report |= {"finished": False, "losses": []}
    (resumed / "attnres_training.json").write_text(json.dumps(report), encoding="utf-8")
    shutil.copytree(directory / output / "checkpoints" / "checkpoint-2", resumed / "checkpoints" / "checkpoint-2")
    again = start(directory, "resumed", config="fsdp2.yaml")
    assert again.steps == 4
    torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(whole.losses), atol=1e-6, rtol=0)

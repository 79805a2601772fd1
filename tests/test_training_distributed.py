"""Training in several processes as in one: by Accelerate with the included configurations, or as a pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from attnres import convert
from attnres.cli import app

pytest.importorskip("trl", reason="TRL is in the extra `train`")

from attnres.training.report import TrainingReport

HERE = Path(__file__).parent
SOURCE = HERE.parent / "examples" / "tiny-qwen3"
CONFIGS = HERE.parent / "training" / "configs"
EXAMPLES = HERE.parent / "training" / "examples"
# Eight sequences a step: in one process, or half of them in each of two.
COMMON = "--steps 4 --sequence-length 32 --log-every 1 --save-every 2 --warmup 0 --validation 0.3 --precision fp32"
COMMON += " --learning-rate 1e-3 --no-tensorboard --keep-checkpoints"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of four layers, and text."""
    directory = tmp_path_factory.mktemp("distributed")
    model = AutoModelForCausalLM.from_pretrained(SOURCE, num_hidden_layers=4, dtype=torch.float32)
    model.config.layer_types = model.config.layer_types[:4]
    model.save_pretrained(directory / "plain")
    AutoTokenizer.from_pretrained(SOURCE).save_pretrained(directory / "plain")
    convert(directory / "plain", directory / "converted", num_blocks=2, verify="none")
    text = "".join(f"def f{i}(a, b):\n    return a * {i} + b - {i * i}\n" for i in range(20))
    (directory / "text").mkdir()
    for i in range(8):
        (directory / "text" / f"{i}.py").write_text(text.replace("f", "g" * i), encoding="utf-8")
    return directory


def launched(config: str | None, processes: int = 2) -> list[str]:
    """The command before `finetune`: of one process, of Accelerate with a configuration, or of torchrun."""
    if config is None:
        return [sys.executable, "-m", "attnres.training"]
    # The port of the test's own worker, so that several can run at once.
    port = str(29500 + os.getpid() % 2000)
    if config == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        return [*program, "--master-port", port, "-m", "attnres.training"]
    program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    program += ["--num_processes", str(processes), "--main_process_port", port]
    return [*program, *([str(HERE / "train_with_fsdp2.py")] if config == "fsdp2.yaml" else ["-m", "attnres.training"])]


def command(output: str, *more: str, config: str | None = None, processes: int = 2) -> list[str]:
    """`attnres finetune` with eight sequences per step, of one process or more."""
    arguments = ["--debug", "finetune", "converted", "--data", "text", "--output", output, *COMMON.split(), *more]
    if "--batch-size" not in more:
        arguments += ["--batch-size", "8" if config is None else "4"]
    return launched(config, processes) + arguments


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def start(directory: Path, output: str, *more: str, config: str | None = None, processes: int = 2) -> TrainingReport:
    """What `attnres finetune` reports, of one process or of several."""
    finished = subprocess.run(
        command(output, *more, config=config, processes=processes),
        env=environment(),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    report = TrainingReport.read(directory / output)
    assert report is not None
    assert report.finished
    return report


def assert_same(actual: TrainingReport, expected: TrainingReport, tolerance: float = 2e-4) -> None:
    losses = [torch.tensor(report.losses) for report in (actual, expected)]
    torch.testing.assert_close(*losses, atol=tolerance, rtol=tolerance)
    assert actual.tokens == expected.tokens
    assert expected.validation is not None
    assert actual.validation is not None
    for when, metrics in expected.validation.items():
        assert actual.validation[when] == pytest.approx(metrics, abs=tolerance)


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
    assert_same_tensors(directory / f"{name}-two", directory / f"{name}-alone", directory / "converted")
    if config == "fsdp2.yaml" and not more:
        resume(directory, f"{name}-two", "resumed", actual, config="fsdp2.yaml")
        resume(directory, f"{name}-two", "resumed-alone", actual, atol=1e-5)


PIPELINE = ("--batch-size", "2", "--accumulation", "4", "--pipeline", "2")


@pytest.mark.parametrize(
    ("more", "processes"),
    [
        ([], 2),
        (["--virtual-stages", "2", "--gradient-checkpointing"], 2),
        pytest.param(["--optimizer", "muon"], 2, marks=pytest.mark.slow),
        pytest.param(["--train", "depth"], 2, marks=pytest.mark.slow),
        pytest.param(["--train", "lora", "--merge", "--learning-rate", "1e-2"], 2, marks=pytest.mark.slow),
        pytest.param([], 4, marks=pytest.mark.slow),
        pytest.param(["--precision", "bf16"], 2, marks=pytest.mark.slow),
    ],
    ids=["1F1B", "interleaved", "muon", "depth", "lora", "two pipelines", "bf16"],
)
def test_a_pipeline_trains_as_one_process(more: list[str], processes: int, directory: Path) -> None:
    name = "-".join(["pipeline", str(processes), *more])
    split = list(PIPELINE if processes == 2 else ("--batch-size", "2", "--accumulation", "2", "--pipeline", "2"))
    alone = [word for word in more if word not in ("--virtual-stages", "2")]
    expected = start(directory, f"{name}-alone", *alone)
    actual = start(directory, f"{name}-split", *more, *split, config="torchrun", processes=processes)
    assert_same(actual, expected, tolerance=2e-3 if "bf16" in more else 2e-4)
    if "bf16" not in more:
        assert_same_tensors(directory / f"{name}-split", directory / f"{name}-alone", directory / "converted")
    if not more and processes == 2:
        # On the same processes, on one, and on two pipelines.
        resume(directory, f"{name}-split", "again", actual, *split, config="torchrun")
        resume(directory, f"{name}-split", "again-alone", actual, atol=1e-5)
        resume(directory, f"{name}-alone", "again-split", expected, *split, atol=1e-5, config="torchrun")


def assert_same_tensors(actual: Path, expected: Path, source: Path) -> None:
    ours, theirs = tensors(actual), tensors(expected)
    assert ours.keys() == theirs.keys() == tensors(source).keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-3, rtol=1e-3)


def unfinished(directory: Path, output: str, copy: str) -> None:
    """A run as it was after two of its four steps."""
    (directory / copy).mkdir()
    report = json.loads((directory / output / "attnres_training.json").read_text(encoding="utf-8"))
    report |= {"finished": False, "losses": []}
    (directory / copy / "attnres_training.json").write_text(json.dumps(report), encoding="utf-8")
    kept = Path("checkpoints") / "checkpoint-2"
    shutil.copytree(directory / output / kept, directory / copy / kept)


def resume(
    directory: Path, output: str, copy: str, whole: TrainingReport, *more: str, atol: float = 1e-6, **where: str
) -> None:
    """The run as it was after two of its four steps goes on, and ends at the same losses."""
    unfinished(directory, output, copy)
    again = start(directory, copy, *more, **where)  # type: ignore[arg-type]
    assert again.steps == 4
    torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(whole.losses), atol=atol, rtol=0)


def test_a_pipeline_trains_from_scratch(directory: Path) -> None:
    """`attnres train`, of experts that are routed without a loss of their own."""
    config: dict[str, Any] = yaml.safe_load((EXAMPLES / "attnres-block.yaml").read_text(encoding="utf-8"))
    sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=4, head_dim=8)
    experts = dict(num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    config["model"] |= {"backbone": {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.0, **sizes, **experts}}
    config["model"] |= {"tokenizer": str(SOURCE), "depth_attention": {"block_size": 3}}
    config["data"] = {"train": str(directory / "text"), "validation": 0.3}
    config["training"] = {"steps": 3, "sequence_length": 32, "log_every": 1, "tensorboard": False, "precision": "fp32"}
    config["training"] |= {"batch_size": 2, "accumulation": 4}
    reports = []
    for config_of, more in ((None, []), ("torchrun", ["--pipeline", "2"])):
        output = str(directory / f"scratch-{config_of}")
        (directory / "scratch.yaml").write_text(yaml.safe_dump(config | {"output": output}), encoding="utf-8")
        arguments = [*launched(config_of), "--debug", "train", "--config", "scratch.yaml", *more]
        finished = subprocess.run(
            arguments, env=environment(), cwd=directory, capture_output=True, text=True, timeout=300
        )
        assert finished.returncode == 0, finished.stderr[-6000:]
        reports.append(TrainingReport.read(Path(output)))
    assert_same(reports[1], reports[0])
    # With that loss, a pipeline refuses.
    config["model"]["backbone"]["router_aux_loss_coef"] = 0.1
    (directory / "scratch.yaml").write_text(
        yaml.safe_dump(config | {"output": str(directory / "routed")}), encoding="utf-8"
    )
    arguments = [*launched("torchrun"), "train", "--config", "scratch.yaml", "--pipeline", "2"]
    finished = subprocess.run(arguments, env=environment(), cwd=directory, capture_output=True, text=True, timeout=300)
    assert finished.returncode != 0
    assert "router_aux_loss_coef to 0" in " ".join(finished.stderr.split())


def test_a_killed_rank_ends_all_and_the_last_checkpoint_goes_on(directory: Path) -> None:
    """One of two ranks dies after the first checkpoint; torchrun ends the other, and the same command goes on."""
    more = [*PIPELINE, "--steps", "40", "--save-every", "2"]
    whole = start(directory, "unkilled", *more, config="torchrun")
    running = subprocess.Popen(
        command("killed", *more, config="torchrun"),
        env=environment(),
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = directory / "killed" / "checkpoints"
    while running.poll() is None and not list(checkpoints.glob("checkpoint-*")):
        time.sleep(0.1)
    assert running.poll() is None, "it ended before its first checkpoint"
    rank = psutil.Process(running.pid).children()[-1]
    rank.kill()
    assert running.wait(timeout=120) != 0
    report = TrainingReport.read(directory / "killed")
    assert report is not None
    assert not report.finished
    again = start(directory, "killed", *more, config="torchrun")
    torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(whole.losses), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pipeline", "2"], "torchrun --nproc-per-node 2"),
        (["--pipeline", "4", "--accumulation", "2"], "at least 4"),
        (["--pipeline", "2", "--virtual-stages", "2", "--accumulation", "3"], "a multiple of 2"),
        (["--virtual-stages", "2"], "is for a pipeline"),
        (["--pipeline", "2", "--accumulation", "2", "--packing", "bfd"], "many shapes"),
    ],
)
def test_senseless_pipelines_are_refused(more: list[str], message: str, directory: Path) -> None:
    if more == ["--pipeline", "2"]:
        more = [*more, "--accumulation", "2"]
    arguments = ["finetune", str(directory / "converted"), "--data", str(directory / "text"), "--output"]
    result = CliRunner().invoke(app, [*arguments, str(directory / "refused"), *more])
    assert result.exit_code != 0
    assert message in " ".join(str(result.exception).split())
    assert not (directory / "refused").exists()

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import tiny_model

import attnres
from attnres.cli import main
from attnres.conversion import ConversionError

COMMANDS = ("convert", "finetune", "train", "eval", "card", "push", "inspect", "demo")


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process (the imports take seconds), in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["attnres", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Result(int(stopped.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("qwen3").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("attnres")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in COMMANDS)


def test_version(run: Callable[..., Result]) -> None:
    assert run("--version").stdout.strip() == f"attnres {attnres.__version__}"


def test_convert(source: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    result = run("convert", "source", "converted", "--block-size", "3", "--mix", "mean")
    assert result.returncode == 0, result.stderr
    for text in ("qwen3", "mix mean", "3 of 3 sublayers", "Greedy tokens equal", "100.0%", "trust_remote_code=True"):
        assert text in result.stdout
    report = json.loads((tmp_path / "converted" / "attnres_conversion.json").read_text())
    assert (report["block_size"], report["mix"], report["source"]) == (3, "mean", "source")


def test_full(source: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    assert run("convert", "source", "converted", "--full", "--verify", "none").returncode == 0
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["depth_attention"]["block_size"] == 1


def test_card_and_push(source: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    assert run("convert", "source", "converted", "--verify", "none").returncode == 0
    assert "Written: converted/README.md" in run("card", "converted", "--repo-id", "user/converted").stdout
    assert '"user/converted"' in (tmp_path / "converted" / "README.md").read_text()
    result = run("push", "converted", "user/converted", "--dry-run")
    assert result.returncode == 2
    assert "names no licence" in result.stderr
    assert "model-attnres.safetensors" in result.stdout
    with (tmp_path / "converted" / "README.md").open("r+") as card:
        text = card.read().replace("---\n", "---\nlicense: mit\n", 1)
        card.seek(0)
        card.write(text)
    result = run("push", "converted", "user/converted", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Dry run: nothing was sent." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "source", "user/x"], "model_type='qwen3'"),
        (["card", "source"], "model_type='qwen3'"),
        (["convert", "nowhere/at/all", "converted"], "does not exist"),
        (["convert", "source", "converted", "--num-blocks", "99"], "num_blocks=99"),
        (["convert", "source", "converted", "--full", "--num-blocks", "2"], "--full stands for --block-size 1"),
        (["convert", "source", "converted", "--mix", "product"], "mix='product' is not allowed; choose one of"),
        (["convert", "source", "converted", "--verify", "some"], "verify='some' is not allowed; choose one of"),
        (["convert", "source", "source"], "exists; choose another"),
        (["demo", "--output", "source"], "was not made by the demo"),
        (["finetune", "source", "--data", "nowhere.jsonl", "--output", "out"], "has no tokenizer"),
        (["finetune", "source", "--data", "x", "--output", "out", "--steps", "0"], "steps=0"),
        (["finetune", "source", "--data", "x", "--output", "out", "--depth", "mix"], "NAME=VALUE"),
        (["finetune", "source", "--data", "x", "--output", "source"], "holds something that no training wrote"),
        (["train", "--config", "nowhere.yaml"], "is not readable YAML"),
    ],
)
def test_errors_are_messages(source: Path, run: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert message in re.sub(r"\s+", " ", result.stderr)


def test_debug_shows_the_traceback(run: Callable[..., Result]) -> None:
    with pytest.raises(ConversionError):
        run("--debug", "convert", "nowhere/at/all", "converted")


@pytest.mark.parametrize("arguments", [["convert"], ["convert", "a"], ["nonsense"], ["convert", "a", "b", "--mixx"]])
def test_wrong_usage(run: Callable[..., Result], arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Usage" in result.stderr


def test_demo_twice(tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("demo", "--output", "demo")
    assert result.returncode == 0, result.stderr
    assert "3 of 3 continuations are the same" in result.stdout
    assert (tmp_path / "demo" / "tiny-qwen3-attnres" / "model-attnres.safetensors").is_file()
    rows = json.loads((tmp_path / "demo" / "evaluation" / "report.json").read_text())["rows"]
    assert [row["difference"] for row in rows] == [0] * 5
    assert all(name in result.stdout for name in ("MMLU", "GPQA-Diamond", "Math (Minerva)", "MATH-500", "HumanEval"))

    def stop(*arguments: object, **options: object) -> None:
        raise ConversionError("far enough")

    monkeypatch.setattr("attnres.examples.demo.convert", stop)
    assert "far enough" in run("demo", "--output", "demo").stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [".attnres-demo"], "not made anew"

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.table import Table
from tiny import tiny_model

import attnres
from attnres import AttnResError
from attnres.cli import TerminalConsole, main
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


ESCAPES = {
    "red": "\x1b[31m",
    "a title": "\x1b]0;title\x07",
    "a link": "\x1b]8;;http://x\x1b\\",
    "C1": "\x9b31m",
    "a bell": "\x07",
    "a backspace": "\x08\x08",
    "a carriage return": "\rOK",
    "right to left": "\u202eKO",
    "half a character": "\udcff",
    "a separator": "\u2028",
    "clearing": "\x1bc",
}


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES.keys())
def test_nothing_printed_orders_a_terminal_about(text: str) -> None:
    """Text of files and their names: in lines, tables, titles, errors and warnings."""
    for make in (str, lambda t: t.replace("\x1b", "\x1b\x1b"), lambda t: f"{t}{t}"):
        given = make(text)
        file = io.StringIO()
        console = TerminalConsole(file=file, width=200)
        table = Table(given, title=given)
        table.add_row(given)
        console.print(table)
        console.print(given, markup=False, soft_wrap=True)
        console.print(str(ConversionError(given)))
        console.print(AttnResError(f"{given} is wrong"))
        assert all(c.isprintable() or c == "\n" for c in file.getvalue())


@pytest.mark.parametrize("length", [10**4, 10**6, 10**7])
def test_long_messages_are_cut(length: int) -> None:
    message = str(ConversionError("the start " + "x" * length + " the end"))
    assert message.startswith("the start")
    assert message.endswith("the end")
    assert len(message) < 5000


COMMAND = f"{sys.executable} -c 'from attnres.cli import main; main()' card nowhere"
OUTPUTS = [
    "{} --version > /dev/full".replace("{}", COMMAND.removesuffix(" card nowhere")),
    "{} --version >&-".replace("{}", COMMAND.removesuffix(" card nowhere")),
    "{} --version | true".replace("{}", COMMAND.removesuffix(" card nowhere")),
    f"{COMMAND} > /dev/full",
    f"{COMMAND} >&-",
    f"{COMMAND} 2> /dev/full",
    f"{COMMAND} 2>&-",
    f"{COMMAND} < /dev/null >&- 2>&-",
    f"{COMMAND} 2>&1 | true",
    f"{COMMAND} 2>&1 >/dev/full | true",
]


@pytest.mark.parametrize("command", OUTPUTS)
def test_output_that_nobody_takes(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr

"""Everything that wants a CUDA device, in one command that stops by itself.

    python -m benchmarks.gpu --minutes 8 --output benchmarks/results/h100 --wheels WHEELS
    TRITON_INTERPRET=1 python -m benchmarks.gpu --toy --minutes 5 --output /tmp/toy    # no device: does it run?

It needs no network and no installation of this package: the directory that holds it is enough, with torch 2.11 and
Transformers 5.17 or newer. What a machine lacks (pytest, wrapt, the packages to compare with) can be brought as wheels:

    pip download --no-deps --dest WHEELS fla-core einops liger-kernel flash-attn-res fast-attnres pytest pluggy \
        iniconfig wrapt

Triton 3.6 interprets kernels with numpy before 2.3 alone; on a device it does not matter.

Each step is a process of its own, so that one that crashes or hangs costs only itself. They are in the order of their
worth; one that wants more time than is left is passed over. `summary.json` is written after every step, and every step
writes its own rows as it goes, so a run that is killed keeps what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it may be among the wheels
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: of its files in the output directory.
        arguments: of Python; `OUTPUT` stands for the file that it writes its rows to.
        least, most: seconds without which it is not begun, and after which it is ended.
    """

    name: str
    arguments: Sequence[str]
    least: float
    most: float


def operation(name: str, *hidden: int, least: float, most: float) -> Step:
    sizes = map(str, hidden)
    arguments = ["-m", "benchmarks.depth_attention", "--device", "cuda", "--hidden", *sizes, "--output", "OUTPUT"]
    return Step(name, arguments, least, most)


def model(
    name: str, shape: str, tasks: Sequence[str], implementation: str, least: float, most: float, kind: str = "block"
) -> Step:
    arguments = ["-m", "benchmarks.model_overhead", "--device", "cuda", "--dtype", "bfloat16", "--shape", shape]
    arguments += ["--task", *tasks, "--kind", kind, "--implementation", implementation, "--output", "OUTPUT"]
    return Step(name, arguments, least, most)


EAGER = ("prefill 2048", "decode", "training step")
# In the order of worth. Seconds are guesses for an H100, compilation included.
STEPS = (
    Step("kernels", ["-m", "pytest", "-q", "-m", "gpu", "tests/test_depth_attention_triton.py"], 20, 120),
    operation("operation-2048", 2048, least=20, most=90),
    model("qwen3-0.6b", "qwen3-0.6b", EAGER, "triton", least=20, most=60),
    model("llama-8b", "llama-8b", EAGER, "triton", least=30, most=90),
    model("qwen3-0.6b-graphs", "qwen3-0.6b", ("decode",), "triton, reduce-overhead", least=45, most=120),
    operation("operation-4096-7168", 4096, 7168, least=30, most=120),
    model("qwen3-0.6b-compiled", "qwen3-0.6b", EAGER, "triton, compiled", least=60, most=180),
    model("qwen3-0.6b-full", "qwen3-0.6b", EAGER, "triton", kind="full", least=20, most=60),
    model("llama-8b-graphs", "llama-8b", ("decode",), "triton, reduce-overhead", least=60, most=180),
    model("qwen3-0.6b-torch", "qwen3-0.6b", EAGER, "two_phase", least=20, most=60),
    model("qwen3-0.6b-heads", "qwen3-0.6b", EAGER, "triton", kind="heads", least=20, most=60),
)
_TOY_OPERATION = ["--device", "cpu", "--tokens", "8", "--hidden", "32", "--sources", "2", "--reads", "3"]
_TOY_OPERATION += ["--candidate", "triton", "two_phase", "eager", "Kimi K3 form"]
_TOY_MODEL = ["--device", "cpu", "--dtype", "float32", "--shape", "tiny", "--kind", "block", "--repeats", "2"]
TOY_STEPS = (
    Step("kernels", ["-m", "pytest", "-q", "tests/test_depth_attention_triton.py", "-k", "expanded"], 5, 120),
    Step(
        "operation",
        ["-m", "benchmarks.depth_attention", *_TOY_OPERATION]
        + ["--dtype", "float32", "--rounds", "2", "--output", "OUTPUT"],
        5,
        240,
    ),
    Step(
        "tiny",
        ["-m", "benchmarks.model_overhead", *_TOY_MODEL]
        + ["--task", "decode", "training step", "--implementation", "two_phase", "--output", "OUTPUT"],
        5,
        120,
    ),
    Step("too-long", ["-c", "raise SystemExit('never begun')"], 1e9, 1e9),
)


def prepare(output: Path, wheels: Path | None) -> dict[str, str]:
    """The environment of the steps, and this process's own path: this package, and what the wheels hold.

    fast-attnres is a package that is called attnres too, so it is put apart.
    """
    work = output / "work"
    (work / "package").mkdir(parents=True, exist_ok=True)
    link = work / "package" / "attnres"
    if not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        place = "fast-attnres" if wheel.name.startswith("fast_attnres") else "wheels"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / place)
    sys.path[:0] = paths = [str(work / "package"), str(work / "wheels")]
    python_path = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(step: Step, output: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Runs a step for so long at most; says how it went."""
    rows, log = output / f"{step.name}.json", output / "work" / f"{step.name}.log"
    arguments = [str(rows) if argument == "OUTPUT" else argument for argument in step.arguments]
    fast = output / "work" / "fast-attnres"
    if "benchmarks.depth_attention" in arguments and fast.is_dir():
        arguments += ["--fast-attnres", str(fast)]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # its own children too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = {"step": step.name, "seconds": round(time.monotonic() - started, 1)}
    result["result"] = "done" if code == 0 else "out of time" if code is None else f"failed ({code})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code != 0 or step.name == "kernels":
        result["last_lines"] = lines[-40 if code else -1 :]
    return result


def show(output: Path, results: list[dict[str, Any]], console: Console) -> None:
    """Prints the tables of all rows that there are."""
    from benchmarks import depth_attention, model_overhead

    for result in results:
        console.rule(f"{result['step']}: {result['result']}")
        for line in result.get("last_lines", ())[-8:]:
            console.print(line, markup=False, soft_wrap=True)
        file = output / f"{result['step']}.json"
        if file.is_file():
            rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
            console.print((depth_attention if "hidden" in rows[0] else model_overhead).table(rows))


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--wheels", type=Path, help="directory of wheels of what is not installed")
    parser.add_argument("--toy", action="store_true", help="tiny shapes on a CPU, to see whether it runs")
    parser.add_argument("--steps", nargs="+", help="only these")
    arguments = parser.parse_args()
    steps = TOY_STEPS if arguments.toy else STEPS
    unknown = {*(arguments.steps or ())} - {step.name for step in steps}
    if unknown:
        raise SystemExit(
            f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}."
        )
    output = arguments.output.resolve()
    environment = prepare(output, arguments.wheels)
    try:
        import pytest  # noqa: F401

        import attnres  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: bring it as a wheel (--wheels); without it no step can run.") from error
    from rich.console import Console

    console = Console()
    results: list[dict[str, Any]] = []
    for step in steps:
        if arguments.steps and step.name not in arguments.steps:
            continue
        left = arguments.minutes * 60 - (time.monotonic() - started) - 5  # for what comes after
        if left < step.least:
            results.append({"step": step.name, "seconds": 0.0, "result": f"not begun: {left:.0f} s were left"})
        else:
            console.print(f"{step.name} ...")
            results.append(run(step, output, environment, min(step.most, left)))
        summary = {"minutes": arguments.minutes, "seconds": round(time.monotonic() - started, 1), "steps": results}
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(output, results, console)


if __name__ == "__main__":
    main()

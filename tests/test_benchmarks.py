"""The benchmarks run: all of `benchmarks/gpu.py` on toy shapes, in Triton's interpreter without a CUDA device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton", reason="triton is not installed")


def program(name: str) -> ModuleType:
    """A module of `benchmarks`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name.replace('.', '/')}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


gpu = program("benchmarks.gpu")


def test_all_steps_on_toy_shapes(tmp_path: Path) -> None:
    """This package need not be installed: it is found where the program lies. Wheels that are brought are, too."""
    wheels, output = tmp_path / "wheels", tmp_path / "output"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "")
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--minutes", "9"]
    command += ["--output", str(output), "--wheels", str(wheels)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "COLUMNS": "200"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590)
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = {step["step"]: step for step in json.loads((output / "summary.json").read_text("utf-8"))["steps"]}
    for name in ("kernels", "operation", "tiny"):
        assert steps[name]["result"] == "done", steps[name]
    assert "passed" in steps["kernels"]["last_lines"][-1]
    assert steps["too-long"]["result"].startswith("not begun")
    assert (output / "work" / "wheels" / "brought.py").is_file()

    rows = json.loads((output / "operation.json").read_text("utf-8"))["rows"]
    assert {row["candidate"] for row in rows} == {"triton", "two_phase", "eager", "Kimi K3 form"}
    assert {row["direction"] for row in rows} == {"forward", "forward and backward"}
    assert all(row["relative_error"] < 1e-5 for row in rows)
    rows = json.loads((output / "tiny.json").read_text("utf-8"))["rows"]
    assert [row["task"] for row in rows] == ["decode", "training step"]
    assert all(row["ratio"] > 0 and row["peak_memory_ratio"] >= 1 for row in rows)
    assert "Kimi K3 form" in finished.stdout
    assert "training step" in finished.stdout


def test_a_step_that_takes_too_long_is_ended_and_keeps_its_rows(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w').write('[]'); print('so far', flush=True); time.sleep(600)"
    (tmp_path / "work").mkdir()
    step = gpu.Step("slow", ["-c", code, "OUTPUT"], 1, 5)
    result = gpu.run(step, tmp_path, dict(os.environ), 5)
    assert result["result"] == "out of time"
    assert result["seconds"] < 60
    assert result["last_lines"] == ["so far"]
    assert (tmp_path / "slow.json").read_text("utf-8") == "[]"


def test_every_step_is_one_that_its_program_takes() -> None:
    """What a machine with a GPU would run, as far as it can be said without one: its arguments are understood."""
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS)
    for step in gpu.STEPS[1:]:
        module = program(step.arguments[1])
        if "--shape" in step.arguments:
            assert step.arguments[step.arguments.index("--shape") + 1] in module.SHAPES
            first = step.arguments.index("--task") + 1
            assert {*step.arguments[first : step.arguments.index("--kind")]} <= {*module.TASKS}
        else:
            assert step.arguments[1] == "benchmarks.depth_attention"
        assert 0 < step.least <= step.most

"""Sequences that are split over ranks: depth attention is local to a token, so it needs nothing of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from attnres import convert

HERE = Path(__file__).parent
BENCHMARK = HERE.parent / "benchmarks" / "context_parallel.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PROGRAM = HERE / "run_context_parallel.py"


def run(*command: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stderr[-6000:]
    return finished.stdout


def test_ring_attention_of_torch_computes_what_one_process_does() -> None:
    """Two ranks with half of each sequence, in torch's balanced order: logits, loss and all gradients."""
    run(*TORCHRUN, PROGRAM)


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    page = (HERE.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    (program,) = [block for block in page.split("```python\n") if block.startswith("# context.py")]
    (tmp_path / "context.py").write_text(program.split("```")[0], encoding="utf-8")
    convert(HERE.parent / "examples" / "tiny-qwen3", tmp_path / "model", num_blocks=4, verify="none")
    assert run(*TORCHRUN, PROGRAM, tmp_path / "context.py", tmp_path / "model").count("loss") == 3


def test_a_rank_holds_the_sources_of_its_own_tokens(tmp_path: Path) -> None:
    """N (T / P) d elements, or those of a chunk; and the logits are those of one rank with all tokens."""
    output = tmp_path / "results.json"
    run(BENCHMARK, "--tokens", "128", "--chunk", "32", "--output", output)
    report = json.loads(output.read_text())
    assert [(row["ranks"], row["chunk"]) for row in report["rows"]] == [(1, 128), (2, 128), (1, 32), (2, 32)]
    for row in report["rows"]:
        blocks = 8 * row["chunk"] // row["ranks"] * 128 * 4
        assert row["formula"] == row["blocks"] == blocks
        assert row["embedding"] == blocks // 8
        assert row["difference_of_logits"] < 1e-5
    assert [round(row["formula"] / 1e9, 2) for row in report["paper"]] == [15.03, 1.88, 0.23]


def test_the_committed_results_are_those_of_the_formula() -> None:
    results = json.loads((BENCHMARK.parent / "results" / "cpu-context_parallel.json").read_text())
    assert results["tokens"] == 8192
    assert len(results["rows"]) == 4
    for row in results["rows"]:
        assert row["blocks"] == row["formula"] == 8 * row["chunk"] // row["ranks"] * 128 * 4
        assert row["difference_of_logits"] < 1e-4

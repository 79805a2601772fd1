"""`attnres eval --data DIR` takes data sets from a directory, where there is no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnres import eval as evaluation

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def two():\n",
    "canonical_solution": "    return 2\n",
    "test": "def check(candidate):\n    assert candidate() == 2\n",
    "entry_point": "two",
}


@pytest.mark.parametrize("kind", ["files", "configuration", "repository"])
def test_a_data_set_is_taken_from_the_directory(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "openai" / "openai_humaneval"
    inner = folder / "openai_humaneval" if kind != "files" else folder
    inner.mkdir(parents=True)
    (inner / "test.jsonl").write_text(json.dumps(PROBLEM) + "\n", encoding="utf-8")
    if kind == "repository":
        files = "config_name: openai_humaneval\n  data_files:\n  - split: test\n    path: openai_humaneval/test.jsonl"
        (folder / "README.md").write_text(f"---\nconfigs:\n- {files}\n---\n", encoding="utf-8")
    (access,) = evaluation.check(evaluation.select("humaneval"), unsafe_code=True, data=tmp_path)
    assert access.tasks is not None, access.line
    (document,) = access.tasks["tasks"]["humaneval"].test_docs()
    assert document["task_id"] == "HumanEval/0"


def test_without_the_directory_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    (access,) = evaluation.check(evaluation.select("humaneval"), unsafe_code=True, data=tmp_path)
    assert access.tasks is None

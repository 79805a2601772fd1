"""The tasks of an evaluation: the harness's own, CMath beside them, and the offline samples of the core benchmarks.

A sample is the harness's task with only the data replaced, so it shows the same prompts to the model and scores its
answers by the same filters and metrics. HumanEval, MBPP and their relatives keep the harness's code too, but where
that fetches the metric `code_eval`, which would run what a model wrote in this process's own account, it is given the
sandbox.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import evaluate
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from ..sandbox import backend, pass_at_k_score
from ..suites import Benchmark, EvaluationError

HERE = Path(__file__).parent
HARNESS = Path(lm_eval.tasks.__file__).parent
SAMPLE_MAX_NEW_TOKENS = 96
# Folders of the harness whose tasks score by `code_eval` alone. What others run, they run unconfined.
CODE_EVAL_FOLDERS = ("humaneval", "humaneval_infilling", "mbpp")
SEED = 0


def quiet() -> None:
    """Keeps the harness and `datasets` from reporting every step, for a command that reports itself."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


@cache
def task_manager(folders: tuple[str, ...] | None) -> TaskManager:
    """The harness's index of the tasks in `folders`, or of all (which takes ten seconds), with ours."""
    paths = [HARNESS / folder for folder in folders or ()]
    return TaskManager(include_path=[*paths, HERE], include_defaults=folders is None)


def load(benchmark: Benchmark, unsafe_code: bool = False, data: Path | None = None) -> TaskDict:
    """Loads the tasks of a benchmark, data included, ready to be run for any number of models.

    Args:
        benchmark (`Benchmark`): what to load.
        unsafe_code (`bool`, *optional*, defaults to `False`): run what a model wrote where there is no sandbox too.
        data (`Path`, *optional*): directory of data sets, see [`data_in`].

    Returns:
        `dict`: `tasks`, `groups` and `group_map`, as `TaskManager.load` gives them.

    Raises:
        EvaluationError: the harness has no such task, or it runs code outside the sandbox.
        SandboxUnavailableError: it runs code and there is no sandbox.
        Exception: whatever else the harness, `datasets` or the Hub raise; see [`explain`].
    """
    manager = task_manager(benchmark.folders)
    if not benchmark.is_sample and benchmark.task not in manager.task_index:
        raise EvaluationError(f"lm-evaluation-harness has no task {benchmark.task!r}; list them: lm-eval ls tasks")
    random.seed(SEED)  # GPQA shuffles its choices while loading
    with code_eval_in_sandbox(unsafe_code), data_in(data):
        loaded = _load_sample(benchmark, manager) if benchmark.is_sample else manager.load([benchmark.task])
    for name, task in loaded["tasks"].items():
        entry = manager.task_index.get(name.removeprefix("sample_"))
        is_sandboxed = entry and entry.yaml_path and entry.yaml_path.parent.name in CODE_EVAL_FOLDERS
        if getattr(task, "UNSAFE_CODE", False) and not (is_sandboxed or unsafe_code):
            raise EvaluationError(f"task {name} runs code outside the sandbox; allow it with --unsafe-code.")
        if benchmark.num_fewshot is not None:
            task.set_config("num_fewshot", benchmark.num_fewshot)
    return loaded


def _load_sample(benchmark: Benchmark, manager: TaskManager) -> TaskDict:
    """Loads `sample_X`: the task or group X of the harness, over the files `sample/X*.jsonl`.

    A group has those of its tasks for which there are files, as `sample_minerva_math` has `sample/minerva_math_*`.
    """
    original = benchmark.task.removeprefix("sample_")
    leaves = sorted({path.name.split(".")[0] for path in (HERE / "sample").glob(f"{original}[._]*.jsonl")})
    tasks = manager.load([_sample_task(manager.task_index[leaf]) for leaf in leaves])
    if leaves == [original]:
        return tasks
    config = load_yaml(manager.task_index[original].yaml_path)
    group = Group.from_config(GroupConfig(benchmark.task, aggregate_metric_list=config["aggregate_metric_list"]))
    for task in tasks["tasks"].values():
        group.add(task)
    return manager.load([group])


def _sample_task(entry: Entry) -> dict[str, Any]:
    files = (HERE / "sample").glob(f"{entry.name}.*.jsonl")
    config = load_yaml(entry.yaml_path) | {
        "task": f"sample_{entry.name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {path.name.split(".")[1]: str(path) for path in files}},
    }
    config.pop("tag", None)
    if config["output_type"] == "generate_until":
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": SAMPLE_MAX_NEW_TOKENS}
    return config


@contextmanager
def data_in(directory: Path | None) -> Iterator[None]:
    """While it is open, `datasets.load_dataset` takes a data set of the Hub from its folder in a directory, if it has
    one: `openai/openai_humaneval` from DIRECTORY/openai/openai_humaneval.

    That folder is a copy of the data set's repository, or holds a file for each split, as test.jsonl or test.parquet;
    of a data set with several configurations, these in a folder for each.
    """
    load_dataset = datasets.load_dataset

    def load_local(path: str, name: str | None = None, **options: Any) -> Any:
        folder = None if directory is None else directory / path
        # Names that the harness gives are no paths; one that leads elsewhere is the Hub's matter.
        if directory is None or folder is None or not folder.is_dir() or not folder.is_relative_to(directory):
            return load_dataset(path, name, **options)
        if name is not None and not (folder / "README.md").is_file():
            folder, name = (folder / name if (folder / name).is_dir() else folder), None
        return load_dataset(str(folder), name, **options)

    datasets.load_dataset = load_local
    try:
        yield
    finally:
        datasets.load_dataset = load_dataset


class SandboxedCodeEval:
    """Stands in for the metric `code_eval`: the same call, but each candidate runs in the sandbox."""

    def __init__(self, unsafe: bool) -> None:
        self.unsafe = unsafe

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """pass@k of `predictions`, programs of a model, under `references`, the tests of each problem."""
        return pass_at_k_score(references, predictions, k, unsafe=self.unsafe), {}


@contextmanager
def code_eval_in_sandbox(unsafe: bool) -> Iterator[None]:
    """While it is open, `evaluate.load("code_eval")` gives the sandbox, and the harness's modules ask for it anew."""
    load = evaluate.load

    def load_metric(path: str, *arguments: Any, **options: Any) -> Any:
        if path != "code_eval":
            return load(path, *arguments, **options)
        backend(unsafe)
        return SandboxedCodeEval(unsafe)

    for folder in CODE_EVAL_FOLDERS:
        sys.modules.pop(f"lm_eval.tasks.{folder}.utils", None)
    evaluate.load = load_metric
    try:
        yield
    finally:
        evaluate.load = load

"""Runs a model, and the one it came from, through lm-evaluation-harness under the same settings."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import lm_eval.evaluator
import lm_eval.models  # registers the model classes
import psutil
import torch
from lm_eval.api.registry import get_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import simple_parse_args_string
from transformers import AutoConfig, PreTrainedConfig

from .. import __version__
from ..model_cards.card import CARD, update_card
from .access import check
from .comparison import compare
from .report import Missing, Report
from .suites import EvaluationError, select
from .tasks import SEED, task_manager

PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "accelerate", "math_verify", "sympy")
RUN_FILE = "run.json"
# What may change between an interrupted run and its continuation, since it does not change what is asked.
FREE_SETTINGS = ("batch_size", "device")


def evaluate(
    model: str,
    baseline: str | None = None,
    *,
    tasks: str | Sequence[str] = "core",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    gen_kwargs: str | Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    backend: str = "hf",
    model_args: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    unsafe_code: bool = False,
    data: str | os.PathLike[str] | None = None,
) -> Report | None:
    """Evaluates a model on the benchmarks of the paper, beside the model it came from.

    Writes into `output`: what the harness writes, untouched, under `harness/`; `report.json`, `report.md` and
    `report.html`. A benchmark that cannot be run here is skipped, and the report says why. The model card in the
    directory of an AttnRes checkpoint gets the table.

    Args:
        model (`str`): the model, a directory or a Hub id.
        baseline (`str`, *optional*): the model to compare it with, run under the same settings.
        tasks (`str` or sequence of `str`, *optional*, defaults to `"core"`): `"core"`, `"paper"`, `"sample"`, names
            of tasks and groups of the harness, or several of these with commas between.
        limit (`int`, *optional*): ask only the first so many questions of each task; the report marks it.
        num_fewshot (`int`, *optional*): examples in each prompt, instead of each benchmark's own number. Tasks that
            the harness fixes at 0 stay at 0.
        batch_size (`int` or `str`, *optional*, defaults to 8): sequences per forward pass; `"auto"` finds the most
            that fit.
        device (`str`, *optional*): as PyTorch names it; the first accelerator, or else the CPU.
        dtype (`str`, *optional*, defaults to `"auto"`): of the weights: `"float32"`, `"bfloat16"`, ...; `"auto"` is the
            checkpoint's own, but float32 on a CPU.
        apply_chat_template (`bool`, *optional*, defaults to `False`): put each prompt into the tokenizer's template.
        gen_kwargs (`str` or `dict`, *optional*): of generation, over the tasks' own, as `"temperature=0.6,top_p=0.9"`.
        output (`str` or `PathLike`, *optional*): directory to write to; `NAME-eval`, for the name of the model.
        resume (`bool`, *optional*, defaults to `False`): continue the run in `output`, from the answers in its cache.
        backend (`str`, *optional*, defaults to `"hf"`): what runs the models: `"hf"`, `"vllm"`, or another of the
            harness's model classes.
        model_args (`str` or `dict`, *optional*): further arguments of that class, as `"tensor_parallel_size=4"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with a checkpoint. AttnRes
            checkpoints need none where this package is installed.
        unsafe_code (`bool`, *optional*, defaults to `False`): run what a model wrote even where there is no sandbox.
        data (`str` or `PathLike`, *optional*): directory of data sets, for a machine without network: that of the Hub's
            `openai/openai_humaneval` is in `data/openai/openai_humaneval`.

    Returns:
        [`Report`]: the scores; `None` on all but the first process of several.

    Raises:
        EvaluationError: an argument is wrong, `output` holds another run, or none of the tasks can be run.
    """
    started = time.monotonic()
    benchmarks = select(tasks)
    device = device or (str(torch.accelerator.current_accelerator() or "cpu") if backend == "hf" else None)
    if dtype == "auto" and backend == "hf" and device == "cpu":
        dtype = "float32"
    settings: dict[str, Any] = {
        "model": str(model),
        "baseline": None if baseline is None else str(baseline),
        "tasks": [benchmark.task for benchmark in benchmarks],
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "apply_chat_template": apply_chat_template,
        "gen_kwargs": _arguments(gen_kwargs),
        "backend": backend,
        "model_args": _arguments(model_args),
        "trust_remote_code": trust_remote_code,
        "seed": SEED,
        "data": None if data is None else str(data),
    }
    _check_arguments(settings)
    directory = Path(output) if output is not None else Path(f"{Path(model).name}-eval")
    is_first = int(os.environ.get("RANK", "0")) == 0
    if is_first:
        _check_directory(directory, settings, resume)

    found = check(benchmarks, unsafe_code, None if data is None else Path(data))
    missing = [Missing(a.benchmark.task, a.problem, a.remedy) for a in found if a.tasks is None]
    ready = [(a.benchmark, a.tasks) for a in found if a.tasks is not None]
    if not ready:
        raise EvaluationError("none of the tasks can be run:\n" + "\n".join(access.line for access in found))

    if is_first:
        _open(directory, settings)
    specs = [item for _, tasks in ready for item in _top_level(tasks)]
    results: dict[str, Any] = {}
    for role, name in (("baseline", baseline), ("model", model)):
        if name is not None:
            results[role] = _run(str(name), specs, settings, directory / "harness" / role)
    if results["model"] is None:
        return None
    base = results.get("baseline")
    report = Report(
        model=str(model),
        baseline=None if baseline is None else str(baseline),
        rows=[row for benchmark, tasks in ready for row in compare(benchmark, tasks, results["model"], base)],
        missing=missing,
        settings={name: value for name, value in settings.items() if name not in ("model", "baseline")},
        versions=_versions(),
        hardware=_hardware(),
        seconds=round(time.monotonic() - started, 1),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    report.save(directory)
    if (Path(model) / CARD).is_file() and PreTrainedConfig.get_config_dict(model)[0].get("model_type") == "attnres":
        update_card(model, directory)
    return report


def _arguments(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return simple_parse_args_string(given) if isinstance(given, str) else dict(given or {})


def _check_arguments(settings: Mapping[str, Any]) -> None:
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if settings[name] is not None and settings[name] < least:
            raise EvaluationError(f"{name}={settings[name]} makes no evaluation; give {least} or more.")
    size = settings["batch_size"]
    if not str(size).startswith("auto") and not (str(size).isdigit() and int(size) > 0):
        raise EvaluationError(f"batch_size={size!r} is none; give a number of sequences, or auto.")
    if settings["data"] is not None and not Path(settings["data"]).is_dir():
        raise EvaluationError(f"--data {settings['data']} is no directory.")
    try:
        get_model(settings["backend"])
    except (KeyError, ValueError) as error:
        raise EvaluationError(
            f"the harness has no model class {settings['backend']!r}; list: lm-eval run -h"
        ) from error
    if settings["backend"] != "hf":
        return
    for role in ("model", "baseline"):
        if settings[role] is not None:
            try:
                AutoConfig.from_pretrained(settings[role], trust_remote_code=settings["trust_remote_code"])
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise EvaluationError(f"{role} {settings[role]} cannot be loaded: {reason}") from error


def _asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run the one it is, as it is noted in its directory."""
    asked = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    return json.loads(json.dumps(asked | {"attnres": __version__, "lm_eval": version("lm_eval")}))


def _check_directory(directory: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """An earlier run is continued if it asked the same, and never replaced."""
    note = directory / RUN_FILE
    if not note.is_file():
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise EvaluationError(f"{directory} exists and holds no evaluation; choose another --output.")
        return
    if not resume:
        raise EvaluationError(f"{directory} holds an evaluation; continue it (--resume), or choose another --output.")
    before, now = json.loads(note.read_text(encoding="utf-8")), _asked(settings)
    changed = [f"{name} {before.get(name)} then and {now[name]} now" for name in now if before.get(name) != now[name]]
    if changed:
        raise EvaluationError(f"{directory} holds another evaluation: {'; '.join(changed)}. Choose another --output.")


def _open(directory: Path, settings: Mapping[str, Any]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RUN_FILE).write_text(json.dumps(_asked(settings), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{directory} cannot be written: {error}; choose another --output.") from error


def _top_level(tasks: Any) -> list[Any]:
    """What to hand to the harness: the outermost groups, and the tasks that are in none."""
    groups = tasks.get("groups", {})
    inner = {name for group in groups.values() for name in group.child_names}
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [g for name, g in groups.items() if name not in inner] + [
        task for name, task in tasks["tasks"].items() if name not in grouped
    ]


def _run(name: str, specs: list[Any], settings: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """One model through all tasks; the harness writes what it writes into `directory`, and caches answers beside it."""
    arguments: dict[str, Any] = {"pretrained": name, "trust_remote_code": settings["trust_remote_code"]}
    tracker = EvaluationTracker(output_path=str(directory))
    try:
        with patch.object(lm_eval.evaluator, "get_git_commit_hash", _git_commit):
            results = lm_eval.simple_evaluate(
                model=settings["backend"],
                model_args={**arguments, "dtype": settings["dtype"], **settings["model_args"]},
                tasks=specs,
                num_fewshot=settings["num_fewshot"],
                batch_size=settings["batch_size"],
                device=settings["device"],
                use_cache=str(directory.parent.parent / "cache" / directory.name),
                limit=settings["limit"],
                evaluation_tracker=tracker,
                apply_chat_template=settings["apply_chat_template"],
                gen_kwargs=dict(settings["gen_kwargs"]) or None,
                task_manager=task_manager(()),  # the tasks are loaded; without this the harness indexes all it has
                confirm_run_unsafe_code=True,  # `load` has seen to the sandbox
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
    except AssertionError as error:
        if "max tokens to generate" not in str(error):
            raise
        remedy = "bound it (--gen-kwargs max_gen_toks=N)"
        raise EvaluationError(
            f"{name}: a task generates more than the model's context holds; {remedy}. {error}"
        ) from error
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if results is None:
        return None
    samples = results["samples"]
    tracker.save_results_aggregated(results={k: v for k, v in results.items() if k != "samples"}, samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    if not list(directory.glob("*/results_*.json")):
        raise EvaluationError(f"the harness could not write its results into {directory}; is there room?")
    return results


def _git_commit() -> str | None:
    """What the harness notes as `git_hash`. Its own function lets git complain on the terminal where there is none."""
    try:
        return subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        return None


def _versions() -> dict[str, str]:
    own = {"attnres": __version__, "python": platform.python_version()}
    return own | {package: version(package) for package in PACKAGES}


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory,
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }

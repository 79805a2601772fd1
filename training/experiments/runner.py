"""Does the runs of a study that have no result yet, several at once, and keeps each result when it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...examples import real_model
from ..errors import TrainingError
from .corpus import Corpus, make_corpus
from .studies import PRESETS, REAL, SMOLLM2, Preset, Run, plan

RESULTS = Path(__file__).parent / "results"
# glibc returns large tensors to the kernel whenever they are freed, and asks for the memory again in the next layer. A
# process that keeps it needs 8 GB instead of 5 for SmolLM2 on a CPU, and 0.7 of the time for a step.
ALLOCATION = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
CONDITIONS = ("residual", "depth", "backbone", "training")  # of a run, which its result keeps


def preset_named(name: str) -> Preset:
    """A preset by its name.

    Raises:
        TrainingError: there is none.
    """
    if name not in PRESETS:
        raise TrainingError(f"There is no preset {name!r}; there are: {', '.join(PRESETS)}.")
    return PRESETS[name]


def results_of(directory: Path) -> dict[str, dict[str, Any]]:
    """The results in a directory, by the key of their run."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{path} is not what a run writes: {error}; remove it, and it is done again."
            ) from error
    return found


def run_study(
    study: str,
    preset_name: str,
    *,
    output: Path = RESULTS,
    work: Path | None = None,
    workers: int = 1,
    minutes: float | None = None,
    threads: int | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Does what is missing of a study.

    Args:
        study, preset_name (`str`): what, and how much of it; see `studies.py`.
        output (`Path`): results are written to `output/STUDY-PRESET`, one file for each run.
        work (`Path`, *optional*): where the corpus is made; a temporary directory if not given.
        workers (`int`, defaults to 1): runs at once, each in a process of its own.
        minutes (`float`, *optional*): no run is started after so long.
        threads (`int`, *optional*): threads of each process; by default the cores are shared evenly.
        report: called with one line for each run.

    Returns:
        `int`: how many runs of those that are known by now are still missing.

    Raises:
        TrainingError: a run failed, and its message is in the error; or a result is of other text or settings than the
            plan has. Finished results are kept.
        UnreachableError: SmolLM2 is not here, and the package index that has it is not reached.
    """
    preset, directory = preset_named(preset_name), output / f"{study}-{preset_name}"
    directory.mkdir(parents=True, exist_ok=True)
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(workers) as pool:
        corpus = make_corpus(work or Path(scratch) / "corpus", preset.training_bytes, preset.validation_bytes)
        for key, result in results_of(directory).items():
            if result["corpus"]["sha256"] != corpus.sha256:
                raise TrainingError(
                    f"{directory / key}.json is of another text ({_versions(result['corpus']['packages'])}) than there "
                    f"is here ({_versions(corpus.packages)}). Install those versions, or give another output."
                )
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            results = results_of(directory)
            planned = plan(study, preset, {key: result["validation_loss"] for key, result in results.items()})
            for run in planned:
                if run.key in results:
                    _check(run, results[run.key], directory)
            missing = [run for run in planned if run.key not in results]
            busy = {run.key for run in running.values()}
            waiting = [run for run in missing if run.key not in busy]
            if any(run.source == SMOLLM2 for run in missing):
                real_model.fetch(REAL)
            is_over = end is not None and time.monotonic() > end
            while waiting and len(running) < workers and not is_over:
                run = waiting.pop(0)
                running[pool.submit(_in_process, run, corpus, threads)] = run
            if not running:
                return len(missing)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run, result = running.pop(future), future.result()
                temporary = directory / f".{run.key}.tmp"
                temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                temporary.replace(directory / f"{run.key}.json")
                report(f"{study} {run.key}: {result['validation_loss']:.4f} in {result['seconds']:.0f} s")


def _check(run: Run, result: dict[str, Any], directory: Path) -> None:
    """Refuses a result that the plan has under other conditions now."""
    for name in CONDITIONS:
        if result[name] != getattr(run, name):
            raise TrainingError(
                f"{directory / run.key}.json has {name} {result[name]}, and the plan has {getattr(run, name)}. "
                "Remove it, and the run is done again."
            )


def _versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _in_process(run: Run, corpus: Corpus, threads: int) -> dict[str, Any]:
    request = {
        "run": asdict(run),
        "corpus": {**asdict(corpus), "training": str(corpus.training), "validation": str(corpus.validation)},
    }
    environment = ALLOCATION | os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "attnres.training.experiments.one"]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise TrainingError(f"The run {run.key} of {run.study} failed: {reason[0]}")
    return json.loads(process.stdout.splitlines()[-1])

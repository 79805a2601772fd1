"""What stands between a machine and a benchmark, in one line, with the command that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, get_token
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from ..configuration_attnres import AttnResError
from .suites import Benchmark
from .tasks import load, task_manager

# Data sets whose terms have to be accepted on their page. Offline, the Hub cannot say so.
GATED = ("Idavidrein/gpqa",)


@dataclass(frozen=True)
class Access:
    """Whether a benchmark can be run here.

    Attributes:
        benchmark: which.
        tasks: its tasks, loaded; `None` if it cannot be run.
        problem: what is missing; empty if nothing is.
        remedy: the command that mends it; empty if the problem says so itself.
    """

    benchmark: Benchmark
    tasks: TaskDict | None
    problem: str = ""
    remedy: str = ""

    @property
    def line(self) -> str:
        """All of it in one line."""
        state = self.problem or "ready"
        return f"{self.benchmark.task}: {state}" + (f". To mend it: {self.remedy}" if self.remedy else "")


def check(benchmarks: Iterable[Benchmark], unsafe_code: bool = False, data: Path | None = None) -> list[Access]:
    """Loads each benchmark as a run would, with its data, which are then cached; needs no model.

    Args:
        benchmarks (iterable of `Benchmark`): what to load.
        unsafe_code (`bool`, *optional*, defaults to `False`): run what a model wrote where there is no sandbox too.
        data (`Path`, *optional*): directory of data sets, each in a folder of its name on the Hub.

    Returns:
        `list[Access]`: one for each benchmark.
    """
    found = []
    for benchmark in benchmarks:
        try:
            found.append(Access(benchmark, load(benchmark, unsafe_code, data)))
        except Exception as error:  # a task that fails is reported, and the others run
            found.append(Access(benchmark, None, *explain(error, benchmark)))
    return found


def explain(error: Exception, benchmark: Benchmark) -> tuple[str, str]:
    """What an error while loading a benchmark means, and what to do about it.

    Args:
        error (`Exception`): what [`load`] raised.
        benchmark (`Benchmark`): what was being loaded.

    Returns:
        `tuple[str, str]`: the problem and the remedy, each one line; the remedy is empty if the error says it itself.
    """
    dataset = _dataset(task_manager(benchmark.folders), benchmark.task)
    page = f"https://huggingface.co/datasets/{dataset}"
    fetch = f"attnres eval --check --tasks {benchmark.task}"
    gated = f"accept its terms at {page}, then: hf auth login" + ("" if get_token() else " (there is no token yet)")
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AttnResError):
        return message, ""
    if isinstance(error, ImportError):
        return f"a package is missing ({message[:200]})", 'from a clone of the repository: pip install ".[eval]"'
    if isinstance(error, DatasetNotFoundError) and "gated" in message:
        return f"data set {dataset} is gated", gated
    if isinstance(error, DatasetNotFoundError):
        return f"data set {dataset} is not on the Hub, or private", "hf auth login"
    if isinstance(error, ConnectionError) or "offline" in message.lower():
        terms = f" (it is gated: {gated})" if dataset in GATED else ""
        if constants.HF_HUB_OFFLINE or datasets_config.HF_HUB_OFFLINE:
            return f"data set {dataset} is not cached, and HF_HUB_OFFLINE is set{terms}", f"HF_HUB_OFFLINE=0 {fetch}"
        download = f"hf download {dataset} --repo-type dataset --local-dir DIR/{dataset}"
        copy = f"where there is one, run: {download}; bring DIR here, and give --data DIR"
        return f"data set {dataset} is not cached, and there is no network{terms}", copy
    return f"{type(error).__name__}: {message[:200]}", f"attnres --debug eval --check --tasks {benchmark.task}"


def _dataset(manager: TaskManager, name: str) -> str | None:
    """The data set of a task on the Hub, or of the first task of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return None
    config = entry.cfg or {}
    children = config.get("task") if isinstance(config.get("task"), list) else sorted(entry.tags if not config else ())
    if children:
        return _dataset(manager, children[0] if isinstance(children[0], str) else children[0]["task"])
    return config.get("dataset_path")

"""Which benchmarks are run, how, and what the paper scored on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..configuration_attnres import AttnResError


class EvaluationError(AttnResError):
    """An evaluation cannot be run as asked."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it is run here.

    Attributes:
        name: what people call it.
        task: task or group of lm-evaluation-harness, or of `attnres.eval.tasks`.
        metric, filter: which of the task's scores counts; `None` stands for all of them.
        folders: where the harness defines it, so that not all of its 14,000 files are read; `None`: anywhere.
        num_fewshot: examples in the prompt; `None` leaves it to the task.
        paper: scores of the paper's baseline and AttnRes models, in percent.
        is_core: belongs to `core`, and has an offline miniature in `sample`.
        is_sample: is such a miniature.
    """

    name: str
    task: str
    metric: str | None = None
    filter: str | None = None
    folders: tuple[str, ...] | None = None
    num_fewshot: int | None = None
    paper: tuple[float, float] | None = None
    is_core: bool = False
    is_sample: bool = False

    def sample(self) -> Benchmark:
        """The same over a dozen questions of our own; the paper's scores are no comparison then."""
        return replace(self, task=f"sample_{self.task}", paper=None, is_sample=True)


# The rows of the paper's main-model table (Kimi Linear 48B), and MATH-500. Where the paper states no shots, the
# common number: docs/evaluation.md says which is which.
BENCHMARKS = (
    Benchmark("MMLU", "mmlu", "acc", "none", ("mmlu/default",), 5, (73.5, 74.6), is_core=True),
    Benchmark("MMLU-Pro", "mmlu_pro", "exact_match", "custom-extract", ("mmlu_pro",), 5, (52.2, 52.2)),
    Benchmark(
        "GPQA-Diamond", "gpqa_diamond_zeroshot", "acc", "none", ("gpqa/zeroshot",), 0, (36.9, 44.4), is_core=True
    ),
    Benchmark("BBH", "bbh_cot_fewshot", "exact_match", "get-answer", ("bbh/cot_fewshot",), 3, (76.3, 78.0)),
    Benchmark("ARC-Challenge", "arc_challenge", "acc_norm", "none", ("arc",), 25, (64.6, 65.7)),
    Benchmark("HellaSwag", "hellaswag", "acc_norm", "none", ("hellaswag",), 10, (83.2, 83.4)),
    Benchmark("TriviaQA", "triviaqa", "exact_match", "remove_whitespace", ("triviaqa",), 5, (69.9, 71.8)),
    Benchmark("GSM8K", "gsm8k", "exact_match", "flexible-extract", ("gsm8k",), 5, (81.7, 82.4)),
    Benchmark("MGSM", "mgsm_native_cot", "exact_match", "flexible-extract", ("mgsm/native_cot",), 8, (64.9, 66.1)),
    Benchmark(
        "Math (Minerva)",
        "minerva_math",
        "math_verify",
        "none",
        ("minerva_math", "benchmarks"),
        4,
        (53.5, 57.1),
        is_core=True,
    ),
    Benchmark("MATH-500", "minerva_math500", "math_verify", "none", ("minerva_math",), 4, is_core=True),
    Benchmark("CMath", "cmath", "exact_match", "none", (), 4, (84.7, 85.1)),
    Benchmark("HumanEval", "humaneval", "pass@1", "create_test", ("humaneval",), 0, (59.1, 62.2), is_core=True),
    Benchmark("MBPP", "mbpp", "pass_at_1", "none", ("mbpp",), 3, (72.0, 73.9)),
    Benchmark("CMMLU", "cmmlu", "acc", "none", ("cmmlu",), 5, (82.0, 82.9)),
    Benchmark("C-Eval", "ceval-valid", "acc", "none", ("ceval",), 5, (79.6, 82.5)),
)
SUITES = {
    "core": tuple(b for b in BENCHMARKS if b.is_core),
    "paper": tuple(b for b in BENCHMARKS if b.paper),
    "sample": tuple(b.sample() for b in BENCHMARKS if b.is_core),
}


def select(tasks: str | Sequence[str]) -> list[Benchmark]:
    """The benchmarks that `tasks` names: `"core"`, `"paper"`, `"sample"`, and names of tasks, with commas between.

    A task that is one of `BENCHMARKS` is run as that; any other as the harness defines it, all its scores reported.
    """
    known = {b.task: b for b in (*BENCHMARKS, *SUITES["sample"])}
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    selected: dict[str, Benchmark] = {}
    for name in filter(None, (name.strip() for name in names)):
        for benchmark in SUITES.get(name) or [known.get(name, Benchmark(name, name))]:
            selected[benchmark.task] = benchmark
    if not selected:
        raise EvaluationError("no tasks are named; give core, paper, sample, or names of tasks, with commas between.")
    return list(selected.values())

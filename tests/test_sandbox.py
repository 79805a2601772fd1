"""Programs of models are run and scored without trust in them."""

# ruff: noqa: E501  (programs, one a line)

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import pytest
from code_problems import GOOD, HUMAN_EVAL, MBPP, TESTS, require_sandbox

from attnres import AttnResError
from attnres.eval import sandbox
from attnres.eval.sandbox import (
    Limits,
    Outcome,
    SandboxUnavailableError,
    backend,
    check,
    check_many,
    pass_at_k,
    pass_at_k_score,
)

PROGRAMS = [
    (problem["prompt"] + problem[kind], f"{problem['test']}\ncheck({problem['entry_point']})", kind[0] == "c")
    for problem in HUMAN_EVAL
    for kind in ("canonical_solution", "broken_solution")
] + [
    (problem[kind], "\n".join(problem["test_list"]), kind == "code") for problem in MBPP for kind in ("code", "broken")
]


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    require_sandbox()


# ---- the benchmarks' programs ----------------------------------------------------------------------------------------


def test_canonical_solutions_pass_and_broken_ones_fail() -> None:
    outcomes = check_many([program[:2] for program in PROGRAMS])
    assert [outcome.passed for outcome in outcomes] == [passes for *_, passes in PROGRAMS], outcomes


def test_agrees_with_plain_execution_in_one_namespace() -> None:
    for candidate, tests, passes in PROGRAMS:
        code = f"{candidate}\n{tests}"
        run = subprocess.run([sys.executable, "-c", f"exec({code!r}, {{}})"], capture_output=True)
        assert (run.returncode == 0) == passes, run.stderr


@pytest.mark.parametrize(
    ("candidate", "tests", "status"),
    [
        ("from fractions import Fraction\ndef f():\n    return Fraction(1, 2)", "assert f() == 0.5", "passed"),
        ("from decimal import Decimal\ndef f():\n    return [Decimal('1.5')]", "assert f() == [1.5]", "passed"),
        ("from collections import deque\ndef f():\n    return deque([1])", "assert f() != [1] == list(f())", "passed"),
        ("def f(x):\n    return {(1, frozenset({2})): [x, bytearray(x)]}", "assert f(b'1')[1, frozenset({2})][0] == b'1'", "passed"),
        ("def f():\n    return float('inf'), -0.0, range(3)", "assert str(f()) == '(inf, -0.0, range(0, 3))'", "passed"),
        ("from enum import IntEnum\nclass E(IntEnum):\n    A = 3\nf = lambda: E.A", "assert f() == 3", "passed"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int", "assert str(P(3)) == 'P(x=3)'", "passed"),
        ("LIMIT = [1, 2]\ndef f():\n    return '\\ud800\\0'", "assert f() == '\\ud800\\0' and LIMIT[1] == 2", "passed"),
        ("def f(n):\n    return n and f(n - 1)", "f(10 ** 5)", "failed"),
        ("import math\ndef f():\n    return math", "assert f().sqrt(math.pi ** 2) == math.pi", "passed"),
        ("def f():\n    return lambda x: x + 1", "assert f()(1) == 2 and callable(f)", "passed"),
        ("def f():\n    return 1", "assert g() == 1", "failed"),
        ("def f():\n    return (", "assert True", "failed"),
        ("f = 1\0", "assert True", "failed"),
        ("if __name__ == '__main__':\n    raise SystemExit\ndef f():\n    return input()", "f()", "failed"),
        ("f = 1", "this is no Python", "failed"),
        ("f = lambda: b'\\xff'.decode()", "try:\n    f()\nexcept ValueError as error:\n    assert '0xff' in str(error)", "passed"),
        ("def f(): raise ExceptionGroup('several', [ValueError()])", "f()", "failed"),
        ("import itertools\nf = itertools.count", "assert next(iter(f(3))) == 3 and bool(f())", "passed"),
        ("def f():\n    raise KeyError('k')", "try:\n    f()\nexcept LookupError as error:\n    assert error.args == ('k',) or True", "passed"),
    ],
)  # fmt: skip
def test_what_passes_between_the_sides(candidate: str, tests: str, status: str) -> None:
    assert check(candidate, tests).status == status


def test_numpy_where_it_is_installed() -> None:
    pytest.importorskip("numpy")
    candidate = "import numpy as np\ndef f(x):\n    return np.float64(x), np.int64(x), np.bool_(x), np.full(2, x)\n"
    tests = "a, b, c, d = f(1)\nassert (a, b, c) == (1.0, 1, True) and list(d) == [1, 1] and len(d) == 2"
    assert check(candidate, tests) == Outcome(True, "passed", "")


def test_numpy_arrays_are_read_item_by_item() -> None:
    pytest.importorskip("numpy")
    tests = "import numpy\nassert numpy.allclose(f(), [[1, 2], [3, 4]]) and numpy.asarray(f()).shape == (2, 2)"
    assert check("import numpy as np\nf = lambda: np.arange(1, 5).reshape(2, 2)", tests) == Outcome(True, "passed", "")
    pointer = "class P:\n    __array_interface__ = dict(data=(8, False), shape=(9,), typestr='<f8', version=3)\nf = P"
    assert check(pointer, "import numpy\nnumpy.asarray(f()).sum()\nassert f() is None").status == "failed"


def test_tests_that_swallow_everything_do_not_pass() -> None:
    swallow = "try:\n    f()\nexcept:\n    pass"
    assert check("import os\ndef f(): os._exit(0)", swallow).status == "exited"
    assert check("def f():\n    while True: pass", swallow, Limits(seconds=1)).status == "timeout"


def test_a_caller_that_has_many_files_open() -> None:
    with ExitStack() as stack:
        for _ in range(2 * Limits().open_files):
            stack.enter_context(open(os.devnull))
        assert check(GOOD, TESTS) == Outcome(True, "passed", "")


def test_order_is_kept() -> None:
    programs = [(f"import time\ntime.sleep({(5 - i) / 10})\nx = {i}", f"raise Exception(x == {i})") for i in range(5)]
    assert [outcome.detail for outcome in check_many(programs, workers=5)] == ["Exception: True"] * 5


# ---- where there is no sandbox ---------------------------------------------------------------------------------------


@pytest.fixture
def no_memory_of_trials() -> Iterator[None]:
    """Has the trial of the sandbox run again, in a test and after it."""
    sandbox._unavailable.cache_clear()
    yield
    sandbox._unavailable.cache_clear()


@pytest.mark.usefixtures("no_memory_of_trials")
@pytest.mark.parametrize("missing", ["bubblewrap", "libseccomp", "pyseccomp", "namespaces", "Linux"])
def test_refusal_without_a_sandbox(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"no {missing} today"

    def raises(error: Exception) -> Callable[..., NoReturn]:
        def function(*_: object) -> NoReturn:
            raise error

        return function

    if missing == "bubblewrap":
        monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
        said = "bubblewrap is not installed"
    elif missing == "Linux":
        monkeypatch.setattr(sandbox.sys, "platform", "darwin")
        said = "this is not Linux"
    elif missing == "namespaces":
        monkeypatch.setattr(sandbox, "_bubblewrap", lambda mounts, user: ["--unshare-nothing-of-this-name"])
        said = "bwrap: Unknown option --unshare-nothing-of-this-name"
    else:
        error = RuntimeError(said) if missing == "libseccomp" else ImportError(said)
        monkeypatch.setattr(sandbox.sandbox_seccomp, "bpf", raises(error))
    with pytest.raises(SandboxUnavailableError, match=f"{said}.*apt-get install bubblewrap.*--unsafe-code"):
        check(GOOD, TESTS)
    assert issubclass(SandboxUnavailableError, AttnResError)
    assert backend(unsafe=True) == "unsafe"


def test_unsafe_runs_have_limits_and_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_unavailable", lambda name: "not today")
    programs = [program[:2] for program in PROGRAMS[-4:]] + [
        ("x = bytearray(10 * 2**30)", ""),
        ("while True: pass", ""),
    ]
    outcomes = check_many(programs, Limits(seconds=2), unsafe=True)
    assert [outcome.status for outcome in outcomes] == ["passed", "failed"] * 2 + ["memory", "timeout"]


@pytest.mark.parametrize(
    "step", ["mount", "capset", "syscall", "prctl", "setresuid", "setresgid", "setgroups", "setrlimit"]
)
def test_a_step_of_the_isolation_that_fails_is_a_refusal(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sandbox.RUNNER.read_text()
    if step in ("mount", "capset", "syscall", "prctl"):
        where, fails = (
            "    import ctypes\n",
            f"    import ctypes\n    if function == {step!r}: raise OSError('no luck')\n",
        )
    else:
        if step != "setrlimit" and os.geteuid():
            pytest.skip("only root becomes another user")
        module = "resource" if step == "setrlimit" else "os"
        where = "def libc("
        fails = f"def fails(*_): raise OSError('no luck')\n{module}.{step} = fails\ndef libc("
    changed = source.replace(where, fails, 1)
    assert changed != source
    (tmp_path / "runner.py").write_text(changed)
    monkeypatch.setattr(sandbox, "RUNNER", tmp_path / "runner.py")
    with pytest.raises(SandboxUnavailableError, match="no luck"):
        sandbox._run("bubblewrap", GOOD, TESTS, Limits())


@pytest.mark.parametrize("user", [None, 0x70000001])
def test_bubblewrap_arguments(user: int | None) -> None:
    arguments = sandbox._bubblewrap({"/opt/python": "/real/python", "/dev/null": "/dev/null"}, user)
    line = " ".join(arguments)
    for wanted in (
        "--die-with-parent --new-session --unshare-ipc --unshare-pid --unshare-net --unshare-uts",
        "--cap-drop ALL",
        "--dir /dev --dir /opt --dir /scratch --ro-bind /real/python /opt/python --dev-bind /dev/null /dev/null",
        "--remount-ro / --chdir /scratch --",
    ):
        assert wanted in line
    assert ("--unshare-user" in line) == (user is None)
    assert line.count("--cap-add") == (1 if user is None else 3)
    assert "--proc" not in line


@pytest.mark.parametrize(
    ("user", "map_of_users", "own"),
    [
        (0, "         0          0 4294967295\n", True),
        (0, "         0       1000          1\n", False),
        (0, "         0     100000      65536\n", False),
        (0, "         0          0      65536\n", False),
        (1000, "         0          0 4294967295\n", False),
        (1000, "      1000       1000          1\n", False),
    ],
)
def test_root_runs_each_as_a_user_of_its_own(
    user: int, map_of_users: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: user)
    monkeypatch.setattr(sandbox.Path, "read_text", lambda path: map_of_users)
    users = {sandbox._unused_user() for _ in range(20)}
    if own:
        assert len(users) > 15
        assert all(other in sandbox.UNUSED_USERS for other in users)
    else:
        assert users == {None}


def test_what_a_sandbox_sees() -> None:
    seen = sandbox._mounts()
    assert not {"/", "/home", "/etc", "/proc", "/sys", "/tmp", str(Path.home())} & {*seen, *seen.values()}
    assert all(any(Path(prefix).is_relative_to(path) for path in seen) for prefix in (sys.prefix, sys.base_prefix))


# ---- pass@k ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_the_papers_product() -> None:
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 300)
        c, k = rng.randint(0, n), rng.randint(1, n)
        product = 1.0
        for i in range(n - c + 1, n + 1):
            product *= 1 - k / i
        assert pass_at_k(n, c, k) == pytest.approx(1 if n - c < k else 1 - product, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_what_has_no_meaning(n: int, c: int, k: int) -> None:
    with pytest.raises(AttnResError, match="pass@k"):
        pass_at_k(n, c, k)


def test_scores() -> None:
    bad = "def f(x):\n    return x\n"
    score = pass_at_k_score([TESTS, TESTS], [[GOOD, bad, bad], [bad, GOOD, GOOD]], [1, 2, 5])
    assert score == pytest.approx({"pass@1": (1 / 3 + 2 / 3) / 2, "pass@2": (2 / 3 + 1) / 2})
    assert pass_at_k_score(["assert add(2, 3)==5"], [["def add(a,b): return a*b"]], k=1) == {"pass@1": 0.0}
    assert json.dumps(pass_at_k_score([TESTS], [[GOOD]])) == '{"pass@1": 1.0}'
    with pytest.raises(AttnResError, match="lists of candidates"):
        pass_at_k_score([TESTS], [])

"""Programs of models are run and scored without trust in them."""

# ruff: noqa: E501  (programs, one a line)

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import psutil
import pytest
from code_problems import HUMAN_EVAL, MBPP

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

GOOD = "def f(x):\n    return 7 * x + 3\n"
TESTS = """
def check(candidate):
    for x in (1, 20, 300):
        assert candidate(x) == 7 * x + 3
    assert len([candidate(x) for x in range(3)]) == 3

check(f)
"""
PROGRAMS = [
    (problem["prompt"] + problem[kind], f"{problem['test']}\ncheck({problem['entry_point']})", kind[0] == "c")
    for problem in HUMAN_EVAL
    for kind in ("canonical_solution", "broken_solution")
] + [
    (problem[kind], "\n".join(problem["test_list"]), kind == "code") for problem in MBPP for kind in ("code", "broken")
]


@pytest.fixture(params=sandbox.SANDBOXES)
def each_sandbox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    reason = sandbox._unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(sandbox, "SANDBOXES", (request.param,))
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _any_sandbox() -> None:
    try:
        backend()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))


# ---- the benchmarks' programs ----------------------------------------------------------------------------------------


def test_canonical_solutions_pass_and_broken_ones_fail(each_sandbox: str) -> None:
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


# ---- hostile programs ------------------------------------------------------------------------------------------------

RETURNS_NOTHING = "\ndef f(x):\n    return 0\n"
HOSTILE = {
    "endless loop": ("while True: pass", "timeout"),
    "endless loop in the call": ("def f(x):\n    while True: pass", "timeout"),
    "sleeps": ("import time\ntime.sleep(1000)", "timeout"),
    "endless loop that catches everything": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *a: None)\n    except Exception: pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "fork bomb by shell": ("import subprocess\nsubprocess.run(':(){ :|:& };:', shell=True)", "failed"),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        "failed",
    ),
    "allocates 10 GB": ("x = bytearray(10 * 2**30)", "memory"),
    "allocates 10 GB bit by bit": ("x = []\nwhile True: x.append(bytearray(2**24))", "memory"),
    "allocates 10 GB in the call": ("def f(x):\n    return 'x' * 10 * 2**30", "memory"),
    "answers with more than may be": ("def f(x):\n    return 'x' * 2**26", "failed"),
    "answers that grow": ("def f(x):\n    def g():\n        while True: yield 'x' * 2**20\n    return g()", "failed"),
    "writes outside": ("open(OUTSIDE + '/written', 'w')", "failed"),
    "writes into the interpreter": ("import json\nopen(json.__file__, 'a')", "failed"),
    "links outside": ("import os\nos.symlink(OUTSIDE, 'link')\nopen('link/written', 'w')", "failed"),
    "fills the disk": (
        "i = 0\nwhile True:\n    i += 1\n    with open(f'file{i}', 'wb') as file: file.write(bytes(2**20))",
        "failed",
    ),
    "writes a huge file": ("with open('file', 'wb') as file:\n    while True: file.write(bytes(2**20))", "failed"),
    "opens files without end": ("x = []\nwhile True: x.append(open('/dev/null'))", "failed"),
    "reads the home directory": ("import os\nraise OSError(str(os.listdir(HOME)))", "failed"),
    "reads a file of the user's": ("raise OSError(open(OUTSIDE + '/secret').read())", "failed"),
    "reads the environment": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
        "raise OSError(f'{dict(os.environ)} {libc.getenv(b\"ATTNRES_SECRET\")}')",
        "failed",
    ),
    "reads /proc": ("raise OSError(open('/proc/1/environ').read() + open('/proc/self/cmdline').read())", "failed"),
    "opens a socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT)).send(b'x')", "failed"),
    "asks a name server": ("import socket\nsocket.getaddrinfo('example.org', 80)", "failed"),
    "sends a datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "failed",
    ),
    "opens an abstract socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT)", "failed"),
    "signals its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + RETURNS_NOTHING, "failed"),
    "signals everyone": ("import os, signal\nos.kill(-1, signal.SIGKILL)" + RETURNS_NOTHING, None),
    "signals a process outside": ("import os, signal\nos.kill(VICTIM, signal.SIGKILL)", "failed"),
    "double fork": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)"
        + RETURNS_NOTHING,
        "failed",
    ),
    "leaves a daemon behind and exits": (
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', MARK], start_new_session=True)\n"
        "os._exit(0)",
        "exited",
    ),
    "fork that returns twice": ("import os\nos.fork()" + RETURNS_NOTHING, "failed"),
    "fork that returns twice, right once": (
        "import os\ndef f(x):\n    if os.fork() == 0: return 10\n    os.wait()\n    return 143",
        None,
    ),
    "closes stdout": ("import sys\nsys.stdout.close()\nsys.stderr.close()" + RETURNS_NOTHING, "failed"),
    "closes all files": ("import os\nos.closerange(0, 1000)" + RETURNS_NOTHING, "exited"),
    "sys.exit(0) before the tests": ("import sys\nsys.exit(0)", "exited"),
    "os._exit(0) before the tests": ("import os\nos._exit(0)", "exited"),
    "sys.exit(0) in the call": ("import sys\ndef f(x): sys.exit(0)", "exited"),
    "os._exit(0) in the call": ("import os\ndef f(x): os._exit(0)", "exited"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", "exited"),
    "exit at exit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", "exited"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "exited"),
    "overflows the stack": ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: f(x)", None),
    "is no end of parentheses": ("(" * 10**6, None),
    "exception that cannot be shown": (
        "class E(BaseException):\n    def __str__(self): raise self\ndef f(x): raise E",
        None,
    ),
    "redefines the tests' names": (
        "METADATA = {}\ncandidate = range = lambda *a: []\ndef check(candidate): pass" + RETURNS_NOTHING,
        "failed",
    ),
    "redefines the checker's names": (
        "import __main__\nfor name in list(vars(__main__)):\n    if name not in ('serve', 'Channel', 'encode', 'decode')"
        " and name[0] != '_': setattr(__main__, name, lambda *a, **k: ('passed', ''))" + RETURNS_NOTHING,
        None,
    ),
    "patches AssertionError": (
        "import builtins\nclass Fine(Exception):\n    def __new__(cls, *a): return None\n"
        "AssertionError = builtins.AssertionError = Fine" + RETURNS_NOTHING,
        "failed",
    ),
    "patches the builtins": (
        "import builtins\nfor name in ('abs', 'len', 'all', 'any', 'range', 'list', 'exec', 'compile', 'getattr'):\n"
        "    setattr(builtins, name, lambda *a, **k: ())" + RETURNS_NOTHING,
        None,
    ),
    "raises what tests may catch": ("def f(x): raise StopIteration", "failed"),
    "equals everything": (
        "class All:\n    __eq__ = __ne__ = lambda *a: True\n    __hash__ = None\ndef f(x): return All()",
        "failed",
    ),
    "equals every number": ("class All(int):\n    __eq__ = lambda *a: True\ndef f(x): return All()", "failed"),
    "claims to be another class": (
        "class All:\n    __class__ = int\n    __eq__ = lambda *a: True\ndef f(x): return All()",
        None,
    ),
    "prints gigabytes": ("while True: print('x' * 2**20)", "failed"),
    "prints gigabytes past print": (
        "import os\nwhile True:\n    for fd in (1, 2):\n        try: os.write(fd, b'x' * 2**20)\n        except OSError: pass",
        "timeout",
    ),
    "prints that it passed": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'ready\\n[\"passed\", \"\"]\\n')\n    except OSError: pass\n"
        "os._exit(0)",
        "failed",
    ),
    "answers before it is asked": (
        "import os\nfor fd in range(3, 64):\n    for i in range(9):\n"
        "        try: os.write(fd, b'{\"id\": %d, \"value\": true}\\n' % i)\n        except OSError: pass\nos._exit(0)",
        "failed",
    ),
    "answers nonsense": (
        "import os, sys\nfor fd in range(3, 64):\n    try: os.write(fd, b'[[[[1e999\\n' * 9)\n    except OSError: pass"
        + RETURNS_NOTHING,
        "failed",
    ),
    "replaces stdout": ("import sys, io\nsys.stdout = sys.__stdout__ = io.StringIO()" + RETURNS_NOTHING, "failed"),
    "walks the frames": (
        "import inspect, sys\ndef f(x):\n    for frame in inspect.stack():\n        names = frame.frame.f_globals\n"
        "        names.update(check=lambda c: None, verdict=('passed', ''), passed=True)\n"
        "        if DRAWKCAB[::-1] in f'{frame.frame.f_locals}{frame.frame.f_globals}': raise OSError('ESCAPED')\n    return 0",
        "failed",
    ),
    "searches the heap": (
        "import gc\ndef f(x):\n    for thing in gc.get_objects():\n"
        "        if getattr(thing, '__name__', '') == 'check': thing.__code__ = (lambda c: None).__code__\n"
        "        if type(thing) in (dict, list, tuple) and DRAWKCAB[::-1] in repr(thing): raise OSError('ESCAPED')\n    return 0",
        None,
    ),
    "reads its memory": ("def f(x):\n    return eval(open('/proc/self/mem').read())", "failed"),
    "traces": (
        "import sys, threading\ndef trace(frame, *a):\n    frame.f_trace_lines = False\n    return trace\n"
        "sys.settrace(trace)\nsys.setprofile(lambda *a: None)\nthreading.settrace(trace)" + RETURNS_NOTHING,
        "failed",
    ),
    "audits": (
        "import sys\ndef hook(event, arguments):\n    if event == 'compile': raise SystemExit(0)\nsys.addaudithook(hook)"
        + RETURNS_NOTHING,
        "failed",
    ),
    "thread that outlives": (
        "import threading, time\ndef work():\n    while True:\n        globals()['check'] = lambda c: None\n"
        "threading.Thread(target=work).start()" + RETURNS_NOTHING,
        "failed",
    ),
    "alarms": ("import signal\nsignal.alarm(1)\nsignal.signal(signal.SIGALRM, lambda *a: 1 / 0)\nwhile True: pass", None),
    "calls the kernel": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\ndone = [name for name, *a in [('unshare', 0x10000000), "
        "('unshare', 0x20000), ('mount', b'tmpfs', b'/scratch', b'tmpfs', 0, None), ('umount2', b'/lib', 2), "
        "('setuid', 0), ('chroot', b'/scratch'), ('ptrace', 16, 1, 0, 0), ('sethostname', b'x', 1), "
        "('mknod', b'/scratch/sda', 0o60600, 0x800)] if getattr(libc, name)(*a) == 0]\n"
        "raise OSError(f'ESCAPED by {done}' if done else 'nothing')",
        "failed",
    ),
    "lifts its limits": (
        "import resource as r\nfor limit in range(16):\n    try: r.setrlimit(limit, (r.RLIM_INFINITY, r.RLIM_INFINITY))\n"
        "    except (OSError, ValueError): continue\n    if limit in (0, 1, 4, 6, 7, 9, 12): raise OSError('ESCAPED')\nx = bytearray(2**31)",
        "memory",
    ),
}  # fmt: skip


def test_hostile_programs_neither_pass_nor_harm(
    each_sandbox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("SECRET of a file")
    monkeypatch.setenv("ATTNRES_SECRET", "SECRET of the environment")
    abstract = f"\0attnres-{os.getpid()}"
    limits = Limits(seconds=1.2 + os.getpid() * 1e-9)  # its digits mark the processes of this run
    mark = repr(limits.seconds)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
        subprocess.Popen(["sleep", "1000"]) as victim,
    ):
        local.bind(abstract)
        local.listen()
        known = dict(OUTSIDE=str(tmp_path), HOME=str(Path.home()), VICTIM=victim.pid, ABSTRACT=abstract, MARK=mark)
        known["DRAWKCAB"] = TESTS.splitlines()[3].strip()[::-1]  # what a candidate must not find
        known["PORT"] = server.getsockname()[1]
        preamble = "".join(f"{name} = {value!r}\n" for name, value in known.items())
        programs = [(preamble + candidate, TESTS) for candidate, _ in HOSTILE.values()]
        try:
            outcomes = dict(zip(HOSTILE, check_many(programs, limits, workers=4)))
            assert victim.poll() is None
        finally:
            victim.kill()
        for listener in (server, local):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()

    assert [name for name, outcome in outcomes.items() if outcome.passed] == []
    unexpected = {
        name: outcomes[name]
        for name, (_, status) in HOSTILE.items()
        if status and outcomes[name].status not in (status, "timeout")  # on a slow machine
    }
    assert not unexpected
    details = " ".join(outcome.detail for outcome in outcomes.values())
    assert "SECRET" not in details
    assert "ESCAPED" not in details
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    deadline = time.monotonic() + 10
    while left := [process for process in psutil.process_iter(["cmdline"]) if mark in str(process.info["cmdline"])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert check(GOOD, TESTS) == Outcome(True, "passed", "")


def test_tests_that_swallow_everything_do_not_pass() -> None:
    swallow = "try:\n    f()\nexcept:\n    pass"
    assert check("import os\ndef f(): os._exit(0)", swallow).status == "exited"
    assert check("def f():\n    while True: pass", swallow, Limits(seconds=1)).status == "timeout"


def test_order_is_kept() -> None:
    programs = [(f"import time\ntime.sleep({(5 - i) / 10})\nx = {i}", f"raise Exception(x == {i})") for i in range(5)]
    assert [outcome.detail for outcome in check_many(programs, workers=5)] == ["Exception: True"] * 5


# ---- where there is no sandbox ---------------------------------------------------------------------------------------


def test_refusal_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_unavailable", lambda name: f"no {name} today")
    with pytest.raises(SandboxUnavailableError, match=r"no bubblewrap today.*no namespaces today.*--unsafe-code"):
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
    "step", ["unshare", "sethostname", "mount", "pivot_root", "umount2", "syscall", "capset", "prctl"]
)
def test_a_step_of_the_isolation_that_fails_is_a_refusal(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sandbox.RUNNER.read_text()
    changed = source.replace(
        "    import ctypes\n", f"    import ctypes\n    if function == {step!r}: raise OSError('no luck')\n", 1
    )
    assert changed != source
    (tmp_path / "runner.py").write_text(changed)
    monkeypatch.setattr(sandbox, "RUNNER", tmp_path / "runner.py")
    with pytest.raises(SandboxUnavailableError, match="no luck"):
        sandbox._run("namespaces", GOOD, TESTS, Limits())


@pytest.mark.parametrize("root", [False, True])
def test_bubblewrap_arguments(root: bool) -> None:
    arguments = sandbox._bubblewrap({"/opt/python": "/real/python", "/dev/null": "/dev/null"}, 1000, root)
    line = " ".join(arguments)
    for wanted in (
        "--die-with-parent --new-session --unshare-ipc --unshare-pid --unshare-net --unshare-uts",
        "--cap-drop ALL",
        "--dir /dev --dir /opt --dir /jail --ro-bind /real/python /opt/python --dev-bind /dev/null /dev/null",
        "--perms 0777 --size 1000 --tmpfs /scratch --remount-ro / --chdir /scratch --",
    ):
        assert wanted in line
    assert ("--unshare-user --disable-userns" in line) != root
    assert (line.count("--cap-add") == 4) == root
    assert "--proc" not in line


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

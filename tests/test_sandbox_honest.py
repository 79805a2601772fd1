"""Programs that use Python as usual pass in the sandbox as they would outside."""

# ruff: noqa: E501  (programs, one a line)

from __future__ import annotations

import subprocess
import sys

import pytest
from code_problems import require_sandbox

from attnres.eval.sandbox import check_many


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    require_sandbox()


EXPECTED = "try:\n    f()\nexcept {} as error:\n    assert str(error) == {!r}, str(error)\nelse:\n    assert False"
EXCEPTIONS = {
    "a subclass of ValueError": ("class Bad(ValueError): pass\ndef f(): raise Bad('no')", "ValueError", "no"),
    "a subclass of a subclass": ("class A(KeyError): pass\nclass B(A): pass\ndef f(): raise B('k')", "LookupError", "'k'"),
    "a subclass named like a builtin": ("class exec(TypeError): pass\ndef f(): raise exec('no')", "TypeError", "no"),
    "a subclass named like its base": ("class ValueError(ValueError): pass\ndef f(): raise ValueError('no')", "ValueError", "no"),
    "a subclass that says where it is from": ("class Bad(OSError):\n    __module__ = 'builtins'\ndef f(): raise Bad('no')", "OSError", "no"),
    "a subclass of two": ("class Bad(IndexError, RuntimeError): pass\ndef f(): raise Bad('no')", "IndexError", "no"),
    "a subclass with arguments of its own": ("class Bad(ValueError):\n    def __init__(self, a, b): super().__init__(f'{a}{b}')\ndef f(): raise Bad(1, 2)", "ValueError", "12"),
    "a subclass that shows itself": ("class Bad(Exception):\n    def __str__(self): return 'shown'\ndef f(): raise Bad", "Exception", "shown"),
    "an exception of a library": ("import json\ndef f(): json.loads('[')", "ValueError", "Expecting value: line 1 column 2 (char 1)"),
    "an exception of another library": ("import decimal\ndef f(): decimal.Decimal(1) / 0", "ZeroDivisionError", "[<class 'decimal.DivisionByZero'>]"),
    "an error of the system": ("def f(): open('/nowhere')", "FileNotFoundError", "[Errno 2] No such file or directory: '/nowhere'"),
    "an error of text": ("def f(): 'ä'.encode('ascii')", "UnicodeError", "'ascii' codec can't encode character '\\xe4' in position 0: ordinal not in range(128)"),
    "a key": ("def f(): raise KeyError('k')", "KeyError", "'k'"),
    "a key that is no text": ("def f(): return {}[1]", "KeyError", "1"),
    "nothing to say": ("def f(): raise RuntimeError", "RuntimeError", ""),
    "several arguments": ("def f(): raise ValueError('a', 1)", "ValueError", "('a', 1)"),
    "an assertion": ("def f(): assert 1 == 2, 'differs'", "AssertionError", "differs"),
    "the end of an iterator": ("def f(): return next(iter([]))", "StopIteration", ""),
    "too deep": ("def f(): return f()", "RecursionError", "maximum recursion depth exceeded"),
    "a chain": ("def f():\n    try: 1 / 0\n    except ZeroDivisionError as e: raise NotImplementedError('later') from e", "RuntimeError", "later"),
    "a warning": ("class Careful(UserWarning): pass\ndef f(): raise Careful('so')", "Warning", "so"),
}  # fmt: skip
PROGRAMS = {
    "a name": ("f = lambda: __name__ != '__main__'", "f()"),
    "a data class": ("from dataclasses import *\n@dataclass(slots=True, order=True)\nclass P:\n    x: 'int' = 1\nf = lambda: asdict(P(2))", "f() == {'x': 2}"),
    "an enumeration": ("from enum import *\nclass E(Flag):\n    A = auto()\n    B = auto()\nf = lambda: (E.A | E.B).value", "f() == 3"),
    "a named tuple": ("from typing import *\nclass P(NamedTuple):\n    x: int\nf = lambda: P(1)", "f() == (1,)"),
    "pickled objects": ("import pickle\nclass P: x = 3\nf = lambda: pickle.loads(pickle.dumps(P())).x", "f() == 3"),
    "hints of types": ("import typing\nclass P:\n    x: 'P'\nf = lambda: typing.get_type_hints(P)['x'] is P", "f()"),
    "its own module": ("import sys\nx = 5\nf = lambda: sys.modules[__name__].x", "f() == 5"),
    "generic functions": ("import functools\n@functools.singledispatch\ndef f(x): return 'o'\n@f.register\ndef _(x: int): return 'i'", "f(1) + f('') == 'io'"),
    "a log": ("import logging\nlogging.basicConfig()\nlogging.getLogger(__name__).error('x')\nf = lambda: 1", "f() == 1"),
    "threads": ("from concurrent.futures import *\ndef f():\n    with ThreadPoolExecutor(4) as pool: return list(pool.map(abs, range(-9, 0)))", "f() == [9, 8, 7, 6, 5, 4, 3, 2, 1]"),
    "coroutines": ("import asyncio\nasync def g(): await asyncio.sleep(0.01); return 1\nasync def h(): return sum(await asyncio.gather(g(), g()))\nf = lambda: asyncio.run(h())", "f() == 2"),
    "a thread of coroutines": ("import asyncio\nasync def g(): return await asyncio.to_thread(sum, [1, 2])\nf = lambda: asyncio.run(g())", "f() == 3"),
    "another process": ("import subprocess, sys\nf = lambda: subprocess.run([sys.executable, '-c', 'print(6)'], capture_output=True, text=True).stdout", "f() == '6\\n'"),
    "a process of coroutines": ("import asyncio, sys\nasync def g():\n    p = await asyncio.create_subprocess_exec(sys.executable, '-c', 'print(6)', stdout=-1)\n    return (await p.communicate())[0]\nf = lambda: asyncio.run(g())", "f() == b'6\\n'"),
    "a fork": ("import os\ndef f():\n    r, w = os.pipe()\n    if os.fork() == 0: os.write(w, b'x'); os._exit(0)\n    os.wait()\n    return os.read(r, 1)", "f() == b'x'"),
    "files": ("import pathlib, shutil, tempfile\ndef f():\n    with tempfile.TemporaryDirectory() as d:\n        p = pathlib.Path(d, 'a')\n        p.write_text('x')\n        shutil.copy2(p, p.with_name('b'))\n        shutil.copytree(d, d + '2')\n        return sorted(q.name for q in pathlib.Path(d + '2').iterdir())", "f() == ['a', 'b']"),
    "a file written to the disk": ("import os\ndef f():\n    with open('x', 'w') as file:\n        file.write('1')\n        os.fsync(file)\n    os.replace('x', 'y')\n    return os.path.getsize('y')", "f() == 1"),
    "an archive": ("import io, tarfile, zipfile\ndef f():\n    b = io.BytesIO()\n    with zipfile.ZipFile(b, 'w') as z: z.writestr('a', 'x')\n    return zipfile.ZipFile(b).read('a')", "f() == b'x'"),
    "mapped memory": ("import mmap\ndef f():\n    with open('x', 'wb') as file: file.write(b'abc')\n    with open('x', 'r+b') as file, mmap.mmap(file.fileno(), 0) as m: return m[:]", "f() == b'abc'"),
    "a database": ("import sqlite3\nf = lambda: sqlite3.connect(':memory:').execute('select 1 + 1').fetchone()", "f() == (2,)"),
    "a pair of sockets": ("import socket\ndef f():\n    a, b = socket.socketpair()\n    a.sendall(b'x')\n    return b.recv(1)", "f() == b'x'"),
    "a signal": ("import signal, os\nseen = []\nsignal.signal(signal.SIGUSR1, lambda *a: seen.append(1))\ndef f():\n    os.kill(os.getpid(), signal.SIGUSR1)\n    return seen", "f() == [1]"),
    "an alarm": ("import signal, time\ndef stop(*a): raise TimeoutError('late')\nsignal.signal(signal.SIGALRM, stop)\ndef f():\n    signal.setitimer(signal.ITIMER_REAL, 0.01)\n    try: time.sleep(5)\n    except TimeoutError: return 'late'", "f() == 'late'"),
    "random numbers": ("import random, secrets, uuid\nrandom.seed(1)\nf = lambda: (random.random() < 1, len(secrets.token_bytes(4)), uuid.uuid4().version)", "f() == (True, 4, 4)"),
    "hashes": ("import hashlib, zlib\nf = lambda: hashlib.sha256(zlib.compress(b'x')).digest_size", "f() == 32"),
    "dates": ("import datetime as d, zoneinfo\nf = lambda: (d.date(2024, 2, 28) + d.timedelta(2)).isoformat()", "f() == '2024-03-01'"),
    "much output": ("def f():\n    for i in range(100): print('x' * 10**6)\n    return 1", "f() == 1"),
    "output past print": ("import sys, os\ndef f():\n    sys.stderr.write('x' * 10**6)\n    os.write(1, b'x')\n    return sys.stdout.isatty()", "f() is False"),
    "no input": ("import sys\nf = lambda: sys.stdin.read()", "f() == ''"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(5000)\nf = lambda n=3000: n and 1 + f(n - 1)", "f() == 3000"),
    "large numbers": ("import math\nf = lambda: math.factorial(5000)", "f() % 10**9 == 0 and f() // math.factorial(4999) == 5000"),
    "text of all kinds": ("f = lambda: 'ä\\0\\ud800\\U0001f600\\u2028'", "f() == 'ä\\0\\ud800\\U0001f600\\u2028'"),
    "code made of text": ("ns = {}\nexec('def g(): return 4', ns)\nf = lambda: ns['g']() + eval('1')", "f() == 5"),
    "the source of a library": ("import inspect, textwrap\nf = lambda: 'def' in inspect.getsource(textwrap.dedent)", "f()"),
    "numbers of processors": ("import os\nf = lambda: os.cpu_count() > 0 and len(os.sched_getaffinity(0)) > 0", "f()"),
    "caches": ("import functools\n@functools.cache\ndef f(n=90): return n if n < 2 else f(n - 1) + f(n - 2)", "f() == 2880067194370816120"),
    "weak references": ("import gc, weakref\nclass P: pass\ndef f():\n    r = weakref.ref(P())\n    gc.collect()\n    return r()", "f() is None"),
    "a temporary name": ("import tempfile\ndef f():\n    with tempfile.NamedTemporaryFile('w+') as t: t.write('x'); t.seek(0); return t.read()", "f() == 'x'"),
}  # fmt: skip


def test_exceptions_arrive_as_what_they_derive_from() -> None:
    programs = [(source, EXPECTED.format(kind, text)) for source, kind, text in EXCEPTIONS.values()]
    assert failures(EXCEPTIONS.keys(), programs) == {}


def test_usual_programs_pass() -> None:
    programs = [(f"import math\n{source}", f"assert {test}") for source, test in PROGRAMS.values()]
    assert failures(PROGRAMS.keys(), programs) == {}


def test_the_same_programs_fail_where_something_else_is_expected() -> None:
    programs = [(f"import math\n{source}", f"assert not ({test})") for source, test in PROGRAMS.values()]
    programs += [(source, EXPECTED.format(kind, text + "!")) for source, kind, text in EXCEPTIONS.values()]
    assert [outcome.detail[:14] for outcome in check_many(programs)] == ["AssertionError"] * len(programs)


def test_they_pass_outside_too(tmp_path: object) -> None:
    programs = [(source, EXPECTED.format(kind, text)) for source, kind, text in EXCEPTIONS.values()]
    programs += [(f"import math\n{source}", f"assert {test}") for source, test in PROGRAMS.values()]
    names = [*EXCEPTIONS, *PROGRAMS]
    for name, (source, tests) in zip(names, programs):
        code = f"{source}\n{tests}"
        main = f"import sys, types\nm = types.ModuleType('m')\nsys.modules['m'] = m\nexec({code!r}, vars(m))"
        run = subprocess.run(
            [sys.executable, "-c", main], capture_output=True, stdin=subprocess.DEVNULL, cwd=str(tmp_path)
        )
        assert run.returncode == 0, (name, run.stderr[-500:])


def failures(names: object, programs: list[tuple[str, str]]) -> dict[str, object]:
    outcomes = check_many(programs)
    return {name: outcome for name, outcome in zip(names, outcomes) if not outcome.passed}  # type: ignore[call-overload]

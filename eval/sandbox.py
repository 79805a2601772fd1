"""Runs programs that a model wrote, and scores them: pass@k without trust in the programs.

A candidate and its tests run in two sandboxes, joined by nothing but a socket. Each is a process without network, in
a file system that holds the interpreter, read-only, and an empty scratch directory; with limits on time, memory,
processes, open files and output; killed with all it started. [bubblewrap](https://github.com/containers/bubblewrap)
makes it, or Linux namespaces do. The tests get stand-ins for what the candidate defines, and the verdict comes from
their sandbox, in which no line of the candidate is ever executed: see `sandbox_runner.py` and docs/sandbox.md.

>>> from attnres.eval.sandbox import check
>>> check("def add(a, b):\n    return a + b\n", "assert add(2, 3) == 5")
Outcome(passed=True, status='passed', detail='')
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ..configuration_attnres import AttnResError
from .sandbox_runner import JAIL, SCRATCH

RUNNER = Path(__file__).with_name("sandbox_runner.py").resolve()
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
STARTUP_SECONDS = 60
"""How long a sandbox may take to start, beside `Limits.seconds`; on an idle machine it is a tenth of a second."""
DETAIL_CHARACTERS = 500

Backend = Literal["bubblewrap", "namespaces", "unsafe"]
Status = Literal["passed", "failed", "timeout", "memory", "exited"]


class SandboxUnavailableError(AttnResError):
    """There is no sandbox here, or it did not start: says why, and what mends it."""


@dataclass(frozen=True)
class Limits:
    """What a candidate may use; its tests get as much again, in their own sandbox.

    Attributes:
        seconds: wall time for the candidate and its tests together, counted from when both sandboxes are up.
        memory_bytes: address space of each process, so all together at most `processes` times that.
        processes: processes and threads.
        open_files: file descriptors of each process.
        output_bytes: of each file; standard output and error together are one, and so is each answer to the tests.
        scratch_bytes: of the scratch directory.
    """

    seconds: float = 10.0
    memory_bytes: int = 2**30
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 2**24
    scratch_bytes: int = 2**26


@dataclass(frozen=True)
class Outcome:
    """How a candidate fared.

    Attributes:
        passed: whether its tests ran to their end and held.
        status: `"passed"`; `"failed"` (an exception, of the tests or the candidate); `"timeout"`; `"memory"` (the
            exception was a `MemoryError`); `"exited"` (its process ended before its tests did).
        detail: the exception, or what else was the matter; at most 500 characters, empty for a pass.
    """

    passed: bool
    status: Status
    detail: str


def backend(unsafe: bool = False) -> Backend:
    """What candidates run in: the first of bubblewrap and plain namespaces that a trial shows to work here.

    Args:
        unsafe (`bool`, *optional*, defaults to `False`): do without a sandbox where there is none.

    Returns:
        `str`: `"bubblewrap"`, `"namespaces"` or `"unsafe"`. The last is a process of its own with limits on time,
        memory, open files and output, which can read and write whatever its user can, and reach the network.

    Raises:
        SandboxUnavailableError: neither works and `unsafe` is not set; the message says why and what to do.
    """
    reasons = []
    for name in SANDBOXES:
        reason = _unavailable(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if unsafe:
        return "unsafe"
    raise SandboxUnavailableError(
        f"No sandbox for the programs of a model ({'; '.join(reasons)}). Install bubblewrap 0.8 or newer (package "
        "bubblewrap) and allow user namespaces, or use a machine or container that does; or, where nothing can be "
        "harmed, run them without a sandbox: pass unsafe=True (--unsafe-code)."
    )


def check(candidate: str, tests: str, limits: Limits = Limits(), unsafe: bool = False) -> Outcome:
    """Runs a candidate against its tests.

    Args:
        candidate (`str`): source of the program, such as HumanEval's prompt and completion.
        tests (`str`): source that uses what the candidate defines and raises unless it is right: HumanEval's `test`
            and `check(entry_point)`, or MBPP's asserts.
        limits (`Limits`, *optional*): what it may use.
        unsafe (`bool`, *optional*, defaults to `False`): do without a sandbox where there is none.

    Returns:
        [`Outcome`]: whatever the candidate did; it raises nothing here.

    Raises:
        SandboxUnavailableError: there is no sandbox and `unsafe` is not set, or one did not start.
    """
    return _run(backend(unsafe), candidate, tests, limits)


def check_many(
    programs: Sequence[tuple[str, str]],
    limits: Limits = Limits(),
    unsafe: bool = False,
    workers: int | None = None,
) -> list[Outcome]:
    """`check` for many pairs of candidate and tests at a time.

    Args:
        programs (`Sequence[tuple[str, str]]`): pairs of candidate and tests.
        limits (`Limits`, *optional*): what each may use.
        unsafe (`bool`, *optional*, defaults to `False`): do without a sandbox where there is none.
        workers (`int`, *optional*): how many run at a time, by default one for each core.

    Returns:
        `list[Outcome]`: in the order of `programs`.

    Raises:
        SandboxUnavailableError: there is no sandbox and `unsafe` is not set, or one did not start.
    """
    name = backend(unsafe)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: _run(name, program[0], program[1], limits), programs))


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""The unbiased estimate of pass@k, \\(1 - \binom{n-c}{k} / \binom{n}{k}\\) (Chen et al., arXiv 2107.03374, Eq. 1).

    Args:
        n (`int`): candidates that were drawn for a task.
        c (`int`): how many of them pass.
        k (`int`): how many are drawn of these at random: the chance that at least one passes.

    Returns:
        `float`: between 0 and 1.

    Raises:
        AttnResError: not 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise AttnResError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_score(
    references: list[str],
    predictions: list[list[str]],
    k: int | list[int] = [1],  # noqa: B006
    limits: Limits = Limits(),
    unsafe: bool = False,
) -> dict[str, float]:
    """pass@k over tasks, as the metric `code_eval` of the library `evaluate` gives it, from sandboxed runs.

    Args:
        references (`list[str]`): the tests of each task.
        predictions (`list[list[str]]`): the candidates for each task.
        k (`int` or `list[int]`, *optional*, defaults to `[1]`): those larger than a task has candidates are left out.
        limits (`Limits`, *optional*): what each candidate may use.
        unsafe (`bool`, *optional*, defaults to `False`): do without a sandbox where there is none.

    Returns:
        `dict[str, float]`: `"pass@k"` for each k, the mean over the tasks.

    Raises:
        AttnResError: not as many lists of candidates as tests, or none.
        SandboxUnavailableError: there is no sandbox and `unsafe` is not set, or one did not start.
    """
    if len(references) != len(predictions) or not references:
        raise AttnResError(f"{len(predictions)} lists of candidates for the tests of {len(references)} tasks.")
    programs = [(candidate, tests) for tests, drawn in zip(references, predictions) for candidate in drawn]
    outcomes = iter(check_many(programs, limits, unsafe))
    counts = [(len(drawn), sum(next(outcomes).passed for _ in drawn)) for drawn in predictions]
    return {
        f"pass@{size}": sum(pass_at_k(n, c, size) for n, c in counts) / len(counts)
        for size in ([k] if isinstance(k, int) else k)
        if all(n >= size for n, _ in counts)
    }


# ---- one run --------------------------------------------------------------------------------------------------------


def _run(name: Backend, candidate: str, tests: str, limits: Limits) -> Outcome:
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as output:
        sides: dict[str, dict[str, Any]] = {
            "candidate": dict(stdin=theirs, stdout=output),
            "tests": dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[ours.fileno()]),
        }
        started: list[subprocess.Popen[bytes]] = []
        try:
            for role, ends in sides.items():
                started.append(
                    subprocess.Popen(
                        _command(name, role, limits, ours.fileno()),
                        stderr=subprocess.STDOUT,
                        env=_environment(scratch if name == "unsafe" else SCRATCH),
                        cwd=scratch if name == "unsafe" else "/",
                        start_new_session=True,
                        **ends,
                    )
                )
            ours.close()
            theirs.close()
            program = json.dumps({"candidate": candidate, "tests": tests}).encode()
            verdict = _communicate(started[1], program, limits.seconds + STARTUP_SECONDS)
        except OSError as error:
            raise SandboxUnavailableError(f"The sandbox ({name}) did not start: {error}.") from error
        finally:
            for process in started:
                _kill(process)
        return _outcome(name, verdict, output)


def _communicate(process: subprocess.Popen[bytes], program: bytes, seconds: float) -> str:
    try:
        verdict, _ = process.communicate(program, timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        verdict, _ = process.communicate()
    return verdict.decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """A sandbox with all that is in it: its first process takes the others along."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(name: Backend, verdict: str, output: IO[bytes]) -> Outcome:
    ready, *line = verdict.splitlines()[:2] or [""]
    if ready != "ready":  # then no line of the candidate has been executed
        output.seek(0)
        said = (verdict or output.read().decode(errors="replace")).strip() or "it said nothing"
        raise SandboxUnavailableError(f"The sandbox ({name}) did not start: {said.splitlines()[-1]}")
    if not line:
        return Outcome(False, "exited", "the tests' process ran out of time or memory without a verdict")
    status, detail = json.loads(line[0])
    return Outcome(status == "passed", status, detail[:DETAIL_CHARACTERS])


def _environment(scratch: str) -> dict[str, str]:
    """All of it: nothing of the caller's own is passed on."""
    single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return {"HOME": scratch, "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "TMPDIR": scratch, **single}


# ---- the sandboxes --------------------------------------------------------------------------------------------------


def _command(name: Backend, role: str, limits: Limits, descriptor: int) -> list[str]:
    """The command of one side."""
    mounts = _mounts()
    root = os.geteuid() == 0
    request: dict[str, Any] = {
        "role": role,
        "socket": descriptor,
        "seconds": limits.seconds,
        "scratch_bytes": limits.scratch_bytes,
        "limits": {
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "memory_bytes": limits.memory_bytes,
            "processes": limits.processes,
            "open_files": limits.open_files,
            "output_bytes": limits.output_bytes,
        },
        "mounts": mounts if name == "namespaces" else None,
        "jail": name == "namespaces" or (name == "bubblewrap" and root),
        "isolated": name != "unsafe",
    }
    python = [sys.executable, "-I", "-X", "utf8", str(RUNNER), json.dumps(request)]
    if name != "bubblewrap":
        return python
    bwrap = shutil.which("bwrap") or "bwrap"
    return [bwrap, *_bubblewrap(mounts | {str(RUNNER): str(RUNNER)}, limits.scratch_bytes, root), *python]


def _bubblewrap(mounts: dict[str, str], scratch_bytes: int, root: bool) -> list[str]:
    """The arguments of bwrap. The limit on processes does not bind root, so that has to become nobody, by itself."""
    arguments = ["--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    arguments += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if root:
        for capability in ("CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SETUID", "CAP_SETGID"):
            arguments += ["--cap-add", capability]
    else:
        arguments += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    for parent in sorted({str(path) for target in mounts for path in Path(target).parents} - {"/"}) + [JAIL]:
        arguments += ["--dir", parent]  # by itself it makes them for root alone
    for target, source in mounts.items():
        arguments += ["--dev-bind" if target in DEVICES else "--ro-bind", source, target]
    arguments += ["--perms", "0777", "--size", str(scratch_bytes), "--tmpfs", SCRATCH]
    return [*arguments, "--remount-ro", "/", "--chdir", SCRATCH, "--"]


@functools.cache
def _mounts() -> dict[str, str]:
    """What a sandbox sees, read-only: from the paths there to the paths here, without links."""
    interpreter = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)]
    mounts: dict[str, str] = {}
    for path in sorted({*interpreter, *LIBRARIES, *DEVICES}, key=len):
        within = any(os.path.commonpath([path, other]) == other for other in mounts)
        if os.path.exists(path) and not within:
            mounts[path] = os.path.realpath(path)
    return mounts


SANDBOXES: tuple[Backend, ...] = ("bubblewrap", "namespaces")


@functools.cache
def _unavailable(name: Backend) -> str | None:
    """Why a sandbox does not work here, found out by a trial; `None` if it does."""
    if sys.platform != "linux":
        return "needs Linux"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    try:
        outcome = _run(name, "def one():\n    return 1", "assert one() == 1", Limits())
    except SandboxUnavailableError as error:
        return str(error)
    return None if outcome.passed else f"a trial ended with {outcome.status}: {outcome.detail}"

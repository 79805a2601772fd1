"""Runs programs that a model wrote, and scores them: pass@k without trust in the programs.

A candidate and its tests run in two sandboxes, joined by nothing but two pipes. Each is a process without network, in
a file system that holds the interpreter, read-only, and an empty scratch directory; with a filter of system calls, and
limits on time, memory, processes, open files and answers; killed with all it started.
[bubblewrap](https://github.com/containers/bubblewrap) makes it. The tests get stand-ins for what the candidate
defines, and the verdict comes from their sandbox, in which no line of the candidate is ever executed: see
`sandbox_runner.py` and docs/sandbox.md.

>>> from attnres.eval.sandbox import check
>>> check("def add(a, b):\n    return a + b\n", "assert add(2, 3) == 5")
Outcome(passed=True, status='passed', detail='')
"""

from __future__ import annotations

import base64
import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from ..configuration_attnres import AttnResError
from . import sandbox_seccomp
from .sandbox_runner import SCRATCH

RUNNER = Path(__file__).with_name("sandbox_runner.py").resolve()
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
STARTUP_SECONDS = 60
"""How long a sandbox may take to start, beside `Limits.seconds`; on an idle machine it is a tenth of a second."""
DETAIL_CHARACTERS = 500
VERDICT_BYTES = 2**13
"""More than a status and a detail of that many characters take as JSON."""
READY = b"ready\n"
NOBODY = 65534
UNUSED_USERS = range(0x70000000, 0x80000000)
"""User ids that neither distributions nor container managers hand out."""

Backend = Literal["bubblewrap", "unsafe"]
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
        output_bytes: of each file, and of each answer to the tests. What a candidate prints is thrown away.
        scratch_bytes: of the scratch directory.
        scratch_files: files and directories in it.
    """

    seconds: float = 10.0
    memory_bytes: int = 2**30
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 2**24
    scratch_bytes: int = 2**26
    scratch_files: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a candidate fared.

    Attributes:
        passed: whether its tests ran to their end and held.
        status: `"passed"`; `"failed"` (an exception, of the tests or the candidate); `"timeout"`; `"memory"` (the
            exception was a `MemoryError`); `"exited"` (its process ended before its tests did).
        detail: the exception, or what else was the matter; at most 500 characters, which can be printed, and empty
            for a pass.
    """

    passed: bool
    status: Status
    detail: str


def backend(unsafe: bool = False) -> Backend:
    """What candidates run in: bubblewrap, if a trial shows that it works here.

    Args:
        unsafe (`bool`, *optional*, defaults to `False`): do without a sandbox where there is none.

    Returns:
        `str`: `"bubblewrap"` or `"unsafe"`. The latter is a process of its own with limits on time, memory, open files
        and the size of files, which can read and write whatever its user can, and reach the network.

    Raises:
        SandboxUnavailableError: bubblewrap does not work and `unsafe` is not set; the message says why and what to do.
    """
    reason = _unavailable("bubblewrap")
    if reason is None:
        return "bubblewrap"
    if unsafe:
        return "unsafe"
    raise SandboxUnavailableError(
        f"No sandbox for the programs of a model: {reason}. It needs Linux, bubblewrap and libseccomp (Debian and "
        "Ubuntu: apt-get install bubblewrap libseccomp2), pyseccomp (pip install pyseccomp), and namespaces, which "
        "ordinary users may have to be allowed to make. Where nothing can be harmed, run the programs without a "
        "sandbox: pass unsafe=True (--unsafe-code)."
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


@dataclass(frozen=True)
class Run:
    """What a program did.

    Attributes:
        status: `"exited"`, by itself; `"timeout"`; `"output"` (it printed more than it may).
        code: its exit code; `None` unless it exited by itself.
        printed: what it printed, also to standard error.
    """

    status: Literal["exited", "timeout", "output"]
    code: int | None
    printed: str


def run_program(
    program: str,
    arguments: Sequence[str] = (),
    mounts: Mapping[str, str] = {},
    limits: Limits = Limits(),
    unsafe: bool = False,
) -> Run:
    """Runs a program by itself in a sandbox like a candidate's.

    Args:
        program (`str`): its source.
        arguments (`Sequence[str]`, *optional*): its `sys.argv[1:]`.
        mounts (`Mapping[str, str]`, *optional*): further files and directories that it can read: the paths by which it
            sees them, and where they are. Without a sandbox it is given the latter, where an argument is one of the
            former.
        limits (`Limits`, *optional*): what it may use; it may print as many bytes as one file may have.
        unsafe (`bool`, *optional*, defaults to `False`): do without a sandbox where there is none.

    Returns:
        [`Run`]: whatever the program did.

    Raises:
        SandboxUnavailableError: there is no sandbox and `unsafe` is not set, or it did not start.
    """
    name = backend(unsafe)
    if name == "unsafe":
        arguments = [mounts.get(argument, argument) for argument in arguments]
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        request = {"program": program, "arguments": list(arguments)}
        try:
            process = subprocess.Popen(
                _command(name, "program", limits, [], request, mounts),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_environment(scratch if name == "unsafe" else SCRATCH),
                cwd=scratch if name == "unsafe" else "/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxUnavailableError(f"The sandbox ({name}) did not start: {error}.") from error
        stack.callback(_kill, process)
        received = bytearray()
        _receive(process, received, 1, STARTUP_SECONDS, VERDICT_BYTES)
        if not received.startswith(READY):
            said = received.decode(errors="replace").strip() or "it said nothing"
            raise SandboxUnavailableError(f"The sandbox ({name}) did not start: {said.splitlines()[-1]}")
        most = len(READY) + limits.output_bytes
        in_time = _receive(process, received, None, limits.seconds, most)
        printed = bytes(received).removeprefix(READY).decode(errors="replace")
        if not in_time:
            return Run("timeout", None, printed)
        if len(received) >= most:
            return Run("output", None, printed)
        try:
            return Run("exited", process.wait(STARTUP_SECONDS), printed)
        except subprocess.TimeoutExpired:  # it closed its output but still runs
            return Run("timeout", None, printed)


# ---- one run --------------------------------------------------------------------------------------------------------


def _run(name: Backend, candidate: str, tests: str, limits: Limits) -> Outcome:
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        program = stack.enter_context(tempfile.TemporaryFile())
        program.write(json.dumps({"candidate": candidate, "tests": tests}).encode())
        program.seek(0)
        read_end, write_end = os.pipe()
        complaints = stack.enter_context(os.fdopen(read_end, "rb"))
        complains = stack.enter_context(os.fdopen(write_end, "wb"))

        def start(role: str, pipes: list[int], stdin: int | IO[bytes]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                _command(name, role, limits, pipes),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=complains,
                pass_fds=[end for end in pipes if end > 2],
                env=_environment(scratch if name == "unsafe" else SCRATCH),
                cwd=scratch if name == "unsafe" else "/",
                start_new_session=True,
            )
            stack.callback(_kill, process)
            return process

        try:
            theirs = start("candidate", [0, 1], subprocess.PIPE)
            ends = [end for end in (theirs.stdout, theirs.stdin) if end is not None]
            ours = start("tests", [end.fileno() for end in ends], program)
        except OSError as error:
            raise SandboxUnavailableError(f"The sandbox ({name}) did not start: {error}.") from error
        for end in (*ends, complains):
            end.close()
        received = bytearray()
        _receive(ours, received, 1, STARTUP_SECONDS, VERDICT_BYTES)
        if received.startswith(READY):
            in_time = _receive(ours, received, 2, limits.seconds, VERDICT_BYTES)
            return _outcome(bytes(received)) if in_time else Outcome(False, "timeout", f"after {limits.seconds:g} s")
        _kill(theirs)
        _kill(ours)
        # No line of the candidate has been executed.
        said = complaints.read(VERDICT_BYTES).decode(errors="replace").strip() or "it said nothing"
        raise SandboxUnavailableError(f"The sandbox ({name}) did not start: {said.splitlines()[-1]}")


def _receive(
    process: subprocess.Popen[bytes], received: bytearray, lines: int | None, seconds: float, most: int
) -> bool:
    """Reads on until there are so many lines, or `most` bytes, or no more to come; `False` if that takes more than
    `seconds`.

    This is the limit on time: nothing inside a sandbox has a say in it.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (lines is None or received.count(b"\n") < lines) and len(received) < most:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return False
            part = os.read(process.stdout.fileno(), VERDICT_BYTES)
            if not part:
                break
            received += part
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """A sandbox with all that is in it: its first process takes the others along."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _outcome(received: bytes) -> Outcome:
    """What the tests' process says after `ready`. Whatever it says, the other candidates go on."""
    verdict = received.removeprefix(READY)
    if not verdict:
        return Outcome(False, "exited", "the tests' process ended without a verdict")
    try:
        status, detail = json.loads(verdict)
        if status not in get_args(Status) or not isinstance(detail, str):
            raise ValueError(status)
    except (ValueError, TypeError, RecursionError):
        return Outcome(False, "failed", f"the tests' process gave no verdict, but {verdict[:100]!r}")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in detail)
    return Outcome(status == "passed", status, shown[:DETAIL_CHARACTERS])


def _environment(scratch: str) -> dict[str, str]:
    """All of it: nothing of the caller's own is passed on."""
    single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return {"HOME": scratch, "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "TMPDIR": scratch, **single}


# ---- the sandbox ----------------------------------------------------------------------------------------------------


def _command(
    name: Backend,
    role: str,
    limits: Limits,
    pipes: list[int],
    request: Mapping[str, Any] = {},
    mounts: Mapping[str, str] = {},
) -> list[str]:
    """The command of one side, or of a program by itself."""
    user = _unused_user() if name == "bubblewrap" else None
    request = {
        **request,
        "role": role,
        "pipes": pipes,
        "detail_characters": DETAIL_CHARACTERS,
        "limits": {
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "memory_bytes": limits.memory_bytes,
            "processes": limits.processes,
            "open_files": limits.open_files,
            "output_bytes": limits.output_bytes,
        },
        "isolated": name == "bubblewrap",
    }
    if name == "bubblewrap":
        request |= {
            "scratch_bytes": limits.scratch_bytes,
            "scratch_files": limits.scratch_files,
            "user": user,
            "keyctl": sandbox_seccomp.number("keyctl"),
            "bpf": base64.b64encode(sandbox_seccomp.bpf()).decode(),
        }
    python = [sys.executable, "-I", "-X", "utf8", str(RUNNER), json.dumps(request)]
    if name == "unsafe":
        return python
    bwrap = shutil.which("bwrap") or "bwrap"
    return [bwrap, *_bubblewrap(_mounts() | {str(RUNNER): str(RUNNER)} | dict(mounts), user), *python]


def _unused_user() -> int | None:
    """The user to become for root, whom the limit on processes does not bind; `None` for users of other ids.

    A user of its own for each sandbox shares no such limit and no keyring with anybody. Root of a container that maps
    its users is not root to the kernel.
    """
    if os.geteuid() or Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]:
        return None
    return secrets.choice(UNUSED_USERS)


def _bubblewrap(mounts: dict[str, str], user: int | None) -> list[str]:
    """The arguments of bwrap. The runner needs the capabilities to mount scratch and to become `user`."""
    arguments = ["--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    arguments += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if user is None:
        arguments += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    parents = {str(path) for target in mounts for path in Path(target).parents}
    for path in sorted(parents - {"/"}) + [SCRATCH]:
        arguments += ["--dir", path]  # otherwise it makes them readable by root alone
    for target, source in mounts.items():
        arguments += ["--dev-bind" if target in DEVICES else "--ro-bind", source, target]
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


@functools.cache
def _unavailable(name: Backend) -> str | None:
    """Why a sandbox does not work here, found out by a trial; `None` if it does."""
    if sys.platform != "linux":
        return "this is not Linux"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    try:
        sandbox_seccomp.bpf()
        outcome = _run(name, "def one():\n    return 1", "assert one() == 1", Limits())
    except (ImportError, RuntimeError, SandboxUnavailableError) as error:
        return str(error)
    return None if outcome.passed else f"a trial ended with {outcome.status}: {outcome.detail}"

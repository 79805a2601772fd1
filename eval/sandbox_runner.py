"""What runs inside a sandbox: the candidate in one, its tests in another, with nothing between them but a socket.

A program of its own (`python -I sandbox_runner.py REQUEST`) that imports nothing but the standard library. The side of
the tests never executes a line of the candidate: where they name something of the candidate's, they get a stand-in
whose calls travel to the other side as JSON, arguments and results both as data. So whatever a candidate does to its
own interpreter, it cannot reach the tests, read what they expect, or say that they have passed.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import resource
import signal
import socket
import symtable
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any, NoReturn

NOBODY = 65534
SCRATCH = "/scratch"
JAIL = "/jail"
NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000 | 0x2000000
"""User, mount, pid, network, IPC, host name and control group (`CLONE_NEW*` of sched.h)."""
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522


# ---- isolation ------------------------------------------------------------------------------------------------------


def libc(function: str, *arguments: Any) -> None:
    """Calls the C library; integers are passed as longs. Raises OSError where the call fails."""
    import ctypes

    longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*longs) < 0:
        number = ctypes.get_errno()
        shown = ", ".join(value.decode() if isinstance(value, bytes) else str(value) for value in arguments)
        raise OSError(number, f"{function}({shown}): {os.strerror(number)}")


def isolate(mounts: dict[str, str], scratch_bytes: int) -> None:
    """Returns in a process that is alone: in namespaces of its own, and in a root that holds only `mounts`, read-only.

    The processes that it leaves behind, pid 1 of the namespace and its parent, wait for it, and all of the namespace
    dies with either of them.
    """
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    enter_namespaces()
    exit_with(os.fork())
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc("sethostname", b"sandbox", 7)
    change_root(mounts, scratch_bytes)
    exit_with(os.fork())


def exit_with(child: int) -> None:
    """In the parent, waits for the child and ends as it does; in the child, returns."""
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(abs(os.waitstatus_to_exitcode(status)))


def enter_namespaces() -> None:
    # Only a process outside may map more than itself. Root maps nobody too, whom the limit on processes binds.
    user, group, pid = os.getuid(), os.getgid(), os.getpid()
    ready, unshared = os.pipe()
    helper = os.fork()
    if not helper:
        os.close(unshared)
        if os.read(ready, 1):
            with open(f"/proc/{pid}/setgroups", "w") as file:
                file.write("allow" if user == 0 else "deny")
            for name, number in (("uid_map", user), ("gid_map", group)):
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write(f"0 0 1\n{NOBODY} {NOBODY} 1" if user == 0 else f"{NOBODY} {number} 1")
        os._exit(0)
    libc("unshare", NEW_NAMESPACES)
    os.write(unshared, b".")
    _, status = os.waitpid(helper, 0)
    os.close(ready)
    os.close(unshared)
    if status:
        raise OSError("the user namespace could not be given its users")


def change_root(mounts: dict[str, str], scratch_bytes: int) -> None:
    import ctypes

    libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    libc("mount", b"tmpfs", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m")
    os.mkdir("/proc/old")
    libc("pivot_root", b"/proc", b"/proc/old")
    os.chdir("/")
    for target, source in mounts.items():
        if os.path.isdir(f"/old{source}"):
            os.makedirs(JAIL + target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(JAIL + target), exist_ok=True)
            os.close(os.open(JAIL + target, os.O_CREAT))
        libc("mount", f"/old{source}".encode(), (JAIL + target).encode(), None, MS_BIND | MS_REC, None)
    os.mkdir(JAIL + SCRATCH)
    libc("umount2", b"/old", MNT_DETACH)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    libc("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.sizeof(read_only))
    size = f"size={scratch_bytes},nr_inodes=4096,mode=777".encode()
    libc("mount", b"tmpfs", (JAIL + SCRATCH).encode(), b"tmpfs", MS_NOSUID | MS_NODEV, size)


def give_up_privileges() -> None:
    """Into the jail, then nobody, without capabilities and without a way to get any.

    A process that was `chroot`ed cannot make a user namespace, in which it would have capabilities again.
    """
    import ctypes

    os.chroot(JAIL)
    os.chdir(SCRATCH)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc("capset", (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit_resources(limits: dict[str, int], isolated: bool) -> None:
    """Sets the limits of this process and all it starts, for good."""
    limited = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["output_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        limited |= {resource.RLIMIT_AS: limits["memory_bytes"], resource.RLIMIT_MSGQUEUE: 0}
    if isolated:  # elsewhere all processes of the user count
        limited[resource.RLIMIT_NPROC] = limits["processes"]
    for kind, most in limited.items():
        resource.setrlimit(kind, (most, most))


# ---- what passes between the two sides ------------------------------------------------------------------------------

COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
SCALARS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, complex.__repr__, complex),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
}
TEXTS = {"Decimal": "decimal", "Fraction": "fractions"}


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """As JSON: data by value (a subclass as what it derives from), all else by the number that `refer` gives."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [encode(item, refer) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]]
    for name, (kind, dump, _) in SCALARS.items():
        if isinstance(value, kind):
            return [name, dump(value)]
    name = type(value).__name__
    if TEXTS.get(name) == type(value).__module__:
        return [name, str(value)]
    if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in sys.stdlib_module_names:
        return ["module", value.__name__]
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
        return encode(value.item(), refer)
    return ["object", refer(value)]


def decode(wire: Any, resolve: Callable[[int], Any]) -> Any:
    """The inverse of `encode`. Any exception means that this is nothing it has written."""
    if not isinstance(wire, list):
        return wire
    name, content = wire
    if name in COLLECTIONS:
        return COLLECTIONS[name](decode(item, resolve) for item in content)
    if name == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if name in SCALARS:
        return SCALARS[name][2](content)
    if name in TEXTS:
        return getattr(importlib.import_module(TEXTS[name]), name)(content)
    if name == "module" and content.partition(".")[0] in sys.stdlib_module_names:
        return importlib.import_module(content)
    if name == "object":
        return resolve(content)
    raise ValueError(name)


class Channel:
    """Lines of JSON over a socket."""

    def __init__(self, descriptor: int, longest: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.lines = self.socket.makefile("rb")
        self.longest = longest

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        line = self.lines.readline(self.longest)
        if not line.endswith(b"\n"):
            raise ValueError(f"an answer of more than {self.longest} bytes") if line else EOFError
        return json.loads(line)


# ---- the candidate's side -------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "getattr": getattr,
    "getitem": operator.getitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
}

NOT_MADE_OF_A_MESSAGE = {
    *("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError", "BaseExceptionGroup", "ExceptionGroup")
}


def serve(channel: Channel) -> None:
    """Executes the candidate, then the calls that the tests make."""
    channel.send({"ready": True})
    load = channel.receive()
    names: dict[str, Any] = {}
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def perform(request: dict[str, Any]) -> Any:
        if "source" in request:
            exec(compile(request["source"], "<candidate>", "exec", dont_inherit=True), names)
            return {name: names[name] for name in request["names"] if name in names}
        operation, arguments, keywords = decode(request["do"], objects.__getitem__)
        return OPERATIONS[operation](*arguments, **keywords)

    request = load
    while True:
        try:
            reply = {"value": encode(perform(request), refer)}
        except BaseException as error:
            bases = (base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
            kind = next(base for base in bases if base not in NOT_MADE_OF_A_MESSAGE)
            reply = {"raised": kind, "message": f"{error}"[:1000]}
        channel.send({"id": request["id"], **reply})
        request = channel.receive()


# ---- the tests' side ------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """The tests cannot go on; why is in `Candidate.verdict`."""


class Candidate:
    """The other side, as the tests see it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.asked = 0
        self.verdict: tuple[str, str] | None = None

    def stop(self, status: str, detail: str) -> NoReturn:
        """For good: tests that swallow this exception do not pass either."""
        self.verdict = self.verdict or (status, detail)
        raise Stop

    def exchange(self, request: dict[str, Any]) -> Any:
        if self.verdict:
            raise Stop
        self.asked += 1
        try:
            self.channel.send({"id": self.asked, **request})
            reply = self.channel.receive()
            if reply["id"] != self.asked:
                raise ValueError("an answer to another call")
            if "value" in reply:
                return decode(reply["value"], lambda number: Remote(self, number))
            kind, message = getattr(builtins, reply["raised"]), str(reply["message"])
            raised = kind(message)
        except (EOFError, OSError):
            self.stop("exited", "the candidate's process ended before its tests did")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            self.stop("failed", f"the candidate's process did not speak the protocol: {error!r}")
        if not isinstance(raised, Exception):
            self.stop("exited", f"{kind.__name__}: {message}")
        raise raised

    def ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        def refer(value: Any) -> int:
            if not isinstance(value, Remote):
                raise TypeError(f"the tests pass a {type(value).__name__}, which is no data, to the candidate")
            return value._number

        return self.exchange({"do": encode((operation, arguments, keywords), refer)})


class Remote:
    """Stands for an object of the candidate's that is no data: its functions, classes, instances, generators.

    It can be called, looked into, iterated, counted, shown and passed back, and equals nothing but itself.
    """

    def __init__(self, candidate: Candidate, number: int) -> None:
        self._candidate = candidate
        self._number = number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._candidate.ask("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._candidate.ask("getattr", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._candidate.ask("getitem", self, key)

    def __iter__(self) -> Iterator[Any]:
        return self._candidate.ask("iter", self)

    def __next__(self) -> Any:
        return self._candidate.ask("next", self)

    def __len__(self) -> int:
        return self._candidate.ask("len", self)

    def __bool__(self) -> bool:
        return self._candidate.ask("bool", self)

    def __str__(self) -> str:
        return self._candidate.ask("str", self)

    def __repr__(self) -> str:
        return self._candidate.ask("repr", self)


def names_taken(tests: str) -> set[str]:
    """The names that the tests take from the candidate.

    A candidate's own `abs` or `len` is not what tests mean, unless they ask for nothing else, as for a task whose
    function is called `sum`.
    """

    def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        yield table
        for child in table.get_children():
            yield from tables(child)

    module = symtable.symtable(tests, "<tests>", "exec")
    used = {
        symbol.get_name()
        for table in tables(module)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table is module)
    }
    used -= {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return used - set(dir(builtins)) or used


def judge(channel: Channel, source: str, tests: str, seconds: float) -> tuple[str, str]:
    """Has the candidate executed, then the tests.

    Returns:
        `tuple[str, str]`: the status and detail of an `Outcome`.
    """
    candidate = Candidate(channel)

    def out_of_time(number: int, frame: FrameType | None) -> None:
        candidate.stop("timeout", f"not done after {seconds:g} s")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and again, should the tests swallow it
    try:
        names = candidate.exchange({"source": source, "names": sorted(names_taken(tests))})
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
        verdict = ("passed", "")
    except Stop:
        verdict = ("exited", "")
    except MemoryError as error:
        verdict = ("memory", f"MemoryError: {error}")
    except BaseException as error:
        verdict = ("failed", f"{type(error).__name__}: {error}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return candidate.verdict or verdict


def main(request: dict[str, Any]) -> None:
    if request["mounts"] is not None:
        isolate(request["mounts"], request["scratch_bytes"])
    elif request["jail"]:
        libc("mount", b"/", JAIL.encode(), None, MS_BIND | MS_REC, None)
    if request["jail"]:
        give_up_privileges()
    limit_resources(request["limits"], request["isolated"])
    sys.set_int_max_str_digits(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    if request["role"] == "candidate":
        channel = Channel(os.dup(0), sys.maxsize)
        os.dup2(nothing, 0)
        serve(channel)
    else:
        out = os.fdopen(os.dup(1), "w")
        program = json.load(sys.stdin)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        channel = Channel(request["socket"], request["limits"]["output_bytes"])
        try:
            channel.receive()
        except (EOFError, OSError):
            return
        print("ready", file=out, flush=True)
        verdict = judge(channel, program["candidate"], program["tests"], request["seconds"])
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

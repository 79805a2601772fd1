"""What runs inside a sandbox: the candidate in one, its tests in another, with nothing between them but two pipes; or
one program by itself.

A program of its own (`python -I sandbox_runner.py REQUEST`) that imports nothing but the standard library. The side of
the tests never executes a line of the candidate: where they name something of the candidate's, they get a stand-in
whose calls travel to the other side as JSON, arguments and results both as data. What comes back is read by a closed
grammar (`decode`, `read_reply`) in which nothing names code, a module or an attribute. So whatever a candidate does to
its own interpreter, it cannot reach the tests, read what they expect, or say that they have passed.
"""

from __future__ import annotations

import ast
import base64
import builtins
import importlib
import json
import operator
import os
import reprlib
import resource
import symtable
import sys
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any, NoReturn

SCRATCH = "/scratch"
MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x2, 0x4, 0x8
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
KEYCTL_JOIN_SESSION_KEYRING = 1
LINUX_CAPABILITY_VERSION_3 = 0x20080522


# ---- isolation, as far as bubblewrap leaves it to us ----------------------------------------------------------------


def libc(function: str, *arguments: Any) -> None:
    """Calls the C library; integers are passed as longs. Raises OSError where the call fails."""
    import ctypes

    longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*longs) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def give_up_privileges(scratch_bytes: int, scratch_files: int, user: int | None) -> None:
    """Mounts scratch, which bubblewrap cannot give a limit on files, then drops what that needed."""
    import ctypes

    options = f"size={scratch_bytes},nr_inodes={scratch_files},mode=777".encode()
    libc("mount", b"tmpfs", SCRATCH.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.chdir(SCRATCH)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    libc("capset", (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())


def leave_session_keyring(keyctl: int) -> None:
    """Joins a new session keyring. Where the machine's own filter forbids even that, no keyring can be read either."""
    import errno

    try:
        libc("syscall", keyctl, KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def filter_system_calls(bpf: bytes) -> None:
    """From here on, this process and all it starts make no system calls but those of `sandbox_seccomp.py`."""
    import ctypes

    class Program(ctypes.Structure):
        """`struct sock_fprog` of linux/filter.h; an instruction has eight bytes."""

        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(len(bpf) // 8, bpf)), 0, 0)


def limit_resources(limits: dict[str, int], isolated: bool) -> None:
    """Sets the limits of this process and all it starts, for good."""
    limited = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["output_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if sys.platform == "linux":
        limited |= {resource.RLIMIT_AS: limits["memory_bytes"], resource.RLIMIT_MSGQUEUE: 0}
        limited[resource.RLIMIT_SIGPENDING] = limits["open_files"]  # bounds timers too
    if isolated:  # elsewhere all processes of the user count
        limited[resource.RLIMIT_NPROC] = limits["processes"]
    for kind, most in limited.items():
        resource.setrlimit(kind, (most, most))


# ---- what passes between the two sides ------------------------------------------------------------------------------

MOST_DEPTH = 200
MOST_HEX_DIGITS = 2**15
MOST_DECIMAL_DIGITS = 2**12
MOST_PLAIN = 2**63
"""Larger integers are written in hexadecimal, which is read in linear time."""

COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
BYTES: dict[str, Any] = {"bytes": bytes, "bytearray": bytearray}
NOT_MADE_OF_ONE = (UnicodeError, ExceptionGroup)
EXCEPTIONS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_MADE_OF_ONE)
} | {"UnicodeError": UnicodeError}
"""What an answer can raise: these classes are made of one piece of data, and do nothing else."""


class ProtocolError(Exception):
    """A message that the grammar does not have."""


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """As JSON: data by value (a subclass as what it derives from), all else by the number that `refer` gives."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -MOST_PLAIN < number < MOST_PLAIN else ["int", f"{number:x}"]
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [encode(item, refer) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]]
    for name, kind in BYTES.items():
        if isinstance(value, kind):
            return [name, kind.hex(value)]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [encode(part, refer) for part in (value.start, value.stop, value.step)]]
    if isinstance(value, Fraction):
        return ["Fraction", [encode(part, refer) for part in (value.numerator, value.denominator)]]
    if isinstance(value, Decimal):
        return ["Decimal", Decimal.__str__(value)]
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
        return encode(value.item(), refer)
    return ["object", refer(value)]


def decode(wire: Any, resolve: Callable[[int], Any], depth: int = 0) -> Any:
    """The inverse of `encode`: makes nothing but data of the types above and what `resolve` gives for a number.

    Raises:
        ProtocolError: `encode` does not write this, or it is larger than the grammar allows.
    """
    if wire is None or isinstance(wire, (bool, int, float, str)):
        return wire
    if depth == MOST_DEPTH:
        raise ProtocolError(f"data nested more than {MOST_DEPTH} deep")
    match wire:
        case [str(name), list(items)] if name in COLLECTIONS:
            return _made(COLLECTIONS[name], [decode(item, resolve, depth + 1) for item in items])
        case ["dict", list(pairs)]:
            return _made(dict, [_parts(pair, object, 2, resolve, depth) for pair in pairs])
        case ["int", str(digits)] if len(digits) <= MOST_HEX_DIGITS:
            return _made(lambda text: int(text, 16), digits)
        case [str(name), str(digits)] if name in BYTES:
            return _made(BYTES[name].fromhex, digits)
        case ["complex", parts]:
            return complex(*_parts(parts, float, 2, resolve, depth))
        case ["range", parts]:
            return _made(lambda ends: range(*ends), _parts(parts, int, 3, resolve, depth))
        case ["Fraction", parts]:
            return _made(lambda ratio: Fraction(*ratio), _parts(parts, int, 2, resolve, depth))
        case ["Decimal", str(text)] if len(text) <= MOST_DECIMAL_DIGITS:
            number = _made(Decimal, text)
            if not number.is_finite() or abs(number.adjusted()) <= MOST_DECIMAL_DIGITS:
                return number
        case ["object", int(number)] if not isinstance(number, bool) and number >= 0:
            return resolve(number)
    raise ProtocolError(f"no data, or too large: {reprlib.repr(wire)}")


def _parts(wire: Any, kind: type, count: int, resolve: Callable[[int], Any], depth: int) -> list[Any]:
    parts = [decode(part, resolve, depth + 1) for part in wire] if isinstance(wire, list) else []
    if len(parts) != count or not all(isinstance(part, kind) for part in parts):
        raise ProtocolError(f"not {count} of {kind.__name__}: {reprlib.repr(wire)}")
    return parts


def _made(kind: Callable[[Any], Any], content: Any) -> Any:
    try:
        return kind(content)
    except (ArithmeticError, TypeError, ValueError) as error:  # such as a list in a set
        raise ProtocolError(f"{type(error).__name__}: {error}") from error


def read_reply(line: bytes, number: int, resolve: Callable[[int], Any]) -> tuple[str, Any]:
    """What the candidate's process answers to the request of that number.

    Returns:
        `tuple[str, Any]`: `"value"` and data, `"raised"` and an exception, or `"exited"` and why.

    Raises:
        ProtocolError: it is anything else.
    """
    try:
        reply = json.loads(line.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{type(error).__name__}: {error}"[:200]) from None
    match reply:
        case [int(answered), _, _] if answered != number or isinstance(answered, bool):
            raise ProtocolError("an answer to another call")
        case [int(), "value", wire]:
            return "value", decode(wire, resolve)
        case [int(), "raised", [str(kind), wire]] if kind in EXCEPTIONS:
            return "raised", EXCEPTIONS[kind](decode(wire, resolve))
        case [int(), "exited", str(why)]:
            return "exited", why
    raise ProtocolError(f"no answer: {reprlib.repr(reply)}")


class Channel:
    """Lines of JSON over two pipes."""

    def __init__(self, incoming: int, outgoing: int, longest: int) -> None:
        self.incoming = os.fdopen(incoming, "rb")
        self.outgoing = os.fdopen(outgoing, "wb")
        self.longest = longest

    def send(self, message: Any) -> None:
        self.outgoing.write(json.dumps(message).encode() + b"\n")
        self.outgoing.flush()

    def receive(self) -> bytes:
        """The next line.

        Raises:
            EOFError: there is none.
            ProtocolError: it is too long.
        """
        line = self.incoming.readline(self.longest)
        if not line.endswith(b"\n"):
            raise ProtocolError(f"an answer of more than {self.longest} bytes") if line else EOFError
        return line


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


def serve(channel: Channel) -> None:
    """Executes the candidate, then the calls that the tests make."""
    channel.send("ready")
    module = ModuleType("candidate")  # named, for classes say where they were made, and libraries look there
    sys.modules[module.__name__] = module
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def perform(request: dict[str, Any]) -> Any:
        if "source" in request:
            exec(compile(request["source"], "<candidate>", "exec", dont_inherit=True), vars(module))
            return {name: vars(module)[name] for name in request["names"] if name in vars(module)}
        operation, arguments, keywords = decode(request["do"], objects.__getitem__)
        return OPERATIONS[operation](*arguments, **keywords)

    while True:
        try:
            request = json.loads(channel.receive())
        except EOFError:
            return
        try:
            reply: list[Any] = ["value", encode(perform(request), refer)]
        except Exception as error:
            kind = next(base.__name__ for base in type(error).__mro__ if base in EXCEPTIONS.values())
            reply = ["raised", [kind, encode(argument(error), refer)]]
        except BaseException as error:
            reply = ["exited", f"{type(error).__name__}: {shown(error)}"]
        channel.send([request["id"], *reply])


def argument(error: Exception) -> Any:
    """What to make an exception of that shows the same: its only argument, or what it says instead."""
    text = shown(error)
    if len(error.args) == 1 and text in (shown(Exception(*error.args)), shown(KeyError(*error.args))):
        return error.args[0]
    return text


def shown(error: BaseException) -> str:
    try:
        return f"{error}"
    except BaseException as another:  # an integer of too many digits, or `__str__` of the candidate's own
        return f"cannot be shown: {type(another).__name__}"


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
            kind, content = read_reply(self.channel.receive(), self.asked, lambda number: Remote(self, number))
        except (EOFError, OSError):
            self.stop("exited", "the candidate's process ended before its tests did")
        except ProtocolError as error:
            self.stop("failed", f"the candidate's process did not speak the protocol: {error}")
        if kind == "exited":
            self.stop("exited", content)
        if kind == "raised":
            raise content
        return content

    def load(self, source: str, names: set[str]) -> dict[str, Any]:
        """Has the candidate executed.

        Returns:
            `dict[str, Any]`: what it defines of `names`.
        """
        defined = self.exchange({"source": source, "names": sorted(names)})
        if not isinstance(defined, dict) or not defined.keys() <= names:
            self.stop("failed", "the candidate's process answered with names that the tests did not ask for")
        if len(defined.keys() & vars(builtins).keys()) > 1:
            self.stop("failed", f"the candidate redefines several builtins: {', '.join(sorted(defined))}")
        return defined

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
        if (
            name.startswith("__") and name != "__name__"
        ):  # protocols: NumPy reads memory where `__array_interface__` says
            raise AttributeError(f"the tests do not ask the candidate for {name}")
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
    used = {name for name in used if not name.startswith("__")}
    return used - vars(builtins).keys() or used


def modules_meant(tests: str, names: set[str]) -> dict[str, ModuleType]:
    """Which of the names mean a module of the standard library, as `math` does in `math.isclose(f(2), 4)`.

    The tests get their own, since they would believe whatever the candidate's `math.isclose` answers.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    looked_into = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    modules = {}
    for name in names & sys.stdlib_module_names:
        uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == name]
        attributes = [node.attr for node in looked_into if node.value in uses]
        if len(attributes) == len(uses):
            module = importlib.import_module(name)
            if all(hasattr(module, attribute) for attribute in attributes):
                modules[name] = module
    return modules


def judge(channel: Channel, candidate: str, tests: str) -> tuple[str, str]:
    """Has the candidate executed, then the tests.

    Returns:
        `tuple[str, str]`: the status and detail of an `Outcome`.
    """
    other = Candidate(channel)
    try:
        names = names_taken(tests)
        defined = other.load(candidate, names)
        modules = modules_meant(tests, set(defined))
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), {"__name__": "tests", **defined, **modules})
        verdict = ("passed", "")
    except Stop:
        verdict = ("exited", "")
    except MemoryError as error:
        verdict = ("memory", f"MemoryError: {shown(error)}")
    except BaseException as error:
        verdict = ("failed", f"{type(error).__name__}: {shown(error)}")
    return other.verdict or verdict


def main(request: dict[str, Any]) -> None:
    if request["isolated"]:
        leave_session_keyring(request["keyctl"])
        give_up_privileges(request["scratch_bytes"], request["scratch_files"], request["user"])
    limit_resources(request["limits"], request["isolated"])
    if request["isolated"]:
        filter_system_calls(base64.b64decode(request["bpf"]))
    if request["role"] == "program":
        os.write(1, b"ready\n")
        python = [sys.executable, "-I", "-X", "utf8", "-c", request["program"], *request["arguments"]]
        os.execv(sys.executable, python)
    own_input, own_output, incoming, outgoing = (os.dup(end) for end in (0, 1, *request["pipes"]))
    nothing = os.open(os.devnull, os.O_RDWR)
    for end in {0, 1, 2, *request["pipes"]}:
        os.close(end)
    for end in (0, 1, 2):
        os.dup2(nothing, end)
    if request["role"] == "candidate":
        os.close(own_input)
        os.close(own_output)
        serve(Channel(incoming, outgoing, sys.maxsize))
        return
    channel = Channel(incoming, outgoing, request["limits"]["output_bytes"])
    with os.fdopen(own_input) as program, os.fdopen(own_output, "w") as out:
        try:
            channel.receive()
        except (EOFError, OSError):  # the candidate's sandbox did not start, and says so itself
            return
        print("ready", file=out, flush=True)
        status, detail = judge(channel, **json.load(program))
        print(json.dumps([status, detail[: request["detail_characters"]]]), file=out, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

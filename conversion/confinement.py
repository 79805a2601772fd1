"""Trying out what a file makes the libraries do, in a child process whose time and memory are limited.

A configuration of a billion labels, a tokenizer whose normaliser multiplies text, or a pickle that unfolds are small
files. What is tried here and stays within the limits is then done again in this process.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import psutil
import torch

from .errors import ConversionError

SECONDS = 60
MEMORY = 4 * 2**30


def try_out(what: str, function: Callable[[], Any], seconds: int = SECONDS, memory: int = MEMORY) -> None:
    """Calls a function in a child process. What it raises there is ignored: it will be raised here again.

    The child is a fork, which starts in milliseconds where a fresh interpreter would import torch for seconds.

    Args:
        what (`str`): what errors call it.
        function (`Callable`): what to try.
        seconds (`int`, *optional*, defaults to 60): of CPU time, and twice that of wall time.
        memory (`int`, *optional*, defaults to 4 GiB): bytes, beside what this process has.

    Raises:
        ConversionError: it took more time or memory, or it crashed.
    """
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it warns of threads; the child uses none of them
        child = os.fork()
    if child == 0:
        _run(function, write_end, seconds, memory)
    os.close(write_end)
    try:
        ready, _, _ = select.select([read_end], [], [], 2 * seconds)
        said = os.read(read_end, 1) if ready else None
    finally:
        os.close(read_end)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if said == b"m":
        reason = f"takes more than {memory / 2**30:.1f} GiB of memory"
    elif said is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        reason = f"takes more than {seconds} s"
    elif not said:  # a library may end the process when it gets no memory
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        reason = f"takes more than {memory / 2**30:.1f} GiB of memory, or crashes (signal {number})"
    else:
        return
    raise ConversionError(f"{what} {reason} to load. That is far beyond any checkpoint that is in use; see its values.")


def _run(function: Callable[[], Any], write_end: int, seconds: int, memory: int) -> NoReturn:
    """What the child does."""
    said = b"m"
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        with suppress(ValueError, OSError):  # some systems lack some of these limits
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            most = psutil.Process().memory_info().vms + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        function()
        said = b"."
    except MemoryError:
        pass
    except RuntimeError as error:  # torch raises this when it gets no memory
        said = b"m" if "memory" in str(error) else b"."
    except BaseException:
        said = b"."
    finally:
        os.write(write_end, said)
        os._exit(0)

"""Delivery of a directory: it is made beside its destination, under a lock, and appears there at once or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ConversionError

REPORT = "attnres_conversion.json"
REPLACED = ".replaced"  # suffix of an old checkpoint while a new one takes its place
MAX_HASHED_BYTES = 16 * 2**20
MAX_REPORT_BYTES = 2**22
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def check_destination(target: Path, overwrite: bool) -> None:
    """Checks that a directory can be made at the destination, or replaced there.

    Raises:
        ConversionError: it cannot; the message says why, and names what would be lost.
    """
    if not target.parent.is_dir():
        raise ConversionError(f"destination {target}: its parent directory does not exist; create it first.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConversionError(f"destination {target} exists; choose another, or pass overwrite (--overwrite).")
    if (reason := _not_ours(target)) is not None:
        raise ConversionError(
            f"destination {target} exists and is not, or not only, a converted checkpoint, so it is not overwritten: "
            f"{reason}. Choose another destination, or move that elsewhere."
        )


def written_files(directory: Path) -> dict[str, str]:
    """What a conversion wrote, but for its report: each file by its name, with its SHA-256 if it is small, else with
    its size. (A large file is a shard of the source.)"""
    return {
        path.relative_to(directory).as_posix(): _fingerprint(path)
        for path in sorted(directory.rglob("*"))
        if not path.is_dir() and path != directory / REPORT
    }


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_HASHED_BYTES:
        return f"{size} bytes"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_ours(directory: Path) -> str | None:
    """What in a directory a conversion did not write, or `None` if it wrote all of it, and it is as it was written."""
    report = directory / REPORT
    if directory.is_symlink() or not directory.is_dir() or report.is_symlink() or not report.is_file():
        return f"it has no {REPORT}"
    try:
        if report.stat().st_size > MAX_REPORT_BYTES:
            return f"{REPORT} is too large"
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
        written = {name: fingerprint for name, fingerprint in files.items() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{REPORT} does not say what was written"
    directories = {parent for name in written for parent in Path(name).parents}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path == report or (path.is_dir() and not path.is_symlink() and name in directories):
            continue
        if name.as_posix() not in written:
            return f"{str(name)!r} was not written by the conversion"
        if path.is_symlink() or not path.is_file() or _fingerprint(path) != written[name.as_posix()]:
            return f"{str(name)!r} has changed since the conversion"
    return None


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory beside the destination, on the same file system, that is gone afterwards unless delivered.

    It is locked while in use. Making one, and clearing up after conversions that were killed, happens under a lock on
    the parent directory. Signals that would end the process raise [`SystemExit`] meanwhile. While the directory is
    removed, they wait.
    """
    with _signals_raise():
        try:
            with _locked(target.parent, wait=True):
                _clear_up(target)
                stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.attnres-", dir=target.parent))
                lock = ExitStack()
                lock.enter_context(_locked(stage))
        except OSError as error:
            raise ConversionError(f"destination {target} cannot be written: {error}") from error
        try:
            with lock:
                yield stage
        except OSError as error:
            raise ConversionError(f"writing {target} failed: {error}. Nothing was left there.") from error
        finally:
            with _signals_wait():
                shutil.rmtree(stage, ignore_errors=True)


def deliver(stage: Path, target: Path, overwrite: bool) -> None:
    """Puts the finished directory in its place. What it replaces is removed only afterwards, and comes back if that
    fails."""
    stage.chmod(0o777 & ~umask())  # temporary directories are private
    for path in sorted(stage.rglob("*")):
        _sync(path)
    _sync(stage)
    replaced = stage.with_name(stage.name + REPLACED)
    with _locked(target.parent, wait=True):  # another conversion may be delivering there
        check_destination(target, overwrite)  # checked again, because it may have appeared meanwhile
        try:
            if target.exists():
                target.rename(replaced)
            stage.rename(target)
        except BaseException:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
    with suppress(OSError):  # the new checkpoint is in its place already
        _sync(target.parent)
    with _signals_wait():
        shutil.rmtree(replaced, ignore_errors=True)


def _clear_up(target: Path) -> None:
    """Removes staging directories that nobody holds. A checkpoint that was being replaced goes back to its place.

    Anybody may make a directory of such a name where the parent directory is open to all. So one that belongs to
    another user is left alone, and only what a conversion wrote goes back.
    """
    name = re.compile(re.escape(f".{target.name}.attnres-") + r"\w{8}" + f"({re.escape(REPLACED)})?")
    for abandoned in target.parent.iterdir():
        if not name.fullmatch(abandoned.name) or abandoned.is_symlink() or not abandoned.is_dir():
            continue
        if abandoned.stat().st_uid != os.geteuid():
            continue
        if abandoned.name.endswith(REPLACED):
            if _not_ours(abandoned) is not None:
                continue
            if not os.path.lexists(target):
                abandoned.rename(target)
                continue
        with _locked(abandoned) as is_free:
            if is_free:
                shutil.rmtree(abandoned)


@contextmanager
def _locked(directory: Path, wait: bool = False) -> Iterator[bool]:
    """Locks a directory against other processes; yields whether that worked."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:  # another process holds it, or the file system has no locks
            locked = False
        yield locked
    finally:
        os.close(descriptor)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Signals that would end the process at once raise [`SystemExit`] instead."""
    old: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING_SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    old[number] = signal.signal(number, lambda number, frame: sys.exit(128 + number))
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that would end the process do so afterwards."""
    old: dict[signal.Signals, Any] = {}
    waiting: list[int] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING_SIGNALS:
                if signal.getsignal(number) is not None:  # Python set it, so Python can set it again
                    old[number] = signal.signal(number, lambda number, frame: waiting.append(number))
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Kills conversions of one source at random moments, and runs two at once. Prints what was seen, as JSON.

    python kill_conversions.py DIRECTORY NUMBER_OF_MOMENTS

A process of its own, with one thread: it imports everything once and forks for each conversion. A moment is a number of
function calls, so that the same ones are met on any machine.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_source, snapshot
from transformers.utils import logging

from attnres import cli
from attnres.conversion import convert

REPORT = "attnres_conversion.json"
CARD = "README.md"


class Clock:
    """Counts function calls, of Python and of C; sends this process a signal at one of them."""

    def __init__(self, moment: int | None = None, number: signal.Signals = signal.SIGKILL):
        self.calls, self.moment, self.number = 0, moment, number

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event.endswith("call")
        if self.calls == self.moment:
            self.moment = None
            os.kill(os.getpid(), self.number)


def run(directory: Path, *options: str, clock: Clock | None = None) -> int:
    """The command, silently. Returns its exit code."""
    sys.argv = ["attnres", "convert", str(directory / "source"), str(directory / "converted"), *options]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        sys.setprofile(clock)
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        finally:
            sys.setprofile(None)
    return 0


def start(directory: Path, *options: str, clock: Clock | None = None) -> int:
    """The command, in a forked process."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = run(directory, *options, clock=clock)
    finally:
        os._exit(code)


def contents(converted: Path) -> dict[str, str]:
    """Bytes of every file; of the report, which tells the time, the fields, and of the card, which tells what was
    verified, the last line."""
    files = {name: entry[0] for name, entry in snapshot(converted).items()}
    fields, lines = json.loads((converted / REPORT).read_text()), (converted / CARD).read_text().splitlines()
    return {**files, REPORT: sorted(fields), CARD: lines[-1]}


def main(directory: Path, moments: int) -> dict[str, int]:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # all processes share its lock, which a killed one may hold
    source, converted = make_source(directory / "source", shards=True, num_hidden_layers=1), directory / "converted"
    (source / "LICENSE").write_text("the licence")
    before = snapshot(source)
    calls, seen = {}, Counter[str]()
    for verify in ("full", "none", "full", "none"):  # the first time imports what it needs
        clock = Clock()
        run(directory, "--verify", verify, "--overwrite", clock=clock)
        calls[verify] = clock.calls
    whole = contents(converted)
    shutil.rmtree(converted)

    def look() -> None:
        assert snapshot(source) == before, "the source has changed"
        if converted.exists():
            assert contents(converted) == whole, "the destination is not whole"
            shutil.rmtree(converted)
            seen["whole"] += 1
        else:
            seen["absent"] += 1

    generator = random.Random(0)
    for moment in range(moments):
        for number in (signal.SIGKILL, signal.SIGTERM):
            verify = "full" if moment % 5 == 0 else "none"
            old = set(directory.iterdir())
            clock = Clock(generator.randrange(int(1.1 * calls[verify])), number)
            pid = start(directory, "--verify", verify, clock=clock)
            os.waitpid(pid, 0)
            look()
            seen[f"left behind by {number.name}"] += bool(set(directory.iterdir()) - old)
    for _ in range(5):
        pids = [start(directory, "--verify", "none") for _ in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        assert codes == [0, 2], f"one is delivered, the other refused: {codes}"
        look()
        seen["two at once"] += 1
    for _ in range(5):
        pids = [start(directory, "--verify", "none", "--overwrite") for _ in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        assert codes == [0, 0], f"either replaces the other: {codes}"
        look()
    convert(source, converted, verify="none")
    look()
    assert list(directory.iterdir()) == [source], "temporary files remain"
    return dict(seen)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))

"""Kills conversions of one source at random moments, and runs two at once. Prints what was seen, as JSON.

    python kill_conversions.py DIRECTORY NUMBER_OF_MOMENTS

A process of its own, with one thread: it imports everything once and forks for each conversion.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from checkpoints import make_source, snapshot

from attnres import cli
from attnres.conversion import convert

REPORT = "attnres_conversion.json"


def start(directory: Path, *options: str) -> int:
    """The command, in a forked process."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.argv = ["attnres", "convert", str(directory / "source"), str(directory / "converted"), *options]
        cli.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        os._exit(code)


def contents(converted: Path) -> dict[str, str]:
    """Bytes of every file; of the report, which tells the time, the fields."""
    files = {name: entry[0] for name, entry in snapshot(converted).items()}
    return {**files, REPORT: sorted(json.loads((converted / REPORT).read_text()))}


def main(directory: Path, moments: int) -> dict[str, int]:
    torch.set_num_threads(1)
    source, converted = make_source(directory / "source", shards=True), directory / "converted"
    (source / "LICENSE").write_text("the licence")
    before = snapshot(source)
    seconds, seen = {}, Counter[str]()
    for verify in ("full", "none", "full", "none"):  # the first time imports what it needs
        started = time.perf_counter()
        convert(source, converted, verify=verify, overwrite=True)
        seconds[verify] = time.perf_counter() - started
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
            verify = "full" if moment % 3 == 0 else "none"
            old = set(directory.iterdir())
            pid = start(directory, "--verify", verify)
            time.sleep(generator.uniform(0, 1.2 * seconds[verify]))
            os.kill(pid, number)
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

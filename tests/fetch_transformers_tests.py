"""Fetches the tests of the installed transformers release: they are in its source distribution, not in its wheel.

python tests/fetch_transformers_tests.py      # prints the directory, `.cache/transformers-VERSION/tests`
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
DIRECTORY = CACHE / f"transformers-{version('transformers')}" / "tests"


def fetch() -> Path:
    if DIRECTORY.is_dir():
        return DIRECTORY
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        requirement = f"transformers=={version('transformers')}"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            + ["--no-build-isolation", "--dest", scratch, requirement],
            check=True,
        )
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if m.isfile() and Path(m.name).parts[1:2] == ("tests",)]
            for member in wanted:
                tar.extract(member, scratch, filter="data")
        DIRECTORY.parent.mkdir(exist_ok=True)
        (Path(scratch) / DIRECTORY.parent.name / "tests").rename(DIRECTORY)
    return DIRECTORY


if __name__ == "__main__":
    print(fetch())

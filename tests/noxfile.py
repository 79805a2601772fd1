"""The core of the tests on older versions of Transformers, each in an environment of its own: `make test-versions`.

The newest version is what `constraints.txt` pins, and `make test` runs on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parents[1]
CONVERTED = ROOT / ".cache" / "converted"
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))

# The oldest version that is declared, and the newest that vLLM 0.32 allows.
TRANSFORMERS = ("5.16.0", "5.19.0")

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.envdir = str(ROOT / ".cache" / "nox")


@nox.session
@nox.parametrize("transformers", TRANSFORMERS)
def core(session: nox.Session, transformers: str) -> None:
    """Runs tests/test_core.py on one version, with a checkpoint that the newest version converted."""
    if not CONVERTED.is_dir():
        session.error(f"{CONVERTED} is missing; `make test-versions` makes it.")
    session.install(TORCH)
    session.install(f"transformers=={transformers}", "pytest", "pytest-timeout", f"{ROOT}")
    copy = Path(session.create_tmp()) / "converted"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(CONVERTED, copy)
    session.chdir(ROOT)
    session.run(
        "python",
        "-m",
        "pytest",
        "tests/test_core.py",
        env={"ATTNRES_CONVERTED": str(copy), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )

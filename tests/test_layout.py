"""The rooms of the package: what may import what, and what travels with a checkpoint."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import attnres
from attnres import modeling_attnres

ROOT = Path(attnres.__file__).parent
# A module imports only what stands before it.
ORDER = (
    "backbones",
    "configuration_attnres",
    "checkpoint_files",
    "depth_state",
    "depth_attention_two_phase",
    "depth_attention_triton",
    "depth_attention",
    "residual_stream",
    "rewiring",
    "modeling_attnres",
)
NOT_IN_THE_PACKAGE = {"tests", "benchmarks", "build", "docs", "demo-output"}


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below `attnres`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in NOT_IN_THE_PACKAGE or any(part.startswith(".") for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


@cache
def imports_of(name: str) -> frozenset[str]:
    """The modules of the package that a module imports, at its top or inside of a function."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            imported = whole if whole in MODULES else ".".join(base)
            found |= {imported, *([] if imported.split(".")[0] == name.split(".")[0] else [imported.split(".")[0]])}
    return frozenset(found & MODULES.keys())


def test_the_modules_that_travel_import_only_what_stands_before_them() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*ORDER, "__init__", "cli"}
    for index, name in enumerate(ORDER):
        assert imports_of(name) <= set(ORDER[:index]), name


def test_all_of_them_travel() -> None:
    code = modeling_attnres.__file__
    assert {Path(path).stem for path in (code, *get_relative_import_files(code))} == set(ORDER)


def test_no_import_goes_round_in_a_circle() -> None:
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in finished:
            for other in imports_of(name):
                if other != name and not name.startswith(f"{other}."):  # a package imports its own modules
                    visit(other, (*path, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", ["configuration_attnres", "depth_state", "depth_attention", "rewiring"])
def test_importing_a_module_imports_nothing_above_it(name: str) -> None:
    above = [f"attnres.{other}" for other in ORDER[ORDER.index(name) + 1 :]]
    program = f"import attnres.{name}, sys; found = {above!r} & sys.modules.keys(); assert not found, found"
    program = program.replace(repr(above), f"set({above!r})")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_contributing_names_every_module_and_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in MODULES:
        where = name.split(".")[0]
        assert f"`{where}.py`" in text or f"`{where}/`" in text, name

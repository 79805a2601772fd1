"""The text of the experiments: Python sources of installed packages, split by package, without duplicates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from ..errors import TrainingError

# The held-out packages share no project with the others. `examples/tiny-qwen3` has learned from none of them: its text
# was the standard library.
TRAINING = ("sympy", "torch", "pandas", "sklearn", "scipy", "transformers", "numpy", "networkx", "matplotlib", "nltk")
HELD_OUT = ("jinja2", "click", "rich", "pygments", "jsonschema", "trio", "wrapt", "mpmath")
MIN_BYTES, MAX_BYTES = 1_000, 60_000  # of a file


@dataclass(frozen=True)
class Corpus:
    """Two files of JSON lines with a column `text`, and what identifies them.

    Attributes:
        training, validation: the files.
        sha256: of both.
        packages: the packages and their versions.
    """

    training: Path
    validation: Path
    sha256: str
    packages: dict[str, str]


def normalized(text: str) -> str:
    """A text without what may differ between copies of one file: comments, blank lines and the width of spaces."""
    lines = (re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def sources(package: str) -> Iterator[tuple[str, str]]:
    """The files of an installed package, each as its name and its text, in the order of a hash of the name."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise TrainingError(f"The package {package} is not installed; the experiments read its sources.")
    root = Path(spec.origin).parent
    names = [path.relative_to(root.parent).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        path = root.parent / name
        if MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a test of another encoding
                continue


def make_corpus(directory: Path, training_bytes: int, validation_bytes: int) -> Corpus:
    """Writes the two files, unless they are there.

    The packages take turns, file by file, until there are enough bytes. A file whose normalised text was seen before is
    left out. The validation text is chosen first, so no training file equals one of its files.

    Args:
        directory (`Path`): where to write.
        training_bytes, validation_bytes (`int`): how much text; it may be one file more.

    Raises:
        TrainingError: a package is not installed, or there is not enough text.
    """
    paths = {"validation": directory / "validation.jsonl", "training": directory / "training.jsonl"}
    seen: set[str] = set()
    digest = hashlib.sha256()
    directory.mkdir(parents=True, exist_ok=True)
    for part, packages, wanted in (
        ("validation", HELD_OUT, validation_bytes),
        ("training", TRAINING, training_bytes),
    ):
        rows, size = [], 0
        waiting = [sources(package) for package in packages]
        while waiting and size < wanted:
            files = waiting.pop(0)
            for name, text in files:
                fingerprint = hashlib.sha256(normalized(text).encode()).hexdigest()
                if fingerprint not in seen:
                    seen.add(fingerprint)
                    rows.append(json.dumps({"text": text, "name": name}) + "\n")
                    size += len(text.encode())
                    waiting.append(files)
                    break
        if size < wanted:
            raise TrainingError(f"There are {size} bytes of {part} text; {wanted} are needed.")
        content = "".join(rows).encode()
        digest.update(content)
        if not paths[part].is_file() or paths[part].read_bytes() != content:
            temporary = paths[part].with_suffix(".tmp")
            temporary.write_bytes(content)
            temporary.replace(paths[part])
    distributions = packages_distributions()
    versions = {package: version(distributions[package][0]) for package in (*TRAINING, *HELD_OUT)}
    return Corpus(paths["training"], paths["validation"], digest.hexdigest(), versions)

"""Checkpoint directories to convert, and what must not change in them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tiny import tiny_model

INDEX = "model.safetensors.index.json"


def make_source(directory: Path, family: str = "qwen3", shards: bool = False, **overrides: Any) -> Path:
    """A tiny random checkpoint, in one file or several."""
    model = tiny_model(family, **overrides)
    model.save_pretrained(directory, max_shard_size="40KB" if shards else "5GB")
    return directory


def snapshot(directory: Path) -> dict[str, Any]:
    """Name, bytes and modification time of everything below a directory; a sparse file counts by its size."""
    return {
        path.relative_to(directory).as_posix(): (_content(path), path.lstat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
    }


def _content(path: Path) -> str | int | None:
    if path.is_symlink():
        return str(path.readlink())
    if not path.is_file():
        return None
    size = path.stat().st_size
    return hashlib.sha256(path.read_bytes()).hexdigest() if size < 2**24 else size

"""Data to train on: text, JSON lines and Parquet files, directories of them, or data sets of the Hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .errors import TrainingError

FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".java", ".js", ".rs"))
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# The columns of each kind of data; the first that are all there decide.
KINDS = {"messages": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}


@dataclass(frozen=True)
class Data:
    """What a model is trained and evaluated on.

    Attributes:
        train, validation: the rows, with the columns of their kind; `validation` may be `None`.
        kind: `"text"`, `"messages"` or `"completion"` (a key of `KINDS`).
        files: for each file its name and the SHA-256 of its content; for a data set of the Hub its fingerprint.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    kind: str
    files: dict[str, str]


def load_data(
    train: Sequence[str | Path],
    validation: Sequence[str | Path] | float | None = None,
    *,
    split: str = "train",
    text_column: str = "text",
    seed: int = 42,
) -> Data:
    """Reads data and finds out what kind they are of.

    Args:
        train (sequence of `str` or `Path`): files, directories or ids of the Hub. A text file is one document.
        validation (the same, or `float`, *optional*): of the same kind, or the share of `train` that is held out.
        split (`str`, *optional*, defaults to `"train"`): of data sets of the Hub.
        text_column (`str`, *optional*, defaults to `"text"`): the column with the text.
        seed (`int`, *optional*, defaults to 42): of the choice of rows that are held out.

    Raises:
        TrainingError: there is nothing to read, it cannot be read, or its kind is unclear; the message names the file.
    """
    files: dict[str, str] = {}
    rows = _read_all(train, split, text_column, files)
    kind = _kind(rows, train, text_column)
    held_out: datasets.Dataset | None = None
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise TrainingError(f"validation={validation} is no share of the data; give a number between 0 and 1.")
        if len(rows) < 2:
            raise TrainingError(
                "There is one example only, so none can be held out; give validation data of their own."
            )
        parts = rows.train_test_split(max(1, round(validation * len(rows))), seed=seed)
        rows, held_out = parts["train"], parts["test"]
    elif validation:
        others: dict[str, str] = {}
        held_out = _read_all(validation, split, text_column, others)
        files |= {f"validation: {name}": digest for name, digest in others.items()}
        if (other := _kind(held_out, validation, text_column)) != kind:
            raise TrainingError(f"The training data are of kind {kind!r}, the validation data of kind {other!r}.")
    return Data(rows, held_out, kind, files)


def _read_all(sources: Sequence[str | Path], split: str, text_column: str, files: dict[str, str]) -> datasets.Dataset:
    if not sources:
        raise TrainingError("No data are given; name files, directories or ids of the Hub (--data).")
    found = [rows for source in sources for rows in _read(source, split, files)]
    try:
        rows = datasets.concatenate_datasets(found) if len(found) > 1 else found[0]
    except (ValueError, TypeError) as error:
        raise TrainingError(f"The data have columns of different types and cannot be put together: {error}") from error
    if text_column != "text" and text_column in rows.column_names:
        if "text" in rows.column_names:
            rows = rows.remove_columns("text")
        rows = rows.rename_column(text_column, "text")
    if not len(rows):
        raise TrainingError(f"{_names(sources)}: there is no example in it.")
    return rows


def _read(source: str | Path, split: str, files: dict[str, str]) -> Iterable[datasets.Dataset]:
    path = Path(source)
    if path.is_dir():
        known = {*FORMATS, *TEXT_SUFFIXES}
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
        if not paths:
            raise TrainingError(f"{path} has no file that ends in one of {', '.join(sorted(known))}.")
    elif path.is_file():
        paths = [path]
    elif HUB_ID.fullmatch(str(source)) and not path.suffix:
        yield _read_hub(str(source), split, files)
        return
    else:
        raise TrainingError(f"data {str(source)!r}: there is no such file or directory, and it is no id of the Hub.")
    texts = [p for p in paths if p.suffix.lower() not in FORMATS]
    for p in paths:
        files[p.relative_to(path).as_posix() if path.is_dir() else p.name] = _digest(p)
    if texts:
        yield datasets.Dataset.from_dict({"text": [text for text in map(_read_text, texts) if text]})
    for file_format in sorted(set(FORMATS.values())):
        chosen = [str(p) for p in paths if FORMATS.get(p.suffix.lower()) == file_format]
        if chosen:
            try:
                yield datasets.load_dataset(file_format, data_files=chosen, split="train")
            except Exception as error:  # whatever pyarrow and pandas make of a file that is not what it should be
                cause = " ".join(str(error.__cause__ or error).split())[:300]
                raise TrainingError(
                    f"{_names(chosen)} cannot be read as {file_format}, or have different columns: {cause}"
                ) from error


def _read_hub(name: str, split: str, files: dict[str, str]) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the network, a missing split, a configuration that has to be chosen, ...
        raise TrainingError(f"data set {name!r} (split {split!r}) cannot be loaded: {error}") from error
    files[name] = rows._fingerprint
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise TrainingError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error


def _kind(rows: datasets.Dataset, sources: Sequence[str | Path], text_column: str) -> str:
    for kind, columns in KINDS.items():
        if set(columns) <= set(rows.column_names):
            first = rows[0]
            expected = list if kind == "messages" else (str, list) if kind == "completion" else str
            if any(not isinstance(first[column], expected) for column in columns):
                raise TrainingError(f"{_names(sources)}: the first row's {' and '.join(columns)} is not text.")
            return kind
    raise TrainingError(
        f"{_names(sources)} has the columns {', '.join(rows.column_names)}; needed are `text` (or --text-column, here "
        f"{text_column!r}), `messages`, or `prompt` and `completion`."
    )


def _names(sources: Sequence[str | Path]) -> str:
    names = [str(source) for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tokens_per_byte(rows: Any, tokenizer: Any) -> float | None:
    """How many tokens that count for the loss a UTF-8 byte of their text has; `None` if there is no text.

    Args:
        rows: prepared rows, with `input_ids` and `labels`, in which -100 counts for nothing.
        tokenizer: decodes them; special tokens have no bytes.
    """
    ids = [
        token
        for tokens, labels in zip(rows["input_ids"], rows["labels"])
        for token, label in zip(tokens, labels)
        if label != -100
    ]
    # In one piece: a character may be cut by the border of two sequences.
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    num_bytes = len(text.encode())
    return len(ids) / num_bytes if num_bytes else None


__all__ = ["Data", "load_data", "tokens_per_byte"]

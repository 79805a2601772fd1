"""Small files that make the libraries work without end, or open other files: refused soon, in little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_source
from safetensors.torch import load_file, save_file
from test_conversion_hostile import peak_bytes

from attnres import convert
from attnres.conversion import ConversionError
from attnres.conversion import source as source_module
from attnres.conversion.confinement import try_out
from attnres.conversion.source import open_file, open_source
from attnres.examples.demo import CHECKPOINT
from attnres.model_cards.card import inherited_metadata

pytestmark = pytest.mark.timeout(200)

Damage = Callable[[Path], Any]
SHARD = "model.safetensors"
FAR = "far beyond any checkpoint"
VIEWS = "views that repeat themselves"


def configure(**fields: Any) -> Damage:
    return edit_json("config.json", lambda config: config.update(fields))


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(source: Path) -> None:
        content = json.loads((source / name).read_text())
        change(content)
        (source / name).write_text(json.dumps(content))

    return edit


def with_tensor(name: str, tensor: torch.Tensor, **fields: Any) -> Damage:
    def edit(source: Path) -> None:
        save_file({**load_file(source / SHARD), name: tensor}, source / SHARD, metadata={"format": "pt"})
        configure(**fields)(source)

    return edit


def multiply(count: int, **normalizer: Any) -> Damage:
    """A tokenizer whose normaliser makes a text longer, again and again."""
    steps = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaa", **normalizer}] * count
    return edit_json(
        "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer={"type": "Sequence", "normalizers": steps})
    )


def tokenizer_config(**fields: Any) -> Damage:
    return edit_json("tokenizer_config.json", lambda config: config.update(fields))


def write(name: str, content: bytes) -> Damage:
    return lambda source: (source / name).write_bytes(content)


def pickled(make: Callable[[], Any], **kwargs: Any) -> Damage:
    def edit(source: Path) -> None:
        (source / SHARD).unlink()
        torch.save(make(), source / "pytorch_model.bin", **kwargs)

    return edit


def raw_pickle(content: bytes) -> Damage:
    def edit(source: Path) -> None:
        (source / SHARD).unlink()
        (source / "pytorch_model.bin").write_bytes(content)

    return edit


def zipped_pickle(method: int, size: int = 2**24) -> Damage:
    def edit(source: Path) -> None:
        (source / SHARD).unlink()
        file = io.BytesIO()
        torch.save({"x": torch.zeros(size)}, file)
        with zipfile.ZipFile(file) as stored, zipfile.ZipFile(source / "pytorch_model.bin", "w", method) as packed:
            for member in stored.infolist():
                packed.writestr(member.filename, stored.read(member))

    return edit


class Bytes:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**13,)


def state(tensor: torch.Tensor) -> Callable[[], Any]:
    return lambda: OrderedDict(x=tensor)


def legacy_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


UNBOUNDED: dict[str, tuple[Damage, str]] = {
    "a billion labels": (configure(num_labels=10**9), FAR),
    "a hundred million labels": (configure(num_labels=10**8), FAR),
    "layers, many": (configure(num_hidden_layers=9000, layer_types=None), "an integer from 1 to 1000"),
    "layers, just too many": (configure(num_hidden_layers=1001, layer_types=None), "an integer from 1 to 1000"),
    "hidden_size of a tensor without elements": (
        with_tensor("x", torch.zeros(10**9, 0), hidden_size=10**9),
        "no tensor has that size",
    ),
    "hidden_size of a tensor without elements, last": (
        with_tensor("x", torch.zeros(0, 10**9), hidden_size=10**9),
        "no tensor has that size",
    ),
    "heads of a tensor without elements": (
        with_tensor("x", torch.zeros(10**9, 0), num_attention_heads=10**9),
        "at most 32768 makes sense",
    ),
    "hidden_size of one long tensor": (
        with_tensor("x", torch.zeros(10**6, dtype=torch.uint8), hidden_size=10**6),
        "more than all tensors hold",
    ),
    "63 MB of lists": (write("tokenizer.json", b"[" + b"[]," * 21_000_000 + b"[]]"), "more than 4000000 values"),
    "60 MB of objects": (write("vocab.json", b'{"a":[' + b"{}," * 20_000_000 + b"{}]}"), "more than 4000000 values"),
    "60 MB of numbers": (write("added_tokens.json", b'{"a":[' + b"1," * 30_000_000 + b"1]}"), "more than 4000000"),
    "lists in config.json": (write("config.json", b'{"a":[' + b"[]," * 20_000_000 + b"[]]}"), "more than 4000000"),
    "a header of lists": (
        write(SHARD, (60_000_009).to_bytes(8, "little") + b'{"a":[' + b"[]," * 20_000_000 + b"1]}"),
        "not a whole safetensors file",
    ),
    "text times 8 to the 12th": (multiply(12), FAR),
    "text times 8 to the 30th": (multiply(30), FAR),
    "prepended without end": (
        multiply(40, type="Replace", pattern={"String": "a"}, content="aa"),
        FAR,
    ),
    "a deflated pickle": (zipped_pickle(zipfile.ZIP_DEFLATED), "compressed"),
    "a pickle by bzip2": (zipped_pickle(zipfile.ZIP_BZIP2), "compressed"),
    "a pickle by lzma": (zipped_pickle(zipfile.ZIP_LZMA), "compressed"),
    "a view of 40 TB": (pickled(state(torch.zeros(1).expand(10**7, 10**6))), VIEWS),
    "a view of 4 GB": (pickled(state(torch.zeros(1).expand(10**9))), VIEWS),
    "a view of 40 TB, of old": (
        pickled(state(torch.zeros(1).expand(10**7, 10**6)), _use_new_zipfile_serialization=False),
        VIEWS,
    ),
    "a window that slides": (pickled(state(torch.zeros(10**5).unfold(0, 50_000, 1))), VIEWS),
    "one tensor ten thousand times": (
        pickled(lambda: {f"x{i}": t for t in [torch.zeros(1000)] for i in range(10**4)}),
        VIEWS,
    ),
    "a pickle of a vast buffer": (raw_pickle(pickle.dumps(Bytes(), 2)), "weights_only|" + FAR),
    "a broken pickle": (raw_pickle(b"\x80\x02}q\x00("), "weights_only"),
    "a pickle cut off": (raw_pickle(legacy_bytes()[:200]), "weights_only"),
    "an empty pickle": (raw_pickle(b""), "weights_only"),
    "other configurations": (configure(configuration_files=["config.9.0.0.json"]), "configuration_files=.*other files"),
    "other configurations, outside": (configure(configuration_files=["../config.4.0.0.json"]), "other files"),
    "other weights": (configure(transformers_weights="../secret.safetensors"), "transformers_weights=.*other files"),
    "other tokenizer, outside": (
        tokenizer_config(fast_tokenizer_files=["../tokenizer.4.0.json"]),
        "fast_tokenizer_files=.*beside it",
    ),
    "other tokenizer, absolute": (
        tokenizer_config(fast_tokenizer_files=["/etc/tokenizer.4.0.json"]),
        "fast_tokenizer_files=.*beside it",
    ),
    "other tokenizer, no list": (tokenizer_config(fast_tokenizer_files="tokenizer.json"), "fast_tokenizer_files="),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_source(tmp_path_factory.mktemp("pristine") / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, source)
    return source


@pytest.mark.parametrize("case", UNBOUNDED.values(), ids=UNBOUNDED.keys())
@pytest.mark.filterwarnings("ignore:.*pickled weights")
def test_work_is_bounded(case: tuple[Damage, str], pristine: Path, tmp_path: Path) -> None:
    damage, message = case
    source = shutil.copytree(pristine, tmp_path / "source")
    damage(source)
    started, peak = time.monotonic(), peak_bytes()
    with pytest.raises(ConversionError, match=message) as raised:
        convert(source, tmp_path / "converted", verify="none", allow_pickle=True)
    assert time.monotonic() - started < 150
    assert peak_bytes() - peak < 2**29
    assert len(str(raised.value)) < 5000
    assert not (tmp_path / "converted").exists()


def test_a_tokenizer_reads_nothing_outside(pristine: Path, tmp_path: Path) -> None:
    """The paths of files that a tokenizer_config.json names would be opened in the place of those beside it."""
    source = shutil.copytree(pristine, tmp_path / "source")
    (tmp_path / "secret.json").write_text((source / "tokenizer.json").read_text())
    tokenizer_config(tokenizer_file=str(tmp_path / "secret.json"), vocab_file="/etc/passwd")(source)
    convert(source, tmp_path / "converted", verify="none")
    fields = json.loads((tmp_path / "converted" / "tokenizer_config.json").read_text())
    assert not any(name.endswith("_file") for name in fields)


# -- the child process -------------------------------------------------------------------------------------------------


def spin() -> None:
    while True:
        pass


def fill_memory() -> None:
    blocks = []
    while True:
        blocks.append(bytes(2**24))


def crash() -> None:
    os.abort()


TRIALS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "nothing": (lambda: None, None),
    "an exception": (lambda: 1 / 0, None),
    "an exit": (lambda: os._exit(0), "crashes"),
    "sys.exit": (lambda: exit(3), None),
    "output": (lambda: print("x" * 10**6), None),
    "a tensor": (lambda: torch.ones(1000, 1000).sum(), None),
    "spinning": (spin, "takes more than 1 s"),
    "sleeping": (lambda: time.sleep(1000), "takes more than 1 s"),
    "memory": (fill_memory, "takes more than 0.2 GiB"),
    "memory at once": (lambda: bytes(2**40), "takes more than 0.2 GiB"),
    "memory of torch": (lambda: torch.zeros(2**38), "takes more than 0.2 GiB"),
    "a crash": (crash, "crashes"),
    "deep recursion": (lambda: (lambda f: f(f))(lambda f: f(f)), None),
}


@pytest.mark.parametrize("case", TRIALS.values(), ids=TRIALS.keys())
def test_trials(case: tuple[Callable[[], Any], str | None]) -> None:
    function, message = case
    started = time.monotonic()
    if message is None:
        try_out("it", function, seconds=20)
    else:
        with pytest.raises(ConversionError, match=f"it {message}|it .*{message}"):
            try_out("it", function, seconds=1, memory=2**28)
    assert time.monotonic() - started < 20
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_file_that_changes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at it and its opening, a file becomes a FIFO, a link, or another file."""
    path = tmp_path / "config.json"
    real_open = os.open
    for swap in (os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), lambda path: path.write_text("other")):
        path.unlink(missing_ok=True)
        path.write_text("{}")

        def open_later(name: Any, flags: int, *args: Any, swap: Any = swap, **kwargs: Any) -> int:
            path.rename(tmp_path / "before")
            swap(path)
            descriptor = real_open(name, flags, *args, **kwargs)
            (tmp_path / "before").replace(path)
            return descriptor

        monkeypatch.setattr(os, "open", open_later)
        with pytest.raises(ConversionError, match="cannot be read|another file than a moment ago"), open_file(path):
            pass
        monkeypatch.setattr(os, "open", real_open)


def test_the_limits_leave_room(monkeypatch: pytest.MonkeyPatch, pristine: Path, tmp_path: Path) -> None:
    """What is honest takes a small part of them."""
    monkeypatch.setattr(source_module, "try_out", partial(try_out, seconds=10, memory=2**29))
    convert(pristine, tmp_path / "converted", verify="none")


YAML = ['!!int ""', "!!timestamp x", "!!float {}", "!!binary x", "!!omap 3", "!!pairs [1]", "!!set [1]", "!!bool maybe"]
YAML += ["!!python/name:os.getcwd", "!x y", "*nothing", "{? {a: b} : c}", "[" * 2000, "&a [*a]", "2024-99-99", "@"]


@pytest.mark.parametrize("value", YAML)
def test_a_card_that_cannot_be_read_has_nothing_to_inherit(value: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\n# A card\n")
    assert inherited_metadata(tmp_path) == {}


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_directory_that_cannot_be_listed(
    name: str, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(pristine, tmp_path / "source")
    (source / name).unlink()

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConversionError, match="source cannot be read: .*Permission denied"):
        open_source(source)

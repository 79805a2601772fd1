"""Every file of a source may come from anyone: whatever is wrong with it ends in an error that names it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, make_source, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import retrofit, tiny_model
from transformers import OPTConfig, OPTForCausalLM

from attnres import AttnResError, convert
from attnres.conversion import ConversionError
from attnres.conversion.source import open_source
from attnres.examples.demo import CHECKPOINT

pytestmark = pytest.mark.timeout(120)  # a file that is waited for must not stop the suite

SHARD = "model.safetensors"
NORM = "model.norm.weight"
ESCAPE = "\x1b[31mred\x1b[0m"
Damage = Callable[[Path], Any]

# -- what happens to a source ------------------------------------------------------------------------------------------


def edit_config(**fields: Any) -> Damage:
    return edit_json("config.json", lambda config: config.update(fields))


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(source: Path) -> None:
        content = json.loads((source / name).read_text())
        change(content)
        (source / name).write_text(json.dumps(content))

    return edit


def map_tensor(shard: Any, tensor: str = NORM) -> Damage:
    """The index puts `tensor` in `shard`."""
    return edit_json(INDEX, lambda index: index["weight_map"].update({tensor: shard}))


def write(name: str, content: str | bytes) -> Damage:
    def edit(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        (source / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def recode(name: str, encoding: str) -> Damage:
    return lambda source: (source / name).write_bytes((source / name).read_text().encode(encoding))


def twice(name: str, key: str) -> Damage:
    """A JSON object that has `key` twice, with the value it had."""

    def edit(source: Path) -> None:
        text = (source / name).read_text()
        value = json.dumps(json.loads(text)[key])
        (source / name).write_text(text.replace("{", f'{{"{key}": {value},', 1))

    return edit


def remove(*patterns: str) -> Damage:
    return lambda source: [path.unlink() for pattern in patterns for path in source.glob(pattern)]


def both(*edits: Damage) -> Damage:
    return lambda source: [edit(source) for edit in edits]


def untouched(source: Path) -> None:
    pass


def grow(name: str, size: int) -> Damage:
    """Makes a file larger; what is added is a hole."""

    def edit(source: Path) -> None:
        with (source / name).open("ab") as file:
            file.truncate(size)

    return edit


def shrink(name: str, num_bytes: int) -> Damage:
    return lambda source: os.truncate(source / name, (source / name).stat().st_size - num_bytes)


def replace_by(name: str, make: Callable[[Path], Any]) -> Damage:
    """Another kind of file in the place of `name`."""

    def edit(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        make(source / name)

    return edit


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)
    os.chdir(here)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which has no end
    except PermissionError:
        pytest.skip("only root makes devices")


def link_out(path: Path) -> None:
    """To a file that is what is expected there, but elsewhere."""
    outside = path.parent.with_name("outside")
    outside.mkdir()
    original = CHECKPOINT / path.name
    (outside / path.name).write_bytes(original.read_bytes() if original.is_file() else b"secret")
    path.symlink_to(outside / path.name)


def link_out_of(name: str) -> Damage:
    """The file itself moves out of the directory, which keeps a link to it."""

    def edit(source: Path) -> None:
        outside = source.with_name("outside")
        outside.mkdir()
        shutil.move(source / name, outside / name)
        (source / name).symlink_to(outside / name)

    return edit


def link_to(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_shard(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def edit_header(change: Callable[[dict[str, Any]], Any], extra_data: bytes = b"") -> Damage:
    def edit(source: Path) -> None:
        header, data = read_shard(source / SHARD)
        change(header)
        write_shard(source / SHARD, json.dumps(header).encode(), data + extra_data)

    return edit


def edit_tensor(extra_data: bytes = b"", **fields: Any) -> Damage:
    """Changes fields of the last norm in the header; what is `...` is removed."""

    def change(header: dict[str, Any]) -> None:
        entry = {**header[NORM], **fields}
        header[NORM] = {field: value for field, value in entry.items() if value is not ...}

    return edit_header(change, extra_data)


def move_tensor(begin: int, end: int) -> Damage:
    """Shifts where the data of the last norm begins and ends."""

    def change(header: dict[str, Any]) -> None:
        offsets = header[NORM]["data_offsets"]
        header[NORM]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit_header(change)


def raw_header(header: bytes, length: int | None = None) -> Damage:
    return lambda source: write_shard(source / SHARD, header, read_shard(source / SHARD)[1], length)


def recode_header(encoding: str) -> Damage:
    def edit(source: Path) -> None:
        header, data = read_shard(source / SHARD)
        write_shard(source / SHARD, json.dumps(header).encode(encoding), data)

    return edit


def duplicate_tensor(source: Path) -> None:
    header, data = read_shard(source / SHARD)
    text = json.dumps(header).replace("{", f'{{"{NORM}": {json.dumps(header[NORM])},', 1)
    write_shard(source / SHARD, text.encode(), data)


def rename_tensor(name: str) -> Damage:
    return edit_header(lambda header: header.update({name: header.pop(NORM)}))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def edit(source: Path) -> None:
        tensors = load_file(source / SHARD)
        change(tensors)
        save_file(tensors, source / SHARD, metadata={"format": "pt"})

    return edit


def drop_tensor(name: str) -> Damage:
    return change_tensors(lambda tensors: tensors.pop(name))


def duplicate_in_another_shard(source: Path) -> None:
    first, second = sorted(source.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file(load_file(second) | dict([tensors.popitem()]), second, metadata={"format": "pt"})


def call_it_ours(source: Path) -> None:
    (source / SHARD).rename(source / "model-attnres.safetensors")
    names = read_shard(source / "model-attnres.safetensors")[0].keys() - {"__metadata__"}
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-attnres.safetensors")}))


def other_family(source: Path) -> None:
    shutil.rmtree(source)
    config = OPTConfig(num_hidden_layers=2, hidden_size=16, ffn_dim=16, num_attention_heads=2, vocab_size=50)
    OPTForCausalLM(config).save_pretrained(source)


def already_converted(source: Path) -> None:
    shutil.rmtree(source)
    retrofit(tiny_model("qwen3")).save_pretrained(source)


def trained_with_tokenizer(source: Path) -> None:
    shutil.rmtree(source)
    shutil.copytree(CHECKPOINT, source)


# -- the table ---------------------------------------------------------------------------------------------------------

NO_SHARD = "model.safetensors is not a whole safetensors file: "
NO_CONFIG = "config.json is not readable JSON: "
NO_INDEX = "index.json is not readable JSON: "
ONE, MANY = False, True  # one file of weights, or several and an index
FULL = {"verify": "full"}


def add_tensor(name: str, like: str = "model.layers.1.mlp.up_proj.weight", scale: float = 3.0) -> Damage:
    return change_tensors(lambda tensors: tensors.update({name: scale * tensors[like]}))


def twin(name: str) -> Damage:
    return add_tensor(name, f"model.{name}")


def fill(value: float, name: str = NORM) -> Damage:
    return change_tensors(lambda tensors: tensors[name].view(-1)[:1].fill_(value))


def zero(*names: str) -> Damage:
    return change_tensors(lambda tensors: [tensors[name].zero_() for name in names])


EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
SAME = "are loaded into the same parameter"
CONSTANT = "the logits of its model are all 0"

# What would be delivered, and computes something else than its source, or nothing that could be compared.
WRONG_RESULTS: list[tuple[str, bool, Damage, str, dict[str, Any]]] = [
    ("a tensor without the prefix too", ONE, add_tensor("layers.1.mlp.up_proj.weight"), SAME, {}),
    ("the norm without the prefix too", ONE, add_tensor("norm.weight", NORM), SAME, {}),
    ("the embedding without the prefix too", ONE, add_tensor("embed_tokens.weight", EMBEDDING), SAME, {}),
    (
        "a q_proj twice, whole",
        ONE,
        twin("layers.0.self_attn.q_proj.weight"),
        SAME,
        FULL,
    ),
    (
        "a k_norm twice",
        ONE,
        twin("layers.3.self_attn.k_norm.weight"),
        SAME,
        {},
    ),
    ("epsilon infinite", ONE, edit_config(rms_norm_eps=float("inf")), "config.json: rms_norm_eps=inf", {}),
    ("epsilon minus infinity", ONE, edit_config(rms_norm_eps=-float("inf")), "rms_norm_eps=-inf", {}),
    ("spread not a number", ONE, edit_config(initializer_range=float("nan")), "initializer_range=nan", {}),
    ("epsilon vast", ONE, edit_config(rms_norm_eps=1e300), CONSTANT, FULL),
    ("epsilon negative", ONE, edit_config(rms_norm_eps=-1e9), "are not finite", FULL),
    ("norm of zeros", ONE, zero(NORM), CONSTANT, FULL),
    ("norm of zeros, sample", ONE, zero(NORM), CONSTANT, {"verify": "sample", "block_size": 1}),
    ("embedding and head of zeros", ONE, zero(EMBEDDING), CONSTANT, FULL),
    ("one weight infinite", ONE, fill(float("inf"), UP), f"tensor '{UP}' holds values that are not finite", FULL),
    ("one weight not a number", ONE, fill(float("nan"), UP), f"tensor '{UP}' holds values that are", FULL),
    ("an unread embedding not a number", ONE, fill(float("nan"), EMBEDDING), "holds values that are not", FULL),
    ("one weight infinite, sample", ONE, fill(float("inf"), UP), "are not finite", {"verify": "sample"}),
    ("depth below a layer", ONE, rename_tensor("model.layers.0.depth_attention.query"), "a name that AttnRes", {}),
    ("depth as on disk", ONE, rename_tensor("model.depth_attention.key_norm"), "a name that AttnRes needs", {}),
]

# name, sharded source?, what happens to the source, what the message says, arguments of convert beside verify="none"
BAD_INPUT: list[tuple[str, bool, Damage, str, dict[str, Any]]] = [
    # the directory
    ("no such source", ONE, shutil.rmtree, "does not exist", {}),
    ("no config", ONE, remove("config.json"), "no config.json", {}),
    ("no weights", ONE, remove("*.safetensors"), "neither model.safetensors nor", {}),
    (
        "pickled weights",
        ONE,
        both(remove("*.safetensors"), write("pytorch_model.bin", b"x")),
        "pickled weights .*--allow-pickle",
        {},
    ),
    ("adapter", ONE, both(remove("config.json"), write("adapter_config.json", "{}")), "PEFT adapter", {}),
    ("adapter beside the weights", ONE, write("adapter_config.json", '{"base_model_name_or_path": "/"}'), "PEFT", {}),
    ("another family", ONE, other_family, "'opt' is not supported", {}),
    ("already converted", ONE, already_converted, "AttnRes checkpoint already", {}),
    # config.json: the file
    ("config cut off", ONE, write("config.json", "{"), NO_CONFIG, {}),
    ("config empty", ONE, write("config.json", ""), NO_CONFIG, {}),
    ("config binary", ONE, write("config.json", b"\xff\xfe\x00{"), NO_CONFIG + "'utf-8'", {}),
    ("config in UTF-16", ONE, recode("config.json", "utf-16"), NO_CONFIG + "'utf-8'", {}),
    ("config with a BOM", ONE, recode("config.json", "utf-8-sig"), NO_CONFIG + "Unexpected UTF-8 BOM", {}),
    ("config in latin-1", ONE, write("config.json", '{"model_type": "é"}'.encode("latin-1")), NO_CONFIG, {}),
    ("config a list", ONE, write("config.json", "[]"), NO_CONFIG + "a JSON list", {}),
    (
        "config with a key twice",
        ONE,
        twice("config.json", "hidden_size"),
        NO_CONFIG + "'hidden_size' is there twice",
        {},
    ),
    ("config nested beyond reason", ONE, write("config.json", "[" * 100_000), NO_CONFIG, {}),
    ("config with a huge number", ONE, write("config.json", '{"a": ' + "9" * 5000 + "}"), NO_CONFIG, {}),
    ("config of 100 MB", ONE, grow("config.json", 10**8), "config.json has 100000000 bytes", {}),
    ("config a FIFO", ONE, replace_by("config.json", os.mkfifo), "config.json is not a regular file", {}),
    ("config a directory", ONE, replace_by("config.json", os.mkdir), "config.json is not a regular file", {}),
    ("config a socket", ONE, replace_by("config.json", bind_socket), "config.json is not a regular file", {}),
    ("config a device", ONE, replace_by("config.json", device), "config.json is not a regular file", {}),
    ("config a link out", ONE, link_out_of("config.json"), "config.json is a link out of the checkpoint", {}),
    (
        "config a link to a device",
        ONE,
        replace_by("config.json", link_to("/dev/zero")),
        "config.json is a link out",
        {},
    ),
    (
        "config a link to itself",
        ONE,
        replace_by("config.json", link_to("config.json")),
        "config.json cannot be read",
        {},
    ),
    ("config a link to nothing", ONE, replace_by("config.json", link_to("gone")), "config.json cannot be read", {}),
    # config.json: the fields
    ("no model_type", ONE, write("config.json", "{}"), "model_type=None", {}),
    ("model_type a number", ONE, edit_config(model_type=3), "model_type=3", {}),
    ("model_type unknown", ONE, edit_config(model_type="qwen99"), "'qwen99' is not supported", {}),
    ("model_type for a terminal", ONE, edit_config(model_type=ESCAPE), r"x1b\[31mred.* is not supported", {}),
    ("a classifier", ONE, edit_config(architectures=["Qwen3ForSequenceClassification"]), "causal language", {}),
    ("architectures a string", ONE, edit_config(architectures="Qwen3ForCausalLM"), "list of class names", {}),
    ("quantised otherwise", ONE, edit_config(quantization_config={"quant_method": "hqq"}), "quant_method='hqq'", {}),
    ("hidden_size a word", ONE, edit_config(hidden_size="wide"), "config.json.*hidden_size", {}),
    ("hidden_size for a terminal", ONE, edit_config(hidden_size=ESCAPE), "config.json.*hidden_size", {}),
    ("hidden_size a billion", ONE, edit_config(hidden_size=10**9), "config.json: hidden_size=1000000000", {}),
    ("no layers", ONE, edit_config(num_hidden_layers=0, layer_types=[]), "config.json: num_hidden_layers=0", {}),
    ("layers negative", ONE, edit_config(num_hidden_layers=-4), "config.json: num_hidden_layers=-4", {}),
    ("layers a word", ONE, edit_config(num_hidden_layers="four"), "config.json: num_hidden_layers='four'", {}),
    ("layers true", ONE, edit_config(num_hidden_layers=True), "config.json: num_hidden_layers=True", {}),
    ("a billion layers", ONE, edit_config(num_hidden_layers=10**9), "config.json: num_hidden_layers=1000000000", {}),
    (
        "9000 layers",
        ONE,
        edit_config(num_hidden_layers=9000, layer_types=None),
        "config.json: num_hidden_layers=9000, but there are only",
        {},
    ),
    (
        "a layer more",
        ONE,
        edit_config(num_hidden_layers=5, layer_types=None),
        "lacks .* tensors its config asks for",
        {},
    ),
    (
        "intermediate_size",
        ONE,
        edit_config(intermediate_size=64),
        "mlp.*shapes contradict|shapes contradict config",
        {},
    ),
    ("intermediate_size vast", ONE, edit_config(intermediate_size=10**15), "source cannot be loaded|contradict", {}),
    ("vocab_size zero", ONE, edit_config(vocab_size=0), "source cannot be loaded|contradict", {}),
    ("vocab_size negative", ONE, edit_config(vocab_size=-96), "source cannot be loaded.*-96", {}),
    ("vocab_size vast", ONE, edit_config(vocab_size=10**15), "source cannot be loaded|contradict", {}),
    ("no heads", ONE, edit_config(num_attention_heads=0), "source cannot be loaded", {}),
    ("heads a billion wide", ONE, edit_config(head_dim=10**9), "config.json: head_dim=1000000000", {}),
    ("a billion heads", ONE, edit_config(num_attention_heads=10**9), "config.json: num_attention_heads=10000", {}),
    ("padding beyond the vocabulary", ONE, edit_config(pad_token_id=1000), "source cannot be loaded", {}),
    ("epsilon not a number", ONE, edit_config(rms_norm_eps=float("nan")), "config.json: rms_norm_eps=nan", {}),
    ("dtype of integers", ONE, edit_config(dtype="int8"), "config.json: dtype=.*floating-point dtype", {}),
    ("dtype a list", ONE, edit_config(dtype=[]), "config.json makes no qwen3 configuration", {}),
    ("layer_types a number", ONE, edit_config(layer_types=7), "config.json.*layer_types", {}),
    # the index
    ("index not JSON", MANY, write(INDEX, "nope"), NO_INDEX, {}),
    ("index in UTF-16", MANY, recode(INDEX, "utf-16"), NO_INDEX + "'utf-8'", {}),
    ("index in latin-1", MANY, write(INDEX, '{"é": 1}'.encode("latin-1")), NO_INDEX + "'utf-8'", {}),
    ("index of 100 MB", MANY, grow(INDEX, 10**8), "index.json has 100000000 bytes", {}),
    ("index nested beyond reason", MANY, write(INDEX, '{"weight_map":' * 50_000), NO_INDEX, {}),
    ("index with a key twice", MANY, twice(INDEX, "weight_map"), NO_INDEX + "'weight_map' is there twice", {}),
    (
        "index with a tensor twice",
        MANY,
        write(INDEX, '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'),
        NO_INDEX + "'a' is there twice",
        {},
    ),
    ("index a FIFO", MANY, replace_by(INDEX, os.mkfifo), "index.json is not a regular file", {}),
    ("index a link out", MANY, link_out_of(INDEX), "index.json is a link out of the checkpoint", {}),
    ("index without map", MANY, write(INDEX, "{}"), "index.json: weight_map is missing", {}),
    ("index with a list", MANY, write(INDEX, '{"weight_map": ["a"]}'), "index.json: weight_map is missing", {}),
    ("shard a number", MANY, map_tensor(3), "index.json: tensor 'model.norm.weight' is in 3", {}),
    ("shard a list", MANY, map_tensor([[]]), r"index.json: tensor 'model.norm.weight' is in \[\[\]\]", {}),
    ("shard above", MANY, map_tensor("../model.safetensors"), "is in '../model.safetensors', which is no", {}),
    ("shard below", MANY, map_tensor("deep/model.safetensors"), "is in 'deep/model.safetensors', which is no", {}),
    ("shard absolute", MANY, map_tensor("/etc/passwd"), "is in '/etc/passwd', which is no safetensors", {}),
    ("shard absolute and named well", MANY, map_tensor("/tmp/a.safetensors"), "'/tmp/a.safetensors', which is no", {}),
    ("shard the directory", MANY, map_tensor(".."), r"is in '\.\.', which is no safetensors", {}),
    ("shard a pickle", MANY, map_tensor("pytorch_model.bin"), "'pytorch_model.bin', which is no safetensors", {}),
    ("shard with NUL", MANY, map_tensor("a\0.safetensors"), r"'a\\x00.safetensors', which is no", {}),
    ("shard with a newline", MANY, map_tensor("a\n.safetensors"), r"'a\\n.safetensors', which is no", {}),
    ("shard for a terminal", MANY, map_tensor(ESCAPE + ".safetensors"), r"'\\x1b\[31mred.*, which is no", {}),
    (
        "shard of a long name",
        MANY,
        map_tensor("a" * 10**6 + ".safetensors"),
        r"is in 'aaa.*\.\.\.a*\.safetensors', which is no",
        {},
    ),
    (
        "tensor with a newline, index",
        MANY,
        map_tensor("a.safetensors", "a\nb"),
        r"index.json names a tensor 'a\\nb'",
        {},
    ),
    ("tensor without name, index", MANY, map_tensor("a.safetensors", ""), "index.json names a tensor ''", {}),
    ("shard missing", MANY, remove("model-00001-*.safetensors"), "model-00001.* is named by .* but missing", {}),
    ("shard of ours", ONE, call_it_ours, "model-attnres.safetensors holds .*, a name that AttnRes needs", {}),
    (
        "a tensor too many",
        MANY,
        edit_json(INDEX, lambda index: index["weight_map"].update(ghost=min(index["weight_map"].values()))),
        "model-00001-of-.* lacks tensor 'ghost'",
        {},
    ),
    (
        "a tensor too few",
        MANY,
        edit_json(INDEX, lambda index: index["weight_map"].pop(NORM)),
        "holds tensor 'model.norm.weight', which the index puts in None",
        {},
    ),
    (
        "a tensor in two shards",
        MANY,
        duplicate_in_another_shard,
        "model-00002.* holds tensor .*, which the index puts",
        {},
    ),
    # a shard: the file
    ("shard empty", ONE, write(SHARD, b""), NO_SHARD, {}),
    ("shard of 7 bytes", ONE, write(SHARD, b"\x01" + bytes(6)), NO_SHARD, {}),
    ("shard of garbage", ONE, write(SHARD, b"garbage" * 99), NO_SHARD + ".*header has", {}),
    ("shard cut off", ONE, shrink(SHARD, 100), NO_SHARD + ".*file not fully covered", {}),
    (
        "shard with trailing bytes",
        ONE,
        lambda source: grow(SHARD, (source / SHARD).stat().st_size + 1)(source),
        NO_SHARD,
        {},
    ),
    ("shard a FIFO", ONE, replace_by(SHARD, os.mkfifo), "model.safetensors is not a regular file", {}),
    ("shard a directory", ONE, replace_by(SHARD, os.mkdir), "model.safetensors is not a regular file", {}),
    ("shard a link out", ONE, link_out_of(SHARD), "model.safetensors is a link out of the checkpoint", {}),
    ("shard a link to nothing", ONE, replace_by(SHARD, link_to("gone")), "model.safetensors cannot be read", {}),
    # a shard: the header
    ("header empty", ONE, raw_header(b""), NO_SHARD + "it says that its header has 0 bytes", {}),
    ("header of 2^63 bytes", ONE, raw_header(b"{}", 2**63), NO_SHARD + ".*header has 9223372036854775808", {}),
    ("header of 2^64 - 1 bytes", ONE, raw_header(b"{}", 2**64 - 1), NO_SHARD + ".*header has 18446744073709551615", {}),
    (
        "header larger than the file",
        ONE,
        raw_header(b"{}", 10**6),
        NO_SHARD + "it says that its header has 1000000",
        {},
    ),
    (
        "header of 1 GB",
        ONE,
        both(raw_header(b"{}", 10**9), grow(SHARD, 2 * 10**9)),
        NO_SHARD + ".*a header at most",
        {},
    ),
    ("header not JSON", ONE, raw_header(b"{nope}"), NO_SHARD, {}),
    ("header a list", ONE, raw_header(b"[]"), NO_SHARD + "a JSON list", {}),
    ("header without tensors", ONE, raw_header(b"{}"), NO_SHARD + ".*file not fully covered", {}),
    ("header in UTF-16", ONE, recode_header("utf-16"), NO_SHARD + "'utf-8'", {}),
    ("header with a BOM", ONE, recode_header("utf-8-sig"), NO_SHARD + "Unexpected UTF-8 BOM", {}),
    ("header nested beyond reason", ONE, raw_header(b'{"a":' * 50_000), NO_SHARD, {}),
    ("metadata a list", ONE, edit_header(lambda header: header.update(__metadata__=[1])), NO_SHARD, {}),
    ("tensor twice", ONE, duplicate_tensor, NO_SHARD + "'model.norm.weight' is there twice", {}),
    (
        "tensor null",
        ONE,
        edit_header(lambda header: header.update({NORM: None})),
        NO_SHARD + ".*invalid type: null",
        {},
    ),
    ("tensor without shape", ONE, edit_tensor(shape=...), NO_SHARD + ".*missing field `shape`", {}),
    ("shape a word", ONE, edit_tensor(shape="32"), NO_SHARD + '.*invalid type: string "32"', {}),
    ("shape negative", ONE, edit_tensor(shape=[-32]), NO_SHARD + ".*integer `-32`", {}),
    ("shape of fractions", ONE, edit_tensor(shape=[32.0]), NO_SHARD + r".*floating point `32\.0`", {}),
    ("shape not a number", ONE, edit_tensor(shape=[float("nan")]), NO_SHARD + ".*expected value at line 1", {}),
    ("shape true", ONE, edit_tensor(shape=[True]), NO_SHARD + ".*boolean `true`", {}),
    ("shape of 2^124", ONE, edit_tensor(shape=[2**62, 2**62]), NO_SHARD + ".*overflow", {}),
    ("shape that overflows to 32", ONE, edit_tensor(shape=[2**59 + 1, 32]), NO_SHARD + ".*overflow", {}),
    ("shape of huge numbers", ONE, edit_tensor(shape=[10**4000] * 50), NO_SHARD + ".*number out of range", {}),
    ("shape of 1000 dimensions", ONE, edit_tensor(shape=[1] * 1000 + [32]), NO_SHARD + ".*shape=", {}),
    (
        "shape of another size",
        ONE,
        edit_tensor(shape=[33]),
        NO_SHARD + ".*invalid shape, data type, or offset",
        {},
    ),
    (
        "shape against the config",
        ONE,
        edit_tensor(shape=[4, 8]),
        "shapes contradict config.json.*model.norm.weight",
        {},
    ),
    ("dtype missing", ONE, edit_tensor(dtype=...), NO_SHARD + ".*missing field `dtype`", {}),
    ("dtype unknown", ONE, edit_tensor(dtype="F99"), NO_SHARD + ".*unknown variant `F99`", {}),
    ("dtype that torch lacks", ONE, edit_tensor(dtype="F4", shape=[256]), NO_SHARD + ".*cannot load", {}),
    ("dtype a dict", ONE, edit_tensor(dtype={}), NO_SHARD + ".*invalid value: map", {}),
    ("dtype for a terminal", ONE, edit_tensor(dtype=ESCAPE), NO_SHARD + r".*unknown variant `\\x1b\[31mred", {}),
    ("offsets missing", ONE, edit_tensor(data_offsets=...), NO_SHARD + ".*missing field `data_offsets`", {}),
    ("offsets of one number", ONE, edit_tensor(data_offsets=[0]), NO_SHARD + ".*invalid length 1", {}),
    ("offsets negative", ONE, edit_tensor(data_offsets=[-128, 0]), NO_SHARD + ".*integer `-128`", {}),
    (
        "offsets backwards",
        ONE,
        edit_tensor(data_offsets=[128, 0]),
        NO_SHARD + ".*invalid offset for tensor `model.norm.weight`",
        {},
    ),
    (
        "offsets beyond the file",
        ONE,
        edit_tensor(data_offsets=[2**62, 2**62 + 128]),
        NO_SHARD + ".*invalid offset for tensor `model.norm.weight`",
        {},
    ),
    ("ranges overlap", ONE, move_tensor(-128, -128), NO_SHARD + ".*invalid offset for tensor", {}),
    ("ranges leave a gap", ONE, edit_header(lambda header: header.pop(NORM)), NO_SHARD, {}),
    (
        "range missing at the end",
        ONE,
        edit_header(lambda header: None, bytes(64)),
        NO_SHARD + ".*file not fully covered",
        {},
    ),
    ("tensor without name", ONE, rename_tensor(""), "model.safetensors names a tensor ''", {}),
    ("tensor with a newline", ONE, rename_tensor("a\nb"), r"model.safetensors names a tensor 'a\\nb'", {}),
    ("tensor with NUL", ONE, rename_tensor("a\0b"), r"model.safetensors names a tensor 'a\\x00b'", {}),
    ("tensor for a terminal", ONE, rename_tensor(ESCAPE), r"model.safetensors names a tensor '\\x1b\[31mred", {}),
    ("tensor written backwards", ONE, rename_tensor("\u202eweight"), r"names a tensor '\\u202eweight'", {}),
    ("tensor of half a character", ONE, rename_tensor("\ud800"), NO_SHARD + ".*end of hex escape", {}),
    ("tensor named like ours", ONE, rename_tensor("depth_attention.query"), "'depth_attention.query', a name that", {}),
    ("tensor of a long name", ONE, rename_tensor("a" * 10**6), "lacks 1 tensors .*norm", {}),
    ("tensor missing", ONE, drop_tensor("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensors .*up_proj", {}),
    ("tensor missing, whole", ONE, drop_tensor(NORM), "lacks 1 tensors .*norm", FULL),
    (
        "tensor missing beyond the sample",
        ONE,
        drop_tensor("model.layers.3.mlp.up_proj.weight"),
        "lacks 1 tensors .*up_proj",
        {"verify": "sample", "block_size": 1},
    ),
    (
        "weights not numbers",
        ONE,
        change_tensors(lambda t: t[NORM].fill_(float("nan"))),
        "tensor 'model.norm.weight' holds values that are not finite",
        FULL,
    ),
    *WRONG_RESULTS,
    # what comes along
    ("tokenizer a link out", ONE, replace_by("tokenizer.json", link_out), "tokenizer.json is a link out of", {}),
    ("licence a link out", ONE, replace_by("LICENSE", link_to("/etc/passwd")), "LICENSE is a link out of", {}),
    ("licence a relative link out", ONE, replace_by("LICENSE", link_to("../../../etc/passwd")), "LICENSE", {}),
    ("licence a link to nothing", ONE, replace_by("LICENSE", link_to("gone")), "LICENSE cannot be read", {}),
    ("licence a FIFO", ONE, replace_by("LICENSE", os.mkfifo), "LICENSE is not a regular file", {}),
    ("vocabulary a socket", ONE, replace_by("vocab.json", bind_socket), "vocab.json is not a regular file", {}),
    ("notice a device", ONE, replace_by("NOTICE", device), "NOTICE is not a regular file", {}),
    ("templates a link out", ONE, replace_by("additional_chat_templates", link_to("/etc")), "is a link out of", {}),
    (
        "tokenizer of 100 MB",
        ONE,
        both(write("tokenizer.json", ""), grow("tokenizer.json", 10**8)),
        "more than .* never",
        {},
    ),
    ("licence with a newline", ONE, write("LICENSE\nMIT", ""), r"holds 'LICENSE\\nMIT'", {}),
    ("licence for a terminal", ONE, write("LICENSE" + ESCAPE, ""), r"holds 'LICENSE\\x1b\[31m", {}),
    (
        "generation config cut off",
        ONE,
        write("generation_config.json", "{"),
        "generation_config.json is not readable JSON",
        {},
    ),
    (
        "vocabulary smaller than the tokenizer's",
        ONE,
        both(trained_with_tokenizer, lambda source: shrink_vocabulary(source)),
        "tokenizer of .* gives token .* vocab_size=300",
        FULL,
    ),
    # arguments
    ("both sizes", ONE, untouched, "exactly one", {"num_blocks": 2, "block_size": 2}),
    ("too many blocks", ONE, untouched, "num_blocks=9 .* from 1 to 8", {"num_blocks": 9}),
    ("block_size zero", ONE, untouched, "block_size=0", {"block_size": 0}),
    ("mix unknown", ONE, untouched, "mix='max'", {"mix": "max"}),
    ("verify unknown", ONE, untouched, "verify='maybe'", {"verify": "maybe"}),
]


def shrink_vocabulary(source: Path) -> None:
    tensors = load_file(source / SHARD)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name][:300].clone()}, source / SHARD, metadata={"format": "pt"})
    edit_config(vocab_size=300)(source)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("pristine")
    return {shards: make_source(root / str(shards), shards=shards) for shards in (ONE, MANY)}


@pytest.mark.parametrize(
    ("sharded", "damage", "message", "kwargs"), [c[1:] for c in BAD_INPUT], ids=[c[0] for c in BAD_INPUT]
)
def test_bad_input_is_refused(
    sharded: bool, damage: Damage, message: str, kwargs: dict[str, Any], pristine: dict[bool, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(pristine[sharded], source)
    damage(source)
    before, started, peak = snapshot(tmp_path), time.monotonic(), peak_bytes()
    with pytest.raises(AttnResError, match=message) as raised:
        convert(source, tmp_path / "converted", **{"verify": "none", **kwargs})
    assert time.monotonic() - started < 30
    assert peak_bytes() - peak < 2**29
    assert all(c.isprintable() or c == "\n" for c in str(raised.value)), "a control character reaches the terminal"
    assert len(str(raised.value)) < 5000
    after = snapshot(tmp_path)
    assert after.keys() == before.keys(), "something was left behind"
    assert {name: after[name] for name in after if "/" in name} == {n: before[n] for n in before if "/" in n}


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_there_are_enough_cases() -> None:
    assert len({name for name, *_ in BAD_INPUT}) == len(BAD_INPUT) >= 60


# Cards and pickles that are no files of the source: a card is passed over, a pickle is refused.
NO_FILES: list[tuple[str, Callable[[Path], Any]]] = [
    ("a FIFO", os.mkfifo),
    ("a directory", os.mkdir),
    ("a socket", bind_socket),
    ("a device", device),
    ("a link to an endless device", link_to("/dev/zero")),
    ("a link to a terminal", link_to("/dev/tty")),
    ("a link to standard input", link_to("/dev/stdin")),
    ("a link to itself", lambda path: path.symlink_to(path.name)),
    ("a link to nothing", link_to("gone")),
    ("a link above", link_to("../secret")),
    ("an absolute link", lambda path: path.symlink_to(path.parent.with_name("secret"))),
]


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin"])
@pytest.mark.parametrize("make", [case[1] for case in NO_FILES], ids=[case[0] for case in NO_FILES])
@pytest.mark.filterwarnings("ignore:.*pickled weights")
def test_no_files_are_not_opened(
    make: Callable[[Path], Any], name: str, pristine: dict[bool, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(pristine[ONE], source)
    (tmp_path / "secret").write_text("---\nlicense: the-secret\n---\n")
    make(source / name)
    if name == "README.md":
        convert(source, tmp_path / "converted", verify="none")
        assert "the-secret" not in (tmp_path / "converted" / "README.md").read_text()
    else:
        (source / SHARD).unlink()
        with pytest.raises(ConversionError, match=f"{name} (is not a regular file|is a link out|cannot be read)"):
            convert(source, tmp_path / "converted", verify="none", allow_pickle=True)


# -- links and permissions ---------------------------------------------------------------------------------------------


def test_links_within_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot links to the blobs of its own repository, and to nothing else."""
    repository = tmp_path / "models--someone--something"
    blobs = make_source(repository / "blobs")
    source = repository / "snapshots" / "0123abcd"
    source.mkdir(parents=True)
    for path in blobs.iterdir():
        (source / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    report = convert(source, tmp_path / "converted", verify="none")
    assert report.bytes_linked > 0
    assert not any(path.is_symlink() for path in (tmp_path / "converted").iterdir())

    other = tmp_path / "models--someone--else" / "blobs"
    other.mkdir(parents=True)
    (other / "licence").write_text("of another repository")
    (source / "LICENSE").symlink_to(other / "licence")
    with pytest.raises(ConversionError, match="LICENSE is a link out of the checkpoint"):
        convert(source, tmp_path / "again", verify="none")
    assert not (tmp_path / "again").exists()


def test_links_within_the_directory_are_followed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (source / "weights").mkdir()
    (source / SHARD).rename(source / "weights" / "1.safetensors")
    (source / SHARD).symlink_to("weights/1.safetensors")
    (tmp_path / "link").symlink_to(source)  # of the directory itself
    assert convert(tmp_path / "link", tmp_path / "converted", verify="none").bytes_linked > 0


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user who may not read everything, if root runs the tests."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["config.json", SHARD, "LICENSE"])
def test_unreadable_files(name: str, pristine: dict[bool, Path]) -> None:
    with tempfile.TemporaryDirectory() as directory:  # all above it may be entered by anyone
        root = Path(directory)
        root.chmod(0o777)
        shutil.copytree(pristine[ONE], root / "source")
        (root / "source" / "LICENSE").write_text("the licence")
        for path in (root / "source").iterdir():
            path.chmod(0 if path.name == name else 0o644)
        before = snapshot(root)
        with without_privileges(), pytest.raises(ConversionError, match=f"Permission denied.*{name}"):
            convert(root / "source", root / "converted", verify="none")
        assert snapshot(root).keys() == before.keys()


# -- fuzzing -----------------------------------------------------------------------------------------------------------

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Values that are nearly right reach further than random ones.
NEARLY = st.sampled_from([[], [32], [0], [32, 1], [2**63], [0, 128], [128, 256], "F32", "BF16", "I64", {}, "", None])


def assert_refused_or_right(source: Path) -> None:
    """An [`AttnResError`], or exactly what the safetensors library finds in the same files."""
    try:
        found = open_source(source)
    except AttnResError:
        return
    for shard in found.shards:
        with safe_open(source / shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, holder in found.tensors.items() if holder == shard}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                assert tuple(file.get_slice(name).get_shape()) == found.infos[name].shape
                assert file.get_slice(name).get_dtype() == found.infos[name].dtype


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("fuzzed")
    return {shards: make_source(root / str(shards), shards=shards, num_hidden_layers=1) for shards in (ONE, MANY)}


@settings(FUZZ, max_examples=200)
@given(st.data())
def test_fuzzed_header_bytes(fuzzed: dict[bool, Path], data: st.DataObject) -> None:
    path = fuzzed[ONE] / SHARD
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'{}[]",:0159')
        )
    try:
        path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        assert_refused_or_right(fuzzed[ONE])
    finally:
        path.write_bytes(original)


@settings(FUZZ, max_examples=200)
@given(st.data())
def test_fuzzed_header_values(fuzzed: dict[bool, Path], data: st.DataObject) -> None:
    path = fuzzed[ONE] / SHARD
    original = path.read_bytes()
    header, tensors = read_shard(path)
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
    value = data.draw(NEARLY | JSON)
    header |= {name: {**header[name], field: value}} if data.draw(st.booleans()) else {name: value}
    header |= data.draw(st.dictionaries(st.text(max_size=8), NEARLY | JSON, max_size=1))
    try:
        write_shard(path, json.dumps(header).encode(), tensors, data.draw(st.none() | st.integers(0, 2**64 - 1)))
        assert_refused_or_right(fuzzed[ONE])
    finally:
        path.write_bytes(original)


@settings(FUZZ, max_examples=200)
@given(st.data())
def test_fuzzed_index(fuzzed: dict[bool, Path], data: st.DataObject) -> None:
    path = fuzzed[MANY] / INDEX
    original = path.read_text()
    index = json.loads(original)
    shards = st.sampled_from(sorted(set(index["weight_map"].values())))
    names = st.sampled_from(sorted(index["weight_map"])) | st.text(max_size=8)
    entry = st.dictionaries(names, shards | st.text(max_size=20) | JSON, min_size=1, max_size=2)
    changed = data.draw(
        st.one_of(
            JSON,
            st.fixed_dictionaries({"weight_map": JSON}),
            entry.map(lambda entry: {**index, "weight_map": {**index["weight_map"], **entry}}),
        )
    )
    try:
        path.write_text(json.dumps(changed))
        assert_refused_or_right(fuzzed[MANY])
    finally:
        path.write_text(original)

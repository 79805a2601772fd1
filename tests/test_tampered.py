"""A converted checkpoint that was tampered with, or damaged: loading it names the file and the tensor, soon."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, make_source
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from attnres import AttnResConfig, AttnResError, AttnResForCausalLM, convert

pytestmark = pytest.mark.timeout(60)  # a file that is waited for must not stop the suite

Damage = Callable[[Path], Any]
DEPTH, SHARD = "model-attnres.safetensors", "model-00001-of-00001.safetensors"
NAN, INF = float("nan"), float("inf")
QUERY, KEY_NORM = "model.depth_attention.query", "model.depth_attention.key_norm"
UP = "model.layers.1.mlp.up_proj.weight"


def edit_tensors(shard: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def edit(checkpoint: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / shard).items()}
        change(tensors)
        (checkpoint / shard).unlink()  # it may be the source's own file
        save_file(tensors, checkpoint / shard, metadata={"format": "pt"})

    return edit


def fill(name: str, value: float) -> Damage:
    return edit_tensors(DEPTH, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def reshape(shard: str, name: str, *shape: int) -> Damage:
    return edit_tensors(shard, lambda tensors: tensors.update({name: torch.zeros(shape)}))


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        change(content)
        (checkpoint / name).write_text(json.dumps(content))

    return edit


def configure(**fields: Any) -> Damage:
    return edit_json("config.json", lambda config: config.update(fields))


def depth(**entries: Any) -> Damage:
    return edit_json("config.json", lambda config: config["depth_attention"].update(entries))


def unlist(name: str) -> Damage:
    return edit_json(INDEX, lambda index: index["weight_map"].pop(name))


def put(name: str, shard: Any) -> Damage:
    return edit_json(INDEX, lambda index: index["weight_map"].update({name: shard}))


def both(*edits: Damage) -> Damage:
    return lambda checkpoint: [edit(checkpoint) for edit in edits]


def drop(shard: str, name: str) -> Damage:
    return both(edit_tensors(shard, lambda tensors: tensors.pop(name)), unlist(name))


def replace_by(name: str, make: Callable[[Path], Any]) -> Damage:
    def edit(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        make(checkpoint / name)

    return edit


def write(name: str, content: str | bytes) -> Damage:
    return replace_by(name, lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content))


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)
    os.chdir(here)


def cut(name: str, num_bytes: int) -> Damage:
    return lambda checkpoint: write(name, (checkpoint / name).read_bytes()[:-num_bytes])(checkpoint)


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def vouch(size: int) -> Damage:
    """A tensor without elements has this size."""
    return both(
        edit_tensors(DEPTH, lambda tensors: tensors.update({"x": torch.zeros(size, 0)})),
        put("x", DEPTH),
        configure(hidden_size=size),
    )


def many_lists(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text('{"weight_map": [' + "[]," * 20_000_000 + "[]]}")


# What happens to the checkpoint, and what the message names.
TAMPERED: dict[str, tuple[Damage, str]] = {
    "a query not a number": (fill(QUERY, NAN), f"{DEPTH}: tensor '{QUERY}' holds values that are not finite"),
    "a query infinite": (fill(QUERY, INF), f"{DEPTH}: tensor '{QUERY}' holds values"),
    "a key norm not a number": (fill(KEY_NORM, NAN), f"{DEPTH}: tensor '{KEY_NORM}' holds values"),
    "no query": (drop(DEPTH, QUERY), f"lacks tensor '{QUERY}'"),
    "no key norm": (drop(DEPTH, KEY_NORM), f"lacks tensor '{KEY_NORM}'"),
    "no depth parameters": (both(unlist(QUERY), unlist(KEY_NORM)), "lacks tensor 'model.depth_attention.key_norm'"),
    "a query that the index alone has": (
        edit_tensors(DEPTH, lambda tensors: tensors.pop(QUERY)),
        f"{DEPTH} lacks tensor '{QUERY}', which {INDEX} puts there",
    ),
    "queries of other reads": (reshape(DEPTH, QUERY, 3, 32), f"{DEPTH}: tensor '{QUERY}' has shape [3, 32]"),
    "queries of another width": (reshape(DEPTH, QUERY, 9, 31), f"{DEPTH}: tensor '{QUERY}' has shape [9, 31]"),
    "queries of one dimension": (reshape(DEPTH, QUERY, 288), f"{DEPTH}: tensor '{QUERY}' has shape [288]"),
    "queries without elements": (reshape(DEPTH, QUERY, 0, 32), f"{DEPTH}: tensor '{QUERY}' has shape [0, 32]"),
    "a weight of another shape": (reshape(SHARD, UP, 32, 31), f"{SHARD}: tensor '{UP}' has shape [32, 31]"),
    "a weight that is not there": (drop(SHARD, UP), f"lacks tensor '{UP}'"),
    "block_size null": (depth(block_size=None), "config.json: block_size=None"),
    "block_size zero": (depth(block_size=0), "config.json: block_size=0"),
    "block_size vast": (depth(block_size=10**30), "config.json: block_size="),
    "block_size a list": (depth(block_size=[2]), "config.json: block_size=[2]"),
    "mix a dict": (depth(mix={}), "config.json: mix={}"),
    "epsilon not a number": (depth(key_norm_eps=NAN), "config.json: key_norm_eps=nan"),
    "an entry for a terminal": (depth(**{"\x1b[31m": 1}), "config.json: depth_attention"),
    "depth null": (configure(depth_attention=None), "config.json: depth_attention=None"),
    "a list for depth": (configure(depth_attention=[1]), "config.json: depth_attention=[1]"),
    "backbone unknown": (configure(backbone_model_type="nothing"), "config.json: backbone_model_type='nothing'"),
    "backbone a list": (configure(backbone_model_type=["qwen3"]), "config.json: backbone_model_type=['qwen3']"),
    "backbone not supported": (configure(backbone_model_type="bert"), "'bert' is not supported"),
    "hidden_size vast": (configure(hidden_size=10**9), "config.json: hidden_size=1000000000, but no tensor"),
    "hidden_size other": (configure(hidden_size=40), "config.json: hidden_size=40, but no tensor"),
    "hidden_size that nothing backs": (vouch(10**9), "config.json: hidden_size=1000000000, but no tensor"),
    "layers vast": (configure(num_hidden_layers=10**9), "num_hidden_layers"),
    "layers many": (configure(num_hidden_layers=9000, layer_types=None), "num_hidden_layers"),
    "layers more than stored": (configure(num_hidden_layers=6, layer_types=None), f"{DEPTH}: tensor '{KEY_NORM}' has"),
    "labels vast": (configure(num_labels=10**9), "config.json: num_labels"),
    "heads vast": (configure(num_attention_heads=10**9), "config.json: num_attention_heads=1000000000"),
    "heads none": (configure(num_attention_heads=0), "makes no qwen3 model"),
    "head_dim vast": (configure(head_dim=10**12), "config.json: head_dim=1000000000000"),
    "intermediate_size vast": (configure(intermediate_size=10**9), "tensor 'model.layers.0.mlp.down_proj.weight' has"),
    "vocabulary vast": (configure(vocab_size=10**10), "has shape"),
    "activation unknown": (configure(hidden_act="nothing"), "makes no qwen3 model"),
    "weights of elsewhere": (configure(transformers_weights="../x.safetensors"), "transformers_weights="),
    "config nested": (write("config.json", nested(100_000)), "config.json"),
    "config nested less": (configure(a=json.loads(nested(900))), "config.json"),
    "config nested a little": (configure(a=json.loads(nested(100))), "config.json: its fields are nested"),
    "index nested": (write(INDEX, nested(100_000)), f"{INDEX} is not readable JSON"),
    "index cut off": (cut(INDEX, 9), f"{INDEX} is not readable JSON"),
    "index of many lists": (many_lists, f"{INDEX} is not readable JSON: it holds more than"),
    "index a list": (write(INDEX, "[]"), f"{INDEX} is not readable JSON: a JSON list"),
    "index without a map": (write(INDEX, "{}"), f"{INDEX}: weight_map is missing"),
    "index with a map of numbers": (put(QUERY, 3), f"{INDEX}: tensor '{QUERY}' is in '3', which is no safetensors"),
    "index out of the directory": (put(QUERY, f"../{DEPTH}"), f"tensor '{QUERY}' is in '../{DEPTH}', which is no"),
    "index to a pickle": (put(QUERY, "x.bin"), f"tensor '{QUERY}' is in 'x.bin', which is no safetensors"),
    "index a FIFO": (replace_by(INDEX, os.mkfifo), f"{INDEX} is not a regular file"),
    "shard a FIFO": (replace_by(DEPTH, os.mkfifo), f"{DEPTH} is not a regular file"),
    "large shard a FIFO": (replace_by(SHARD, os.mkfifo), f"{SHARD} is not a regular file"),
    "shard a directory": (replace_by(DEPTH, os.mkdir), f"{DEPTH} is not a regular file"),
    "shard a socket": (replace_by(DEPTH, bind_socket), f"{DEPTH} is not a regular file"),
    "shard an endless device": (replace_by(DEPTH, lambda path: path.symlink_to("/dev/zero")), "is not a regular file"),
    "shard a link to itself": (replace_by(DEPTH, lambda path: path.symlink_to(path.name)), f"{DEPTH} cannot be read"),
    "shard a link to nothing": (replace_by(DEPTH, lambda path: path.symlink_to("gone")), f"{DEPTH} cannot be read"),
    "shard gone": (lambda checkpoint: (checkpoint / DEPTH).unlink(), f"{DEPTH} cannot be read"),
    "shard empty": (write(DEPTH, b""), f"{DEPTH} is not a whole safetensors file"),
    "shard cut off": (cut(DEPTH, 1), f"{DEPTH} is not a whole safetensors file"),
    "shard a pickle": (write(DEPTH, b"\x80\x04K\x01."), f"{DEPTH} is not a whole safetensors file"),
    "shard of a vast header": (write(DEPTH, b"\xff" * 8 + b"{}"), f"{DEPTH} is not a whole safetensors file"),
}
# `AutoModelForCausalLM` reads config.json before it asks this package, which can say nothing of these.
READ_BY_THE_LIBRARY = [TAMPERED[name] for name in ("config nested", "config nested less")]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    make_source(root / "source")
    convert(root / "source", root / "converted", verify="none")
    return root / "converted"


@pytest.mark.parametrize("damage", TAMPERED.values(), ids=TAMPERED.keys())
def test_loading_names_what_was_tampered_with(damage: tuple[Damage, str], converted: Path, tmp_path: Path) -> None:
    edit, message = damage
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted, checkpoint)
    edit(checkpoint)
    started, peak = time.monotonic(), peak_bytes()
    loaders = [AttnResForCausalLM.from_pretrained]
    if damage not in READ_BY_THE_LIBRARY:
        loaders.append(AutoModelForCausalLM.from_pretrained)
    for load in loaders:
        with pytest.raises(AttnResError) as raised:
            load(checkpoint)
        assert message in str(raised.value)
        assert str(checkpoint) in str(raised.value) or "not supported" in message
        assert len(str(raised.value)) < 5000
        assert all(c.isprintable() or c == "\n" for c in str(raised.value))
    assert time.monotonic() - started < 20
    assert peak_bytes() - peak < 2**29


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("load", [AttnResConfig.from_pretrained, AutoConfig.from_pretrained], ids=["own", "Auto"])
@pytest.mark.parametrize("name", ["block_size null", "mix a dict", "layers vast", "labels vast", "backbone unknown"])
def test_a_configuration_names_its_file(
    name: str, load: Callable[[Path], Any], converted: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted, checkpoint)
    TAMPERED[name][0](checkpoint)
    with pytest.raises(AttnResError, match=f"{checkpoint}/config.json: "):
        load(checkpoint)


def test_what_is_right_is_loaded(converted: Path, tmp_path: Path) -> None:
    """Links, a variant, fewer layers, other shapes where they are asked for, and a head that has to be learned."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted, checkpoint)
    replace_by(DEPTH, lambda path: path.symlink_to(converted / DEPTH))(checkpoint)
    model = AttnResForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    assert AttnResForCausalLM.from_pretrained(tmp_path / "variant", variant="fp32").num_parameters()
    reshape(DEPTH, QUERY, 3, 32)(checkpoint)
    assert AttnResForCausalLM.from_pretrained(checkpoint, ignore_mismatched_sizes=True).num_parameters()

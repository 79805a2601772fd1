from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_tokens, retrofit, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from attnres import AttnResConfig, AttnResError, AttnResForCausalLM, convert
from attnres.conversion import ConversionError, VerificationError, converter, verification
from attnres.examples.demo import CHECKPOINT

INDEX = "model.safetensors.index.json"


def snapshot(directory: Path) -> dict[str, Any]:
    """Name, bytes and modification time of everything below a directory."""
    return {
        path.relative_to(directory).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
            path.lstat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
    }


def make_source(directory: Path, family: str = "qwen3", shards: bool = False, **overrides: Any) -> Path:
    model = tiny_model(family, **overrides)
    model.save_pretrained(directory, max_shard_size="40KB" if shards else "5GB")
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


# -- what a conversion does --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_is_lossless_and_rewrites_nothing(family: str, shards: bool, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family, shards)
    before = snapshot(source)
    report = convert(source, tmp_path / "converted", num_blocks=3)
    assert snapshot(source) == before
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    assert report.verification.largest_logit_difference <= 1e-4
    assert report.bytes_linked == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert report.bytes_copied == 0
    inodes = {path.stat().st_ino for path in source.glob("*.safetensors")}
    linked = [
        path for path in (tmp_path / "converted").glob("*.safetensors") if path.name != "model-attnres.safetensors"
    ]
    assert {path.stat().st_ino for path in linked} == inodes

    original, result = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "converted"))
    assert isinstance(result, AttnResForCausalLM)
    input_ids = random_tokens()
    torch.testing.assert_close(result(input_ids).logits, original(input_ids).logits, atol=1e-5, rtol=1e-4)


def test_index_names_every_tensor(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "qwen3_moe", shards=True)
    convert(source, tmp_path / "converted", verify="none")
    index = json.loads((tmp_path / "converted" / INDEX).read_text())
    original = json.loads((source / INDEX).read_text())["weight_map"]
    depth = {"depth_attention.key_norm", "depth_attention.query"}
    assert {name: shard for name, shard in index["weight_map"].items() if name not in depth} == original
    found = {}
    for shard in set(index["weight_map"].values()):
        found |= dict.fromkeys(load_file(tmp_path / "converted" / shard), shard)
    assert found == index["weight_map"]
    assert index["metadata"]["total_parameters"] == sum(
        tensor.numel()
        for shard in set(index["weight_map"].values())
        for tensor in load_file(tmp_path / "converted" / shard).values()
    )


def test_loads_without_the_package_in_a_fresh_process(tmp_path: Path) -> None:
    """Also saves there, and the result loads back here."""
    source = make_source(tmp_path / "source", "kimi_linear", shards=True)
    convert(source, tmp_path / "converted", num_blocks=3)
    program = (
        "import sys, torch\n"
        "sys.modules['attnres'] = None\n"  # any import of it fails
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "trust = {'trust_remote_code': True}\n"
        "model, info = AutoModelForCausalLM.from_pretrained('converted', output_loading_info=True, **trust)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "assert type(model).__name__ == 'AttnResForCausalLM'\n"
        "input_ids = torch.arange(3, 20)[None]\n"
        "torch.save(model.eval()(input_ids).logits, 'logits.pt')\n"
        "torch.save(model.generate(input_ids, max_new_tokens=8, do_sample=False), 'tokens.pt')\n"
        "AutoModel.from_pretrained('converted', trust_remote_code=True)(input_ids)\n"
        "model.save_pretrained('saved')\n"
        "again = AutoModelForCausalLM.from_pretrained('saved', trust_remote_code=True).eval()\n"
        "assert torch.equal(again(input_ids).logits, model(input_ids).logits)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=tmp_path, env=environment)
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    input_ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), original(input_ids).logits, atol=1e-5, rtol=1e-4)
    expected = original.generate(input_ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), expected)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), AttnResForCausalLM)


def test_companions_come_along_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKPOINT, source)
    extra = {
        "LICENSE": "the licence",
        "chat_template.jinja": "{{ messages }}",
        "tokenization_special.py": "# code of a tokenizer",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "README.md": "card of another model",
        "optimizer.pt": "state",
        "modeling_other.py": "# code of another model",
        "pytorch_model.bin": "pickle",
    }
    for name, text in extra.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    convert(source, tmp_path / "converted", verify="none")
    converted = tmp_path / "converted"
    delivered = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert delivered == {
        "LICENSE",
        "README.md",
        "additional_chat_templates/tools.jinja",
        "attnres_conversion.json",
        "chat_template.jinja",
        "config.json",
        "configuration_attnres.py",
        "depth_attention.py",
        "depth_attention_triton.py",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model-attnres.safetensors",
        INDEX,
        "modeling_attnres.py",
        "tokenization_special.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (source / name).read_bytes()
    assert "card of another model" not in (converted / "README.md").read_text()
    for path in [*converted.rglob("*.json"), converted / "README.md"]:
        assert str(tmp_path) not in path.read_text(), f"{path.name} tells where the source was"


@pytest.mark.parametrize(
    ("kwargs", "block_size"),
    [({}, 1), ({"num_blocks": 2}, 4), ({"block_size": 3}, 3), ({"block_size": 1, "mix": "mean"}, 1)],
)
def test_depth_configuration(source: Path, kwargs: dict[str, Any], block_size: int) -> None:
    destination = source.parent / "converted"
    report = convert(source, destination, verify="none", **kwargs)
    config = AutoConfig.from_pretrained(destination)
    assert isinstance(config, AttnResConfig)
    assert (config.block_size, report.block_size) == (block_size, block_size)
    assert config.mix == report.mix == kwargs.get("mix", "sum")
    assert report.added_parameters == 2 * 9 * 32
    assert json.loads((destination / "attnres_conversion.json").read_text())["block_size"] == block_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_the_source_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "converted")
    model = AttnResForCausalLM.from_pretrained(tmp_path / "converted", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_symbolic_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs = make_source(tmp_path / "blobs")
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    report = convert(source, tmp_path / "converted")
    assert report.bytes_linked > 0
    assert not any(path.is_symlink() for path in (tmp_path / "converted").iterdir())
    shutil.rmtree(blobs)
    AttnResForCausalLM.from_pretrained(tmp_path / "converted")


def test_copies_where_links_are_not_possible(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = convert(source, source.parent / "converted")
    assert report.bytes_linked == 0
    assert report.bytes_copied == (source / "model.safetensors").stat().st_size
    copied = source.parent / "converted" / "model-00001-of-00001.safetensors"
    assert copied.read_bytes() == (source / "model.safetensors").read_bytes()


def test_saving_into_the_converted_directory_leaves_the_source_alone(source: Path) -> None:
    """Shards are hard links: whoever writes to one must not write through it."""
    before = snapshot(source)
    destination = source.parent / "converted"
    convert(source, destination, verify="none")
    model = AttnResForCausalLM.from_pretrained(destination)
    with torch.no_grad():
        model.backbone.model.embed_tokens.weight.zero_()
    model.save_pretrained(destination, max_shard_size="40KB")
    assert snapshot(source) == before


def test_sample_runs_a_layer_of_each_kind(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "deepseek_v3", num_hidden_layers=6, first_k_dense_replace=3)
    report = convert(source, tmp_path / "converted", block_size=1, verify="sample")
    assert report.verification is not None
    assert report.verification.num_hidden_layers == 4  # three dense layers come before the first with experts


def test_sample_runs_the_first_blocks_only(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama", num_hidden_layers=9)
    report = convert(source, tmp_path / "converted", block_size=3, verify="sample")
    assert report.verification is not None
    assert report.verification.num_hidden_layers == 4  # two blocks are six sublayers; the seventh begins the third
    assert report.verification.greedy_agreement == 1


def test_overwrite(source: Path) -> None:
    destination = source.parent / "converted"
    convert(source, destination, block_size=2, verify="none")
    convert(source, destination, block_size=4, verify="none", overwrite=True)
    assert AutoConfig.from_pretrained(destination).block_size == 4
    assert sorted(path.name for path in source.parent.iterdir()) == ["converted", "source"]


# -- verification refuses what differs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_a_checkpoint_that_differs_is_not_delivered(source: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = converter._write_index

    def corrupt(checkpoint: Any, config: Any, stage: Path) -> None:
        path = stage / converter.SINGLE_SHARD
        tensors = load_file(path)
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 0.5
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
        write(checkpoint, config, stage)

    monkeypatch.setattr(converter, "_write_index", corrupt)
    before = snapshot(source.parent)
    with pytest.raises(VerificationError, match="differs from source: largest logit difference"):
        convert(source, source.parent / "converted", verify=mode)
    assert snapshot(source.parent).keys() == before.keys()


def test_wrong_queries_are_not_delivered(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: torch.full(*args, 0.5, **kwargs))
    with pytest.raises(VerificationError, match="not zeros and ones"):
        convert(source, source.parent / "converted")
    assert not (source.parent / "converted").exists()


def test_a_model_that_does_not_fit_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(ConversionError, match="verify='sample'"):
        convert(source, source.parent / "converted")
    convert(source, source.parent / "converted", verify="sample")


# -- bad input ---------------------------------------------------------------------------------------------------------


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **fields}))

    return edit


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        index = json.loads((source / INDEX).read_text())
        change(index)
        (source / INDEX).write_text(json.dumps(index))

    return edit


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        (source / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def remove(*patterns: str) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        for pattern in patterns:
            for path in source.glob(pattern):
                path.unlink()

    return edit


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        for one in edits:
            one(source)

    return edit


def truncate_shard(source: Path) -> None:
    shard = next(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def add_tensor(name: str) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        save_file({**tensors, name: torch.zeros(2)}, source / "model.safetensors", metadata={"format": "pt"})

    return edit


def drop_tensor(name: str) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        del tensors[name]
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    return edit


def other_family(source: Path) -> None:
    shutil.rmtree(source)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)).save_pretrained(source)


def already_converted(source: Path) -> None:
    shutil.rmtree(source)
    retrofit(tiny_model("qwen3")).save_pretrained(source)


# name, sharded source?, what happens to the source, arguments of convert, what the message says
BAD_INPUT: list[tuple[str, bool, Callable[[Path], None], dict[str, Any], str]] = [
    ("no config", False, remove("config.json"), {}, "no config.json"),
    ("config not JSON", False, write("config.json", "{"), {}, "config.json is not readable JSON"),
    ("config not text", False, write("config.json", b"\xff\xfe\x00{"), {}, "config.json is not readable JSON"),
    ("config a list", False, write("config.json", "[]"), {}, "config.json holds a JSON list"),
    ("no model_type", False, write("config.json", "{}"), {}, "model_type=None"),
    ("model_type a number", False, edit_config(model_type=3), {}, "model_type=3"),
    ("another family", False, other_family, {}, "'gpt2' is not supported"),
    ("unknown family", False, edit_config(model_type="qwen99"), {}, "'qwen99' is not supported"),
    ("already converted", False, already_converted, {}, "AttnRes checkpoint already"),
    ("a classifier", False, edit_config(architectures=["Qwen3ForSequenceClassification"]), {}, "causal language"),
    ("architectures a string", False, edit_config(architectures="Qwen3ForCausalLM"), {}, "list of class names"),
    ("quantised otherwise", False, edit_config(quantization_config={"quant_method": "hqq"}), {}, "quant_method='hqq'"),
    ("bad field", False, edit_config(hidden_size="wide"), {}, "hidden_size"),
    ("no layers", False, edit_config(num_hidden_layers=0, layer_types=[]), {}, "num_hidden_layers=0"),
    ("more layers than weights", False, edit_config(num_hidden_layers=5, layer_types=None), {}, "lacks .* tensors"),
    ("other shapes", False, edit_config(intermediate_size=64), {}, "shapes contradict config.json"),
    ("adapter", False, both(remove("config.json"), write("adapter_config.json", "{}")), {}, "PEFT adapter"),
    ("no weights", False, remove("*.safetensors"), {}, "neither model.safetensors nor"),
    (
        "pickled weights",
        False,
        both(remove("*.safetensors"), write("pytorch_model.bin", b"x")),
        {},
        "pickled weights .*--allow-pickle",
    ),
    ("empty shard", False, write("model.safetensors", b""), {}, "not a whole safetensors file"),
    ("shard of garbage", False, write("model.safetensors", b"garbage" * 99), {}, "not a whole safetensors file"),
    ("truncated shard", False, truncate_shard, {}, "not a whole safetensors file"),
    ("tensor missing", False, drop_tensor("model.layers.1.mlp.up_proj.weight"), {}, "lacks 1 tensors .*up_proj"),
    ("name taken", False, add_tensor("depth_attention.query"), {}, "'depth_attention.query', a name that AttnRes"),
    ("index not JSON", True, write(INDEX, "nope"), {}, "index.json is not readable JSON"),
    ("index without map", True, write(INDEX, "{}"), {}, "weight_map is missing"),
    ("index with a list", True, write(INDEX, '{"weight_map": ["a"]}'), {}, "weight_map is missing"),
    (
        "index out of the directory",
        True,
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "../model.safetensors"})),
        {},
        "no safetensors file name",
    ),
    (
        "index absolute",
        True,
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "/etc/passwd"})),
        {},
        "no safetensors file name",
    ),
    ("shard missing", True, remove("model-00001-*.safetensors"), {}, "named by .* but missing"),
    (
        "index with a tensor too many",
        True,
        edit_index(lambda index: index["weight_map"].update({"ghost": sorted(index["weight_map"].values())[0]})),
        {},
        "lacks tensor 'ghost'",
    ),
    (
        "index with a tensor too few",
        True,
        edit_index(lambda index: index["weight_map"].pop("model.norm.weight")),
        {},
        "'model.norm.weight', which the index puts in None",
    ),
    ("tensor missing, unverified", False, drop_tensor("model.norm.weight"), {"verify": "none"}, "lacks 1 tensors"),
    (
        "layer missing, sampled",
        False,
        drop_tensor("model.layers.3.mlp.up_proj.weight"),
        {"verify": "sample", "block_size": 1},
        "lacks 1 tensors",
    ),
    ("nested beyond reason", False, write("config.json", "[" * 100_000), {}, "not readable JSON"),
    ("empty vocabulary", False, edit_config(vocab_size=0), {}, "source cannot be loaded"),
    ("no heads", False, edit_config(num_attention_heads=0), {}, "source cannot be loaded"),
    ("padding beyond the vocabulary", False, edit_config(pad_token_id=1000), {}, "cannot be loaded"),
    ("dtype of integers", False, edit_config(dtype="int8"), {}, "floating-point dtype"),
    ("no such source", False, lambda source: shutil.rmtree(source), {}, "does not exist"),
    ("both sizes", False, lambda source: None, {"num_blocks": 2, "block_size": 2}, "exactly one"),
    ("too many blocks", False, lambda source: None, {"num_blocks": 9}, "num_blocks=9 .* from 1 to 8"),
    ("block_size zero", False, lambda source: None, {"block_size": 0}, "block_size=0"),
    ("mix unknown", False, lambda source: None, {"mix": "max"}, "mix='max'"),
    ("verify unknown", False, lambda source: None, {"verify": "maybe"}, "verify='maybe'"),
]


@pytest.mark.parametrize(
    ("sharded", "damage", "kwargs", "message"), [c[1:] for c in BAD_INPUT], ids=[c[0] for c in BAD_INPUT]
)
def test_bad_input_is_refused(
    sharded: bool, damage: Callable[[Path], None], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "source", shards=sharded)
    damage(source)
    before = snapshot(tmp_path)
    with pytest.raises(AttnResError, match=message):
        convert(source, tmp_path / "converted", **kwargs)
    after = snapshot(tmp_path)
    assert after.keys() == before.keys(), "something was left behind"
    assert {name: after[name] for name in after if "/" in name} == {n: before[n] for n in before if "/" in n}


def test_source_that_is_no_directory(source: Path) -> None:
    with pytest.raises(ConversionError, match="is a file"):
        convert(source / "config.json", source.parent / "converted")
    with pytest.raises(ConversionError, match="could not be fetched from the Hub"):
        convert("someone/some-model", source.parent / "converted")
    with pytest.raises(ConversionError, match="neither a directory nor a Hub id"):
        convert("not a//hub id", source.parent / "converted")


BAD_DESTINATIONS: list[tuple[str, Callable[[Path], Path], bool, str]] = [
    ("exists", lambda root: make_source(root / "there"), False, "exists; choose another"),
    ("not a checkpoint", lambda root: make_directory(root / "there"), True, "not, or not only, a converted"),
    ("a file", lambda root: make_file(root / "there"), True, "not, or not only, a converted"),
    ("no parent", lambda root: root / "nowhere" / "there", False, "parent directory does not exist"),
    ("the source", lambda root: root / "source", True, "not, or not only, a converted"),
    ("a clone with history", lambda root: make_clone(root / "there"), True, "not, or not only, a converted"),
    ("another project", lambda root: make_project(root / "there"), True, "not, or not only, a converted"),
    ("inside the source", lambda root: root / "source" / "there", False, "overlap"),
]


def make_directory(path: Path) -> Path:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    return path


def make_clone(path: Path) -> Path:
    convert(CHECKPOINT, path, verify="none")
    (path / ".git").mkdir()
    return path


def make_project(path: Path) -> Path:
    make_directory(path)
    (path / "config.json").write_text('{"app": 1}')
    return path


def make_file(path: Path) -> Path:
    path.write_text("a file")
    return path


@pytest.mark.parametrize(
    ("make", "overwrite", "message"), [c[1:] for c in BAD_DESTINATIONS], ids=[c[0] for c in BAD_DESTINATIONS]
)
def test_bad_destination_is_left_as_it_is(
    source: Path, make: Callable[[Path], Path], overwrite: bool, message: str
) -> None:
    destination = make(source.parent)
    before = snapshot(source.parent)
    with pytest.raises(ConversionError, match=message):
        convert(source, destination, overwrite=overwrite)
    assert snapshot(source.parent) == before


def test_source_that_is_linked_into_the_destination(source: Path) -> None:
    """Replacing the destination would remove what the links of the source point to."""
    destination = source.parent / "converted"
    convert(source, destination, verify="none")
    for path in source.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(destination / path.name)
    before = snapshot(source.parent)
    with pytest.raises(ConversionError, match="overlap"):
        convert(source, destination, overwrite=True)
    assert snapshot(source.parent) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "there"), "source None"),
        ((3, "there"), "source 3"),
        (("a" * 5000, "there"), "is no path and no Hub id"),
        (("source", None), "destination None"),
        (("source", "nul\0"), "no path that can be used"),
    ],
)
def test_arguments_that_are_no_paths(
    source: Path, arguments: tuple[Any, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    with pytest.raises(ConversionError, match=message):
        convert(*arguments)
    with pytest.raises(ConversionError, match="revision='main' is for Hub ids"):
        convert(source, "there", revision="main")


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["_link_shards", "_write_index", "_write_config_and_code", "_deliver", "compare"])
def test_a_conversion_that_fails_leaves_nothing(source: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converter, step, fail)
    before = snapshot(source)
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(source, source.parent / "converted")
    assert snapshot(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_failed_replacement_keeps_the_old_checkpoint(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = source.parent / "converted"
    convert(source, destination, block_size=2, verify="none")
    before = snapshot(destination)
    rename = Path.rename

    def fail_to_deliver(self: Path, target: Path) -> Path:
        if Path(target) == destination and ".replaced" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_deliver)
    with pytest.raises(ConversionError, match="Input/output error"):
        convert(source, destination, block_size=4, verify="none", overwrite=True)
    assert snapshot(destination) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["converted", "source"]


def test_an_interrupted_replacement_loses_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two renames puts the old checkpoint back; after SIGKILL the next conversion does."""
    destination = source.parent / "converted"
    convert(source, destination, block_size=2, verify="none")
    before = snapshot(destination)
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if Path(target) == destination and ".replaced" not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, destination, block_size=4, verify="none", overwrite=True)
    monkeypatch.undo()
    assert snapshot(destination) == before
    destination.rename(source.parent / ".converted.attnres-abcd1234.replaced")  # as SIGKILL would leave it
    with pytest.raises(ConversionError, match="exists"):
        convert(source, destination, block_size=4, verify="none")
    assert snapshot(destination) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["converted", "source"]


def test_a_destination_that_appears_meanwhile_is_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = converter._link_shards

    def link_and_make(*arguments: Any) -> Any:
        make_directory(source.parent / "converted")
        return link(*arguments)

    monkeypatch.setattr(converter, "_link_shards", link_and_make)
    with pytest.raises(ConversionError, match="exists"):
        convert(source, source.parent / "converted", verify="none")
    assert (source.parent / "converted" / "thesis.tex").read_text() == "years of work"


def test_neighbours_with_similar_names_are_left_alone(source: Path) -> None:
    notes = source.parent / ".converted.attnres-notes"
    make_directory(notes)
    make_file(source.parent / ".converted.attnres-abcd1234")
    convert(source, source.parent / "converted", verify="none")
    assert (notes / "thesis.tex").exists()
    assert (source.parent / ".converted.attnres-abcd1234").exists()


def test_ties_between_experts_are_settled_in_float64(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verification.TOLERANCE, "sum", 1e-12)  # as if the rounding of float32 had changed an expert
    report = convert(source, source.parent / "converted", block_size=3)
    assert report.verification is not None
    assert report.verification.dtype == "float64"


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 0.5])
def test_a_killed_conversion_leaves_no_destination(tmp_path: Path, delay: float) -> None:
    source = make_source(tmp_path / "source", shards=True)
    before = snapshot(source)
    program = (
        "import attnres.conversion as c; print('ready', flush=True)\n"
        "c.convert('source', 'converted', num_blocks=3); print('done', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = process.stdout.read() == "done\n"
    assert snapshot(source) == before
    if (tmp_path / "converted").exists():
        AttnResForCausalLM.from_pretrained(tmp_path / "converted")
    else:
        assert not finished
        convert(source, tmp_path / "converted", num_blocks=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"], "temporary files remain"

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, make_source, snapshot
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_tokens, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import attnres
from attnres import AttnResConfig, AttnResForCausalLM, convert
from attnres.backbones import SUPPORTED
from attnres.conversion import ConversionError, VerificationError, converter, delivery, loading, verification
from attnres.examples.demo import CHECKPOINT

# The code that comes with a checkpoint: every module at the root of the package but these two.
TRAVELLING = {path.name for path in Path(attnres.__file__).parent.glob("*.py")} - {"__init__.py", "cli.py"}


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
    depth = {"model.depth_attention.key_norm", "model.depth_attention.query"}
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
        *TRAVELLING,
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model-attnres.safetensors",
        INDEX,
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
    found = {name: parameter.dtype for name, parameter in model.named_parameters()}
    depth = {name: found.pop(name) for name in list(found) if "depth_attention" in name}
    assert set(found.values()) == {dtype}
    assert list(depth.values()) == [torch.float32] * 2
    stored = load_file(tmp_path / "converted" / "model-attnres.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == depth


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
        model.model.embed_tokens.weight.zero_()
    model.save_pretrained(destination, max_shard_size="40KB")
    assert snapshot(source) == before


def test_sample_runs_a_layer_of_each_kind(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "deepseek_v3", num_hidden_layers=6, first_k_dense_replace=3)
    report = convert(source, tmp_path / "converted", block_size=1, verify="sample")
    assert report.verification is not None
    assert report.verification.num_hidden_layers == 4  # three dense layers come before the first with experts


@pytest.mark.parametrize("family", ["falcon_h1", "gemma4_text"])
def test_sample_says_where_layers_cannot_be_loaded_alone(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family)
    with pytest.raises(ConversionError, match="not every architecture can do; use verify='full' or verify='none'"):
        convert(source, tmp_path / "converted", block_size=1, verify="sample")
    assert not (tmp_path / "converted").exists()


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
    assert AutoConfig.from_pretrained(destination).depth_attention["block_size"] == 4
    assert sorted(path.name for path in source.parent.iterdir()) == ["converted", "source"]


# -- verification refuses what differs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_a_checkpoint_that_differs_is_not_delivered(source: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = converter._write_index

    def corrupt(checkpoint: Any, config: Any, names: Any, stage: Path) -> None:
        path = stage / converter.SINGLE_SHARD
        tensors = load_file(path)
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 0.5
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
        write(checkpoint, config, names, stage)

    monkeypatch.setattr(converter, "_write_index", corrupt)
    before = snapshot(source.parent)
    with pytest.raises(VerificationError, match="differs from source: largest logit difference"):
        convert(source, source.parent / "converted", verify=mode)
    assert snapshot(source.parent).keys() == before.keys()


@pytest.mark.parametrize("sublayers", [1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
def test_shapes_are_run_without_weights(
    family: str, sublayers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing else is verified: here the package counts another number of sublayers than there are."""
    source = make_source(tmp_path / "source", family)
    monkeypatch.setitem(SUPPORTED, family, SUPPORTED[family]._replace(sublayers=sublayers))
    with pytest.raises(VerificationError, match="the model of source runs, and the converted one does not"):
        convert(source, tmp_path / "converted", verify="none")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_wrong_queries_are_not_delivered(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda tensor: torch.nn.init.constant_(tensor, 0.5))
    with pytest.raises(VerificationError, match="'query' is not what a retrofit starts with, 0 everywhere"):
        convert(source, source.parent / "converted")
    assert not (source.parent / "converted").exists()


def test_a_model_that_does_not_fit_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    with pytest.raises(ConversionError, match="verify='sample'"):
        convert(source, source.parent / "converted")
    convert(source, source.parent / "converted", verify="sample")


def test_ties_between_experts_are_settled_in_float64(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verification.TOLERANCE, "sum", 1e-12)  # as if the rounding of float32 had changed an expert
    report = convert(source, source.parent / "converted", block_size=3)
    assert report.verification is not None
    assert report.verification.dtype == "float64"


# -- bad arguments ---------------------------------------------------------------------------------------------------


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


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def turn(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


# What people do in a converted directory, and the file that must not be lost.
ADDITIONS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a thesis", lambda path: (path / "thesis.tex").write_text("years of work"), "thesis.tex"),
    ("a hidden file", lambda path: (path / ".env").write_text("SECRET=1"), r"\.env"),
    ("another tokenizer", lambda path: append(path / "tokenizer.json"), "tokenizer.json' has changed"),
    ("a card written by hand", lambda path: append(path / "README.md"), "README.md' has changed"),
    ("a changed configuration", lambda path: append(path / "config.json"), "config.json' has changed"),
    ("changed code", lambda path: append(path / "modeling_attnres.py"), "modeling_attnres.py' has changed"),
    ("trained weights", lambda path: (path / "model.safetensors").write_bytes(b"weeks"), "'model.safetensors' was not"),
    ("trained queries", lambda path: append(path / "model-attnres.safetensors"), "model-attnres.* has changed"),
    ("a checkpoint of a training run", lambda path: make_directory(path / "checkpoint-100"), "checkpoint-100"),
    ("an empty directory", lambda path: (path / "notes").mkdir(), "'notes' was not written"),
    ("a directory of templates", lambda path: make_directory(path / "additional_chat_templates"), "additional_chat_t"),
    ("a link", lambda path: (path / "data").symlink_to("/"), "'data' was not written"),
    ("a link for a file", lambda path: turn(path / "LICENSE", lambda p: p.symlink_to("README.md")), "LICENSE'"),
    ("a FIFO", lambda path: os.mkfifo(path / "pipe"), "'pipe' was not written"),
    ("a FIFO for a file", lambda path: turn(path / "config.json", os.mkfifo), "'config.json' has changed"),
    ("no report", lambda path: (path / delivery.REPORT).unlink(), "it has no attnres_conversion.json"),
    ("a report of another program", lambda path: (path / delivery.REPORT).write_text("[]"), "does not say what was"),
    ("a vast report", lambda path: os.truncate(path / delivery.REPORT, 10**9), "is too large"),
]


@pytest.mark.parametrize(("add", "message"), [case[1:] for case in ADDITIONS], ids=[case[0] for case in ADDITIONS])
def test_overwriting_loses_nothing_else(add: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "converted"
    shutil.copytree(CHECKPOINT, source)
    (source / "LICENSE").write_text("the licence")
    convert(source, destination, verify="none")
    convert(source, destination, verify="none", overwrite=True)  # nothing was added
    add(destination)
    before = snapshot(tmp_path)
    with pytest.raises(ConversionError, match=f"not, or not only, a converted.*{message}"):
        convert(source, destination, verify="none", overwrite=True)
    assert snapshot(tmp_path) == before


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
    report = json.loads((destination / delivery.REPORT).read_text())  # as if the conversion had written all of it
    (destination / delivery.REPORT).write_text(json.dumps({**report, "files": delivery.written_files(destination)}))
    before = snapshot(source.parent)
    with pytest.raises(ConversionError, match="link out of the checkpoint"):
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

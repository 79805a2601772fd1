"""Every format that is converted computes the same before and after; every other is refused with what to do instead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_tokens, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from attnres import AttnResConfig, AttnResError, AttnResForCausalLM, convert
from attnres.conversion import ConversionError, quantization

BLOCK = 16
SHARD = "model.safetensors"


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(directory: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Replaces every stored tensor by what `change` makes of it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / SHARD).items():
        tensors |= change(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SHARD, {"format": "pt"})


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and not any(part in name for part in ("embed_tokens", "lm_head", ".gate."))


@torch.no_grad()
def logits(directory: Path, **kwargs: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu", **kwargs)
    model = model if getattr(model, "is_quantized", False) else model.float()  # what was dequantised is not cast alone
    return model.eval()(random_tokens()).logits


def assert_same(source: Path, converted: Path, tolerance: float = 1e-5) -> None:
    expected = logits(source)
    torch.testing.assert_close(logits(converted), expected, atol=tolerance * expected.abs().max(), rtol=0)


def assert_carried_over(source: Path, converted: Path) -> None:
    """The shard is the source's own, the quantisation is where the loader looks, depth is not quantised."""
    assert os.path.samefile(source / SHARD, converted / "model-00001-of-00001.safetensors")
    original, config = (json.loads((path / "config.json").read_text()) for path in (source, converted))
    assert config["quantization_config"] == original["quantization_config"]
    depth = load_file(converted / "model-attnres.safetensors")
    assert sorted(depth) == ["model.depth_attention.key_norm", "model.depth_attention.query"]
    assert {tensor.dtype for tensor in depth.values()} == {torch.float32}


# -- layouts of unquantised weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_one_by_one_and_fused(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "single")
    shutil.copytree(tmp_path / "single", tmp_path / "fused")
    save_file(model.state_dict(), tmp_path / "fused" / SHARD, {"format": "pt"})
    experts = {
        layout: {name for name in load_file(tmp_path / layout / SHARD) if ".experts." in name}
        for layout in ("single", "fused")
    }
    assert len(experts["single"]) == 4 * 4 * 3  # layers, experts, projections
    assert len(experts["fused"]) == 4 * 2
    for layout in experts:
        convert(tmp_path / layout, tmp_path / f"{layout}-converted", num_blocks=3)
        assert_same(tmp_path / layout, tmp_path / f"{layout}-converted")
    assert torch.equal(logits(tmp_path / "single-converted"), logits(tmp_path / "fused-converted"))


@pytest.mark.parametrize(
    ("tied", "stored", "shard_size"),
    [(True, False, "5GB"), (True, True, "5GB"), (False, True, "5GB"), (True, False, "40KB"), (False, True, "40KB")],
)
def test_tied_and_untied_heads(tied: bool, stored: bool, shard_size: str, tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "source", max_shard_size=shard_size)
    if tied and stored:  # superfluous, and as good as the embedding's
        rewrite(
            tmp_path / "source",
            lambda name, tensor: {name: tensor} | ({"lm_head.weight": tensor.clone()} if "embed" in name else {}),
        )
    convert(tmp_path / "source", tmp_path / "converted", num_blocks=3)
    assert_same(tmp_path / "source", tmp_path / "converted")
    model = AttnResForCausalLM.from_pretrained(tmp_path / "converted")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


# -- quantised ---------------------------------------------------------------------------------------------------------


def make_fp8(directory: Path, family: str = "llama", skip: list[str] | None = None, **overrides: Any) -> Path:
    """A checkpoint in blocks of float8 with one scale each, as DeepSeek-V3 and Qwen3 FP8 are stored."""
    tiny_model(family, **overrides).to(torch.bfloat16).save_pretrained(directory)

    def quantize(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not is_linear(name, tensor):
            return {name: tensor}
        rows, columns = tensor.shape
        blocks = tensor.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        quantized = (blocks / scales).reshape(rows, columns).to(torch.float8_e4m3fn)
        return {name: quantized, f"{name}_scale_inv": scales[:, 0, :, 0]}

    rewrite(directory, quantize)
    quantization = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK])
    edit_config(directory, quantization_config=quantization | {"modules_to_not_convert": skip})
    return directory


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_fp8(family: str, tmp_path: Path) -> None:
    source = make_fp8(tmp_path / "source", family)
    report = convert(source, tmp_path / "converted", num_blocks=3)
    assert report.quantization == "fp8"
    assert report.parameters == tiny_model(family).num_parameters()
    assert report.verification is not None
    assert report.verification.largest_logit_difference < 1e-4
    assert_carried_over(source, tmp_path / "converted")
    assert_same(source, tmp_path / "converted")
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == report.parameters + report.added_parameters


@torch.no_grad()
def test_retrofit_while_loading_takes_quantised_weights(tmp_path: Path) -> None:
    source = make_fp8(tmp_path / "source")
    convert(source, tmp_path / "converted", num_blocks=3)
    model = AttnResForCausalLM.from_pretrained(source, num_blocks=3, dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(model.float()(random_tokens()).logits, logits(tmp_path / "converted"))


def test_dtype_of_depth_is_never_a_quantised_one(tmp_path: Path) -> None:
    source = make_fp8(tmp_path / "source")
    edit_config(source, dtype="float8_e4m3fn")
    with pytest.raises(ConversionError, match="dtype=torch.float8_e4m3fn; a floating-point dtype of 16 bits"):
        convert(source, tmp_path / "converted")
    edit_config(source, dtype=None)
    convert(source, tmp_path / "converted", verify="none")
    depth = load_file(tmp_path / "converted" / "model-attnres.safetensors")
    assert {tensor.dtype for tensor in depth.values()} == {torch.float32}
    assert AutoConfig.from_pretrained(tmp_path / "converted").dtype == torch.bfloat16  # though most scales are float32
    model = AttnResForCausalLM.from_pretrained(tmp_path / "converted", dtype="auto")
    assert model.model.depth_attention.query.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


SKIPS = [
    ("llama", ["lm_head", "model.layers.1.mlp"]),
    ("llama", ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.3"]),
    ("llama", ["down_proj"]),
    ("llama", [r"model\.layers\.[02]\..*o_proj", "q_proj"]),
    ("llama", [r"^model.layers.0|lm_head"]),
    ("llama", [r".*self_attn.*"]),
    ("llama", []),
    ("llama", None),
    ("qwen3", None),
    ("qwen3_moe", ["lm_head", "model.layers.1.mlp.experts"]),
]


@pytest.mark.parametrize(("family", "skip"), [*SKIPS, ("mixtral", ["model.layers.1.block_sparse_moe.experts"])])
def test_fp8_kernels_take_the_same_modules(family: str, skip: list[str] | None) -> None:
    """As on a GPU: there the modules are replaced, while a CPU dequantises whatever has a scale."""

    def replaced(model: Any, quantization: dict[str, Any]) -> set[str]:
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
        quantizer.preprocess_model(model)
        return {name for name, module in model.named_modules() if type(module).__name__.startswith("FP8")}

    config = tiny_config(family)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": skip}
    expected = replaced(quantization.meta_model(config), config.quantization_config)
    assert expected
    assert replaced(meta_converted(config), config.quantization_config) == expected


def meta_converted(config: Any) -> AttnResForCausalLM:
    with torch.device("meta"):
        return AttnResForCausalLM(AttnResConfig(backbone_config=quantization.unquantized(config)))


@pytest.mark.parametrize(("family", "skip"), SKIPS)
@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("awq", "modules_to_not_convert"),
        ("bitsandbytes", "llm_int8_skip_modules"),
        ("mxfp4", "modules_to_not_convert"),
    ],
)
def test_skipped_modules_stay_the_same(method: str, field: str, family: str, skip: list[str] | None) -> None:
    config = tiny_config(family)
    config.quantization_config = {"quant_method": method, field: skip}
    converted = dict(meta_converted(config).named_modules())
    carried = AttnResConfig(backbone_config=config).quantization_config[field]
    for name, module in quantization.meta_model(config).named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assert isinstance(converted[name], type(module))
            assert should_convert_module(name, carried) == should_convert_module(name, skip), name


@pytest.mark.parametrize(
    ("bits", "skip"), [(4, None), (8, ["lm_head", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"])]
)
def test_bitsandbytes(bits: int, skip: list[str] | None, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # Rows of 64 elements make a block: on CPUs with bfloat16 products the library takes none that are shorter.
    plain = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skip)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=quantization, device_map="cpu"
    ).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "converted", num_blocks=3)
    assert report.verification is not None
    assert report.verification.largest_logit_difference < 1e-5
    assert report.quantization == "bitsandbytes"
    assert report.parameters == plain.num_parameters()
    assert_carried_over(tmp_path / "source", tmp_path / "converted")
    assert_same(tmp_path / "source", tmp_path / "converted", 5e-2)  # kernels of 16 bits
    model = AttnResForCausalLM.from_pretrained(tmp_path / "converted", device_map="cpu")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source", device_map="cpu")
    for name, module in original.named_modules():
        if isinstance(module, nn.Linear):
            assert type(model.get_submodule(name)) is type(module), name


CT_ARGS = dict(num_bits=8, type="int", symmetric=True, strategy="channel")
COMPRESSED = [
    ("int8", "int-quantized", {}, ["Linear"], ["lm_head"]),
    ("fp8", "float-quantized", {"type": "float"}, ["Linear"], ["lm_head", "model.layers.1.mlp.up_proj"]),
    ("int4", "pack-quantized", {"num_bits": 4}, ["Linear"], ["lm_head", r"re:model\.layers\.1\..*"]),
    ("int8 by name", "int-quantized", {}, [r"re:^model\.layers\.[0-2]\..*_proj"], [r"re:.*mlp.*"]),
    ("int4 by full name", "pack-quantized", {"num_bits": 4}, ["model.layers.3.mlp.up_proj"], []),
    ("activations too", "int-quantized", {"activations": True}, ["Linear"], ["lm_head"]),
]


@pytest.mark.parametrize(
    ("layout", "arguments", "targets", "ignore"), [c[1:] for c in COMPRESSED], ids=[c[0] for c in COMPRESSED]
)
def test_compressed_tensors(
    layout: str, arguments: dict[str, Any], targets: list[str], ignore: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.utils.match import match_named_modules

    arguments = dict(arguments)
    activations = dict(CT_ARGS, strategy="token", dynamic=True) if arguments.pop("activations", False) else None
    scheme: dict[str, Any] = {**CT_ARGS, **arguments}
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    chosen = {f"{name}.weight" for name, _ in match_named_modules(model, targets, ignore)}
    assert chosen

    def quantize(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in chosen:
            return {name: tensor}
        largest = 448 if scheme["type"] == "float" else 2 ** (scheme["num_bits"] - 1) - 1
        scale = tensor.abs().amax(1, keepdim=True) / largest
        quantized = tensor / scale
        if layout == "float-quantized":
            return {name: quantized.to(torch.float8_e4m3fn), f"{name}_scale": scale}
        quantized = quantized.round().to(torch.int8)
        if layout == "int-quantized":
            return {name: quantized, f"{name}_scale": scale}
        return {
            f"{name}_packed": pack_to_int32(quantized, scheme["num_bits"]),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(tensor.shape),
        }

    rewrite(tmp_path / "source", quantize)
    group = dict(targets=targets, format=layout, weights=scheme, input_activations=activations, output_activations=None)
    edit_config(
        tmp_path / "source",
        quantization_config=dict(
            quant_method="compressed-tensors",
            format=layout,
            quantization_status="compressed",
            config_groups={"group_0": group},
            ignore=ignore,
        ),
    )
    report = convert(tmp_path / "source", tmp_path / "converted", num_blocks=3)
    assert report.verification is not None
    assert report.verification.largest_logit_difference < 1e-5
    assert report.quantization == "compressed-tensors"
    assert report.parameters == model.num_parameters()
    assert_carried_over(tmp_path / "source", tmp_path / "converted")
    assert_same(tmp_path / "source", tmp_path / "converted", 5e-2 if activations else 1e-5)


def packed(method: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in the 4-bit layout of GPTQ or AWQ: eight values to an int32, in groups of 16 inputs."""
    rows, columns = tensor.shape
    shape = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
    tensors = {
        "qweight": torch.zeros(shape, dtype=torch.int32),
        "qzeros": torch.zeros(columns // 16, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // 16, rows, dtype=torch.float16),
    }
    if method == "gptq":
        tensors["g_idx"] = torch.arange(columns, dtype=torch.int32) // 16
    return {f"{name.removesuffix('weight')}{part}": value for part, value in tensors.items()}


def make_packed(directory: Path, method: str, family: str = "llama", **quantization: Any) -> Path:
    tiny_model(family).to(torch.float16).save_pretrained(directory)
    rewrite(directory, lambda name, tensor: packed(method, name, tensor) if is_linear(name, tensor) else {name: tensor})
    quantization = dict(quant_method=method, bits=4, group_size=16, **quantization)
    edit_config(directory, quantization_config=quantization)
    return directory


PACKED = [
    ("gptq", {}),
    ("gptq", {"block_name_to_quantize": "model.layers"}),
    ("awq", {"zero_point": True}),
    ("awq", {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"]}),
]


@pytest.mark.parametrize(("method", "fields"), PACKED)
def test_gptq_and_awq_without_their_library(
    method: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels are not here, so nothing can be run; names, shapes and config can be checked."""
    monkeypatch.setattr("attnres.conversion.quantization.unavailable", lambda config: "Loading it requires gptqmodel.")
    source = make_packed(tmp_path / "source", method, **fields)
    with pytest.raises(ConversionError, match=r"quantised by .* gptqmodel.*--verify none"):
        convert(source, tmp_path / "converted")
    report = convert(source, tmp_path / "converted", num_blocks=3, verify="none")
    assert report.quantization == method
    assert report.parameters == tiny_model("llama").num_parameters()
    assert_carried_over(source, tmp_path / "converted")
    carried = json.loads((tmp_path / "converted" / "config.json").read_text())["quantization_config"]
    assert carried == {"quant_method": method, "bits": 4, "group_size": 16, **fields}


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda name, tensor: {} if "layers.2.mlp.up_proj." in name else {name: tensor}, "lacks 1 tensors .*up_proj"),
        (lambda name, tensor: {} if name == "model.norm.weight" else {name: tensor}, "lacks 1 tensors .*model.norm"),
        (lambda name, tensor: {name: tensor[:3] if "embed" in name else tensor}, "shapes contradict config.json"),
    ],
)
def test_incomplete_packed_weights(
    method: str, damage: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnres.conversion.quantization.unavailable", lambda config: "Loading it requires gptqmodel.")
    source = make_packed(tmp_path / "source", method)
    rewrite(source, damage)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "converted", verify="none")


def test_packed_experts_that_transformers_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are one module with fused weights, which GPTQ and AWQ do not quantise."""
    monkeypatch.setattr("attnres.conversion.quantization.unavailable", lambda config: "Loading it requires gptqmodel.")
    source = make_packed(tmp_path / "source", "awq", "qwen3_moe")
    with pytest.raises(ConversionError, match="lacks 8 tensors .*experts"):
        convert(source, tmp_path / "converted", verify="none")


@pytest.mark.parametrize("is_quantized", [True, False])
def test_fused_experts_of_gpt_oss(is_quantized: bool, tmp_path: Path) -> None:
    """Weights of two 4-bit floats to a byte, with one exponent for 32 of them."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")

    def quantize(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        blocks = (experts, outputs, inputs // 32)
        return {
            f"{name}_blocks": torch.randint(256, (*blocks, 16), dtype=torch.uint8),
            f"{name}_scales": torch.randint(118, 123, blocks, dtype=torch.uint8),
        }

    if is_quantized:
        rewrite(tmp_path / "source", quantize)
        skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": skip}
        edit_config(tmp_path / "source", quantization_config=quantization)
    report = convert(tmp_path / "source", tmp_path / "converted", num_blocks=3)
    assert report.quantization == ("mxfp4" if is_quantized else None)
    assert report.parameters == model.num_parameters()
    assert_same(tmp_path / "source", tmp_path / "converted", 1e-4)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("fp8", "an object was expected"),
        ({}, "quant_method=None"),
        ({"quant_method": 3}, "quant_method=3"),
        ({"quant_method": "hqq"}, "quant_method='hqq'.*quantise the result"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head'"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["(", 3]}, "modules_to_not_convert"),
        ({"quant_method": "awq", "modules_to_not_convert": ["("]}, r"modules_to_not_convert=\['\('\]"),
        ({"quant_method": "gptq", "bits": 4, "block_name_to_quantize": 3}, "block_name_to_quantize=3"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": ["g"]}, "config_groups"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:("]}, "ignore"),
        ({"quant_method": "fp8", "weight_block_size": [0, 16, 2]}, "makes no quantiser"),
    ],
)
def test_bad_quantization_config(
    quantization: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", quantization_config=quantization)
    if "quantiser" not in message:
        monkeypatch.setattr("attnres.conversion.quantization.unavailable", lambda config: None)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "source", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


COSTLY = [
    "(a+)+$",
    "(.*)*x",
    "([a-z.]+)+!",
    "(a|aa)+$",
    "(?:model.*)+y",
    r"(\w+\.?)+#",
    ".*.*.*.*.*x",
    r"(\w*)\1x",
    "(?P<a>.*)(?P=a)x",
    "(a{1,9}){1,9}z",
    "a" * 10_000,
    "re:(.+)+y",
]


@pytest.mark.parametrize("pattern", COSTLY)
@pytest.mark.parametrize(("method", "field"), [("fp8", "modules_to_not_convert"), ("compressed-tensors", "ignore")])
def test_costly_names_of_modules(method: str, field: str, pattern: str, tmp_path: Path) -> None:
    """Matching them could take longer than anybody waits."""
    tiny_config("llama").save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", quantization_config={"quant_method": method, field: ["lm_head", pattern]})
    with pytest.raises(ConversionError, match=f"{field}=.*a list of module names"):
        convert(tmp_path / "source", tmp_path / "converted", verify="none")


# -- pickled weights ---------------------------------------------------------------------------------------------------


def make_pickled(directory: Path, family: str = "llama", shards: int = 0, **overrides: Any) -> Path:
    model = tiny_model(family, **overrides)
    model.save_pretrained(directory)
    weights = load_file(directory / SHARD)
    (directory / SHARD).unlink()
    if not shards:
        torch.save(model.state_dict() if family == "llama" else weights, directory / "pytorch_model.bin")
        return directory
    names = sorted(weights)
    weight_map = {}
    for index in range(shards):
        shard = f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        part = {name: weights[name] for name in names[index::shards]}
        torch.save(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    index_file = directory / "pytorch_model.bin.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    ("family", "shards", "overrides"),
    [
        ("llama", 0, {}),
        ("llama", 0, {"tie_word_embeddings": True}),  # the head shares memory with the embedding
        ("qwen3", 3, {"dtype": "bfloat16"}),
        ("mixtral", 2, {}),
    ],
)
def test_pickled_weights_are_rewritten(family: str, shards: int, overrides: dict[str, Any], tmp_path: Path) -> None:
    source = make_pickled(tmp_path / "source", family, shards, **overrides)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ConversionError, match=r"pickled weights .*allow_pickle \(--allow-pickle\)|neither"):
        convert(source, tmp_path / "converted")
    with pytest.warns(UserWarning, match=r"pickled weights \(pytorch_model.*weights_only.*rewritten as safetensors"):
        report = convert(source, tmp_path / "converted", num_blocks=3, allow_pickle=True)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert len(report.pickles) == max(shards, 1)
    assert (report.bytes_linked, report.bytes_copied) == (0, 0)
    converted = tmp_path / "converted"
    assert report.bytes_written == sum(path.stat().st_size for path in converted.glob("*.safetensors"))
    assert len({path.stat().st_mode for path in converted.glob("*.safetensors")}) == 1
    assert not list(converted.glob("*.bin*"))
    assert_same(source, converted)


@pytest.mark.filterwarnings("ignore:.*pickled weights")
def test_pickles_of_old_versions_of_torch(tmp_path: Path) -> None:
    source = make_pickled(tmp_path / "source")
    torch.save(torch.load(source / "pytorch_model.bin"), source / "pytorch_model.bin", **UNZIPPED)
    convert(source, tmp_path / "converted", allow_pickle=True)
    assert_same(source, tmp_path / "converted")


def test_pickles_are_left_alone_beside_safetensors(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"not even a pickle")
    report = convert(tmp_path / "source", tmp_path / "converted", allow_pickle=True)
    assert report.pickles == ()


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


UNZIPPED: Any = {"_use_new_zipfile_serialization": False}
BAD_PICKLES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("code", lambda path: torch.save({"a": Malicious(path.parent / "run")}, path), "cannot be read with weights_only"),
    (
        "code in the format of old versions",
        lambda path: torch.save({"a": Malicious(path.parent / "run")}, path, **UNZIPPED),
        "weights_only",
    ),
    ("garbage", lambda path: path.write_bytes(b"garbage" * 99), "cannot be read with weights_only"),
    ("empty", lambda path: path.write_bytes(b""), "cannot be read with weights_only"),
    ("truncated", lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be read with weights_only"),
    ("no dict", lambda path: torch.save([torch.ones(2)], path), "holds a list"),
    ("a state dict in another", lambda path: torch.save({"model": {"a": torch.ones(2)}}, path), "'model' is a dict"),
    ("sparse", lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path), "dense tensor was expected"),
    ("another model", lambda path: torch.save({"a": torch.ones(2)}, path), "only 1 tensors"),
    ("depth", lambda path: torch.save({"depth_attention.query": torch.ones(2)}, path), "a name that AttnRes needs"),
    (
        "depth beside the weights",
        lambda path: torch.save({**torch.load(path), "model.depth_attention.key_norm": torch.ones(9, 32)}, path),
        "a name that AttnRes needs",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [c[1:] for c in BAD_PICKLES], ids=[c[0] for c in BAD_PICKLES])
@pytest.mark.filterwarnings("ignore:.*pickled weights")
def test_bad_pickles_are_refused_and_not_run(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    source = make_pickled(tmp_path / "source")
    damage(source / "pytorch_model.bin")
    for allow_pickle in (False, True):
        with pytest.raises(ConversionError, match=message if allow_pickle else "--allow-pickle"):
            convert(source, tmp_path / "converted", allow_pickle=allow_pickle)
    assert not (source / "run").exists(), "the pickle was run"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("shard", ["../pytorch_model.bin", "/etc/passwd", "model.safetensors", 3, "missing.bin"])
@pytest.mark.filterwarnings("ignore:.*pickled weights")
def test_bad_index_of_pickles(shard: Any, tmp_path: Path) -> None:
    source = make_pickled(tmp_path / "source", shards=2)
    path = source / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="no bin file name|missing|lacks|which the index puts"):
        convert(source, tmp_path / "converted", allow_pickle=True)


# -- refused, with what to do instead ----------------------------------------------------------------------------------


FILES = [
    ("model.Q4_K_M.gguf", "GGUF weights .*gguf_file"),
    ("consolidated.safetensors", "consolidated.*edition of the model for Transformers"),
    ("consolidated.00.pth", "consolidated.*edition of the model for Transformers"),
    ("params.json", "params.json.*edition of the model for Transformers"),
    ("pytorch_model.bin", "pickled weights .*--allow-pickle"),
    ("weights.pt", "pickled weights .*save_pretrained"),
    ("tf_model.h5", "TensorFlow"),
    ("model.ckpt.index", "TensorFlow"),
    ("flax_model.msgpack", "Flax"),
    ("model.onnx", "ONNX"),
    ("weights.npz", "MLX"),
    ("model.nemo", "NeMo"),
]


@pytest.mark.parametrize(("name", "message"), FILES)
def test_other_formats(name: str, message: str, tmp_path: Path) -> None:
    """As the only file, as a directory of its own with and without config.json, and as no hindrance beside weights."""
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_text("{}")
    with pytest.raises(ConversionError, match=f"no config.json.*{message}"):
        convert(source, tmp_path / "converted")
    with pytest.raises(ConversionError, match=f"is .*{message}"):
        convert(source / name, tmp_path / "converted")
    tiny_config("llama").save_pretrained(source)
    with pytest.raises(ConversionError, match=f"neither model.safetensors.*{message}"):
        convert(source, tmp_path / "converted")


@pytest.mark.parametrize("is_beside_weights", [False, True])
def test_adapters(is_beside_weights: bool, tmp_path: Path) -> None:
    """Beside weights too: Transformers loads them together."""
    if is_beside_weights:
        tiny_model("llama").save_pretrained(tmp_path / "source")
    else:
        (tmp_path / "source").mkdir()
    (tmp_path / "source" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="PEFT adapter .*merge_and_unload"):
        convert(tmp_path / "source", tmp_path / "converted")


def test_other_formats_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    for name, _ in FILES:
        (tmp_path / "source" / name).write_text("{}")
    convert(tmp_path / "source", tmp_path / "converted")
    assert not {name for name, _ in FILES} & {path.name for path in (tmp_path / "converted").iterdir()}


ARCHITECTURES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
    ({"model_type": "bart"}, "'bart' is an encoder-decoder|'bart' is an encoder"),
    ({"model_type": "whisper"}, "'whisper' is an encoder-decoder"),
    ({"model_type": "bert"}, "'bert' is an encoder"),
    ({"model_type": "modernbert"}, "'modernbert' is an encoder"),
    ({"model_type": "llama", "is_encoder_decoder": True}, "'llama' is an encoder-decoder"),
    ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "composite.*Extract the language model"),
    ({"model_type": "llava"}, "composite.*Extract the language model"),
    ({"model_type": "qwen2_vl"}, "composite"),
    ({"model_type": "qwen2_audio"}, "composite"),
    ({"model_type": "somebodys", "text_config": {"model_type": "llama"}}, "composite"),
    ({"model_type": "somebodys", "auto_map": {"AutoConfig": "configuration.Config"}}, "auto_map.* is not run"),
    ({"model_type": "llama", "quantization": {}, "quantization_config": 3}, "an object was expected"),
    ({"model_type": "llama", "quantization": {"bits": 4, "group_size": 64}}, "quantised by MLX"),
    ({"model_type": "attnres"}, "AttnRes checkpoint already"),
    ({"model_type": "opt"}, "'opt' is not supported"),
    ({"dim": 4096, "n_layers": 32}, "model_type=None.*not the config of a Transformers model"),
]


@pytest.mark.parametrize(("config", "message"), ARCHITECTURES)
def test_other_architectures(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(AttnResError, match=message):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_language_model_of_a_composite_can_be_extracted(tmp_path: Path) -> None:
    """As the refusal says."""
    text = LlamaConfig(**{key: value for key, value in tiny_config("llama").to_dict().items() if key != "model_type"})
    vision = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, image_size=8, patch_size=4)
    whole = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConversionError, match="composite"):
        convert(tmp_path / "whole", tmp_path / "converted")
    language = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    language.base_model.load_state_dict(whole.model.language_model.state_dict())
    language.lm_head.load_state_dict(whole.lm_head.state_dict())
    language.save_pretrained(tmp_path / "language")
    convert(tmp_path / "language", tmp_path / "converted", num_blocks=3)
    with torch.no_grad():
        expected = whole.eval()(random_tokens().clamp(min=6)).logits
        result = AttnResForCausalLM.from_pretrained(tmp_path / "converted")(random_tokens().clamp(min=6)).logits
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)

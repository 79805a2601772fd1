from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import depth_attention, random_tokens, retrofit, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnres import AttnResConfig, AttnResError, AttnResForCausalLM, AttnResModel
from attnres.cli import main
from attnres.conversion import delivery, kimi_k3
from attnres.depth_attention import DEPTH_ATTENTION_FUNCTIONS
from attnres.depth_state import DepthState
from attnres.residual_stream import read

INDEX = "model.safetensors.index.json"
NUM_LAYERS = 5
EPS = 1e-3  # large enough to be seen in a float32 result


def layer_types(num_layers: int) -> dict[str, list[str]]:
    return dict(
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)],
        mlp_layer_types=["dense" if i < 1 else "sparse" for i in range(num_layers)],
    )


def tiny_attnres(block_size: int = 4, num_layers: int = NUM_LAYERS, **overrides: Any) -> AttnResForCausalLM:
    backbone = tiny_model("kimi_linear", num_hidden_layers=num_layers, rms_norm_eps=EPS, **layer_types(num_layers))
    kwargs = dict(mix="mean", block_size=block_size, key_norm_eps=EPS) | overrides
    return retrofit(backbone, random_queries=True, **kwargs)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        found = load_file(directory / shard)
        assert {name for name, place in weight_map.items() if place == shard} == set(found)
        tensors |= found
    assert set(weight_map) == set(tensors)
    assert {path.name for path in directory.glob("*.safetensors")} == set(weight_map.values())
    return tensors


def same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == expected[name].dtype and torch.equal(actual[name], expected[name]) for name in expected
    )


@pytest.fixture(scope="module")
def attnres_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("attnres") / "model"
    tiny_attnres().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def k3_checkpoint(attnres_checkpoint: Path) -> Path:
    directory = attnres_checkpoint.with_name("k3")
    kimi_k3.export_checkpoint(attnres_checkpoint, directory)
    return directory


# -- the reads of Kimi K3, as it publishes them ------------------------------------------------------------------------


class K3Residual:
    """Kimi K3's residual stream: finished blocks in one stack, and the running sum of the open one. It shares no code
    with the package."""

    def __init__(self, tensors: dict[str, torch.Tensor], block_size: int, eps: float):
        self.tensors, self.block_size, self.eps = tensors, block_size, eps

    def start(self, embedding: torch.Tensor) -> None:
        self.prefix_sum: torch.Tensor | None = embedding
        self.blocks = embedding.new_empty(*embedding.shape[:-1], 0, embedding.shape[-1])

    def read(self, name: str) -> torch.Tensor:
        if self.blocks.shape[-2] == 0:  # the embedding alone
            return self.prefix_sum
        stack = torch.cat([self.blocks, self.prefix_sum.unsqueeze(-2)], dim=-2)
        values = stack.to(torch.promote_types(stack.dtype, torch.float32))
        keys = values / torch.sqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        keys = keys * self.tensors[f"{name}_res_norm.weight"].to(keys.dtype)
        logits = nn.functional.linear(keys, self.tensors[f"{name}_res_proj.weight"].to(keys.dtype)).squeeze(-1)
        return (logits.softmax(-1).unsqueeze(-1) * values).sum(-2).to(stack.dtype)

    def add(self, output: torch.Tensor) -> None:
        self.prefix_sum = output if self.prefix_sum is None else self.prefix_sum + output

    def run(self, layer: int, mixer: Callable[..., torch.Tensor], mlp: Callable[..., torch.Tensor]) -> None:
        prefix = f"language_model.model.layers.{layer}."
        hidden_states = self.read(prefix + "self_attention")
        if layer % self.block_size == 0:  # what came before this layer becomes a block
            self.blocks = torch.cat([self.blocks, self.prefix_sum.unsqueeze(-2)], dim=-2)
            self.prefix_sum = None
        self.add(mixer(hidden_states))
        self.add(mlp(self.read(prefix + "mlp")))

    def finish(self) -> torch.Tensor:
        return self.read("language_model.model.output_attn")


def k3_reads(
    tensors: dict[str, torch.Tensor],
    block_size: int,
    eps: float,
    embedding: torch.Tensor,
    outputs: list[torch.Tensor],
) -> list[torch.Tensor]:
    """What every sublayer reads, and the output read, if the sublayers give `outputs`."""
    residual, reads, rest = K3Residual(tensors, block_size, eps), [], list(outputs)

    def sublayer(hidden_states: torch.Tensor) -> torch.Tensor:
        reads.append(hidden_states)
        return rest.pop(0)

    residual.start(embedding)
    for layer in range(len(outputs) // 2):
        residual.run(layer, sublayer, sublayer)
    return [*reads, residual.finish()]


def as_k3(backbone: PreTrainedModel, residual: K3Residual) -> PreTrainedModel:
    """A Kimi Linear model of Transformers whose layers run on K3's residual stream."""
    layers = backbone.model.layers

    def forward_of(index: int, layer: nn.Module) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if index == 0:
                residual.start(hidden_states)
            if "cache_params" in layer.self_attn.forward.__code__.co_varnames:
                kwargs.pop("past_key_values")

            def mixer(hidden_states: torch.Tensor) -> torch.Tensor:
                output = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
                return output[0] if isinstance(output, tuple) else output

            residual.run(index, mixer, lambda x: layer.mlp(layer.post_attention_layernorm(x)))
            return residual.finish() if index == len(layers) - 1 else hidden_states

        return forward

    for index, layer in enumerate(layers):
        layer.forward = forward_of(index, layer)
    return backbone


def random_k3_depth(directory: Path, num_layers: int, block_size: int, hidden: int = 24) -> dict[str, torch.Tensor]:
    """A checkpoint of which nothing but the depth tensors is there, in the released model's dtype."""
    generator = torch.Generator().manual_seed(num_layers)
    reads = [f"layers.{i}.{kind}" for i in range(num_layers) for kind in ("self_attention", "mlp")] + ["output_attn"]
    tensors = {}
    for name in reads:
        query, key_norm = torch.randn(2, hidden, generator=generator, dtype=torch.float32).bfloat16()
        tensors[f"language_model.model.{name}_res_proj.weight"] = query[None].clone()
        tensors[f"language_model.model.{name}_res_norm.weight"] = (1 + 0.3 * key_norm).clone()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = dict(
        model_type="kimi_linear",
        num_hidden_layers=num_layers,
        hidden_size=hidden,
        attn_res_block_size=block_size,
        rms_norm_eps=EPS,
        hidden_act="situ",
        mla_use_output_gate=True,
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "kimi_k3", "text_config": text}))
    return tensors


@pytest.mark.parametrize("implementation", DEPTH_ATTENTION_FUNCTIONS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("num_layers", [1, 6, 7])
def test_every_read_equals_k3s(
    num_layers: int, dtype: torch.dtype, atol: float, implementation: str, tmp_path: Path
) -> None:
    for block_size in range(1, num_layers + 2):
        directory = tmp_path / str(block_size)
        tensors = random_k3_depth(directory, num_layers, block_size)
        settings, parameters = kimi_k3.read_depth_attention(directory)
        assert settings.block_size == 2 * min(block_size, num_layers)
        settings = settings._replace(implementation=DEPTH_ATTENTION_FUNCTIONS[implementation])
        generator = torch.Generator().manual_seed(0)
        embedding, *outputs = torch.randn(1 + 2 * num_layers, 2, 3, 24, generator=generator, dtype=dtype)

        expected = k3_reads(tensors, block_size, EPS, embedding, outputs)
        state = DepthState(sources=(embedding,))
        with torch.no_grad():
            queries = parameters().to(dtype)
            for index, k3_read in enumerate(expected):
                hidden_states, state = read(queries, state, settings)
                torch.testing.assert_close(hidden_states, k3_read, atol=atol, rtol=0)
                if index < len(outputs):
                    state = state.write(outputs[index], settings.block_size)


@torch.no_grad()
@pytest.mark.parametrize("implementation", DEPTH_ATTENTION_FUNCTIONS)
@pytest.mark.parametrize("block_size", range(1, NUM_LAYERS + 1))
def test_exported_model_computes_the_same_as_k3(block_size: int, implementation: str, tmp_path: Path) -> None:
    model = tiny_attnres(2 * block_size, depth_attention_implementation=implementation)
    model.save_pretrained(tmp_path / "attnres")
    kimi_k3.export_checkpoint(tmp_path / "attnres", tmp_path / "k3")
    tensors = all_tensors(tmp_path / "k3")
    settings = json.loads((tmp_path / "k3" / "config.json").read_text())["text_config"]

    decoder = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items() if "_res_" not in name}
    (tmp_path / "decoder").mkdir()
    save_file(decoder, tmp_path / "decoder" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(settings))
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    k3 = as_k3(backbone, K3Residual(tensors, settings["attn_res_block_size"], settings["rms_norm_eps"]))
    input_ids = random_tokens()
    torch.testing.assert_close(model(input_ids).logits, k3(input_ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)


def test_the_comparison_would_see_another_epsilon_or_block_boundary(tmp_path: Path) -> None:
    tensors = random_k3_depth(tmp_path / "k3", 6, 2)
    embedding, *outputs = torch.randn(13, 2, 3, 24, generator=torch.Generator().manual_seed(0))
    expected = k3_reads(tensors, 2, EPS, embedding, outputs)
    for block_size, eps in ((3, EPS), (2, 2 * EPS)):
        others = k3_reads(tensors, block_size, eps, embedding, outputs)
        assert not all(torch.allclose(other, one, atol=1e-4) for other, one in zip(others, expected))


# -- tensors and checkpoints, there and back ---------------------------------------------------------------------------


def test_depth_tensors_there_and_back(tmp_path: Path) -> None:
    tensors = random_k3_depth(tmp_path / "k3", 7, 3)
    settings, parameters = kimi_k3.read_depth_attention(tmp_path / "k3")
    assert (settings.block_size, settings.mix, settings.key_norm_eps) == (6, "mean", EPS)
    assert parameters.query.dtype == torch.bfloat16
    assert parameters.query.requires_grad
    assert same_tensors(kimi_k3.depth_tensors(parameters), tensors)


def test_everything_that_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    random_k3_depth(tmp_path / "k3", 7, 3)
    with pytest.raises(
        AttnResError, match=r"\(SiTU\).*, MLA with rotary.*, an output gate on MLA .*read_depth_attention"
    ):
        kimi_k3.import_checkpoint(tmp_path / "k3", tmp_path / "destination")
    assert not (tmp_path / "destination").exists()


def test_layout_is_k3s(k3_checkpoint: Path, attnres_checkpoint: Path) -> None:
    tensors = all_tensors(k3_checkpoint)
    depth = {name for name in tensors if "_res_" in name}
    assert len(depth) == 2 * (2 * NUM_LAYERS + 1)
    assert tensors["language_model.model.layers.2.mlp_res_proj.weight"].shape == (1, 32)
    assert tensors["language_model.model.output_attn_res_norm.weight"].shape == (32,)
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.")) for name in tensors)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in tensors
    assert "language_model.model.layers.1.block_sparse_moe.experts.3.w2.weight" in tensors
    settings = json.loads((k3_checkpoint / "config.json").read_text())
    assert settings["model_type"] == "kimi_k3"
    assert settings["architectures"] == ["KimiK3ForConditionalGeneration"]
    assert settings["dtype"] == "float32"
    text = settings["text_config"]
    assert text["attn_res_block_size"] == 2
    assert text["first_k_dense_replace"] == 1
    assert text["linear_attn_config"] == dict(
        full_attn_layers=[4], kda_layers=[1, 2, 3, 5], head_dim=8, num_heads=4, short_conv_kernel_size=4
    )
    assert text["model_type"] == "kimi_linear"
    assert (k3_checkpoint / "generation_config.json").read_bytes() == (
        attnres_checkpoint / "generation_config.json"
    ).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_exports_and_imports_back_unchanged(shard_size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_attnres(4, depth_attention_implementation="eager").to(dtype)
    model.save_pretrained(tmp_path / "attnres", max_shard_size=shard_size)
    kimi_k3.export_checkpoint(tmp_path / "attnres", tmp_path / "k3")
    kimi_k3.import_checkpoint(tmp_path / "k3", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "attnres" / "config.json").read_text()
    back, info = AttnResForCausalLM.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = AttnResForCausalLM.from_pretrained(tmp_path / "attnres", dtype="auto")  # where depth is float32
    assert same_tensors(dict(back.named_parameters()), dict(saved.named_parameters()))
    assert same_tensors(dict(back.named_buffers()), dict(saved.named_buffers()))
    # Loading keeps some of them in float32 (from Transformers 5.24 on), which `.to` did not.
    layers = {name: tensor.to(dtype) for name, tensor in back.base_model.layers.state_dict().items()}
    assert same_tensors(layers, dict(model.base_model.layers.state_dict()))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > (8 if shard_size == "20KB" else 1)
    travelling = {path.name for path in (tmp_path / "attnres").glob("*.py")}
    assert {path.name for path in (tmp_path / "back").glob("*.py")} == travelling

    kimi_k3.export_checkpoint(tmp_path / "back", tmp_path / "again")
    assert same_tensors(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "k3"))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "k3" / "config.json").read_text()


@pytest.mark.parametrize("spelling", ["transformers", "moonshot"])
def test_configurations_of_either_spelling_come_back(spelling: str, tmp_path: Path) -> None:
    """Also one that Transformers read from Moonshot's own config.json, and which says things twice since."""
    fields = layer_types(NUM_LAYERS)
    if spelling == "moonshot":
        fields = dict(
            linear_attn_config=dict(
                full_attn_layers=[4], kda_layers=[1, 2, 3, 5], head_dim=8, num_heads=4, short_conv_kernel_size=4
            ),
            layer_types=None,
            mlp_layer_types=None,
            mla_use_nope=True,
            moe_layer_freq=1,
            moe_router_activation_func="sigmoid",
            use_grouped_topk=True,
        )
    else:
        fields["first_k_dense_replace"] = None
    backbone = tiny_config("kimi_linear", num_hidden_layers=NUM_LAYERS, rms_norm_eps=EPS, **fields)
    if spelling == "transformers":
        del backbone.first_k_dense_replace
    config = AttnResConfig(backbone_config=backbone, block_size=2, key_norm_eps=EPS)
    AttnResForCausalLM(config).save_pretrained(tmp_path / "attnres")
    kimi_k3.export_checkpoint(tmp_path / "attnres", tmp_path / "k3")
    kimi_k3.import_checkpoint(tmp_path / "k3", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "attnres" / "config.json").read_text()


def test_k3_checkpoint_of_others_imports(k3_checkpoint: Path, tmp_path: Path) -> None:
    """One whose configuration says nothing in Transformers' words, and whose tensors lie in other shards."""
    settings = json.loads((k3_checkpoint / "config.json").read_text())
    text = settings["text_config"]
    for name in ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"):
        del text[name]
    text["dtype"] = settings.pop("dtype")
    del settings["attnres_added_fields"]
    (tmp_path / "k3").mkdir()
    (tmp_path / "k3" / "config.json").write_text(json.dumps(settings))
    tensors = all_tensors(k3_checkpoint)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, name in enumerate(sorted(tensors)):
        shards.setdefault(f"part-{number % 3}.safetensors", {})[name] = tensors[name]
    for shard, part in shards.items():
        save_file(part, tmp_path / "k3" / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "k3" / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    kimi_k3.import_checkpoint(tmp_path / "k3", tmp_path / "attnres")
    model = AttnResForCausalLM.from_pretrained(tmp_path / "attnres")
    expected = tiny_attnres()
    assert same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert model.config.layer_types == expected.config.layer_types
    assert model.config.mlp_layer_types == expected.config.mlp_layer_types
    assert (model.config.block_size, model.config.mix, model.config.key_norm_eps) == (4, "mean", EPS)


def test_weights_are_not_loaded(attnres_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    read_tensor = kimi_k3._read_tensor
    monkeypatch.setattr(kimi_k3, "_read_tensor", lambda *args: loaded.append(args[1]) or read_tensor(*args))
    monkeypatch.setattr(kimi_k3, "CHUNK_BYTES", 100)
    kimi_k3.export_checkpoint(attnres_checkpoint, tmp_path / "k3")
    kimi_k3.import_checkpoint(tmp_path / "k3", tmp_path / "back")
    assert all(name.startswith("model.depth_attention.") or "_res_" in name for name in loaded)
    model, back = (AttnResForCausalLM.from_pretrained(path) for path in (attnres_checkpoint, tmp_path / "back"))
    assert same_tensors(dict(back.named_parameters()), dict(model.named_parameters()))


@pytest.mark.usefixtures("k3_checkpoint")
def test_command(attnres_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, source, destination in (("export", str(attnres_checkpoint), "k3"), ("import", "k3", "back")):
        monkeypatch.setattr(sys, "argv", ["attnres", "kimi-k3", command, source, destination])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
    assert same_tensors(all_tensors(tmp_path / "k3"), all_tensors(attnres_checkpoint.with_name("k3")))
    assert AttnResForCausalLM.from_pretrained(tmp_path / "back").config.block_size == 4


# -- what is refused ---------------------------------------------------------------------------------------------------


def edit_config(*path: str, **fields: Any) -> Callable[[Path], None]:
    """Sets fields of config.json, below `path`; `...` removes one."""

    def edit(directory: Path) -> None:
        settings = json.loads((directory / "config.json").read_text())
        place = settings
        for name in path:
            place = place[name]
        place.update(fields)
        for name in [name for name, value in fields.items() if value is ...]:
            del place[name]
        (directory / "config.json").write_text(json.dumps(settings))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for shard in directory.glob("*.safetensors"):
            tensors |= load_file(shard)
            shard.unlink()
        (directory / INDEX).unlink(missing_ok=True)
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        for one in edits:
            one(directory)

    return edit


def truncate(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-50])


NORM = "language_model.model.layers.3.mlp_res_norm.weight"
PROJ = "language_model.model.layers.3.self_attention_res_proj.weight"
OUTPUT = "language_model.model.output_attn_res_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.0.w1.weight"

# What is not as K3's depth tensors have to be, and what the message says: refused by reading and by importing.
BAD_DEPTH: list[tuple[str, Callable[[Path], None], str]] = [
    ("not K3", edit_config(model_type="kimi_linear"), "model_type='kimi_linear'; 'kimi_k3'"),
    ("config not JSON", lambda path: (path / "config.json").write_text("{") and None, "not readable JSON"),
    ("no text_config", edit_config(text_config=...), "text_config=None"),
    ("text_config a list", edit_config(text_config=[1]), r"text_config=\[1\]"),
    ("no block size", edit_config("text_config", attn_res_block_size=...), "attn_res_block_size=None"),
    ("block size zero", edit_config("text_config", attn_res_block_size=0), "attn_res_block_size=0"),
    ("block size a string", edit_config("text_config", attn_res_block_size="12"), "attn_res_block_size='12'"),
    ("block size true", edit_config("text_config", attn_res_block_size=True), "attn_res_block_size=True"),
    ("no epsilon", edit_config("text_config", rms_norm_eps=...), "rms_norm_eps=None"),
    ("negative epsilon", edit_config("text_config", rms_norm_eps=-1e-6), "rms_norm_eps=-1e-06"),
    ("more layers than tensors", edit_config("text_config", num_hidden_layers=10**12), "lacks depth tensor .*layers.5"),
    ("fewer layers than tensors", edit_config("text_config", num_hidden_layers=3), "belongs to no read of 3 layers"),
    ("no layers", edit_config("text_config", num_hidden_layers=0), "num_hidden_layers=0"),
    ("another width", edit_config("text_config", hidden_size=33), r"of shape \[1, 32\].*\[1, 33\]"),
    ("width not a number", edit_config("text_config", hidden_size=None), "hidden_size=None"),
    ("norm missing", edit_tensors(lambda tensors: tensors.pop(NORM)), f"lacks depth tensor '{NORM}'"),
    ("output read missing", edit_tensors(lambda tensors: tensors.pop(OUTPUT)), f"lacks depth tensor '{OUTPUT}'"),
    ("norm of another width", edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(31)})), r"shape \[31\]"),
    (
        "query a vector",
        edit_tensors(lambda tensors: tensors.update({PROJ: torch.ones(32)})),
        r"\[1, 32\] were expected",
    ),
    ("query of integers", edit_tensors(lambda ts: ts.update({PROJ: torch.ones(1, 32).long()})), "is I64"),
    ("dtypes mixed", edit_tensors(lambda ts: ts.update({PROJ: ts[PROJ].half()})), "dtypes F16, F32"),
    ("shard truncated", truncate, "not a whole safetensors file"),
    ("shard missing", lambda path: (path / "model-attnres.safetensors").unlink(), "but missing"),
]

# Depth tensors are fine; the decoder is not Transformers' Kimi Linear, or not whole.
BAD_DECODER: list[tuple[str, Callable[[Path], None], str]] = [
    ("SiTU", edit_config("text_config", hidden_act="situ"), r"SiTU.*text_config.hidden_act"),
    ("activation a list", edit_config("text_config", hidden_act=[]), "text_config.hidden_act"),
    ("latent MoE", edit_config("text_config", routed_expert_hidden_size=16), "latent MoE"),
    ("MLA output gate", edit_config("text_config", mla_use_output_gate=True), "an output gate on MLA"),
    ("rotary MLA", edit_config("text_config", mla_use_nope=...), "rotary"),
    ("KDA gate", edit_config("text_config", "linear_attn_config", use_full_rank_gate=True), "full-rank gate on KDA"),
    ("KDA bound", edit_config("text_config", "linear_attn_config", gate_lower_bound=-5.0), "a lower bound"),
    ("MXFP4", edit_config("text_config", quantization_config={"format": "mxfp4-pack-quantized"}), "MXFP4 experts"),
    ("vision", edit_config(vision_config={}), "a vision tower"),
    ("softmax router", edit_config("text_config", moe_router_activation_func="softmax"), "another router"),
    ("another decoder", edit_config("text_config", model_type="qwen3"), "another decoder"),
    (
        "vision tensor",
        edit_tensors(lambda ts: ts.update({"vision_tower.x": torch.ones(2)})),
        "no part of a Kimi Linear",
    ),
    (
        "taken name",
        edit_tensors(lambda ts: ts.update({"language_model.model.depth_attention.query": torch.ones(2)})),
        "no p",
    ),
    (
        "unknown tensor",
        edit_tensors(lambda ts: ts.update({"language_model.model.layers.3.self_attn.g_proj.weight": torch.ones(2)})),
        "has 1 tensors its config does not ask for, first .*model.layers.3.self_attn.g_proj",
    ),
    ("tensor missing", edit_tensors(lambda ts: ts.pop("language_model.model.norm.weight")), "lacks 1 tensors .*norm"),
    ("other shapes", edit_config("text_config", intermediate_size=64), "shapes contradict"),
    (
        "layers that are not there",
        edit_config("text_config", layer_types=["full_attention"]),
        "cannot be loaded|makes? no",
    ),
    (
        "layer numbers out of range",
        both(
            edit_config("text_config", layer_types=None, linear_attn_config=dict(full_attn_layers=[9], kda_layers=[])),
            edit_config(attnres_added_fields=3),
        ),
        "makes no configuration: .*list assignment index out of range",
    ),
    ("layers told apart twice", edit_config("text_config", "linear_attn_config", kda_layers=[1]), "contradicts the r"),
    ("heads told twice", edit_config("text_config", "linear_attn_config", head_dim=16), "'head_dim': 16.* contradicts"),
    ("dense layers told twice", edit_config("text_config", first_k_dense_replace=2), "=2 contradicts the rest"),
    ("experts without number", edit_config("text_config", num_experts="four"), "cannot be loaded"),
    ("hidden fields", edit_config(attnres_added_fields=["hidden_size"]), "shapes contradict|cannot be loaded"),
]

BAD_EXPORT: list[tuple[str, Callable[[Path], None], str]] = [
    ("not AttnRes", edit_config(model_type="kimi_linear"), "model_type='kimi_linear'; 'attnres'"),
    ("sum", edit_config("depth_attention", mix="sum"), "mix='sum'; Kimi K3 reads the mean"),
    ("odd blocks", edit_config("depth_attention", block_size=3), "block_size=3; .* has to be even"),
    ("another epsilon", edit_config("depth_attention", key_norm_eps=1e-6), "key_norm_eps=1e-06, .*rms_norm_eps=0.001"),
    ("dense late", edit_config(mlp_layer_types=["sparse"] * 4 + ["dense"]), "dense layers after"),
    ("contradiction", edit_config(first_k_dense_replace=2), "first_k_dense_replace=2 contradicts"),
    ("quantised", edit_config(quantization_config={"quant_method": "fp8"}), "quantised weights"),
    ("no configuration", edit_config(layer_types=3), "make no kimi_linear configuration"),
    ("block size", edit_config("depth_attention", block_size="4"), "block_size='4'"),
    (
        "no depth",
        edit_tensors(lambda ts: ts.pop("model.depth_attention.query")),
        "lacks 1 tensors .*depth_attention.query",
    ),
    (
        "wrong depth",
        edit_tensors(lambda ts: ts.update({"model.depth_attention.query": torch.ones(3, 32)})),
        "shapes contradict",
    ),
    ("expert missing", edit_tensors(lambda ts: ts.pop(EXPERT)), "cannot be loaded|lacks .* tensors|shapes contradict"),
    (
        "unknown tensor",
        edit_tensors(lambda ts: ts.update({"model.extra": torch.ones(2)})),
        "has 1 tensors its config does not ask for, first .*model.extra",
    ),
    (
        "one tensor under two names",
        edit_tensors(lambda ts: ts.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)})),
        "has no name in Kimi K3's layout",
    ),
    ("shard truncated", truncate, "not a whole safetensors file"),
]


def edited(checkpoint: Path, tmp_path: Path, edit: Callable[[Path], None]) -> Path:
    shutil.copytree(checkpoint, tmp_path / "source")
    edit(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(("edit", "message"), [case[1:] for case in BAD_DEPTH], ids=[case[0] for case in BAD_DEPTH])
def test_bad_depth_tensors(edit: Callable[[Path], None], message: str, k3_checkpoint: Path, tmp_path: Path) -> None:
    source = edited(k3_checkpoint, tmp_path, edit)
    with pytest.raises(AttnResError, match=message):
        kimi_k3.read_depth_attention(source)
    with pytest.raises(AttnResError, match=message):
        kimi_k3.import_checkpoint(source, tmp_path / "destination")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(("edit", "message"), [case[1:] for case in BAD_DECODER], ids=[case[0] for case in BAD_DECODER])
def test_decoders_that_cannot_be_imported(
    edit: Callable[[Path], None], message: str, k3_checkpoint: Path, tmp_path: Path
) -> None:
    source = edited(k3_checkpoint, tmp_path, edit)
    with pytest.raises(AttnResError, match=message):
        kimi_k3.import_checkpoint(source, tmp_path / "destination")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    _, parameters = kimi_k3.read_depth_attention(source)
    assert torch.equal(parameters.query, depth_attention(tiny_attnres()).query)


@pytest.mark.parametrize(("edit", "message"), [case[1:] for case in BAD_EXPORT], ids=[case[0] for case in BAD_EXPORT])
def test_models_that_cannot_be_exported(
    edit: Callable[[Path], None], message: str, attnres_checkpoint: Path, tmp_path: Path
) -> None:
    source = edited(attnres_checkpoint, tmp_path, edit)
    with pytest.raises(AttnResError, match=message):
        kimi_k3.export_checkpoint(source, tmp_path / "destination")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_backbone_of_another_family(tmp_path: Path) -> None:
    retrofit(tiny_model("qwen3"), mix="mean", block_size=2).save_pretrained(tmp_path / "source")
    with pytest.raises(AttnResError, match="backbone is 'qwen3'; Kimi K3's is 'kimi_linear'"):
        kimi_k3.export_checkpoint(tmp_path / "source", tmp_path / "destination")


def test_tensors_as_they_are_in_memory_have_no_k3_name(attnres_checkpoint: Path, tmp_path: Path) -> None:
    model = AttnResForCausalLM.from_pretrained(attnres_checkpoint)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    with pytest.raises(AttnResError, match="has no name in Kimi K3's layout; save the model with save_pretrained"):
        kimi_k3.export_checkpoint(tmp_path / "source", tmp_path / "destination")


def test_headless_model(attnres_checkpoint: Path, tmp_path: Path) -> None:
    AttnResModel.from_pretrained(attnres_checkpoint).save_pretrained(tmp_path / "source")
    with pytest.raises(AttnResError, match="lacks 1 tensors .*lm_head"):
        kimi_k3.export_checkpoint(tmp_path / "source", tmp_path / "destination")


@pytest.mark.parametrize("direction", ["import", "export"])
def test_bad_paths(direction: str, attnres_checkpoint: Path, k3_checkpoint: Path, tmp_path: Path) -> None:
    source = k3_checkpoint if direction == "import" else attnres_checkpoint
    convert = kimi_k3.import_checkpoint if direction == "import" else kimi_k3.export_checkpoint
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for arguments, message in (
        ((source, tmp_path / "taken"), "exists; choose another"),
        ((source, tmp_path / "dangling"), "exists; choose another"),
        ((source, tmp_path / "no" / "parent"), "parent directory does not exist"),
        ((source, source / "inside"), "inside of the source"),
        ((source, 3), "no path that can be used"),
        ((source, "nul\0"), "no path that can be used"),
        ((tmp_path / "missing", tmp_path / "new"), "is no directory"),
        ((None, tmp_path / "new"), "no path that can be used"),
    ):
        with pytest.raises(AttnResError, match=message):
            convert(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "taken"]
    assert not list((tmp_path / "taken").iterdir())


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_failure_while_writing_leaves_nothing(
    direction: str, attnres_checkpoint: Path, k3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    source = k3_checkpoint if direction == "import" else attnres_checkpoint
    convert = kimi_k3.import_checkpoint if direction == "import" else kimi_k3.export_checkpoint
    for module, name in ((kimi_k3, "save"), (kimi_k3, "copy_companions"), (delivery, "_sync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full_disk if name != "save" else lambda *args, **kwargs: full_disk())
            with pytest.raises(AttnResError, match="No space left on device"):
                convert(source, tmp_path / "destination")
        assert not list(tmp_path.iterdir())

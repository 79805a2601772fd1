from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import FAMILIES, VOCAB_SIZE, random_tokens, randomize, retrofit, tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from attnres import AttnResConfig, AttnResError, AttnResForCausalLM, AttnResModel
from attnres.configuration_attnres import UnsupportedBackboneError
from attnres.depth_state import DepthState

MOE_FAMILIES = ["mixtral", "qwen3_moe"]


def gradients(model: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


# -- lossless retrofit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_retrofit_is_lossless(family: str, block_size: int) -> None:
    backbone = tiny_model(family)
    model = retrofit(backbone, block_size=block_size)
    input_ids = random_tokens()
    with torch.no_grad():
        expected = backbone(input_ids, output_hidden_states=True)
        actual = model(input_ids, output_hidden_states=True)
    torch.testing.assert_close(actual.logits, expected.logits, atol=2e-6, rtol=1e-5)
    for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)
    kwargs = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(model.generate(input_ids, **kwargs), backbone.generate(input_ids, **kwargs))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "kimi_linear"])
def test_mean_is_lossless_behind_an_rmsnorm(family: str) -> None:
    """The scale of a read cancels in the norm behind it, but for the norm's epsilon."""
    backbone = tiny_model(family, rms_norm_eps=1e-12)
    input_ids = random_tokens()
    with torch.no_grad():
        difference = retrofit(backbone, block_size=2, mix="mean")(input_ids).logits - backbone(input_ids).logits
    assert difference.abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "models", "batch", "length"),
    [("qwen3_moe", 20, 32, 32), ("deepseek_v3", 20, 32, 32), ("kimi_linear", 8, 16, 24)],
)
def test_bfloat16_is_no_further_from_float32_than_the_original(
    family: str, models: int, batch: int, length: int
) -> None:
    """Summed over several models: in one, the few tokens that change experts decide, and the ratio varies by half."""

    def divergence(model: PreTrainedModel, expected: torch.Tensor, input_ids: torch.Tensor) -> float:
        actual = copy.deepcopy(model).bfloat16()(input_ids).logits.double().log_softmax(-1)
        return (expected.exp() * (expected - actual)).sum(-1).mean().item()

    ours = originals = 0.0
    for seed in range(models):
        backbone = tiny_model(family, seed, num_hidden_layers=8, **layer_types(family, 8))
        input_ids = random_tokens(batch, length, seed)
        expected = backbone(input_ids).logits.double().log_softmax(-1)
        ours += divergence(retrofit(backbone, num_blocks=8), expected, input_ids)
        originals += divergence(backbone, expected, input_ids)
    print(f"KL to float32, {family}: {ours / models:.3e} converted, {originals / models:.3e} original")
    assert ours <= 1.1 * originals


def layer_types(family: str, count: int) -> dict[str, Any]:
    if family != "kimi_linear":
        return {}
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
    return {"layer_types": kinds, "mlp_layer_types": ["dense"] + ["sparse"] * (count - 1)}


def test_plain_checkpoint_can_be_retrofitted_while_loading(tmp_path: Path) -> None:
    backbone = tiny_model("qwen3")
    backbone.save_pretrained(tmp_path)
    model, info = AttnResForCausalLM.from_pretrained(tmp_path, num_blocks=4, output_loading_info=True)
    assert info["missing_keys"] == {"depth_attention.query", "depth_attention.key_norm"}
    assert (model.config.block_size, model.config.mix) == (2, "sum")
    input_ids = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids).logits, backbone(input_ids).logits, atol=2e-6, rtol=1e-5)


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_depth_attentions(block_size: int) -> None:
    backbone = tiny_model("qwen3")
    input_ids = random_tokens(batch=2, length=5)
    weights = retrofit(backbone, block_size=block_size)(input_ids, output_depth_attentions=True).depth_attentions
    sources = [1 + -(-written // block_size) for written in range(9)]
    assert [w.shape for w in weights] == [(2, 5, n) for n in sources]
    assert all(torch.allclose(w, torch.full_like(w, 1 / n)) for w, n in zip(weights, sources))
    model = retrofit(backbone, block_size=block_size, random_queries=True)
    weights = model(input_ids, output_depth_attentions=True).depth_attentions
    assert all(torch.allclose(w.sum(-1), torch.ones(2, 5)) for w in weights)
    assert weights[-1].std() > 0.01


def test_outputs_are_the_backbones() -> None:
    backbone = tiny_model("qwen3", attn_implementation="eager")
    model = retrofit(backbone, attn_implementation="eager")
    input_ids = random_tokens()
    expected = backbone(input_ids, labels=input_ids, output_attentions=True)
    actual = model(input_ids, labels=input_ids, output_attentions=True)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.loss, expected.loss)
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    as_tuple = model(input_ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], actual.logits)
    items = torch.tensor(1000)
    torch.testing.assert_close(
        model(input_ids, labels=input_ids, num_items_in_batch=items).loss,
        backbone(input_ids, labels=input_ids, num_items_in_batch=items).loss,
    )


def test_hidden_states_can_be_asked_for_in_the_config_and_by_index() -> None:
    model = retrofit(tiny_model("qwen3"), random_queries=True)
    input_ids = random_tokens()
    everything = model(input_ids, output_hidden_states=True).hidden_states
    some = model(input_ids, output_hidden_states=[1, -1]).hidden_states
    assert [h is not None for h in some] == [False, True, False, False, True]
    torch.testing.assert_close(some[1], everything[1])
    model.config.output_hidden_states = True
    assert len(model(input_ids).hidden_states) == 5


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_router_logits_and_auxiliary_loss(family: str) -> None:
    backbone = tiny_model(family)
    model = retrofit(backbone)
    input_ids = random_tokens()
    expected = backbone(input_ids, labels=input_ids, output_router_logits=True)
    actual = model(input_ids, labels=input_ids, output_router_logits=True)
    assert actual.aux_loss > 0
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert len(actual.router_logits) == len(expected.router_logits) == 4


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementation(implementation: str, tmp_path: Path) -> None:
    model = retrofit(tiny_model("qwen3_moe"), random_queries=True)
    input_ids = random_tokens()
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation).eval()
    assert loaded.backbone.config._experts_implementation == implementation
    torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(implementation: str, tmp_path: Path) -> None:
    model = retrofit(tiny_model("qwen3", head_dim=16), random_queries=True)
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert loaded.backbone.config._attn_implementation == implementation
    input_ids = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, atol=1e-5, rtol=1e-4)


def test_gemma4_layers_that_share_keys_and_values() -> None:
    """The backbone skips all positions but the last of a prefill in front of them."""
    layer_types = ["sliding_attention", "full_attention"] * 3
    backbone = tiny_model("gemma4_text", num_kv_shared_layers=2, num_hidden_layers=6, layer_types=layer_types)
    model = retrofit(backbone)
    input_ids = random_tokens()
    with torch.no_grad():
        for keep in (0, 1, 3):
            expected = backbone(input_ids, logits_to_keep=keep).logits
            torch.testing.assert_close(model(input_ids, logits_to_keep=keep).logits, expected, atol=1e-5, rtol=1e-5)
        kwargs = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1)
        assert torch.equal(model.generate(input_ids, **kwargs), backbone.generate(input_ids, **kwargs))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "family", ["qwen3", "gemma2", "kimi_linear", "bamba", "falcon_h1", "gemma4_text", "glm_moe_dsa", "zaya"]
)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool) -> None:
    model = retrofit(tiny_model(family), random_queries=True, block_size=3).train()
    tolerance = dict(atol=1e-6, rtol=1e-4)
    if family != "zaya":  # which takes its residual in float32 whatever the dtype
        model.double().set_experts_implementation("eager")  # of the others, none multiplies in float64
        tolerance = dict(atol=1e-10, rtol=1e-8)
    input_ids = random_tokens()
    expected = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **tolerance, msg=name)


def test_gradient_checkpointing_recomputes() -> None:
    model = retrofit(tiny_model("qwen3")).train()
    model.gradient_checkpointing_enable()
    calls = []
    model.backbone.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, input_ids=random_tokens(), labels=random_tokens(), use_cache=False)
    assert len(calls) == 2


@pytest.mark.parametrize("implementation", ["eager", "two_phase"])
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_gradient_checkpointing_keeps_sources_and_partial_sums_alone(block_size: int, implementation: str) -> None:
    """What travels from layer to layer is what checkpointing keeps: besides these, one number per token and source."""
    backbone = tiny_model("qwen3", num_hidden_layers=4)
    kwargs = dict(block_size=block_size, depth_attention_implementation=implementation)
    model = retrofit(backbone, random_queries=True, **kwargs).double().train()
    input_ids = random_tokens()
    expected = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    crossing: dict[int, DepthState] = {}
    layers = model.backbone.model.layers[:-1]
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, _, values: crossing.update({layer.next_sublayer: DepthState.unflatten(values)})
        )
    actual = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    assert len(crossing) == len(layers)
    for num_written, (sources, partial_sum, addend, depth, cache) in crossing.items():
        values = sources if partial_sum is None else (*sources, partial_sum)
        assert len(values) == 1 + -(-num_written // block_size)
        assert all(value.shape == (*input_ids.shape, model.config.hidden_size) for value in values)
        assert addend is None
        assert depth == num_written
        assert (cache is None) == (implementation == "eager")
        assert cache is None or (cache.inverse_rms.shape[-1] <= len(sources) and not cache.outputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.parametrize("block_size", [1, 3])
def test_layers_in_evaluation_mode_beside_layers_that_recompute(block_size: int) -> None:
    model = retrofit(tiny_model("qwen3", num_hidden_layers=6), random_queries=True, block_size=block_size)
    model.double().train()
    input_ids = random_tokens()
    expected = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for index in (1, 2, 4):
        model.backbone.model.layers[index].eval()
    actual = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_depth_attentions_of_layers_that_are_recomputed(use_reentrant: bool) -> None:
    model = retrofit(tiny_model("qwen3"), random_queries=True, block_size=3).double().train()
    inputs = dict(input_ids=random_tokens(), labels=random_tokens(), use_cache=False)
    inputs |= dict(output_depth_attentions=True, output_hidden_states=True)
    expected, expected_grads = model(**inputs), gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad()
    actual = model(**inputs)
    actual.loss.backward()
    for name in ("hidden_states", "depth_attentions"):
        for a, b in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(a, b)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads.get(name), atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_backward_hooks_of_decoder_layers_are_called(block_size: int) -> None:
    model, called = retrofit(tiny_model("qwen3"), random_queries=True, block_size=block_size), []
    for index, layer in enumerate(model.backbone.model.layers):
        layer.register_full_backward_hook(lambda *_, index=index: called.append(index))
    model(random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
    assert called == list(reversed(range(len(model.backbone.model.layers))))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("implementation", ["eager", "two_phase"])
def test_fsdp_with_mixed_precision(implementation: str, tmp_path: Path) -> None:
    """It casts all that a decoder layer is given to bfloat16, queries and statistics with it."""
    model = retrofit(
        tiny_model("qwen3"), random_queries=True, block_size=3, depth_attention_implementation=implementation
    )
    inputs = dict(input_ids=random_tokens(), labels=random_tokens(), use_cache=False, output_depth_attentions=True)
    expected = model(**inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        kwargs = dict(mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        for layer in model.backbone.model.layers:
            fully_shard(layer, **kwargs)
        fully_shard(model, **kwargs)
        actual = model(**inputs, output_hidden_states=True)
        actual.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    assert len(actual.hidden_states) == 1 + len(model.backbone.model.layers)
    torch.testing.assert_close(actual.loss, expected.loss, atol=0.05, rtol=0, check_dtype=False)
    for a, b in zip(actual.depth_attentions, expected.depth_attentions, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)


def test_autocast_keeps_sources_in_the_dtype_of_the_embedding() -> None:
    model = retrofit(tiny_model("qwen3"), random_queries=True)
    input_ids = random_tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden_states = model(input_ids, output_hidden_states=True).hidden_states
    assert all(h.dtype == torch.float32 for h in hidden_states[:-1])


def test_trainer_learns_and_resumes_with_queries_that_moved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = retrofit(tiny_model("qwen3"), block_size=2).train()
    data = [{"input_ids": row, "labels": row} for row in random_tokens(batch=8, length=12)]
    arguments = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=12,
        save_steps=12,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert model.depth_attention.query[1:].abs().amax(-1).min() > 0
    assert not model.depth_attention.query[0].any(), "the first read sees one source: its query has no effect"

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert isinstance(loaded, AttnResForCausalLM)
    input_ids = random_tokens()
    torch.testing.assert_close(loaded.eval()(input_ids).logits, model.eval()(input_ids).logits)


def test_lora_beside_trained_depth_attention() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["depth_attention"], task_type="CAUSAL_LM")
    model = get_peft_model(retrofit(tiny_model("qwen3")), config)
    input_ids = random_tokens()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in name for name in trained)
    assert any("depth_attention" in name and "query" in name for name in trained)
    assert not any("embed_tokens" in name for name in trained)


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_save_gives_the_same_bytes_under_the_backbones_names(family: str, tmp_path: Path) -> None:
    backbone = tiny_model(family)
    backbone.save_pretrained(tmp_path / "backbone")
    model = retrofit(backbone, random_queries=True)
    model.save_pretrained(tmp_path / "first")
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    names = [
        set(safe_open(tmp_path / directory / "model.safetensors", framework="pt").keys())
        for directory in ("backbone", "first")
    ]
    assert names[1] - names[0] == {"depth_attention.query", "depth_attention.key_norm"}
    assert names[0] <= names[1]


def test_either_class_loads_the_others_checkpoint(tmp_path: Path) -> None:
    model = retrofit(tiny_model("qwen3_moe", tie_word_embeddings=True), random_queries=True)
    model.save_pretrained(tmp_path / "head")
    headless, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert isinstance(headless, AttnResModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    input_ids = random_tokens()
    expected = model(input_ids, output_hidden_states=True)
    torch.testing.assert_close(headless.eval()(input_ids).last_hidden_state, expected.hidden_states[-1])
    headless.save_pretrained(tmp_path / "headless")
    back, info = AttnResForCausalLM.from_pretrained(tmp_path / "headless", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(back.eval()(input_ids).logits, expected.logits)


def test_saved_code_and_auto_map(tmp_path: Path) -> None:
    model = retrofit(tiny_model("llama"))
    for saved in (model, AttnResModel(model.config), model.config):
        saved.save_pretrained(tmp_path / type(saved).__name__)
        reloaded = AttnResConfig.from_pretrained(tmp_path / type(saved).__name__)
        assert set(reloaded.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert (tmp_path / type(saved).__name__ / "configuration_attnres.py").is_file()
    code = {path.name for path in (tmp_path / "AttnResForCausalLM").glob("*.py")}
    modules = ["backbones", "configuration_attnres", "modeling_attnres", "depth_state", "depth_attention"]
    modules += ["depth_attention_two_phase", "depth_attention_triton"]
    assert code == {f"{module}.py" for module in modules}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    retrofit(tiny_model("qwen3")).save_pretrained(tmp_path)
    model = AttnResForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(random_tokens()).logits.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {dtype}


def test_offloaded_to_cpu_and_disk(tmp_path: Path) -> None:
    model = retrofit(tiny_model("qwen3"), random_queries=True, block_size=3)
    model.save_pretrained(tmp_path / "model")
    sizes = sum(p.numel() * 4 for p in model.backbone.model.layers[0].parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 4 * VOCAB_SIZE * 32 + 2 * sizes + 10_000},
        offload_folder=tmp_path / "offload",
    )
    devices = set(loaded.hf_device_map.values())
    assert "disk" in devices
    assert len(devices) == 2
    input_ids = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
        assert torch.equal(
            loaded.generate(input_ids, max_new_tokens=5, do_sample=False),
            model.generate(input_ids, max_new_tokens=5, do_sample=False),
        )


def test_no_layer_is_split_between_devices() -> None:
    from accelerate import infer_auto_device_map

    model = retrofit(tiny_model("qwen3"))
    assert model._no_split_modules == {"AttnResQwen3DecoderLayer"}
    device_map = infer_auto_device_map(model, {0: 60_000, "cpu": "1GB"}, model._no_split_modules)
    assert not any(name.count(".") > 3 for name in device_map)


def test_embeddings_and_tied_head(tmp_path: Path) -> None:
    model = retrofit(tiny_model("qwen3"), random_queries=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(VOCAB_SIZE + 7)
    assert model.config.vocab_size == model.config.backbone_config.vocab_size == VOCAB_SIZE + 7
    assert model(random_tokens()).logits.shape[-1] == VOCAB_SIZE + 7
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded.eval()(random_tokens()).logits, model(random_tokens()).logits)


def test_children_of_layers_stay_what_they_are() -> None:
    """Tools look for modules of torch by their exact type, for others by `isinstance`."""
    backbone = tiny_model("stablelm")
    model = retrofit(backbone)
    changed = 0
    for name, module in backbone.named_modules():
        other = model.backbone.get_submodule(name)
        assert isinstance(other, type(module))
        assert type(other) is type(module) or not type(module).__module__.startswith("torch.nn.")
        changed += type(other) is not type(module)
    assert changed == 3 * len(model.backbone.model.layers)  # the layer, its attention and its MLP; norms are LayerNorms


@pytest.mark.parametrize("implementation", ["two_phase", "auto"])
@pytest.mark.parametrize("family", ["qwen3", "gemma4_text", "stablelm"])
def test_copies_and_pickles(family: str, implementation: str) -> None:
    model = retrofit(tiny_model(family), random_queries=True, depth_attention_implementation=implementation)
    input_ids = random_tokens()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids).logits, model(input_ids).logits)
        randomize(other, seed=9)
        assert not torch.allclose(other(input_ids).logits, model(input_ids).logits)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = AttnResForCausalLM(AttnResConfig(backbone_config=tiny_config("kimi_linear")))
    assert all(p.device.type == "meta" for p in model.parameters())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("mix", "Sum"), ("block_size", 0), ("block_size", 100), ("depth_attention_implementation", "x")]
)
def test_a_configuration_that_was_spoilt_is_refused(name: str, value: Any) -> None:
    config = AttnResConfig(backbone_config=tiny_config("qwen3"))
    setattr(config, name, value)
    with pytest.raises(AttnResError, match=f"{name}={value!r}"):
        AttnResForCausalLM(config)


def test_another_configuration_is_refused() -> None:
    with pytest.raises(AttnResError, match="needs an AttnResConfig, not a Qwen3Config"):
        AttnResForCausalLM(tiny_config("qwen3"))


def test_refused_family_is_refused_by_name() -> None:
    config = AttnResConfig(backbone_config=dict(model_type="opt", num_hidden_layers=2))
    with pytest.raises(UnsupportedBackboneError, match="'opt' is not supported: its decoder layers reshape.*qwen3"):
        AttnResForCausalLM(config)


def test_layerdrop_is_refused() -> None:
    config = AttnResConfig(backbone_config=tiny_config("xglm", layerdrop=0.1))
    with pytest.raises(UnsupportedBackboneError, match="layerdrop=0.1.*set layerdrop=0"):
        AttnResForCausalLM(config)


class OtherLayer(Qwen3DecoderLayer):
    use = "adds once more"

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        output = super().forward(hidden_states, **kwargs)
        if self.use == "adds once more":
            return output + self.mlp(output)
        return self.mlp(output)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("adds once more", "AttnResOtherLayer wrote 3 times to its residual stream; 2 times were expected"),
        ("returns another tensor", "AttnResOtherLayer returns something else than its residual stream"),
    ],
)
def test_layers_that_do_something_else_are_refused(use: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later release of a family might."""
    monkeypatch.setattr(OtherLayer, "use", use)
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer", OtherLayer)
    model = AttnResForCausalLM(AttnResConfig(backbone_config=tiny_config("qwen3")))
    with pytest.raises(UnsupportedBackboneError, match=message):
        model(random_tokens())


def test_backbone_alone_says_how_to_call_it() -> None:
    model = retrofit(tiny_model("qwen3"))
    with pytest.raises(AttnResError, match="call the model"):
        model.backbone(random_tokens())


def test_the_original_class_is_left_alone() -> None:
    backbone = tiny_model("qwen3")
    before = backbone(random_tokens()).logits
    retrofit(backbone, random_queries=True)
    assert type(backbone.model.layers[0]).__name__ == "Qwen3DecoderLayer"
    assert torch.equal(backbone(random_tokens()).logits, before)
    assert torch.equal(tiny_model("qwen3")(random_tokens()).logits, before)

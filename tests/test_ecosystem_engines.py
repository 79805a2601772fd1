"""Engines: those of Transformers itself, and what others do, which put modules of their own in the backbone's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ecosystem import row
from tiny import random_tokens, retrofit, tiny_model
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from attnres import AttnResForCausalLM
from attnres.conversion import convert
from attnres.examples.demo import CHECKPOINT

GREEDY: dict[str, Any] = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)


class TorchNorm(nn.Module):
    """An RMSNorm as engines have it, in plain torch: it multiplies what it is given by its weight."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = (hidden_states * hidden_states).mean(-1, keepdim=True)
        return hidden_states * torch.rsqrt(variance + self.eps) * self.weight


@row("Transformers", "a module of another library in the place of a layer's norm")
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_replaced_norm_reads_from_depth(family: str) -> None:
    model = retrofit(tiny_model(family), random_queries=True)
    with torch.no_grad():  # a weight that is not uniform, or else scaled sources have the same keys
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.add_(torch.linspace(-0.5, 1.5, len(parameter)))
    input_ids = random_tokens()
    expected = model(input_ids).logits
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, TorchNorm(getattr(layer, name)))
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-4, rtol=1e-4)


# -- the engine of Transformers ----------------------------------------------------------------------------------------


@row("Transformers", "`generate_batch` (continuous batching, paged cache), random queries")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
def test_continuous_batching(family: str) -> None:
    plain = tiny_model(family)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 30, 17)]
    prompts.append(prompts[2][:20] + prompts[0])  # shares the pages of its beginning
    generation = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0)
    # Long prompts are prefilled in pieces, beside requests that decode.
    batching = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=32)
    found = []
    for model in (plain, retrofit(plain, random_queries=True)):
        outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        found.append([by_prompt[tuple(prompt)] for prompt in prompts])
        for prompt, tokens in zip(prompts, found[-1], strict=True):
            alone = model.generate(torch.tensor([prompt]), generation_config=generation)[0, len(prompt) :]
            assert tokens == alone.tolist()
    assert found[0] != found[1], "the queries change nothing"


QUANTIZED = dict(q_group_size=32, residual_length=4)
CACHES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "static": (None, dict(cache_implementation="static")),
    "quantized, fp8": (None, dict(cache_implementation="quantized", cache_config=dict(backend="fp8"))),
    "quantized, quanto, 4 bits": ("optimum.quanto", dict(backend="quanto", nbits=4)),
    "quantized, hqq, 8 bits": ("hqq", dict(backend="hqq", nbits=8, axis_key=1, axis_value=1)),
}
EXACT = ("static", "quantized, hqq, 8 bits")


@row("Transformers", *(f"`cache_implementation`: {name}" for name in CACHES))
@pytest.mark.parametrize("name", CACHES)
def test_caches(name: str) -> None:
    """With zero queries the tokens are the plain model's, mistakes of quantization included; with random ones a cache
    that is exact enough gives the tokens of the default cache."""
    module, options = CACHES[name]
    if module is not None:
        pytest.importorskip(module, reason="it is in the extra `ecosystem`")
        options = dict(cache_implementation="quantized", cache_config=QUANTIZED | options)
    plain = tiny_model("qwen3", head_dim=32)
    ours = retrofit(plain, random_queries=True)
    expected = generated(plain, **options)
    assert torch.equal(generated(retrofit(plain), **options), expected)
    if name in EXACT:
        assert torch.equal(generated(ours, **options), generated(ours))
    assert not torch.equal(generated(ours, **options), expected)


def generated(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    input_ids = random_tokens(length=12)
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **GREEDY, **options)


@row(
    "Transformers",
    "`cache_implementation`: offloaded, offloaded_static",
    result="not tested: both offload from an accelerator; on a CPU the plain model fails with the same error",
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator: see test_generation.py")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_need_an_accelerator(cache: str) -> None:
    plain = tiny_model("qwen3")
    errors = []
    for model in (plain, retrofit(plain)):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            generated(model, cache_implementation=cache)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@row(
    "Transformers",
    "`transformers serve`",
    result="refused: it looks the class up in Transformers itself, so it serves no custom class, `--trust-remote-code` "
    "or not; it does once the class is put there, see below",
)
def test_the_server_knows_no_custom_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    convert(CHECKPOINT, tmp_path / "converted", num_blocks=4, verify="none")

    def loaded(directory: Path) -> PreTrainedModel:
        server = manager.ModelManager(device="cpu", trust_remote_code=True, force_model=str(directory))
        return next(iter(server.loaded_models.values())).model

    assert type(loaded(CHECKPOINT)) is transformers.Qwen3ForCausalLM
    with pytest.raises(AttributeError, match="AttnResForCausalLM"):
        loaded(tmp_path / "converted")
    monkeypatch.setattr(transformers, "AttnResForCausalLM", AttnResForCausalLM, raising=False)
    assert isinstance(loaded(tmp_path / "converted"), AttnResForCausalLM)

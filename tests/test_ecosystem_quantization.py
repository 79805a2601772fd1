"""Quantising libraries: what they make of the plain model's weights they make of ours, and depth stays in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem import row
from tiny import depth_attention, random_tokens, retrofit, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, QuantoConfig, TorchAoConfig

from attnres import AttnResForCausalLM


def torchao(name: str, **arguments: Any) -> Callable[[], TorchAoConfig]:
    return lambda: TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)(**arguments))


def quanto(weights: str) -> Callable[[], QuantoConfig]:
    return lambda: pytest.importorskip("optimum.quanto") and QuantoConfig(weights=weights)


def bitsandbytes(**arguments: Any) -> Callable[[], BitsAndBytesConfig]:
    return lambda: pytest.importorskip("bitsandbytes") and BitsAndBytesConfig(**arguments)


# By tool and line of the table: the configuration, and whether products are of rounded inputs too.
METHODS: dict[tuple[str, str], tuple[Callable[[], Any], bool]] = {
    ("torchao", "int8 weights"): (torchao("Int8WeightOnlyConfig"), False),
    ("torchao", "int4 weights (`IntxWeightOnlyConfig`)"): (
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
        False,
    ),
    ("torchao", "int8 weights and activations"): (torchao("Int8DynamicActivationInt8WeightConfig"), True),
    ("quanto", "int8 weights"): (quanto("int8"), False),
    ("quanto", "int4 weights"): (quanto("int4"), False),
    ("bitsandbytes", "int8 on a CPU"): (bitsandbytes(load_in_8bit=True), True),
    ("bitsandbytes", "nf4 on a CPU"): (
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        True,
    ),
    ("bitsandbytes", "fp4 on a CPU"): (
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
        True,
    ),
}


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize(("tool", "what"), METHODS)
@torch.no_grad()
def test_quantized_logits_are_those_of_the_quantized_plain_model(
    tool: str, what: str, family: str, tmp_path: Path
) -> None:
    """With zero queries: the plain model's. With random ones: those of a model with the plain one's products."""
    make, rounds_inputs = METHODS[tool, what]
    configuration = make()
    tolerance = dict(atol=0.2, rtol=0) if rounds_inputs else dict(atol=1e-4, rtol=1e-4)
    input_ids = random_tokens()
    plain = tiny_model(family, hidden_size=64, intermediate_size=128, head_dim=16)
    models = {"plain": plain, "ours": retrofit(plain), "random": retrofit(plain, random_queries=True)}
    quantized = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        quantized[name] = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=copy.deepcopy(configuration), device_map="cpu", dtype=torch.float32
        ).eval()
    if tool != "quanto":  # which Transformers does not save, the plain model neither
        # Before the first forward, in which bitsandbytes packs 4 bits anew for a CPU and so spoils what is saved later.
        quantized["random"].save_pretrained(tmp_path / "again")
    expected = quantized["plain"](input_ids).logits
    assert (expected - plain(input_ids).logits).abs().max() > 1e-2, "nothing was rounded"
    assert isinstance(quantized["ours"], AttnResForCausalLM)
    assert depth_attention(quantized["random"]).query.dtype == torch.float32
    torch.testing.assert_close(quantized["ours"](input_ids).logits, expected, **tolerance)

    logits = quantized["random"](input_ids).logits
    reference = transplanted(retrofit(plain, random_queries=True), quantized["plain"])(input_ids).logits
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)
    assert (logits - expected).abs().max() > 0.5, "the queries change nothing"

    if tool != "quanto":
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu").eval()
        torch.testing.assert_close(again(input_ids).logits, logits)


for tool, what in METHODS:
    row(tool, what)(test_quantized_logits_are_those_of_the_quantized_plain_model)


def transplanted(model: PreTrainedModel, quantized: PreTrainedModel) -> PreTrainedModel:
    """The model with the products of a quantised plain model."""
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear):
            model.set_submodule(name, module)
    return model

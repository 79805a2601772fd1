"""What tools look up by `model_type` or by the name of a class, and what they find for an AttnRes model.

In the library's sources, `model_type` is asked by conversion_mapping (how tensors are renamed and merged on disk),
fusion_mapping and integrations/hub_kernels (through `config_class.model_type`), quantizers/quantizer_awq (scales),
modeling_utils (how Llama 4 compiles), models/auto/tokenization_auto (the tokenizer), configuration_utils (loading),
and pipelines (other modalities). PEFT asks `config.to_dict()["model_type"]` for default targets. Names of classes are
asked by conversion_mapping, trainer (label smoothing), output_capturing (what can be recorded), generation
(`_supports_default_dynamic_cache`: MiniMax), and device maps, FSDP and tensor parallel plans (decoder layers).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, retrofit, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.backbones import SUPPORTED

FAMILIES = ("llama", "mixtral", "deepseek_v3", "gpt_neox", "minimax", "falcon_h1")


def described(model: Any) -> list[str]:
    return [repr(conversion) for conversion in get_model_conversion_mapping(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_type_is_the_backbones(family: str) -> None:
    config = AttnResConfig(backbone_config=tiny_config(family))
    with torch.device("meta"):
        model = AttnResForCausalLM(config)
        plain = AutoModelForCausalLM.from_config(tiny_config(family))
    for answer in (config.model_type, config.to_dict()["model_type"], type(model).config_class.model_type):
        assert answer == family
    assert get_checkpoint_conversion_mapping(config.model_type) is not None or described(model) == described(plain)
    assert model.base_model_prefix == plain.base_model_prefix
    assert model._tied_weights_keys == plain._tied_weights_keys
    assert model._no_split_modules == set(plain._no_split_modules)
    assert model._supports_default_dynamic_cache() == plain._supports_default_dynamic_cache()
    assert model._tp_plan == plain._tp_plan
    assert {name for name, _ in plain.named_modules()} | {
        name for name, _ in model.named_modules() if name.endswith("depth_attention")
    } == {name for name, _ in model.named_modules()}


@pytest.mark.parametrize("family", ["gpt_neox", "dots3_note_text"])
def test_plain_models_are_saved_as_before(family: str, tmp_path: Path) -> None:
    """Their renamings are listed by class alone; AttnRes lists them by model type too."""
    if family not in SUPPORTED or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of Transformers has no {family}")
    plain = tiny_model(family)
    retrofit(plain)
    plain.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again.eval()(random_tokens()).logits, plain(random_tokens()).logits)


def test_label_smoothing_shifts_labels(tmp_path: Path) -> None:
    backbone = tiny_model("qwen3")
    inputs = {"input_ids": random_tokens(), "labels": random_tokens()}
    losses = []
    for model in (backbone, retrofit(backbone)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none"
        )
        losses.append(Trainer(model=model, args=arguments).compute_loss(model, dict(inputs)))
    torch.testing.assert_close(losses[1], losses[0])


def test_weight_decay_leaves_depth_parameters_alone(tmp_path: Path) -> None:
    model = retrofit(tiny_model("qwen3"))
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    decayed = trainer.get_decay_parameter_names(model)
    assert "model.layers.0.mlp.up_proj.weight" in decayed
    assert not [name for name in decayed if "depth_attention" in name]

"""Heads beside the causal one: each gives what the plain model's gives, and learns through depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem import assert_same_training, freeze_depth, row, train
from tiny import depth_attention, random_tokens, randomize, tiny_config
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from attnres.modeling_attnres import (
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
)

HEADS = {
    "sequence": (AutoModelForSequenceClassification, AttnResForSequenceClassification),
    "token": (AutoModelForTokenClassification, AttnResForTokenClassification),
    "question": (AutoModelForQuestionAnswering, AttnResForQuestionAnswering),
}


def plain_head(head: str, family: str, directory: Path, **overrides: Any) -> PreTrainedModel:
    """A random model with a head, which is also in `directory`."""
    if head != "question":
        overrides["num_labels"] = 3
    torch.manual_seed(0)
    model = HEADS[head][0].from_config(tiny_config(family, **overrides)).eval()
    model.save_pretrained(directory)
    return model


def outputs_of(model: Any, input_ids: torch.Tensor) -> list[torch.Tensor]:
    outputs = model(input_ids, attention_mask=torch.ones_like(input_ids))
    return [outputs[name] for name in ("logits", "start_logits", "end_logits") if name in outputs]


@row(
    "Transformers",
    "`AutoModelForSequenceClassification`, `AutoModelForTokenClassification`, `AutoModelForQuestionAnswering`",
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("head", HEADS)
def test_outputs_are_those_of_the_plain_model(head: str, family: str, tmp_path: Path) -> None:
    auto_class, our_class = HEADS[head]
    if type(tiny_config(family)) not in auto_class._model_mapping:
        pytest.skip(f"{family} has no such head")
    plain = plain_head(head, family, tmp_path / "plain")
    input_ids = random_tokens()
    ours, info = our_class.from_pretrained(tmp_path / "plain", num_blocks=3, output_loading_info=True)
    assert all("depth_attention" in name for name in info["missing_keys"])
    for actual, expected in zip(outputs_of(ours.eval(), input_ids), outputs_of(plain, input_ids), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)

    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    loaded = auto_class.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(loaded, our_class)
    for actual, expected in zip(outputs_of(loaded, input_ids), outputs_of(ours, input_ids), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not torch.allclose(outputs_of(loaded, input_ids)[0], outputs_of(plain, input_ids)[0], atol=1e-3)


@row("Trainer", "sequence classification")
def test_a_classifier_is_trained(tmp_path: Path) -> None:
    data = [{"input_ids": t, "labels": i % 3} for i, t in enumerate([*random_tokens(4, 12)] * 4)]
    plain = plain_head("sequence", "qwen3", tmp_path / "plain")
    ours = AttnResForSequenceClassification.from_pretrained(tmp_path / "plain")
    expected = train(plain.train(), tmp_path / "a", data, max_steps=8)
    assert_same_training(train(freeze_depth(ours).train(), tmp_path / "b", data, max_steps=8), expected)

    ours = AttnResForSequenceClassification.from_pretrained(tmp_path / "plain")
    train(ours.train(), tmp_path / "c", data)
    assert depth_attention(ours).query.any()

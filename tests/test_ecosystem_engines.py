"""What engines do to a model: they put modules of their own in the place of the backbone's."""

from __future__ import annotations

import pytest
import torch
from ecosystem import row
from tiny import random_tokens, retrofit, tiny_model
from torch import nn


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

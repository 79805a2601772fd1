"""Attention Residuals as the paper's equations state them, in float64, sharing no code with the package.

The decoder is a plain model of Transformers whose layers are told, one by one, what to read and where to write.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def read(sources: list[torch.Tensor], w: torch.Tensor, g: torch.Tensor, mix: str, eps: float) -> tuple[Any, Any]:
    """Eq. 1-4: softmax over the sources of w . RMSNorm(v), with the raw sources as values."""
    values = torch.stack(sources)  # [n, batch, sequence, hidden]
    keys = values / torch.sqrt((values**2).mean(-1, keepdim=True) + eps) * g
    weights = torch.softmax((keys * w).sum(-1), dim=0)  # [n, batch, sequence]
    hidden_states = (weights.unsqueeze(-1) * values).sum(0)
    return hidden_states * (len(sources) if mix == "sum" else 1), weights.movedim(0, -1)


def visible(embedding: torch.Tensor, outputs: list[torch.Tensor], block_size: int) -> list[torch.Tensor]:
    """Eq. 5-6: the embedding, the sum of each finished block, and the partial sum of the open one."""
    blocks = [outputs[i : i + block_size] for i in range(0, len(outputs), block_size)]
    return [embedding, *(sum(block[1:], block[0]) for block in blocks)]


class ReferenceModel(nn.Module):
    def __init__(
        self,
        backbone: PreTrainedModel,
        query: torch.Tensor,
        key_norm: torch.Tensor,
        block_size: int,
        mix: str = "mean",
        eps: float = 1e-6,
    ):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).double()
        self.backbone.set_experts_implementation("eager")  # the others have no float64
        self.query = nn.Parameter(query.double())
        self.key_norm = nn.Parameter(key_norm.double())
        self.block_size, self.mix, self.eps = block_size, mix, eps
        layers = self.backbone.model.layers
        for index, layer in enumerate(layers):
            layer.forward = self.layer_forward(layer, is_last=index == len(layers) - 1)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        self.embedding: torch.Tensor | None = None
        self.outputs: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        return self.backbone(input_ids, use_cache=False, **kwargs)

    def read(self) -> torch.Tensor:
        number = len(self.outputs)
        sources = visible(self.embedding, self.outputs, self.block_size)
        hidden_states, weights = read(sources, self.query[number], self.key_norm[number], self.mix, self.eps)
        self.weights.append(weights)
        return hidden_states

    def layer_forward(self, layer: nn.Module, is_last: bool) -> Any:
        sandwich = hasattr(layer, "pre_feedforward_layernorm")

        def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if self.embedding is None:
                self.embedding = hidden_states
            if "cache_params" in layer.self_attn.forward.__code__.co_varnames:
                kwargs.pop("past_key_values")
            mixed = layer.self_attn(hidden_states=layer.input_layernorm(self.read()), **kwargs)
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            self.outputs.append(layer.post_attention_layernorm(mixed) if sandwich else mixed)
            norm = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
            fed = layer.mlp(norm(self.read()))
            self.outputs.append(layer.post_feedforward_layernorm(fed) if sandwich else fed)
            return self.read() if is_last else hidden_states

        return forward

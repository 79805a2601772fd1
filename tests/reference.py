"""Attention Residuals as the paper's equations state them, in float64, sharing no code with the package.

The decoder is a plain model of Transformers whose layers are told, one by one, what to read and where to write.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def read(
    sources: list[torch.Tensor],
    w: torch.Tensor,
    g: torch.Tensor | None,
    mix: str,
    eps: float,
    gate: torch.Tensor | float = 0.0,
    num_heads: int = 1,
    query: str = "learned",
    weighting: str = "softmax",
    key_norm: bool = True,
    logit_scale: float = 1.0,
    window: int | None = None,
    values: str = "raw",
) -> tuple[Any, Any]:
    """Eq. 1-4 and their variants: softmax over the sources of w . RMSNorm(v), with the raw sources as values.

    Returns the read, `[batch, sequence, hidden]`, and its weights, `[batch, sequence, heads, sources]`.
    """
    if len(sources) == 1:
        return sources[0], torch.ones(*sources[0].shape[:-1], num_heads, 1, dtype=sources[0].dtype)
    raw = torch.stack(sources)  # [n, batch, sequence, hidden]
    normalized = raw / torch.sqrt((raw**2).mean(-1, keepdim=True) + eps)
    keys = normalized * g if key_norm and g is not None else raw
    seen = [i for i in range(len(sources)) if i == 0 or window is None or i >= len(sources) - window]
    if query == "static":
        logits = w[: len(sources), None, None, None].expand(*raw.shape[:3], 1)
    else:
        if query == "input":
            w = torch.einsum("ij,bsj->bsi", w, keys[-1])
        logits = torch.stack([slices.sum(-1) for slices in (keys * w).chunk(num_heads, dim=-1)], dim=-1) * logit_scale
    weights = torch.zeros_like(logits)
    if weighting == "softmax":
        weights[seen] = torch.softmax(logits[seen], dim=0)
    else:
        weights[seen] = 2 / (1 + torch.exp(-logits[seen])) / len(seen)
    slices = (raw if values == "raw" else normalized).chunk(num_heads, dim=-1)
    hidden_states = torch.cat([(weights[..., h, None] * part).sum(0) for h, part in enumerate(slices)], dim=-1)
    if mix == "sum":
        hidden_states = hidden_states * len(sources)
    if mix == "gated":
        hidden_states = raw.sum(0) + gate * hidden_states
    return hidden_states, weights.movedim(0, -1)


def visible(embedding: torch.Tensor, outputs: list[torch.Tensor], block_size: int) -> list[torch.Tensor]:
    """Eq. 5-6: the embedding, the sum of each finished block, and the partial sum of the open one."""
    blocks = [outputs[i : i + block_size] for i in range(0, len(outputs), block_size)]
    return [embedding, *(sum(block[1:], block[0]) for block in blocks)]


class ReferenceModel(nn.Module):
    def __init__(
        self,
        backbone: PreTrainedModel,
        query: torch.Tensor,
        key_norm: torch.Tensor | None,
        block_size: int,
        mix: str = "mean",
        eps: float = 1e-6,
        gate: torch.Tensor | None = None,
        variant: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).double()
        self.backbone.set_experts_implementation("eager")  # the others have no float64
        self.query = nn.Parameter(query.double())
        self.key_norm = None if key_norm is None else nn.Parameter(key_norm.double())
        self.gate = None if gate is None else nn.Parameter(gate.double())
        self.block_size, self.mix, self.eps, self.variant = block_size, mix, eps, variant or {}
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
        key_norm = None if self.key_norm is None else self.key_norm[number]
        gate = 0.0 if self.gate is None else self.gate[number]
        hidden_states, weights = read(sources, self.query[number], key_norm, self.mix, self.eps, gate, **self.variant)
        self.weights.append(weights.squeeze(-2) if weights.shape[-2] == 1 else weights)
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

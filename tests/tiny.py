"""The smallest configurations that still have every part of their family's decoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from attnres import AttnResConfig, AttnResForCausalLM

VOCAB_SIZE = 96

COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.1,  # at 0.2 rounding alone is amplified to 4e-5 in float32, whatever computes it
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MLA = dict(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=8),
    "qwen2": {},
    "qwen3": dict(tie_word_embeddings=True),
    "gemma2": dict(sliding_window=8, query_pre_attn_scalar=8),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=False),
    "qwen3_moe": dict(num_experts=4, **MOE),
    "deepseek_v3": dict(
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=16,
        **MOE,
        **MLA,
    ),
    "kimi_linear": dict(
        num_experts=4,
        num_shared_experts=1,
        num_key_value_heads=4,
        linear_num_heads=4,
        linear_head_dim=8,
        first_k_dense_replace=1,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        **MOE,
        **MLA,
    ),
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of the family in float32, in evaluation mode; the same for the same arguments."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).float().eval()


def random_tokens(batch: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


def retrofit(backbone: PreTrainedModel, random_queries: bool = False, **kwargs: Any) -> AttnResForCausalLM:
    """An AttnRes model with the weights of `backbone`, in memory; `kwargs` go to its [`AttnResConfig`]."""
    kwargs = {"mix": "sum"} | kwargs
    config = AttnResConfig(backbone_config=copy.deepcopy(backbone.config), **kwargs)
    model = AttnResForCausalLM(config).to(backbone.dtype).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    if random_queries:
        randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any, seed: int = 1) -> None:
    """Gives every read a query and a key norm of its own, large enough that depth weights are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    depth = model.depth_attention
    depth.query.copy_(torch.randn(depth.query.shape, generator=generator) * 0.3)
    depth.key_norm.copy_(1 + 0.3 * torch.randn(depth.key_norm.shape, generator=generator))

"""The smallest configurations that still have every part of their family's decoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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
EXPERTS = dict(MOE, num_experts=4)
ROUTED = dict(MOE, n_routed_experts=4, n_shared_experts=1)
GROUPED = dict(ROUTED, n_group=2, topk_group=1, first_k_dense_replace=1)
MLA = dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
INDEXER = dict(index_n_heads=2, index_head_dim=16, index_topk=64)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=64)
LAYER_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=LAYER_TYPES,
)

# What else a configuration needs in order to be tiny; architectures that are not named need nothing else.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": dict(**EXPERTS, num_dense_layers=1, sliding_window=8),
    "axk1": dict(**GROUPED, **MLA),
    "axk2": dict(**GROUPED, **MLA),
    "bailing_hybrid": dict(
        **MOE,
        **MLA,
        layer_types=LAYER_TYPES,
        num_local_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "bamba": dict(**MAMBA, attn_layer_indices=[1]),
    "beam": dict(**EXPERTS, n_group=2, topk_group=1, num_local_experts=4),
    "cohere_compass_text": dict(
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        }
    ),
    "deepseek_v2": dict(**GROUPED, **MLA),
    "deepseek_v3": dict(**GROUPED, **MLA),
    "deepseek_v32": dict(**GROUPED, **MLA, **INDEXER),
    "dots1": GROUPED,
    "dots3_note_text": dict(
        **GROUPED,
        **MLA,
        **INDEXER,
        num_attention_heads=4,
        sliding_window=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_qk_rope_head_dim=8,
        swa_v_head_dim=8,
        head_dim=16,
    ),
    "ernie4_5_moe": dict(**MOE, moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    "exaone_moe": EXPERTS,
    "falcon_h1": dict(**MAMBA, mamba_d_ssm=64),
    "flint": EXPERTS,
    "gemma2": dict(sliding_window=8, query_pre_attn_scalar=8),
    "gemma4_text": dict(
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        sliding_window=8,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        enable_moe_block=True,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma4_unified_text": dict(
        head_dim=8,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "glm4_moe": GROUPED,
    "glm4_moe_lite": dict(**GROUPED, **MLA),
    "glm_moe_dsa": dict(**GROUPED, **MLA, **INDEXER),
    "granitemoehybrid": dict(
        **MAMBA, layer_types=LAYER_TYPES, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24
    ),
    "hy_v3": EXPERTS,
    "inkling_text": dict(**MOE, n_routed_experts=4),
    "jamba": dict(
        mamba_d_state=8,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        use_mamba_kernels=False,
    ),
    "kimi_linear": dict(
        **EXPERTS,
        num_shared_experts=1,
        num_key_value_heads=4,
        linear_num_heads=4,
        linear_head_dim=8,
        first_k_dense_replace=1,
        layer_types=LAYER_TYPES,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "kolibri1": EXPERTS,
    "laguna": EXPERTS,
    "lara_mini": dict(
        LINEAR,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        sliding_window=8,
        layer_types=["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
    ),
    "lfm2_moe": dict(**EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "longcat_flash": dict(
        **MLA,
        num_layers=2,
        ffn_hidden_size=48,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        expert_ffn_hidden_size=16,
    ),
    "mellum": EXPERTS,
    "mimo_v2_flash": ROUTED,
    "minicpm3": MLA,
    "minimax": dict(
        num_local_experts=4, layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"]
    ),
    "minimax_m2": dict(num_local_experts=4, num_experts_per_tok=2),
    "minimax_m3_vl_text": dict(num_local_experts=4, num_experts_per_tok=2),
    "mistral": dict(sliding_window=8),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=False),
    "nemotron_h": dict(
        **MOE,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=8,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=16,
        use_mamba_kernels=False,
    ),
    "qwen2_moe": dict(**EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": dict(tie_word_embeddings=True),
    "qwen3_5_moe_text": dict(**LINEAR, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": dict(**LINEAR, **EXPERTS, shared_expert_intermediate_size=16),
    "sarvam_mla": dict(**GROUPED, **MLA),
    "sarvam_moe": GROUPED,
    "solar_open": GROUPED,
    "youtu": MLA,
    "zaya": dict(num_experts=4, moe_intermediate_size=16, router_hidden_size=16),
}

# These are tested in depth, one of a kind each; `test_architectures.py` has something to say on every architecture.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3", "kimi_linear")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}
    common = {name: value for name, value in COMMON.items() if name in known}
    return config_class(**{**common, **OVERRIDES.get(family, {}), **overrides})


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

"""The smallest configurations that still have every part of their family's decoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.backbones import SUPPORTED
from attnres.depth_attention import DepthAttention

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

# What the plain configurations leave off. Every family that has any of these switches gets a variation that turns them
# all over, ...
SWITCHES = frozenset(
    """
        attention_bias attention_k_eq_v attention_out_bias attn_temperature_tuning block_auto_adjust_ff_dim conv_bias
        decoder_bias gating kda_safe_gate linear_allow_neg_eigval lm_head_bias mamba_conv_bias mamba_norm_before_gate
        mamba_proj_bias mamba_rms_norm mlp_bias multi_query mup_enabled norm_bias norm_topk_prob projectors_bias
        qk_layernorm qkv_bias reorder_and_upcast_attn rope_interleave scale_attn_weights scale_attn_by_inverse_layer_idx
        scale_embedding shared_expert_sink tie_word_embeddings use_attention_gate use_bias use_conv_bias
        use_double_wide_mlp use_expert_bias use_post_norm use_qk_norm use_qkv_bias use_sandwich_norm
    """.split()
)
# ... and all of its multipliers, soft caps and limits set to something that can be told from what they are by default.
SCALES: dict[str, Any] = dict(
    attention_in_multiplier=0.5,
    attention_multiplier=0.5,
    attention_out_multiplier=2.0,
    attention_value_scale=0.5,
    attn_logit_softcapping=2.0,
    clip_qkv=0.5,
    dim_model_base=16,
    embedding_multiplier=3.0,
    final_logit_softcapping=1.5,
    full_attn_alpha_factor=0.5,
    full_attn_beta_factor=2.0,
    key_multiplier=0.5,
    kda_lower_bound=-2.0,
    lambda_std_dev=0.3,
    linear_attn_alpha_factor=2.0,
    linear_attn_beta_factor=0.5,
    lm_head_multiplier=0.5,
    log_scaling_n_floor=4,
    logit_scale=0.5,
    logits_mup_width_multiplier=3.0,
    logits_scaling=2.0,
    mlp_alpha_factor=0.5,
    mlp_beta_factor=2.0,
    mlp_multipliers=[2.0, 0.5],
    moe_routed_scaling_factor=1.7,
    moe_router_logit_softcapping=2.0,
    query_pre_attn_scalar=4,
    residual_multiplier=0.6,
    route_scale=1.7,
    routed_scaling_factor=1.7,
    router_scaling_factor=1.7,
    scale_depth=0.7,
    scale_emb=3,
    ssm_in_multiplier=0.5,
    ssm_multipliers=[0.5, 2.0, 0.7, 1.5, 0.9],
    ssm_out_multiplier=2.0,
    swiglu_alpha=1.2,
    swiglu_limit=0.5,
)
# Three layers instead of four, with kinds of attention in orders that the plain configurations do not have, ...
ORDERS = {
    "full_attention sliding_attention sliding_attention": """
        afmoe beam cohere2 cohere2_moe cohere_compass_text dots1 exaone4 exaone_moe flint gemma2 gemma3_text gpt_oss
        kolibri1 laguna mellum ministral olmo3 qwen2 qwen2_moe qwen3 smollm3 vaultgemma
    """,
    "sliding_attention sliding_attention full_attention": """
        cwm gemma4_text gemma4_unified_text granite_swa granitemoe_swa mimo_v2_flash modernbert-decoder
    """,
    "full_attention linear_attention linear_attention": """
        bailing_hybrid granitemoehybrid kimi_linear minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text
        qwen3_next
    """,
    "full_attention conv conv": "lfm2 lfm2_moe",
    "sliding_attention full_attention conv": "lfm3",
    "full_attention linear_attention sliding_attention": "lara_mini",
    "full_attention chunked_attention chunked_attention": "llama4_text",
    "sliding_attention indexed_attention sliding_attention": "dots3_note_text",
    "hybrid hybrid_sliding hybrid_sliding": "inkling_text zaya",
    "minimax_m3_sparse full_attention minimax_m3_sparse": "minimax_m3_vl_text",
}
ORDER_OF_LAYERS = {family: order.split() for order, families in ORDERS.items() for family in families.split()}
# ... and with windows and chunks that are shorter than the text, and dense layers at other places.
REORDERED: dict[str, Any] = dict(
    num_hidden_layers=3,
    attention_chunk_size=5,
    attn_layer_indices=[0, 2],
    attn_layer_offset=0,
    expert_layer_offset=0,
    first_k_dense_replace=2,
    index_topk=4,
    local_attention=10,
    mlp_layer_types=["sparse", "dense", "sparse"],
    mlp_only_layers=[1],
    moe_layer_start_index=2,
    num_dense_layers=2,
    num_layers=3,
    sliding_window=5,
    sliding_window_size=5,
    use_sliding_window=True,
)
# And one layer, which is the first and the last.
SINGLE: dict[str, Any] = dict(
    num_hidden_layers=1,
    attn_layer_indices=[0],
    attn_layer_offset=0,
    first_k_dense_replace=0,
    mlp_layer_types=["sparse"],
    mlp_only_layers=[],
    moe_layer_start_index=0,
    moe_layer_end_index=0,
    num_dense_layers=0,
    num_layers=1,
)

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {**YARN, "rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.5] * 4}

SHARING = ["full_attention", "sliding_attention", "full_attention", "full_attention"]

# What only some have, or what one of them needs in addition.
OWN_VARIATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "apertus1p5_text": {"pruned_head": dict(vocab_size=128, output_vocab_size=VOCAB_SIZE)},
    "aria_text": {"experts": dict(moe_num_experts=3, moe_topk=1, moe_num_shared_experts=1)},
    "axk1": {"one_group": dict(n_group=1, rope_parameters=YARN)},
    "bailing_hybrid": {
        "kernel": dict(short_conv_kernel_size=2, mlp_layer_types=["sparse", "sparse", "dense", "dense"])
    },
    "bamba": {"short_chunks": dict(mamba_chunk_size=4, mamba_n_groups=2, mamba_d_conv=2)},
    "beam": {"dense": dict(mlp_layer_types=["dense"] * 4, layer_types=["full_attention"] * 4)},
    "cohere2_moe": {
        "shared_experts": dict(
            num_shared_experts=1,
            shared_expert_combination_strategy="sum",
            expert_selection_fn="sigmoid",
            mlp_layer_types=["sparse", "dense", "sparse", "dense"],
            prefix_dense_intermediate_size=24,
        )
    },
    "ctrl": {"narrow": dict(dff=24)},
    "deepseek_v2": {"grouped": dict(topk_method="group_limited_greedy", q_lora_rank=None, rope_parameters=YARN)},
    "deepseek_v3": {"dense_queries": dict(q_lora_rank=None, rope_parameters={**YARN, "mscale_all_dim": 1.0})},
    "doge": {
        "experts": dict(is_moe=True, num_experts=16, num_experts_per_tok=2),
        "kept_window": dict(keep_window_size=4),
    },
    "ernie4_5_moe": {"every_second": dict(moe_layer_interval=2, moe_num_shared_experts=0)},
    "exaone": {"llama3": dict(rope_parameters=LLAMA3, num_key_value_heads=1)},
    "falcon_h1": {"short_chunks": dict(mamba_chunk_size=4, mamba_n_groups=2, mamba_d_conv=2)},
    "flex_olmo": {"few_experts": dict(num_experts=3, num_experts_per_tok=1)},
    "gemma4_text": {
        "shared_layers": dict(num_kv_shared_layers=2),
        "shared_layer": dict(num_kv_shared_layers=1, layer_types=SHARING),
        "no_per_layer_input": dict(hidden_size_per_layer_input=0),
        "no_experts": dict(enable_moe_block=False),
    },
    "gemma4_unified_text": {
        "shared_layer": dict(num_kv_shared_layers=1, layer_types=SHARING),
        "shared_layers": dict(num_kv_shared_layers=2, use_double_wide_mlp=True),
    },
    "glm_moe_dsa": {"shared_indexer": dict(indexer_types=["full", "shared", "full", "shared"])},
    "gpt2": {"narrow": dict(n_inner=24, activation_function="relu")},
    "gpt_bigcode": {"narrow": dict(n_inner=24, activation_function="relu")},
    "gpt_neox": {"sequential": dict(use_parallel_residual=False)},
    "granite_swa": {"uneven_rope": dict(layer_rope_theta=[1e4, 5e3, 0, 1e3])},
    "granitemoe_swa": {"shared_experts": dict(shared_intermediate_size=24, layer_rope_theta=[1e4, 5e3, 0, 1e3])},
    "granitemoehybrid": {
        "no_experts": dict(num_local_experts=0, num_experts_per_tok=0, position_embedding_type="rope"),
        "short_chunks": dict(mamba_chunk_size=4, mamba_n_groups=2, mamba_d_conv=2),
    },
    "granitemoeshared": {"shared_experts": dict(shared_intermediate_size=24)},
    "hunyuan_v1_moe": {"experts": dict(num_experts=4, moe_topk=2)},
    "jamba": {"no_experts": dict(num_experts=1, attn_layer_period=3)},
    "jetmoe": {"few_experts": dict(num_local_experts=3, num_experts_per_tok=1)},
    "kimi_linear": {"grouped": dict(n_group=2, linear_conv_kernel_dim=2)},
    "laguna": {"uneven_heads": dict(num_attention_heads_per_layer=[2, 4, 8, 4])},
    "llama": {"yarn": dict(rope_parameters=YARN, num_key_value_heads=1), "llama3": dict(rope_parameters=LLAMA3)},
    "llama4_text": {"every_second": dict(interleave_moe_layer_step=2, no_rope_layers=[0, 1, 1, 0], floor_scale=4)},
    "longcat_flash": {"no_zero_experts": dict(zero_expert_num=0)},
    "mimo_v2_flash": {"grouped": dict(n_group=2, topk_group=1, v_head_dim=12)},
    "minimax": {"short_blocks": dict(block_size=4)},
    "minimax_m3_vl_text": {
        "sparse_attention": dict(
            layer_types=["minimax_m3_sparse"] * 4, index_block_size=2, index_topk_blocks=2, rotary_dim=4
        )
    },
    "mixtral": {"one_expert": dict(num_local_experts=1, num_experts_per_tok=1)},
    "nemotron_h": {
        "experts_first": dict(
            layers_block_type=["moe", "mlp", "full_attention", "linear_attention", "moe"],
            moe_latent_size=8,
            n_groups=2,
            chunk_size=4,
        )
    },
    # It wants a layer of each kind.
    "olmo_hybrid": {"single": dict(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])},
    "olmoe": {"few_experts": dict(num_experts=3, num_experts_per_tok=1)},
    "phi3": {"longrope": dict(rope_parameters=LONGROPE, original_max_position_embeddings=32, sliding_window=5)},
    "phimoe": {
        "longrope": dict(num_local_experts=3, rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2})
    },
    "qwen2": {"dynamic": dict(rope_parameters={**YARN, "rope_type": "dynamic"}, num_key_value_heads=4)},
    "qwen2_moe": {"every_second": dict(decoder_sparse_step=2)},
    "qwen3": {"yarn": dict(rope_parameters=YARN, head_dim=16)},
    "qwen3_5_moe_text": {"even_heads": dict(linear_num_key_heads=4, linear_conv_kernel_dim=2)},
    "qwen3_5_text": {"even_heads": dict(linear_num_key_heads=4, linear_conv_kernel_dim=2)},
    "qwen3_moe": {"every_second": dict(decoder_sparse_step=2, num_key_value_heads=1)},
    "qwen3_next": {"every_second": dict(decoder_sparse_step=2, linear_num_key_heads=4, linear_conv_kernel_dim=2)},
    "sarvam_mla": {"grouped_yarn": dict(q_lora_rank=None, rope_parameters=YARN, first_k_dense_replace=0)},
    "sarvam_moe": {"partial_rotary": dict(partial_rotary_factor=0.5, use_qk_norm=False)},
    "smollm3": {"rope_at_ends": dict(no_rope_layers=[1, 0, 0, 1])},
    "stablelm": {"parallel": dict(use_parallel_residual=True, use_qkv_bias=True)},
    "xglm": {"narrow": dict(ffn_dim=24)},
}


def variations(family: str) -> dict[str, dict[str, Any]]:
    """Overrides of [`tiny_config`] by the name of the variation."""
    config_class = CONFIG_MAPPING[family]
    plain = dict.fromkeys(config_class.attribute_map)
    plain |= {name: field.default for name, field in config_class.__dataclass_fields__.items()}
    plain |= {name: value for name, value in OVERRIDES.get(family, {}).items() if name in plain}
    switched = {name: not plain[name] for name in sorted(SWITCHES & plain.keys())}
    common = {
        "switched": switched | {name: value for name, value in SCALES.items() if name in plain},
        "reordered": {name: value for name, value in REORDERED.items() if name in plain},
        "single": {name: value for name, value in SINGLE.items() if name in plain},
    }
    if family in ORDER_OF_LAYERS:
        order = ORDER_OF_LAYERS[family]
        common["reordered"]["layer_types"] = order
        common["single"]["layer_types"] = ["full_attention"] if "full_attention" in order else order[:1]
    return common | OWN_VARIATIONS.get(family, {})


VARIATIONS = {family: variations(family) for family in SUPPORTED if family in CONFIG_MAPPING}

# These are tested in depth, one of a kind each; `test_architectures.py` has something to say on every architecture.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3", "kimi_linear")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}
    common = {name: value for name, value in COMMON.items() if name in known}
    # Some classes change the lists that they are given.
    return config_class(**copy.deepcopy({**common, **OVERRIDES.get(family, {}), **overrides}))


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
    model = AttnResForCausalLM(AttnResConfig(backbone_config=backbone.config, **kwargs)).to(backbone.dtype).eval()
    missing, unexpected = model.load_state_dict(backbone.state_dict(), strict=False)
    assert not unexpected
    assert all("depth_attention" in name for name in missing)
    if random_queries:
        randomize(model)
    return model


def depth_attention(model: Any) -> DepthAttention:
    """The depth parameters of a model, with a head or without."""
    return next(module for module in model.modules() if isinstance(module, DepthAttention))


@torch.no_grad()
def randomize(model: Any, seed: int = 1) -> None:
    """Gives every read a query and a key norm of its own, large enough that depth weights are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    depth = depth_attention(model)
    depth.query.copy_(torch.randn(depth.query.shape, generator=generator) * 0.3)
    depth.key_norm.copy_(1 + 0.3 * torch.randn(depth.key_norm.shape, generator=generator))

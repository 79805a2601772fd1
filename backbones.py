# Copyright 2026 The attnres authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The decoders of Transformers: which can be backbones, what has to be known of each, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Backbone(NamedTuple):
    """How the decoder layers of an architecture use their residual stream.

    What they do in between (norms before or after, experts, multipliers, which mixer) is the business of their own
    forward, which is run as it is.

    Attributes:
        sublayers (`int`, or a function of the configuration):
            How often the layers read from the stream and write to it, per `num_hidden_layers`: twice as a rule, once
            where attention and MLP stand in parallel.
        layers (`str`): where the base model holds its decoder layers.
        base_model (`str`, *optional*):
            Where a model with a head holds its base model, if that is not its `base_model_prefix`.
        slices_positions (`str`, *optional*):
            The method of the base model that cuts the positions of a prefill that its last layers need not compute. It
            takes what it cuts, and how many positions to keep. It is replaced by one that keeps all of them, because
            a state of depth is no tensor.
        replaces_stream (`bool`):
            Whether a decoder layer returns something that is not its input plus something; the difference is then
            what it writes.
    """

    sublayers: int | Callable[[Any], int] = 2
    layers: str = "layers"
    base_model: str | None = None
    slices_positions: str | None = None
    replaces_stream: bool = False

    def sublayers_per_layer(self, config: Any) -> int:
        return self.sublayers(config) if callable(self.sublayers) else self.sublayers


def _one_if_parallel(config: Any) -> int:
    return 1 if config.use_parallel_residual else 2


def _three_if_per_layer_input(config: Any) -> int:
    return 3 if config.hidden_size_per_layer_input else 2


# An architecture is listed only when tests have seen it come out right: an equal number of reads is no proof.
SUPPORTED: dict[str, Backbone] = {
    **dict.fromkeys(
        """
            afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet cwm
            deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone
            exaone4 exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite
            glm_moe_dsa gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
            hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe
            kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama longcat_flash mellum mimo_v2_flash minicpm3
            minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo
            olmo2 olmo3 olmo_hybrid olmoe persimmon phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
            qwen3_moe qwen3_next sarvam_mla sarvam_moe seed_oss smollm3 solar_open starcoder2 vaultgemma xglm youtu
        """.split(),
        Backbone(),
    ),
    # Attention and MLP in parallel, or one mixer a layer.
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "nemotron_h", "phi"), Backbone(1)),
    **dict.fromkeys(("gpt_neox", "stablelm"), Backbone(_one_if_parallel)),
    **dict.fromkeys(("ctrl", "gpt2", "gpt_bigcode"), Backbone(layers="h")),
    # The per-layer embedding, if there is one, is a third sublayer.
    "gemma4_text": Backbone(_three_if_per_layer_input, slices_positions="_maybe_slice_kv_shared_inputs"),
    "gemma4_unified_text": Backbone(slices_positions="_maybe_slice_kv_shared_inputs"),
    "llama4_text": Backbone(base_model="model"),
    # Attention and MLP see a scaled or normalised residual of their own, so the decoder layer is the unit of depth.
    **dict.fromkeys(("minimax", "zaya"), Backbone(1, replaces_stream=True)),
}

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        """
            bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text
            electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet reformer rembert roberta
            roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod
        """.split(),
        "it is an encoder, or the decoder of an encoder-decoder",
    ),
    **dict.fromkeys(
        """
            blt dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git
            got_ocr2 llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5
            qwen3_5_moe qwen4_exp
        """.split(),
        "it is a composite of several models; if its language model is a decoder, save that by itself",
    ),
    **dict.fromkeys(
        ("deepseek_v4", "gemma3n_text", "hy_v4", "qwen4_exp_text"),
        "its layers mix several residual streams instead of adding to one",
    ),
    **dict.fromkeys(
        ("bloom", "cpmant", "dbrx"),
        "its attention adds to the residual stream itself, out of sight of the decoder layer",
    ),
    **dict.fromkeys(
        """
            codegen falcon falcon_mamba gpt_neo gpt_neox_japanese gptj mamba mamba2 mpt openai-gpt rwkv xlstm
        """.split(),
        "its forward hands no keyword arguments on to its decoder layers, and the pseudo-queries travel as one",
    ),
    **dict.fromkeys(
        ("dory", "hrm_text", "zamba", "zamba2"), "its decoder layers are run, or share weights, at several depths"
    ),
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text"), "it has attention residuals of its own"),
    "opt": "its decoder layers reshape the residual stream",
    "recurrent_gemma": "it keeps the state of its recurrent layers in its modules instead of a cache",
}

# The norms that are RMSNorm and nothing else: `weight * x / sqrt(mean(x^2) + variance_epsilon)`. The others add one to
# their weight (Gemma), subtract a mean (Cohere), or gate.
RMS_NORMS: frozenset[str] = frozenset(
    """
        AXK1RMSNorm AXK2RMSNorm AfmoeRMSNorm Apertus1p5TextRMSNorm ApertusRMSNorm ArceeRMSNorm AriaTextRMSNorm
        BailingHybridRMSNorm BambaRMSNorm BeamRMSNorm BitNetRMSNorm CwmRMSNorm DeepseekV2RMSNorm DeepseekV32RMSNorm
        DeepseekV3RMSNorm DiffLlamaRMSNorm DogeRMSNorm Dots1RMSNorm Dots3NoteRMSNorm Ernie4_5RMSNorm
        Ernie4_5_MoeRMSNorm Exaone4RMSNorm ExaoneMoeRMSNorm FalconH1RMSNorm FlexOlmoRMSNorm FlintRMSNorm
        Glm4MoeLiteRMSNorm Glm4MoeRMSNorm Glm4RMSNorm GlmMoeDsaRMSNorm GlmRMSNorm GptOssRMSNorm
        GraniteMoeHybridRMSNorm GraniteMoeRMSNorm GraniteMoeSWARMSNorm GraniteMoeSharedRMSNorm GraniteRMSNorm
        GraniteSWARMSNorm HYV3RMSNorm HeliumRMSNorm HunYuanDenseV1RMSNorm HunYuanMoEV1RMSNorm HyperCLOVAXRMSNorm
        InklingRMSNorm JambaRMSNorm JetMoeRMSNorm KimiLinearRMSNorm Kolibri1RMSNorm LagunaRMSNorm LaraMiniRMSNorm
        Lfm2MoeRMSNorm Lfm2RMSNorm Lfm3RMSNorm LlamaRMSNorm LongcatFlashRMSNorm MellumRMSNorm MiMoV2FlashRMSNorm
        MiniCPM3RMSNorm MiniMaxM2RMSNorm MiniMaxRMSNorm Ministral3RMSNorm MinistralRMSNorm MistralRMSNorm
        MixtralRMSNorm NemotronHRMSNorm Olmo2RMSNorm Olmo3RMSNorm OlmoHybridRMSNorm OlmoeRMSNorm Phi3RMSNorm
        Qwen2MoeRMSNorm Qwen2RMSNorm Qwen3MoeRMSNorm Qwen3RMSNorm SeedOssRMSNorm SmolLM3RMSNorm SolarOpenRMSNorm
        YoutuRMSNorm ZayaRMSNorm
    """.split()
)

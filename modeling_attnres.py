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
"""Attention Residuals (AttnRes, arXiv 2603.15031) over any decoder of Transformers.

The decoder, the *backbone*, is the library's own model, built by its Auto class and run by its own forward: attention,
experts, masks, caches, head, losses and parallel plans stay what they are. Only its decoder layers are re-wired, so
that each sublayer reads its input from depth and writes its output to depth, where it used to add to one stream.

    embedding -> [read -> norm -> mixer -> write, read -> norm -> MLP -> write] x L_b -> read -> final norm -> head
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_attnres import IS_INSTALLED, AttnResConfig, AttnResError
from .depth_attention import DepthAttention, DepthSettings, DepthState, depth_weights, read


class UnsupportedBackboneError(AttnResError):
    """The backbone's decoder layers are not known to split into sublayers correctly."""


class Sublayer(NamedTuple):
    """One sublayer of a decoder layer, by the names of the layer's children."""

    norm: str
    module: str
    post_norm: str | None = None


PRE_NORM = (
    Sublayer("input_layernorm", "self_attn"),
    Sublayer("post_attention_layernorm", "mlp"),
)
SANDWICH_NORM = (
    Sublayer("input_layernorm", "self_attn", "post_attention_layernorm"),
    Sublayer("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)

# The structure of each family's decoder layer. A family is listed only when its layer does exactly what the structure
# says; equal children are no proof (some layers scale their residuals, or share them).
DECODER_LAYERS: dict[str, tuple[Sublayer, ...]] = {
    "deepseek_v3": PRE_NORM,
    "gemma2": SANDWICH_NORM,
    "kimi_linear": PRE_NORM,
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "mixtral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "qwen3_moe": PRE_NORM,
}


def check_supported(model_type: str) -> None:
    """Raises [`UnsupportedBackboneError`] unless decoders of this `model_type` can be re-wired."""
    if model_type not in DECODER_LAYERS:
        raise UnsupportedBackboneError(
            f"backbone model_type {model_type!r} is not supported: the structure of its decoder layers is not known "
            f"to split into sublayers. Supported: {', '.join(sorted(DECODER_LAYERS))}."
        )


@dataclass
class DepthRecorder:
    """What one forward was asked to return; made for that forward, dropped after it.

    Not a list or tuple, because those are rebuilt when the arguments of a layer are moved between devices.
    """

    hidden_states: list[torch.Tensor] = field(default_factory=list)
    depth_attentions: list[torch.Tensor] | None = None


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the backbone, re-wired: its children, under their own names, between reads and writes.

    The backbone's loop hands one value from layer to layer. Into the first layer that is the embedding
    `[batch, sequence, hidden]`, out of the last the output read, of the same shape; between layers it is a flattened
    [`DepthState`]. So recomputation, offloading and pipelines see plain tensors and nothing else.

    Instances are made by [`rewire`] from the layers of a backbone, never constructed.
    """

    depth_settings: DepthSettings
    num_sublayers: int
    sublayers: tuple[Sublayer, ...]
    first_sublayer: int
    cache_argument: str

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        # Tensors that need gradients travel as positional arguments, which re-entrant checkpointing asks for.
        state = (hidden_states,) if isinstance(hidden_states, torch.Tensor) else tuple(hidden_states)
        depth_query = kwargs.pop("depth_query", None)
        if args or depth_query is None:
            raise AttnResError(
                f"{type(self).__name__} {self.first_sublayer // len(self.sublayers)} was called outside of an "
                "AttnResModel or AttnResForCausalLM; call the model, or its `backbone` through it."
            )
        return super().__call__(*state, depth_query, **kwargs)

    def forward(
        self, *state_and_query: torch.Tensor, depth_recorder: DepthRecorder | None = None, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        *tensors, depth_query = state_and_query
        block_size = self.depth_settings.block_size
        num_written = self.first_sublayer
        state = DepthState.unflatten(tuple(tensors), num_written, block_size)

        for sublayer in self.sublayers:
            hidden_states, state = self.read(depth_query, state, num_written, depth_recorder)
            if depth_recorder is not None and num_written == self.first_sublayer:
                depth_recorder.hidden_states.append(hidden_states)
            output = self.apply_sublayer(sublayer, hidden_states, kwargs)
            num_written += 1
            state = state.write(output, closes_block=num_written % block_size == 0)

        if num_written == self.num_sublayers:
            return self.read(depth_query, state, num_written, depth_recorder)[0]
        return state.flatten()

    def read(
        self, depth_query: torch.Tensor, state: DepthState, num_written: int, depth_recorder: DepthRecorder | None
    ) -> tuple[torch.Tensor, DepthState]:
        if depth_recorder is not None and depth_recorder.depth_attentions is not None:
            depth_recorder.depth_attentions.append(
                depth_weights(
                    depth_query[num_written], state.sources, state.partial_sum, self.depth_settings.key_norm_eps
                )
            )
        return read(depth_query, state, num_written, self.depth_settings)

    def apply_sublayer(self, sublayer: Sublayer, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        hidden_states = getattr(self, sublayer.norm)(hidden_states)
        module = getattr(self, sublayer.module)
        if sublayer is self.sublayers[0]:
            if self.cache_argument != "past_key_values":
                kwargs = {self.cache_argument if k == "past_key_values" else k: v for k, v in kwargs.items()}
            output = module(hidden_states=hidden_states, **kwargs)
        else:
            output = module(hidden_states)
        hidden_states = output[0] if isinstance(output, tuple) else output
        return getattr(self, sublayer.post_norm)(hidden_states) if sublayer.post_norm else hidden_states

    def extra_repr(self) -> str:
        return f"(reads): {self.first_sublayer}-{self.first_sublayer + len(self.sublayers) - 1}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_decoder_layer, (type(self).__bases__[1],), self.__dict__


@cache
def _decoder_layer_class(layer_class: type[nn.Module]) -> type[AttnResDecoderLayer]:
    """The re-wired subclass of a backbone's decoder layer class. Being a subclass, it is still what the backbone looks
    for by type when it records outputs or initialises weights."""
    return type(f"AttnRes{layer_class.__name__}", (AttnResDecoderLayer, layer_class), {"__module__": __name__})


def _new_decoder_layer(layer_class: type[nn.Module]) -> AttnResDecoderLayer:
    return object.__new__(_decoder_layer_class(layer_class))  # type: ignore[arg-type]


def rewire(backbone: PreTrainedModel, config: AttnResConfig) -> None:
    """Turns the decoder layers of `backbone` into [`AttnResDecoderLayer`]s, in place; no parameter is touched.

    Raises:
        UnsupportedBackboneError: the family, or the structure found in a layer, is not known.
    """
    check_supported(config.backbone_config.model_type)
    sublayers = DECODER_LAYERS[config.backbone_config.model_type]
    expected = {name for sublayer in sublayers for name in sublayer if name is not None}
    renamed: dict[str, str] = {}
    layers: Any = backbone.base_model.layers
    for index, layer in enumerate(layers):
        if (found := {name for name, _ in layer.named_children()}) != expected:
            raise UnsupportedBackboneError(
                f"decoder layer {index} of backbone {type(backbone).__name__} is a {type(layer).__name__} with the "
                f"children {sorted(found)}; {sorted(expected)} were expected, so it cannot be split into sublayers."
            )
        mixer = inspect.signature(getattr(layer, sublayers[0].module).forward).parameters
        renamed[type(layer).__name__] = f"AttnRes{type(layer).__name__}"
        layer.__class__ = _decoder_layer_class(type(layer))  # type: ignore[arg-type]
        layer.depth_settings = DepthSettings.of(config)
        layer.num_sublayers = config.num_sublayers
        layer.sublayers = sublayers
        layer.first_sublayer = index * len(sublayers)
        layer.cache_argument = "cache_params" if "cache_params" in mixer else "past_key_values"
    for module in backbone.modules():  # device maps and FSDP find layers by the name of their class
        if isinstance(module, PreTrainedModel):
            module._no_split_modules = {renamed.get(name, name) for name in module._no_split_modules or ()}


class AttnResPreTrainedModel(PreTrainedModel):
    """Weight initialisation, attention dispatch and embeddings: all of it the backbone's."""

    config: AttnResConfig
    config_class = AttnResConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # The backbone checks for itself what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    backbone: Any  # a `PreTrainedModel`, with what its architecture adds
    depth_attention: DepthAttention

    def __init__(self, config: AttnResConfig, auto_class: Any):
        # By name: the copies of the class that come with checkpoints are other classes.
        if getattr(config, "model_type", None) != AttnResConfig.model_type:
            raise AttnResError(
                f"{type(self).__name__} needs an AttnResConfig, not a {type(config).__name__}; make one with "
                "AttnResConfig(backbone_config=...)."
            )
        config.validate_depth_attention()
        super().__init__(config)
        check_supported(config.backbone_config.model_type)
        self.backbone = auto_class.from_config(config.backbone_config)
        rewire(self.backbone, config)
        self.depth_attention = DepthAttention(config)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for experts in the source of this module; they are the backbone's

    @property
    def _can_compile_fullgraph(self) -> bool:  # type: ignore[override]
        return self.backbone._can_compile_fullgraph

    @property
    def _is_stateful(self) -> bool:  # type: ignore[override]
        return self.backbone._is_stateful

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DepthAttention):
            init.zeros_(module.query)
            init.ones_(module.key_norm)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def run_backbone(
        self,
        output_depth_attentions: bool | None,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Runs the backbone's own forward with the queries of this model, and adds what only depth attention knows:
        `hidden_states` (entry i is what decoder layer i reads) and `depth_attentions` (one entry per read)."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        recorder = None
        if output_hidden_states not in (None, False) or output_depth_attentions:
            recorder = DepthRecorder(depth_attentions=[] if output_depth_attentions else None)
        outputs = self.backbone(
            depth_query=self.depth_attention(),
            depth_recorder=recorder,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        if recorder is not None and (recorded := outputs.get("hidden_states")) is not None:
            # The backbone selected which entries to return, and put the normed output last.
            inputs = recorder.hidden_states[: len(recorded) - 1]
            selected = (new if old is not None else None for new, old in zip(inputs, recorded))
            outputs["hidden_states"] = (*selected, recorded[-1])
        if recorder is not None and recorder.depth_attentions is not None:
            outputs["depth_attentions"] = tuple(recorder.depth_attentions[: self.config.num_reads])
        return outputs


class AttnResModel(AttnResPreTrainedModel):
    """
    A decoder of Transformers without its head, with attention over depth for residuals.

    On disk it uses the names of [`AttnResForCausalLM`], so either class loads the other's checkpoints.

    Args:
        config ([`AttnResConfig`]): the configuration; the backbone is built by `AutoModel` from its `backbone_config`.

    Raises:
        UnsupportedBackboneError: the backbone's decoder layers are not known to split into sublayers.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: AttnResConfig):
        super().__init__(config, AutoModel)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_depth_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Arguments are those of the backbone's forward, and:

        Args:
            output_depth_attentions (`bool`, *optional*):
                Return `depth_attentions`: for each of the R reads the weights `[batch, sequence, sources]`, float32,
                the open block's partial sum last.

        Returns:
            `ModelOutput`: the backbone's own output class, with `depth_attentions` if asked for.
        """
        return self.run_backbone(
            output_depth_attentions,
            output_hidden_states,
            output_attentions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class AttnResForCausalLM(AttnResPreTrainedModel, GenerationMixin):
    """
    A causal language model of Transformers with attention over depth for residuals.

    Args:
        config ([`AttnResConfig`]):
            The configuration; the backbone is built by `AutoModelForCausalLM` from its `backbone_config`.

    Raises:
        UnsupportedBackboneError: the backbone's decoder layers are not known to split into sublayers.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/converted", trust_remote_code=True)
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/converted")
    >>> outputs = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=40)
    ```
    """

    def __init__(self, config: AttnResConfig):
        super().__init__(config, AutoModelForCausalLM)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_depth_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Arguments are those of the backbone's forward, and:

        Args:
            output_depth_attentions (`bool`, *optional*):
                Return `depth_attentions`: for each of the R reads the weights `[batch, sequence, sources]`, float32,
                the open block's partial sum last.

        Returns:
            `ModelOutput`: the backbone's own output class, with `depth_attentions` if asked for.
        """
        return self.run_backbone(
            output_depth_attentions,
            output_hidden_states,
            output_attentions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


# On disk the backbone's tensors bear the backbone's own names.
register_checkpoint_conversion_mapping(
    "AttnResForCausalLM",
    [WeightRenaming(r"^(?!backbone\.|depth_attention\.)(.+)", r"backbone\.\1")],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "AttnResModel",
    [WeightRenaming(r"^model\.(.+)", r"backbone\.\1")],
    overwrite=True,
)

AttnResModel.register_for_auto_class("AutoModel")
AttnResForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if IS_INSTALLED:
    AutoModel.register(AttnResConfig, AttnResModel, exist_ok=True)
    AutoModelForCausalLM.register(AttnResConfig, AttnResForCausalLM, exist_ok=True)

__all__ = ["AttnResForCausalLM", "AttnResModel", "AttnResPreTrainedModel", "UnsupportedBackboneError"]

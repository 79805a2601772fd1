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
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbones import Backbone
from .configuration_attnres import (
    IS_INSTALLED,
    AttnResConfig,
    AttnResError,
    UnsupportedBackboneError,
    supported_backbone,
)
from .depth_attention import DepthAttention, DepthSettings, DepthState, Norm, depth_weights, read


class DepthRecorder:
    """What one forward was asked to return; made for that forward, dropped after it.

    Neither a list, nor a tuple, nor a dataclass, because those are rebuilt where the arguments of a layer are moved
    between devices or cast.

    Attributes:
        hidden_states (`dict[int, torch.Tensor]`): what each decoder layer reads, by its first read.
        depth_attentions (`dict[int, torch.Tensor]`, *optional*): the weights of each read.
    """

    def __init__(self, records_depth_attentions: bool):
        self.hidden_states: dict[int, torch.Tensor] = {}
        self.depth_attentions: dict[int, torch.Tensor] | None = {} if records_depth_attentions else None


class ResidualStream:
    """What the forward of a decoder layer gets for its `hidden_states`, and cannot tell from the sum it is used to.

    Handed to a child of the layer (a norm, as a rule) it is *read* from depth; adding to it, as in `residual +
    hidden_states`, *writes* to depth. What is added without a read in between is one write, so a layer whose attention
    and MLP stand in parallel reads once and writes once. Whatever else is asked of it is asked of what was read.

    Streams are immutable but for remembering what was read: adding returns a new one. They live inside one call of one
    decoder layer.
    """

    __slots__ = ("depth_query", "fuses", "num_written", "output", "recorder", "settings", "state", "value")

    def __init__(
        self,
        settings: DepthSettings,
        fuses: bool,
        depth_query: torch.Tensor,
        recorder: DepthRecorder | None,
        state: DepthState,
        num_written: int,
        output: torch.Tensor | None = None,
    ):
        self.settings, self.fuses, self.depth_query, self.recorder = settings, fuses, depth_query, recorder
        self.state, self.num_written = state, num_written
        self.output = output  # what was added, not yet written
        self.value: torch.Tensor | None = None

    def settle(self) -> DepthState:
        """Writes what was added, if anything was."""
        if self.output is not None:
            self.num_written += 1
            closes_block = self.num_written % self.settings.block_size == 0
            self.state = self.state.write(self.output, closes_block, at_once=not self.fuses)
            self.output = None
        return self.state

    def read(self) -> torch.Tensor:
        """The read at this point of depth, `[batch, sequence, hidden]`; the same tensor each time."""
        if self.value is None:
            self.value = self.read_normed(None)
        return self.value

    def read_normed(self, norm: Norm | None) -> torch.Tensor:
        """The read, and the norm behind it if there is one, at once."""
        state, settings, recorder = self.settle(), self.settings, self.recorder
        if recorder is not None and recorder.depth_attentions is not None:
            query, state = self.depth_query[self.num_written], state.added()
            weights = depth_weights(query, state.sources, state.partial_sum, settings.key_norm_eps)
            recorder.depth_attentions[self.num_written] = weights  # again, where a layer is recomputed
        hidden_states, self.state = read(self.depth_query, state, self.num_written, settings, norm)
        return hidden_states

    def follow(self, state: DepthState, output: torch.Tensor | None = None) -> ResidualStream:
        return ResidualStream(
            self.settings, self.fuses, self.depth_query, self.recorder, state, self.num_written, output
        )

    def add(self, output: torch.Tensor) -> ResidualStream:
        return self.follow(self.state, output if self.output is None else self.output + output)

    def mul(self, factor: Any) -> ResidualStream:
        """A scaled stream is one whose sources are scaled, all that was written so far."""
        state = self.settle()
        return self.follow(state.scaled(factor))

    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What `tensor + stream` and `tensor * stream` come to, and functions of torch that are handed a stream."""
        if function in STREAM_OPERATORS:
            stream, other = args if isinstance(args[0], cls) else reversed(args)
            return stream.add(other) if function is torch.Tensor.add else stream.mul(other)
        args, kwargs = read_streams(None, args, kwargs or {})
        return function(*args, **kwargs)

    def to(self, dtype: torch.dtype) -> Any:
        return self if dtype == self.dtype else self.read().to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.state.sources[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.state.sources[0].dtype

    @property
    def device(self) -> torch.device:
        return self.state.sources[0].device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.read(), name)


STREAM_OPERATORS = (torch.Tensor.add, torch.Tensor.mul)


def read_streams(module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Whoever is handed a stream, reads it."""
    args = tuple(arg.read() if isinstance(arg, ResidualStream) else arg for arg in args)
    return args, {name: arg.read() if isinstance(arg, ResidualStream) else arg for name, arg in kwargs.items()}


def flatten_tuples(value: Any) -> tuple[list[Any], Any]:
    return tree_flatten(value, is_leaf=lambda part: not isinstance(part, tuple))


def checkpoint_apart(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Re-entrant checkpointing gives gradients only to tensors that are arguments or results themselves, so tuples are
    taken apart around it."""
    leaves, structure = flatten_tuples(args)
    structures = []

    def run(*leaves: Any) -> tuple[Any, ...]:
        outputs, structure_of_outputs = flatten_tuples(function(*tree_unflatten(leaves, structure)))
        structures.append(structure_of_outputs)
        return tuple(outputs)

    return tree_unflatten(checkpoint(run, *leaves), structures[0])


class AttnResChild(nn.Module):
    """A child of a decoder layer, which reads the stream that it is handed. Instances are made by [`rewire`], never
    constructed. (A pre-hook would do, but every decoded token would wait for the machinery of hooks.)"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if ResidualStream in map(type, (*args, *kwargs.values())):
            args, kwargs = read_streams(self, args, kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        mixin, module_class = type(self).__bases__
        return _new_module, (mixin, module_class), self.__dict__


class AttnResRMSNorm(AttnResChild):
    """An RMSNorm of the backbone that leaves its work to the read it follows, where the implementation of depth
    attention takes that into its own pass over memory; hooks that PyTorch keeps for all modules are not called then."""

    weight: torch.Tensor
    variance_epsilon: float

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[0] if len(args) == 1 else None
        if type(stream) is ResidualStream and stream.fuses and stream.value is None and not self.is_hooked():
            weight = self.weight
            # In float64 too, the library's norms take their statistics in float32, which a read does not.
            if weight.dtype == stream.dtype != torch.float64:
                return stream.read_normed(Norm(weight, self.variance_epsilon))
        return super().__call__(*args, **kwargs)

    def is_hooked(self) -> bool:
        """Whether somebody else has a part in the norm: a kernel of the library in its place, a hook that brings
        offloaded weights, a user's hook that wants tensors."""
        if "forward" in self.__dict__ or self._forward_hooks or self._forward_pre_hooks:
            return True
        return bool(self._backward_hooks or self._backward_pre_hooks)


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the backbone whose own forward, unchanged, runs on a [`ResidualStream`].

    The backbone's loop hands one value from layer to layer. Into the first layer that is the embedding
    `[batch, sequence, hidden]`, out of the last the output read, of the same shape; between layers it is a flattened
    [`DepthState`]. So recomputation, offloading and pipelines see a tuple of tensors (and `None`s, and a list of them).

    Instances are made by [`rewire`] from the layers of a backbone, never constructed.
    """

    depth_settings: DepthSettings
    structure: Backbone
    num_sublayers: int
    first_sublayer: int
    next_sublayer: int
    input_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, *others = args or (kwargs.pop(self.input_name),)
        depth_query = kwargs.pop("depth_query", None)
        if depth_query is None:
            raise AttnResError(
                f"{type(self).__name__} with sublayer {self.first_sublayer} was called outside of an AttnResModel or "
                "AttnResForCausalLM; call the model, or its `backbone` through it."
            )
        # What needs gradients stays a positional argument, which re-entrant checkpointing asks for.
        return super().__call__(hidden_states, depth_query, *others, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor | tuple[Any, ...],
        depth_query: torch.Tensor,
        *args: Any,
        depth_recorder: DepthRecorder | None = None,
        **kwargs: Any,
    ) -> Any:
        settings, is_checkpointed = self.depth_settings, self.gradient_checkpointing and self.training
        if isinstance(hidden_states, torch.Tensor):
            state = DepthState((hidden_states,))
        else:
            state = DepthState.unflatten(tuple(hidden_states))
        if is_checkpointed:
            # What crosses the boundary of a layer is kept for the backward, so phase one is not to: layers are groups.
            settings = settings._replace(group_size=self.next_sublayer - self.first_sublayer)
            state = state._replace(phase_one=())
        if depth_query.dtype.itemsize < 4:
            # Mixed precision of FSDP casts all that a layer is given; what was known in float32 is found anew.
            depth_query, state = depth_query.float(), state._replace(inverse_rms=None, phase_one=())
        fuses = settings.implementation.fuses(state)
        entering = ResidualStream(settings, fuses, depth_query, depth_recorder, state, self.first_sublayer)
        if depth_recorder is not None:
            depth_recorder.hidden_states[self.first_sublayer] = entering.read()

        outputs = super().forward(entering, *args, **kwargs)

        leaving = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.structure.replaces_stream and isinstance(leaving, torch.Tensor):
            leaving = entering + (leaving - entering.read())
        if not isinstance(leaving, ResidualStream):
            raise UnsupportedBackboneError(f"{type(self).__name__} returns something else than its residual stream.")
        state = leaving.settle()
        if leaving.num_written != self.next_sublayer:
            raise UnsupportedBackboneError(
                f"{type(self).__name__} wrote {leaving.num_written - self.first_sublayer} times to its residual "
                f"stream; {self.next_sublayer - self.first_sublayer} times were expected."
            )
        result: Any
        if leaving.num_written == self.num_sublayers:
            result = leaving.read()
        else:
            result = (state.added() if is_checkpointed else state).flatten()
        return (result, *outputs[1:]) if isinstance(outputs, tuple) else result

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_gradient_checkpointing_func" and getattr(value, "func", None) is not checkpoint_apart:
            value = partial(checkpoint_apart, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"(reads): {self.first_sublayer}-{self.next_sublayer - 1}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_module, (AttnResDecoderLayer, type(self).__bases__[1]), self.__dict__


@cache
def _rewired_class(mixin: type[nn.Module], module_class: type[nn.Module]) -> type[nn.Module]:
    """The re-wired subclass of a class of the backbone. Being a subclass, it is still what the backbone looks for by
    type when it records outputs or initialises weights."""
    return type(f"AttnRes{module_class.__name__}", (mixin, module_class), {"__module__": __name__})


def _new_module(mixin: type[nn.Module], module_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_rewired_class(mixin, module_class))  # type: ignore[arg-type]


@cache
def is_rms_norm(module_class: type[nn.Module]) -> bool:
    """Whether a class that has an epsilon by this name is RMSNorm and no relative of it: its forward is tried."""
    with torch.device("cpu"), torch.no_grad():
        hidden_states, weight = torch.arange(1, 5).float(), torch.arange(4).float()
        stand_in: Any = SimpleNamespace(weight=weight, variance_epsilon=0.5)
        try:
            normed = module_class.forward(stand_in, hidden_states)
        except Exception:  # of whatever kind: one that needs more than this is another norm
            return False
        return torch.allclose(normed, nn.functional.rms_norm(hidden_states, weight.shape, weight, 0.5))


def decoder_layers(backbone: PreTrainedModel) -> Any:
    """The `ModuleList` of a backbone's decoder layers, with a head on the backbone or without."""
    decoder = backbone.base_model
    decoder = getattr(decoder, "model", decoder)  # Llama 4's head calls its base model by another name
    return decoder.get_submodule(supported_backbone(backbone.config.model_type).layers)


def rewire(backbone: PreTrainedModel, config: AttnResConfig) -> None:
    """Turns the decoder layers of `backbone` into [`AttnResDecoderLayer`]s, in place; no parameter is touched.

    Raises:
        UnsupportedBackboneError: the family is not supported, or its layers are dropped in training.
    """
    structure = supported_backbone(config.backbone_config.model_type)
    if layerdrop := getattr(config.backbone_config, "layerdrop", 0):
        raise UnsupportedBackboneError(
            f"backbone_config has layerdrop={layerdrop}: in training, decoder layers would be left out, whose outputs "
            "are sources that later ones read; set layerdrop=0."
        )
    layers = decoder_layers(backbone)
    sublayers = config.num_sublayers // len(layers)
    may_fuse = config.depth_attention_implementation != "eager" and not structure.replaces_stream
    renamed: dict[str, str] = {}
    for index, layer in enumerate(layers):
        layer_class = type(layer)
        renamed[layer_class.__name__] = f"AttnRes{layer_class.__name__}"
        layer.__class__ = _rewired_class(AttnResDecoderLayer, layer_class)  # type: ignore[arg-type]
        layer.depth_settings = DepthSettings.of(config)
        layer.structure = structure
        layer.num_sublayers = config.num_sublayers
        layer.first_sublayer = index * sublayers
        layer.next_sublayer = (index + 1) * sublayers
        layer.input_name = list(inspect.signature(layer_class.forward).parameters)[1]
        for child in layer.children():
            for module in child if isinstance(child, nn.ModuleList) else (child,):
                module_class: Any = type(module)
                if isinstance(module, AttnResChild):  # of several layers
                    continue
                if module_class.__module__.startswith("torch.nn."):  # tools look for those by their exact type
                    module.register_forward_pre_hook(read_streams, with_kwargs=True)
                    continue
                is_fused = may_fuse and hasattr(module, "variance_epsilon") and is_rms_norm(module_class)
                module.__class__ = _rewired_class(AttnResRMSNorm if is_fused else AttnResChild, module_class)
    for module in backbone.modules():  # device maps and FSDP find layers by the name of their class
        if isinstance(module, PreTrainedModel):
            module._no_split_modules = {renamed.get(name, name) for name in module._no_split_modules or ()}
        if hasattr(module, "_maybe_slice_kv_shared_inputs"):
            module._maybe_slice_kv_shared_inputs = keep_all_positions  # type: ignore[assignment]


def keep_all_positions(*inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
    """In the place of what lets Gemma 4 run the last layers of a prefill at the last position only: a state of depth
    is no tensor that a position could be cut from. What was to be cut comes back whole: all that stands in front of
    `logits_to_keep`, which is the last positional argument."""
    return inputs[:-1]


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

    def __init__(self, config: AttnResConfig, auto_class: Any, backbone_name: str | None = "backbone"):
        # By name: the copies of the class that come with checkpoints are other classes.
        if getattr(config, "model_type", None) != AttnResConfig.model_type:
            raise AttnResError(
                f"{type(self).__name__} needs an AttnResConfig, not a {type(config).__name__}; make one with "
                "AttnResConfig(backbone_config=...)."
            )
        config.validate_depth_attention()
        super().__init__(config)
        supported_backbone(config.backbone_config.model_type)
        backbone = auto_class.from_config(config.backbone_config)
        rewire(backbone, config)
        self.add_module(backbone_name or backbone.base_model_prefix, backbone)
        self.depth_attention = DepthAttention(config)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for experts in the source of this module; they are the backbone's

    @classmethod
    def is_custom_code(cls) -> bool:
        # Of custom code the library leaves modules without parameters of their own uninitialised, and it would hold
        # that against the backbone, which sets buffers in such modules (Falcon-H1's multipliers).
        return False

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
            recorder = DepthRecorder(bool(output_depth_attentions))
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
            inputs = recorder.hidden_states.values()
            selected = (new if old is not None else None for new, old in zip(inputs, recorded[:-1]))
            outputs["hidden_states"] = (*selected, recorded[-1])
        if recorder is not None and recorder.depth_attentions is not None:
            outputs["depth_attentions"] = tuple(recorder.depth_attentions.values())
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
        # Under the name it has inside of the backbone with a head, so that tensors have the same names on disk.
        super().__init__(config, AutoModel, backbone_name=None)

    @property
    def backbone(self) -> Any:
        return next(module for name, module in self.named_children() if name != "depth_attention")

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

    # Some backbones make a cache of their own, or drop it where their rotary scaling changes (Phi-3).
    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return self.backbone._supports_default_dynamic_cache()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return self.backbone.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

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


# On disk the backbone's tensors bear the backbone's own names, which may begin with `backbone.` too (Nemotron-H's do);
# a name that goes on with a child of a model with a head has its prefix already.
CHILDREN = ("biogpt", "decoder", "gpt_neox", "lm_head", "model", "output_projection", "transformer")
PREFIXED = "".join(rf"(?!backbone\.{child}\.)" for child in CHILDREN)
register_checkpoint_conversion_mapping(
    "AttnResForCausalLM",
    [WeightRenaming(rf"^(?!depth_attention\.){PREFIXED}(.+)", r"backbone\.\1")],
    overwrite=True,
)

AttnResModel.register_for_auto_class("AutoModel")
AttnResForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if IS_INSTALLED:
    AutoModel.register(AttnResConfig, AttnResModel, exist_ok=True)
    AutoModelForCausalLM.register(AttnResConfig, AttnResForCausalLM, exist_ok=True)

__all__ = ["AttnResForCausalLM", "AttnResModel", "AttnResPreTrainedModel"]

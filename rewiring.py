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
"""Re-wiring: the decoder layers of a backbone run on a [`ResidualStream`] instead of a sum.

The class of a decoder layer, and of its children, is replaced by a subclass of itself that is made here. The new class
keeps the name of the old one, because device maps, FSDP, tensor parallel plans and kernels look for layers by name.
No parameter is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbones import RMS_NORMS, Backbone
from .configuration_attnres import AttnResConfig, AttnResError, UnsupportedBackboneError, supported_backbone
from .depth_attention import depth_settings
from .depth_state import DepthSettings, DepthState, Norm
from .residual_stream import DepthRecorder, ResidualStream, read_streams


class AttnResChild(nn.Module):
    """A child of a decoder layer. It reads a stream that it is given, before its own forward. Instances are made by
    [`rewire`], never constructed. (A hook would do the same, but it costs time with every decoded token.)"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if ResidualStream in map(type, (*args, *kwargs.values())):
            args, kwargs = read_streams(args, kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        mixin, module_class = type(self).__bases__
        return _new_module, (mixin, module_class), self.__dict__


class AttnResRMSNorm(AttnResChild):
    """An RMSNorm of the backbone. Where the implementation of depth attention can do the norm in the same pass over
    memory as the read before it, the norm leaves it to the read. Hooks that PyTorch keeps for all modules are not
    called then."""

    weight: torch.Tensor
    variance_epsilon: float

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[0] if len(args) == 1 else None
        if type(stream) is ResidualStream and stream.fuses and stream.value is None and not self.is_hooked():
            weight = self.weight
            # The library's norms take their statistics in float32 even for float64. A read does not.
            if weight.dtype == stream.dtype != torch.float64:
                return stream.read_normed(Norm(weight, self.variance_epsilon))
        return super().__call__(*args, **kwargs)

    def is_hooked(self) -> bool:
        """Whether the norm is more than its forward: a kernel of the library replaced that, a hook brings offloaded
        weights, or a hook of the user wants tensors."""
        if "forward" in self.__dict__ or self._forward_hooks or self._forward_pre_hooks:
            return True
        return bool(self._backward_hooks or self._backward_pre_hooks)


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the backbone. Its own forward, unchanged, runs on a [`ResidualStream`].

    The backbone's loop hands one value from layer to layer. Into the first layer that is the embedding
    `[batch, sequence, hidden]`. Out of the last it is the output read, of the same shape. Between layers it is a
    flattened [`DepthState`], so recomputation and offloading see a tuple of tensors.

    Instances are made by [`rewire`] from the layers of a backbone, never constructed.
    """

    depth_settings: DepthSettings
    structure: Backbone
    first_sublayer: int
    next_sublayer: int
    input_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, *others = args or (kwargs.pop(self.input_name),)
        depth_query = kwargs.pop("depth_query", None)
        if depth_query is None:
            raise AttnResError(
                f"{type(self).__name__} with sublayer {self.first_sublayer} was called outside of its model; call the "
                "model, which gives its layers their queries."
            )
        # Re-entrant checkpointing wants positional arguments for what needs gradients.
        return super().__call__(hidden_states, depth_query, *others, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor | tuple[Any, ...],
        depth_query: torch.Tensor,
        *args: Any,
        depth_recorder: DepthRecorder | None = None,
        **kwargs: Any,
    ) -> Any:
        settings = self.depth_settings
        is_recomputed = self.gradient_checkpointing and self.training
        stands_alone = is_recomputed or is_sharded(type(self))  # type: ignore[arg-type]
        if isinstance(hidden_states, torch.Tensor):
            state = DepthState((hidden_states,))
        else:
            state = DepthState.unflatten(tuple(hidden_states))
        self.check_position(state.depth, len(depth_query) - 1)
        if stands_alone:
            # The backward keeps what crosses the boundary of a layer, and phase one is large. So layers are groups.
            # FSDP2 hands a layer copies of the sources, except when the layer is recomputed. A cache would be valid
            # only then, and the recomputation would do other things than the forward did.
            settings = settings._replace(group_size=self.next_sublayer - self.first_sublayer)
            state = state._replace(cache=None)
        if depth_query.dtype.itemsize < 4:
            # Mixed precision of FSDP casts all that a layer is given. What was known in float32 is found anew.
            depth_query, state = depth_query.float(), state._replace(cache=None)
        fuses = settings.implementation.fuses(state)
        entering = ResidualStream(settings, fuses, depth_query, depth_recorder, state)
        if depth_recorder is not None:
            depth_recorder.hidden_states[self.first_sublayer] = entering.read()

        outputs = super().forward(entering, *args, **kwargs)

        leaving = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.structure.replaces_stream and isinstance(leaving, torch.Tensor):
            leaving = entering + (leaving - entering.read())
        if not isinstance(leaving, ResidualStream):
            raise UnsupportedBackboneError(f"{type(self).__name__} returns something else than its residual stream.")
        state = leaving.settle()
        if state.depth != self.next_sublayer:
            raise UnsupportedBackboneError(
                f"{type(self).__name__} wrote {state.depth - self.first_sublayer} times to its residual stream; "
                f"{self.next_sublayer - self.first_sublayer} times were expected."
            )
        result: Any
        if state.depth == len(depth_query) - 1:
            result = leaving.read()
        else:
            result = (state.added()._replace(cache=None) if stands_alone else state).flatten()
        return (result, *outputs[1:]) if isinstance(outputs, tuple) else result

    def check_position(self, depth: int, num_sublayers: int) -> None:
        """Raises [`AttnResError`] unless the layers before this one wrote what it reads."""
        if depth != self.first_sublayer or depth >= num_sublayers:
            raise AttnResError(
                f"the decoder layer of sublayers {self.first_sublayer} to {self.next_sublayer - 1} was given the "
                f"residual stream after {depth} sublayers, in a forward of {num_sublayers}. A layer before it was "
                "removed, replaced or skipped. Layers can be cut off at the end; give a shallower configuration for "
                "anything else."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_gradient_checkpointing_func" and getattr(value, "func", None) is not checkpoint_apart:
            value = partial(checkpoint_apart, value)
        if isinstance(value, nn.Module) and name in self._modules:
            # An engine puts a module of its own in the place of a child. A norm in plain torch would scale the stream.
            _rewire_child(value, may_fuse=False)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"(reads): {self.first_sublayer}-{self.next_sublayer - 1}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_module, (AttnResDecoderLayer, type(self).__bases__[1]), self.__dict__


@cache
def is_sharded(layer_class: Any) -> bool:
    """Whether `fully_shard` (FSDP2) has made the class of a layer. It is known by name, because torch may have been
    built without its distributed part."""
    return any(base.__name__ == "FSDPModule" for base in layer_class.__mro__)


def read_streams_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """[`read_streams`] as a hook, for modules of torch.nn."""
    return read_streams(args, kwargs)


def flatten_tuples(value: Any) -> tuple[list[Any], Any]:
    return tree_flatten(value, is_leaf=lambda part: not isinstance(part, tuple))


def checkpoint_apart(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Calls a checkpointing function with tuples taken apart. Re-entrant checkpointing gives gradients only to tensors
    that are arguments or results themselves."""
    leaves, structure = flatten_tuples(args)
    structures = []

    def run(*leaves: Any) -> tuple[Any, ...]:
        outputs, structure_of_outputs = flatten_tuples(function(*tree_unflatten(leaves, structure)))
        structures.append(structure_of_outputs)
        return tuple(outputs)

    return tree_unflatten(checkpoint(run, *leaves), structures[0])


@cache
def _rewired_class(mixin: Any, module_class: Any) -> type[nn.Module]:
    """The re-wired subclass of a class of the backbone. It is a subclass because the backbone looks for its layers by
    type, to record outputs and to initialise weights."""
    return type(module_class.__name__, (mixin, module_class), {"__module__": __name__})


def _new_module(mixin: Any, module_class: Any) -> nn.Module:
    return object.__new__(_rewired_class(mixin, module_class))


def decoder_layers(model: PreTrainedModel) -> Any:
    """The `ModuleList` of decoder layers of an AttnRes model or of a plain one, with a head or without."""
    structure = supported_backbone(model.config.model_type)
    base_model = getattr(model, structure.base_model or model.base_model_prefix, model)
    return base_model.get_submodule(structure.layers)


def rewire(base_model: PreTrainedModel, config: AttnResConfig) -> None:
    """Turns the decoder layers of a backbone into [`AttnResDecoderLayer`]s, in place.

    Raises:
        UnsupportedBackboneError: the architecture is not supported, or layers are dropped in training.
    """
    structure = supported_backbone(config.model_type)
    if layerdrop := getattr(config, "layerdrop", 0):
        raise UnsupportedBackboneError(
            f"the configuration has layerdrop={layerdrop}: training would leave out decoder layers whose outputs "
            "later ones read; set layerdrop=0."
        )
    layers = decoder_layers(base_model)
    sublayers = config.num_sublayers // len(layers)
    settings = depth_settings(config.depth_attention, config.num_sublayers)
    may_fuse = config.depth_attention["implementation"] != "eager" and not structure.replaces_stream
    for index, layer in enumerate(layers):
        layer_class = type(layer)
        layer.__class__ = _rewired_class(AttnResDecoderLayer, layer_class)  # type: ignore[arg-type]
        layer.depth_settings = settings
        layer.structure = structure
        layer.first_sublayer = index * sublayers
        layer.next_sublayer = (index + 1) * sublayers
        layer.input_name = list(inspect.signature(layer_class.forward).parameters)[1]
        for child in layer.children():
            for module in child if isinstance(child, nn.ModuleList) else (child,):
                _rewire_child(module, may_fuse)


def _rewire_child(module: nn.Module, may_fuse: bool) -> None:
    module_class: Any = type(module)
    if isinstance(module, AttnResChild):  # it is a child of several layers
        return
    if module_class.__module__.startswith("torch.nn."):  # tools look for those by their exact type
        module.register_forward_pre_hook(read_streams_of, with_kwargs=True)
        return
    mixin = AttnResRMSNorm if may_fuse and module_class.__name__ in RMS_NORMS else AttnResChild
    module.__class__ = _rewired_class(mixin, module_class)

"""A model cut into stages: modules that take the wire form of a [`DepthState`] and return it.

Each stage runs the backbone's own forward. So embeddings, masks, scales and heads stay the library's.
Three things are changed in it. Layers of other stages are replaced by placeholders without parameters, at the same
index, because backbones look up what a layer is by its index. The first layer of the stage is given the state from the
wire in the place of what stands before it. The last layer of the stage ends the forward, and so nothing behind it runs.

    stage 0        input_ids -> embedding -> layers 0 ... a-1 -> wire
    stage k        wire -> layers a ... b-1 -> wire
    last stage     wire -> layers b ... L-1 -> output read -> final norm -> head -> logits
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_attnres import AttnResError, UnsupportedBackboneError, supported_backbone
from ..depth_state import DepthState
from ..rewiring import decoder_layers


class Passage:
    """What the parts of a stage hand to each other during one forward.

    Attributes:
        entering (`tuple[Any, ...]`, *optional*): the flattened state for the first layer of the stage.
        query (`torch.Tensor`, *optional*): the queries that layers read with, `[reads, hidden]`, of the last forward.
    """

    def __init__(self) -> None:
        self.entering: tuple[Any, ...] | None = None
        self.query: torch.Tensor | None = None


class LeftStageError(Exception):
    """Ends the forward of a stage behind its last layer. It carries the flattened state."""

    def __init__(self, state: tuple[Any, ...]):
        super().__init__("the forward left its stage")
        self.state = state


class Skipped:
    """What a placeholder returns. Backbones take the output of a layer, its first entry, or a pair of this and
    something that is for one layer alone; this is all three."""

    def __getitem__(self, index: int) -> Any:
        return (self, None)[index]  # the end of the pair ends an iteration over it, too


SKIPPED = Skipped()


class Placeholder(nn.Module):
    """Stands where a layer of another stage would be. It keeps the attributes of that layer, which backbones ask for
    the kind of a layer, and none of its tensors."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        own = self.__dict__.keys()
        self.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in own})

    def forward(self, *args: Any, **kwargs: Any) -> Skipped:
        return SKIPPED


class BoundaryLayer(nn.Module):
    """The first layer of a stage, which takes the state from the wire, or the last one, which ends the forward."""

    passage: Passage
    enters: bool
    leaves: bool
    input_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.enters:
            if args:
                args = (self.passage.entering, *args[1:])
            else:
                kwargs[self.input_name] = self.passage.entering
        outputs = super().__call__(*args, **kwargs)
        if not self.leaves:
            return outputs
        raise LeftStageError(outputs[0] if isinstance(outputs[0], tuple) else outputs)


@cache
def _boundary_class(layer_class: Any) -> Any:
    """The subclass of a layer's class, of the same name, that is a [`BoundaryLayer`]."""
    return type(layer_class.__name__, (BoundaryLayer, layer_class), {"__module__": __name__})


class StageModule(nn.Module):
    """One stage of a causal language model. Its parameters are those of the model, not copies.

    Attributes:
        model (`AttnResForCausalLM`):
            The model with the layers of this stage alone. Names of parameters in `model.state_dict()` are those of the
            whole model.
        first_sublayer (`int`): number of sublayers that have written before the stage.
        next_sublayer (`int`): number of sublayers that have written after it.
        block_size (`int`): sublayers per block, the paper's S.
        dtype (`torch.dtype`): of the wire form and the logits, that of the word embedding.
    """

    def __init__(self, model: PreTrainedModel, start: int, stop: int):
        super().__init__()
        layers = decoder_layers(model)
        self.is_first, self.is_last = start == 0, stop == len(layers)
        self.first_sublayer: int = layers[start].first_sublayer
        self.next_sublayer: int = layers[stop - 1].next_sublayer
        self.block_size: int = model.config.depth_attention["block_size"]
        embedding: Any = model.get_input_embeddings()
        self.dtype: torch.dtype = embedding.weight.dtype
        self.passage = Passage()
        self.model = self._part_of(model, start, stop)
        self.training = model.training

    def _part_of(self, model: PreTrainedModel, start: int, stop: int) -> Any:
        structure = supported_backbone(model.config.model_type)
        base_name = structure.base_model or model.base_model_prefix
        whole_base: Any = model.get_submodule(base_name)
        part, base = _shallow(model), _shallow(whole_base)
        embedding = model.get_input_embeddings()
        if not self.is_first:
            _remove(base, embedding)
        if not self.is_last:
            # Nothing behind the last layer of the stage runs.
            children = list(base._modules)
            for name in children[children.index(structure.layers) + 1 :]:
                norm = base._modules[name]
                if norm is not None and "norm" in type(norm).__name__.lower() and list(norm.parameters()):
                    base._modules[name] = None
            for name in part._modules:
                part._modules[name] = None
        part._modules[base_name] = base
        parts: list[nn.Module] = []
        for index, layer in enumerate(decoder_layers(model)):
            if not start <= index < stop:
                parts.append(Placeholder(layer))
                continue
            enters, leaves = index == start > 0, index == stop - 1 and not self.is_last
            if enters or leaves:
                layer = _shallow(layer)
                layer_class: Any = type(layer)
                layer.__class__ = _boundary_class(layer_class)
                layer.__dict__.update(passage=self.passage, enters=enters, leaves=leaves)
            parts.append(layer)
        base._modules[structure.layers] = nn.ModuleList(parts)

        def depth_query() -> torch.Tensor:
            self.passage.query = query = type(base).depth_query(base)
            return query

        base.__dict__["depth_query"] = depth_query
        return part

    def wire_size(self, depth: int) -> int:
        """Number of tensors of the wire form after `depth` sublayers."""
        return self.finished(depth) + (depth % self.block_size != 0)

    def finished(self, depth: int) -> int:
        """Number of finished sources after `depth` sublayers, the embedding included."""
        return 1 + depth // self.block_size

    def forward(self, *inputs: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """
        Args:
            inputs (`torch.Tensor`):
                `input_ids` `[batch, sequence]` for the first stage, or embeddings `[batch, sequence, hidden]`. The wire
                form for the others, tensors of `[batch, sequence, hidden]`.
            kwargs: what else the backbone's forward takes, such as `attention_mask` and `position_ids`; the same for
                each stage.

        Returns:
            `tuple[torch.Tensor, ...]` or `torch.Tensor`: the wire form, tensors of `[batch, sequence, hidden]`; or the
            logits of the last stage, `[batch, sequence, vocabulary]`.
        """
        if self.is_first:
            (tokens,) = inputs
            kwargs["inputs_embeds" if tokens.is_floating_point() else "input_ids"] = tokens
        else:
            state = DepthState.from_wire(inputs, self.first_sublayer, self.block_size)
            self.passage.entering = state.flatten()
            # Of this only dtype, device and shape matter. CTRL scales it in place.
            kwargs["inputs_embeds"] = torch.zeros_like(inputs[0])
        try:
            outputs = self.model(use_cache=False, return_dict=True, **kwargs)
        except LeftStageError as left:
            # A partial sum of one sublayer is of lower precision under autocast; receivers expect one dtype.
            return tuple(tensor.to(self.dtype) for tensor in DepthState.unflatten(left.state).to_wire())
        finally:
            self.passage.entering = None
        return outputs.logits.to(self.dtype)


def cut(model: Any, num_stages: int, starts: Sequence[int] | None = None) -> list[StageModule]:
    """Cuts a causal language model into stages of consecutive decoder layers.

    The stages share their parameters with the model, and the model is not changed. Delete the model to free what is on
    no stage of this process.

    Args:
        model (`AttnResForCausalLM`): the model.
        num_stages (`int`): number of stages, 1 to the number of decoder layers.
        starts (`Sequence[int]`, *optional*):
            Index of the first decoder layer of each stage, `0` first. By default stages have equally many layers, and
            the first ones one more if there is a remainder.

    Returns:
        `list[StageModule]`: the stages. Stage k + 1 takes what stage k returns.

    Raises:
        AttnResError: it is no AttnRes model, it has no head, or the layers cannot be divided like this.
        UnsupportedBackboneError: layers of the backbone hand each other more than the state of depth.
    """
    if getattr(model.config, "depth_attention", None) is None:
        raise AttnResError(f"{type(model).__name__} is no AttnRes model; convert it first (attnres convert).")
    layers = decoder_layers(model)
    if model.get_output_embeddings() is None:
        raise AttnResError(f"{type(model).__name__} has no language model head; give split() an AttnResForCausalLM.")
    refuse_what_crosses_layers(model.config)
    if starts is None:
        size, remainder = divmod(len(layers), num_stages) if num_stages > 0 else (0, 0)
        starts = [stage * size + min(stage, remainder) for stage in range(num_stages)]
    ends = [*starts[1:], len(layers)]
    if len(starts) != num_stages or not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, ends)):
        raise AttnResError(
            f"{len(layers)} decoder layers cannot be cut into {num_stages} stages that start at {list(starts)}; give "
            f"num_stages from 1 to {len(layers)}, and as many increasing indices of layers, 0 first, if any."
        )
    return [StageModule(model, start, end) for start, end in zip(starts, ends)]


def refuse_what_crosses_layers(config: Any) -> None:
    """Raises [`UnsupportedBackboneError`] if something else than the state of depth goes from layer to layer."""
    reasons: dict[str, str] = {
        "num_kv_shared_layers": "later layers use the keys and values of earlier ones",
        "hidden_size_per_layer_input": "each layer has an embedding of the tokens of its own",
        "output_router_logits": "the loss adds up the router logits of all layers",
    }
    for name, reason in reasons.items():
        if value := getattr(config, name, None):
            raise UnsupportedBackboneError(
                f"{config.model_type} with {name}={value} cannot be cut into pipeline stages: {reason}. Set it to 0 or "
                "False, or use FSDP2 or tensor parallelism."
            )
    if config.model_type == "zaya":
        raise UnsupportedBackboneError(
            "zaya cannot be cut into pipeline stages: its routers see the hidden states of the router before them. Use "
            "FSDP2 or tensor parallelism."
        )
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        raise UnsupportedBackboneError(
            f"{config.model_type} with shared indexers cannot be cut into pipeline stages: layers use what earlier "
            "ones selected. Use FSDP2 or tensor parallelism."
        )


def _shallow(module: Any) -> Any:
    """A module with the same children, parameters and buffers, to which others can be given."""
    copied = object.__new__(type(module))
    copied.__dict__ = module.__dict__.copy()
    for name in ("_modules", "_parameters", "_buffers"):
        copied.__dict__[name] = module.__dict__[name].copy()
    return copied


def _remove(root: Any, module: nn.Module) -> None:
    """Takes a module out of the tree of a shallow copy."""
    path = next((name for name, other in root.named_modules() if other is module), None)
    if not path:
        return
    *parents, last = path.split(".")
    for name in parents:
        root._modules[name] = root = _shallow(root._modules[name])
    root._modules[last] = None

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

An AttnRes model *is* the library's own model of its decoder, the *backbone*: the class of each is made at run time and
derives from a class of this file and from the backbone's class. Attention, experts, masks, caches, head, losses,
parallel plans and the names of parameters stay the library's. Only the decoder layers are re-wired: each sublayer reads
its input from depth and writes its output to depth, where it used to add to one stream.

    embedding -> [read -> norm -> mixer -> write, read -> norm -> MLP -> write] x L_b -> read -> final norm -> head
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .checkpoint_files import check_checkpoint, check_loaded
from .configuration_attnres import (
    IS_INSTALLED,
    AttnResConfig,
    AttnResConfigError,
    AttnResError,
    UnsupportedBackboneError,
    for_each_config_class,
    supported_backbone,
)
from .depth_attention import DepthAttention
from .residual_stream import DepthRecorder
from .rewiring import decoder_layers, rewire

_ASKS_FOR_INFO: ContextVar[bool] = ContextVar("_ASKS_FOR_INFO", default=False)  # of the load that is going on


class AttnResPreTrainedModel(PreTrainedModel):
    """What all AttnRes models have in common. To construct one of them gives an object of a class that also derives
    from the backbone's own class, which answers for everything that is not in this file."""

    config: AttnResConfig
    config_class = AttnResConfig
    _supports_attention_backend = True  # vLLM asks the classes of this file, before there is a backbone
    supports_gradient_checkpointing = True  # re-wired layers can be recomputed, also those of CTRL and JetMoe

    backbone_class: type[PreTrainedModel] | None = None  # of the classes that `model_class_of` makes
    auto_class: Any = None  # the Auto class that knows the backbone's class

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls.of_backbone(config))

    def __init__(self, config: AttnResConfig, *args: Any, **kwargs: Any):
        config.validate_depth_attention()
        try:
            super().__init__(config, *args, **kwargs)
        except (AttnResError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            place = f"{config.name_or_path}: " if config.name_or_path else ""
            raise AttnResConfigError(
                f"{place}the configuration makes no {config.model_type} model: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def of_backbone(cls, config: Any) -> Any:
        """The class of the models of this kind over the backbone of a configuration.

        Raises:
            AttnResError: it is no AttnRes configuration.
            UnsupportedBackboneError: the backbone has no model of this kind, or cannot be re-wired.
        """
        if cls.backbone_class is not None:
            return cls
        # By attribute: the copies of `AttnResConfig` that come with checkpoints are other classes.
        config_class = getattr(type(config), "backbone_config_class", None)
        if config_class is None:
            raise AttnResError(
                f"{cls.__name__} needs an AttnResConfig, not a {type(config).__name__}; make one with "
                "AttnResConfig(backbone_config=...)."
            )
        supported_backbone(config.model_type)
        backbone_class = cls.auto_class._model_mapping.get(config_class, None)
        if isinstance(backbone_class, (list, tuple)):
            backbone_class = backbone_class[0]
        if backbone_class is None:
            raise UnsupportedBackboneError(
                f"{cls.__name__}: Transformers has no model for {cls.auto_class.__name__} of model_type "
                f"{config.model_type!r}."
            )
        return model_class_of(cls, backbone_class, type(config))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in [`PreTrainedModel`]. Arguments of [`AttnResConfig`] are taken too. The checkpoint of a plain decoder is
        retrofitted while it is loaded.

        Raises:
            AttnResError: an AttnRes checkpoint in a directory is damaged; the message names file and tensor. With
                `output_loading_info=True` the caller learns what is missing, and judges it.
        """
        path = pretrained_model_name_or_path
        asks_for_info = bool(kwargs.get("output_loading_info"))
        is_from_files = kwargs.get("state_dict") is None and kwargs.get("gguf_file") is None
        if is_from_files and not asks_for_info and isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            check_checkpoint(Path(path, kwargs.get("subfolder") or ""), kwargs.get("variant"))
        if cls.backbone_class is None and isinstance(config, PreTrainedConfig):
            return cls.of_backbone(config).from_pretrained(
                pretrained_model_name_or_path, *args, config=config, **kwargs
            )
        token = _ASKS_FOR_INFO.set(asks_for_info)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        finally:
            _ASKS_FOR_INFO.reset(token)

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any) -> Any:
        """The library reads the tensors here, before it takes memory for those that are missing or of other shapes."""
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)
        if state_dict is None and checkpoint_files:
            is_lenient = load_config.ignore_mismatched_sizes or _ASKS_FOR_INFO.get()
            check_loaded(model, loaded[0], checkpoint_files, is_lenient)
        return loaded

    def post_init(self) -> None:
        """The backbone calls this at the end of its constructor. Here the base model becomes an AttnRes model."""
        base_model = _base_model(self)
        if not isinstance(base_model, AttnResModel):
            base_model.__class__ = model_class_of(AttnResModel, type(base_model), type(self.config))  # type: ignore[arg-type]
            base_model.post_init()
        super().post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        # The library leaves modules without parameters uninitialised in custom code. Here they are the backbone's. Some
        # of them hold buffers that have to be set (Falcon-H1's multipliers).
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DepthAttention):
            for name, parameter in module.named_parameters():
                (init.ones_ if name == "key_norm" else init.zeros_)(parameter)
        else:
            super()._init_weights(module)

    def __reduce__(self) -> tuple[Any, ...]:
        mixin, backbone_class = type(self).__bases__
        return _new_model, (mixin, backbone_class, self.config), self.__dict__


class AttnResModel(AttnResPreTrainedModel):
    """
    A decoder of Transformers without its head, with attention over depth for residuals. It holds the depth parameters,
    in `depth_attention`.

    Args:
        config ([`AttnResConfig`]): the configuration, of the backbone and of depth attention.

    Raises:
        UnsupportedBackboneError: the backbone's decoder layers are not known to split into sublayers.
    """

    auto_class = AutoModel

    depth_attention: DepthAttention

    def post_init(self) -> None:
        if not hasattr(self, "depth_attention"):
            rewire(self, self.config)
            self.depth_attention = DepthAttention.from_config(self.config)
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), "depth_attention"}
        super().post_init()

    def forward(
        self,
        *args: Any,
        output_depth_attentions: bool | None = None,
        depth_recorder: DepthRecorder | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Runs the backbone's own forward, whose arguments it takes, with the queries of this model.

        Args:
            output_depth_attentions (`bool`, *optional*):
                Return `depth_attentions`: for each of the R reads the weights `[batch, sequence, sources]` (or
                `[batch, sequence, heads, sources]` for several depth heads), float32, the open block's partial sum
                last. With a window these are the embedding and the sources in it.

        Returns:
            `ModelOutput`: the backbone's own output class, with `depth_attentions` if asked for. Entry i of
            `hidden_states`, if asked for, is what decoder layer i reads.
        """
        returns_hidden_states = kwargs.get("output_hidden_states")
        if returns_hidden_states is None:
            returns_hidden_states = self.config.output_hidden_states
        if depth_recorder is None and (returns_hidden_states not in (None, False) or output_depth_attentions):
            depth_recorder = DepthRecorder(bool(output_depth_attentions))
        if depth_recorder is None:
            return super().forward(*args, depth_query=self.depth_query(), **kwargs)
        return_dict = _pop_return_dict(self, kwargs)
        outputs = super().forward(
            *args, depth_query=self.depth_query(), depth_recorder=depth_recorder, return_dict=True, **kwargs
        )
        if (recorded := outputs.get("hidden_states")) is not None:
            # The backbone selected which entries to return, and put the normed output last.
            inputs = depth_recorder.hidden_states.values()
            selected = (new if old is not None else None for new, old in zip(inputs, recorded[:-1]))
            outputs["hidden_states"] = (*selected, recorded[-1])
        _add_depth_attentions(outputs, output_depth_attentions, depth_recorder)
        return outputs if return_dict else outputs.to_tuple()

    def depth_query(self) -> torch.Tensor:
        """The folded queries, `[reads, hidden]`, of the reads of one forward. A decoder whose last layers were cut off
        reads its output with the query of the output read."""
        queries = self.depth_attention()
        layers = decoder_layers(self)[: self.config.num_hidden_layers]
        last = layers[-1] if len(layers) else None
        end = getattr(last, "next_sublayer", None)
        if end is None:
            raise AttnResError(
                f"the last decoder layer is a {type(last).__name__}, which does not read from depth; remove layers "
                "from the end of the list instead of replacing them."
            )
        return queries if end == len(queries) - 1 else torch.cat([queries[:end], queries[-1:]])


class _AttnResHead(AttnResPreTrainedModel):
    """A model with a head: the backbone's own, over an [`AttnResModel`]."""

    @property
    def depth_attention(self) -> DepthAttention:
        """The depth parameters, which the base model holds."""
        return _base_model(self).depth_attention

    def forward(self, *args: Any, output_depth_attentions: bool | None = None, **kwargs: Any) -> ModelOutput:
        """
        Runs the backbone's own forward, whose arguments it takes.

        Args:
            output_depth_attentions (`bool`, *optional*):
                Return `depth_attentions`: for each of the R reads the weights `[batch, sequence, sources]` (or
                `[batch, sequence, heads, sources]` for several depth heads), float32, the open block's partial sum
                last. With a window these are the embedding and the sources in it.

        Returns:
            `ModelOutput`: the backbone's own output class, with `depth_attentions` if asked for.
        """
        if not output_depth_attentions:
            return super().forward(*args, **kwargs)
        return_dict = _pop_return_dict(self, kwargs)
        recorder = DepthRecorder(records_depth_attentions=True)
        outputs = super().forward(*args, depth_recorder=recorder, return_dict=True, **kwargs)
        _add_depth_attentions(outputs, True, recorder)
        return outputs if return_dict else outputs.to_tuple()


class AttnResForCausalLM(_AttnResHead, GenerationMixin):
    """
    A causal language model of Transformers with attention over depth for residuals.

    Args:
        config ([`AttnResConfig`]): the configuration, of the backbone and of depth attention.

    Raises:
        UnsupportedBackboneError: the backbone's decoder layers are not known to split into sublayers.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/converted", trust_remote_code=True)
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/converted", trust_remote_code=True)
    >>> outputs = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=40)
    ```
    """

    auto_class = AutoModelForCausalLM


class AttnResForSequenceClassification(_AttnResHead):
    """A sequence classifier of Transformers with attention over depth for residuals, where the backbone has one."""

    auto_class = AutoModelForSequenceClassification


class AttnResForTokenClassification(_AttnResHead):
    """A token classifier of Transformers with attention over depth for residuals, where the backbone has one."""

    auto_class = AutoModelForTokenClassification


class AttnResForQuestionAnswering(_AttnResHead):
    """A question answering model of Transformers with attention over depth for residuals, where there is one."""

    auto_class = AutoModelForQuestionAnswering


MODEL_CLASSES = (
    AttnResModel,
    AttnResForCausalLM,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResForQuestionAnswering,
)


@cache
def model_class_of(kind: Any, backbone_class: Any, config_class: Any) -> Any:
    """The class of AttnRes models of one kind over one class of backbones. It keeps the name of its kind, which saving
    writes into `architectures` and `auto_map`; its qualified name tells it from others."""

    def ask_backbone(name: str) -> classmethod:
        # These look at the name of the class, or at the source of its module.
        return classmethod(lambda cls: getattr(backbone_class, name)())

    namespace: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": f"{kind.__name__}[{backbone_class.__name__}]",
        "__doc__": kind.__doc__,
        "backbone_class": backbone_class,
        "config_class": config_class,
        "forward": _with_signature(kind.forward, backbone_class.forward),
        "_supports_attention_backend": backbone_class._supports_attention_backend,
    }
    for name in ("_can_set_attn_implementation", "_can_set_experts_implementation", "_supports_default_dynamic_cache"):
        if hasattr(backbone_class, name):
            namespace[name] = ask_backbone(name)
    method = supported_backbone(config_class.model_type).slices_positions
    if method is not None and hasattr(backbone_class, method):
        namespace[method] = _keep_all_positions
    _share_conversions(backbone_class.__name__, config_class.model_type)
    model_class: Any = type(kind.__name__, (kind, backbone_class), namespace)
    # The library enters a class here, by its qualified name, when it constructs a model of it. A base model that turns
    # into an AttnRes model is never constructed as one.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model_class), model_class._can_record_outputs)
    return model_class


def _share_conversions(class_name: str, model_type: str) -> None:
    """The library looks up how tensors are renamed on disk by the name of a class, then by its model type. Two
    backbones (GPT-NeoX, dots3) are listed by class alone. Here they are listed by model type, for AttnRes classes."""
    conversions = get_checkpoint_conversion_mapping(class_name)
    if conversions is not None and get_checkpoint_conversion_mapping(model_type) is None:
        register_checkpoint_conversion_mapping(model_type, conversions)


def _base_model(model: PreTrainedModel) -> Any:
    """The base model of a model with a head, or the base model itself."""
    structure = supported_backbone(model.config.model_type)
    return getattr(model, structure.base_model or model.base_model_prefix, model)


def _new_model(kind: Any, backbone_class: Any, config: AttnResConfig) -> PreTrainedModel:
    return object.__new__(model_class_of(kind, backbone_class, type(config)))  # type: ignore[arg-type]


def _keep_all_positions(self: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
    """In the place of the backbone's method `slices_positions`: all inputs but the last, the number of positions."""
    return inputs[:-1]


def _with_signature(forward: Any, backbone_forward: Any) -> Any:
    """The same function under the signature of the backbone's forward, which Trainer, generate and vLLM look at."""

    @wraps(backbone_forward)
    def forward_of_backbone(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    forward_of_backbone.__doc__ = forward.__doc__
    return forward_of_backbone


def _pop_return_dict(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    return_dict = kwargs.pop("return_dict", None)
    return bool(model.config.return_dict if return_dict is None else return_dict)


def _add_depth_attentions(outputs: ModelOutput, is_asked: bool | None, recorder: DepthRecorder) -> None:
    if is_asked and recorder.depth_attentions is not None:
        outputs["depth_attentions"] = tuple(recorder.depth_attentions.values())


def _register(config_class: type[AttnResConfig]) -> None:
    """Makes the Auto classes find the models of a configuration, also where no remote code may be run: the library's
    heads build their base model through `AutoModel.from_config`."""
    for model_class in MODEL_CLASSES:
        model_class.auto_class.register(config_class, model_class, exist_ok=True)


for _model_class in MODEL_CLASSES:
    _model_class.register_for_auto_class(_model_class.auto_class.__name__)
for_each_config_class(_register)
if IS_INSTALLED:
    _register(AttnResConfig)
# Trainer smooths shifted labels for the classes that are listed here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AttnResConfig.model_type] = AttnResForCausalLM.__name__

__all__ = [
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
]

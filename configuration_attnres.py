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
"""Configuration of Attention Residuals (AttnRes, arXiv 2603.15031) over any decoder of Transformers.

An AttnRes configuration *is* the configuration of its decoder, the *backbone*: the class of each is made at run time
and derives from [`AttnResConfig`] and from the backbone's own class. It has one more entry, `depth_attention`.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .backbones import REFUSED, SUPPORTED, Backbone

MIXES = ("mean", "sum", "gated")
DEPTH_ATTENTION_IMPLEMENTATIONS = ("eager", "two_phase", "triton", "auto")
QUERIES = ("learned", "input", "static")
WEIGHTINGS = ("softmax", "sigmoid")
VALUES = ("raw", "normalized")
DEPTH_VARIANTS: dict[str, Any] = {  # their values in the paper's read
    "num_heads": 1,
    "query": "learned",
    "weighting": "softmax",
    "key_norm": True,
    "logit_scale": 1.0,
    "window": None,
    "values": "raw",
}
DEPTH_DEFAULTS = {"mix": "mean", "key_norm_eps": 1e-6, "implementation": "two_phase", **DEPTH_VARIANTS}
DEFAULT_NUM_BLOCKS = 8

# The arguments of the constructor that set an entry of `depth_attention`, by the entry that each sets.
DEPTH_ARGUMENTS = {
    "block_size": "block_size",
    "num_blocks": "num_blocks",
    "mix": "mix",
    "key_norm_eps": "key_norm_eps",
    "depth_attention_implementation": "implementation",
}

# What `trust_remote_code` loads, by the Auto class that looks for it.
AUTO_MAP = {
    "AutoConfig": "configuration_attnres.AttnResConfig",
    "AutoModel": "modeling_attnres.AttnResModel",
    "AutoModelForCausalLM": "modeling_attnres.AttnResForCausalLM",
    "AutoModelForSequenceClassification": "modeling_attnres.AttnResForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_attnres.AttnResForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_attnres.AttnResForQuestionAnswering",
}

# False in the copy of this file that travels with a checkpoint. The library registers that copy, if it is trusted.
IS_INSTALLED = __package__ == "attnres"


class AttnResError(ValueError):
    """Root of all errors of this package: says what was wrong, where, and what to do.

    Messages quote files that may come from anyone, so control characters are escaped before a terminal sees them.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message))


class AttnResConfigError(AttnResError):
    """A field of an [`AttnResConfig`] has a value that makes no model."""


class UnsupportedBackboneError(AttnResError):
    """The backbone is of an architecture whose decoder layers cannot be re-wired."""


def supported_backbone(model_type: str) -> Backbone:
    """What is known of an architecture.

    Raises:
        UnsupportedBackboneError: it cannot be a backbone; the message says why.
    """
    if model_type not in SUPPORTED:
        reason = REFUSED.get(model_type, "its decoder layers have not been looked at")
        raise UnsupportedBackboneError(
            f"backbone model_type {model_type!r} is not supported: {reason}. Supported: {', '.join(sorted(SUPPORTED))}."
        )
    return SUPPORTED[model_type]


class AttnResConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AttnResModel`] or [`AttnResForCausalLM`]: a decoder of Transformers, the *backbone*, whose
    residual sum is replaced by softmax attention over depth.

    The object that this gives is also an instance of the backbone's own configuration class, with all its fields, its
    `model_type` and its defaults. So whatever asks a configuration, or looks something up by `model_type`, gets the
    backbone's answer. In config.json, `model_type` is `"attnres"`, which makes the Auto classes load this class, and
    `backbone_model_type` is the backbone's. From the configuration of another decoder, `from_pretrained` makes an
    AttnRes configuration with `mix="sum"`.

    Args:
        backbone_config (`PreTrainedConfig`, `dict` or `str`):
            The decoder: its configuration (a copy is taken), the same as a dict with a `model_type`, or a path or Hub
            id that `AutoConfig.from_pretrained` takes.
        block_size (`int`, *optional*):
            S, the number of consecutive sublayers (one token mixer or one MLP each) whose outputs are summed into one
            source (Block AttnRes, Eq. 5-6). 1 is Full AttnRes (Eq. 1-4). Any S up to the number of sublayers L is
            allowed, whether it divides L or not.
        num_blocks (`int`, *optional*, defaults to 8):
            N, the alternative to `block_size`: S becomes `ceil(L / N)`, and the number of blocks `ceil(L / S) <= N`.
            Give one of the two; the saved configuration always holds `block_size`. A decoder with fewer than 8
            sublayers defaults to one block per sublayer.
        mix (`str`, *optional*, defaults to `"mean"`):
            `"mean"` is the paper's read, a weighted mean of the sources. `"sum"` multiplies it by the number of
            sources, so that zero pseudo-queries give exactly the standard residual stream, whatever norm follows.
            `"gated"` is the standard residual stream plus a learned gate (one number per read, zero at first) times
            the mean. A read of one source is that source in all three.
        key_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the RMSNorm on the keys.
        depth_attention_implementation (`str`, *optional*, defaults to `"two_phase"`):
            How depth attention is computed: `"eager"` (the reference), `"two_phase"`, `"triton"` (CUDA devices), or
            `"auto"` (`"triton"` where it runs, else `"two_phase"`). Every implementation gives the same result.
            `"eager"` computes the variants that the chosen one does not cover.
        depth_attention (`dict`, *optional*):
            Further settings, the *variants* of a read. Numbers of the paper are validation losses of Table 4, where
            Full AttnRes has 1.737 and Block AttnRes with S = 4 has 1.746.

            - `num_heads` (`int`, defaults to 1): H, the depth heads. Key, query and source are cut into H slices; each
              head weighs its own slice (Block, H = 16: 1.752). H divides the hidden size. The rms is of the whole key.
            - `query` (`str`, defaults to `"learned"`): `"input"` multiplies the key of the latest source by a learned
              `[hidden, hidden]` matrix per read (1.731; the paper does not say of which input). `"static"` learns the
              logits themselves, one per read and source (1.749).
            - `weighting` (`str`, defaults to `"softmax"`): `"sigmoid"` weighs each source by itself, with
              `2 * sigmoid(logit) / n`, so that zero queries give the mean as well (1.741).
            - `key_norm` (`bool`, defaults to `True`): the RMSNorm on keys (without it: Full 1.743, Block 1.750).
            - `logit_scale` (`float`, defaults to 1.0): a factor of the logits (Inkling 2 has hidden_size ** -0.5).
            - `window` (`int`, *optional*): a read sees the embedding and this number of the latest sources (Full,
              8: 1.764).
            - `values` (`str`, defaults to `"raw"`): `"normalized"` sums sources divided by their rms (Inkling 2).
        kwargs: any field of the backbone's configuration, to set it.

    Attributes:
        depth_attention (`dict`): `block_size`, `mix`, `key_norm_eps`, `implementation` and the variants, as in
            config.json.
        num_sublayers (`int`): L, as a rule one token mixer and one MLP per decoder layer.
        num_reads (`int`): R = L + 1, one read in front of each sublayer and the output read.
        num_blocks (`int`): N = ceil(L / S). To set it sets `block_size` to ceil(L / N).
        block_size, mix, key_norm_eps, depth_attention_implementation: the entries of `depth_attention`. A field of the
            backbone of the same name goes first (MiniMax has a `block_size`).

    Raises:
        AttnResConfigError: a value is out of range; the message names the field, the value and what is allowed.

    Example:

    ```python
    >>> from attnres import AttnResConfig, AttnResForCausalLM
    >>> from transformers import Qwen3Config

    >>> config = AttnResConfig(backbone_config=Qwen3Config(num_hidden_layers=28), num_blocks=8)
    >>> isinstance(config, Qwen3Config), config.num_sublayers, config.block_size, config.num_blocks, config.num_reads
    (True, 56, 7, 8, 57)
    >>> model = AttnResForCausalLM(config)
    ```
    """

    model_type = "attnres"
    backbone_config_class: ClassVar[type[PreTrainedConfig] | None] = None  # of the classes that `config_class_of` makes

    def __new__(cls, **kwargs: Any) -> AttnResConfig:
        if kwargs.get("backbone_config") is None and "depth_attention" in kwargs:  # the fields of a whole config.json
            return cls.from_dict(kwargs)
        depth = _depth_arguments(kwargs)
        if cls.backbone_config_class is not None and "backbone_config" not in kwargs:
            backbone_config, kwargs = cls.backbone_config_class(**kwargs), {}
        else:
            backbone_config = _resolve_backbone_config(kwargs.pop("backbone_config", None))
        self = object.__new__(config_class_of(type(backbone_config)))  # type: ignore[arg-type]
        # The whole state of the given object. It holds more than fields do, such as the attention implementation.
        self.__dict__.update(copy.deepcopy(backbone_config.__dict__))
        try:
            for name, value in kwargs.items():
                _set_field(self, name, value)
        except (AttributeError, TypeError, StrictDataclassError) as error:
            raise AttnResConfigError(f"the configuration cannot be made: {error}.") from error
        self.auto_map = dict(AUTO_MAP)
        self.depth_attention = depth
        num_blocks = depth.pop("num_blocks", None)
        if "block_size" not in depth:
            self.num_blocks = min(DEFAULT_NUM_BLOCKS, self.num_sublayers) if num_blocks is None else num_blocks
        elif num_blocks is not None:
            raise AttnResConfigError(
                f"block_size={depth['block_size']!r} and num_blocks={num_blocks!r} are both given; give exactly one."
            )
        self.validate_depth_attention()
        return self

    def __init__(self, **kwargs: Any) -> None:
        """`__new__` has done all of it, because the class of the object depends on the arguments."""

    # -- depth ---------------------------------------------------------------------------------------------------------

    @property
    def num_sublayers(self) -> int:
        backbone = SUPPORTED.get(self.model_type, Backbone())
        return backbone.sublayers_per_layer(self) * self.num_hidden_layers

    @property
    def num_reads(self) -> int:
        return self.num_sublayers + 1

    @property
    def num_blocks(self) -> int:
        return -(-self.num_sublayers // self.depth_attention["block_size"])

    @num_blocks.setter
    def num_blocks(self, num_blocks: int) -> None:
        _check_range("num_blocks", num_blocks, 1, self.num_sublayers, "sublayers of the backbone")
        self.depth_attention["block_size"] = -(-self.num_sublayers // num_blocks)

    def validate_depth_attention(self) -> None:
        """Raises [`AttnResConfigError`] unless every entry of `depth_attention` makes sense; also run when saving."""
        depth = self.depth_attention
        if unknown := sorted(depth.keys() - {"block_size", *DEPTH_DEFAULTS}):
            raise AttnResConfigError(
                f"depth_attention has an entry {unknown[0]!r}; allowed: {', '.join(['block_size', *DEPTH_DEFAULTS])}."
            )
        _check_range("block_size", depth.get("block_size"), 1, self.num_sublayers, "sublayers of the backbone")
        _check_choice("mix", depth["mix"], MIXES)
        _check_choice("depth_attention_implementation", depth["implementation"], DEPTH_ATTENTION_IMPLEMENTATIONS)
        eps = depth["key_norm_eps"]
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise AttnResConfigError(f"key_norm_eps={eps!r} is not allowed; it must be a number between 0 and 1.")
        self._validate_variant(depth)

    def _validate_variant(self, depth: dict[str, Any]) -> None:
        _check_choice("query", depth["query"], QUERIES)
        _check_choice("weighting", depth["weighting"], WEIGHTINGS)
        _check_choice("values", depth["values"], VALUES)
        _check_range("num_heads", depth["num_heads"], 1, self.hidden_size, "dimensions of the hidden state")
        if self.hidden_size % depth["num_heads"]:
            raise AttnResConfigError(
                f"num_heads={depth['num_heads']!r} is not allowed; it must divide hidden_size={self.hidden_size}."
            )
        if not isinstance(depth["key_norm"], bool):
            raise AttnResConfigError(f"key_norm={depth['key_norm']!r} is not allowed; it must be true or false.")
        scale = depth["logit_scale"]
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise AttnResConfigError(f"logit_scale={scale!r} is not allowed; it must be a positive number.")
        if depth["window"] is not None:
            _check_range("window", depth["window"], 1, self.num_sublayers, "sublayers of the backbone")
        is_static, is_sum = depth["query"] == "static", depth["mix"] == "sum"
        senseless = {
            "query='static' learns a weight per source and has no heads; set num_heads to 1": is_static
            and depth["num_heads"] != 1,
            "query='static' looks at no keys; set key_norm to true": is_static and not depth["key_norm"],
            "query='static' has no products to scale; set logit_scale to 1": is_static and scale != 1,
            "mix='gated' goes with query='learned' or 'static'; choose another mix": depth["mix"] == "gated"
            and depth["query"] == "input",
            "values='normalized' are divided by the rms of their keys; set key_norm to true": depth["values"]
            == "normalized"
            and not depth["key_norm"],
            "mix='sum' of a window is not the residual stream; choose 'mean' or 'gated'": is_sum
            and depth["window"] is not None,
            "mix='sum' of normalized values is not the residual stream; choose 'mean' or 'gated'": is_sum
            and depth["values"] == "normalized",
        }
        for message, is_so in senseless.items():
            if is_so:
                raise AttnResConfigError(f"depth_attention makes no sense: {message}.")

    def validate(self) -> None:
        """Checks the entries of `depth_attention`, then lets the backbone's configuration check its fields."""
        self.validate_depth_attention()
        super().validate()  # type: ignore[misc]

    # -- in and out ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in [`PreTrainedConfig`]; `kwargs` may also hold arguments of this class. Takes the configuration of an
        AttnRes model, or that of another decoder, which becomes the backbone with `mix="sum"`."""
        config_dict, others = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == AttnResConfig.model_type:
            return cls.from_dict(config_dict, **others)
        depth = {name: kwargs.pop(name) for name in ("depth_attention", *DEPTH_ARGUMENTS) if name in kwargs}
        returns_unused = kwargs.pop("return_unused_kwargs", False)
        backbone_config, unused = AutoConfig.from_pretrained(
            pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
        )
        config = _with_depth(backbone_config, {"mix": "sum"}, depth)
        return (config, unused) if returns_unused else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in [`PreTrainedConfig`]; `kwargs` may also hold arguments of this class."""
        if "backbone_config" in config_dict:
            raise AttnResConfigError(
                "this config.json nests the decoder's fields in `backbone_config`, as attnres 0.1 did; convert the "
                "source again with this version."
            )
        depth = {name: kwargs.pop(name) for name in ("depth_attention", *DEPTH_ARGUMENTS) if name in kwargs}
        returns_unused = kwargs.pop("return_unused_kwargs", False)
        fields = dict(config_dict)
        entry = fields.pop("depth_attention", {"mix": "sum"})
        model_type = fields.pop("model_type", None)
        model_type = fields.pop("backbone_model_type", model_type)
        _checked_entry(entry)
        is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
        if not is_known or model_type == AttnResConfig.model_type:
            raise AttnResConfigError(
                f"backbone_model_type={model_type!r} is no decoder that this version of Transformers has."
            )
        try:
            backbone_config, unused = CONFIG_MAPPING[model_type].from_dict(
                {**fields, "model_type": model_type}, return_unused_kwargs=True, **kwargs
            )
        except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
            raise AttnResConfigError(f"the fields make no {model_type} configuration: {error}") from error
        config = _with_depth(backbone_config, entry, depth)
        return (config, unused) if returns_unused else config

    def to_diff_dict(self) -> dict[str, Any]:
        return self._as_on_disk(super().to_diff_dict())

    def to_json_string(self, use_diff: bool = True) -> str:
        if use_diff:
            return super().to_json_string()
        fields = self._encode_special_floats(self._as_on_disk(self.to_dict()))
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def _as_on_disk(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "model_type": AttnResConfig.model_type, "backbone_model_type": self.model_type}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        self.validate()  # before anything is written
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_config, (self.backbone_config_class,), self.__dict__


def _depth_property(entry: str) -> property:
    def get(self: AttnResConfig) -> Any:
        return self.depth_attention[entry]

    def set_(self: AttnResConfig, value: Any) -> None:
        self.depth_attention[entry] = value

    return property(get, set_)


for _argument, _entry in DEPTH_ARGUMENTS.items():
    if _argument != "num_blocks":
        setattr(AttnResConfig, _argument, _depth_property(_entry))


@cache
def config_class_of(backbone_config_class: Any) -> type[AttnResConfig]:
    """The class of an AttnRes configuration over backbones of one class. It bears the name `AttnResConfig`, by which
    the Auto classes compare configurations with models, and which saving writes into `auto_map`."""
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": f"{AttnResConfig.__name__}[{backbone_config_class.__name__}]",
        "__doc__": AttnResConfig.__doc__,
        "__init__": AttnResConfig.__init__,
        "model_type": backbone_config_class.model_type,
        "backbone_config_class": backbone_config_class,
    }
    for name in DEPTH_ARGUMENTS:  # a field of the backbone's goes first
        if hasattr(backbone_config_class, name):
            namespace[name] = getattr(backbone_config_class, name)
    made = type(AttnResConfig.__name__, (AttnResConfig, backbone_config_class), namespace)
    _config_classes.append(made)
    for observer in _observers:
        observer(made)
    return made


_config_classes: list[type[AttnResConfig]] = []
_observers: list[Callable[[type[AttnResConfig]], None]] = []


def for_each_config_class(observer: Callable[[type[AttnResConfig]], None]) -> None:
    """Calls the observer with each class that [`config_class_of`] has made, and from now on makes."""
    _observers.append(observer)
    for made in _config_classes:
        observer(made)


def _new_config(backbone_config_class: type[PreTrainedConfig]) -> AttnResConfig:
    return object.__new__(config_class_of(backbone_config_class))  # type: ignore[arg-type]


def _with_depth(backbone_config: PreTrainedConfig, entry: dict[str, Any], arguments: dict[str, Any]) -> AttnResConfig:
    """A configuration whose `depth_attention` is `entry`, but for arguments that are not `None`."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    entry = {**entry, **_checked_entry(arguments.pop("depth_attention", {}))}
    if arguments.keys() & {"block_size", "num_blocks"}:
        entry = {name: value for name, value in entry.items() if name != "block_size"}
    return AttnResConfig(backbone_config=backbone_config, depth_attention=entry, **arguments)


def _checked_entry(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise AttnResConfigError(f"depth_attention={entry!r}; a dict of settings was expected.")
    return entry


def _depth_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of depth attention out of those of the constructor: the entries of `depth_attention`, and
    `num_blocks` if it was given."""
    depth = {**DEPTH_DEFAULTS, **_checked_entry(kwargs.pop("depth_attention", {}))}
    for argument, entry in DEPTH_ARGUMENTS.items():
        if argument in kwargs:
            value = kwargs.pop(argument)
            if value is not None or argument not in ("block_size", "num_blocks"):
                depth[entry] = value
    return depth


def _set_field(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Sets what the constructor of a configuration takes under a name that is no attribute, or converts."""
    if name in ("attn_implementation", "experts_implementation", "attn_implementation_internal"):
        name = f"_{name}"
    elif name in ("dtype", "torch_dtype"):
        name, value = "dtype", _dtype(value)
    setattr(config, name, value)


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    import torch

    return getattr(torch, value)


def _resolve_backbone_config(backbone_config: Any) -> PreTrainedConfig:
    if backbone_config is None:
        raise AttnResConfigError(
            "backbone_config=None: give the decoder's configuration (a config object, a dict with a `model_type`, "
            "or a path or Hub id)."
        )
    if isinstance(backbone_config, (str, os.PathLike)):
        try:
            backbone_config = AutoConfig.from_pretrained(backbone_config)
        except (OSError, TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
            raise AttnResConfigError(
                f"backbone_config={str(backbone_config)!r} is neither a directory with a readable config.json nor a "
                f"Hub id that can be reached: {error}"
            ) from error
    elif isinstance(backbone_config, dict):
        try:
            backbone_config = AutoConfig.for_model(**backbone_config)
        except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
            raise AttnResConfigError(
                f"backbone_config is a dict that makes no configuration (model_type="
                f"{backbone_config.get('model_type')!r}): {error}"
            ) from error
    if not isinstance(backbone_config, PreTrainedConfig):
        raise AttnResConfigError(
            f"backbone_config={backbone_config!r} is a {type(backbone_config).__name__}; allowed are a config object, "
            "a dict with a `model_type`, or a path or Hub id."
        )
    if hasattr(backbone_config, "backbone_config_class"):  # of any copy of this file
        raise AttnResConfigError("backbone_config is itself an AttnRes configuration; give the decoder's own.")
    num_hidden_layers = getattr(backbone_config, "num_hidden_layers", None)
    if isinstance(num_hidden_layers, bool) or not isinstance(num_hidden_layers, int) or num_hidden_layers < 1:
        raise AttnResConfigError(
            f"backbone_config of type {backbone_config.model_type!r} has num_hidden_layers={num_hidden_layers!r}; "
            "a decoder with at least one layer is needed."
        )
    return backbone_config


def _check_range(field: str, value: Any, low: int, high: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise AttnResConfigError(
            f"{field}={value!r} is not allowed; it must be an integer from {low} to {high}, the number of {what}."
        )


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise AttnResConfigError(f"{field}={value!r} is not allowed; choose one of {', '.join(map(repr, choices))}.")


AttnResConfig.register_for_auto_class()
if IS_INSTALLED:
    AutoConfig.register(AttnResConfig.model_type, AttnResConfig, exist_ok=True)

__all__ = ["AttnResConfig", "AttnResConfigError", "AttnResError", "UnsupportedBackboneError"]

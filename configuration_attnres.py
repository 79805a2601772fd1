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
"""Configuration of Attention Residuals (AttnRes, arXiv 2603.15031) over any decoder of Transformers."""

from __future__ import annotations

import copy
import os
from importlib import import_module
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .backbones import REFUSED, SUPPORTED, Backbone

MIXES = ("mean", "sum")
DEPTH_ATTENTION_IMPLEMENTATIONS = ("eager", "two_phase", "triton", "auto")
DEPTH_FIELDS = ("block_size", "num_blocks", "mix", "key_norm_eps", "depth_attention_implementation")
OWN_FIELDS = ("auto_map", "quantization_config")  # a backbone may have them too, but the loader looks for them here
DEFAULT_NUM_BLOCKS = 8

# False in the copy of this file that travels with a checkpoint: that one the library registers, if it is trusted.
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

    Whatever this configuration does not define itself (`hidden_size`, `num_hidden_layers`, `vocab_size`, token ids,
    `tie_word_embeddings`, `layer_types`, ...) is read from, and written to, `backbone_config`. Loaded from the
    configuration of another decoder, `from_pretrained` makes that decoder the backbone, with `mix="sum"`.

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
        key_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the RMSNorm on the keys.
        depth_attention_implementation (`str`, *optional*, defaults to `"two_phase"`):
            How depth attention is computed: `"eager"` (the reference), `"two_phase"`, `"triton"` (CUDA devices), or
            `"auto"` (`"triton"` where it runs, else `"two_phase"`). Every implementation gives the same result.

    Raises:
        AttnResConfigError: a value is out of range; the message names the field, the value and what is allowed.

    Example:

    ```python
    >>> from attnres import AttnResConfig, AttnResForCausalLM
    >>> from transformers import Qwen3Config

    >>> config = AttnResConfig(backbone_config=Qwen3Config(num_hidden_layers=28), num_blocks=8)
    >>> config.num_sublayers, config.block_size, config.num_blocks, config.num_reads
    (56, 7, 8, 57)
    >>> model = AttnResForCausalLM(config)
    ```
    """

    model_type = "attnres"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="qwen3")}
    has_no_defaults_at_init = True  # there is no default decoder
    keys_to_ignore_at_inference = ["past_key_values"]

    # Typed as what they are once the configuration is made; `None` stands for "not given".
    backbone_config: PreTrainedConfig = None  # type: ignore[assignment]
    block_size: int = None  # type: ignore[assignment]
    mix: str = "mean"
    key_norm_eps: float = 1e-6
    depth_attention_implementation: str = "two_phase"

    def __post_init__(self, num_blocks: int | None = None, **kwargs: Any) -> None:
        self.backbone_config = _resolve_backbone_config(self.backbone_config)
        if self.block_size is not None and num_blocks is not None:
            raise AttnResConfigError(
                f"block_size={self.block_size!r} and num_blocks={num_blocks!r} are both given; give exactly one."
            )
        if self.block_size is None:
            self.num_blocks = min(DEFAULT_NUM_BLOCKS, self.num_sublayers) if num_blocks is None else num_blocks
        # What belongs to the backbone is set there, not beside it.
        for name in [name for name in kwargs if self._is_backbone_field(name)]:
            setattr(self.backbone_config, name, kwargs.pop(name))
        # What a checkpoint on disk needs to be loaded by `trust_remote_code`, whichever class saved it.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_attnres.AttnResConfig",
            "AutoModel": "modeling_attnres.AttnResModel",
            "AutoModelForCausalLM": "modeling_attnres.AttnResForCausalLM",
        }
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, TypeError) as error:
            raise AttnResConfigError(f"the configuration cannot be made: {error}.") from error
        self.validate_depth_attention()
        if IS_INSTALLED:  # whoever holds a configuration may ask the Auto classes for its model
            import_module(f"{__package__}.modeling_attnres")

    # -- depth ---------------------------------------------------------------------------------------------------------

    @property
    def num_sublayers(self) -> int:
        """`int`: L, as a rule one token mixer and one MLP per decoder layer; see `backbones.py`."""
        backbone = SUPPORTED.get(self.backbone_config.model_type, Backbone())
        return backbone.sublayers_per_layer(self.backbone_config) * self.backbone_config.num_hidden_layers

    @property
    def num_reads(self) -> int:
        """`int`: R = L + 1, one read in front of each sublayer and the output read."""
        return self.num_sublayers + 1

    @property
    def num_blocks(self) -> int:
        """`int`: N = ceil(L / S). Setting it sets `block_size` to ceil(L / N)."""
        return -(-self.num_sublayers // self.block_size)

    @num_blocks.setter
    def num_blocks(self, num_blocks: int) -> None:
        _check_range("num_blocks", num_blocks, 1, self.num_sublayers, "sublayers of the backbone")
        self.block_size = -(-self.num_sublayers // num_blocks)

    def validate_depth_attention(self) -> None:
        """Raises [`AttnResConfigError`] unless every field of depth attention makes sense; also run when saving."""
        _check_range("block_size", self.block_size, 1, self.num_sublayers, "sublayers of the backbone")
        _check_choice("mix", self.mix, MIXES)
        _check_choice(
            "depth_attention_implementation", self.depth_attention_implementation, DEPTH_ATTENTION_IMPLEMENTATIONS
        )
        eps = self.key_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise AttnResConfigError(f"key_norm_eps={eps!r} is not allowed; it must be a number between 0 and 1.")

    def validate(self) -> None:
        """Of its own fields each configuration is the judge."""
        self.validate_depth_attention()
        self.backbone_config.validate()

    # -- what generic code reads answers from the backbone -------------------------------------------------------------

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns the backbone's text config, the one that describes vocabulary, heads and caches."""
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"backbone_config": config_dict, "mix": "sum", "dtype": config_dict.get("dtype")}
        # Arguments that override a depth field are checked together with the rest; `None` overrides nothing.
        given = {name: kwargs.pop(name) for name in DEPTH_FIELDS if name in kwargs}
        overrides = {name: value for name, value in given.items() if value is not None}
        if "block_size" in overrides or "num_blocks" in overrides:
            config_dict = {name: value for name, value in config_dict.items() if name != "block_size"}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        output = super().to_diff_dict()
        output["backbone_config"] = self.backbone_config.to_diff_dict()
        output["backbone_config"].pop("transformers_version", None)
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        self.validate()  # before anything is written
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Reached only when normal lookup failed. Nothing is delegated before the base class has finished its own
        # `__post_init__`, which probes for attributes in order to convert them.
        if name.startswith("_") or not self.__dict__.get("_post_init_done", False):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.backbone_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_post_init_done", False) and self._is_backbone_field(name):
            setattr(self.backbone_config, name, value)
        else:
            super().__setattr__(name, value)

    def _is_backbone_field(self, name: str) -> bool:
        is_own = name.startswith("_") or name in OWN_FIELDS or name in self.__dict__ or hasattr(type(self), name)
        return not is_own and hasattr(self.backbone_config, name)


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
    if backbone_config.model_type == AttnResConfig.model_type:
        raise AttnResConfigError(
            "backbone_config is itself an AttnRes configuration; give the decoder's own, its `backbone_config`."
        )
    if getattr(backbone_config, "quantization_config", None) is not None:
        raise AttnResConfigError(
            f"backbone_config of type {backbone_config.model_type!r} has a quantization_config, which names modules of "
            "the backbone alone; `attnres convert` makes a quantised checkpoint an AttnRes checkpoint."
        )
    num_hidden_layers = getattr(backbone_config, "num_hidden_layers", None)
    if isinstance(num_hidden_layers, bool) or not isinstance(num_hidden_layers, int) or num_hidden_layers < 1:
        raise AttnResConfigError(
            f"backbone_config of type {backbone_config.model_type!r} has num_hidden_layers={num_hidden_layers!r}; "
            "a decoder with at least one layer is needed."
        )
    return copy.deepcopy(backbone_config)  # it may be that of a model in use, whose attention would be reset with it


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

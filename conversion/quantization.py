"""Quantised checkpoints, and the dtypes that a model can be in. What a quantisation config names keeps its name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from .errors import ConversionError

_shortened = Repr()  # values from files may have megabytes
_shortened.maxstring = 200
shortened = _shortened.repr

MODEL_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def quantization_method(config: PreTrainedConfig | dict[str, Any]) -> str | None:
    """The method of a configuration's `quantization_config`, or `None` if it has none.

    Raises:
        ConversionError: it is malformed, or of a method that is not known to survive a conversion.
    """
    values = config if isinstance(config, dict) else config.__dict__
    quantization = values.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ConversionError(f"config.json: quantization_config={quantization!r}; an object was expected.")
    is_legacy = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = "bitsandbytes" if is_legacy else quantization.get("quant_method")
    if not isinstance(method, str) or method not in QUANTIZATION_METHODS:
        raise ConversionError(
            f"config.json: quantization_config has quant_method={method!r}; checkpoints quantised by "
            f"{', '.join(QUANTIZATION_METHODS)} can be converted. Convert the unquantised checkpoint and quantise the "
            "result."
        )
    _check_module_names(quantization)
    return method


def _check_module_names(quantization: dict[str, Any]) -> None:
    """Checks the fields that name modules. The loaders use most of the names as regular expressions."""
    block_name = quantization.get("block_name_to_quantize")
    if block_name is not None and not isinstance(block_name, str):
        raise ConversionError(
            f"config.json: quantization_config has block_name_to_quantize={shortened(block_name)}; a string was "
            "expected."
        )
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    for field, names in (
        *((field, quantization.get(field)) for field in MODULE_FIELDS),
        *(("targets", group.get("targets")) for group in groups if isinstance(group, dict)),
    ):
        is_list = isinstance(names, list) and len(names) <= MAX_PATTERNS
        if names is not None and not (is_list and all(_is_cheap_pattern(name) for name in names)):
            raise ConversionError(
                f"config.json: quantization_config has {field}={shortened(names)}; a list of module names was "
                f"expected. A name may be a regular expression of at most {MAX_PATTERN} characters and {MAX_REPEATS} "
                "repetitions, without repeated groups."
            )


def _is_cheap_pattern(name: Any) -> bool:
    """Whether a name is a regular expression that takes no more than polynomial time, of a low degree."""
    if not isinstance(name, str) or len(name) > MAX_PATTERN:
        return False
    pattern = name.removeprefix("re:")
    if REPEATED_GROUP.search(pattern) or len(REPEAT.findall(pattern)) > MAX_REPEATS:
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration without `quantization_config`."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    return config


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The unquantised model of a configuration, without weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(unquantized(config))
    except Exception as error:  # constructors raise anything for unexpected values
        raise ConversionError(
            f"config.json: a {config.model_type} model cannot be made of it: {type(error).__name__}: {error}"
        ) from error


# Methods whose names refer to modules and tensors of the decoder, which keep them.
QUANTIZATION_METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4", "mxfp8")

# The fields of a `quantization_config` that list modules, and what a regular expression in them may be.
MODULE_FIELDS = ("ignore", "llm_int8_skip_modules", "modules_in_block_to_quantize", "modules_to_not_convert")
MAX_PATTERNS = 20_000
MAX_PATTERN = 500
MAX_REPEATS = 4
REPEAT = re.compile(r"(?<!\\)[*+{]")
REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=")

# Methods whose weights Transformers dequantises, on every machine alike: what is compared then has no kernel in it.
DEQUANTIZED = ("bitsandbytes", "fp8", "mxfp4", "mxfp8")


def unavailable(config: PreTrainedConfig) -> str | None:
    """Why a quantised checkpoint cannot be loaded on this machine, or `None` if it can, or is not quantised.

    Raises:
        ConversionError: Transformers makes no quantiser of the `quantization_config`.
    """
    if quantization_method(config) is None:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(config.quantization_config), pre_quantized=True)
        quantizer.validate_environment(device_map={"": "cpu"}, weights_only=True)
    except (ImportError, RuntimeError) as error:
        return str(error)
    except Exception as error:  # libraries raise anything for unexpected values
        raise ConversionError(
            f"config.json: quantization_config makes no quantiser: {type(error).__name__}: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return None


def loads_on_meta(config: PreTrainedConfig) -> bool:
    """Whether Transformers can load the checkpoint on this machine's meta device."""
    return unavailable(config) is None and quantization_method(config) != "bitsandbytes"


def dequantized_while_loading(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration to load the weights of a method in `DEQUANTIZED` by, wherever they would be loaded."""
    config = copy.deepcopy(config)
    config.quantization_config["dequantize"] = True
    return config


def dequantized(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model loaded by such a configuration, in `dtype`; loading casts only a part of its tensors."""
    if getattr(model, "is_quantized", False):
        model.dequantize()
    return model.to(dtype)


def stored_dtype(config: PreTrainedConfig, num_elements: Mapping[str, int]) -> torch.dtype:
    """The dtype that a model of these weights is in: the configuration's, else the most frequent one.

    Args:
        config (`PreTrainedConfig`): the decoder's configuration.
        num_elements (mapping of `str` to `int`): how many elements are stored in each dtype, as safetensors calls it.
    """
    if isinstance(config.dtype, torch.dtype) and config.dtype in MODEL_DTYPES.values():
        return config.dtype
    candidates = [name for name in MODEL_DTYPES if num_elements.get(name)]
    return MODEL_DTYPES[max(candidates, key=num_elements.__getitem__)] if candidates else torch.float32


def modules_of(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The linear and embedding modules of a model that tensors of these names belong to."""
    modules = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    return {parent for name in names for parent in _parents(name) if parent in modules}


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]

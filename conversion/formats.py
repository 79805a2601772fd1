"""Formats of checkpoints: which are refused, with what to do instead, and what has to be known of quantised ones."""

from __future__ import annotations

import copy
import re
import zipfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from reprlib import Repr
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from ..backbones import SUPPORTED
from .errors import ConversionError

_shortened = Repr()  # of what a file says, which may be megabytes
_shortened.maxstring = 200
shortened = _shortened.repr

MODEL_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# -- what is refused ---------------------------------------------------------------------------------------------------

# Files by which a format is known, what it is, and what to do instead; asked when a directory lacks what is converted.
OTHER_FORMATS = (
    (
        "adapter_config.json",
        "a PEFT adapter",
        "Merge it into its base model (`merge_and_unload`), save that, and convert the result.",
    ),
    (
        "*.gguf",
        "GGUF weights",
        "Convert the checkpoint that they were made from, or dequantise them first: `from_pretrained(directory, "
        "gguf_file=...)`, then `save_pretrained`.",
    ),
    (
        "consolidated*",
        "weights in their authors' own layout (consolidated)",
        "Convert the edition of the model for Transformers, which has a config.json and model*.safetensors.",
    ),
    (
        "params.json",
        "a config in its authors' own layout (params.json)",
        "Convert the edition of the model for Transformers, which has a config.json and model*.safetensors.",
    ),
    (
        "pytorch_model*.bin",
        "pickled weights",
        "A pickle can run code; pass allow_pickle (--allow-pickle) to read it with `weights_only` and rewrite it as "
        "safetensors, or save the model as safetensors first.",
    ),
    ("*.pt", "pickled weights", "Save the model with `save_pretrained` and convert that."),
    ("*.pth", "pickled weights", "Save the model with `save_pretrained` and convert that."),
    ("*.bin", "pickled weights", "Save the model with `save_pretrained` and convert that."),
    ("tf_model*.h5", "TensorFlow weights", "Convert the model's PyTorch checkpoint."),
    ("*.ckpt.index", "a TensorFlow checkpoint", "Convert the model's PyTorch checkpoint."),
    ("flax_model*.msgpack", "Flax weights", "Convert the model's PyTorch checkpoint."),
    ("*.onnx", "an ONNX graph", "Convert the checkpoint that it was exported from."),
    ("*.npz", "MLX or NumPy weights", "Convert the model's PyTorch checkpoint."),
    ("*.nemo", "a NeMo archive", "Export it as a Transformers checkpoint and convert that."),
)

# What an architecture that is no decoder is, by the Auto mapping that it is in; the first that fits.
OTHER_ARCHITECTURES = (
    ("MULTIMODAL_LM", "composite"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "encoder-decoder"),
    ("SPEECH_SEQ_2_SEQ", "encoder-decoder"),
    ("MASKED_LM", "encoder"),
)
WHY_NOT = {
    "composite": "is a composite of a language model and encoders for other inputs. Extract the language model: load "
    "the whole with its own class, load the state of its language model and its head into "
    "`AutoModelForCausalLM.from_config(config.get_text_config())`, `save_pretrained` that, and convert the result.",
    "encoder-decoder": "is an encoder-decoder, and only decoders can be converted: depth attention has no form for "
    "cross-attention. Choose a decoder-only checkpoint.",
    "encoder": "is an encoder, and only decoders can be converted. Choose a decoder-only checkpoint.",
    "custom": "is not an architecture of this version of Transformers, and the code that comes with the checkpoint "
    "(auto_map) is not run. Choose a checkpoint, or a version of Transformers, that has the architecture built in.",
    "mlx": "is quantised by MLX (`quantization`), which Transformers does not load. Convert the checkpoint that it was "
    "made from.",
}


def other_format(names: Iterable[str]) -> str | None:
    """What files of these names hold, if it is a known format that is not converted, and what to do instead."""
    names = sorted(names)
    for pattern, what, instead in OTHER_FORMATS:
        if found := [name for name in names if fnmatch(name, pattern)]:
            return f"{what} ({found[0]}). {instead}"
    return None


def other_architecture(config: dict[str, Any]) -> str | None:
    """Why a config.json is not a decoder's, if it is known what it is instead, and what to do."""
    model_type = config.get("model_type")
    kind = None
    if config.get("is_encoder_decoder") is True:
        kind = "encoder-decoder"
    elif isinstance(config.get("text_config"), dict):
        kind = "composite"
    elif model_type not in SUPPORTED:
        if "auto_map" in config and model_type not in CONFIG_MAPPING_NAMES:
            kind = "custom"
        for mapping, architecture in OTHER_ARCHITECTURES:
            if kind is None and model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
                kind = architecture
    if kind is None and isinstance(config.get("quantization"), dict):
        quantization = config.get("quantization_config", {})
        if isinstance(quantization, dict) and "quant_method" not in quantization:
            kind = "mlx"
    return None if kind is None else f"{model_type!r} {WHY_NOT[kind]}"


# -- pickled weights ---------------------------------------------------------------------------------------------------


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Reads a pickled state dict without running code of it.

    Args:
        path (`Path`): a file written by `torch.save`.

    Returns:
        `dict`: contiguous tensors of which no two share memory, as safetensors needs them.

    Raises:
        ConversionError: the file is damaged, needs more than `weights_only`, or holds something else than tensors.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise ConversionError(
            f"{path} cannot be read with weights_only, and is not read otherwise: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(contents, dict) or not contents:
        raise ConversionError(f"{path} holds a {type(contents).__name__}; a dict of tensors was expected.")
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in contents.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ConversionError(f"{path}: {name!r} is a {type(tensor).__name__}; a dense tensor was expected.")
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = (
            tensor.contiguous() if storage not in seen else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(storage)
    return tensors


# -- quantisation ------------------------------------------------------------------------------------------------------


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
    except Exception as error:  # whatever a model's constructor makes of a configuration that it did not expect
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
    except Exception as error:  # whatever a library makes of values that it did not expect
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

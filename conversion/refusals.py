"""What is no checkpoint of a decoder for Transformers: how it is known, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..backbones import SUPPORTED

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

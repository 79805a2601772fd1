"""Does the converted checkpoint compute what the original does? Both are loaded from disk and compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_attnres import AttnResConfig, AttnResError
from ..modeling_attnres import AttnResForCausalLM
from .source import DEPTH_PREFIX, ConversionError, Source

VERIFICATION_MODES = ("full", "sample", "none")

# Largest logit difference allowed, in float32, as a share of the largest logit. For "sum" it is some hundred times
# the rounding seen on conversions. For "mean" of n sources, the epsilon of the norm behind weighs n^2 times as much.
TOLERANCE = {"sum": 1e-4, "mean": 1e-2}
MAX_TOKENS = 64

TEXTS = (
    "The residual connection adds the output of every layer to one running sum, so that each layer sees all that came "
    "before it with the same weight. Attention over depth lets a layer choose instead.",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot, *rest = items\n"
    "    left = [x for x in rest if x < pivot]\n    right = [x for x in rest if x >= pivot]\n"
    "    return quicksort(left) + [pivot] + quicksort(right)\n",
    "In 1869 Mendeleev ordered sixty-three elements by weight and left gaps: gallium (1875), scandium (1879) and "
    "germanium (1886) filled three of them. 3 + 4 * 12 = 51, and 2^10 = 1024.",
    "Le train part à huit heures. Der Zug kommt um neun an. 火车十点到站，请准时上车。Поезд опаздывает. ¿A qué hora?",
)


class VerificationError(AttnResError):
    """The converted checkpoint computes something else than its source; it was not delivered."""


@dataclass(frozen=True)
class Verification:
    """What a verification measured.

    Attributes:
        mode: `"full"` (the whole model) or `"sample"` (its first decoder layers).
        num_hidden_layers: how many decoder layers were run.
        sequences, tokens: how many sequences, and tokens in all, were compared.
        largest_logit: largest absolute logit of the source.
        largest_logit_difference: largest absolute difference of two logits.
        greedy_agreement: share of positions at which both give the same most likely token.
    """

    mode: str
    num_hidden_layers: int
    sequences: int
    tokens: int
    largest_logit: float
    largest_logit_difference: float
    greedy_agreement: float


def compare(source: Source, converted: Path, config: AttnResConfig, mode: str) -> Verification:
    """Compares the logits of source and result on real token sequences, in float32.

    Args:
        source (`Source`): the checkpoint that was converted.
        converted (`Path`): the directory of the result.
        config (`AttnResConfig`): the configuration of the result.
        mode (`str`): `"full"`, or `"sample"` for models that do not fit in memory.

    Raises:
        ConversionError: the model does not fit in memory; nothing was compared.
        VerificationError: tensors are missing, or the two differ by more than rounding.
    """
    num_layers: int = config.num_hidden_layers
    if mode == "sample":
        num_layers = min(num_layers, _sample_layers(config))
    else:
        _check_memory(source)
    sequences = _token_sequences(source)
    original = _load(AutoModelForCausalLM, source.directory, truncate(source.config, num_layers))
    expected = [original(input_ids=ids).logits[0] for ids in sequences]
    del original

    truncated = copy.deepcopy(config)
    truncated.backbone_config = truncate(config.backbone_config, num_layers)
    truncated.block_size = min(config.block_size, truncated.num_sublayers)
    _check_depth_tensors(converted, config)
    result = _load(AttnResForCausalLM, converted, truncated)
    actual = [result(input_ids=ids).logits[0] for ids in sequences]
    del result

    pairs = list(zip(expected, actual))
    measured = Verification(
        mode=mode,
        num_hidden_layers=num_layers,
        sequences=len(sequences),
        tokens=sum(ids.shape[1] for ids in sequences),
        largest_logit=max(logits.abs().max().item() for logits in expected),
        largest_logit_difference=max((a - b).abs().max().item() for a, b in pairs),
        greedy_agreement=torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean().item(),
    )
    allowed = TOLERANCE[config.mix] * max(1.0, measured.largest_logit)
    if not measured.largest_logit_difference <= allowed:  # also true for NaN
        raise VerificationError(
            f"the converted checkpoint differs from {source.name}: largest logit difference "
            f"{measured.largest_logit_difference:.3g}, allowed {allowed:.3g}; greedy tokens agree at "
            f"{measured.greedy_agreement:.1%} of positions. Nothing was delivered."
        )
    return measured


def truncate(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same decoder with its first `num_layers` layers only."""
    config = copy.deepcopy(config)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(layer_types := getattr(config, name, None), list):
            setattr(config, name, layer_types[:num_layers])
    config.num_hidden_layers = num_layers
    return config


def _sample_layers(config: AttnResConfig) -> int:
    """Two whole blocks and the start of a third, and at least one layer of each type."""
    sublayers_per_layer = config.num_sublayers // config.num_hidden_layers
    layers = -(-(2 * config.block_size + 1) // sublayers_per_layer)
    for name in ("layer_types", "mlp_layer_types"):
        layer_types = getattr(config, name, None) or []
        layers = max([layers, *(layer_types.index(kind) + 1 for kind in set(layer_types))])
    return layers


def _check_memory(source: Source) -> None:
    needed, available = 4 * source.num_parameters, psutil.virtual_memory().available
    if needed > available:
        raise ConversionError(
            f"verify='full' loads {source.name} in float32, {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB "
            "are free; use verify='sample', which loads its first layers."
        )


def _token_sequences(source: Source) -> list[torch.Tensor]:
    """Real text through the checkpoint's own tokenizer; a checkpoint without one gets pseudo-random tokens."""
    vocab_size = source.config.vocab_size
    if any(name.startswith(("tokeni", "vocab", "tekken", "tiktoken", "spiece")) for name in source.companions):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.directory)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ConversionError(f"the tokenizer of {source.directory} cannot be loaded: {error}") from error
        sequences = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in TEXTS]
        if (largest := max(max(ids) for ids in sequences)) >= vocab_size:
            raise ConversionError(
                f"the tokenizer of {source.directory} gives token {largest}, config.json says vocab_size={vocab_size}."
            )
        return [torch.tensor([ids]) for ids in sequences]
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, vocab_size, (len(TEXTS), 1, MAX_TOKENS), generator=generator))


def _check_depth_tensors(converted: Path, config: AttnResConfig) -> None:
    with safe_open(converted / "model-attnres.safetensors", framework="pt") as file:
        query, key_norm = (file.get_tensor(DEPTH_PREFIX + name) for name in ("query", "key_norm"))
    shape = (config.num_reads, config.hidden_size)
    if query.shape != shape or key_norm.shape != shape or query.any() or not (key_norm == 1).all():
        raise VerificationError(f"{converted}: the depth tensors are not zeros and ones of shape {shape}.")


def _load(model_class: Any, directory: Path, config: PreTrainedConfig) -> PreTrainedModel:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a truncated model finds tensors it has no use for, and fewer reads
    try:
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConversionError(f"{directory} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(f"{directory} lacks {len(missing)} tensors its config asks for, first {missing[0]!r}.")
    mismatched = sorted(str(key) for key in info["mismatched_keys"] if DEPTH_PREFIX not in str(key))
    if mismatched:
        raise ConversionError(f"{directory}: tensors whose shapes contradict config.json, first {mismatched[0]}.")
    model.requires_grad_(False)
    return model.eval()

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
from . import formats
from .errors import ConversionError
from .source import DEPTH_PREFIX, Source

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
        dtype: what both were run in.
        tokens_from: `"text"`, or `"a random generator"` if the checkpoint has no tokenizer that can be loaded.
        sequences, tokens: how many sequences, and tokens in all, were compared.
        largest_logit: largest absolute logit of the source.
        largest_logit_difference: largest absolute difference of two logits.
        greedy_agreement: share of positions at which both give the same most likely token.
    """

    mode: str
    num_hidden_layers: int
    dtype: str
    tokens_from: str
    sequences: int
    tokens: int
    largest_logit: float
    largest_logit_difference: float
    greedy_agreement: float

    def is_within(self, tolerance: float) -> bool:
        return self.largest_logit_difference <= tolerance * max(1.0, self.largest_logit)  # never for NaN


def check_complete(source: Source, converted: Path) -> None:
    """Checks names and shapes of all tensors against the configuration, without loading one.

    Where a quantiser cannot be asked, the tensors that it would take are told by their modules' own being missing.

    Raises:
        ConversionError: tensors are missing, or have other shapes than the configuration says.
    """
    config: PreTrainedConfig = AttnResConfig.from_pretrained(converted)
    if is_stored := not formats.loads_on_meta(source.config):
        config = formats.unquantized(config)
    _load(AttnResForCausalLM, converted, config, str(source.directory), "meta", as_stored=is_stored)


def compare(source: Source, converted: Path, config: AttnResConfig, mode: str) -> Verification:
    """Compares the logits of source and result on real token sequences, in float32.

    Where they differ by more than rounding, they are compared in float64 too: a token whose experts tie may be routed
    otherwise by rounding alone, which a wrong conversion would survive and a right one would not. So may an activation
    that a quantised layer rounds; weights that can be dequantised are.

    Args:
        source (`Source`): the checkpoint that was converted.
        converted (`Path`): the directory of the result.
        config (`AttnResConfig`): the configuration of the result.
        mode (`str`): `"full"`, or `"sample"` for models that do not fit in memory.

    Raises:
        ConversionError: the model does not fit in memory; nothing was compared.
        VerificationError: the two differ by more than rounding.
    """
    _check_depth_tensors(converted, config)
    measured = _compare_in(torch.float32, source, converted, config, mode)
    tolerance = TOLERANCE[config.mix]
    if not measured.is_within(tolerance) and _fits(source, torch.float64):
        measured = _compare_in(torch.float64, source, converted, config, mode)
    if not measured.is_within(tolerance):
        raise VerificationError(
            f"the converted checkpoint differs from {source.name}: largest logit difference "
            f"{measured.largest_logit_difference:.3g}, with logits up to {measured.largest_logit:.3g}; allowed are "
            f"{tolerance:.0e} of that. Greedy tokens agree at {measured.greedy_agreement:.1%} of positions. Nothing "
            "was delivered."
        )
    return measured


@torch.no_grad()
def _compare_in(dtype: torch.dtype, source: Source, converted: Path, config: AttnResConfig, mode: str) -> Verification:
    num_layers: int = config.num_hidden_layers
    if mode == "sample":
        num_layers = min(num_layers, _sample_layers(config))
    elif not _fits(source, dtype):
        raise ConversionError(
            f"verify='full' loads {source.name} in float32, {4 * source.num_parameters / 2**30:.1f} GiB, and "
            f"{psutil.virtual_memory().available / 2**30:.1f} GiB are free; use verify='sample', which loads its first "
            "layers."
        )
    tokens_from, sequences = _token_sequences(source)
    name = str(source.directory)
    original = _load(AutoModelForCausalLM, source.directory, truncate(source.config, num_layers), name, dtype=dtype)
    expected = _logits(original, sequences)
    del original

    truncated = copy.deepcopy(config)
    truncated.backbone_config = truncate(config.backbone_config, num_layers)
    truncated.block_size = min(config.block_size, truncated.num_sublayers)
    result = _load(AttnResForCausalLM, converted, truncated, name, dtype=dtype)
    actual = _logits(result, sequences)
    pairs = list(zip(expected, actual))
    return Verification(
        mode=mode,
        num_hidden_layers=num_layers,
        dtype=str(dtype).removeprefix("torch."),
        tokens_from=tokens_from,
        sequences=len(sequences),
        tokens=sum(ids.shape[1] for ids in sequences),
        largest_logit=max(logits.abs().max().item() for logits in expected),
        largest_logit_difference=max((a - b).abs().max().item() for a, b in pairs),
        greedy_agreement=torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean().item(),
    )


def _logits(model: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    try:
        return [model(input_ids=ids).logits[0] for ids in sequences]
    except Exception as error:  # a configuration that can be loaded need not be one that can be run
        raise ConversionError(f"{model.config.model_type} model cannot be run: {error}") from error


def truncate(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same decoder with its first `num_layers` layers only."""
    config = copy.deepcopy(config)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(layer_types := getattr(config, name, None), list):
            setattr(config, name, layer_types[:num_layers])
    config.num_hidden_layers = num_layers
    return config


def _sample_layers(config: AttnResConfig) -> int:
    """Two whole blocks and the start of a third, and at least one layer of each kind."""
    sublayers_per_layer = config.num_sublayers // config.num_hidden_layers
    with torch.device("meta"):
        layers: Any = AttnResForCausalLM(copy.deepcopy(config)).backbone.base_model.layers
    kinds = [tuple(type(child) for child in layer.children()) for layer in layers]
    return max([-(-(2 * config.block_size + 1) // sublayers_per_layer), *(kinds.index(kind) + 1 for kind in kinds)])


def _fits(source: Source, dtype: torch.dtype) -> bool:
    return dtype.itemsize * source.num_parameters <= psutil.virtual_memory().available


def _token_sequences(source: Source) -> tuple[str, list[torch.Tensor]]:
    """Where the tokens are from, and the sequences, each `[1, tokens]`: real text if there is a tokenizer for it."""
    vocab_size = source.config.vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False)
        ids = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in TEXTS]
    except Exception:  # whatever it is that a tokenizer may lack: the models can be compared on any tokens
        ids = []
    if ids and all(ids):
        if (largest := max(map(max, ids))) >= vocab_size:
            raise ConversionError(
                f"the tokenizer of {source.directory} gives token {largest}, config.json says vocab_size={vocab_size}."
            )
        return "text", [torch.tensor([sequence]) for sequence in ids]
    generator = torch.Generator().manual_seed(0)
    return "a random generator", list(torch.randint(vocab_size, (len(TEXTS), 1, MAX_TOKENS), generator=generator))


def _check_depth_tensors(converted: Path, config: AttnResConfig) -> None:
    with safe_open(converted / "model-attnres.safetensors", framework="pt") as file:
        query, key_norm = (file.get_tensor(DEPTH_PREFIX + name) for name in ("query", "key_norm"))
    shape = (config.num_reads, config.hidden_size)
    if query.shape != shape or key_norm.shape != shape or query.any() or not (key_norm == 1).all():
        raise VerificationError(f"{converted}: the depth tensors are not zeros and ones of shape {shape}.")


def _load(
    model_class: Any,
    directory: Path,
    config: PreTrainedConfig,
    name: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    as_stored: bool = False,
) -> PreTrainedModel:
    """Loads a model that must find every tensor it asks for. With `as_stored`, tensors of a quantiser that is not asked
    may take the place of a module's own."""
    is_dequantized = device != "meta" and formats.quantization_method(config) in formats.DEQUANTIZED
    if is_dequantized:
        config = formats.dequantized_while_loading(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a truncated model finds tensors it has no use for, and fewer reads
    try:
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            dtype="auto" if is_dequantized else dtype,
            device_map=device,
            experts_implementation="eager" if dtype == torch.float64 else None,  # the others have no float64
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a model's constructor makes of a configuration that it did not expect
        raise ConversionError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key) for key, *_ in info["mismatched_keys"] if DEPTH_PREFIX not in key)
    # Tensors that no module takes, in modules that take tensors.
    if stray := formats.modules_of(model, info["unexpected_keys"]):
        if formats.quantization_method(config) is not None:
            raise ConversionError(
                f"{name} holds quantised weights for {min(stray)!r}, which quantization_config does not quantise."
            )
        if as_stored:
            missing = [key for key in missing if key.rpartition(".")[0] not in stray]
            mismatched = [key for key in mismatched if key.rpartition(".")[0] not in stray]
    if missing:
        raise ConversionError(f"{name} lacks {len(missing)} tensors its config asks for, first {missing[0]!r}.")
    if mismatched:
        raise ConversionError(f"{name}: tensors whose shapes contradict config.json, first {mismatched[0]}.")
    return (formats.dequantized(model, dtype) if is_dequantized else model).eval()

"""Does the converted checkpoint compute what the original does? Both are loaded from disk and compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..configuration_attnres import AttnResConfig, AttnResError
from ..depth_attention import DepthAttention
from ..modeling_attnres import AttnResForCausalLM
from ..rewiring import decoder_layers
from . import quantization
from .errors import ConversionError, VerificationError
from .loading import (
    available_memory,
    check_names_apart,
    depth_names,
    load,
    load_layer_by_layer,
    meta_tensors,
    needed_memory,
)
from .source import DEPTH_SHARD, Source
from .tokenizer import TEXTS, load_tokenizer

VERIFICATION_MODES = ("full", "sample", "none")

# Largest logit difference allowed, in float32, as a share of the largest logit. For "sum" it is some hundred times
# the rounding seen on conversions. For "mean" of n sources, the epsilon of the norm behind weighs n^2 times as much.
TOLERANCE = {"sum": 1e-4, "gated": 1e-4, "mean": 1e-2}
MAX_TOKENS = 64

Config = TypeVar("Config", bound=PreTrainedConfig)


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
    """Checks names and shapes of all tensors against the configuration; reads headers only, unless they are quantised.

    Where a quantiser cannot be asked, the tensors that it would take are told by their modules' own being missing.

    Raises:
        ConversionError: tensors are missing, have other shapes than the configuration says, or stand for the same one.
        VerificationError: the result cannot be run where the source can.
    """
    config: PreTrainedConfig = AttnResConfig.from_pretrained(converted)
    if is_stored := not quantization.loads_on_meta(source.config):
        config = quantization.unquantized(config)
    tensors = converted if quantization.quantization_method(config) else meta_tensors(converted)
    load(AttnResForCausalLM, config, str(source.directory), tensors, device="meta", as_stored=is_stored)
    check_names_apart(quantization.meta_model(source.config), source.tensors, str(source.directory))
    _check_runs(source, config)


def _check_runs(source: Source, config: PreTrainedConfig) -> None:
    """Runs the models of source and result without weights. Refuses a result that does not run where the source does.

    Raises:
        VerificationError: the result cannot be run, or its logits have another shape.
    """
    try:
        expected = _shape_of_logits(AutoModelForCausalLM.from_config, source.config)
    except Exception:  # some forwards depend on values, which there are none of
        return
    name = source.name
    try:
        actual = _shape_of_logits(AttnResForCausalLM, config)
    except Exception as error:  # a wrong number of reads, for one
        raise VerificationError(
            f"the model of {name} runs, and the converted one does not: {type(error).__name__}: {error} Nothing was "
            "delivered."
        ) from error
    if actual != expected:
        raise VerificationError(
            f"the converted checkpoint differs from {name}: its logits are of shape {list(actual)}, not of "
            f"{list(expected)}. Nothing was delivered."
        )


def _shape_of_logits(make_model: Any, config: PreTrainedConfig) -> torch.Size:
    config = quantization.unquantized(config)
    config._experts_implementation = "batched_mm"  # the others depend on values, or on the dtype
    with FakeTensorMode(), torch.no_grad():
        model = make_model(config).eval()
        return model(input_ids=torch.ones(2, 9, dtype=torch.long), use_cache=False).logits.shape


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
    tolerance = TOLERANCE[config.depth_attention["mix"]]
    if not measured.is_within(tolerance) and _fits(source, torch.float64, mode):
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
    if not _fits(source, dtype, mode):
        raise ConversionError(
            f"verify={mode!r} loads {source.name} in float32, "
            f"{needed_memory(source, dtype, mode == 'sample') / 2**30:.1f} GiB, and {available_memory() / 2**30:.1f} "
            "GiB are free; use "
            + ("verify='sample', which loads its first layers, one at a time." if mode == "full" else "verify='none'.")
        )
    load_model = load_layer_by_layer if mode == "sample" else load
    tokens_from, sequences = _token_sequences(source)
    name = str(source.directory)
    original = load_model(
        MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)],
        truncate(source.config, num_layers),
        name,
        source.directory,
        dtype,
    )
    if mode == "full":
        _check_finite(original, source.name)
    expected = _logits(original, sequences)
    _check_informative(expected, source.name)
    del original

    truncated = truncate(config, num_layers)
    truncated.depth_attention["block_size"] = min(config.depth_attention["block_size"], truncated.num_sublayers)
    result = load_model(AttnResForCausalLM, truncated, name, converted, dtype)
    actual = _logits(result, sequences)
    pairs = list(zip(expected, actual))
    return Verification(
        mode=mode,
        num_hidden_layers=num_layers,
        dtype=str(dtype).removeprefix("torch."),
        tokens_from=tokens_from,
        sequences=len(sequences),
        tokens=sum(len(ids) for ids in sequences),
        largest_logit=max(logits.abs().max().item() for logits in expected),
        largest_logit_difference=max((a - b).abs().max().item() for a, b in pairs),
        greedy_agreement=torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean().item(),
    )


def _logits(model: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of all sequences in one forward: what pads a sequence on the right, a causal model does not see."""
    input_ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    except AttnResError:
        raise
    except Exception as error:  # a configuration that can be loaded need not be one that can be run
        raise ConversionError(f"{model.config.model_type} model cannot be run: {error}") from error
    return [row[: len(ids)] for row, ids in zip(logits, sequences)]


def _check_finite(model: PreTrainedModel, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        values = parameter.float() if parameter.dtype.itemsize == 1 else parameter  # float8 has no `isfinite`
        if not values.isfinite().all():
            raise ConversionError(
                f"{name}: tensor {parameter_name!r} holds values that are not finite (NaN or infinity), so there is "
                "nothing to compare with. Fetch or train the checkpoint again."
            )


def _check_informative(logits: list[torch.Tensor], name: str) -> None:
    """Refuses logits of the source with which any result would agree, or none."""
    if not all(row.isfinite().all() for row in logits):
        what = "are not finite (NaN or infinity)"
    elif all(bool((row == logits[0][0, 0]).all()) for row in logits):
        what = f"are all {logits[0][0, 0].item():g}"
    else:
        return
    raise ConversionError(
        f"{name}: the logits of its model {what}, so there is nothing to compare with. Look at its config.json and its "
        "weights."
    )


def truncate(config: Config, num_layers: int) -> Config:
    """The same decoder with its first `num_layers` layers only."""
    config = copy.deepcopy(config)
    if num_layers == config.num_hidden_layers:
        return config
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # one entry for each layer
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    return config


def _sample_layers(config: AttnResConfig) -> int:
    """Two whole blocks and the start of a third, and at least one layer of each kind."""
    sublayers_per_layer = config.num_sublayers // config.num_hidden_layers
    with torch.device("meta"):
        layers = decoder_layers(AttnResForCausalLM(copy.deepcopy(config)))
    kinds = [tuple(type(child) for child in layer.children()) for layer in layers]
    return max(
        [
            -(-(2 * config.depth_attention["block_size"] + 1) // sublayers_per_layer),
            *(kinds.index(kind) + 1 for kind in kinds),
        ]
    )


def _fits(source: Source, dtype: torch.dtype, mode: str) -> bool:
    return needed_memory(source, dtype, layer_by_layer=mode == "sample") <= available_memory()


def _token_sequences(source: Source) -> tuple[str, list[torch.Tensor]]:
    """Where the tokens are from, and the sequences, each `[tokens]`: real text if there is a tokenizer for it."""
    vocab_size = source.config.vocab_size
    tokenizer = load_tokenizer(source.directory)
    ids = [] if tokenizer is None else [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in TEXTS]
    if ids and all(ids):
        if (largest := max(map(max, ids))) >= vocab_size:
            raise ConversionError(
                f"the tokenizer of {source.directory} gives token {largest}, config.json says vocab_size={vocab_size}."
            )
        return "text", [torch.tensor(sequence) for sequence in ids]
    generator = torch.Generator().manual_seed(0)
    return "a random generator", list(torch.randint(vocab_size, (len(TEXTS), MAX_TOKENS), generator=generator))


def _check_depth_tensors(converted: Path, config: AttnResConfig) -> None:
    with safe_open(converted / DEPTH_SHARD, framework="pt") as file:
        tensors = {name: file.get_tensor(on_disk) for name, on_disk in depth_names(config, str(converted)).items()}
    for name, parameter in DepthAttention.from_config(config).named_parameters():
        tensor, start = tensors[name], float(name == "key_norm")
        if tensor.shape != parameter.shape or not (tensor == start).all():
            raise VerificationError(
                f"{converted / DEPTH_SHARD}: the tensor {name!r} is not what a retrofit starts with, {start:g} "
                f"everywhere, of shape {list(parameter.shape)}."
            )

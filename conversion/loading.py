"""Loading models to verify a conversion: whole, layer by layer, or only the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging

from ..configuration_attnres import AttnResConfig, AttnResError
from ..modeling_attnres import AttnResForCausalLM
from ..rewiring import decoder_layers
from . import quantization
from .errors import ConversionError
from .source import DEPTH_MODULE, DTYPES, Source, read_header, read_index


def load(
    model_class: Any,
    config: PreTrainedConfig,
    name: str,
    source: Path | dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    stored_dtype: torch.dtype | None = None,
    as_stored: bool = False,
    is_exact: bool = False,
) -> PreTrainedModel:
    """Loads a model in evaluation mode and checks that nothing was missing. Quantised weights are dequantised, if that
    is the same on every machine.

    Args:
        model_class: of the model, no Auto class.
        config (`PreTrainedConfig`): of the model; it may have fewer layers than the checkpoint.
        name (`str`): what errors call the checkpoint.
        source (`Path` or `dict[str, torch.Tensor]`): directory of the checkpoint, or tensors by their names there.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the model.
        device (`str`, *optional*, defaults to `"cpu"`): of the model.
        stored_dtype (`torch.dtype`, *optional*): to load in before converting to `dtype`, for less memory.
        as_stored (`bool`, *optional*, defaults to `False`):
            Tensors of a quantiser that is not asked may take the place of a module's own.
        is_exact (`bool`, *optional*, defaults to `False`): there may be no tensors that the model does not ask for.

    Raises:
        ConversionError: the model cannot be made, or tensors are missing, too many, or of other shapes than it needs.
    """
    is_dequantized = device != "meta" and quantization.quantization_method(config) in quantization.DEQUANTIZED
    if is_dequantized:
        config = quantization.dequantized_while_loading(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a truncated model finds tensors it has no use for, and fewer reads
    is_directory = isinstance(source, Path)
    try:
        model, info = model_class.from_pretrained(
            source if is_directory else None,
            state_dict=None if is_directory else source,
            config=config,
            dtype="auto" if is_dequantized else stored_dtype or dtype,
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
    mismatched = sorted(
        str(key) for key, *_ in info["mismatched_keys"] if is_exact or DEPTH_MODULE not in str(key).split(".")
    )
    if is_exact and (unexpected := sorted(info["unexpected_keys"])):
        raise ConversionError(
            f"{name} has {len(unexpected)} tensors its config does not ask for, first {unexpected[0]!r}."
        )
    # Tensors that no module takes, in modules that take tensors.
    if stray := quantization.modules_of(model, info["unexpected_keys"]):
        if quantization.quantization_method(config) is not None:
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
    if is_dequantized:
        return quantization.dequantized(model, dtype).eval()
    return nn.Module.to(model, dtype).eval() if stored_dtype else model.eval()


def depth_names(config: AttnResConfig, source: str) -> dict[str, str]:
    """The names of the depth parameters of a causal language model on disk, by their names in [`DepthAttention`].

    They are those in its state dict, renamed as the library renames the tensors of its architecture when it saves them.

    Raises:
        ConversionError: the configuration makes no model; the message names the `source`.
    """
    try:
        with torch.device("meta"):
            model: Any = AttnResForCausalLM(quantization.unquantized(config))  # type: ignore[arg-type]
    except AttnResError:
        raise
    except Exception as error:  # whatever a model's constructor makes of a configuration that it did not expect
        raise ConversionError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error
    tensors = {name: tensor for name, tensor in model.state_dict().items() if DEPTH_MODULE in name.split(".")}
    return {name.rpartition(".")[2]: name for name in revert_weight_conversion(model, tensors)}


def check_names_apart(model: PreTrainedModel, names: Iterable[str], source: str) -> None:
    """Checks that no two tensors of a checkpoint are loaded into the same parameter. Loading would take the last.

    Args:
        model (`PreTrainedModel`): of the checkpoint; it needs no weights.
        names (iterable of `str`): the names of the tensors of the checkpoint.
        source (`str`): what errors call the checkpoint.

    Raises:
        ConversionError: two are; the message names them.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, parameters = model.base_model_prefix, model.state_dict()
    taken: defaultdict[str, dict[str, str]] = defaultdict(dict)  # by parameter, then by the part of it; "" is all of it
    for name in sorted(names):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters:
            continue
        parts = taken[parameter]
        part = "" if pattern is None else rename_source_key(name, renamings, [])[0].removeprefix(f"{prefix}.")
        others = [other for other in parts if "" in (part, other) or part == other]
        if others:
            raise ConversionError(
                f"{source} holds {name!r} and {parts[others[0]]!r}, which are loaded into the same parameter "
                f"{parameter!r}; remove the wrong one."
            )
        parts[part] = name


def meta_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their names, on the meta device: what the headers say, and no data."""
    return {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        for shard in read_index(directory)[0]
        for name, info in read_header(directory / shard).items()
    }


def load_layer_by_layer(
    model_class: Any, config: PreTrainedConfig, name: str, directory: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Loads a model whose decoder layers are in memory, and read from disk, only while they run.

    So memory is bounded by what lies outside the layers and the largest of them, whatever the size of the model. Each
    forward loads each layer anew. Arguments and errors are those of [`load`].
    """

    def load_part(index: int | None) -> Any:
        part = _with_only(model_class, index)
        try:
            return load(part, config, name, directory, dtype, stored_dtype=_stored_dtype(config))
        except ConversionError as error:
            raise ConversionError(
                f"{error} verify='sample' loads its first decoder layers alone, one at a time, which not every "
                "architecture can do; use verify='full' or verify='none'."
            ) from error

    def run_layer(index: int, *args: Any, **kwargs: Any) -> Any:
        model = load_part(index)
        output = decoder_layers(model)[index].forward(*args, **kwargs)
        nn.Module.to(model, "meta")  # frees the weights now, whatever still refers to the model
        return output

    if issubclass(model_class, AttnResForCausalLM):
        model_class = model_class.of_backbone(config)
    model = load_part(None)
    for index, layer in enumerate(decoder_layers(model)):
        layer.forward = partial(run_layer, index)
    return model


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _with_only(model_class: Any, index: int | None) -> Any:
    """The same class, with no modules but the decoder layer of that index; without one, all but those in layers."""

    class Part(model_class):
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            layers = decoder_layers(self)
            if index is None:
                for layer in layers:
                    _empty(layer)
                return
            path = next(path for path, module in self.named_modules() if module is layers)
            module: Any = self
            for child in (*path.split("."), str(index)):
                _empty(module, keep=child)
                module = getattr(module, child)
            self.all_tied_weights_keys: dict[str, str] = {}  # nothing is left that could share weights

    for attribute in ("__name__", "__qualname__", "__module__"):  # by which renamings of tensors are found
        setattr(Part, attribute, getattr(model_class, attribute))
    return Part


def _empty(module: nn.Module, keep: str | None = None) -> None:
    for name, _ in list(module.named_children()):
        if name != keep:
            setattr(module, name, nn.Identity())


def layer_number(tensor: str) -> int | None:
    """The decoder layer that a tensor belongs to: the first number in its name."""
    number = re.search(r"\.(\d+)\.", tensor)
    return int(number[1]) if number else None


def needed_memory(source: Source, dtype: torch.dtype, layer_by_layer: bool) -> int:
    """Bytes of the parameters that are in memory at once."""
    if not layer_by_layer:
        return dtype.itemsize * source.num_parameters
    sizes: Counter[int | None] = Counter()
    for name, info in source.infos.items():
        sizes[layer_number(name)] += info.num_elements
    outside = sizes.pop(None, 0)
    stored = _stored_dtype(source.config).itemsize
    # While experts are merged there are two and a half copies of them, later one of each dtype.
    return outside * dtype.itemsize + max(sizes.values(), default=0) * max(5 * stored // 2, stored + dtype.itemsize)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of free memory: of the machine, or of a control group (v1 or v2) that holds this process, if that is less.

    What a group's page cache takes counts as free, as it does for the machine.
    """
    available = psutil.virtual_memory().available
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, limit_name, usage_name, cache_name = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit_name, usage_name, cache_name = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = Path(name.lstrip("/"))
        for parent in (group, *group.parents):  # each may have a limit; in a container, only the last is to be seen
            directory = root / mount / parent
            if (directory / limit_name).is_file() and (limit := (directory / limit_name).read_text().strip()) != "max":
                stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                used = int((directory / usage_name).read_text()) - int(stat.get(cache_name, 0))
                available = min(available, max(0, int(limit) - used))
    return available

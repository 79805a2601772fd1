"""Reading a checkpoint to convert: its config, its index and the headers of its shards, never its weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..configuration_attnres import AttnResConfig, supported_backbone
from . import formats
from .errors import ConversionError

# What comes along with the weights, as it is: tokenizer (with its code, if it has any), chat template, generation
# config and licence. A model card does not: it describes another model, and only its metadata are inherited.
COMPANIONS = (
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template*",
    "generation_config.json",
    "LICENCE*",
    "LICENSE*",
    "merges.txt",
    "NOTICE*",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenization_*.py",
    "tokenizer*.json",
    "tokenizer.model*",
    "USE_POLICY*",
    "vocab.*",
)
DEPTH_PREFIX = "depth_attention."


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Source:
    """A checkpoint directory that has been found fit for conversion.

    Attributes:
        directory: where it lies.
        name: what to call it in reports: the Hub id, or the name of the directory.
        config: the decoder's configuration.
        shards: safetensors files by their name in `directory`.
        tensors: name of every tensor, and the shard that holds it.
        infos: name of every tensor, and what the header says of it.
        companions: tokenizer, templates, generation config and licence, relative to `directory`.
        pickles: pickled files by their name in `directory`, in place of `shards`; nothing is known yet of what they
            hold, except `tensors` if there is an index.
    """

    directory: Path
    name: str
    config: PreTrainedConfig
    shards: tuple[str, ...]
    tensors: dict[str, str]
    infos: dict[str, TensorInfo]
    companions: tuple[str, ...]
    pickles: tuple[str, ...] = ()

    @cached_property
    def num_parameters(self) -> int:
        if formats.quantization_method(self.config) is not None:  # several to an element, and scales beside them
            return formats.meta_model(self.config).num_parameters()
        return self.num_elements.total()

    @property
    def num_elements(self) -> Counter[str]:
        """How many elements are stored in each dtype."""
        count: Counter[str] = Counter()
        for info in self.infos.values():
            count[info.dtype] += info.num_elements
        return count

    @property
    def num_bytes(self) -> int:
        return sum((self.directory / shard).stat().st_size for shard in self.shards)


def open_source(source: str | os.PathLike, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """Finds a checkpoint and checks that it can be converted.

    Args:
        source (`str` or `Path`): a local directory, or a Hub id, which is downloaded to the Hub's cache.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        allow_pickle (`bool`, *optional*, defaults to `False`): take pickled weights if there are no safetensors.

    Raises:
        ConversionError: it is missing, incomplete, of another format or of a kind that cannot be converted.
        UnsupportedBackboneError: its architecture is not supported.
    """
    try:
        directory = _find(Path(source), revision, allow_pickle)
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"source {source!r} is no path and no Hub id: {error}") from error
    config = _read_config(directory)
    shards, tensors = read_index(directory, allow_pickle)
    pickles = tuple(shard for shard in shards if shard.endswith(".bin"))
    infos = {} if pickles else read_headers(directory, shards, tensors)
    if taken := [name for name in infos if name.startswith(DEPTH_PREFIX)]:
        raise ConversionError(f"{directory / tensors[taken[0]]} holds {taken[0]!r}, a name that AttnRes needs.")
    name = directory.resolve().name if Path(source).exists() else str(source)
    shards = () if pickles else shards
    return Source(directory, name, config, shards, tensors, infos, find_companions(directory), pickles)


def find_companions(directory: Path) -> tuple[str, ...]:
    """The files of `COMPANIONS` in a checkpoint, relative to its directory."""
    companions = sorted(
        path.relative_to(directory).as_posix()
        for pattern in COMPANIONS
        for path in directory.glob(pattern)
        if path.is_file() and not fnmatch(path.name, "*.safetensors*")
    )
    return tuple(companions)


def _find(path: Path, revision: str | None, allow_pickle: bool) -> Path:
    source = str(path)
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"revision={revision!r} is for Hub ids; source {source!r} is a directory.")
        return path
    if path.exists():
        if reason := formats.other_format([path.name]):
            raise ConversionError(f"source {source!r} is {reason}")
        raise ConversionError(f"source {source!r} is a file; give the directory of a checkpoint, or a Hub id.")
    if path.is_absolute() or len(path.parts) > 2 or source.startswith((".", "~")):
        raise ConversionError(f"source {source!r} does not exist; give the directory of a checkpoint, or a Hub id.")
    try:
        patterns = ["config.json", "adapter_config.json", "README.md", SAFE_WEIGHTS_INDEX_NAME, *COMPANIONS]
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        shards = [SAFE_WEIGHTS_NAME]  # and no other: repositories hold the same weights in several formats
        if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
            shards += read_index(directory)[0]
        elif allow_pickle and not (directory / SAFE_WEIGHTS_NAME).is_file():
            shards += [WEIGHTS_INDEX_NAME, "pytorch_model*.bin"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*patterns, *shards]))
    except HFValidationError as error:
        raise ConversionError(f"source {source!r} is neither a directory nor a Hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConversionError(
            f"source {source!r} is not a directory here, and could not be fetched from the Hub: {reason} "
            "Check the name, the network and, for a gated model, `hf auth login`."
        ) from error


def _read_config(directory: Path) -> PreTrainedConfig:
    config_file = directory / "config.json"
    if (directory / "adapter_config.json").exists():  # which is loaded together with weights that are beside it
        raise ConversionError(f"{directory} holds {formats.other_format(['adapter_config.json'])}")
    if not config_file.is_file():
        reason = formats.other_format(path.name for path in directory.iterdir())
        raise ConversionError(
            f"{directory} has no config.json; it is not a Transformers checkpoint."
            + (f" It holds {reason}" if reason else "")
        )
    config_dict = read_json(config_file)
    model_type = config_dict.get("model_type")
    if not isinstance(model_type, str):
        raise ConversionError(
            f"{config_file}: model_type={model_type!r}; a string was expected. This is not the config of a "
            "Transformers model: convert the edition of the model for Transformers."
        )
    if model_type == AttnResConfig.model_type:
        raise ConversionError(f"{directory} is an AttnRes checkpoint already; there is nothing to convert.")
    if reason := formats.other_architecture(config_dict):
        raise ConversionError(f"{config_file}: {reason}")
    supported_backbone(model_type)
    architectures = config_dict.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"{config_file}: architectures={architectures!r}; a list of class names was expected.")
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise ConversionError(
            f"{config_file}: architectures={architectures}; only causal language models (...ForCausalLM) can be "
            "converted."
        )
    formats.quantization_method(config_dict)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConversionError(f"{config_file} makes no {model_type} configuration: {error}") from error
    if config.dtype is not None and config.dtype not in formats.DEPTH_DTYPES.values():  # float8 makes no model
        raise ConversionError(
            f"{config_file}: dtype={config.dtype!r}; a floating-point dtype of 16 bits or more is needed."
        )
    return config


def read_index(directory: Path, allow_pickle: bool = False) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the shards, and for each tensor name the shard that holds it, in the order the loader looks. Of a single
    pickled file the names are not known."""
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        with _open_shard(directory / SAFE_WEIGHTS_NAME) as file:
            return (SAFE_WEIGHTS_NAME,), dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    index_file = directory / SAFE_WEIGHTS_INDEX_NAME
    suffix = ".safetensors"
    if not index_file.is_file() and allow_pickle:
        if (directory / WEIGHTS_NAME).is_file():
            return (WEIGHTS_NAME,), {}
        index_file = directory / WEIGHTS_INDEX_NAME
        suffix = ".bin"
    if not index_file.is_file():
        reason = formats.other_format(path.name for path in directory.iterdir())
        raise ConversionError(
            f"{directory} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}."
            + (f" It holds {reason}" if reason else "")
        )
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index_file}: weight_map is missing or empty.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(suffix):
            raise ConversionError(f"{index_file}: tensor {name!r} is in {shard!r}, which is no {suffix[1:]} file name.")
    return tuple(sorted(set(weight_map.values()))), weight_map


def read_headers(directory: Path, shards: tuple[str, ...], tensors: dict[str, str]) -> dict[str, TensorInfo]:
    """Returns what the shards' headers say of each tensor, after checking that they and the index agree."""
    infos: dict[str, TensorInfo] = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            raise ConversionError(f"{path} is named by {SAFE_WEIGHTS_INDEX_NAME} but missing; fetch it again.")
        with _open_shard(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if tensors.get(name) != shard:
                    raise ConversionError(f"{path} holds tensor {name!r}, which the index puts in {tensors.get(name)}.")
                tensor = file.get_slice(name)
                infos[name] = TensorInfo(tuple(tensor.get_shape()), tensor.get_dtype())
    if missing := sorted(set(tensors) - set(infos)):
        raise ConversionError(
            f"{directory / tensors[missing[0]]} lacks tensor {missing[0]!r}, which the index puts there"
            + (f" ({len(missing)} tensors are missing in all)." if len(missing) > 1 else ".")
        )
    return infos


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is not a whole safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, or says what is wrong with the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a JSON {type(value).__name__}; an object was expected.")
    return value

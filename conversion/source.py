"""Reading a checkpoint to convert: its config, its index and the headers of its shards, never its weights.

Nothing in a checkpoint is trusted. A file is read only if it is a regular one that lies in the directory, also behind
links; the Hub's cache is the exception, where a snapshot may link to the blobs of its own repository.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_utils import str_to_torch_dtype
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..checkpoint_files import DEPTH_MODULE, MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_UNUSED
from ..configuration_attnres import AttnResConfig, supported_backbone
from . import quantization, refusals
from .confinement import try_out
from .errors import ConversionError
from .tokenizer import MORE_TEXTS, TEXTS, TOKENIZER_CONFIG, load_tokenizer

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
CARD = "README.md"
DEPTH_SHARD = "model-attnres.safetensors"

# What a file may claim: bytes of an index, a header or a companion, decoder layers, and dimensions of a tensor (as many
# as torch has).
MAX_FILE_BYTES = MAX_JSON_BYTES
MAX_LAYERS = 1000
MAX_DIMENSIONS = 64

# By their names in safetensors; complex and scale dtypes are ones that Transformers loads but does not list.
DTYPES = {**str_to_torch_dtype, "C64": torch.complex64, "F8_E8M0": torch.float8_e8m0fnu}

OTHER_FILES = {"configuration_files", "transformers_weights"}

_repr = quantization.shortened


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


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
        copies: a directory of our own, with copies of config.json, the companions and the card.
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
    copies: tempfile.TemporaryDirectory[str]
    pickles: tuple[str, ...] = ()

    @property
    def files(self) -> Path:
        """Where the libraries read whatever is no weights: they open files by names that other files give."""
        return Path(self.copies.name)

    @cached_property
    def num_parameters(self) -> int:
        if (
            quantization.quantization_method(self.config) is not None
        ):  # stored elements hold several weights, and there are scales
            return quantization.meta_model(self.config).num_parameters()
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
        directory = find_checkpoint(Path(source), revision, allow_pickle)
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"source {_repr(source)} is no path and no Hub id: {error}") from error
    try:
        return _open(source, directory, allow_pickle)
    except OSError as error:  # the directory cannot be listed
        raise ConversionError(f"{directory} cannot be read: {error}") from error


def _open(source: str | os.PathLike, directory: Path, allow_pickle: bool) -> Source:
    config = _read_config(directory)
    shards, tensors = read_index(directory, allow_pickle)
    pickles = tuple(shard for shard in shards if shard.endswith(".bin"))
    for pickled in pickles:
        regular_file(directory / pickled, directory)
    infos = {} if pickles else read_headers(directory, shards, tensors)
    if not pickles:
        check_names_free(directory, tensors)
        check_sizes(directory, config, infos)
    name = directory.resolve().name if Path(source).exists() else str(source)
    copies = tempfile.TemporaryDirectory()
    companions = copy_companions(directory, Path(copies.name))
    copy_file(directory / "config.json", Path(copies.name) / "config.json", directory)
    _check_tokenizer_files(Path(copies.name))
    if os.path.lexists(directory / CARD):
        with suppress(ConversionError):  # a card that is a FIFO or lies elsewhere is not read
            copy_file(directory / CARD, Path(copies.name) / CARD, directory)
    found = Source(directory, name, config, () if pickles else shards, tensors, infos, companions, copies, pickles)
    try_out(f"{directory}: the tokenizer", partial(_try_tokenizer, found.files))
    try_out(f"{directory / 'config.json'}: the model", partial(quantization.meta_model, config))
    return found


def find_checkpoint(path: Path, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The directory of a checkpoint: the path itself, or what was downloaded to the Hub's cache."""
    source = str(path)
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"revision={revision!r} is for Hub ids; source {source!r} is a directory.")
        return path
    if path.exists():
        if reason := refusals.other_format([path.name]):
            raise ConversionError(f"source {source!r} is {reason}")
        raise ConversionError(f"source {source!r} is a file; give the directory of a checkpoint, or a Hub id.")
    if path.is_absolute() or len(path.parts) > 2 or source.startswith((".", "~")):
        raise ConversionError(f"source {source!r} does not exist; give the directory of a checkpoint, or a Hub id.")
    try:
        patterns = ["config.json", "adapter_config.json", "README.md", SAFE_WEIGHTS_INDEX_NAME, *COMPANIONS]
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        shards = [SAFE_WEIGHTS_NAME]  # only these, because repositories hold the same weights in several formats
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
    if os.path.lexists(directory / "adapter_config.json"):  # the library would load it together with the weights
        raise ConversionError(f"{directory} holds {refusals.other_format(['adapter_config.json'])}")
    if not os.path.lexists(config_file):
        reason = refusals.other_format(path.name for path in directory.iterdir())
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
    if reason := refusals.other_architecture(config_dict):
        raise ConversionError(f"{config_file}: {reason}")
    supported_backbone(model_type)
    architectures = config_dict.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"{config_file}: architectures={architectures!r}; a list of class names was expected.")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if architectures and expected not in architectures and not any(a.endswith("ForCausalLM") for a in architectures):
        raise ConversionError(
            f"{config_file}: architectures={architectures}; only causal language models, here {expected}, can be "
            "converted."
        )
    quantization.quantization_method(config_dict)
    _check_num_layers(config_file, config_dict)
    for field in OTHER_FILES & config_dict.keys():  # the library would read these files, which are not checked
        raise ConversionError(f"{config_file}: {field}={_repr(config_dict[field])} names other files; remove it.")
    make_config = partial(_make_config, config_dict)
    try_out(f"{config_file}: the configuration", make_config)
    try:
        config = make_config()
    except Exception as error:  # constructors raise anything for unexpected values
        raise ConversionError(f"{config_file} makes no {model_type} configuration: {error}") from error
    if config.dtype is not None and config.dtype not in quantization.MODEL_DTYPES.values():  # float8 is for storage
        raise ConversionError(
            f"{config_file}: dtype={config.dtype!r}; a floating-point dtype of 16 bits or more is needed."
        )
    return config


def _make_config(config_dict: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that the library reads from a file with these fields. Numbers that JSON does not have, such as
    infinity, are objects there."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config_dict), encoding="utf-8")
        return CONFIG_MAPPING[config_dict["model_type"]].from_pretrained(directory)


def _check_num_layers(config_file: Path, config_dict: dict[str, Any]) -> None:
    """Before a configuration is made, which lists the type of each layer."""
    alias = CONFIG_MAPPING[config_dict["model_type"]].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for field in {"num_hidden_layers", alias} & config_dict.keys():
        value = config_dict[field]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LAYERS:
            raise ConversionError(
                f"{config_file}: {field}={_repr(value)}; an integer from 1 to {MAX_LAYERS} was expected."
            )


def check_names_free(directory: Path, tensors: dict[str, str]) -> None:
    """Refuses tensors, or a shard, of a name that the depth parameters get."""
    for name, shard in tensors.items():
        if DEPTH_MODULE in name.split(".") or shard == DEPTH_SHARD:
            raise ConversionError(f"{directory / shard} holds {_repr(name)}, a name that AttnRes needs.")


def check_sizes(directory: Path, config: PreTrainedConfig, infos: dict[str, TensorInfo]) -> None:
    """Refuses sizes far beyond those of the tensors, before a model of these sizes is made."""
    config_file = directory / "config.json"
    if config.num_hidden_layers > len(infos):
        raise ConversionError(
            f"{config_file}: num_hidden_layers={config.num_hidden_layers}, but there are only {len(infos)} tensors."
        )
    filled = [info for info in infos.values() if info.num_elements]  # an empty tensor proves no size
    if not any(config.hidden_size in info.shape for info in filled):
        raise ConversionError(f"{config_file}: hidden_size={_repr(config.hidden_size)}, but no tensor has that size.")
    for field, value in config.to_dict().items():
        # Limits of a time step may be infinite.
        if isinstance(value, float) and not math.isfinite(value) and not field.startswith("time_step"):
            raise ConversionError(f"{config_file}: {field}={value}; a finite number was expected.")
    if config.hidden_size * config.num_hidden_layers > sum(info.num_elements for info in filled):
        raise ConversionError(
            f"{config_file}: num_hidden_layers={config.num_hidden_layers} of hidden_size={config.hidden_size} need "
            "more than all tensors hold."
        )
    largest = max(MAX_UNUSED, *(max(info.shape, default=0) for info in filled))
    for field, value in config.to_dict().items():
        if (field.startswith("num_") or field.endswith("_dim")) and isinstance(value, int) and value > largest:
            raise ConversionError(
                f"{config_file}: {field}={_repr(value)}; with these tensors at most {largest} makes sense."
            )


def read_index(directory: Path, allow_pickle: bool = False) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the shards, and for each tensor name the shard that holds it, in the order the loader looks. Of a single
    pickled file the names are not known."""
    if os.path.lexists(directory / SAFE_WEIGHTS_NAME):
        names = read_header(directory / SAFE_WEIGHTS_NAME)
        return (SAFE_WEIGHTS_NAME,), dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    index_file = directory / SAFE_WEIGHTS_INDEX_NAME
    suffix = ".safetensors"
    if not os.path.lexists(index_file) and allow_pickle:
        if os.path.lexists(directory / WEIGHTS_NAME):
            return (WEIGHTS_NAME,), {}
        index_file = directory / WEIGHTS_INDEX_NAME
        suffix = ".bin"
    if not os.path.lexists(index_file):
        reason = refusals.other_format(path.name for path in directory.iterdir())
        raise ConversionError(
            f"{directory} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}."
            + (f" It holds {reason}" if reason else "")
        )
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index_file}: weight_map is missing or empty.")
    for name, shard in weight_map.items():
        _check_tensor_name(index_file, name)
        is_name = isinstance(shard, str) and shard.isprintable() and shard == Path(shard).name and len(shard) < 256
        if not is_name or not shard.endswith(suffix):
            raise ConversionError(
                f"{index_file}: tensor {_repr(name)} is in {_repr(shard)}, which is no {suffix[1:]} file name."
            )
    return tuple(sorted(set(weight_map.values()))), weight_map


def read_headers(directory: Path, shards: tuple[str, ...], tensors: dict[str, str]) -> dict[str, TensorInfo]:
    """Returns what the shards' headers say of each tensor, after checking that they and the index agree."""
    infos: dict[str, TensorInfo] = {}
    for shard in shards:
        path = directory / shard
        if not os.path.lexists(path):
            raise ConversionError(f"{path} is named by {SAFE_WEIGHTS_INDEX_NAME} but missing; fetch it again.")
        header = read_header(path)
        for name in header:
            if tensors.get(name) != shard:
                raise ConversionError(
                    f"{path} holds tensor {_repr(name)}, which the index puts in {tensors.get(name)}."
                )
        infos |= header
    if missing := sorted(set(tensors) - set(infos)):
        raise ConversionError(
            f"{directory / tensors[missing[0]]} lacks tensor {_repr(missing[0])}, which the index puts there"
            + (f" ({len(missing)} tensors are missing in all)." if len(missing) > 1 else ".")
        )
    return infos


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What the header of a safetensors file says, by the safetensors library.

    The library also checks that the tensors fill the file without gap or overlap. It takes the last of two tensors of
    one name, and names, dtypes and numbers of dimensions that torch does not: those are refused here.
    """
    shard = regular_file(path)
    try:
        with open_file(path, most=None) as file:
            header_size, file_size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if not 0 < header_size <= min(file_size - 8, MAX_FILE_BYTES):
                raise ValueError(
                    f"it says that its header has {header_size} bytes; the file has {file_size}, and a header at most "
                    f"{MAX_FILE_BYTES}"
                )
            _parse_json(file.read(header_size))
        infos = {}
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                _check_tensor_name(path, name)
                tensor = tensors.get_slice(name)
                infos[name] = TensorInfo(tuple(tensor.get_shape()), tensor.get_dtype())
                _check_loadable(name, infos[name])
    except ConversionError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConversionError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error
    return infos


def _check_loadable(name: str, info: TensorInfo) -> None:
    if info.dtype not in DTYPES:
        raise ValueError(f"tensor {_repr(name)} has dtype={_repr(info.dtype)}, which Transformers cannot load")
    if len(info.shape) > MAX_DIMENSIONS or any(size >= 2**63 for size in info.shape):
        raise ValueError(f"tensor {_repr(name)} has shape={_repr(info.shape)}, which torch cannot hold")


def _check_tensor_name(path: Path, name: str) -> None:
    if not name or not name.isprintable():
        raise ConversionError(f"{path} names a tensor {_repr(name)}; a name must be printable.")


def _check_tokenizer_files(copies: Path) -> None:
    """Drops the paths by which a tokenizer_config.json makes the library open other files than those beside it."""
    path = copies / TOKENIZER_CONFIG
    if not path.is_file():
        return
    fields = read_json(path)
    names = fields.get("fast_tokenizer_files", [])
    beside = {file.name for file in copies.iterdir()}
    if not isinstance(names, list) or not all(isinstance(name, str) and name in beside for name in names):
        raise ConversionError(
            f"{TOKENIZER_CONFIG}: fast_tokenizer_files={_repr(names)}; names of files beside it were expected."
        )
    kept = {name: value for name, value in fields.items() if not (name.endswith("_file") and isinstance(value, str))}
    if kept != fields:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _try_tokenizer(copies: Path) -> None:
    tokenizer = load_tokenizer(copies)
    if tokenizer is not None:
        for text in (*TEXTS, *MORE_TEXTS):
            tokenizer(text)


def copy_companions(directory: Path, copies: Path) -> tuple[str, ...]:
    """Copies what comes along into a directory of our own, where the libraries read it; returns the names."""
    companions = []
    for path in {path for pattern in COMPANIONS for path in directory.glob(pattern)}:
        name = path.relative_to(directory).as_posix()
        if path.is_dir() or fnmatch(name, "*.safetensors*"):
            continue
        if not name.isprintable():
            raise ConversionError(f"{directory} holds {_repr(name)}; the name of a file must be printable.")
        copy_file(path, copies / name, directory)
        if path.suffix == ".json":
            read_json(copies / name)
        companions.append(name)
    return tuple(sorted(companions))


@contextmanager
def open_file(path: Path, directory: Path | None = None, most: int | None = MAX_FILE_BYTES) -> Iterator[BinaryIO]:
    """Opens a file of a checkpoint: every file is opened here, and once.

    Args:
        path (`Path`): a file of a checkpoint.
        directory (`Path`, *optional*): that of the checkpoint; by default the one that holds `path`.
        most (`int`, *optional*, defaults to 64 MiB): bytes that it may have; `None` for weights.

    Raises:
        ConversionError: it is missing, no regular file (a FIFO would be waited for), not part of the checkpoint, too
            large, or another one by the time it is open.
    """
    behind = regular_file(path, directory)
    try:
        # Not waiting, in case it has become a FIFO.
        descriptor = os.open(behind, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    with os.fdopen(descriptor, "rb") as file:
        opened = os.fstat(file.fileno())
        if not stat.S_ISREG(opened.st_mode) or not os.path.samestat(opened, regular_file(path, directory).stat()):
            raise ConversionError(f"{path} is another file than a moment ago; leave it alone while it is converted.")
        if most is not None and opened.st_size > most:
            raise ConversionError(f"{path} has {opened.st_size} bytes; more than {most} are never read.")
        yield file


def copy_file(path: Path, target: Path, directory: Path) -> None:
    """Copies a file of a checkpoint that is read again later, from the copy. Arguments are those of [`open_file`]."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(path, directory) as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)


def regular_file(path: Path, directory: Path | None = None) -> Path:
    """The file at `path`, behind links.

    Args:
        path (`Path`): a file of a checkpoint.
        directory (`Path`, *optional*): that of the checkpoint; by default the one that holds `path`.

    Raises:
        ConversionError: it is missing, no regular file (a FIFO would be waited for), or not part of the checkpoint.
    """
    root = (directory or path.parent).resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        file = path.resolve(strict=True)
        mode = file.stat().st_mode
    except (OSError, RuntimeError) as error:  # raised for a loop of links
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not any(file.is_relative_to(parent) for parent in allowed):
        raise ConversionError(f"{path} is a link out of the checkpoint, to {file}; put the file itself there.")
    if not stat.S_ISREG(mode):
        raise ConversionError(f"{path} is not a regular file.")
    return file


def read_json(path: Path, directory: Path | None = None) -> dict[str, Any]:
    """Reads a JSON object, or says what is wrong with the file. Arguments are those of [`open_file`]."""
    try:
        with open_file(path, directory) as file:
            return _parse_json(file.read())
    except ConversionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable JSON: {error}") from error


def _parse_json(content: bytes) -> dict[str, Any]:
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError(f"it holds more than {MAX_JSON_VALUES} values")
    value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, where an object was expected")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{_repr(name)} is there twice")
    return value

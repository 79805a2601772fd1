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
"""What is looked at before the weights of an AttnRes checkpoint are loaded, and after: files, sizes, depth parameters.

A checkpoint may be damaged, or come from anyone. Loading it gives the model that was saved, or an [`AttnResError`] that
names the file and the tensor, before memory is taken for sizes that nothing in the files backs.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_attnres import AttnResConfig, AttnResError

DEPTH_MODULE = "depth_attention"  # the module of the depth parameters, as a part of their names

# What a file may hold: bytes of JSON (indices of the largest models have some 20 MB), values in it, and sizes in the
# configuration that no tensor has (of parts that are switched off).
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_VALUES = 4_000_000
MAX_UNUSED = 2**15

Shapes = dict[str, tuple[int, ...]]


def check_checkpoint(directory: Path, variant: str | None = None) -> None:
    """Looks at the files that an AttnRes checkpoint is loaded from, but for the data of its tensors. A directory that
    holds another model, or other files, is left to the library.

    Raises:
        AttnResError: a file is missing, none, broken, or contradicts another; the message names it and the tensor.
    """
    if not is_attnres(directory):
        return
    fields = read_json(directory / CONFIG_NAME)
    if (other := fields.get("transformers_weights")) is not None:
        raise AttnResError(
            f"{directory / CONFIG_NAME}: transformers_weights={other!r} puts the weights elsewhere; remove it."
        )
    shard, index = (
        directory / (name if variant is None else "{0}.{2}.{1}".format(*name.rsplit(".", 1), variant))
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if os.path.lexists(shard):
        shapes = read_shapes(shard)
    elif os.path.lexists(index):
        shapes = _read_sharded(index)
    else:
        return
    check_layers(directory / CONFIG_NAME, fields, len(shapes))
    check_sizes(directory / CONFIG_NAME, fields, shapes.values())


def is_attnres(directory: Path) -> bool:
    """Whether a directory's config.json is of an AttnRes model."""
    path = directory / CONFIG_NAME
    return os.path.lexists(path) and read_json(path).get("model_type") == AttnResConfig.model_type


def _read_sharded(index: Path) -> Shapes:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AttnResError(f"{index}: weight_map is missing or empty; save the model again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise AttnResError(
                f"{index}: tensor {name[:200]!r} is in {str(shard)[:200]!r}, which is no safetensors file here."
            )
    shapes: Shapes = {}
    for shard in sorted(set(weight_map.values())):
        found = read_shapes(index.with_name(shard))
        if missing := [name for name, holder in weight_map.items() if holder == shard and name not in found]:
            raise AttnResError(
                f"{index.with_name(shard)} lacks tensor {missing[0][:200]!r}, which {index.name} puts there."
            )
        shapes |= found
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of a size that is bounded."""
    check_regular(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise AttnResError(f"{path} has {size} bytes; more than {MAX_JSON_BYTES} are never read.")
    try:
        content = path.read_bytes()
        if sum(map(content.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
            raise ValueError(f"it holds more than {MAX_JSON_VALUES} values")
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise AttnResError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise AttnResError(f"{path} is not readable JSON: a JSON {type(value).__name__}, where an object was expected")
    return value


def read_shapes(shard: Path) -> Shapes:
    """The shapes of the tensors of a safetensors file."""
    check_regular(shard)
    try:
        with safe_open(shard, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise AttnResError(f"{shard} is not a whole safetensors file: {error}. Fetch it again.") from error


def check_regular(path: Path) -> None:
    """Refuses what is no file: a FIFO would be waited for, a device has no end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise AttnResError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise AttnResError(f"{path} is not a regular file.")


def check_layers(config_file: Path, fields: Mapping[str, Any], num_tensors: int) -> None:
    """Refuses more decoder layers than there are tensors."""
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        value = fields.get(name)
        if isinstance(value, int) and value > num_tensors:
            raise AttnResError(f"{config_file}: {name}={value}, but there are only {num_tensors} tensors.")


def check_sizes(config_file: Path, fields: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuses sizes far beyond those of the tensors. A tensor without elements vouches for none."""
    known = {size for shape in shapes if math.prod(shape) for size in shape}
    largest = max(MAX_UNUSED, *known, 0)
    hidden_size = fields.get("hidden_size")
    if isinstance(hidden_size, int) and hidden_size not in known:
        raise AttnResError(f"{config_file}: hidden_size={_short(hidden_size)}, but no tensor has that size.")
    for name, value in fields.items():
        if (name.startswith("num_") or name.endswith("_dim")) and isinstance(value, int) and value > largest:
            raise AttnResError(
                f"{config_file}: {name}={_short(value)}; with these tensors at most {largest} makes sense."
            )


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**40 else "an integer of more than 40 digits"


def check_loaded(model: Any, info: Any, files: list[str], is_lenient: bool) -> None:
    """Looks at what was read into a model that is not used yet.

    Args:
        model (`PreTrainedModel`): the model.
        info (`LoadStateDictInfo`): what the library says of the tensors it read.
        files (`list[str]`): the files of the weights.
        is_lenient (`bool`): whether the caller takes tensors that are missing or of other shapes.

    Raises:
        AttnResError: a tensor is missing, of another shape, or of depth and not finite; the message names it.
    """
    directory = Path(files[0]).parent
    if not is_attnres(directory):  # a plain decoder, which is retrofitted and has no depth parameters
        return
    if not is_lenient:
        for name, found, expected in sorted(info.mismatched_keys, key=str):
            raise AttnResError(
                f"{_holder(files, name)}: tensor {name!r} has shape {list(found)}; config.json needs {list(expected)}."
            )
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        base = f"{model.base_model_prefix}."
        missing = sorted(
            name
            for name in info.missing_keys
            if DEPTH_MODULE in name.split(".") or (name.startswith(base) and name not in tied)
        )
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = [name for name in missing if not _matches(name, ignored)]
        if missing:
            raise AttnResError(
                f"{directory} lacks tensor {missing[0]!r}"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
                + ", which its config.json asks for; save or convert the model again."
            )
    for name, parameter in model.named_parameters():
        if DEPTH_MODULE in name.split(".") and parameter.device.type != "meta" and not _is_finite(parameter):
            raise AttnResError(
                f"{_holder(files, name)}: tensor {name!r} holds values that are not finite (NaN or infinity); restore "
                "an earlier version of it."
            )


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _holder(files: list[str], name: str) -> str:
    """The file that holds a tensor; the directory, if the tensor has another name there."""
    depth_name = name.rpartition(f"{DEPTH_MODULE}.")[2] if DEPTH_MODULE in name.split(".") else None
    for path in files:
        if path.endswith(".safetensors"):
            names = read_shapes(Path(path))
            if name in names or (depth_name and any(other.endswith(f"{DEPTH_MODULE}.{depth_name}") for other in names)):
                return path
    return str(Path(files[0]).parent)

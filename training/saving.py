"""What a training leaves behind: a checkpoint like the converter's, a plain one, or an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_attnres import AttnResConfig
from ..conversion.converter import SINGLE_SHARD, write_config_and_code
from ..conversion.delivery import REPORT as CONVERSION_REPORT
from ..conversion.delivery import umask
from ..conversion.source import DEPTH_MODULE, DEPTH_SHARD, copy_companions, copy_file
from ..conversion.tokenizer import pin_tokenizer, write_generation_config
from ..model_cards.card import CARD, build_card, inherited_metadata, training_rows
from .baselines import model as baselines


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what of it goes into the result unchanged.

    Attributes:
        directory: of the source's files; `None` for a model from scratch.
        config: the configuration to save, as it was before training.
        dtypes: the dtype of each parameter and buffer on disk, by its name in memory.
    """

    directory: Path | None
    config: Any
    dtypes: Mapping[str, torch.dtype]


def save_model(model: Any, state: dict[str, torch.Tensor], origin: Origin, tokenizer: Any, directory: Path) -> None:
    """Writes a checkpoint: tensor names and shards as the library saves them, depth parameters in a shard of their own
    (`model-attnres.safetensors`), configuration, code, tokenizer, and the card."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # the library saves those once
    state = {
        name: tensor.detach().to(origin.dtypes.get(name, tensor.dtype))
        for name, tensor in state.items()
        if name not in tied
    }
    depth = {name: tensor for name, tensor in state.items() if DEPTH_MODULE in name.split(".")}
    others = {name: tensor for name, tensor in state.items() if name not in depth}
    model.save_pretrained(directory, state_dict=others)
    is_attnres = isinstance(origin.config, AttnResConfig)
    for path in directory.glob("*.py"):  # of the source's remote code; ours follows
        path.unlink()
    if is_attnres:
        _add_depth_shard(dict(revert_weight_conversion(model, depth)), directory)
        write_config_and_code(origin.config, directory)
    elif hasattr(origin.config, baselines.FIELD):
        baselines.save_config(origin.config, directory)
    else:
        origin.config.save_pretrained(directory)
    write_companions(origin, tokenizer, directory)
    if is_attnres:
        inherited = {} if origin.directory is None else inherited_metadata(origin.directory)
        card = build_card(directory, name=directory.parent.resolve().name, inherited=inherited)
        (directory / CARD).write_text(str(card), encoding="utf-8")


def _add_depth_shard(depth: dict[str, torch.Tensor], directory: Path) -> None:
    depth = {name: tensor.contiguous().cpu() for name, tensor in depth.items()}
    save_file(depth, directory / DEPTH_SHARD, metadata={"format": "pt"})
    index_file = directory / SAFE_WEIGHTS_INDEX_NAME
    if index_file.is_file():
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    else:
        single = directory / SAFE_WEIGHTS_NAME
        single.rename(directory / SINGLE_SHARD)
        with safe_open(directory / SINGLE_SHARD, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), SINGLE_SHARD)
    weight_map |= dict.fromkeys(depth, DEPTH_SHARD)
    shards = [directory / shard for shard in sorted(set(weight_map.values()))]
    num_parameters = 0
    for shard in shards:
        shard.chmod(0o666 & ~umask())  # safetensors makes private files
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                num_parameters += size
    metadata = {"total_parameters": num_parameters, "total_size": sum(shard.stat().st_size for shard in shards)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(origin: Origin, tokenizer: Any, directory: Path) -> None:
    """Writes the tokenizer and whatever else lay beside the source's weights, as it was there."""
    if origin.directory is None:
        tokenizer.save_pretrained(directory)
        return
    copy_companions(origin.directory, directory)
    if (origin.directory / CONVERSION_REPORT).is_file():
        copy_file(origin.directory / CONVERSION_REPORT, directory / CONVERSION_REPORT, origin.directory)
    write_generation_config(origin.directory, directory)
    pin_tokenizer(origin.directory, directory)


def save_adapter(model: Any, state: dict[str, torch.Tensor], base: str, tokenizer: Any, directory: Path) -> None:
    """Writes an adapter of PEFT, with the trained depth parameters in it and a card that says how it was trained.

    Args:
        model: the `PeftModel`.
        state: its state dict.
        base (`str`): name of the checkpoint that the adapter belongs to.
        tokenizer: the tokenizer, which is saved beside it.
        directory (`Path`): where to.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(directory, state_dict=state)
    tokenizer.save_pretrained(directory)
    card = directory / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    rows = "\n".join(f"| {what} | {value} |" for what, value in training_rows(directory))
    card.write_text(f"{text.rstrip()}\n\n## Training with attnres\n\n| | |\n|---|---|\n{rows}\n", encoding="utf-8")

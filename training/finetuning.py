"""Fine-tuning: a converted checkpoint, or a plain one that is retrofitted while it is loaded, goes on learning."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..configuration_attnres import DEPTH_ARGUMENTS, DEPTH_VARIANTS, AttnResConfig, AttnResError
from ..conversion.quantization import quantization_method
from ..conversion.source import DEPTH_MODULE, find_checkpoint, open_source, read_index, read_json
from ..conversion.tokenizer import TOKENIZER_FILES
from ..modeling_attnres import AttnResForCausalLM
from .data import load_data
from .engine import check_output, claimed, num_replicas, quiet, run, runs_in_bfloat16
from .errors import TrainingError
from .report import TrainingReport, versions
from .saving import Origin, save_adapter, save_model
from .settings import HEAD_WIDTH, MODES, TrainingSettings


def finetune(
    checkpoint: str | os.PathLike,
    *,
    data: Sequence[str | Path] | str | Path,
    output: str | os.PathLike,
    train: str = "full",
    validation: Sequence[str | Path] | str | Path | float | None = None,
    split: str = "train",
    text_column: str = "text",
    depth: Mapping[str, Any] | None = None,
    plain: bool = False,
    merge: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> TrainingReport:
    """Trains a checkpoint further. Run again after an interruption, it goes on from the last whole checkpoint, and ends
    where it would have ended.

    Args:
        checkpoint (`str` or `PathLike`):
            directory or Hub id of a converted checkpoint, or of a plain one, which is retrofitted in memory.
        data: files, directories or Hub ids; see [`~attnres.training.data.load_data`].
        output (`str` or `PathLike`): directory to write to, which holds nothing else.
        train (`str`, *optional*, defaults to `"full"`):
            `"full"` trains all parameters, `"lora"` depth parameters and an adapter on the backbone's default targets,
            `"depth"` depth parameters alone.
        validation (*optional*): data of the same kind, or the share of `data` that is held out.
        split, text_column (`str`, *optional*): of the data.
        depth (`Mapping`, *optional*):
            Arguments of [`AttnResConfig`] (`num_blocks`, `mix`, ...) and variants (`num_heads`, ...) for a plain
            checkpoint.
        plain (`bool`, *optional*): train a plain checkpoint as it is, for comparison.
        merge (`bool`, *optional*): fold the adapter of `"lora"` into the weights, and write a whole checkpoint.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        overwrite (`bool`, *optional*): remove an earlier run in `output` instead of resuming it.
        console (`Console`, *optional*): where to show progress.
        settings: fields of [`TrainingSettings`].

    Returns:
        [`TrainingReport`]: also written to the output, with the losses.

    Raises:
        AttnResError: the request makes no sense, the run that is in `output` has other settings, or the training
            failed; the message says what, where and what to do.
    """
    if train not in MODES:
        raise TrainingError(f"train={train!r} is not allowed; choose one of {', '.join(map(repr, MODES))}.")
    if merge and train != "lora":
        raise TrainingError(f"merge folds the adapter of train='lora'; there is none with train={train!r}.")
    if plain and (train != "full" or depth):
        raise TrainingError("plain trains a checkpoint without depth attention, so it goes with train='full' alone.")
    chosen = TrainingSettings.from_dict(settings)
    target = Path(output).absolute()
    check_output(target)
    directory = find_checkpoint(Path(checkpoint), revision)
    if directory.resolve() == target.resolve():
        raise TrainingError(f"output {output} is the checkpoint that is to be trained; choose another.")
    config = _configuration(directory, checkpoint, depth, plain)
    is_retrofitted = isinstance(config, AttnResConfig) and not _is_converted(directory)
    if train == "lora" and is_retrofitted and not merge:
        raise TrainingError(
            f"{checkpoint} is a plain checkpoint, and an adapter with depth parameters can only be loaded on a "
            "converted one: convert it first (attnres convert), or give merge (--merge)."
        )
    chosen = chosen.for_model(config)
    tokenizer = load_tokenizer(directory)
    rows = load_data(*(as_list(data), as_list(validation)), split=split, text_column=text_column, seed=chosen.seed)
    if rows.kind == "messages" and tokenizer.chat_template is None:
        raise TrainingError(f"The data are dialogues, and the tokenizer of {checkpoint} has no chat template.")
    head_width = HEAD_WIDTH
    if isinstance(config, AttnResConfig):
        head_width = config.hidden_size // config.depth_attention["num_heads"]
    learning_rates = chosen.learning_rates(train, head_width)
    report = TrainingReport(
        source=str(checkpoint) if not Path(checkpoint).exists() else directory.resolve().name,
        method={"train": train, "residual": "plain" if plain else "attnres", "merge": merge},
        model={"depth_attention": getattr(config, "depth_attention", None), "weights": _identity(directory)},
        data={
            "kind": rows.kind,
            "files": rows.files,
            "held_out": validation if isinstance(validation, float) else None,
        },
        settings=chosen.fixed() | dict(zip(("learning_rate", "depth_learning_rate"), learning_rates)),
        processes=num_replicas(chosen),
        versions=versions(),
    )
    with quiet(), claimed(target, report, overwrite) as report:
        if report.finished:
            return report
        model = load_model(directory, config)
        origin = Origin(
            directory,
            copy.deepcopy(model.config),
            {name: tensor.dtype for name, tensor in model.state_dict().items()},
        )
        if train == "full" or not runs_in_bfloat16(chosen):
            model = model.float()
        peft_config = None
        if train == "lora":
            peft_config = _lora(chosen, config)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(train == "full" or DEPTH_MODULE in name.split("."))

        def save(trainer: Any, stage: Path) -> None:
            trained, state = trainer.whole_state()
            if not trainer.args.should_save:
                return
            if train != "lora":
                save_model(trained, state, origin, tokenizer, stage)
                return
            base = str(checkpoint)
            if not merge:
                save_adapter(trained, state, base, tokenizer, stage)
                return
            with tempfile.TemporaryDirectory(dir=stage, prefix=".adapter-") as adapter:
                trained.save_pretrained(adapter, state_dict=state)
                merged = PeftModel.from_pretrained(load_model(directory, config), adapter).merge_and_unload()
            save_model(merged, merged.state_dict(), origin, tokenizer, stage)

        return run(
            model,
            tokenizer,
            rows,
            chosen,
            learning_rates=learning_rates,
            output=target,
            report=report,
            save=save,
            peft_config=peft_config,
            console=console,
        )


def with_depth(backbone: Any, fields: Mapping[str, Any]) -> AttnResConfig:
    """The configuration of a decoder with depth attention; `fields` are arguments of [`AttnResConfig`] and variants."""
    arguments = dict(fields)
    variant = {name: arguments.pop(name) for name in DEPTH_VARIANTS if name in arguments}
    config = AttnResConfig(backbone_config=backbone, depth_attention=variant, **arguments)
    config.architectures = ["AttnResForCausalLM"]
    return config


def load_model(directory: Path, config: Any) -> Any:
    """A causal language model in the dtypes that its checkpoint has."""
    model_class = AttnResForCausalLM if isinstance(config, AttnResConfig) else AutoModelForCausalLM
    try:
        return model_class.from_pretrained(directory, config=copy.deepcopy(config), dtype=config.dtype or torch.float32)
    except AttnResError:
        raise
    except Exception as error:  # constructors raise anything for unexpected files
        raise TrainingError(f"{directory} cannot be loaded: {type(error).__name__}: {error}") from error


def _is_converted(directory: Path) -> bool:
    return read_json(directory / "config.json").get("model_type") == AttnResConfig.model_type


def _configuration(directory: Path, checkpoint: Any, depth: Mapping[str, Any] | None, plain: bool) -> Any:
    """The configuration of what is trained: that of the checkpoint, or of its retrofit."""
    if not (directory / "config.json").is_file():
        raise TrainingError(f"{directory} has no config.json; give the directory of a checkpoint, or a Hub id.")
    if _is_converted(directory):
        if plain:
            raise TrainingError(f"{checkpoint} is an AttnRes checkpoint; plain needs the source that it came from.")
        if depth:
            raise TrainingError(
                f"{checkpoint} is an AttnRes checkpoint already, so its {min(depth)} is fixed; those settings are for "
                "plain checkpoints."
            )
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    else:
        source = open_source(directory)
        known = (*DEPTH_ARGUMENTS, *DEPTH_VARIANTS)
        if unknown := sorted((depth or {}).keys() - {*known}):
            raise TrainingError(f"depth has {unknown[0]!r}; there are: {', '.join(known)}.")
        config = source.config
        if not plain:
            config = with_depth(config, {"mix": "sum", **(depth or {})})
        config.dtype = config.dtype or torch.float32
    if method := quantization_method(config):
        raise TrainingError(f"{checkpoint} is quantised by {method}; train the checkpoint that it was made from.")
    return config


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a directory or Hub id, without running code of it; it has an end-of-text token."""
    directory = Path(name)
    try:
        # The library makes an empty one of a directory without any.
        if directory.is_dir() and not any(any(directory.glob(pattern)) for pattern in TOKENIZER_FILES):
            raise FileNotFoundError(f"no file there is called {' or '.join(TOKENIZER_FILES)}")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # loading a tokenizer raises anything
        raise TrainingError(f"{name} has no tokenizer that can be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise TrainingError(f"The tokenizer of {name} has no end-of-text token (eos_token), which ends examples.")
    return tokenizer


def _lora(settings: TrainingSettings, config: Any) -> LoraConfig:
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=None if config.model_type in LORA_TARGETS else "all-linear",
        modules_to_save=[DEPTH_MODULE],
        task_type="CAUSAL_LM",
    )


def _identity(directory: Path) -> str:
    """Tells one checkpoint from another by what is quick to read: its configuration, and its shards by size and time
    of their last change, which a copy that keeps times has too."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for shard in read_index(directory)[0]:
        stat = (directory / shard).stat()
        digest.update(f"{shard} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def as_list(value: Any) -> Any:
    """One path or id as a list of one; everything else as it is."""
    return [value] if isinstance(value, (str, Path)) else value

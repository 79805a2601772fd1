"""Training from scratch: AttnRes, a variant of it, the plain decoder, or a baseline, all under the same conditions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, set_seed

from ..configuration_attnres import AttnResConfig, AttnResError
from ..modeling_attnres import AttnResForCausalLM
from . import baselines
from .data import load_data
from .engine import check_output, claimed, num_replicas, quiet, run
from .errors import TrainingError
from .finetuning import as_list, load_tokenizer, with_depth
from .report import TrainingReport, versions
from .saving import Origin, save_model
from .settings import TrainingSettings

RESIDUALS = ("attnres", "plain", *baselines.BASELINES)


@dataclass(frozen=True)
class ModelSection:
    """The part `model` of a configuration.

    Attributes:
        backbone (`str` or `dict`): the decoder: a directory or Hub id with a config.json, or its fields, `model_type`
            among them. Token ids that it leaves out are the tokenizer's.
        tokenizer (`str`): a directory or Hub id.
        residual (`str`, defaults to `"attnres"`): one of `RESIDUALS`.
        depth_attention (`dict`): arguments of [`AttnResConfig`] about depth and variants of a read, for `"attnres"`.
        num_streams (`int`, *optional*): of `"hyper_connections"` and `"mhc"`.
    """

    backbone: Any
    tokenizer: str
    residual: str = "attnres"
    depth_attention: dict[str, Any] = field(default_factory=dict)
    num_streams: int | None = None


@dataclass(frozen=True)
class DataSection:
    """The part `data` of a configuration; see [`~attnres.training.data.load_data`]."""

    train: Any
    validation: Any = None
    split: str = "train"
    text_column: str = "text"


@dataclass(frozen=True)
class RunConfig:
    """What a YAML file for `attnres train` says. Paths are relative to the working directory.

    Attributes:
        output (`str`): directory to write to.
        model (`ModelSection`), data (`DataSection`): of what, on what.
        training (`TrainingSettings`): how.
    """

    output: str
    model: ModelSection
    data: DataSection
    training: TrainingSettings

    @classmethod
    def read(cls, path: str | os.PathLike) -> RunConfig:
        """The configuration in a YAML file.

        Raises:
            TrainingError: it cannot be read, or has a part, a name or a value that is not allowed.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise TrainingError(f"{path} is not readable YAML: {error}") from error
        try:
            return cls.from_dict(values)
        except TrainingError as error:
            raise TrainingError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Any) -> RunConfig:
        """The configuration in a mapping of mappings.

        Raises:
            TrainingError: it has a part, a name or a value that is not allowed.
        """
        top = _section(cls, values, "the configuration")
        config = cls(
            output=str(top["output"]),
            model=ModelSection(**_section(ModelSection, top["model"], "model")),
            data=DataSection(**_section(DataSection, top["data"], "data")),
            training=TrainingSettings.from_dict(_mapping(top["training"], "training")),
        )
        if config.model.residual not in RESIDUALS:
            allowed = ", ".join(map(repr, RESIDUALS))
            raise TrainingError(f"model.residual={config.model.residual!r} is not allowed; choose one of {allowed}.")
        if not isinstance(config.model.depth_attention, dict):
            raise TrainingError(
                f"model.depth_attention={config.model.depth_attention!r}; settings by name were expected."
            )
        if config.model.depth_attention and config.model.residual != "attnres":
            raise TrainingError(f"model.depth_attention is for residual: attnres, not {config.model.residual!r}.")
        if config.model.num_streams is not None and config.model.residual not in ("hyper_connections", "mhc"):
            raise TrainingError(f"model.num_streams is for hyper_connections and mhc, not {config.model.residual!r}.")
        return config


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TrainingError(f"{what} is {values!r}; names with values were expected.")
    return dict(values)


def _section(kind: Any, values: Any, what: str) -> dict[str, Any]:
    values = _mapping(values, what)
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(map(str, values.keys() - known.keys())):
        raise TrainingError(f"{what} has {unknown[0]!r}; there are: {', '.join(known)}.")
    signature = kind.__init__.__defaults__ or ()
    required = list(known)[: len(known) - len(signature)]
    if missing := [name for name in required if name not in values]:
        raise TrainingError(f"{what} lacks {missing[0]!r}.")
    return values


def train(
    config: str | os.PathLike | RunConfig | Mapping[str, Any],
    *,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainingReport:
    """Trains a model from scratch. Two configurations that differ in `model.residual` and what belongs to it alone see
    the same data in the same order, and start from the same weights: those of the plain decoder for this seed. What
    residuals add starts as it computes the plain decoder, or, for `mix: mean`, a uniform mean.

    Args:
        config: a YAML file, a [`RunConfig`], or its parts as a mapping.
        output (*optional*): directory to write to, instead of the configuration's.
        overwrite (`bool`, *optional*): remove an earlier run there instead of resuming it.
        console (`Console`, *optional*): where to show progress.

    Returns:
        [`TrainingReport`]: also written to the output, with the losses.

    Raises:
        AttnResError: the configuration makes no sense, the run that is in the output has other settings, or the
            training failed; the message says what, where and what to do.
    """
    if isinstance(config, (str, os.PathLike)):
        config = RunConfig.read(config)
    elif isinstance(config, Mapping):
        config = RunConfig.from_dict(config)
    settings, section = config.training, config.model
    target = Path(output or config.output).absolute()
    check_output(target)
    tokenizer = load_tokenizer(section.tokenizer)
    backbone = _backbone(section, tokenizer)
    settings = settings.for_model(backbone)
    rows = load_data(
        as_list(config.data.train),
        as_list(config.data.validation),
        split=config.data.split,
        text_column=config.data.text_column,
        seed=settings.seed,
    )
    with quiet():
        model = make_model(backbone, section, settings.seed)
    learning_rates = settings.learning_rates("scratch")
    held_out = config.data.validation if isinstance(config.data.validation, float) else None
    report = TrainingReport(
        source=backbone.model_type,
        method={"train": "scratch", "residual": section.residual, "num_streams": section.num_streams},
        model={
            "depth_attention": getattr(model.config, "depth_attention", None),
            "backbone": {
                name: value for name, value in backbone.to_diff_dict().items() if name != "transformers_version"
            },
        },
        data={"kind": rows.kind, "files": rows.files, "held_out": held_out},
        settings=settings.fixed() | dict(zip(("learning_rate", "depth_learning_rate"), learning_rates)),
        processes=num_replicas(settings),
        versions=versions(),
    )
    with quiet(), claimed(target, report, overwrite) as report:
        if report.finished:
            return report
        saved_config = type(model.config).from_dict(model.config.to_dict())
        origin = Origin(None, saved_config, {})

        def save(trainer: Any, stage: Path) -> None:
            trained, state = trainer.whole_state()
            if trainer.args.should_save:
                save_model(trained, state, origin, tokenizer, stage)

        return run(
            model,
            tokenizer,
            rows,
            settings,
            learning_rates=learning_rates,
            output=target,
            report=report,
            save=save,
            console=console,
        )


def _backbone(section: ModelSection, tokenizer: Any) -> PreTrainedConfig:
    try:
        if isinstance(section.backbone, Mapping):
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config = AutoConfig.for_model(**({"vocab_size": len(tokenizer)} | ids | dict(section.backbone)))
        else:
            config = AutoConfig.from_pretrained(section.backbone, trust_remote_code=False)
    except Exception as error:  # constructors raise anything for unexpected values
        raise TrainingError(f"model.backbone makes no configuration: {error}") from error
    if isinstance(config, AttnResConfig):
        raise TrainingError("model.backbone is an AttnRes model; give the decoder's configuration.")
    if config.vocab_size < len(tokenizer):
        raise TrainingError(
            f"model.backbone has vocab_size={config.vocab_size}; the tokenizer has more tokens, {len(tokenizer)}."
        )
    config.dtype = torch.float32
    return config


def make_model(backbone: PreTrainedConfig, section: ModelSection, seed: int) -> Any:
    """A model in float32 with new weights, which are the same for all residuals.

    Args:
        backbone (`PreTrainedConfig`): the decoder.
        section (`ModelSection`): the residuals.
        seed (`int`): of the weights.
    """
    if section.residual == "attnres":
        config = with_depth(backbone, section.depth_attention)
    try:
        set_seed(seed)
        plain = AutoModelForCausalLM.from_config(backbone).float()
        if section.residual == "plain":
            return plain
        if section.residual == "attnres":
            model = AttnResForCausalLM(config).float()
        else:
            model = baselines.from_config(backbone, section.residual, section.num_streams).float()
        _, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    except AttnResError:
        raise
    except Exception as error:  # constructors raise anything for unexpected values
        raise TrainingError(f"model.backbone makes no model: {type(error).__name__}: {error}") from error
    assert not unexpected, unexpected
    return model

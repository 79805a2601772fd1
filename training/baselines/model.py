"""Models of the baselines: made of a decoder's configuration, saved, and loaded."""

from __future__ import annotations

import copy
import inspect
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...configuration_attnres import AttnResError, supported_backbone
from ...rewiring import _rewire_child, _rewired_class, decoder_layers
from ..errors import TrainingError
from .dense_former import DenseFormerDecoderLayer
from .hyper_connections import HyperConnectedDecoderLayer, ManifoldConstrainedDecoderLayer
from .layer import BaselineDecoderLayer

MODEL_TYPE = "attnres_baseline"  # on disk, so that nothing else loads the weights and leaves the residuals out
FIELD = "residual_baseline"
PARAMETERS = ("depth_weights", "hyper_connections")  # stay in float32, as depth parameters do

BASELINES: dict[str, type[BaselineDecoderLayer]] = {
    "dense_former": DenseFormerDecoderLayer,
    "hyper_connections": HyperConnectedDecoderLayer,
    "mhc": ManifoldConstrainedDecoderLayer,
}
HAS_STREAMS = ("hyper_connections", "mhc")


def from_config(config: PreTrainedConfig, kind: str, num_streams: int | None = None) -> Any:
    """A causal language model with the residuals of a baseline and new weights.

    Args:
        config (`PreTrainedConfig`): of the decoder; a copy is taken.
        kind (`str`): a key of `BASELINES`.
        num_streams (`int`, *optional*, defaults to 4): n, of `"hyper_connections"` and `"mhc"`.

    Returns:
        A model of the decoder's own class, whose new parameters lie in its decoder layers, in float32: for
        `"dense_former"` `depth_weights`, for the others `hyper_connections`.

    Raises:
        TrainingError: there is no such baseline, or an option does not go with it.
        UnsupportedBackboneError: the decoder cannot be re-wired.
    """
    config = copy.deepcopy(config)
    baseline: dict[str, Any] = {"kind": kind}
    if num_streams is not None or kind in HAS_STREAMS:
        baseline["num_streams"] = 4 if num_streams is None else num_streams
    _check(baseline)
    setattr(config, FIELD, baseline)
    return _model_class(config)(config)


def save_pretrained(
    model: Any, directory: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Saves a model of a baseline: safetensors under the decoder's names and those of the new parameters, and a
    config.json that nothing but [`from_pretrained`] loads.

    Args:
        model: the model.
        directory (`str` or `PathLike`): where to.
        state_dict (*optional*): other tensors to save than the model's own.
    """
    model.save_pretrained(directory, **({} if state_dict is None else {"state_dict": state_dict}))
    save_config(model.config, directory)


def save_config(config: PreTrainedConfig, directory: str | os.PathLike) -> None:
    """Saves the configuration of a model of a baseline."""
    config.save_pretrained(directory)
    path = Path(directory) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {"model_type": MODEL_TYPE, "backbone_model_type": config.model_type}
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def from_pretrained(directory: str | os.PathLike, **kwargs: Any) -> Any:
    """Loads what [`save_pretrained`] saved.

    Args:
        directory (`str` or `PathLike`): of the model.
        kwargs: of the library's `from_pretrained`, such as `dtype`.

    Raises:
        TrainingError: it is no model of a baseline.
    """
    path = Path(directory) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("model_type") != MODEL_TYPE:
            raise KeyError("model_type")
        model_type = fields.pop("backbone_model_type")
        config = CONFIG_MAPPING[model_type].from_dict(fields)
        _check(getattr(config, FIELD))
    except AttnResError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} is no configuration of a baseline: {error!r}") from error
    return _model_class(config).from_pretrained(directory, config=config, **kwargs)


def _check(baseline: Any) -> None:
    if not isinstance(baseline, dict) or baseline.get("kind") not in BASELINES:
        kind = baseline.get("kind") if isinstance(baseline, dict) else baseline
        raise TrainingError(f"{kind!r} is no baseline; there are: {', '.join(map(repr, BASELINES))}.")
    if unknown := sorted(baseline.keys() - {"kind", "num_streams"}):
        raise TrainingError(f"a baseline has no option {unknown[0]!r}.")
    num_streams = baseline.get("num_streams")
    if num_streams is not None and baseline["kind"] not in HAS_STREAMS:
        raise TrainingError(f"{baseline['kind']!r} has no streams, so it takes no num_streams.")
    if baseline["kind"] in HAS_STREAMS and (
        isinstance(num_streams, bool) or not isinstance(num_streams, int) or not 1 <= num_streams <= 32
    ):
        raise TrainingError(f"num_streams={num_streams!r} is not allowed; it must be an integer from 1 to 32.")


def _model_class(config: PreTrainedConfig) -> Any:
    supported_backbone(config.model_type)
    backbone_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return _baseline_class(backbone_class[0] if isinstance(backbone_class, tuple) else backbone_class)


@cache
def _baseline_class(backbone_class: Any) -> Any:
    """A subclass that re-wires itself. It keeps the name, by which the library finds renamings of tensors."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        backbone_class.__init__(self, config, *args, **kwargs)
        rewire(self, getattr(config, FIELD))

    kept = {*(backbone_class._keep_in_fp32_modules_strict or ()), *PARAMETERS}
    namespace = {"__init__": init, "__module__": __name__, "_keep_in_fp32_modules_strict": kept}
    return type(backbone_class.__name__, (backbone_class,), namespace)


def rewire(model: PreTrainedModel, baseline: dict[str, Any]) -> None:
    """Turns the decoder layers of a model into those of a baseline, in place.

    Args:
        model (`PreTrainedModel`): a causal language model of a supported architecture.
        baseline (`dict`): `kind`, and `num_streams` where there are streams.
    """
    options = {name: value for name, value in baseline.items() if name != "kind"}
    structure = supported_backbone(model.config.model_type)
    layers = decoder_layers(model)
    sublayers = structure.sublayers_per_layer(model.config) * model.config.num_hidden_layers // len(layers)
    for index, layer in enumerate(layers):
        mixin, layer_class = BASELINES[baseline["kind"]], type(layer)
        layer.__class__ = _rewired_class(mixin, layer_class)  # type: ignore[arg-type]
        layer.structure, layer.index, layer.sublayers = structure, index, sublayers
        layer.is_last = index == len(layers) - 1
        layer.input_name = list(inspect.signature(layer_class.forward).parameters)[1]
        if isinstance(layer, HyperConnectedDecoderLayer):
            for child in layer.children():
                for module in child if isinstance(child, nn.ModuleList) else (child,):
                    _rewire_child(module, may_fuse=False)
        layer.add_parameters(model.config.hidden_size, **options)

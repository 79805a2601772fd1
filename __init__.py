"""Attention Residuals (AttnRes, arXiv 2603.15031) for Hugging Face Transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .configuration_attnres import AttnResConfig, AttnResConfigError, AttnResError
    from .conversion import convert
    from .depth_attention import DepthAttention
    from .modeling_attnres import (
        AttnResForCausalLM,
        AttnResForQuestionAnswering,
        AttnResForSequenceClassification,
        AttnResForTokenClassification,
        AttnResModel,
    )

_MODULE_OF = {
    "AttnResConfig": "configuration_attnres",
    "AttnResConfigError": "configuration_attnres",
    "AttnResError": "configuration_attnres",
    "AttnResForCausalLM": "modeling_attnres",
    "AttnResForQuestionAnswering": "modeling_attnres",
    "AttnResForSequenceClassification": "modeling_attnres",
    "AttnResForTokenClassification": "modeling_attnres",
    "AttnResModel": "modeling_attnres",
    "DepthAttention": "depth_attention",
    "convert": "conversion",
}

__all__ = [
    "AttnResConfig",
    "AttnResConfigError",
    "AttnResError",
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "DepthAttention",
    "convert",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


def _import_configuration(configuration_auto: Any) -> None:
    import_module(".configuration_attnres", __name__)


def _import_models_with_configurations(configuration_attnres: Any) -> None:
    configuration_attnres.for_each_config_class(lambda config_class: import_module(".modeling_attnres", __name__))


# `import attnres` makes the Auto classes know AttnRes, yet imports neither torch nor them before they are used. The
# configuration registers itself as soon as `AutoConfig` exists, the models as soon as there is a configuration.
# (Under another name this file is the root of a source tree, as a test runner sees it.)
if __name__ == "attnres":
    wrapt.register_post_import_hook(_import_configuration, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_import_models_with_configurations, "attnres.configuration_attnres")

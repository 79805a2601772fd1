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
    from .modeling_attnres import AttnResForCausalLM, AttnResModel

_MODULE_OF = {
    "AttnResConfig": "configuration_attnres",
    "AttnResConfigError": "configuration_attnres",
    "AttnResError": "configuration_attnres",
    "AttnResForCausalLM": "modeling_attnres",
    "AttnResModel": "modeling_attnres",
    "DepthAttention": "depth_attention",
    "convert": "conversion",
}

__all__ = ["AttnResConfig", "AttnResConfigError", "AttnResError", "AttnResForCausalLM", "AttnResModel"]
__all__ += ["DepthAttention", "convert"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


def _register_configuration(configuration_auto: Any) -> None:
    import_module(".configuration_attnres", __name__)


def _register_models(modeling_auto: Any) -> None:
    import_module(".modeling_attnres", __name__)


# `import attnres` makes the Auto classes know AttnRes, yet imports neither torch nor them before they are used.
# (Under another name this file is the root of a source tree, as a test runner sees it.)
if __name__ == "attnres":
    wrapt.register_post_import_hook(_register_configuration, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_register_models, "transformers.models.auto.modeling_auto")

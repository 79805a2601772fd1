"""Looking inside a model: where every layer reads from. `pip install ".[analysis]"` in a clone.

>>> from attnres.analysis import depth_maps
>>> maps = depth_maps(model, input_ids)
>>> maps.plot()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drop_study import Dropped, DropStudy, drop_source, mean_loss
    from .errors import AnalysisError
    from .inspection import Inspection, inspect_checkpoint
    from .layer_outputs import Magnitudes, magnitudes
    from .layout import Layout, Read, Source
    from .maps import DepthMaps, depth_maps
    from .statistics import DepthStatistics, collect

_MODULE_OF = {
    "AnalysisError": "errors",
    "DepthMaps": "maps",
    "DepthStatistics": "statistics",
    "DropStudy": "drop_study",
    "Dropped": "drop_study",
    "Inspection": "inspection",
    "Layout": "layout",
    "Magnitudes": "layer_outputs",
    "Read": "layout",
    "Source": "layout",
    "collect": "statistics",
    "depth_maps": "maps",
    "drop_source": "drop_study",
    "inspect_checkpoint": "inspection",
    "magnitudes": "layer_outputs",
    "mean_loss": "drop_study",
}

__all__ = ["AnalysisError", "DepthMaps", "DepthStatistics", "DropStudy", "Dropped", "Inspection", "Layout"]
__all__ += ["Magnitudes", "Read", "Source", "collect", "depth_maps", "drop_source", "inspect_checkpoint"]
__all__ += ["magnitudes", "mean_loss"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            raise
        from .errors import AnalysisError

        raise AnalysisError(
            f'{error}; this needs further packages; in a clone of the repository: pip install ".[analysis]"'
        ) from error

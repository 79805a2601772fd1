"""Training: a retrofit goes on from its source, or a model starts from nothing; `pip install ".[train]"`.

>>> from attnres.training import finetune
>>> report = finetune("Qwen3-0.6B-AttnRes", data=["corpus.parquet"], output="Qwen3-0.6B-AttnRes-trained")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import TrainingError
    from .finetuning import finetune
    from .from_scratch import RunConfig, train
    from .report import TrainingReport
    from .settings import TrainingSettings

_MODULE_OF = {
    "RunConfig": "from_scratch",
    "TrainingError": "errors",
    "TrainingReport": "report",
    "TrainingSettings": "settings",
    "finetune": "finetuning",
    "train": "from_scratch",
}

__all__ = ["RunConfig", "TrainingError", "TrainingReport", "TrainingSettings", "finetune", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from .errors import TrainingError

        raise TrainingError(f'{error}; training needs further packages: pip install ".[train]"') from error

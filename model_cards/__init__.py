"""Model cards, and sharing checkpoints on the Hugging Face Hub.

>>> from attnres.model_cards import push, update_card
>>> update_card("Qwen3-0.6B-AttnRes", results="eval-results", repo_id="user/Qwen3-0.6B-AttnRes")
>>> push("Qwen3-0.6B-AttnRes", "user/Qwen3-0.6B-AttnRes", private=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import CardError, build_card, update_card
    from .checks import Check, PushError, preflight
    from .hub import push

# Imported when they are asked for: a conversion writes a card, and an upload reads what a conversion wrote.
_MODULE_OF = {
    "CardError": "card",
    "Check": "checks",
    "PushError": "checks",
    "build_card": "card",
    "preflight": "checks",
    "push": "hub",
    "update_card": "card",
}

__all__ = ["CardError", "Check", "PushError", "build_card", "preflight", "push", "update_card"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)

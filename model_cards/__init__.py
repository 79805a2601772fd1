"""Model cards, and sharing checkpoints on the Hugging Face Hub.

>>> from attnres.model_cards import push, update_card
>>> update_card("Qwen3-0.6B-AttnRes", results="eval-results", repo_id="user/Qwen3-0.6B-AttnRes")
>>> push("Qwen3-0.6B-AttnRes", "user/Qwen3-0.6B-AttnRes", private=True)
"""

from .card import CardError, build_card, update_card
from .hub import Check, PushError, preflight, push

__all__ = ["CardError", "Check", "PushError", "build_card", "preflight", "push", "update_card"]

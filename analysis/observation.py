"""Looking at the state of depth at every read, and taking sources away from a read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..depth_attention import DEPTH_ATTENTION_FUNCTIONS
from ..depth_state import DepthSettings, DepthState, Norm
from ..rewiring import decoder_layers

Look = Callable[[int, tuple[torch.Tensor, ...], "torch.Tensor | None"], None]


class ObservedRead:
    """An implementation of depth attention: the reference, of which one sees what it reads and from which one takes
    sources away. A source that is taken away is not there: the weights of the others are those of a softmax without it,
    and `mix="sum"` counts one source less.

    Attributes:
        look: called before every read with its index, the finished sources and the partial sum, each
            `[batch, sequence, hidden]`.
        masked: pairs of a read and a source (0 for the embedding, else the number of a block). A read that sees one
            source only keeps it.
    """

    def __init__(self, look: Look | None = None, masked: Collection[tuple[int, int]] = ()):
        self.look, self.masked = look, frozenset(masked)
        self.reference = DEPTH_ATTENTION_FUNCTIONS["eager"]

    def fuses(self, state: Any) -> bool:
        return False

    def read(
        self, queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        read, state = state.depth, state.added()
        if self.look is not None:
            self.look(read, state.sources, state.partial_sum)
        values = state.sources if state.partial_sum is None else (*state.sources, state.partial_sum)
        kept = tuple(value for source, value in enumerate(values) if (read, source) not in self.masked)
        seen = state
        if kept and len(kept) < len(values):
            seen = state._replace(sources=kept, partial_sum=None)
        return self.reference.read(queries, seen, settings, norm)[0], state


@contextmanager
def observed(model: PreTrainedModel, read: ObservedRead) -> Iterator[None]:
    """Within this, the reads of a model are computed by an [`ObservedRead`]."""
    layers: list[Any] = list(decoder_layers(model))
    before = [layer.depth_settings for layer in layers]
    try:
        for layer, settings in zip(layers, before):
            layer.depth_settings = settings._replace(implementation=read)
        yield
    finally:
        for layer, settings in zip(layers, before):
            layer.depth_settings = settings

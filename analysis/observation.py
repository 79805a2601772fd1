"""Looking at the state of depth at every read, and taking sources away from a read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..depth_attention import EagerDepthAttention
from ..depth_state import DepthSettings, DepthState, Norm, normed
from ..rewiring import decoder_layers

Look = Callable[[int, tuple[torch.Tensor, ...], "torch.Tensor | None"], None]


class ObservedRead:
    """An implementation of depth attention: the reference, of which one sees what it reads and from which one takes
    sources away. A source that is taken away is not there: the weights of the others are those of a softmax without it,
    and `mix="sum"` counts one source less. With `mix="gated"` it stays in the residual stream.

    Attributes:
        look: called before every read with its index, the finished sources and the partial sum, each
            `[batch, sequence, hidden]`.
        masked: pairs of a read and a source (0 for the embedding, else the number of a block). A read that sees one
            source only keeps it.
    """

    def __init__(self, look: Look | None = None, masked: Collection[tuple[int, int]] = ()):
        self.look, self.masked = look, frozenset(masked)

    def covers(self, settings: DepthSettings) -> bool:
        return True

    def fuses(self, state: Any) -> bool:
        return False

    def read(
        self, queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        read, state = state.depth, state.added()
        if self.look is not None:
            self.look(read, state.sources, state.partial_sum)
        seen = settings.seen(read)
        kept = [source for source in seen if (read, source) not in self.masked]
        return normed(EagerDepthAttention.mixed(queries[read], state, kept or seen, settings), norm), state


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

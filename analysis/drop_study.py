"""What a source is worth: the loss when a read does without it, beside the weight that the read gives it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .errors import AnalysisError
from .layer_outputs import token_losses
from .layout import Layout
from .observation import ObservedRead, observed
from .statistics import collect


@dataclass(frozen=True)
class Dropped:
    """One source that was masked out.

    Attributes:
        read: index of the read; `None` if the source was masked out of all reads that could do without it.
        source: 0 for the embedding, else the number of the block.
        weight: mean weight of the source, over tokens, heads and these reads.
        loss: mean loss per token without it, in nats.
        increase: that loss minus the loss of the whole model.
    """

    read: int | None
    source: int
    weight: float
    loss: float
    increase: float


@dataclass(frozen=True)
class DropStudy:
    """Attributes:
    loss: mean loss per token of the whole model, in nats.
    num_tokens: how many tokens were predicted each time.
    reads: one source out of one read.
    blocks: one source out of all reads.
    """

    loss: float
    num_tokens: int
    reads: tuple[Dropped, ...]
    blocks: tuple[Dropped, ...]


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], masked: Collection[tuple[int, int]] = ()
) -> tuple[float, int]:
    """The loss per token in nats, with sources masked out, and how many tokens were predicted.

    Args:
        model (`PreTrainedModel`): an AttnRes model with a language model's head.
        batches: of token ids, each `[batch, sequence]`.
        masked: pairs of a read and a source; see [`ObservedRead`].
    """
    total, count = 0.0, 0
    with observed(model, ObservedRead(masked=masked)):
        for input_ids in batches:
            if input_ids.shape[1] > 1:
                losses = token_losses(model, input_ids.to(model.device))
                total, count = total + losses.double().sum().item(), count + losses.numel()
    if not count:
        raise AnalysisError("no token was predicted; the text is too short.")
    return total / count, count


def drop_source(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    *,
    reads: Iterable[int] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> DropStudy:
    """Masks each source out of each read in turn, then each source out of all reads.

    Args:
        model (`PreTrainedModel`): an AttnRes model with a language model's head.
        batches: of token ids, each `[batch, sequence]`; all of them are run once for each pair of a read and a source.
        reads (*optional*): indices of the reads to study, instead of all.
        advance: called with how many of how many runs are done.

    Returns:
        [`DropStudy`]
    """
    batches = list(batches)
    layout = Layout.of(model)
    weights = collect(model, batches).mean.mean(0)
    chosen = {*range(layout.num_sublayers + 1)} if reads is None else {*reads}
    visible = np.isfinite(weights) & (np.isfinite(weights).sum(-1, keepdims=True) > 1)
    seen = [(read, source) for read, source in np.argwhere(visible).tolist()]
    pairs = [(read, source) for read, source in seen if read in chosen]
    total = len(pairs) + layout.num_blocks + 1
    loss, num_tokens = mean_loss(model, batches)

    def study(masked: list[tuple[int, int]], read: int | None, source: int) -> Dropped:
        without = mean_loss(model, batches, masked)[0]
        weight = sum(float(weights[pair]) for pair in masked) / max(1, len(masked))
        return Dropped(read, source, weight, without, without - loss)

    of_reads, of_blocks = [], []
    for done, (read, source) in enumerate(pairs):
        advance(done, total)
        of_reads.append(study([(read, source)], read, source))
    for source in range(layout.num_blocks + 1):
        advance(len(pairs) + source, total)
        of_blocks.append(study([pair for pair in seen if pair[1] == source], None, source))
    advance(total, total)
    return DropStudy(loss, num_tokens, tuple(of_reads), tuple(of_blocks))

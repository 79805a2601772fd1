"""Statistics of depth weights, accumulated while text streams through: memory does not depend on its length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .errors import AnalysisError
from .layout import Layout, base_model

PIECE = 1 << 13  # characters that are tokenised at once
MAX_WEIGHTS_KEPT = 600_000  # weights of single tokens that are kept, over all reads
MAX_TOKENS_KEPT = 256


def per_head(weights: torch.Tensor) -> torch.Tensor:
    """`[batch, sequence, sources]` of one depth head, or `[batch, sequence, heads, sources]`, as the latter."""
    return weights.unsqueeze(2) if weights.ndim == 3 else weights


@dataclass
class DepthStatistics:
    """Sums over tokens of the weights of every read, in float64. Sources that a read does not see count as NaN.

    Attributes:
        layout: which reads and sources there are.
        num_tokens: T, how many tokens were seen.
        token_ids: the ids of the K first tokens, whose weights are kept.
        token_weights: their weights, one `[K, heads, sources]` for each read, float32.
    """

    layout: Layout
    max_tokens_kept: int = MAX_TOKENS_KEPT
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    token_weights: list[list[np.ndarray]] = field(default_factory=list)
    _sums: np.ndarray | None = None  # [3, heads, reads, sources]: of weights, of their squares, of being the largest
    _entropies: np.ndarray | None = None  # [heads, reads]

    def add(self, depth_attentions: Iterable[torch.Tensor], input_ids: torch.Tensor) -> None:
        """Adds one forward.

        Args:
            depth_attentions: of each read, `[batch, sequence, sources]` or `[batch, sequence, heads, sources]`.
            input_ids (`torch.Tensor`): `[batch, sequence]`.
        """
        reads = [per_head(weights).flatten(0, 1) for weights in depth_attentions]
        layout, heads = self.layout, reads[0].shape[1]
        if len(reads) != layout.num_sublayers + 1:
            raise AnalysisError(f"the model made {len(reads)} reads; {layout.num_sublayers + 1} were expected.")
        if self._sums is None or self._entropies is None:
            self._sums = np.zeros((3, heads, len(reads), layout.num_blocks + 1))
            self._sums[:] = np.nan
            self._entropies = np.zeros((heads, len(reads)))
            self.token_weights = [[] for _ in reads]
        keep = min(self._capacity(heads) - len(self.token_ids), input_ids.numel())
        self.token_ids += input_ids.flatten()[:keep].tolist()
        for read, weights in enumerate(reads):
            columns = layout.columns(read, weights.shape[-1])
            weights = weights.detach().float()
            share = weights / weights.sum(-1, keepdim=True)
            largest = torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1])
            sums = torch.stack([weights.sum(0), weights.square().sum(0), largest.sum(0)]).cpu().double().numpy()
            seen = self._sums[:, :, read, columns]
            self._sums[:, :, read, columns] = np.nan_to_num(seen) + sums
            self._entropies[:, read] += torch.special.entr(share).sum((0, 2)).cpu().double().numpy()
            if keep > 0:
                self.token_weights[read].append(weights[:keep].cpu().numpy())
        self.num_tokens += input_ids.numel()

    def _capacity(self, heads: int) -> int:
        layout = self.layout
        per_token = heads * sum(layout.num_visible(read) for read in range(layout.num_sublayers + 1))
        return max(1, min(self.max_tokens_kept, MAX_WEIGHTS_KEPT // per_token))

    def _seen(self) -> np.ndarray:
        if self._sums is None or not self.num_tokens:
            raise AnalysisError("no token was seen; the text is empty.")
        return self._sums

    @property
    def mean(self) -> np.ndarray:
        """Mean weight, `[heads, reads, sources]`, NaN where a read does not see a source."""
        return self._seen()[0] / self.num_tokens

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of the weight over tokens, `[heads, reads, sources]`."""
        return np.sqrt(np.maximum(self._seen()[1] / self.num_tokens - self.mean**2, 0))

    @property
    def winners(self) -> np.ndarray:
        """Share of tokens that read most from a source, `[heads, reads, sources]`."""
        return self._seen()[2] / self.num_tokens

    @property
    def entropy(self) -> np.ndarray:
        """Mean entropy of the weights of a token, in nats, `[heads, reads]`."""
        self._seen()
        assert self._entropies is not None
        return self._entropies / self.num_tokens

    def weights_of_tokens(self) -> np.ndarray:
        """Weights of the first K tokens, `[K, heads, reads, sources]`, float32, NaN where a read sees no source."""
        heads, num_reads, num_sources = self.mean.shape
        found = np.full((len(self.token_ids), heads, num_reads, num_sources), np.nan, np.float32)
        for read, parts in enumerate(self.token_weights):
            weights = np.concatenate(parts)
            found[:, :, read, self.layout.columns(read, weights.shape[-1])] = weights
        return found


@torch.no_grad()
def collect(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], statistics: DepthStatistics | None = None
) -> DepthStatistics:
    """Runs batches of token ids through a model and accumulates the weights of its reads.

    Args:
        model (`PreTrainedModel`): an AttnRes model, with a head or without; its head is not run.
        batches: of token ids, each `[batch, sequence]`.
        statistics (`DepthStatistics`, *optional*): what was accumulated so far.

    Returns:
        [`DepthStatistics`]
    """
    statistics = statistics or DepthStatistics(Layout.of(model))
    base = base_model(model)
    for input_ids in batches:
        outputs = base(
            input_ids=input_ids.to(model.device), use_cache=False, output_depth_attentions=True, return_dict=True
        )
        statistics.add(outputs.depth_attentions, input_ids)
    return statistics


def pieces(text: str | Path) -> Iterator[str]:
    """A text, or the text of a file, in pieces that end at line breaks where there are any."""
    if isinstance(text, str):
        yield text
        return
    try:
        with text.open(encoding="utf-8", errors="replace") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)
    except OSError as error:
        raise AnalysisError(f"the text {text} cannot be read: {error.strerror}.") from error


def windows(
    tokenizer: Any, pieces: Iterable[str], sequence_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[torch.Tensor]:
    """The tokens of a text in batches of windows that do not overlap, each `[batch, sequence]`.

    The last windows are shorter, and none is padded. Pieces are taken as they are needed.

    Args:
        tokenizer: of the model.
        pieces: of the text, as [`pieces`] gives them.
        sequence_length (`int`): tokens in a window.
        batch_size (`int`): windows in a batch.
        max_tokens (`int`, *optional*): stop after so many tokens.
    """
    waiting: list[int] = []
    left = float("inf") if max_tokens is None else max_tokens
    size = sequence_length * batch_size
    for number, piece in enumerate(pieces):
        waiting += tokenizer(piece, add_special_tokens=number == 0, verbose=False)["input_ids"]
        while len(waiting) >= size and left > 0:
            taken, waiting = waiting[: min(size, int(min(left, size)))], waiting[size:]
            left -= len(taken)
            yield from _in_windows(taken, sequence_length)
        if left <= 0:
            return
    yield from _in_windows(waiting[: int(min(left, len(waiting)))], sequence_length)


def _in_windows(ids: list[int], sequence_length: int) -> Iterator[torch.Tensor]:
    whole = len(ids) // sequence_length * sequence_length
    if whole:
        yield torch.tensor(ids[:whole]).view(-1, sequence_length)
    if whole < len(ids):
        yield torch.tensor([ids[whole:]])

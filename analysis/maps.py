"""Depth maps: how much each read takes from each source, as labelled arrays that a notebook shows."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .errors import AnalysisError
from .layout import Layout
from .statistics import DepthStatistics, collect


@dataclass(frozen=True, repr=False)
class DepthMaps:
    """Depth weights of a model on a text, over T tokens. Entries for sources that a read does not see are NaN.

    Attributes:
        layout ([`Layout`]): the reads, which are the rows, and the sources, which are the columns.
        num_tokens (`int`): T.
        weights: mean weight, `[heads, reads, sources]`.
        deviation: standard deviation of the weight over tokens, `[heads, reads, sources]`.
        winners: share of tokens that read most from the source, `[heads, reads, sources]`.
        entropy: mean entropy of a token's weights in nats, `[heads, reads]`.
        token_ids: ids of the first K tokens.
        token_weights: weights of these tokens, `[K, heads, reads, sources]`.
    """

    layout: Layout
    num_tokens: int
    weights: np.ndarray
    deviation: np.ndarray
    winners: np.ndarray
    entropy: np.ndarray
    token_ids: tuple[int, ...]
    token_weights: np.ndarray

    @classmethod
    def of(cls, statistics: DepthStatistics) -> DepthMaps:
        return cls(
            statistics.layout,
            statistics.num_tokens,
            statistics.mean,
            statistics.deviation,
            statistics.winners,
            statistics.entropy,
            tuple(statistics.token_ids),
            statistics.weights_of_tokens(),
        )

    @property
    def num_heads(self) -> int:
        return self.weights.shape[0]

    @property
    def uniform(self) -> np.ndarray:
        """The weight that a read with a zero query gives to every source, `[reads]`."""
        return 1 / np.isfinite(self.weights[0]).sum(-1)

    @property
    def relative_entropy(self) -> np.ndarray:
        """Entropy as a share of the largest that is possible, `[heads, reads]`: 1 if every source weighs the same. NaN
        for a read of one source."""
        most = np.log(1 / self.uniform)
        return self.entropy / np.where(most > 0, most, np.nan)

    def mixing_matrix(self) -> np.ndarray:
        """The depth mixing matrix M (Fig. 9), `[heads, reads, 1 + L]`: the factor with which the embedding and the
        output of each sublayer enter a read. It is 1 for all that came before in a standard residual, and also with
        zero queries and `mix="sum"`, or zero gates and `mix="gated"`."""
        layout, heads = self.layout, self.num_heads
        matrix = np.zeros((heads, layout.num_sublayers + 1, layout.num_sublayers + 1))
        scale = 1 / self.uniform if layout.mix == "sum" else np.ones(layout.num_sublayers + 1)
        residual = 0.0
        if layout.gates is not None:
            scale, residual = np.array(layout.gates), 1.0
            scale[0] = 0.0  # a read of the embedding alone is the embedding
        weights = residual + np.nan_to_num(self.weights) * scale[None, :, None]
        for source in layout.sources:
            for column in range(source.first + 1, source.last + 2):  # column 0 is the embedding
                written = np.arange(layout.num_sublayers + 1) >= column
                matrix[:, written, column] = weights[:, written, source.index]
        return matrix

    def token_deviation(self) -> np.ndarray:
        """How far each kept token is from the mean, `[K, heads, reads]`: half the sum of the absolute differences of
        weights, 0 if they are the same and 1 if they share no source."""
        return np.nansum(np.abs(self.token_weights - self.weights), -1) / 2

    def to_dataframe(self) -> Any:
        """One row for each head, read and source that the read sees, as a `pandas.DataFrame`."""
        from .tables import depth_map

        return depth_map(self)

    def plot(self) -> Any:
        """The mean weights as an `altair.Chart`."""
        from .figures import depth_map

        return depth_map(self.to_dataframe(), self.layout)

    def __repr__(self) -> str:
        layout = self.layout
        return (
            f"DepthMaps({self.num_heads} head(s), {layout.num_sublayers + 1} reads, {layout.num_blocks + 1} sources, "
            f"{self.num_tokens} tokens)"
        )

    def _repr_html_(self) -> str:
        """A table of the first head's mean weights in percent; the bluer the cell, the larger the weight."""
        layout = self.layout
        header = "".join(f"<th title='{escape(source.detail)}'>{escape(source.name)}</th>" for source in layout.sources)
        rows = []
        for read, weights in zip(layout.reads, self.weights[0]):
            cells = "".join(
                "<td></td>"
                if np.isnan(weight)
                else f"<td style='text-align:right;background:rgba(32,87,168,{weight:.2f});"
                f"color:{'#fff' if weight > 0.55 else 'inherit'}'>{100 * weight:.0f}</td>"
                for weight in weights
            )
            rows.append(f"<tr><th style='text-align:left'>{read.index} {escape(read.place)}</th>{cells}</tr>")
        caption = f"Mean depth weights in percent, over {self.num_tokens:,} tokens" + (
            f", head 0 of {self.num_heads}" if self.num_heads > 1 else ""
        )
        return (
            f"<table><caption>{caption}</caption><thead><tr><th>read</th>{header}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )


def depth_maps(model: PreTrainedModel, input_ids: torch.Tensor, max_tokens_kept: int = 256) -> DepthMaps:
    """Runs an AttnRes model once and returns the weights of its reads.

    Args:
        model (`PreTrainedModel`): an AttnRes model, with a head or without.
        input_ids (`torch.Tensor`): token ids, `[batch, sequence]` or `[sequence]`, without padding.
        max_tokens_kept (`int`, *optional*, defaults to 256): of so many tokens the weights are kept one by one.

    Returns:
        [`DepthMaps`]

    Raises:
        AnalysisError: the model has no attention over depth, or there are no tokens.
    """
    input_ids = torch.as_tensor(input_ids)
    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    if input_ids.ndim != 2 or not input_ids.numel():
        raise AnalysisError(f"input_ids has shape {[*input_ids.shape]}; [batch, sequence] was expected, with tokens.")
    statistics = DepthStatistics(Layout.of(model), max_tokens_kept)
    was_training = model.training
    model.eval()
    try:
        return DepthMaps.of(collect(model, [input_ids], statistics))
    finally:
        model.train(was_training)

"""The numbers behind the figures, as data frames: what a CSV file holds and what a figure draws is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .drop_study import DropStudy
from .layer_outputs import Magnitudes
from .layout import Layout

if TYPE_CHECKING:  # maps make tables of themselves
    from .maps import DepthMaps


def depth_map(maps: DepthMaps) -> pd.DataFrame:
    """One row for each head, read and source that it sees. `relative` is the weight over the uniform weight."""
    layout, rows = maps.layout, []
    uniform = maps.uniform
    for head, read, source in np.argwhere(np.isfinite(maps.weights)).tolist():
        a, b = layout.reads[read], layout.sources[source]
        rows.append(
            {
                "head": head,
                "read": read,
                "kind": a.kind,
                "layer": a.layer,
                "block": a.block + 1,
                "row": a.label,
                "place": a.place,
                "source": source,
                "name": b.name,
                "sublayers": b.detail,
                "weight": maps.weights[head, read, source],
                "uniform": uniform[read],
                "relative": maps.weights[head, read, source] / uniform[read],
                "deviation": maps.deviation[head, read, source],
                "winners": maps.winners[head, read, source],
            }
        )
    return pd.DataFrame(rows)


def entropy(maps: DepthMaps) -> pd.DataFrame:
    """One row for each head and read. `relative` is 1 for uniform weights."""
    relative = maps.relative_entropy
    return pd.DataFrame(
        {
            "head": head,
            "read": read.index,
            "kind": read.kind,
            "place": read.place,
            "entropy": maps.entropy[head, read.index],
            "relative": relative[head, read.index],
        }
        for head in range(maps.num_heads)
        for read in maps.layout.reads
    )


def mixing_matrix(maps: DepthMaps) -> pd.DataFrame:
    """One row for each head, read and output before it: of the model, and 1 for a standard residual."""
    matrix = maps.mixing_matrix()
    return pd.DataFrame(
        {"head": head, "read": read, "output": output, "factor": matrix[head, read, output], "residual": 1.0}
        for head in range(maps.num_heads)
        for read in range(matrix.shape[1])
        for output in range(read + 1)
    )


def parameters(layout: Layout, depth: Any) -> pd.DataFrame:
    """One row for each read: how far training moved its query from zero, its key norm from one, its gate from zero.

    Args:
        layout ([`Layout`]): of the model.
        depth ([`DepthAttention`]): its depth parameters. What a variant does not have has no column.
    """
    table = pd.DataFrame({"read": read.index, "kind": read.kind, "place": read.place} for read in layout.reads)
    query = depth.query.detach().double().cpu().flatten(1)
    table["query_norm"] = query.norm(dim=1).numpy()
    if depth.key_norm is not None:
        key_norm = depth.key_norm.detach().double().cpu()
        table["key_norm_deviation"] = (key_norm - 1).square().mean(1).sqrt().numpy()
        table["key_norm_smallest"], table["key_norm_largest"] = key_norm.amin(1).numpy(), key_norm.amax(1).numpy()
        if query.shape == key_norm.shape:
            table["folded_query_norm"] = (query * key_norm).norm(dim=1).numpy()
    if layout.gates is not None:
        table["gate"] = layout.gates
    return table


def magnitudes(found: Mapping[str, Magnitudes]) -> pd.DataFrame:
    """One row for each checkpoint and decoder layer."""
    return pd.DataFrame(
        {
            "checkpoint": name,
            "layer": layer,
            "written": result.written[layer],
            "accumulated": result.accumulated[layer],
            "gradient": None if result.gradients is None else result.gradients[layer],
        }
        for name, result in found.items()
        for layer in range(result.sums.shape[1])
    )


def dropped(study: DropStudy, layout: Layout) -> pd.DataFrame:
    """One row for each source that was masked out of a read, then of all reads (`read` is empty there)."""
    return pd.DataFrame(
        {
            "read": drop.read,
            "kind": None if drop.read is None else layout.reads[drop.read].kind,
            "layer": None if drop.read is None else layout.reads[drop.read].layer,
            "block": None if drop.read is None else layout.reads[drop.read].block + 1,
            "row": None if drop.read is None else layout.reads[drop.read].label,
            "place": None if drop.read is None else layout.reads[drop.read].place,
            "source": drop.source,
            "name": layout.sources[drop.source].name,
            "sublayers": layout.sources[drop.source].detail,
            "weight": drop.weight,
            "loss": drop.loss,
            "increase": drop.increase,
        }
        for drop in (*study.reads, *study.blocks)
    )


def deviating_tokens(maps: DepthMaps, tokens: Sequence[str], count: int = 200) -> pd.DataFrame:
    """The kept tokens and reads whose weights are furthest from the mean, the furthest first."""
    deviation = maps.token_deviation()
    order = np.argsort(-deviation, axis=None, kind="stable")[:count]
    rows = []
    for token, head, read in zip(*np.unravel_index(order, deviation.shape)):
        weights = maps.token_weights[token, head, read]
        most = int(np.nanargmax(weights))
        rows.append(
            {
                "position": int(token),
                "token": tokens[token],
                "head": int(head),
                "read": int(read),
                "place": maps.layout.reads[read].place,
                "distance": deviation[token, head, read],
                "most_read": maps.layout.sources[most].name,
                "weight": weights[most],
                "mean_weight": maps.weights[head, read, most],
            }
        )
    return pd.DataFrame(rows)


def deviating_reads(maps: DepthMaps) -> pd.DataFrame:
    """How much the weights of each read differ between tokens, over all tokens: the root of the summed variances."""
    spread = np.sqrt(np.nansum(maps.deviation**2, -1))
    return pd.DataFrame(
        {"head": head, "read": read.index, "kind": read.kind, "place": read.place, "spread": spread[head, read.index]}
        for head in range(maps.num_heads)
        for read in maps.layout.reads
    )

"""What the numbers say, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from .drop_study import DropStudy
from .layer_outputs import Magnitudes
from .layout import EMBEDDING
from .maps import DepthMaps

EVEN = 0.999  # relative entropy above which weights are called even


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 or value == 0 else f"{100 * value:.1f} %"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def of_maps(maps: DepthMaps) -> Iterator[str]:
    """Sentences on where reads read from. With several depth heads, on the mean of the heads."""
    layout = maps.layout
    reads, sources = layout.reads, layout.sources
    block = "1 sublayer (Full AttnRes)" if layout.block_size == 1 else f"{layout.block_size} sublayers"
    heads = f", with {maps.num_heads} depth heads" if maps.num_heads > 1 else ""
    yield (
        f"The model has {layout.num_layers} decoder layers. Their {layout.num_sublayers} sublayers make "
        f"{layout.num_blocks} block{'s' if layout.num_blocks > 1 else ''} of {block}. There are {len(reads)} "
        f"reads{heads}."
    )
    weights = maps.weights.mean(0)
    relative = maps.relative_entropy.mean(0)
    if np.nanmin(relative) > 1 - 1e-6:
        yield (
            "Every read gives the same weight to all its sources. So it is when the queries are zero, as in a "
            "checkpoint that was just converted."
        )
        return
    later = [read.index for read in reads if layout.num_visible(read.index) > 2] or [reads[-1].index]
    times = weights / maps.uniform[:, None]
    what = "input" if layout.gates is None else "mean, which its gate adds to the residual stream,"
    read = max(later, key=lambda index: times[index, 0])
    yield (
        f"{_capital(str(reads[read]))}, takes {percent(weights[read, 0])} of its {what} from the {EMBEDDING}. An even "
        f"share would be {percent(maps.uniform[read])}. No other read with more than two sources takes as many times "
        "its even share from there."
    )
    read, source = map(
        int, np.unravel_index(np.nanargmax(np.where(np.arange(len(reads))[:, None] > 0, times, np.nan)), times.shape)
    )
    yield (
        f"The strongest preference: {reads[read]}, takes {percent(weights[read, source])} from {sources[source]}, "
        f"{times[read, source]:.1f} times an even share."
    )
    read = int(np.nanargmin(relative))
    yield (
        f"{_capital(str(reads[read]))}, is the most selective. Its entropy is {percent(relative[read])} of that of "
        "even weights."
    )
    spread = np.sqrt(np.nansum(maps.deviation.mean(0) ** 2, -1))
    read = int(spread.argmax())
    source = int(np.nanargmax(maps.deviation.mean(0)[read]))
    yield (
        f"{_capital(str(reads[read]))}, depends most on the token: its weight on {sources[source]} is "
        f"{percent(weights[read, source])} in the mean, with a standard deviation of "
        f"{percent(maps.deviation.mean(0)[read, source])} over tokens."
    )
    even = int((relative > EVEN).sum())
    yield f"{even} of {len(reads) - 1} reads with a choice are within 0.1 % of even weights, by their entropy."


def of_parameters(frame: pd.DataFrame) -> Iterator[str]:
    longest = frame.loc[frame["query_norm"].idxmax()]
    if longest["query_norm"] > 0:
        yield (
            f"Training moved the query of read {longest['read']}, {longest['place']}, furthest from zero, to a norm of "
            f"{longest['query_norm']:.3g}."
        )


def of_magnitudes(found: dict[str, Magnitudes]) -> Iterator[str]:
    for name, result in found.items():
        accumulated = result.accumulated
        yield (
            f"In {name}, what accumulates has a root mean square of {accumulated[0]:.3g} behind the first decoder "
            f"layer, {accumulated[-1]:.3g} behind the last, and {accumulated.max():.3g} at most."
        )


def of_dropped(study: DropStudy, maps: DepthMaps) -> Iterator[str]:
    layout = maps.layout
    worst = max(study.blocks, key=lambda drop: drop.increase)
    yield (
        f"If no read may use {layout.sources[worst.source]}, the loss rises from {study.loss:.3f} to {worst.loss:.3f} "
        "nats per token. No other source is missed as much."
    )
    one = max(study.reads, key=lambda drop: drop.increase)
    assert one.read is not None
    yield (
        f"{_capital(str(layout.reads[one.read]))}, misses {layout.sources[one.source]} most of all single reads and "
        f"sources: {one.increase:+.3f} nats."
    )
    if len(study.reads) > 3:
        frame = pd.DataFrame({"weight": [d.weight for d in study.reads], "increase": [d.increase for d in study.reads]})
        correlation = frame.rank().corr().iloc[0, 1]
        if np.isfinite(correlation):
            yield (
                f"Over {len(frame)} pairs of a read and a source, the rank correlation of weight and loss is "
                f"{correlation:.2f}. A large weight is not yet a large effect where this is small."
            )

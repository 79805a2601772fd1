"""The reads and sources of a model, the rows and columns of a depth map, with names that a reader knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..rewiring import decoder_layers
from .errors import AnalysisError

EMBEDDING = "embedding"
OUTPUT = "output"
# What the sublayers of one decoder layer are, by their number.
KINDS: dict[int, tuple[str, ...]] = {1: ("layer",), 2: ("mixer", "MLP"), 3: ("mixer", "MLP", "per-layer input")}


@dataclass(frozen=True)
class Read:
    """One row of a depth map.

    Attributes:
        index: r, the number of sublayers that have written before it; also the index of its query.
        kind: of the sublayer behind it: `"mixer"`, `"MLP"`, ..., or `"output"` in front of the final norm.
        layer: index of its decoder layer; the output read has the number of layers.
        block: index of the block that is open at this read, from 0.
    """

    index: int
    kind: str
    layer: int
    block: int

    @property
    def place(self) -> str:
        if self.kind == OUTPUT:
            return "before the final norm"
        return f"before {'the ' if self.kind != 'layer' else ''}{_of_layer(self.kind, self.layer)}"

    @property
    def label(self) -> str:
        """As it stands beside a row: `"18"`, or `"output"`."""
        return OUTPUT if self.kind == OUTPUT else str(self.layer)

    def __str__(self) -> str:
        return f"read {self.index}, {self.place}"


@dataclass(frozen=True)
class Source:
    """One column of a depth map.

    Attributes:
        index: 0 for the embedding, else the number of its block, from 1.
        first, last: the sublayers whose outputs it sums; both -1 for the embedding.
        name: short, as `"embedding"`, `"block 3"` or, if a block is one sublayer, `"MLP 7"`.
        detail: the sublayers in words.
    """

    index: int
    first: int
    last: int
    name: str
    detail: str

    @property
    def short(self) -> str:
        return "emb." if self.index == 0 else str(self.index)

    def __str__(self) -> str:
        return self.name if self.name == self.detail else f"{self.name} ({self.detail})"


def _of_layer(kind: str, layer: int) -> str:
    return f"layer {layer}" if kind == "layer" else f"{kind} of layer {layer}"


@dataclass(frozen=True)
class Layout:
    """How depth is laid out: L sublayers in blocks of S, so N blocks, N + 1 sources and L + 1 reads.

    Attributes:
        num_sublayers: L.
        block_size: S.
        mix: `"mean"`, `"sum"` or `"gated"`.
        sublayers_per_layer: 2 as a rule.
        gates: that of each read, for `mix="gated"`.
    """

    num_sublayers: int
    block_size: int
    mix: str
    sublayers_per_layer: int
    gates: tuple[float, ...] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Layout:
        """The layout of a model.

        Raises:
            AnalysisError: the model has no attention over depth.
        """
        settings = getattr(model.config, "depth_attention", None)
        if not isinstance(settings, dict):
            raise AnalysisError(
                f"{type(model).__name__} has no attention over depth; convert its checkpoint first (attnres convert)."
            )
        num_sublayers = int(model.config.num_sublayers)
        per_layer = max(1, num_sublayers // len(decoder_layers(model)))
        gate = getattr(depth_module(model), "gate", None)
        gates = None if gate is None else tuple(gate.detach().flatten().tolist())
        return cls(num_sublayers, settings["block_size"], settings["mix"], per_layer, gates)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sublayers, in the order in which a decoder layer has them."""
        known = KINDS.get(self.sublayers_per_layer)
        return known or tuple(f"sublayer {i + 1}" for i in range(self.sublayers_per_layer))

    @property
    def num_layers(self) -> int:
        return self.num_sublayers // self.sublayers_per_layer

    @property
    def num_blocks(self) -> int:
        return -(-self.num_sublayers // self.block_size)

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        found = []
        for index in range(self.num_sublayers + 1):
            layer, position = divmod(index, self.sublayers_per_layer)
            kind = OUTPUT if index == self.num_sublayers else self.kinds[position]
            found.append(Read(index, kind, layer, min(index // self.block_size, self.num_blocks - 1)))
        return tuple(found)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        found = [Source(0, -1, -1, EMBEDDING, EMBEDDING)]
        for block in range(self.num_blocks):
            first = block * self.block_size
            last = min(first + self.block_size, self.num_sublayers) - 1
            if first == last:
                layer, position = divmod(first, self.sublayers_per_layer)
                name = f"{self.kinds[position]} {layer}"
                found.append(Source(block + 1, first, last, name, _of_layer(self.kinds[position], layer)))
            else:
                found.append(Source(block + 1, first, last, f"block {block + 1}", self._span(first, last)))
        return tuple(found)

    def _span(self, first: int, last: int) -> str:
        size = self.sublayers_per_layer
        if first % size == 0 and (last + 1) % size == 0:
            start, end = first // size, last // size
            return f"layer {start}" if start == end else f"layers {start} to {end}"
        return f"sublayers {first} to {last}"

    def num_visible(self, read: int) -> int:
        """How many sources a read sees: the embedding, the finished blocks and the open block's partial sum."""
        return 1 + -(-read // self.block_size)

    def columns(self, read: int, num_weights: int) -> list[int]:
        """The sources that so many weights of a read belong to. A read with fewer weights than sources sees a window:
        the embedding and the most recent ones."""
        visible = self.num_visible(read)
        if num_weights > visible:
            raise AnalysisError(f"read {read} has {num_weights} weights, but {visible} sources were written before it.")
        return [0, *range(visible - num_weights + 1, visible)]


def depth_module(model: PreTrainedModel) -> torch.nn.Module:
    """The depth parameters of a model, with a head or without.

    Raises:
        AnalysisError: there are none.
    """
    # By name: the classes that come with a checkpoint are others than those of this package.
    for module in model.modules():
        if type(module).__name__ == "DepthAttention":
            return module
    raise AnalysisError(f"{type(model).__name__} has no attention over depth; convert its checkpoint first.")


def base_model(model: PreTrainedModel) -> Any:
    """The part of a model that ends with the final norm, and holds the depth parameters if there are any."""
    for module in model.modules():
        if type(getattr(module, "depth_attention", None)).__name__ == "DepthAttention":
            return module
    return model.base_model

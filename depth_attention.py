# Copyright 2026 The attnres authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Depth attention: the reads of Attention Residuals (arXiv 2603.15031) and what travels between them.

The tensors are named and shaped as everywhere in this package:

    v_0 ... v_{n-1}   finished sources, each `[batch, sequence, hidden]`: the embedding, then one sum per block
    b                 partial sum of the open block, `[batch, sequence, hidden]`, absent right after a boundary
    w                 folded query of one read, `[hidden]`, float32: pseudo-query times key-norm weight

A read is `h = sum_i a_i v_i` with `a = softmax_i(w . v_i / rms(v_i))` over the sources and, if present, the partial sum
(Eq. 2-6). Statistics, softmax and accumulation are in float32, or in float64 for float64 sources.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .configuration_attnres import AttnResConfig


class DepthState(NamedTuple):
    """All that a decoder layer needs of the layers before it. Immutable: writing returns a new state.

    Attributes:
        sources (`tuple[torch.Tensor, ...]`):
            Finished sources v_0 ... v_{n-1}, each `[batch, sequence, hidden]`.
        partial_sum (`torch.Tensor`, *optional*):
            Sum of the outputs written to the open block, `[batch, sequence, hidden]`; `None` at a block boundary.
        phase_one (`tuple[torch.Tensor, ...]`):
            What the implementation computed over the finished sources for all reads of the open block (Algorithm 1);
            empty for implementations without phases.
    """

    sources: tuple[torch.Tensor, ...]
    partial_sum: torch.Tensor | None = None
    phase_one: tuple[torch.Tensor, ...] = ()

    def write(self, output: torch.Tensor, closes_block: bool) -> DepthState:
        """Adds a sublayer's output, `[batch, sequence, hidden]`, to the open block (Eq. 5), and closes the block if
        this was its last sublayer. Sources keep the dtype of the embedding, also under autocast."""
        output = output.to(self.sources[0].dtype)
        total = output if self.partial_sum is None else self.partial_sum + output
        if closes_block:
            return DepthState(sources=(*self.sources, total))
        return self._replace(partial_sum=total)

    def flatten(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the state in a row, as they cross the boundary of a decoder layer."""
        partial_sum = () if self.partial_sum is None else (self.partial_sum,)
        return (*self.sources, *partial_sum, *self.phase_one)

    @classmethod
    def unflatten(cls, tensors: tuple[torch.Tensor, ...], num_written: int, block_size: int) -> DepthState:
        """The inverse of [`~DepthState.flatten`]: after `num_written` sublayers the structure of a state is known."""
        num_sources = 1 + num_written // block_size
        if num_written % block_size == 0:
            return cls(sources=tuple(tensors[:num_sources]), phase_one=tuple(tensors[num_sources:]))
        return cls(tuple(tensors[:num_sources]), tensors[num_sources], tuple(tensors[num_sources + 1 :]))


class DepthAttention(nn.Module):
    """The learned part of Attention Residuals: a pseudo-query and a key-norm weight for each read.

    Read r stands in front of sublayer r; the last one, the output read, in front of the final norm. Read 0 sees the
    embedding alone, so its parameters have no effect and get no gradient.

    Attributes:
        query (`[reads, hidden]`): pseudo-queries w_l, zero at initialisation (all reads start as a uniform mean).
        key_norm (`[reads, hidden]`): weights g_l of the RMSNorm on the keys, one at initialisation.
    """

    def __init__(self, config: AttnResConfig):
        super().__init__()
        shape = (config.num_reads, config.get_text_config().hidden_size)
        self.query = nn.Parameter(torch.zeros(shape))
        self.key_norm = nn.Parameter(torch.ones(shape))

    def forward(self) -> torch.Tensor:
        """Returns the folded queries `w * g`, `[reads, hidden]`, in float32 (float64 if the parameters are).

        `w . (v / rms(v) * g) = (w * g) . v / rms(v)`, so no read ever needs the two apart. Taken once per forward of
        the model and handed to the layers: the parameters are then read inside this module alone, which is what sharded
        and offloaded parameters (FSDP, ZeRO, `device_map`) require.
        """
        return upcast(self.query) * upcast(self.key_norm)

    def extra_repr(self) -> str:
        return "reads={}, hidden_size={}".format(*self.query.shape)


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that statistics and sums are taken in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def depth_weights(
    query: torch.Tensor, sources: tuple[torch.Tensor, ...], partial_sum: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Depth attention weights of one read (Eq. 2): softmax over sources of `w . v / rms(v)`.

    Args:
        query (`torch.Tensor`): folded query `[hidden]`, float32.
        sources (`tuple[torch.Tensor, ...]`): n finished sources, each `[batch, sequence, hidden]`.
        partial_sum (`torch.Tensor`, *optional*): one more source, `[batch, sequence, hidden]`.
        eps (`float`): epsilon of the RMSNorm on the keys.

    Returns:
        `torch.Tensor`: `[batch, sequence, sources]`, the partial sum last.
    """
    values = sources if partial_sum is None else (*sources, partial_sum)
    logits = []
    for value in values:
        value = upcast(value)
        inverse_rms = torch.rsqrt(value.square().mean(-1) + eps)
        logits.append((value * query).sum(-1) * inverse_rms)
    return torch.stack(logits, dim=-1).softmax(-1)


class EagerDepthAttention:
    """The reference: every read looks at every source anew, as the equations are written."""

    @staticmethod
    def open_block(
        queries: torch.Tensor, sources: tuple[torch.Tensor, ...], mix: str, eps: float
    ) -> tuple[torch.Tensor, ...]:
        """Nothing is computed ahead.

        Args:
            queries (`torch.Tensor`): folded queries of the block's reads, `[reads, hidden]`, float32.
            sources (`tuple[torch.Tensor, ...]`): the finished sources, each `[batch, sequence, hidden]`.
            mix (`str`): `"mean"` or `"sum"`.
            eps (`float`): epsilon of the RMSNorm on the keys.

        Returns:
            `tuple[torch.Tensor, ...]`: what [`~EagerDepthAttention.read`] finds in `state.phase_one`.
        """
        return ()

    @staticmethod
    def read(query: torch.Tensor, state: DepthState, index_in_block: int, mix: str, eps: float) -> torch.Tensor:
        """One read (Eq. 1 and 6).

        Args:
            query (`torch.Tensor`): folded query `[hidden]`, float32.
            state (`DepthState`): sources, and the partial sum unless the read is the first of its block.
            index_in_block (`int`): how many sublayers the open block holds already.
            mix (`str`): `"mean"`, or `"sum"` to multiply by the number of sources.
            eps (`float`): epsilon of the RMSNorm on the keys.

        Returns:
            `torch.Tensor`: `[batch, sequence, hidden]` in the dtype of the sources.
        """
        values = state.sources if state.partial_sum is None else (*state.sources, state.partial_sum)
        if len(values) == 1:  # the softmax over one source is 1
            return values[0]
        weights = depth_weights(query, state.sources, state.partial_sum, eps)
        if mix == "sum":
            weights = weights * len(values)
        hidden_states = torch.zeros_like(upcast(values[0]))
        for weight, value in zip(weights.unbind(-1), values):
            hidden_states = hidden_states + weight.unsqueeze(-1) * upcast(value)
        return hidden_states.to(values[0].dtype)


DEPTH_ATTENTION_FUNCTIONS: dict[str, type[EagerDepthAttention]] = {"eager": EagerDepthAttention}
"""Implementations by their name in `config.depth_attention_implementation`."""


def read(
    queries: torch.Tensor, state: DepthState, num_written: int, config: AttnResConfig
) -> tuple[torch.Tensor, DepthState]:
    """The read in front of sublayer `num_written` (the output read, when all are written).

    Args:
        queries (`torch.Tensor`): folded queries of all reads, `[reads, hidden]`, from [`DepthAttention`].
        state (`DepthState`): the state after `num_written` sublayers.
        num_written (`int`): how many sublayers have written; also the index of this read.
        config (`AttnResConfig`): block size, mix, eps and implementation.

    Returns:
        `tuple[torch.Tensor, DepthState]`: the hidden states `[batch, sequence, hidden]`, and the state, which at the
        start of a block now holds phase one.
    """
    implementation = DEPTH_ATTENTION_FUNCTIONS[config.depth_attention_implementation]
    index_in_block = num_written % config.block_size
    if index_in_block == 0:
        block_queries = queries[num_written : num_written + config.block_size]
        state = state._replace(
            phase_one=implementation.open_block(block_queries, state.sources, config.mix, config.key_norm_eps)
        )
    hidden_states = implementation.read(queries[num_written], state, index_in_block, config.mix, config.key_norm_eps)
    return hidden_states, state

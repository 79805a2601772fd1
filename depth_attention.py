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
"""Depth attention, the reads of Attention Residuals (arXiv 2603.15031): parameters, reference, implementations by name.

[`EagerDepthAttention`] is the reference and reads like the paper's equations. `depth_state.py` names the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .configuration_attnres import DEPTH_ATTENTION_IMPLEMENTATIONS, DEPTH_DEFAULTS, AttnResConfig
from .depth_attention_two_phase import TwoPhaseDepthAttention, spread
from .depth_state import (
    DepthAttentionImplementation,
    DepthCache,
    DepthSettings,
    DepthState,
    Norm,
    key_scale,
    normed,
    scaled_and_normed,
    upcast,
)

# -- parameters --------------------------------------------------------------------------------------------------------


# The base class is there for its type alone; there is no normalisation in this module. Tools decide by the type
# `nn.LayerNorm` that weight decay leaves parameters alone (the Trainer of transformers does) and that they stay in
# float32. Both are right for vectors that start at zero and at one and move by small steps.
class DepthAttention(nn.LayerNorm):
    """The learned part of Attention Residuals: a pseudo-query and a key-norm weight for each read (Eq. 2).

    Read r stands in front of sublayer r. The last one, the output read, stands in front of the final norm. Read 0 sees
    the embedding alone, so its parameters have no effect and get no gradient.

    The parameters are float32 (or float64) whatever the dtype of the model is: `.half()`, `.bfloat16()` and
    `.to(dtype)` move them to another device, but leave their digits alone. In bfloat16 a step of 1e-4 would not move a
    query.

    Args:
        num_reads (`int`): number of reads, one more than there are sublayers.
        hidden_size (`int`): size of the hidden dimension.
        num_sources (`int`, *optional*): number of sources of the output read, by default that of Full AttnRes; for
            `query="static"`.
        depth_attention (`Mapping[str, Any]`, *optional*): the entry of a configuration, for variants of a read.

    Attributes:
        query (`torch.nn.Parameter`):
            Pseudo-queries w_l, `[reads, hidden]`, zero at initialisation, so that every read starts as a uniform mean.
            For other kinds of query: matrices, `[reads, hidden, hidden]` (`"input"`), or logits, `[reads, sources]`
            (`"static"`); also zero.
        key_norm (`torch.nn.Parameter`, *optional*):
            Weights g_l of the RMSNorm on the keys, `[reads, hidden]`, one at initialisation; absent without that norm.
        gate (`torch.nn.Parameter`, *optional*):
            Gates of `mix="gated"`, `[reads, 1]`, zero at initialisation.
    """

    def __init__(
        self,
        num_reads: int,
        hidden_size: int,
        num_sources: int | None = None,
        depth_attention: Mapping[str, Any] = DEPTH_DEFAULTS,
    ):
        nn.Module.__init__(self)
        kind, dtype = depth_attention["query"], torch.promote_types(torch.get_default_dtype(), torch.float32)
        shapes = {"learned": (hidden_size,), "input": (hidden_size, hidden_size), "static": (num_sources or num_reads,)}
        self.hidden_size, self.logit_scale = hidden_size, depth_attention["logit_scale"]
        self.query = nn.Parameter(torch.empty(num_reads, *shapes[kind], dtype=dtype))
        self.key_norm = self.gate = None
        if depth_attention["key_norm"] and kind != "static":
            self.key_norm = nn.Parameter(torch.empty(num_reads, hidden_size, dtype=dtype))
        if depth_attention["mix"] == "gated":
            self.gate = nn.Parameter(torch.empty(num_reads, 1, dtype=dtype))
        # What initialises a LayerNorm looks for these, and leaves alone what is None.
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: AttnResConfig) -> DepthAttention:
        """The depth parameters of a model with this configuration."""
        return cls(config.num_reads, config.hidden_size, config.num_blocks + 1, config.depth_attention)

    def reset_parameters(self) -> None:
        """Sets pseudo-queries and gates to zero and the key-norm weights to one."""
        nn.init.zeros_(self.query)
        if self.key_norm is not None:
            nn.init.ones_(self.key_norm)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """What reads have learned, in one tensor: the folded queries `w * g`, `[reads, hidden]`, in float32 (float64 if
        the parameters are).

        Since `w . (g * v / rms(v)) = (w * g) . v / rms(v)`, no read needs the two apart. A model takes them once per
        forward and hands them to its layers. So the parameters are read inside of this module alone, which is what
        sharded and offloaded parameters (FSDP, ZeRO, `device_map`) require.

        Matrices are folded on both sides: a query `W (g * k)` meets a key `g * k_i`. Gates are one more column.
        """
        queries = upcast(self.query)
        if self.key_norm is not None:
            weights = upcast(self.key_norm)
            if queries.dim() == 3:
                queries = queries * weights.unsqueeze(-2)  # its columns, then its rows
                weights = weights.unsqueeze(-1)
            queries = queries * weights
        if self.logit_scale != 1:
            queries = queries * self.logit_scale
        return queries if self.gate is None else torch.cat([queries, upcast(self.gate)], dim=-1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DepthAttention:
        # Every conversion of a module (`to`, `half`, `cuda`, `to_empty`, ...) comes through here.
        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            if not converted.is_floating_point() or converted.dtype.itemsize >= 4:
                return converted
            return tensor.to(converted.device, torch.promote_types(tensor.dtype, torch.float32))

        return super()._apply(without_rounding, recurse)

    def extra_repr(self) -> str:
        return f"reads={len(self.query)}, hidden_size={self.hidden_size}"


# -- implementations ---------------------------------------------------------------------------------------------------


def depth_weights(
    query: torch.Tensor, values: Sequence[torch.Tensor], indices: Sequence[int], settings: DepthSettings
) -> torch.Tensor:
    """Depth attention weights of one read (Eq. 2), `softmax_i(w . v_i / rms(v_i))`, or of its variant.

    Args:
        query (`torch.Tensor`):
            What the read has learned, float32 or float64: its folded query, `[hidden]`. For `query="input"` a folded
            matrix `[hidden, hidden]`; for `query="static"` logits, `[sources]`.
        values (`Sequence[torch.Tensor]`): the sources that the read looks at, each `[batch, sequence, hidden]`.
        indices (`Sequence[int]`): the index of each among all sources.
        settings (`DepthSettings`): which variant it is.

    Returns:
        `torch.Tensor`: `[batch, sequence, heads, sources]`, float32, or float64 for float64 sources.
    """
    heads, shape = (settings.num_heads, -1), values[0].shape[:-1]
    if len(values) == 1:  # the embedding, before anything is learned
        return query.new_ones(*shape, settings.num_heads, 1)
    if settings.query == "static":
        logits = torch.stack([query[index] for index in indices]).expand(*shape, 1, len(values))
    else:
        scales = [key_scale(value, settings.key_norm_eps).unsqueeze(-1) for value in values]
        if settings.query == "input":
            query = (upcast(values[-1]) * scales[-1]) @ query.T
        products = [(upcast(value) * query).unflatten(-1, heads).sum(-1) for value in values]
        logits = torch.stack([product * scale for product, scale in zip(products, scales)], dim=-1)
    return logits.softmax(-1) if settings.weighting == "softmax" else 2 * logits.sigmoid() / len(values)


class EagerDepthAttention:
    """The reference: every read looks at every source anew, as the equations are written; a
    [`DepthAttentionImplementation`]. It has derivatives of every order."""

    @staticmethod
    def covers(settings: DepthSettings) -> bool:
        """All variants."""
        return True

    @staticmethod
    def fuses(state: DepthState) -> bool:
        """Never."""
        return False

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        """One read (Eq. 1 and 6), `h = sum_i a_i v_i`; see [`DepthAttentionImplementation.read`]."""
        state = state.added()
        hidden_states = EagerDepthAttention.mixed(queries[state.depth], state, settings.seen(state.depth), settings)
        return normed(hidden_states, norm), state

    @staticmethod
    def mixed(query: torch.Tensor, state: DepthState, indices: Sequence[int], settings: DepthSettings) -> torch.Tensor:
        """The read that looks at the sources with these indices, `[batch, sequence, hidden]`."""
        visible = state.visible()
        values = [visible[index] for index in indices]
        if len(values) == 1:
            return values[0]
        weights = depth_weights(query, values, indices, settings) * settings.scale(len(values))
        hidden_states = torch.zeros_like(upcast(values[0]))
        for weight, value in zip(weights.unbind(-1), values):  # `[batch, sequence, heads]`
            summand = upcast(value)
            if settings.values == "normalized":
                summand = summand * key_scale(value, settings.key_norm_eps).unsqueeze(-1)
            by_head = weight.unsqueeze(-1) * summand.unflatten(-1, (settings.num_heads, -1))
            hidden_states = hidden_states + by_head.flatten(-2)
        return hidden_states.to(values[0].dtype)


class TritonDepthAttention:
    """Algorithm 1 in the kernels of `depth_attention_triton.py`, for CUDA devices; a [`DepthAttentionImplementation`].

    Its reads raise [`AttnResError`] where Triton is missing, or where the sources are on another device.
    """

    @staticmethod
    def covers(settings: DepthSettings) -> bool:
        """What [`TwoPhaseDepthAttention`] covers."""
        return TwoPhaseDepthAttention.covers(settings)

    @staticmethod
    def fuses(state: DepthState) -> bool:
        """Always, also in training."""
        return True

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        """See [`DepthAttentionImplementation.read`]."""
        from .depth_attention_triton import phase_one, phase_two  # raises where triton is missing

        sources, partial_sum, addend, depth, cache = state
        query, eps, num_heads = queries[depth], settings.key_norm_eps, settings.num_heads
        if not state.has_phase_one():
            of_group = queries[depth : depth + settings.reads_left(depth, len(queries))]
            window = None if settings.window is None else (depth, settings.block_size, settings.window)
            results = phase_one(of_group, sources, eps, num_heads, window)
            cache = DepthCache(sources, None, depth, results[: len(of_group)], results[len(of_group) :])
            state = DepthState(sources, partial_sum, addend, depth, cache)
        output, log_sum_exp, recent = state.phase_one(settings)
        scale = settings.scale(len(sources) + (partial_sum is not None))
        if not recent:
            return scaled_and_normed(output, scale, norm, sources[0].dtype), state
        *finished, last = recent
        if finished:  # the kernel of phase two merges one source, so the others get a phase one of their own
            recent_output, recent_log_sum_exp = phase_one(query.unsqueeze(0), tuple(finished), eps, num_heads)
            share = torch.sigmoid(recent_log_sum_exp - log_sum_exp)
            output = torch.lerp(output, recent_output, spread(share, num_heads, output.shape[-1]))
            log_sum_exp = torch.logaddexp(log_sum_exp, recent_log_sum_exp)
        hidden_states, total = phase_two(output, log_sum_exp, last, query, scale, eps, addend, norm)
        return hidden_states, state if addend is None else DepthState(sources, total, None, depth, cache)


HAS_TRITON = find_spec("triton") is not None


class AutoDepthAttention:
    """[`TritonDepthAttention`] where it runs, else [`TwoPhaseDepthAttention`]; a [`DepthAttentionImplementation`].

    It chooses at every read, because the layers of a model may be on different devices.
    """

    @staticmethod
    def choose(state: DepthState) -> type[TwoPhaseDepthAttention] | type[TritonDepthAttention]:
        """The implementation that serves this state."""
        return TritonDepthAttention if HAS_TRITON and state.sources[0].is_cuda else TwoPhaseDepthAttention

    @staticmethod
    def covers(settings: DepthSettings) -> bool:
        """What both cover."""
        return TwoPhaseDepthAttention.covers(settings)

    @staticmethod
    def fuses(state: DepthState) -> bool:
        """Whether the chosen implementation does."""
        return AutoDepthAttention.choose(state).fuses(state)

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        """See [`DepthAttentionImplementation.read`]."""
        return AutoDepthAttention.choose(state).read(queries, state, settings, norm)


DEPTH_ATTENTION_FUNCTIONS: dict[str, DepthAttentionImplementation] = dict(
    zip(
        DEPTH_ATTENTION_IMPLEMENTATIONS,  # "eager", "two_phase", "triton", "auto", in this order
        (EagerDepthAttention, TwoPhaseDepthAttention, TritonDepthAttention, AutoDepthAttention),
        strict=True,
    )
)
"""Implementations by their name in a configuration."""


def depth_settings(depth_attention: Mapping[str, Any], num_sublayers: int) -> DepthSettings:
    """The settings of a model.

    Its groups are single blocks or, if blocks are short, as many blocks as make about sqrt(L) sublayers. Phase one runs
    L / G times over up to L / S sources, and phase two merges up to G / S recent sources.

    Args:
        depth_attention (`Mapping[str, Any]`):
            The entry of a configuration, see [`AttnResConfig`]. What it lacks has its default.
        num_sublayers (`int`): number of sublayers, the paper's L.
    """
    entry = {**DEPTH_DEFAULTS, **depth_attention}
    block_size = entry["block_size"]
    settings = DepthSettings(
        block_size,
        entry["mix"],
        entry["key_norm_eps"] if entry["key_norm"] else None,
        DEPTH_ATTENTION_FUNCTIONS[entry["implementation"]],
        block_size * max(1, round(num_sublayers**0.5 / block_size)),
        **{name: entry[name] for name in ("num_heads", "query", "weighting", "window", "values")},
    )
    return (
        settings if settings.implementation.covers(settings) else settings._replace(implementation=EagerDepthAttention)
    )


# -- the read ----------------------------------------------------------------------------------------------------------


def has_functorch_transforms() -> bool:
    """Whether the code runs inside of a transform of `torch.func`, such as `torch.func.grad`."""
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return is_active is not None and is_active()


def read(
    queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
) -> tuple[torch.Tensor, DepthState]:
    """The read in front of sublayer `state.depth`; the output read after the last sublayer (Eq. 1-6).

    It runs in full precision under autocast too. Inside of a transform of `torch.func` the reference computes it,
    because the custom functions of the others do not support transforms.

    Args:
        queries (`torch.Tensor`): folded queries of all reads, `[reads, hidden]`, float32 or float64, what
            [`DepthAttention`] returns.
        state (`DepthState`): the state in front of the read.
        settings (`DepthSettings`): block size, mix, eps, implementation and group size.
        norm (`Norm`, *optional*): the RMSNorm that follows, if the read is to apply it.

    Returns:
        `tuple[torch.Tensor, DepthState]`: the hidden states, `[batch, sequence, hidden]` in the dtype of the sources,
        and the state at the same depth. Its cache holds phase one until the last read of the group.

    Raises:
        AttnResError: the implementation cannot run here, see [`TritonDepthAttention`].
    """
    device = queries.device.type  # the meta device, for one, has no autocast
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # it would compute the products in half precision
            return read(queries, state, settings, norm)
    if settings.mix == "gated":
        return gated_read(queries, state, settings, norm)
    implementation = settings.implementation
    if not torch.compiler.is_compiling() and has_functorch_transforms():
        implementation = EagerDepthAttention
    hidden_states, state = implementation.read(queries, state, settings, norm)
    cache = state.cache
    if cache is not None and cache.outputs and settings.reads_left(state.depth, len(queries)) == 1:
        # Phase one is the largest part of a state, so nothing refers to it any more after the last read of its group.
        state = state._replace(cache=cache.without_phase_one())
    return hidden_states, state


def gated_read(
    queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None
) -> tuple[torch.Tensor, DepthState]:
    """A [`read`] of `mix="gated"`: the residual stream plus the gate times the mean, `sum_i v_i + gate * h`.

    The gates are the last column of `queries`.
    """
    state = state.added()
    values = state.visible()
    mean, state = read(queries[:, :-1], state, settings._replace(mix="mean"), None)
    if len(values) > 1:
        residual = sum(map(upcast, values[1:]), upcast(values[0]))
        mean = (residual + queries[state.depth, -1] * upcast(mean)).to(values[0].dtype)
    return normed(mean, norm), state

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

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .configuration_attnres import DEPTH_ATTENTION_IMPLEMENTATIONS
from .depth_attention_two_phase import TwoPhaseDepthAttention
from .depth_state import (
    DepthAttentionImplementation,
    DepthCache,
    DepthSettings,
    DepthState,
    Norm,
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

    Attributes:
        query (`torch.nn.Parameter`):
            Pseudo-queries w_l, `[reads, hidden]`, zero at initialisation, so that every read starts as a uniform mean.
        key_norm (`torch.nn.Parameter`):
            Weights g_l of the RMSNorm on the keys, `[reads, hidden]`, one at initialisation.
    """

    def __init__(self, num_reads: int, hidden_size: int):
        nn.Module.__init__(self)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.query = nn.Parameter(torch.empty(num_reads, hidden_size, dtype=dtype))
        self.key_norm = nn.Parameter(torch.empty(num_reads, hidden_size, dtype=dtype))
        # What initialises a LayerNorm looks for these, and leaves alone what is None.
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the pseudo-queries to zero and the key-norm weights to one."""
        nn.init.zeros_(self.query)
        nn.init.ones_(self.key_norm)

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """The folded queries `w * g`, `[reads, hidden]`, in float32 (float64 if the parameters are).

        Since `w . (g * v / rms(v)) = (w * g) . v / rms(v)`, no read needs the two apart. A model takes them once per
        forward and hands them to its layers. So the parameters are read inside of this module alone, which is what
        sharded and offloaded parameters (FSDP, ZeRO, `device_map`) require.
        """
        return upcast(self.query) * upcast(self.key_norm)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DepthAttention:
        # Every conversion of a module (`to`, `half`, `cuda`, `to_empty`, ...) comes through here.
        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            if not converted.is_floating_point() or converted.dtype.itemsize >= 4:
                return converted
            return tensor.to(converted.device, torch.promote_types(tensor.dtype, torch.float32))

        return super()._apply(without_rounding, recurse)

    def extra_repr(self) -> str:
        return "reads={}, hidden_size={}".format(*self.query.shape)


# -- implementations ---------------------------------------------------------------------------------------------------


def depth_weights(
    query: torch.Tensor, sources: tuple[torch.Tensor, ...], partial_sum: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Depth attention weights of one read (Eq. 2), `softmax_i(w . v_i / rms(v_i))`.

    Args:
        query (`torch.Tensor`): folded query, `[hidden]`, float32 or float64.
        sources (`tuple[torch.Tensor, ...]`): the finished sources, each `[batch, sequence, hidden]`.
        partial_sum (`torch.Tensor`, *optional*): the partial sum of the open block, `[batch, sequence, hidden]`.
        eps (`float`): epsilon of the RMSNorm on the keys.

    Returns:
        `torch.Tensor`: `[batch, sequence, sources]`, the partial sum last; float32, or float64 for float64 sources.
    """
    values = sources if partial_sum is None else (*sources, partial_sum)
    logits = []
    for value in values:
        value = upcast(value)
        inverse_rms = torch.rsqrt(value.square().mean(-1) + eps)
        logits.append((value * query).sum(-1) * inverse_rms)
    return torch.stack(logits, dim=-1).softmax(-1)


class EagerDepthAttention:
    """The reference: every read looks at every source anew, as the equations are written; a
    [`DepthAttentionImplementation`]. It has derivatives of every order."""

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
        values = state.visible()
        if len(values) == 1:  # the softmax over one source is 1
            return normed(values[0], norm), state
        weights = depth_weights(queries[state.depth], state.sources, state.partial_sum, settings.key_norm_eps)
        weights = weights * settings.scale(len(values))
        hidden_states = torch.zeros_like(upcast(values[0]))
        for weight, value in zip(weights.unbind(-1), values):
            hidden_states = hidden_states + weight.unsqueeze(-1) * upcast(value)
        return normed(hidden_states.to(values[0].dtype), norm), state


class TritonDepthAttention:
    """Algorithm 1 in the kernels of `depth_attention_triton.py`, for CUDA devices; a [`DepthAttentionImplementation`].

    Its reads raise [`AttnResError`] where Triton is missing, or where the sources are on another device.
    """

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
        query, eps = queries[depth], settings.key_norm_eps
        if not state.has_phase_one():
            of_group = queries[depth : depth + settings.reads_left(depth, len(queries))]
            results = phase_one(of_group, sources, eps)
            cache = DepthCache(sources, None, depth, results[: len(of_group)], results[len(of_group) :])
            state = DepthState(sources, partial_sum, addend, depth, cache)
        output, log_sum_exp, recent = state.phase_one(settings.block_size)
        scale = settings.scale(len(sources) + (partial_sum is not None))
        if not recent:
            return scaled_and_normed(output, scale, norm, sources[0].dtype), state
        *finished, last = recent
        if finished:  # the kernel of phase two merges one source, so the others get a phase one of their own
            recent_output, recent_log_sum_exp = phase_one(query.unsqueeze(0), tuple(finished), eps)
            share = torch.sigmoid(recent_log_sum_exp - log_sum_exp)
            output = torch.lerp(output, recent_output, share.unsqueeze(-1))
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
            The entry of a configuration, with the keys `block_size` (`int`), `mix` (`"mean"` or `"sum"`),
            `key_norm_eps` (`float`) and `implementation` (a key of [`DEPTH_ATTENTION_FUNCTIONS`]).
        num_sublayers (`int`): number of sublayers, the paper's L.
    """
    block_size = depth_attention["block_size"]
    group_size = block_size * max(1, round(num_sublayers**0.5 / block_size))
    implementation = DEPTH_ATTENTION_FUNCTIONS[depth_attention["implementation"]]
    return DepthSettings(
        block_size, depth_attention["mix"], depth_attention["key_norm_eps"], implementation, group_size
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
    implementation = settings.implementation
    if not torch.compiler.is_compiling() and has_functorch_transforms():
        implementation = EagerDepthAttention
    hidden_states, state = implementation.read(queries, state, settings, norm)
    cache = state.cache
    if cache is not None and cache.outputs and settings.reads_left(state.depth, len(queries)) == 1:
        # Phase one is the largest part of a state, so nothing refers to it any more after the last read of its group.
        state = state._replace(cache=cache.without_phase_one())
    return hidden_states, state

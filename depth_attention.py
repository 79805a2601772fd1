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

import math
from collections.abc import Sequence
from functools import reduce
from importlib.util import find_spec
from typing import Any, NamedTuple

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
        addend (`torch.Tensor`, *optional*):
            The last output, `[batch, sequence, hidden]`, where adding it to the partial sum is left to the next read.
        inverse_rms (`torch.Tensor`, *optional*):
            1 / rms of the finished sources, `[batch, sequence, sources]`, float32, for `"two_phase"`,
            which does without for one token on a CPU; it lacks a source that was finished after the last read.
        phase_one (`list[torch.Tensor]`):
            What phase one (Algorithm 1) found for the reads of the open group ([`DepthSettings`]), over the sources
            finished before it: normalised output of each, `[batch, sequence, hidden]`, then the log-sum-exp of each,
            `[batch, sequence]`, float32; empty for implementations without phases, and between groups. The last read of
            the group empties it, because whoever calls a decoder layer still holds the state that he gave to it.
    """

    sources: tuple[torch.Tensor, ...]
    partial_sum: torch.Tensor | None = None
    addend: torch.Tensor | None = None
    inverse_rms: torch.Tensor | None = None
    phase_one: list[torch.Tensor] | tuple[()] = ()

    def write(self, output: torch.Tensor, closes_block: bool, at_once: bool = True) -> DepthState:
        """Adds a sublayer's output, `[batch, sequence, hidden]`, to the open block (Eq. 5), and closes the block if
        this was its last sublayer. Unless `at_once`, it becomes the `addend` of a block that has a partial sum and
        stays open. Sources keep the dtype of the embedding, also under autocast, and are contiguous, whatever layout a
        sublayer (a convolution, for one) gave its output."""
        sources, total, addend, known, phase_one = self  # built anew rather than replaced in, which is slow
        output = output.to(sources[0].dtype).contiguous()
        if total is not None and addend is not None:
            total = total + addend
        if total is None:
            total = output
        elif at_once or closes_block:
            total = total + output
        else:
            return DepthState(sources, total, output, known, phase_one)
        if closes_block:
            return DepthState((*sources, in_memory(total)), None, None, known, phase_one)
        return DepthState(sources, total, None, known, phase_one)

    def added(self) -> DepthState:
        """The same state, with its addend in the partial sum."""
        if self.addend is None or self.partial_sum is None:
            return self
        return self._replace(partial_sum=self.partial_sum + self.addend, addend=None)

    def scaled(self, factor: Any) -> DepthState:
        """All sources times a number or a tensor `[hidden]`, in their dtype; what phases knew of them is void."""
        sources, partial_sum, *_ = self.added()
        sources = tuple((source * factor).to(source.dtype) for source in sources)
        return DepthState(sources, None if partial_sum is None else (partial_sum * factor).to(partial_sum.dtype))

    def flatten(self) -> tuple[Any, ...]:
        """The state as it crosses the boundary of a decoder layer, its sources and sums side by side: backward hooks of
        modules look for tensors no deeper."""
        return (*self.sources, *self[1:])

    @classmethod
    def unflatten(cls, values: tuple[Any, ...]) -> DepthState:
        """The inverse of [`~DepthState.flatten`]."""
        num_sources = len(values) - len(cls._fields) + 1
        return cls(values[:num_sources], *values[num_sources:])


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor. In inference, a compiler would take it for the sum that it is, keep all terms of that in memory,
    and add them up wherever it is read. (What a backward needs, it has in memory anyway.)"""
    if torch.compiler.is_compiling() and not tensor.requires_grad:
        return tensor.as_strided(tensor.shape, tensor.stride())
    return tensor


class Norm(NamedTuple):
    """The RMSNorm behind a read.

    Attributes:
        weight (`torch.Tensor`): what the normalised hidden states are multiplied by, `[hidden]`.
        eps (`float`): its epsilon.
    """

    weight: torch.Tensor
    eps: float


def normed(hidden_states: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """The hidden states, normed where there is a norm."""
    if norm is None:
        return hidden_states
    return nn.functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.eps)


class DepthAttention(nn.Module):
    """The learned part of Attention Residuals: a pseudo-query and a key-norm weight for each read.

    Read r stands in front of sublayer r; the last one, the output read, in front of the final norm. Read 0 sees the
    embedding alone, so its parameters have no effect and get no gradient.

    Attributes:
        query (`[reads, hidden]`): pseudo-queries w_l, zero at initialisation (all reads start as a uniform mean).
        key_norm (`[reads, hidden]`): weights g_l of the RMSNorm on the keys, one at initialisation.
    """

    def __init__(self, num_reads, hidden_size):
        super().__init__()
        shape = (num_reads, hidden_size)
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


class DepthSettings(NamedTuple):
    """What of an [`AttnResConfig`] a read depends on. Looked up several times per read, so not in the configuration,
    whose attributes are slow.

    Attributes:
        block_size (`int`): sublayers per block, the paper's S.
        mix (`str`): `"mean"`, or `"sum"` to multiply a read by the number of its sources.
        key_norm_eps (`float`): epsilon of the RMSNorm on the keys.
        implementation (`DepthAttentionImplementation`): a value of [`DEPTH_ATTENTION_FUNCTIONS`].
        group_size (`int`):
            Reads per *group*, the scheduling block of Appendix B: phase one serves all reads of a group at once, from
            the sources finished before it. A matter of cost alone, any size gives the same results.
    """

    block_size: int
    mix: str
    key_norm_eps: float
    implementation: DepthAttentionImplementation
    group_size: int

    @classmethod
    def of(cls, config: AttnResConfig) -> DepthSettings:
        """The settings of a model: its groups are single blocks, or as many small ones as make about sqrt(L)
        sublayers. Phase one is run L / G times over up to L / S sources, phase two walks up to G / S of a group."""
        block_size = config.block_size
        group_size = block_size * max(1, round(config.num_sublayers**0.5 / block_size))
        implementation = DEPTH_ATTENTION_FUNCTIONS[config.depth_attention_implementation]
        return cls(block_size, config.mix, config.key_norm_eps, implementation, group_size)

    def reads_left(self, num_written: int, num_reads: int) -> int:
        """How many reads of the open group are still to come after `num_written` sublayers."""
        return min(self.group_size - num_written % self.group_size, num_reads - num_written)

    def scale(self, num_sources: int) -> int:
        """Factor of a read of so many sources."""
        return num_sources if self.mix == "sum" else 1


def depth_settings(d, num_sublayers):  # SHIM
    bs = d['block_size']
    return DepthSettings(bs, d['mix'], d['key_norm_eps'], DEPTH_ATTENTION_FUNCTIONS[d['implementation']], bs * max(1, round(num_sublayers**0.5 / bs)))


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that statistics and sums are taken in."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


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
    def fuses(state: DepthState) -> bool:
        """Whether a read takes an addition before it and a norm behind it into its own pass over memory. If so, outputs
        are written with `at_once=False`, and RMSNorms that follow a read are handed to it."""
        return False

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        """One read (Eq. 1 and 6).

        Args:
            queries (`torch.Tensor`): folded queries of all reads, `[reads, hidden]`, float32.
            state (`DepthState`): the state after `num_written` sublayers.
            num_written (`int`): how many sublayers have written.
            settings (`DepthSettings`): what the read depends on.
            norm (`Norm`, *optional*): what the hidden states are to be normed by.

        Returns:
            `tuple[torch.Tensor, DepthState]`: the hidden states, `[batch, sequence, hidden]` in the dtype of the
            sources, and the state, with what later reads want to find in it.
        """
        state = state.added()
        values = state.sources if state.partial_sum is None else (*state.sources, state.partial_sum)
        if len(values) == 1:  # the softmax over one source is 1
            return normed(values[0], norm), state
        weights = depth_weights(queries[num_written], state.sources, state.partial_sum, settings.key_norm_eps)
        if settings.mix == "sum":
            weights = weights * len(values)
        hidden_states = torch.zeros_like(upcast(values[0]))
        for weight, value in zip(weights.unbind(-1), values):
            hidden_states = hidden_states + weight.unsqueeze(-1) * upcast(value)
        return normed(hidden_states.to(values[0].dtype), norm), state


class TwoPhaseDepthAttention:
    """Algorithm 1: the sources are looked at once per group, for all its reads, and each read then merges what the
    group has added since with what that gave. Same arguments and results as [`EagerDepthAttention`]."""

    @staticmethod
    def fuses(state: DepthState) -> bool:
        """In inference, unless a compiler does. (Re-entrant checkpointing disables gradients, but not those of the
        embedding; what it recomputes with gradients has to be what it computed without.)"""
        return not (torch.is_grad_enabled() or state.sources[0].requires_grad or torch.compiler.is_compiling())

    @staticmethod
    def prepare(queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings) -> DepthState:
        """The state with 1 / rms of all sources and phase one of the open group."""
        sources, known = state.sources, state.inverse_rms
        if known is None or known.shape[-1] < len(sources):
            new = sources if known is None else sources[known.shape[-1] :]
            with torch.no_grad():  # its part of the gradient is in that of the phases
                found = [inverse_rms(source, settings.key_norm_eps).unsqueeze(-1) for source in new]
                known = torch.cat(found if known is None else [known, *found], dim=-1)
            state = state._replace(inverse_rms=known)
        if not state.phase_one:
            queries = queries[num_written : num_written + settings.reads_left(num_written, len(queries))]
            first_scale = settings.scale(len(sources)) if state.partial_sum is None else 1
            if needs_grad(queries, *sources):
                phase_one = PhaseOne.apply(queries, known, first_scale, *sources)
            else:
                phase_one = phase_one_forward(queries, known, first_scale, sources)
            state = state._replace(phase_one=list(phase_one))
        return state

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        if is_token_on_cpu(state.sources[0]) and not torch.is_grad_enabled():
            return read_of_token(queries, state, num_written, settings, norm)
        state = TwoPhaseDepthAttention.prepare(queries, state, num_written, settings)
        output, log_sum_exp, own = to_merge(queries, state, num_written, settings)
        if not own:
            if norm is not None and not torch.is_grad_enabled():
                output, norm = output * inverse_rms(output, norm.eps, keepdim=True) * norm.weight, None
            return normed(output.to(state.sources[0].dtype), norm), state
        num_finished = len(own) - (state.partial_sum is not None)
        known: tuple[torch.Tensor, ...] = ()
        if num_finished and state.inverse_rms is not None:
            known = state.inverse_rms[..., -num_finished:].unbind(-1)
        scale = settings.scale(len(state.sources) + len(own) - num_finished)
        query, eps = queries[num_written], settings.key_norm_eps
        if torch.is_grad_enabled():
            state = state.added()
            own = own if state.partial_sum is None else (*own[:-1], state.partial_sum)
            if needs_grad(query, output, *own):
                hidden_states = PhaseTwo.apply(query, scale, eps, output, log_sum_exp, len(known), *known, *own)
            else:
                hidden_states, _ = phase_two_forward(query, scale, eps, output, log_sum_exp, known, own)
            return normed(hidden_states, norm), state
        hidden_states, total = phase_two_forward(query, scale, eps, output, log_sum_exp, known, own, state.addend, norm)
        return hidden_states, state if state.addend is None else state._replace(partial_sum=total, addend=None)


def to_merge(
    queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """What phase two of a read is about: its output and log-sum-exp of phase one, and the sources which these lack:
    those that were finished since, and the partial sum."""
    num_reads = len(state.phase_one) // 2
    index = num_reads - settings.reads_left(num_written, len(queries))
    own = state.sources[1 + (num_written - index) // settings.block_size :]
    if state.partial_sum is not None:
        own = (*own, state.partial_sum)
    return state.phase_one[index], state.phase_one[num_reads + index], own


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether a graph is to be recorded; if not, the overhead of a custom function is saved."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


FEW_ELEMENTS = 2**15


def inverse_rms(value: torch.Tensor, eps: float, keepdim: bool = False) -> torch.Tensor:
    """1 / rms over the last dimension, in the dtype of statistics: `[..., hidden]` to `[...]`, or `[..., 1]`."""
    if torch.compiler.is_compiling() or value.numel() <= FEW_ELEMENTS:
        # As the backbone's norms do. The norm of a vector is fewer passes over memory, and rounds more.
        return torch.rsqrt(upcast(value).pow(2).mean(-1, keepdim) + eps)
    dtype = None if value.dtype.itemsize >= 4 else torch.float32
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=keepdim, dtype=dtype)
    return torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / value.shape[-1]).rsqrt_()


# Tokens are taken in chunks whose float32 copies stay in the caches: what a chunk is asked for repeatedly is then read
# from memory once. Of smaller ones, some operations would be too small to be split over threads.
CHUNK_ELEMENTS = 2**21


def chunks(num_tokens: int, elements_per_token: int) -> list[slice]:
    """Slices of the token dimension; a single one while compiling, where the compiler fuses instead."""
    size = max(1, CHUNK_ELEMENTS // elements_per_token)
    if torch.compiler.is_compiling() or num_tokens <= size:
        return [slice(None)]
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def phase_one_logits(
    queries: torch.Tensor, inverse_rms: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dot products `w . v` and logits `w . v / rms(v)`, both `[tokens, sources, reads]`, of `values`
    `[tokens, sources, hidden]` and `inverse_rms` `[tokens, sources]`."""
    products = values @ queries.T
    return products, products * inverse_rms.unsqueeze(-1)


def phase_one_forward(
    queries: torch.Tensor, inverse_rms: torch.Tensor, first_scale: int, sources: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Phase one: every read of a group over the sources finished before it.

    Args:
        queries (`torch.Tensor`): folded queries `[reads, hidden]`, float32.
        inverse_rms (`torch.Tensor`): `[batch, sequence, sources]`, float32.
        first_scale (`int`): factor of the first read, which is finished by this unless there is a partial sum.
        sources (`tuple[torch.Tensor, ...]`): each `[batch, sequence, hidden]`.

    Returns:
        `tuple[torch.Tensor, ...]`: the normalised output of each read, `[batch, sequence, hidden]`, then the
        log-sum-exp of each, `[batch, sequence]`, both float32: rounded to bfloat16 in between, a retrofitted model
        would be further from float32 than the original.
    """
    if torch.compiler.is_compiling() and inverse_rms.shape[:-1].numel() > 1 and len(sources) <= COMPILED_SOURCES:
        return phase_one_to_compile(queries, inverse_rms, first_scale, sources)
    (*shape, hidden), reads = sources[0].shape, len(queries)
    inverse_rms = inverse_rms.flatten(0, -2)
    num_tokens, num_sources = inverse_rms.shape
    slices = chunks(num_tokens, num_sources * hidden)
    if len(slices) > 1:
        outputs, log_sum_exps = queries.new_empty(num_tokens, reads, hidden), queries.new_empty(num_tokens, reads)
    buffer = stack_buffer(sources, slices)
    for chunk in slices:
        values = stacked(sources, chunk, buffer)
        _, logits = phase_one_logits(queries, inverse_rms[chunk], values)
        # Max and softmax, because logsumexp is many small operations.
        log_weights = logits.log_softmax(1)
        log_sum_exp = logits.amax(1) - log_weights.amax(1)
        weights = log_weights.exp_().transpose(1, 2)
        if first_scale != 1:
            weights[:, 0].mul_(first_scale)
        if len(slices) == 1:
            outputs, log_sum_exps = weights @ values, log_sum_exp
        else:
            torch.bmm(weights, values, out=outputs[chunk])
            log_sum_exps[chunk] = log_sum_exp
    return (*outputs.view(*shape, reads, hidden).unbind(-2), *log_sum_exps.view(*shape, reads).unbind(-1))


COMPILED_SOURCES = 16  # with more, compiling [`phase_one_to_compile`] takes minutes


def phase_one_to_compile(
    queries: torch.Tensor, inverse_rms: torch.Tensor, first_scale: int, sources: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """[`phase_one_forward`] as sums over sources that stay where they are, which the compiler fuses. Uncompiled, each
    term would go through memory."""
    values = [upcast(source) for source in sources]
    # Sums of products, because a matrix product would have its up-cast operands in memory.
    products = [(value.unsqueeze(-2) * queries).sum(-1) for value in values]
    logits = torch.stack(products, dim=-1) * inverse_rms.unsqueeze(-2)  # [batch, sequence, reads, sources]
    log_sum_exps = logits.logsumexp(-1)
    weights = (logits - log_sum_exps.unsqueeze(-1)).exp()
    outputs = []
    for weights_of_read in weights.unbind(-2):
        terms = [weight.unsqueeze(-1) * value for weight, value in zip(weights_of_read.unbind(-1), values)]
        outputs.append(reduce(torch.add, terms))
    return (outputs[0] * first_scale, *outputs[1:], *log_sum_exps.unbind(-1))


Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def stack_buffer(tensors: Tensors, slices: list[slice]) -> torch.Tensor | None:
    """Memory for what [`stacked`] makes of each of several chunks; fresh memory for each would cost as much as filling
    it."""
    if len(slices) == 1:
        return None
    return upcast(tensors[0].new_empty(0)).new_empty(slices[0].stop, len(tensors), tensors[0].shape[-1])


def stacked(tensors: Tensors, chunk: slice, buffer: torch.Tensor | None) -> torch.Tensor:
    """A chunk of the tokens of several tensors `[batch, sequence, hidden]`: `[tokens, tensors, hidden]`, up-cast."""
    if buffer is None:
        return upcast(torch.stack(tensors, dim=-2).flatten(0, -3))
    rows = [tensor.flatten(0, -2)[chunk] for tensor in tensors]
    return torch.stack(rows, dim=1, out=buffer[: len(rows[0])])


class PhaseOne(torch.autograd.Function):
    """Phase one with a backward that keeps the sources and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, inverse_rms: torch.Tensor, first_scale: int, *sources: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        results = phase_one_forward(queries, inverse_rms, first_scale, sources)
        ctx.first_scale = first_scale
        ctx.save_for_backward(queries, inverse_rms, *results[len(queries) :], *sources)
        return results

    @staticmethod
    def backward(ctx: Any, *grads_of_results: torch.Tensor) -> tuple[Any, ...]:
        queries, inverse_rms, *others = ctx.saved_tensors
        reads, hidden = queries.shape
        sources, grad_outputs = others[reads:], grads_of_results[:reads]
        log_sum_exps = torch.stack(others[:reads], dim=-1).flatten(0, -2)
        grad_log_sum_exps = torch.stack(grads_of_results[reads:], dim=-1).flatten(0, -2)
        inverse_rms = inverse_rms.flatten(0, -2)
        num_tokens, num_sources = inverse_rms.shape
        grad_queries = torch.zeros_like(queries)
        grad_rows = [source.new_empty(num_tokens, hidden) for source in sources]
        slices = chunks(num_tokens, (num_sources + reads) * hidden)
        buffer, grad_buffer = stack_buffer(sources, slices), stack_buffer(grad_outputs, slices)
        for chunk in slices:
            values, grads = stacked(sources, chunk, buffer), stacked(grad_outputs, chunk, grad_buffer)
            if ctx.first_scale != 1:
                grads = torch.cat([grads[:, :1] * ctx.first_scale, grads[:, 1:]], dim=1)
            scale = inverse_rms[chunk]
            products, logits = phase_one_logits(queries, scale, values)
            weights = (logits - log_sum_exps[chunk].unsqueeze(1)).exp_()  # [tokens, sources, reads]
            grad_weights = values @ grads.transpose(1, 2)
            mean = (weights * grad_weights).sum(1, keepdim=True)
            grad_logits = weights * (grad_weights - mean + grad_log_sum_exps[chunk].unsqueeze(1))
            grad_products = (grad_logits * scale.unsqueeze(-1)).flatten(0, 1)
            # 1 / rms depends on the value too: its derivative is -v / (hidden * rms^3).
            along = (grad_logits * products).sum(-1) * scale**3 / -hidden
            grad_values = torch.baddbmm(along.unsqueeze(-1) * values, weights, grads)
            grad_values.flatten(0, 1).addmm_(grad_products, queries)
            grad_queries.addmm_(grad_products.T, values.flatten(0, 1))
            for grad_row, grad_value in zip(grad_rows, grad_values.unbind(1)):
                grad_row[chunk] = grad_value
        return (grad_queries, None, None, *(grad.view(sources[0].shape) for grad in grad_rows))


MERGED_TENSORS = 4  # as many of a chunk are at work in a merge: what was added, their sum, phase one, the result


def phase_two_merge(
    query: torch.Tensor,
    scale: int,
    eps: float,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    known: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    norm: Norm | None,
    result: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`phase_two_forward`] of tokens that are few enough to be up-cast at once, with nothing left to add; in `result`,
    if there is one."""
    in_place = result if result is not None and result.dtype == output.dtype else None
    for index, value in enumerate(own):
        value = upcast(value)
        product, inverse = value @ query, known[index] if index < len(known) else inverse_rms(value, eps)
        share = torch.addcmul(log_sum_exp, product, inverse, value=-1).sigmoid_()  # of what came before
        output = torch.lerp(value, output, share.unsqueeze(-1), out=in_place)
        if index + 1 < len(own):
            log_sum_exp = torch.logaddexp(log_sum_exp, product * inverse)
    if norm is not None:  # which takes a factor out again, but for its epsilon
        output.mul_(inverse_rms(output, norm.eps / scale**2, keepdim=True)).mul_(norm.weight)
    elif scale != 1:
        output.mul_(scale)
    if in_place is None and result is not None:
        return result.copy_(output)
    return output.to(own[0].dtype)


def is_token_on_cpu(source: torch.Tensor) -> bool:
    """Whether statistics of one token `[1, 1, hidden]` may become numbers of Python: nothing that runs asynchronously
    has to be waited for, no trace would take them for constants."""
    return (
        source.numel() == source.shape[-1]
        and type(source) is torch.Tensor
        and source.is_cpu
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


def read_of_token(
    queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings, norm: Norm | None
) -> tuple[torch.Tensor, DepthState]:
    """[`TwoPhaseDepthAttention.read`] of one token on a CPU, without gradients. Here memory is nothing and operations
    of torch are all; a number of Python costs a fraction of one."""
    sources, partial_sum, addend, known, phase_one = state
    if not phase_one:
        of_group = queries[num_written : num_written + settings.reads_left(num_written, len(queries))]
        phase_one = phase_one_of_token(of_group, settings.key_norm_eps, sources)
        state = DepthState(sources, partial_sum, addend, known, phase_one)
    if partial_sum is not None and addend is not None:
        partial_sum = partial_sum + addend
        state = DepthState(sources, partial_sum, None, known, phase_one)
    output, log_sum_exp, own = to_merge(queries, state, num_written, settings)
    merged = output.view(-1)
    if own:
        query, lse = queries[num_written], log_sum_exp.item()
        for index, source in enumerate(own):
            value = upcast(source).view(-1)
            difference = torch.dot(value, query).item() * inverse_rms_of_token(value, settings.key_norm_eps) - lse
            merged = torch.lerp(value, merged, 0.5 - 0.5 * math.tanh(difference / 2))  # by sigmoid(-difference)
            if index + 1 < len(own):
                lse += max(difference, 0.0) + math.log1p(math.exp(-abs(difference)))
    scale = settings.scale(len(sources) + (partial_sum is not None))
    if norm is not None:
        merged = merged.mul(inverse_rms_of_token(merged, norm.eps / scale**2)).mul_(norm.weight)
    elif scale != 1:
        merged = merged.mul(scale)
    return merged.to(sources[0].dtype).view_as(sources[0]), state


def phase_one_of_token(queries: torch.Tensor, eps: float, sources: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """[`phase_one_forward`] of one token, which takes 1 / rms of all sources anew, and scales no read."""
    values = upcast(torch.cat(sources, dim=1))[0]
    _, logits = phase_one_logits(queries, inverse_rms(values, eps), values)  # [sources, reads]
    weights = logits.softmax(0)
    log_sum_exps = logits.amax(0) - weights.amax(0).log_()
    outputs, shape = weights.T @ values, sources[0].shape
    return [*outputs.view(-1, *shape).unbind(0), *log_sum_exps.view(-1, *shape[:-1]).unbind(0)]


def inverse_rms_of_token(value: torch.Tensor, eps: float) -> float:
    mean_square = torch.dot(value, value).item() / value.shape[0] + eps
    return 1 / math.sqrt(mean_square) if mean_square else math.inf


def phase_two_forward(
    query: torch.Tensor,
    scale: int,
    eps: float,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    known: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    addend: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase two: one read's merge of phase one with further sources, one by one, by online softmax.

    Args:
        query (`torch.Tensor`): folded query `[hidden]`, float32.
        scale (`int`): factor of the result.
        eps (`float`): epsilon of the RMSNorm on the keys.
        output (`torch.Tensor`): normalised output of phase one, `[batch, sequence, hidden]`, float32.
        log_sum_exp (`torch.Tensor`): `[batch, sequence]`, float32.
        known (`Sequence[torch.Tensor]`): 1 / rms of the first of `own`, each `[batch, sequence]`, float32.
        own (`Sequence[torch.Tensor]`): the further sources, at least one, each `[batch, sequence, hidden]`.
        addend (`torch.Tensor`, *optional*): what is still to be added to the last of `own`, of the same shape.
        norm (`Norm`, *optional*): what the result is to be normed by; it is not rounded before.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the result, and the last of `own` with its addend, both
        `[batch, sequence, hidden]` in the dtype of the sources.
    """
    *finished, last = own
    slices = chunks(log_sum_exp.numel(), MERGED_TENSORS * query.shape[0])
    if len(slices) == 1:
        total = last if addend is None else last + addend
        return phase_two_merge(query, scale, eps, output, log_sum_exp, known, (*finished, total), norm), total
    merged = torch.empty_like(last, memory_format=torch.contiguous_format)
    total = last if addend is None else torch.empty_like(merged)
    rows = by_token(output, log_sum_exp, *known, *finished, total)
    others_of_sum = () if addend is None else by_token(last, addend)
    for chunk, result in zip(slices, merged.flatten(0, -2).split(slices[0].stop)):
        output, log_sum_exp, *others = (row[chunk] for row in rows)
        if others_of_sum:
            torch.add(*(row[chunk] for row in others_of_sum), out=others[-1])
        known, own = others[: len(known)], others[len(known) :]
        phase_two_merge(query, scale, eps, output, log_sum_exp, known, own, norm, result)
    return merged, total


def by_token(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views of `[batch, sequence, ...]` as `[tokens, ...]`."""
    return [tensor.flatten(0, 1) for tensor in tensors]


class PhaseTwo(torch.autograd.Function):
    """Phase two with a backward that keeps its arguments and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        scale: int,
        eps: float,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        num_known: int,
        *known_and_own: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, output, log_sum_exp, *known_and_own)
        ctx.scale, ctx.eps, ctx.num_known = scale, eps, num_known
        known, own = known_and_own[:num_known], known_and_own[num_known:]
        return phase_two_forward(query, scale, eps, output, log_sum_exp, known, own)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, *saved = ctx.saved_tensors
        hidden, num_known = query.shape[0], ctx.num_known
        results = [
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*saved[:2], *saved[2 + num_known :])
        ]
        grad_query = torch.zeros_like(query)
        rows = by_token(grad, *saved)
        grad_output, grad_log_sum_exp, *grad_own = by_token(*results)
        for chunk in chunks(len(rows[0]), hidden * len(grad_own)):
            grads, output, log_sum_exp, *others = (row[chunk] for row in rows)
            known, own = others[:num_known], [upcast(value) for value in others[num_known:]]
            grads = upcast(grads) if ctx.scale == 1 else upcast(grads) * ctx.scale
            products = torch.stack([value @ query for value in own])
            scales = torch.stack([*known, *(inverse_rms(value, ctx.eps) for value in own[num_known:])])
            weights = torch.cat([log_sum_exp.unsqueeze(0), products * scales]).softmax(0)  # [1 + own, tokens]
            grad_weights = torch.stack([(grads * value).sum(-1) for value in (output, *own)])
            grad_logits = weights * (grad_weights - (weights * grad_weights).sum(0))
            grad_log_sum_exp[chunk], grad_products = grad_logits[0], grad_logits[1:] * scales
            along = grad_products * products * scales**2 / -hidden  # see PhaseOne.backward
            torch.mul(grads, weights[0].unsqueeze(-1), out=grad_output[chunk])
            for index, value in enumerate(own):
                grad_value = torch.addcmul(along[index].unsqueeze(-1) * value, weights[index + 1].unsqueeze(-1), grads)
                grad_own[index][chunk] = grad_value.addr_(grad_products[index], query)
                grad_query.addmv_(value.T, grad_products[index])
        return (grad_query, None, None, *results[:2], None, *[None] * num_known, *results[2:])


class TritonDepthAttention:
    """Algorithm 1 in the kernels of `depth_attention_triton.py`, for CUDA devices. Same arguments and results as
    [`EagerDepthAttention`]; raises [`AttnResError`] where Triton is missing, or sources are elsewhere."""

    @staticmethod
    def fuses(state: DepthState) -> bool:
        return True

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        from .depth_attention_triton import phase_one, phase_two

        query, eps = queries[num_written], settings.key_norm_eps
        if not state.phase_one:
            of_group = queries[num_written : num_written + settings.reads_left(num_written, len(queries))]
            first_scale = settings.scale(len(state.sources)) if state.partial_sum is None else 1
            state = state._replace(phase_one=list(phase_one(of_group, state.sources, first_scale, eps)))
        output, log_sum_exp, own = to_merge(queries, state, num_written, settings)
        if not own:
            return normed(output.to(state.sources[0].dtype), norm), state
        if len(own) > 1:  # phase two merges one source; what the group has before it is a phase one of its own
            of_own, log_sum_exp_of_own = phase_one(query.unsqueeze(0), own[:-1], 1, eps)
            share = torch.sigmoid(log_sum_exp_of_own - log_sum_exp)
            output = torch.lerp(output, of_own, share.unsqueeze(-1))
            log_sum_exp = torch.logaddexp(log_sum_exp, log_sum_exp_of_own)
        scale = settings.scale(len(state.sources) + (state.partial_sum is not None))
        hidden_states, total = phase_two(output, log_sum_exp, own[-1], query, scale, eps, state.addend, norm)
        return hidden_states, state if state.addend is None else state._replace(partial_sum=total, addend=None)


HAS_TRITON = find_spec("triton") is not None


class AutoDepthAttention:
    """[`TritonDepthAttention`] where it runs, else [`TwoPhaseDepthAttention`]; asked anew at every read, because the
    layers of a model may be on different devices."""

    @staticmethod
    def fuses(state: DepthState) -> bool:
        return AutoDepthAttention.choose(state).fuses(state)

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        return AutoDepthAttention.choose(state).read(queries, state, num_written, settings, norm)

    @staticmethod
    def choose(state: DepthState) -> type[TwoPhaseDepthAttention] | type[TritonDepthAttention]:
        return TritonDepthAttention if HAS_TRITON and state.sources[0].is_cuda else TwoPhaseDepthAttention


DepthAttentionImplementation = (
    type[EagerDepthAttention] | type[TwoPhaseDepthAttention] | type[TritonDepthAttention] | type[AutoDepthAttention]
)

DEPTH_ATTENTION_FUNCTIONS: dict[str, DepthAttentionImplementation] = {
    "eager": EagerDepthAttention,
    "two_phase": TwoPhaseDepthAttention,
    "triton": TritonDepthAttention,
    "auto": AutoDepthAttention,
}
"""Implementations by their name in `config.depth_attention_implementation`."""


def read(
    queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings, norm: Norm | None = None
) -> tuple[torch.Tensor, DepthState]:
    """The read in front of sublayer `num_written` (the output read, when all are written).

    Args:
        queries (`torch.Tensor`): folded queries of all reads, `[reads, hidden]`, from [`DepthAttention`].
        state (`DepthState`): the state after `num_written` sublayers.
        num_written (`int`): how many sublayers have written; also the index of this read.
        settings (`DepthSettings`): block size, mix, eps, implementation and group size.
        norm (`Norm`, *optional*): the RMSNorm behind the read, if the read is to do it.

    Returns:
        `tuple[torch.Tensor, DepthState]`: the hidden states `[batch, sequence, hidden]`, and the state, which holds
        phase one from the first read of a group to its last.
    """
    if torch.is_autocast_enabled(queries.device.type):  # it would take the products in half precision
        with torch.autocast(queries.device.type, enabled=False):
            return read(queries, state, num_written, settings, norm)
    hidden_states, state = settings.implementation.read(queries, state, num_written, settings, norm)
    if state.phase_one and (num_written + 1) % settings.group_size == 0:
        state.phase_one.clear()
        state = state._replace(phase_one=())
    return hidden_states, state

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
"""Depth attention in two phases (Algorithm 1), in operations of torch, forward and backward.

Phase one looks at the finished sources once for a whole group of reads. It gives for each read r an output and the
log-sum-exp of its logits:

    o_r = sum_i a_i v_i,   a = softmax_i(w_r . v_i / rms(v_i)),   lse_r = logsumexp_i(w_r . v_i / rms(v_i))

Phase two merges, read by read, what the group itself has added since: the *recent* sources. For each of them, v:

    s = sigmoid(lse_r - w_r . v / rms(v)),   o_r <- s * o_r + (1 - s) * v,   lse_r <- logaddexp(lse_r, w_r . v / rms(v))

That is online softmax with normalised outputs. It gives the same result as the direct softmax, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from .depth_state import (
    DepthCache,
    DepthSettings,
    DepthState,
    Norm,
    inverse_rms,
    key_scale,
    needs_grad,
    normed,
    refuse_second_derivatives,
    scaled_and_normed,
    upcast,
)

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


class TwoPhaseDepthAttention:
    """Algorithm 1 in operations of torch, for every device; a [`DepthAttentionImplementation`]."""

    @staticmethod
    def covers(settings: DepthSettings) -> bool:
        """Learned queries under softmax over raw sources: with any number of heads, any window, without key norm."""
        return (settings.query, settings.weighting, settings.values) == ("learned", "softmax", "raw")

    @staticmethod
    def fuses(state: DepthState) -> bool:
        """In inference, unless a compiler fuses.

        Re-entrant checkpointing runs a forward without gradients and runs it again with gradients. Both have to compute
        the same, so the embedding is asked too: its `requires_grad` is the same in both.
        """
        return not (torch.is_grad_enabled() or state.sources[0].requires_grad or torch.compiler.is_compiling())

    @staticmethod
    def read(
        queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        """See [`DepthAttentionImplementation.read`]."""
        if settings.num_heads > 1:
            queries = queries.unflatten(-1, (settings.num_heads, -1))
        query, eps, dtype = queries[state.depth], settings.key_norm_eps, state.sources[0].dtype
        is_token = not torch.is_grad_enabled() and settings.is_plain() and is_token_on_cpu(state.sources[0])
        state = with_cache(queries, state, settings, is_token)
        if is_token or torch.is_grad_enabled():
            state = state.added()
        sources, partial_sum, addend, depth, cache = state
        scale = settings.scale(len(sources) + (partial_sum is not None))
        output, log_sum_exp, recent = state.phase_one(settings)
        if is_token and eps is not None:
            return read_of_token(query, scale, eps, output, log_sum_exp, recent, norm).to(dtype), state
        if not recent:
            if norm is None or torch.is_grad_enabled():
                return scaled_and_normed(output, scale, norm, dtype), state
            scales = inverse_rms(output, norm.eps / scale**2, keepdim=True)  # see `scaled_and_normed`
            return (output * scales * norm.weight).to(dtype), state
        known: Tensors = ()
        if (num_finished := len(recent) - (partial_sum is not None)) and cache is not None:
            assert cache.inverse_rms is not None
            known = cache.inverse_rms[..., -num_finished:].unbind(-1)
        if torch.is_grad_enabled():
            if needs_grad(query, output, *recent):
                hidden_states = PhaseTwo.apply(query, scale, eps, output, log_sum_exp, len(known), *known, *recent)
            else:
                hidden_states, _ = phase_two_forward(query, scale, eps, output, log_sum_exp, known, recent)
            return normed(hidden_states, norm), state
        hidden_states, total = phase_two_forward(query, scale, eps, output, log_sum_exp, known, recent, addend, norm)
        return hidden_states, state if addend is None else DepthState(sources, total, None, depth, cache)


def with_cache(queries: torch.Tensor, state: DepthState, settings: DepthSettings, is_token: bool) -> DepthState:
    """The state with all in its cache that its next read needs.

    That is phase one of the read's group and, except for one token on a CPU, 1 / rms of all finished sources.

    Args:
        queries (`torch.Tensor`):
            Folded queries of all reads, `[reads, hidden]` or `[reads, heads, hidden / heads]`, float32 or float64.
        state (`DepthState`): the state in front of the read.
        settings (`DepthSettings`): what the read depends on.
        is_token (`bool`): whether the state is that of one token on a CPU, without gradients.
    """
    sources, partial_sum, addend, depth, cache = state
    known = None if cache is None else cache.inverse_rms
    num_known = 0 if known is None else known.shape[-1]
    is_served = state.has_phase_one()
    if is_served and (is_token or num_known == len(sources)):
        return state
    if not is_token and num_known < len(sources):
        with torch.no_grad():  # the backward of the phases contains its gradient
            new = [key_scale(source, settings.key_norm_eps).unsqueeze(-1) for source in sources[num_known:]]
            known = torch.cat(new if known is None else [known, *new], dim=-1)
    if is_served and cache is not None:
        cache = DepthCache(sources, known, cache.first_read, cache.outputs, cache.log_sum_exps)
        return DepthState(sources, partial_sum, addend, depth, cache)
    queries = queries[depth : depth + settings.reads_left(depth, len(queries))]
    results: Sequence[torch.Tensor]
    eps = settings.key_norm_eps
    if eps is not None and (is_token or known is None):
        results = phase_one_of_token(queries, eps, sources)
    else:
        assert known is not None
        is_hidden = None
        if settings.window is not None:
            is_hidden = hidden_sources(queries, settings, depth, len(sources))
        if needs_grad(queries, *sources):
            results = PhaseOne.apply(queries, known, eps is not None, is_hidden, *sources)
        else:
            results = phase_one_forward(queries, known, sources, is_hidden)
    cache = DepthCache(sources, known, depth, tuple(results[: len(queries)]), tuple(results[len(queries) :]))
    return DepthState(sources, partial_sum, addend, depth, cache)


def hidden_sources(
    queries: torch.Tensor, settings: DepthSettings, first_read: int, num_sources: int
) -> torch.Tensor | None:
    """Which sources of phase one are outside of the window of each read, `[sources, reads * heads]`; `None` if all are
    inside."""
    first = [settings.first_in_window(first_read + index) for index in range(len(queries))]
    if max(first) == 1:
        return None
    index = torch.arange(num_sources, device=queries.device).unsqueeze(-1)
    is_hidden = (index > 0) & (index < torch.tensor(first, device=queries.device))
    return is_hidden.repeat_interleave(settings.num_heads, dim=1)


# -- heads -------------------------------------------------------------------------------------------------------------
#
# A read with H heads is H reads, each of a slice of the hidden dimension. So these products have a column for each head
# of each read. Queries of one head are `[reads, hidden]`; of several, `[reads, heads, hidden / heads]`.


def product_with(values: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Dot products of `values`, `[tokens, hidden]`, with the query of one read: `[tokens]` or `[tokens, heads]`."""
    if query.dim() == 1:
        return values @ query
    return (values.unflatten(-1, query.shape) * query).sum(-1)


def product_by_head(values: torch.Tensor, others: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Dot products of rows, both `[tokens, hidden]`: `[tokens]` or `[tokens, heads]`."""
    products = values * others
    return products.sum(-1) if num_heads == 1 else products.unflatten(-1, (num_heads, -1)).sum(-1)


def products_with(values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Dot products of `values`, `[tokens, sources, hidden]`, with queries: `[tokens, sources, reads * heads]`."""
    if queries.dim() == 2:
        return values @ queries.T
    return torch.einsum("tnhd,rhd->tnrh", values.unflatten(-1, queries.shape[1:]), queries).flatten(-2)


def products_of(values: torch.Tensor, grads: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Dot products of `values`, `[tokens, sources, hidden]`, with `grads`, `[tokens, reads, hidden]`:
    `[tokens, sources, reads * heads]`."""
    if num_heads == 1:
        return values @ grads.transpose(1, 2)
    heads = (num_heads, -1)
    return torch.einsum("tnhd,trhd->tnrh", values.unflatten(-1, heads), grads.unflatten(-1, heads)).flatten(-2)


def weighted_sums(weights: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Sums of `values`, `[tokens, sources, hidden]`, under `weights`, `[tokens, sources, reads * heads]`: `[tokens,
    reads, hidden]`."""
    if num_heads == 1:
        return weights.transpose(1, 2) @ values
    heads = (num_heads, -1)
    by_head = (weights.unflatten(-1, (-1, num_heads)), values.unflatten(-1, heads))
    return torch.einsum("tnrh,tnhd->trhd", *by_head).flatten(-2)


def spread(columns: torch.Tensor, num_heads: int, hidden: int) -> torch.Tensor:
    """A number of each head, `[..., heads]`, for its columns: `[..., hidden]`. Of one head, `[...]` as `[..., 1]`."""
    columns = columns.unsqueeze(-1)
    return columns if num_heads == 1 else columns.expand(*columns.shape[:-1], hidden // num_heads).flatten(-2)


# -- chunks of tokens --------------------------------------------------------------------------------------------------

# Tokens are processed in chunks whose float32 copies stay in the caches of the CPU, so that memory is read once. With
# smaller chunks, some operations would be too small to be split over threads.
CHUNK_ELEMENTS = 2**21


def chunks(num_tokens: int, elements_per_token: int) -> list[slice]:
    """Slices of the token dimension. While compiling there is a single one, because the compiler fuses instead."""
    size = max(1, CHUNK_ELEMENTS // elements_per_token)
    if torch.compiler.is_compiling() or num_tokens <= size:
        return [slice(None)]
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def by_token(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views of `[batch, sequence, ...]` as `[tokens, ...]`."""
    return [tensor.flatten(0, 1) for tensor in tensors]


def stack_buffer(tensors: Tensors, slices: list[slice]) -> torch.Tensor | None:
    """Memory that [`stacked`] fills for each of several chunks. New memory for each would cost as much as that."""
    if len(slices) == 1:
        return None
    return upcast(tensors[0].new_empty(0)).new_empty(slices[0].stop, len(tensors), tensors[0].shape[-1])


def stacked(tensors: Tensors, chunk: slice, buffer: torch.Tensor | None) -> torch.Tensor:
    """A chunk of the tokens of several tensors `[batch, sequence, hidden]`: `[tokens, tensors, hidden]`, up-cast."""
    if buffer is None:
        return upcast(torch.stack(tensors, dim=-2).flatten(0, -3))
    rows = [tensor.flatten(0, -2)[chunk] for tensor in tensors]
    return torch.stack(rows, dim=1, out=buffer[: len(rows[0])])


# -- phase one ---------------------------------------------------------------------------------------------------------


def phase_one_logits(
    queries: torch.Tensor, inverse_rms: torch.Tensor, values: torch.Tensor, is_hidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dot products `w . v` and logits `w . v / rms(v)`, both `[tokens, sources, reads * heads]`, of `values`
    `[tokens, sources, hidden]` and `inverse_rms` `[tokens, sources]`. Logits outside of the window are `-inf`."""
    products = products_with(values, queries)
    logits = products * inverse_rms.unsqueeze(-1)
    return products, logits if is_hidden is None else logits.masked_fill_(is_hidden, -torch.inf)


def phase_one_forward(
    queries: torch.Tensor,
    inverse_rms: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    is_hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Phase one: every read of a group over the sources that were finished before it.

    Args:
        queries (`torch.Tensor`):
            Folded queries `[reads, hidden]` or `[reads, heads, hidden / heads]`, float32 or float64.
        inverse_rms (`torch.Tensor`): `[batch, sequence, sources]`, in the dtype of the queries.
        sources (`tuple[torch.Tensor, ...]`): each `[batch, sequence, hidden]`.
        is_hidden (`torch.Tensor`, *optional*): what [`hidden_sources`] returns, `[sources, reads * heads]`.

    Returns:
        `tuple[torch.Tensor, ...]`: the normalised output of each read, `[batch, sequence, hidden]`, then the
        log-sum-exp of each, `[batch, sequence]` or `[batch, sequence, heads]`, both in the dtype of the queries.
        Outputs that were rounded to bfloat16 here would put a retrofitted model further from float32 than the original.
    """
    if torch.compiler.is_compiling() and len(sources) <= COMPILED_SOURCES and has_many_tokens(inverse_rms):
        return phase_one_to_compile(queries, inverse_rms, sources, is_hidden)
    (*shape, hidden), (reads, *heads) = sources[0].shape, queries.shape[:-1]
    num_heads = heads[0] if heads else 1
    inverse_rms = inverse_rms.flatten(0, -2)
    num_tokens, num_sources = inverse_rms.shape
    slices = chunks(num_tokens, num_sources * hidden)
    if len(slices) > 1:
        outputs = queries.new_empty(num_tokens, reads, hidden)
        log_sum_exps = queries.new_empty(num_tokens, reads * num_heads)
    buffer = stack_buffer(sources, slices)
    for chunk in slices:
        values = stacked(sources, chunk, buffer)
        _, logits = phase_one_logits(queries, inverse_rms[chunk], values, is_hidden)
        # Maximum and log-softmax are faster than logsumexp, which is many small operations.
        log_weights = logits.log_softmax(1)
        log_sum_exp = logits.amax(1) - log_weights.amax(1)
        weights = log_weights.exp_()
        if len(slices) == 1:
            outputs, log_sum_exps = weighted_sums(weights, values, num_heads), log_sum_exp
        else:
            if num_heads == 1:
                torch.bmm(weights.transpose(1, 2), values, out=outputs[chunk])
            else:
                outputs[chunk] = weighted_sums(weights, values, num_heads)
            log_sum_exps[chunk] = log_sum_exp
    log_sum_exps = log_sum_exps.view(*shape, reads, *heads)
    return (*outputs.view(*shape, reads, hidden).unbind(-2), *log_sum_exps.unbind(len(shape)))


COMPILED_SOURCES = 16  # with more, it takes minutes to compile `phase_one_to_compile`


def has_many_tokens(inverse_rms: torch.Tensor) -> bool:
    """Whether `[batch, sequence, sources]` is of more than one token. An export must not ask, because the answer would
    be a condition on the length that it leaves open."""
    return torch.compiler.is_exporting() or inverse_rms.shape[0] * inverse_rms.shape[1] > 1


def phase_one_to_compile(
    queries: torch.Tensor,
    inverse_rms: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    is_hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """[`phase_one_forward`] as sums over sources that stay where they are in memory. A compiler fuses these sums; if
    they are not compiled, each term goes through memory."""
    heads = queries.shape[1:-1]  # () for one head: then no tensor has a dimension of heads
    values = [upcast(source).unflatten(-1, (*heads, -1)) if heads else upcast(source) for source in sources]
    # A matrix product would need its up-cast operands in memory, so these are sums of products.
    products = [(value.unsqueeze(2) * queries).sum(-1) for value in values]
    scales = inverse_rms.view(*inverse_rms.shape[:2], 1, *(1 for _ in heads), -1)
    logits = torch.stack(products, dim=-1) * scales  # [batch, sequence, reads(, heads), sources]
    if is_hidden is not None:
        logits = logits.masked_fill(is_hidden.T.view(len(queries), *heads, -1), -torch.inf)
    log_sum_exps = logits.logsumexp(-1)
    weights = (logits - log_sum_exps.unsqueeze(-1)).exp()
    outputs = []
    for weights_of_read in weights.unbind(2):
        terms = [weight.unsqueeze(-1) * value for weight, value in zip(weights_of_read.unbind(-1), values)]
        outputs.append(reduce(torch.add, terms).flatten(2))
    return (*outputs, *log_sum_exps.unbind(2))


class PhaseOne(torch.autograd.Function):
    """Phase one with a backward that keeps the sources and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        inverse_rms: torch.Tensor,
        has_key_norm: bool,
        is_hidden: torch.Tensor | None,
        *sources: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        results = phase_one_forward(queries, inverse_rms, sources, is_hidden)
        ctx.save_for_backward(queries, inverse_rms, is_hidden, *results[len(queries) :], *sources)
        ctx.has_key_norm = has_key_norm
        return results

    @staticmethod
    def backward(ctx: Any, *grads_of_results: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        queries, inverse_rms, is_hidden, *others = ctx.saved_tensors
        reads, num_heads = len(queries), 1 if queries.dim() == 2 else queries.shape[1]
        sources, grad_outputs = others[reads:], grads_of_results[:reads]
        hidden = sources[0].shape[-1]
        log_sum_exps, grad_log_sum_exps = (
            torch.stack(tensors, dim=2).flatten(0, 1).flatten(1)
            for tensors in (others[:reads], grads_of_results[reads:])
        )
        inverse_rms = inverse_rms.flatten(0, -2)
        num_tokens, num_sources = inverse_rms.shape
        grad_queries = torch.zeros_like(queries)
        grad_rows = [source.new_empty(num_tokens, hidden) for source in sources]
        slices = chunks(num_tokens, (num_sources + reads) * hidden)
        buffer, grad_buffer = stack_buffer(sources, slices), stack_buffer(grad_outputs, slices)
        for chunk in slices:
            values, grads = stacked(sources, chunk, buffer), stacked(grad_outputs, chunk, grad_buffer)
            scale = inverse_rms[chunk]
            products, logits = phase_one_logits(queries, scale, values, is_hidden)
            weights = (logits - log_sum_exps[chunk].unsqueeze(1)).exp_()  # [tokens, sources, reads * heads]
            grad_weights = products_of(values, grads, num_heads)
            mean = (weights * grad_weights).sum(1, keepdim=True)
            grad_logits = weights * (grad_weights - mean + grad_log_sum_exps[chunk].unsqueeze(1))
            grad_products = grad_logits * scale.unsqueeze(-1)
            # 1 / rms depends on the value too: its derivative is -v / (hidden * rms^3).
            along = (
                (grad_logits * products).sum(-1) * scale**3 / -hidden if ctx.has_key_norm else torch.zeros_like(scale)
            )
            grad_values = along.unsqueeze(-1) * values
            if num_heads == 1:
                grad_values.baddbmm_(weights, grads)
                grad_values.flatten(0, 1).addmm_(grad_products.flatten(0, 1), queries)
                grad_queries.addmm_(grad_products.flatten(0, 1).T, values.flatten(0, 1))
            else:
                weights, grad_products = (t.unflatten(-1, (-1, num_heads)) for t in (weights, grad_products))
                values, grads = (t.unflatten(-1, (num_heads, -1)) for t in (values, grads))
                grad_values += torch.einsum("tnrh,trhd->tnhd", weights, grads).flatten(-2)
                grad_values += torch.einsum("tnrh,rhd->tnhd", grad_products, queries).flatten(-2)
                grad_queries += torch.einsum("tnrh,tnhd->rhd", grad_products, values)
            for grad_row, grad_value in zip(grad_rows, grad_values.unbind(1)):
                grad_row[chunk] = grad_value
        return (grad_queries, None, None, None, *(grad.view(sources[0].shape) for grad in grad_rows))


# -- phase two ---------------------------------------------------------------------------------------------------------

# So many tensors of a chunk are at work in a merge: the addend, the sum, the output of phase one, the result.
MERGED_TENSORS = 4


def phase_two_forward(
    query: torch.Tensor,
    scale: int,
    eps: float | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    known: Sequence[torch.Tensor],
    recent: Sequence[torch.Tensor],
    addend: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase two: merges the output of phase one with the recent sources, one by one, by online softmax.

    Args:
        query (`torch.Tensor`): folded query `[hidden]` or `[heads, hidden / heads]`, float32 or float64.
        scale (`int`): factor of the result.
        eps (`float`, *optional*): epsilon of the RMSNorm on the keys; `None` if they have none.
        output (`torch.Tensor`): normalised output of phase one, `[batch, sequence, hidden]`, in the query's dtype.
        log_sum_exp (`torch.Tensor`): `[batch, sequence]` or `[batch, sequence, heads]`, in the query's dtype.
        known (`Sequence[torch.Tensor]`):
            1 / rms (1 without key norm) of the first of `recent`, each `[batch, sequence]`, in the query's dtype; that
            of the others is computed.
        recent (`Sequence[torch.Tensor]`): the recent sources, at least one, each `[batch, sequence, hidden]`.
        addend (`torch.Tensor`, *optional*): is first added to the last of `recent`, `[batch, sequence, hidden]`.
        norm (`Norm`, *optional*): is applied to the result, which is not rounded before.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the result, and the last of `recent` with its addend, both
        `[batch, sequence, hidden]` in the dtype of the sources.
    """
    *finished, last = recent
    slices = chunks(last.shape[0] * last.shape[1], MERGED_TENSORS * last.shape[-1])
    if len(slices) == 1:
        total = last if addend is None else last + addend
        return phase_two_merge(query, scale, eps, output, log_sum_exp, known, (*finished, total), norm), total
    merged = torch.empty_like(last, memory_format=torch.contiguous_format)
    total = last if addend is None else torch.empty_like(merged)
    rows = by_token(output, log_sum_exp, *known, *finished, total)
    terms_of_total = () if addend is None else by_token(last, addend)
    for chunk, result in zip(slices, merged.flatten(0, -2).split(slices[0].stop)):
        output, log_sum_exp, *others = (row[chunk] for row in rows)
        if terms_of_total:
            torch.add(*(row[chunk] for row in terms_of_total), out=others[-1])
        known, recent = others[: len(known)], others[len(known) :]
        phase_two_merge(query, scale, eps, output, log_sum_exp, known, recent, norm, result)
    return merged, total


def phase_two_merge(
    query: torch.Tensor,
    scale: int,
    eps: float | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    known: Sequence[torch.Tensor],
    recent: Sequence[torch.Tensor],
    norm: Norm | None,
    result: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`phase_two_forward`] of tokens that are few enough to be up-cast at once, without an addend.

    It writes into `result` if there is one, and returns it.
    """
    in_place = result if result is not None and result.dtype == output.dtype else None
    num_heads, hidden = 1 if query.dim() == 1 else len(query), output.shape[-1]
    for index, value in enumerate(recent):
        value = upcast(value)
        product = product_with(value, query)
        scale_of_key = known[index] if index < len(known) else key_scale(value, eps)
        if num_heads > 1:
            scale_of_key = scale_of_key.unsqueeze(-1)
        share = torch.addcmul(log_sum_exp, product, scale_of_key, value=-1).sigmoid_()  # of what came before
        output = torch.lerp(value, output, spread(share, num_heads, hidden), out=in_place)
        if index + 1 < len(recent):
            log_sum_exp = torch.logaddexp(log_sum_exp, product * scale_of_key)
    if norm is not None:  # see `scaled_and_normed`
        output.mul_(inverse_rms(output, norm.eps / scale**2, keepdim=True)).mul_(norm.weight)
    elif scale != 1:
        output.mul_(scale)
    if in_place is None and result is not None:
        return result.copy_(output)
    return output.to(recent[0].dtype)


class PhaseTwo(torch.autograd.Function):
    """Phase two with a backward that keeps its arguments and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        scale: int,
        eps: float | None,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        num_known: int,
        *known_and_recent: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, output, log_sum_exp, *known_and_recent)
        ctx.scale, ctx.eps, ctx.num_known = scale, eps, num_known
        known, recent = known_and_recent[:num_known], known_and_recent[num_known:]
        return phase_two_forward(query, scale, eps, output, log_sum_exp, known, recent)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        query, *saved = ctx.saved_tensors
        hidden, num_known, num_heads = grad.shape[-1], ctx.num_known, 1 if query.dim() == 1 else len(query)
        results = [
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*saved[:2], *saved[2 + num_known :])
        ]
        grad_query = torch.zeros_like(query)
        rows = by_token(grad, *saved)
        grad_output, grad_log_sum_exp, *grad_recent = by_token(*results)
        for chunk in chunks(len(rows[0]), hidden * len(grad_recent)):
            grads, output, log_sum_exp, *others = (row[chunk] for row in rows)
            known, recent = others[:num_known], [upcast(value) for value in others[num_known:]]
            grads = upcast(grads) if ctx.scale == 1 else upcast(grads) * ctx.scale
            products = torch.stack([product_with(value, query) for value in recent])  # [recent, tokens(, heads)]
            scales = torch.stack([*known, *(key_scale(value, ctx.eps) for value in recent[num_known:])])
            if num_heads > 1:
                scales = scales.unsqueeze(-1)
            weights = torch.cat([log_sum_exp.unsqueeze(0), products * scales]).softmax(
                0
            )  # [1 + recent, tokens(, heads)]
            grad_weights = torch.stack([product_by_head(grads, value, num_heads) for value in (output, *recent)])
            grad_logits = weights * (grad_weights - (weights * grad_weights).sum(0))
            grad_log_sum_exp[chunk], grad_products = grad_logits[0], grad_logits[1:] * scales
            along = torch.zeros_like(products) if ctx.eps is None else grad_products * products * scales**2 / -hidden
            if num_heads > 1:
                along = along.sum(-1)
            torch.mul(grads, spread(weights[0], num_heads, hidden), out=grad_output[chunk])
            for index, value in enumerate(recent):
                weight = spread(weights[index + 1], num_heads, hidden)
                grad_value = torch.addcmul(along[index].unsqueeze(-1) * value, weight, grads)
                if num_heads == 1:
                    grad_recent[index][chunk] = grad_value.addr_(grad_products[index], query)
                    grad_query.addmv_(value.T, grad_products[index])
                else:
                    of_heads = grad_products[index].unsqueeze(-1)  # [tokens, heads, 1]
                    grad_recent[index][chunk] = grad_value.add_((of_heads * query).flatten(-2))
                    grad_query += (of_heads * value.unflatten(-1, query.shape)).sum(0)
        return (grad_query, None, None, *results[:2], None, *[None] * num_known, *results[2:])


# -- one token on a CPU ------------------------------------------------------------------------------------------------
#
# Reading the memory of one token costs next to nothing, and starting an operation of torch costs most. Arithmetic with
# numbers of Python costs a fraction of that, so statistics of the token are numbers of Python.


def is_token_on_cpu(source: torch.Tensor) -> bool:
    """Whether statistics of `source`, `[batch, sequence, hidden]`, may become numbers of Python.

    It has to be one token on a CPU, because numbers of other devices would have to be waited for. No tracer may be at
    work, because it would record the numbers as constants.
    """
    return (
        not torch.compiler.is_compiling()
        and type(source) is torch.Tensor
        and source.is_cpu
        and source.numel() == source.shape[-1]
        and not torch.jit.is_tracing()
    )


def phase_one_of_token(queries: torch.Tensor, eps: float, sources: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """[`phase_one_forward`] of one token; it computes 1 / rms of all sources at once."""
    values = upcast(torch.cat(sources, dim=1))[0]
    _, logits = phase_one_logits(queries, inverse_rms(values, eps), values)  # [sources, reads]
    weights = logits.softmax(0)
    log_sum_exps = logits.amax(0) - weights.amax(0).log_()
    outputs, shape = weights.T @ values, sources[0].shape
    return [*outputs.view(-1, *shape).unbind(0), *log_sum_exps.view(-1, *shape[:-1]).unbind(0)]


def read_of_token(
    query: torch.Tensor,
    scale: int,
    eps: float,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    recent: Sequence[torch.Tensor],
    norm: Norm | None,
) -> torch.Tensor:
    """The hidden states of a read of one token: phase two, if there are recent sources, then factor and norm.

    Arguments are those of [`phase_two_forward`], all of one token; `recent` may be empty. The result is not rounded.
    """
    merged = output.view(-1)
    if recent:
        lse = log_sum_exp.item()
        for index, source in enumerate(recent):
            value = upcast(source).view(-1)
            difference = torch.dot(value, query).item() * inverse_rms_of_token(value, eps) - lse
            merged = torch.lerp(value, merged, 0.5 - 0.5 * math.tanh(difference / 2))  # by sigmoid(-difference)
            if index + 1 < len(recent):
                lse += max(difference, 0.0) + math.log1p(math.exp(-abs(difference)))
    if norm is not None:  # see `scaled_and_normed`
        merged = merged.mul(inverse_rms_of_token(merged, norm.eps / scale**2)).mul_(norm.weight)
    elif scale != 1:
        merged = merged.mul(scale)
    return merged.view_as(output)


def inverse_rms_of_token(value: torch.Tensor, eps: float) -> float:
    """[`inverse_rms`] of one vector `[hidden]`, as a number of Python."""
    mean_square = torch.dot(value, value).item() / value.shape[0] + eps
    return 1 / math.sqrt(mean_square) if mean_square else math.inf

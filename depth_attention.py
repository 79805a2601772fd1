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
        inverse_rms (`torch.Tensor`, *optional*):
            1 / rms of the finished sources, `[sources, batch, sequence]`, float32, for `"two_phase"`; up to the end of
            a block it lacks the source which that block became.
        phase_one (`tuple[torch.Tensor, ...]`):
            What phase one (Algorithm 1) found over the finished sources for the reads of the open block: normalised
            output of each, `[batch, sequence, hidden]`, then the log-sum-exp of each, `[batch, sequence]`, float32;
            empty for implementations without phases, and at a block boundary.
    """

    sources: tuple[torch.Tensor, ...]
    partial_sum: torch.Tensor | None = None
    inverse_rms: torch.Tensor | None = None
    phase_one: tuple[torch.Tensor, ...] = ()

    def write(self, output: torch.Tensor, closes_block: bool) -> DepthState:
        """Adds a sublayer's output, `[batch, sequence, hidden]`, to the open block (Eq. 5), and closes the block if
        this was its last sublayer. Sources keep the dtype of the embedding, also under autocast."""
        output = output.to(self.sources[0].dtype)
        total = output if self.partial_sum is None else self.partial_sum + output
        if closes_block:
            return DepthState(sources=(*self.sources, total), inverse_rms=self.inverse_rms)
        return self._replace(partial_sum=total)

    def flatten(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the state in a row, as they cross the boundary of a decoder layer."""
        optional = (tensor for tensor in (self.partial_sum, self.inverse_rms) if tensor is not None)
        return (*self.sources, *optional, *self.phase_one)

    @classmethod
    def unflatten(cls, tensors: tuple[torch.Tensor, ...], num_written: int, block_size: int) -> DepthState:
        """The inverse of [`~DepthState.flatten`]: after `num_written` sublayers the structure of a state is known."""
        num_sources = 1 + num_written // block_size
        sources, rest = tuple(tensors[:num_sources]), tuple(tensors[num_sources:])
        partial_sum = None
        if num_written % block_size > 0:
            partial_sum, rest = rest[0], rest[1:]
        # Phase one comes in pairs.
        inverse_rms, phase_one = (rest[0], rest[1:]) if len(rest) % 2 else (None, rest)
        return cls(sources, partial_sum, inverse_rms, phase_one)


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
    def open_block(queries: torch.Tensor, state: DepthState, mix: str, eps: float) -> DepthState:
        """Called at the first read of a block; here, nothing is computed ahead.

        Args:
            queries (`torch.Tensor`): folded queries of the block's reads, `[reads, hidden]`, float32.
            state (`DepthState`): the state at the block boundary, with n finished sources.
            mix (`str`): `"mean"` or `"sum"`.
            eps (`float`): epsilon of the RMSNorm on the keys.

        Returns:
            `DepthState`: the state, with what [`~EagerDepthAttention.read`] wants to find in it.
        """
        return state

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


class TwoPhaseDepthAttention:
    """Algorithm 1: the sources are looked at once per block, for all its reads, and each read then merges the partial
    sum with what that gave. Same arguments and results as [`EagerDepthAttention`]."""

    @staticmethod
    def open_block(queries: torch.Tensor, state: DepthState, mix: str, eps: float) -> DepthState:
        with torch.no_grad():  # its part of the gradient is in that of phase one
            known = () if state.inverse_rms is None else (state.inverse_rms,)
            new = state.sources[sum(map(len, known)) :]
            cached = torch.cat([*known, *(inverse_rms(source, eps).unsqueeze(0) for source in new)])
        first_scale = len(state.sources) if mix == "sum" else 1
        if needs_grad(queries, *state.sources):
            phase_one = PhaseOne.apply(queries, cached, first_scale, *state.sources)
        else:
            phase_one = phase_one_forward(queries, cached, first_scale, state.sources)
        return state._replace(inverse_rms=cached, phase_one=phase_one)

    @staticmethod
    def read(query: torch.Tensor, state: DepthState, index_in_block: int, mix: str, eps: float) -> torch.Tensor:
        if state.partial_sum is None:
            return state.phase_one[0].to(state.sources[0].dtype)
        scale = len(state.sources) + 1 if mix == "sum" else 1
        output = state.phase_one[index_in_block]
        log_sum_exp = state.phase_one[len(state.phase_one) // 2 + index_in_block]
        if needs_grad(query, output, state.partial_sum):
            return PhaseTwo.apply(output, log_sum_exp, state.partial_sum, query, scale, eps)
        return phase_two_forward(output, log_sum_exp, state.partial_sum, query, scale, eps)


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether a graph is to be recorded; if not, the overhead of a custom function is saved."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def inverse_rms(value: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms over the last dimension, in the dtype of statistics: `[..., hidden]` to `[...]`."""
    norm = torch.linalg.vector_norm(value, dim=-1, dtype=None if value.dtype.itemsize >= 4 else torch.float32)
    return norm.square_().div_(value.shape[-1]).add_(eps).rsqrt_()


# Tokens are taken in chunks whose float32 copies stay in the caches of a core: what a chunk is asked for repeatedly is
# then read from memory once.
CHUNK_ELEMENTS = 2**20


def chunks(num_tokens: int, elements_per_token: int) -> list[slice]:
    """Slices of the token dimension; a single one while compiling, where the compiler fuses instead."""
    size = max(1, CHUNK_ELEMENTS // elements_per_token)
    if torch.compiler.is_compiling() or num_tokens <= size:
        return [slice(None)]
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def phase_one_logits(
    queries: torch.Tensor, inverse_rms: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dot products `w . v` and logits `w . v / rms(v)`, both `[reads, tokens, sources]`, of `values`
    `[tokens, sources, hidden]` and `inverse_rms` `[sources, tokens]`."""
    products = (queries @ values.flatten(0, 1).T).unflatten(1, values.shape[:2])
    return products, products * inverse_rms.T


def phase_one_forward(
    queries: torch.Tensor, inverse_rms: torch.Tensor, first_scale: int, sources: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Phase one: every read of a block over the finished sources.

    Args:
        queries (`torch.Tensor`): folded queries `[reads, hidden]`, float32.
        inverse_rms (`torch.Tensor`): `[sources, batch, sequence]`, float32.
        first_scale (`int`): factor of the first read, which is finished by this.
        sources (`tuple[torch.Tensor, ...]`): each `[batch, sequence, hidden]`.

    Returns:
        `tuple[torch.Tensor, ...]`: the normalised output of each read, `[batch, sequence, hidden]`, then the
        log-sum-exp of each, `[batch, sequence]`, both float32: rounded to bfloat16 in between, a retrofitted model
        would be further from float32 than the original.
    """
    (*shape, hidden), reads = sources[0].shape, queries.shape[0]
    rows = [source.reshape(-1, hidden) for source in sources]
    inverse_rms = inverse_rms.reshape(len(rows), -1)
    slices = chunks(rows[0].shape[0], len(rows) * hidden)
    output, log_sum_exps = queries.new_empty(0 if len(slices) == 1 else rows[0].shape[0], reads, hidden), []
    for chunk in slices:
        values = upcast(torch.stack([row[chunk] for row in rows], dim=1))
        _, logits = phase_one_logits(queries, inverse_rms[:, chunk], values)
        weights = logits.softmax(-1)
        if first_scale != 1:
            weights[0].mul_(first_scale)
        mixed = weights.transpose(0, 1) @ values  # [tokens, reads, hidden]
        log_sum_exps.append(logits.logsumexp(-1))
        if len(slices) == 1:
            output = mixed
        else:
            output[chunk] = mixed
    log_sum_exp = log_sum_exps[0] if len(log_sum_exps) == 1 else torch.cat(log_sum_exps, dim=1)
    return (*output.view(*shape, reads, hidden).unbind(-2), *log_sum_exp.view(reads, *shape).unbind(0))


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
        log_sum_exps, sources = torch.stack(others[:reads]), others[reads:]
        grad_outputs = [grad.reshape(-1, hidden) for grad in grads_of_results[:reads]]
        grad_log_sum_exps = torch.stack(grads_of_results[reads:]).reshape(reads, -1)
        rows = [source.reshape(-1, hidden) for source in sources]
        inverse_rms = inverse_rms.reshape(len(rows), -1)
        log_sum_exps = log_sum_exps.reshape(reads, -1)
        grad_queries = torch.zeros_like(queries)
        grad_rows = [torch.empty_like(row, memory_format=torch.contiguous_format) for row in rows]
        for chunk in chunks(rows[0].shape[0], (len(rows) + reads) * hidden):
            values = upcast(torch.stack([row[chunk] for row in rows], dim=1))  # [tokens, sources, hidden]
            grads = upcast(torch.stack([grad[chunk] for grad in grad_outputs], dim=1))  # [tokens, reads, hidden]
            if ctx.first_scale != 1:
                grads = torch.cat([grads[:, :1] * ctx.first_scale, grads[:, 1:]], dim=1)
            scale = inverse_rms[:, chunk].T  # [tokens, sources]
            products, logits = phase_one_logits(queries, inverse_rms[:, chunk], values)
            weights = (logits - log_sum_exps[:, chunk].unsqueeze(-1)).exp()  # [reads, tokens, sources]
            grad_weights = (grads @ values.transpose(1, 2)).transpose(0, 1)
            mean = (weights * grad_weights).sum(-1, keepdim=True)
            grad_logits = weights * (grad_weights - mean + grad_log_sum_exps[:, chunk].unsqueeze(-1))
            grad_products = grad_logits * scale
            # 1 / rms depends on the value too: its derivative is -v / (hidden * rms^3).
            along = (grad_logits * products).sum(0) * scale**3 / -hidden
            grad_values = torch.baddbmm(along.unsqueeze(-1) * values, weights.permute(1, 2, 0), grads)
            grad_values.flatten(0, 1).addmm_(grad_products.flatten(1).T, queries)
            grad_queries.addmm_(grad_products.flatten(1), values.flatten(0, 1))
            for grad_row, grad_value in zip(grad_rows, grad_values.unbind(1)):
                grad_row[chunk] = grad_value
        return (grad_queries, None, None, *(g.view(s.shape) for g, s in zip(grad_rows, sources)))


def phase_two_gate(
    log_sum_exp: torch.Tensor, partial_sum: torch.Tensor, query: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The partial sum's weight in the merge, with the dot product and 1 / rms that it came from."""
    product, scale = partial_sum @ query, inverse_rms(partial_sum, eps)
    return (product * scale).sub_(log_sum_exp).sigmoid_(), product, scale


def phase_two_merge(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    partial_sum: torch.Tensor,
    query: torch.Tensor,
    scale: int,
    eps: float,
) -> torch.Tensor:
    """[`phase_two_forward`] of tokens that are few enough to be up-cast at once."""
    value = upcast(partial_sum)
    gate = phase_two_gate(log_sum_exp, value, query, eps)[0]
    hidden_states = torch.lerp(output, value, gate.unsqueeze(-1))
    if scale != 1:
        hidden_states = hidden_states.mul_(scale)
    return hidden_states.to(partial_sum.dtype)


def phase_two_forward(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    partial_sum: torch.Tensor,
    query: torch.Tensor,
    scale: int,
    eps: float,
) -> torch.Tensor:
    """Phase two: one read's merge of phase one with the partial sum by online softmax.

    Args:
        output (`torch.Tensor`): normalised output of phase one, `[batch, sequence, hidden]`, float32.
        log_sum_exp (`torch.Tensor`): `[batch, sequence]`, float32.
        partial_sum (`torch.Tensor`): `[batch, sequence, hidden]`.
        query (`torch.Tensor`): folded query `[hidden]`, float32.
        scale (`int`): factor of the result.
        eps (`float`): epsilon of the RMSNorm on the keys.

    Returns:
        `torch.Tensor`: `[batch, sequence, hidden]` in the dtype of `partial_sum`.
    """
    hidden = query.shape[0]
    slices = chunks(log_sum_exp.numel(), 2 * hidden)
    if len(slices) == 1:
        return phase_two_merge(output, log_sum_exp, partial_sum, query, scale, eps)
    outputs, partial_sums = output.reshape(-1, hidden), partial_sum.reshape(-1, hidden)
    log_sum_exps = log_sum_exp.reshape(-1)
    merged = torch.empty_like(partial_sums)
    for chunk in slices:
        merged[chunk] = phase_two_merge(outputs[chunk], log_sum_exps[chunk], partial_sums[chunk], query, scale, eps)
    return merged.view(output.shape)


class PhaseTwo(torch.autograd.Function):
    """Phase two with a backward that keeps its arguments and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        partial_sum: torch.Tensor,
        query: torch.Tensor,
        scale: int,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(output, log_sum_exp, partial_sum, query)
        ctx.scale, ctx.eps = scale, eps
        return phase_two_forward(output, log_sum_exp, partial_sum, query, scale, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        output, log_sum_exp, partial_sum, query = ctx.saved_tensors
        hidden = query.shape[0]
        outputs, partial_sums, grads = (t.reshape(-1, hidden) for t in (output, partial_sum, grad))
        log_sum_exps = log_sum_exp.reshape(-1)
        grad_outputs = torch.empty_like(outputs, memory_format=torch.contiguous_format)
        grad_partial_sums = torch.empty_like(partial_sums, memory_format=torch.contiguous_format)
        grad_log_sum_exps, grad_query = torch.empty_like(log_sum_exps), torch.zeros_like(query)
        for chunk in chunks(outputs.shape[0], 3 * hidden):
            value = upcast(partial_sums[chunk])
            gate, product, scale = phase_two_gate(log_sum_exps[chunk], value, query, ctx.eps)
            grad_hidden_states = upcast(grads[chunk])
            if ctx.scale != 1:
                grad_hidden_states = grad_hidden_states * ctx.scale
            through_value = grad_hidden_states * gate.unsqueeze(-1)
            grad_gate = ((value - outputs[chunk]) * grad_hidden_states).sum(-1)
            grad_logit = grad_gate * gate * (1 - gate)
            grad_product = grad_logit * scale
            along = grad_logit * product * scale**3 / -hidden  # see PhaseOne.backward
            grad_outputs[chunk] = grad_hidden_states - through_value
            grad_partial_sums[chunk] = through_value.addcmul_(along.unsqueeze(-1), value).addr_(grad_product, query)
            grad_log_sum_exps[chunk] = -grad_logit
            grad_query += grad_product @ value
        return (
            grad_outputs.view(output.shape),
            grad_log_sum_exps.view(log_sum_exp.shape),
            grad_partial_sums.view(partial_sum.shape),
            grad_query,
            None,
            None,
        )


class TritonDepthAttention:
    """Algorithm 1 in the kernels of `depth_attention_triton.py`, for CUDA devices. Same arguments and results as
    [`EagerDepthAttention`]; raises [`AttnResError`] where Triton is missing, or sources are elsewhere."""

    @staticmethod
    def open_block(queries: torch.Tensor, state: DepthState, mix: str, eps: float) -> DepthState:
        from .depth_attention_triton import phase_one

        first_scale = len(state.sources) if mix == "sum" else 1
        return state._replace(phase_one=phase_one(queries, state.sources, first_scale, eps))

    @staticmethod
    def read(query: torch.Tensor, state: DepthState, index_in_block: int, mix: str, eps: float) -> torch.Tensor:
        from .depth_attention_triton import phase_two

        if state.partial_sum is None:
            return state.phase_one[0].to(state.sources[0].dtype)
        scale = len(state.sources) + 1 if mix == "sum" else 1
        output = state.phase_one[index_in_block]
        log_sum_exp = state.phase_one[len(state.phase_one) // 2 + index_in_block]
        return phase_two(output, log_sum_exp, state.partial_sum, query, scale, eps)


HAS_TRITON = find_spec("triton") is not None


class AutoDepthAttention:
    """[`TritonDepthAttention`] where it runs, else [`TwoPhaseDepthAttention`]; asked anew at every read, because the
    layers of a model may be on different devices."""

    @staticmethod
    def open_block(queries: torch.Tensor, state: DepthState, mix: str, eps: float) -> DepthState:
        return AutoDepthAttention.choose(state).open_block(queries, state, mix, eps)

    @staticmethod
    def read(query: torch.Tensor, state: DepthState, index_in_block: int, mix: str, eps: float) -> torch.Tensor:
        return AutoDepthAttention.choose(state).read(query, state, index_in_block, mix, eps)

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


class DepthSettings(NamedTuple):
    """What of an [`AttnResConfig`] a read depends on. Looked up several times per read, so not in the configuration,
    whose attributes are slow."""

    block_size: int
    mix: str
    key_norm_eps: float
    implementation: DepthAttentionImplementation

    @classmethod
    def of(cls, config: AttnResConfig) -> DepthSettings:
        implementation = DEPTH_ATTENTION_FUNCTIONS[config.depth_attention_implementation]
        return cls(config.block_size, config.mix, config.key_norm_eps, implementation)


def read(
    queries: torch.Tensor, state: DepthState, num_written: int, settings: DepthSettings
) -> tuple[torch.Tensor, DepthState]:
    """The read in front of sublayer `num_written` (the output read, when all are written).

    Args:
        queries (`torch.Tensor`): folded queries of all reads, `[reads, hidden]`, from [`DepthAttention`].
        state (`DepthState`): the state after `num_written` sublayers.
        num_written (`int`): how many sublayers have written; also the index of this read.
        settings (`DepthSettings`): block size, mix, eps and implementation.

    Returns:
        `tuple[torch.Tensor, DepthState]`: the hidden states `[batch, sequence, hidden]`, and the state, which at the
        start of a block now holds phase one.
    """
    if torch.is_autocast_enabled(queries.device.type):  # it would take the products in half precision
        with torch.autocast(queries.device.type, enabled=False):
            return read(queries, state, num_written, settings)
    block_size, mix, eps, implementation = settings
    index_in_block = num_written % block_size
    if index_in_block == 0:
        state = implementation.open_block(queries[num_written : num_written + block_size], state, mix, eps)
    return implementation.read(queries[num_written], state, index_in_block, mix, eps), state

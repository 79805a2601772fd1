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
"""The two phases of depth attention as Triton kernels; imported only where they are to run.

A token is independent of all others, so a program takes one token (phase one also a group of reads) and does all of it:
what has to be looked at twice, because a logit needs the whole hidden dimension before the first output element is
known, is small enough per token to stay in registers or in the cache. So device memory is read and written once:

    phase one            reads n sources, writes one float32 output per read
    phase one, backward  reads n sources and one float32 gradient per read, writes n gradients; the gradient of the
                         queries reads the n sources once more
    phase two            reads a float32 output and the partial sum (and the sublayer's output to be added), writes
                         the hidden states (and the new partial sum)
    phase two, backward  reads the same and one or two gradients, writes two

Sources are passed as they are, a tuple of pointers, never stacked. Sums over tokens are taken in a fixed order, without
atomics: results are the same in every run. Products are in float32, without tensor cores (float64 for float64 queries):
at the shapes of Block AttnRes that is several times less work than fits into the time of reading and writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .configuration_attnres import AttnResError
from .depth_state import Norm, refuse_second_derivatives

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise AttnResError(
        "The depth attention implementation 'triton' needs the package triton, which cannot be imported here "
        f"({error}). Install it (`pip install triton`), or choose 'two_phase' or 'auto'."
    ) from error


# -- kernels -----------------------------------------------------------------------------------------------------------
#
# n sources of `[tokens, HIDDEN]` come as a tuple padded to N, a power of two; BLOCK columns are looked at together.


@triton.jit
def pick(pointers, index, N: tl.constexpr):
    """The pointers at `index`, a scalar or a block, of a tuple of N; all are aligned, see `plain`."""
    found = pointers[0] + index * 0
    for i in tl.static_range(1, N):
        found = tl.where(index == i, pointers[i], found)
    return tl.multiple_of(found, 16)


@triton.jit
def load_values(rows, is_source, columns, HIDDEN: tl.constexpr, dtype: tl.constexpr):
    """Columns of one token of every source, `[N, BLOCK]`, zero beyond the last source and column."""
    mask = is_source[:, None] & (columns < HIDDEN)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def row(matrix, index):
    """One row of `[READS, N]`."""
    is_row = tl.arange(0, matrix.shape[0]) == index
    return tl.sum(tl.where(is_row[:, None], matrix, 0.0), axis=0)


@triton.jit
def add_to_row(matrix, index, values):
    """`[READS, N]` with `[N]` added to one row."""
    is_row = tl.arange(0, matrix.shape[0]) == index
    return matrix + tl.where(is_row[:, None], values[None, :], 0.0)


# A read with several heads is one *row* for each head, in all that has rows: a row looks at the columns of its head.


@triton.jit
def in_head(columns, row_index, HIDDEN: tl.constexpr, HEADS: tl.constexpr):
    """Which columns belong to the head of a row."""
    return columns < HIDDEN if HEADS == 1 else columns // (HIDDEN // HEADS) == row_index % HEADS


@triton.jit
def sum_of_head(values, columns, HIDDEN: tl.constexpr, HEADS: tl.constexpr):
    """The sum over the columns of each head, `[BLOCK]`, at each of its columns; a scalar for one head."""
    if HEADS == 1:
        total = tl.sum(values, axis=0)
    else:
        total = tl.zeros_like(values)
        for head in range(0, HEADS):
            is_here = in_head(columns, head, HIDDEN, HEADS)
            total = tl.where(is_here, tl.sum(tl.where(is_here, values, 0.0), axis=0), total)
    return total


@triton.jit
def of_head(pointer, token, columns, HIDDEN: tl.constexpr, HEADS: tl.constexpr):
    """Pointers into `[tokens, HEADS]`: one for one head, else that of the head of each column."""
    return pointer + token if HEADS == 1 else pointer + token * HEADS + columns // (HIDDEN // HEADS)


@triton.jit
def key_scale(squares, HIDDEN: tl.constexpr, EPS: tl.constexpr):
    """1 / rms from a sum of squares, or 1 if keys have no norm."""
    return squares * 0 + 1 if EPS is None else tl.rsqrt(squares / HIDDEN + EPS)


@triton.jit
def is_seen(index, row_index, first_read, block_size, HEADS: tl.constexpr, WINDOW: tl.constexpr):
    """Which sources are in the window of each row, `[READS, N]`."""
    first = 1 + (first_read + row_index // HEADS + block_size - 1) // block_size - WINDOW
    return (index == 0)[None, :] | (index[None, :] >= first[:, None])


@triton.jit(do_not_specialize=["num_sources", "num_rows", "num_tokens", "first_read", "block_size"])
def phase_one_kernel(
    sources,
    queries,  # [reads, HIDDEN]
    output,  # [reads, tokens, HIDDEN]
    log_sum_exp,  # [reads, tokens, HEADS]
    num_sources,
    num_rows,
    num_tokens,
    first_read,
    block_size,
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    READS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * READS
    here = tl.minimum(num_rows - first, READS)
    dtype: tl.constexpr = queries.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    index = tl.arange(0, N)
    is_source = index < num_sources
    rows = pick(sources, index, N) + token * HIDDEN

    products = tl.zeros([READS, N], dtype)
    squares = tl.zeros([N], dtype)
    values = load_values(rows, is_source, columns, HIDDEN, dtype)
    for start in range(0, HIDDEN, BLOCK):
        if BLOCK < HIDDEN:
            values = load_values(rows, is_source, start + columns, HIDDEN, dtype)
        squares += tl.sum(values * values, axis=1)
        for r in range(0, here):
            query_row = queries + (first + r) // HEADS * HIDDEN + start + columns
            query = tl.load(query_row, mask=in_head(start + columns, first + r, HIDDEN, HEADS), other=0.0)
            products = add_to_row(products, r, tl.sum(values * query[None, :], axis=1))

    reads = first + tl.arange(0, READS)
    logits = products * key_scale(squares, HIDDEN, EPS)[None, :]
    logits = tl.where(is_source[None, :], logits, float("-inf"))
    if WINDOW is not None:
        logits = tl.where(is_seen(index, reads, first_read, block_size, HEADS, WINDOW), logits, float("-inf"))
    largest = tl.max(logits, axis=1)
    weights = tl.exp(logits - largest[:, None])
    total = tl.sum(weights, axis=1)
    of_row = (reads // HEADS).to(tl.int64) * num_tokens * HEADS + token * HEADS + reads % HEADS
    tl.store(log_sum_exp + of_row, largest + tl.log(total), mask=reads < num_rows)
    weights = weights / total[:, None]

    for start in range(0, HIDDEN, BLOCK):
        if BLOCK < HIDDEN:  # from the cache
            values = load_values(rows, is_source, start + columns, HIDDEN, dtype)
        for r in range(0, here):
            mixed = tl.sum(row(weights, r)[:, None] * values, axis=0)
            target = output + (((first + r) // HEADS).to(tl.int64) * num_tokens + token) * HIDDEN + start + columns
            tl.store(target, mixed, mask=in_head(start + columns, first + r, HIDDEN, HEADS))


@triton.jit(do_not_specialize=["num_sources", "num_rows", "num_tokens", "first_read", "block_size"])
def phase_one_backward_kernel(
    sources,
    grad_sources,
    grad_outputs,  # a tuple as well: [tokens, HIDDEN] for each read
    queries,  # [reads, HIDDEN]
    log_sum_exp,  # [reads, tokens, HEADS]
    grad_log_sum_exp,  # [reads, tokens, HEADS]
    grad_products,  # [sources, tokens, rows]
    num_sources,
    num_rows,
    num_tokens,
    first_read,
    block_size,
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    READS: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = queries.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    index = tl.arange(0, N)
    is_source = index < num_sources
    rows = pick(sources, index, N) + token * HIDDEN
    grad_rows = pick(grad_sources, index, N) + token * HIDDEN

    products = tl.zeros([READS, N], dtype)
    grad_weights = tl.zeros([READS, N], dtype)
    squares = tl.zeros([N], dtype)
    values = load_values(rows, is_source, columns, HIDDEN, dtype)
    for start in range(0, HIDDEN, BLOCK):
        if BLOCK < HIDDEN:
            values = load_values(rows, is_source, start + columns, HIDDEN, dtype)
        squares += tl.sum(values * values, axis=1)
        for r in range(0, num_rows):
            is_here = in_head(start + columns, r, HIDDEN, HEADS)
            query = tl.load(queries + r // HEADS * HIDDEN + start + columns, mask=is_here, other=0.0)
            grad_row = pick(grad_outputs, r // HEADS, GRADS) + token * HIDDEN + start
            grad = tl.load(grad_row + columns, mask=is_here, other=0.0).to(dtype)
            products = add_to_row(products, r, tl.sum(values * query[None, :], axis=1))
            grad_weights = add_to_row(grad_weights, r, tl.sum(values * grad[None, :], axis=1))

    reads = tl.arange(0, READS)
    is_row = reads < num_rows
    inverse_rms = key_scale(squares, HIDDEN, EPS)
    of_row = (reads // HEADS).to(tl.int64) * num_tokens * HEADS + token * HEADS + reads % HEADS
    known = tl.load(log_sum_exp + of_row, mask=is_row, other=0.0)
    is_used = is_row[:, None] & is_source[None, :]
    if WINDOW is not None:
        is_used = is_used & is_seen(index, reads, first_read, block_size, HEADS, WINDOW)
    weights = tl.where(is_used, tl.exp(products * inverse_rms[None, :] - known[:, None]), 0.0)
    shift = tl.load(grad_log_sum_exp + of_row, mask=is_row, other=0.0) - tl.sum(weights * grad_weights, axis=1)
    grad_logits = weights * (grad_weights + shift[:, None])
    grads = grad_logits * inverse_rms[None, :]
    # 1 / rms depends on the value too: its derivative is -v / (HIDDEN * rms^3).
    along = tl.sum(grads * products, axis=0) * inverse_rms * inverse_rms / -HIDDEN
    if EPS is None:
        along = along * 0
    of_product = (index[None, :] * num_tokens.to(tl.int64) + token) * num_rows + reads[:, None]
    tl.store(grad_products + of_product, grads, mask=is_row[:, None] & is_source[None, :])

    for start in range(0, HIDDEN, BLOCK):
        mask = start + columns < HIDDEN
        if BLOCK < HIDDEN:  # from the cache, as are the gradients
            values = load_values(rows, is_source, start + columns, HIDDEN, dtype)
        grad_values = along[:, None] * values
        for r in range(0, num_rows):
            is_here = in_head(start + columns, r, HIDDEN, HEADS)
            query = tl.load(queries + r // HEADS * HIDDEN + start + columns, mask=is_here, other=0.0)
            grad_row = pick(grad_outputs, r // HEADS, GRADS) + token * HIDDEN + start
            grad = tl.load(grad_row + columns, mask=is_here, other=0.0).to(dtype)
            grad_values += row(weights, r)[:, None] * grad[None, :] + row(grads, r)[:, None] * query[None, :]
        target = grad_rows[:, None] + (start + columns)[None, :]
        tl.store(target, grad_values.to(grad_rows.dtype.element_ty), mask=is_source[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["num_sources", "num_rows", "num_tokens"])
def grad_queries_kernel(
    sources,
    grad_products,  # [sources, tokens, rows]
    partial_grads,  # [splits, reads, HIDDEN]
    num_sources,
    num_rows,
    num_tokens,
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    READS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """`sum over sources and tokens of grad_product * value`, for one split of the tokens."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    dtype: tl.constexpr = partial_grads.dtype.element_ty
    reads = tl.arange(0, READS)
    total = tl.zeros([READS, BLOCK], dtype)
    for i in range(0, num_sources):
        source = pick(sources, i, N)
        for start in range(split * TOKENS, num_tokens, tl.num_programs(1) * TOKENS):
            tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
            is_token = tokens < num_tokens
            mask = is_token[:, None] & (columns < HIDDEN)[None, :]
            values = tl.load(source + tokens[:, None] * HIDDEN + columns[None, :], mask=mask, other=0.0).to(dtype)
            grad = grad_products + (i * num_tokens + tokens)[None, :] * num_rows + reads[:, None]
            grads = tl.load(grad, mask=(reads < num_rows)[:, None] & is_token[None, :], other=0.0)
            total += tl.dot(grads, values, input_precision="ieee", out_dtype=dtype)
    target = partial_grads + ((split * num_rows + reads) // HEADS)[:, None] * HIDDEN + columns[None, :]
    is_here = in_head(columns[None, :], reads[:, None], HIDDEN, HEADS)
    tl.store(target, total, mask=(reads < num_rows)[:, None] & (columns < HIDDEN)[None, :] & is_here)


@triton.jit(do_not_specialize=["scale"])
def phase_two_kernel(
    output,  # [tokens, HIDDEN]
    log_sum_exp,  # [tokens, HEADS]
    partial_sum,  # [tokens, HIDDEN]
    added,  # [tokens, HIDDEN], or None
    query,  # [HIDDEN]
    norm_weight,  # [HIDDEN], or None
    hidden_states,  # [tokens, HIDDEN]
    total,  # [tokens, HIDDEN], where something is added
    scale,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    here = token * HIDDEN + columns
    value = tl.load(partial_sum + here, mask=mask, other=0.0)
    if added is not None:
        more = tl.load(added + here, mask=mask, other=0.0).to(value.dtype)
        value = (value.to(dtype) + more.to(dtype)).to(value.dtype)
        tl.store(total + here, value, mask=mask)
    value = value.to(dtype)
    query_row = tl.load(query + columns, mask=mask, other=0.0)
    inverse_rms = key_scale(tl.sum(value * value, axis=0), HIDDEN, EPS)
    product = sum_of_head(value * query_row, columns, HIDDEN, HEADS)
    known = tl.load(of_head(log_sum_exp, token, tl.where(mask, columns, 0), HIDDEN, HEADS))
    gate = tl.sigmoid(product * inverse_rms - known)
    merged = tl.load(output + here, mask=mask, other=0.0)
    merged = (merged + gate * (value - merged)) * scale.to(dtype)
    if norm_weight is not None:
        weight = tl.load(norm_weight + columns, mask=mask, other=0.0).to(dtype)
        merged = merged * tl.rsqrt(tl.sum(merged * merged, axis=0) / HIDDEN + NORM_EPS) * weight
    tl.store(hidden_states + here, merged.to(hidden_states.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale", "num_tokens"])
def phase_two_backward_kernel(
    output,  # [tokens, HIDDEN]
    log_sum_exp,  # [tokens, HEADS]
    total,  # [tokens, HIDDEN], the partial sum that was merged
    query,  # [HIDDEN]
    norm_weight,  # [HIDDEN], or None
    grad_hidden_states,  # [tokens, HIDDEN]
    grad_total,  # [tokens, HIDDEN], or None
    grad_output,  # [tokens, HIDDEN]
    grad_log_sum_exp,  # [tokens, HEADS]
    grad_partial_sum,  # [tokens, HIDDEN]
    partial_grad_query,  # [programs, HIDDEN]
    partial_grad_norm,  # [programs, HIDDEN]
    scale,
    num_tokens,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HEADS: tl.constexpr,
):
    program = tl.program_id(0)
    dtype: tl.constexpr = query.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    grad_query = tl.zeros([BLOCK], dtype)
    grad_norm = tl.zeros([BLOCK], dtype)
    for token in range(program, num_tokens, tl.num_programs(0)):
        here = tl.cast(token, tl.int64) * HIDDEN + columns
        value = tl.load(total + here, mask=mask, other=0.0).to(dtype)
        query_row = tl.load(query + columns, mask=mask, other=0.0)  # from the cache: registers are needed for the rest
        inverse_rms = key_scale(tl.sum(value * value, axis=0), HIDDEN, EPS)
        product = sum_of_head(value * query_row, columns, HIDDEN, HEADS)
        known = tl.load(of_head(log_sum_exp, token, tl.where(mask, columns, 0), HIDDEN, HEADS))
        gate = tl.sigmoid(product * inverse_rms - known)
        merged = tl.load(output + here, mask=mask, other=0.0)
        difference = value - merged
        grad = tl.load(grad_hidden_states + here, mask=mask, other=0.0).to(dtype)
        if norm_weight is not None:
            weight = tl.load(norm_weight + columns, mask=mask, other=0.0).to(dtype)
            merged = (merged + gate * difference) * scale.to(dtype)
            norm = tl.rsqrt(tl.sum(merged * merged, axis=0) / HIDDEN + NORM_EPS)
            grad_norm += grad * merged * norm
            grad = grad * weight * norm
            grad -= merged * (tl.sum(grad * merged, axis=0) * norm * norm / HIDDEN)
        grad = grad * scale.to(dtype)
        grad_logit = sum_of_head(difference * grad, columns, HIDDEN, HEADS) * gate * (1 - gate)
        grad_product = grad_logit * inverse_rms
        along = grad_product * product if HEADS == 1 else tl.sum(grad_product * value * query_row, axis=0)
        along = along * inverse_rms * inverse_rms / -HIDDEN  # see phase_one_backward_kernel
        if EPS is None:
            along = along * 0
        grad_value = gate * grad + along * value + grad_product * query_row
        if grad_total is not None:
            grad_value += tl.load(grad_total + here, mask=mask, other=0.0).to(dtype)
        grad_query += grad_product * value
        tl.store(grad_output + here, grad - gate * grad, mask=mask)
        if HEADS == 1:
            tl.store(grad_log_sum_exp + token, -grad_logit)
        else:
            is_first = mask & (columns % (HIDDEN // HEADS) == 0)
            tl.store(of_head(grad_log_sum_exp, token, columns, HIDDEN, HEADS), -grad_logit, mask=is_first)
        tl.store(grad_partial_sum + here, grad_value.to(grad_partial_sum.dtype.element_ty), mask=mask)
    tl.store(partial_grad_query + program * HIDDEN + columns, grad_query, mask=mask)
    if norm_weight is not None:
        tl.store(partial_grad_norm + program * HIDDEN + columns, grad_norm, mask=mask)


# -- launches ----------------------------------------------------------------------------------------------------------

IS_INTERPRETED = not isinstance(phase_one_kernel, triton.JITFunction)

SPLIT_TOKENS = 128  # with fewer, programs take one read of phase one each, so that a decoded token uses many of them
SPLITS = 32  # of the tokens, in the sum that is the gradient of the queries
GRAD_QUERIES_TILES = {"TOKENS": 16, "BLOCK": 128, "num_warps": 8}
BACKWARD_PROGRAMS = 512  # of phase two; each sums over its tokens


def tiles(num_sources: int, hidden: int, elements: int) -> dict[str, int]:
    """How a program looks at `[sources, hidden]`, with at most `elements` for four warps: all at once, in registers, if
    eight warps are enough for that, else in blocks of columns."""
    padded = triton.next_power_of_2(num_sources)
    block = triton.next_power_of_2(hidden)
    if padded * block > 2 * elements:
        block = min(1024, max(32, elements // padded))
    return {"N": padded, "BLOCK": block, "num_warps": min(8, max(1, 4 * padded * block // elements))}


def phase_two_tiles(hidden: int) -> dict[str, int]:
    """All columns at once, 8 of them for each thread."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 256))}


def pad(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """To a power of two, so that few kernels are compiled as sources become more."""
    tensors = [plain(tensor) for tensor in tensors]
    return (*tensors, *tensors[:1] * (triton.next_power_of_2(len(tensors)) - len(tensors)))


def launch(kernel: Any, grid: tuple[int, ...], on: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Runs a kernel on the device of the tensor `on`, which need not be the current one."""
    if 0 not in grid:  # there may be no token
        with torch.cuda.device_of(on):
            kernel[grid](*args, **kwargs, enable_fp_fusion=True)


def operator(results: Callable) -> Callable:
    """While compiling, a launch is an operator that the compiler does not look into; else it is just called.

    Args:
        results (`Callable`): from the same arguments, empty tensors such as the operator returns.
    """

    def decorate(function: Callable) -> Callable:
        name = f"{__name__.replace('.', '_')}::{function.__name__}"
        custom = torch.library.custom_op(name, function, mutates_args=())
        custom.register_fake(results)
        return lambda *args: (custom if torch.compiler.is_compiling() else function)(*args)

    return decorate


def empty_like(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Contiguous, and without those that are not there."""
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., hidden]` as `[tokens, hidden]`."""
    return tensor.reshape(-1, tensor.shape[-1])


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, such as kernels take it: contiguous, and aligned for the widest loads."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@operator(
    lambda queries, sources, eps, num_heads, window: (
        queries.new_empty(len(queries), *sources[0].shape),
        queries.new_empty(len(queries), len(sources[0]), num_heads),
    )
)
def launch_phase_one(
    queries: torch.Tensor, sources: list[torch.Tensor], eps: float | None, num_heads: int, window: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`phase_one`] of `[tokens, hidden]` sources: `[reads, tokens, hidden]` and `[reads, tokens, heads]`."""
    (num_tokens, hidden), num_reads = sources[0].shape, queries.shape[0]
    queries = plain(queries)
    output = queries.new_empty(num_reads, num_tokens, hidden)
    log_sum_exp = queries.new_empty(num_reads, num_tokens, num_heads)
    num_rows = num_reads * num_heads
    here = 1 if num_tokens < SPLIT_TOKENS else num_rows
    launch(
        phase_one_kernel,
        (num_tokens, triton.cdiv(num_rows, here)),
        queries,
        pad(sources),
        queries,
        output,
        log_sum_exp,
        len(sources),
        num_rows,
        num_tokens,
        *window[:2] or (0, 1),
        HIDDEN=hidden,
        READS=triton.next_power_of_2(here),
        EPS=eps,
        HEADS=num_heads,
        WINDOW=window[2] if window else None,
        **tiles(len(sources), hidden, elements=8192),
    )
    return output, log_sum_exp


@operator(lambda queries, sources, *_: empty_like(queries, *sources))
def launch_phase_one_backward(
    queries: torch.Tensor,
    sources: list[torch.Tensor],
    log_sum_exp: torch.Tensor,
    grad_outputs: list[torch.Tensor],
    grad_log_sum_exp: torch.Tensor,
    eps: float | None,
    num_heads: int,
    window: list[int],
) -> list[torch.Tensor]:
    """Gradients of the queries and of each source."""
    (num_tokens, hidden), num_reads, num_sources = sources[0].shape, queries.shape[0], len(sources)
    queries, num_rows = plain(queries), num_reads * num_heads
    grad_sources = empty_like(*sources)
    grad_products = queries.new_empty(num_sources, num_tokens, num_rows)
    sizes = tiles(num_sources, hidden, elements=4096)
    launch(
        phase_one_backward_kernel,
        (num_tokens,),
        queries,
        pad(sources),
        pad(grad_sources),
        pad(grad_outputs),
        queries,
        log_sum_exp,
        plain(grad_log_sum_exp),
        grad_products,
        num_sources,
        num_rows,
        num_tokens,
        *window[:2] or (0, 1),
        HIDDEN=hidden,
        READS=triton.next_power_of_2(num_rows),
        GRADS=triton.next_power_of_2(num_reads),
        EPS=eps,
        HEADS=num_heads,
        WINDOW=window[2] if window else None,
        **sizes,
    )
    splits = min(SPLITS, max(1, triton.cdiv(num_tokens, GRAD_QUERIES_TILES["TOKENS"])))
    partial_grads = queries.new_empty(splits, num_reads, hidden)
    launch(
        grad_queries_kernel,
        (triton.cdiv(hidden, GRAD_QUERIES_TILES["BLOCK"]), splits),
        queries,
        pad(sources),
        grad_products,
        partial_grads,
        num_sources,
        num_rows,
        num_tokens,
        HIDDEN=hidden,
        N=sizes["N"],
        READS=max(16, triton.next_power_of_2(num_rows)),
        HEADS=num_heads,
        **GRAD_QUERIES_TILES,
    )
    return [partial_grads.sum(0), *grad_sources]


@operator(lambda output, log_sum_exp, total, added, *_: empty_like(total, None if added is None else total))
def launch_phase_two(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    partial_sum: torch.Tensor,
    added: torch.Tensor | None,
    query: torch.Tensor,
    norm_weight: torch.Tensor | None,
    scale: int,
    eps: float | None,
    norm_eps: float,
) -> list[torch.Tensor]:
    """Hidden states and, where something is added, the new partial sum; all `[tokens, hidden]`."""
    hidden = query.shape[0]
    results = empty_like(partial_sum, None if added is None else partial_sum)
    launch(
        phase_two_kernel,
        partial_sum.shape[:1],
        query,
        plain(output),
        plain(log_sum_exp),
        plain(partial_sum),
        None if added is None else plain(added),
        plain(query),
        None if norm_weight is None else plain(norm_weight),
        results[0],
        results[-1],
        scale,
        HIDDEN=hidden,
        EPS=eps,
        NORM_EPS=norm_eps,
        HEADS=log_sum_exp.shape[1],
        **phase_two_tiles(hidden),
    )
    return results


@operator(
    lambda output, log_sum_exp, total, query, norm_weight, *_: empty_like(
        output, log_sum_exp, total, query, None if norm_weight is None else query
    )
)
def launch_phase_two_backward(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    total: torch.Tensor,
    query: torch.Tensor,
    norm_weight: torch.Tensor | None,
    grad_hidden_states: torch.Tensor,
    grad_total: torch.Tensor | None,
    scale: int,
    eps: float | None,
    norm_eps: float,
) -> list[torch.Tensor]:
    """Gradients of output, log-sum-exp, partial sum, query and, where there is one, norm weight."""
    num_tokens, hidden = total.shape
    programs = max(1, min(BACKWARD_PROGRAMS, num_tokens))
    grads = empty_like(output, log_sum_exp, total)
    partial_grads = [query.new_empty(programs, hidden) for _ in range(1 if norm_weight is None else 2)]
    launch(
        phase_two_backward_kernel,
        (programs,),
        query,
        plain(output),
        plain(log_sum_exp),
        plain(total),
        plain(query),
        None if norm_weight is None else plain(norm_weight),
        plain(grad_hidden_states),
        None if grad_total is None else plain(grad_total),
        *grads,
        partial_grads[0],
        partial_grads[-1],
        scale,
        num_tokens,
        HIDDEN=hidden,
        EPS=eps,
        NORM_EPS=norm_eps,
        HEADS=log_sum_exp.shape[1],
        **phase_two_tiles(hidden),
    )
    return [*grads, *(partial.sum(0) for partial in partial_grads)]


# -- gradients ---------------------------------------------------------------------------------------------------------


class PhaseOne(torch.autograd.Function):
    """Phase one; keeps the sources and the log-sum-exps, the backward recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, eps: float | None, num_heads: int, window: list[int], *sources: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        values = [rows(source) for source in sources]
        output, log_sum_exp = launch_phase_one(queries, values, eps, num_heads, window)
        ctx.settings, ctx.shape = (eps, num_heads, window), sources[0].shape
        ctx.save_for_backward(queries, log_sum_exp, *values)
        heads = (num_heads,) if num_heads > 1 else ()
        return (
            *output.view(len(queries), *ctx.shape).unbind(0),
            *log_sum_exp.view(len(queries), *ctx.shape[:-1], *heads).unbind(0),
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        queries, log_sum_exp, *values = ctx.saved_tensors
        num_reads = len(queries)
        grad_outputs = [rows(grad) for grad in grads[:num_reads]]
        grad_log_sum_exp = torch.stack(grads[num_reads:]).view(log_sum_exp.shape)
        grad_queries, *grad_values = launch_phase_one_backward(
            queries, values, log_sum_exp, grad_outputs, grad_log_sum_exp, *ctx.settings
        )
        return (grad_queries, None, None, None, *(grad.view(ctx.shape) for grad in grad_values))


class PhaseTwo(torch.autograd.Function):
    """Phase two, with or without an addition before it and a norm behind it; keeps what it merged."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        partial_sum: torch.Tensor,
        added: torch.Tensor | None,
        query: torch.Tensor,
        norm_weight: torch.Tensor | None,
        scale: int,
        eps: float | None,
        norm_eps: float,
    ) -> tuple[torch.Tensor, ...]:
        ctx.shapes = (log_sum_exp.shape, partial_sum.shape)
        output, value = rows(output), rows(partial_sum)
        log_sum_exp = log_sum_exp.reshape(len(value), -1) if len(value) else log_sum_exp.new_empty(0, 1)
        more = None if added is None else rows(added)
        results = launch_phase_two(output, log_sum_exp, value, more, query, norm_weight, scale, eps, norm_eps)
        ctx.settings = (scale, eps, norm_eps)
        ctx.added_dtype = None if added is None else added.dtype
        ctx.save_for_backward(output, log_sum_exp, value if added is None else results[1], query, norm_weight)
        return tuple(result.view(ctx.shapes[1]) for result in results)

    @staticmethod
    def backward(ctx: Any, grad_hidden_states: torch.Tensor, grad_total: torch.Tensor | None = None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        *saved, norm_weight = ctx.saved_tensors
        grad_total = None if grad_total is None else rows(grad_total)
        grad_output, grad_log_sum_exp, grad_partial_sum, grad_query, *grad_norm = launch_phase_two_backward(
            *saved, norm_weight, rows(grad_hidden_states), grad_total, *ctx.settings
        )
        grad_partial_sum = grad_partial_sum.view(ctx.shapes[1])
        return (
            grad_output.view(ctx.shapes[1]),
            grad_log_sum_exp.view(ctx.shapes[0]),
            grad_partial_sum,
            None if ctx.added_dtype is None else grad_partial_sum.to(ctx.added_dtype),
            grad_query,
            grad_norm[0].to(norm_weight.dtype) if grad_norm else None,
            None,
            None,
            None,
        )


# -- functions ---------------------------------------------------------------------------------------------------------


def check_device(tensor: torch.Tensor) -> None:
    """Raises [`AttnResError`] where the kernels cannot run."""
    if tensor.device.type != "cuda" and not IS_INTERPRETED:
        raise AttnResError(
            f"The depth attention implementation 'triton' runs on CUDA devices; the sources are on {tensor.device}. "
            "Move the model, or choose 'two_phase' or 'auto'. (For tests, Triton's interpreter runs the kernels on any "
            "device: set TRITON_INTERPRET=1 before anything imports triton.)"
        )


def phase_one(
    queries: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    eps: float | None,
    num_heads: int = 1,
    window: tuple[int, int, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Phase one (Algorithm 1): every read of a block over the finished sources, with gradients.

    Args:
        queries (`torch.Tensor`): folded queries of the block's reads, `[reads, hidden]`, float32 or float64.
        sources (`tuple[torch.Tensor, ...]`): each `[..., hidden]`, of one dtype, on one CUDA device.
        eps (`float`, *optional*): epsilon of the RMSNorm on the keys; `None` if they have none.
        num_heads (`int`, defaults to 1): depth heads.
        window (`tuple[int, int, int]`, *optional*):
            Index of the first of the reads, block size, and how many of the latest sources a read sees besides the
            embedding; by default all.

    Returns:
        `tuple[torch.Tensor, ...]`: the normalised output of each read, `[..., hidden]`, then the log-sum-exp of each,
        `[...]`, or `[..., heads]` for several heads, both in the dtype of `queries`.

    Raises:
        AttnResError: the sources are not on a CUDA device.
    """
    check_device(sources[0])
    return PhaseOne.apply(queries, eps, num_heads, list(window or ()), *sources)


def phase_two(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    partial_sum: torch.Tensor,
    query: torch.Tensor,
    scale: int,
    eps: float | None,
    addend: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase two: one read's merge of phase one with the partial sum by online softmax, in one pass with the addition
    before it and the RMSNorm behind it, with gradients.

    Args:
        output (`torch.Tensor`): normalised output of phase one, `[..., hidden]`, in the dtype of `query`.
        log_sum_exp (`torch.Tensor`): `[...]`, or `[..., heads]` for several heads, in the dtype of `query`.
        partial_sum (`torch.Tensor`): `[..., hidden]`.
        query (`torch.Tensor`): folded query `[hidden]`, float32 or float64.
        scale (`int`): factor of the result.
        eps (`float`, *optional*): epsilon of the RMSNorm on the keys; `None` if they have none.
        addend (`torch.Tensor`, *optional*): what the partial sum lacks, `[..., hidden]`, taken in its dtype.
        norm (`Norm`, *optional*): the norm; hidden states are not rounded before it.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (normed) hidden states, and the partial sum with its addend, both
        `[..., hidden]` in the dtype of `partial_sum`.
    """
    weight, norm_eps = (None, 0.0) if norm is None else norm
    results = PhaseTwo.apply(output, log_sum_exp, partial_sum, addend, query, weight, scale, eps, norm_eps)
    return results if addend is not None else (*results, partial_sum)

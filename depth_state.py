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
"""What travels between the reads of Attention Residuals (arXiv 2603.15031), and the arithmetic that all reads share.

These names and shapes are used everywhere in this package:

    v_0 ... v_{n-1}   finished sources, each `[batch, sequence, hidden]`: the embedding, then one sum per block
    b                 partial sum of the open block, `[batch, sequence, hidden]`; absent right after a boundary
    w                 folded query of one read, `[hidden]`, float32: pseudo-query times key-norm weight
    depth             number of sublayers that have written; read r stands in front of sublayer r, so the depth is also
                      the index of the next read

A read is `h = sum_i a_i v_i` with `a = softmax_i(w . v_i / rms(v_i))` over the sources and, if present, the partial sum
(Eq. 2-6). Statistics, softmax and accumulation are in float32, or in float64 for float64 sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .configuration_attnres import AttnResError

# -- state -------------------------------------------------------------------------------------------------------------


class DepthCache:
    """What an implementation has computed from finished sources and wants to use again. It is never changed.

    This is a plain class on purpose. Lists, tuples and dataclasses are rebuilt where the arguments of a layer are moved
    to another device or cast; then a cache could hold other tensors than it was computed from.

    Attributes:
        sources (`tuple[torch.Tensor, ...]`):
            The finished sources that the cache was computed from, each `[batch, sequence, hidden]`. The cache is valid
            for a state whose first sources are these very objects.
        inverse_rms (`torch.Tensor`, *optional*):
            1 / rms of the first m of `sources` (1 if keys have no norm), `[batch, sequence, m]`, in the dtype of the
            queries.
        first_read (`int`): index of the first read that `outputs` serves.
        outputs (`tuple[torch.Tensor, ...]`):
            Phase one (Algorithm 1) of the open group of reads ([`DepthSettings`]): for each read the normalised output
            over the sources that were finished before read `first_read`, `[batch, sequence, hidden]`, in the dtype of
            the queries. Empty between groups.
        log_sum_exps (`tuple[torch.Tensor, ...]`):
            For each of `outputs` the log-sum-exp of its logits, `[batch, sequence]`, or `[batch, sequence, heads]` for
            several heads, in the dtype of the queries.
    """

    __slots__ = ("first_read", "inverse_rms", "log_sum_exps", "outputs", "sources")

    def __init__(
        self,
        sources: tuple[torch.Tensor, ...],
        inverse_rms: torch.Tensor | None = None,
        first_read: int = 0,
        outputs: tuple[torch.Tensor, ...] = (),
        log_sum_exps: tuple[torch.Tensor, ...] = (),
    ):
        self.sources = sources
        self.inverse_rms = inverse_rms
        self.first_read = first_read
        self.outputs = outputs
        self.log_sum_exps = log_sum_exps

    def is_valid_for(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the first of `sources` are, object by object, those that the cache was computed from."""
        if len(self.sources) > len(sources):
            return False
        return all(own is other for own, other in zip(self.sources, sources))

    def serves(self, read: int) -> bool:
        """Whether `outputs` holds phase one of the read with this index."""
        return self.first_read <= read < self.first_read + len(self.outputs)

    def without_phase_one(self) -> DepthCache | None:
        """The part of the cache that outlives a group of reads, or `None` if there is none."""
        return None if self.inverse_rms is None else DepthCache(self.sources, self.inverse_rms)


class DepthState(NamedTuple):
    """All that a decoder layer needs of the layers before it. It is immutable: every method returns a new state.

    Attributes:
        sources (`tuple[torch.Tensor, ...]`):
            Finished sources v_0 ... v_{n-1}, each `[batch, sequence, hidden]`, contiguous, in the dtype of the
            embedding.
        partial_sum (`torch.Tensor`, *optional*):
            Sum of the outputs that were written to the open block, `[batch, sequence, hidden]`; `None` at a block
            boundary.
        addend (`torch.Tensor`, *optional*):
            The last output, `[batch, sequence, hidden]`, which still has to be added to the partial sum. A read may do
            this in the same pass over memory.
        depth (`int`, defaults to 0):
            Number of sublayers that have written; also the index of the next read.
        cache (`DepthCache`, *optional*):
            What the implementation computed at earlier reads. It changes the cost of a read, never its result.
    """

    sources: tuple[torch.Tensor, ...]
    partial_sum: torch.Tensor | None = None
    addend: torch.Tensor | None = None
    depth: int = 0
    cache: DepthCache | None = None

    def write(self, output: torch.Tensor, block_size: int) -> DepthState:
        """Adds the output of a sublayer to the open block (Eq. 5), and closes the block after its last sublayer.

        If the block has a partial sum and stays open, the output becomes the `addend`; an earlier addend is added
        first. Sources keep the dtype of the embedding (also under autocast), and they are contiguous, whatever layout
        a sublayer such as a convolution gave to its output.

        Args:
            output (`torch.Tensor`): output of the sublayer, `[batch, sequence, hidden]`, of any floating dtype.
            block_size (`int`): sublayers per block, the paper's S.

        Returns:
            `DepthState`: the state one sublayer deeper.
        """
        sources, total, addend, depth, cache = self
        depth += 1
        output = output.to(sources[0].dtype).contiguous()
        if addend is not None and total is not None:
            total = total + addend
        if total is None:
            total, addend = output, None
        else:
            addend = output
        if depth % block_size != 0:
            return DepthState(sources, total, addend, depth, cache)
        if addend is not None:
            total = total + addend
        return DepthState((*sources, in_memory(total)), None, None, depth, cache)

    def added(self) -> DepthState:
        """The same state with the addend in its partial sum."""
        sources, partial_sum, addend, depth, cache = self
        if partial_sum is None or addend is None:
            return self
        return DepthState(sources, partial_sum + addend, None, depth, cache)

    def scaled(self, factor: Any) -> DepthState:
        """All sources and the partial sum times a factor, in their dtype, without a cache.

        Args:
            factor (`float` or `torch.Tensor`): a number, or a tensor that broadcasts to `[batch, sequence, hidden]`.
        """
        sources, partial_sum, _, depth, _ = self.added()
        sources = tuple((source * factor).to(source.dtype) for source in sources)
        if partial_sum is not None:
            partial_sum = (partial_sum * factor).to(partial_sum.dtype)
        return DepthState(sources, partial_sum, None, depth)

    def visible(self) -> tuple[torch.Tensor, ...]:
        """What the next read sees (Eq. 6): the finished sources, then the partial sum if the block is open."""
        sources, partial_sum, *_ = self.added()
        return sources if partial_sum is None else (*sources, partial_sum)

    def flatten(self) -> tuple[Any, ...]:
        """The state as one flat tuple, `(*sources, partial_sum, addend, depth, cache)`.

        It crosses the boundary of a decoder layer in this form, because hooks of modules look for tensors no deeper.
        """
        return (*self.sources, *self[1:])

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> DepthState:
        """The inverse of [`~DepthState.flatten`].

        A hook of a layer may have replaced a source. Then the cache was computed from another tensor, and is dropped.

        Args:
            values (`Sequence[Any]`): what `flatten` returned, possibly with other tensors in it.
        """
        num_sources = len(values) - len(cls._fields) + 1
        sources = tuple(values[:num_sources])
        partial_sum, addend, depth, cache = values[num_sources:]
        if cache is not None and not cache.is_valid_for(sources):
            cache = None
        return cls(sources, partial_sum, addend, depth, cache)

    def to_wire(self) -> tuple[torch.Tensor, ...]:
        """The tensors that another process needs: the finished sources, then the partial sum (with the addend in it) if
        the block is open. The receiver computes all else again."""
        return self.visible()

    @classmethod
    def from_wire(cls, tensors: Sequence[torch.Tensor], depth: int, block_size: int) -> DepthState:
        """The inverse of [`~DepthState.to_wire`].

        Which tensors these are follows from the depth alone: `1 + depth // block_size` finished sources, and a partial
        sum if `depth` is no multiple of `block_size`.

        Args:
            tensors (`Sequence[torch.Tensor]`): what `to_wire` returned, each `[batch, sequence, hidden]`.
            depth (`int`): number of sublayers that have written.
            block_size (`int`): sublayers per block, the paper's S.

        Raises:
            AttnResError: the number of tensors does not fit the depth.
        """
        num_sources, is_open = 1 + depth // block_size, depth % block_size != 0
        if len(tensors) != num_sources + is_open:
            raise AttnResError(
                f"A state after {depth} sublayers with block_size={block_size} has {num_sources + is_open} tensors on "
                f"the wire ({num_sources} finished sources and {'a' if is_open else 'no'} partial sum), but "
                f"{len(tensors)} were given. Give those that `DepthState.to_wire` returned at this depth."
            )
        return cls(tuple(tensors[:num_sources]), tensors[-1] if is_open else None, None, depth)

    def has_phase_one(self) -> bool:
        """Whether the cache holds phase one of the next read."""
        return self.cache is not None and self.cache.serves(self.depth)

    def phase_one(self, settings: DepthSettings) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """What phase two of the next read merges; the cache has to hold its phase one.

        Args:
            settings (`DepthSettings`): what the read depends on.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]`: the read's output of phase one,
            `[batch, sequence, hidden]`, and log-sum-exp, `[batch, sequence]` or `[batch, sequence, heads]`, both in the
            dtype of the queries; then the *recent* sources, which phase one has not seen and the read looks at, each
            `[batch, sequence, hidden]`: those that were finished since, and the partial sum without its addend.
        """
        sources, partial_sum, _, depth, cache = self
        assert cache is not None
        index = depth - cache.first_read
        first_recent = 1 + cache.first_read // settings.block_size
        if settings.window is not None:
            first_recent = max(first_recent, settings.first_in_window(depth))
        recent = sources[first_recent:]
        if partial_sum is not None:
            recent = (*recent, partial_sum)
        return cache.outputs[index], cache.log_sum_exps[index], recent


# -- settings ----------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """The RMSNorm that follows a read.

    Attributes:
        weight (`torch.Tensor`): the factor of the normalised hidden states, `[hidden]`.
        eps (`float`): the epsilon under the root.
    """

    weight: torch.Tensor
    eps: float


class DepthAttentionImplementation(Protocol):
    """A way to compute reads. All implementations give the same results."""

    def covers(self, settings: DepthSettings) -> bool:
        """Whether it computes this variant of a read. The reference computes all, and the others leave to it what they
        do not cover."""

    def fuses(self, state: DepthState) -> bool:
        """Whether a read of this state takes an RMSNorm that follows it into its own pass over memory."""

    def read(
        self, queries: torch.Tensor, state: DepthState, settings: DepthSettings, norm: Norm | None = None
    ) -> tuple[torch.Tensor, DepthState]:
        """The read with index `state.depth`.

        Args:
            queries (`torch.Tensor`): what the reads have learned, float32 or float64, by read in the first dimension.
                Folded queries `[reads, hidden]`, or what [`DepthAttention`] returns for another kind of query.
            state (`DepthState`): the state in front of the read.
            settings (`DepthSettings`): what the read depends on.
            norm (`Norm`, *optional*): the RMSNorm that the read shall apply to its result.

        Returns:
            `tuple[torch.Tensor, DepthState]`: the hidden states, `[batch, sequence, hidden]` in the dtype of the
            sources, and the state with what later reads want to find in it, at the same depth.
        """


class DepthSettings(NamedTuple):
    """What a read depends on besides its tensors.

    Attributes:
        block_size (`int`): sublayers per block, the paper's S.
        mix (`str`):
            `"mean"` (Eq. 1), `"sum"` to multiply a read by the number of its sources, or `"gated"` to add it, times a
            gate, to the sum of all sources.
        key_norm_eps (`float`, *optional*): epsilon of the RMSNorm on the keys; `None` if keys are the raw sources.
        implementation (`DepthAttentionImplementation`): how reads are computed.
        group_size (`int`):
            Reads per *group*, the scheduling block of Appendix B: phase one serves all reads of a group at once, from
            the sources that were finished before it. The size changes the cost, not the result.
        num_heads (`int`, defaults to 1): H, the depth heads. Each weighs its own slice of the hidden dimension.
        query (`str`, defaults to `"learned"`): `"learned"`, `"input"` or `"static"`, see [`AttnResConfig`].
        weighting (`str`, defaults to `"softmax"`): `"softmax"` or `"sigmoid"` of the logits.
        window (`int`, *optional*): number of the latest sources that a read sees besides the embedding; all if `None`.
        values (`str`, defaults to `"raw"`): what is summed, `"raw"` sources or `"normalized"` ones.
    """

    block_size: int
    mix: str
    key_norm_eps: float | None
    implementation: DepthAttentionImplementation
    group_size: int
    num_heads: int = 1
    query: str = "learned"
    weighting: str = "softmax"
    window: int | None = None
    values: str = "raw"

    def is_plain(self) -> bool:
        """Whether a read is the paper's: one softmax head over all raw sources, with a norm on keys."""
        return self[5:] == (1, "learned", "softmax", None, "raw") and self.key_norm_eps is not None

    def first_in_window(self, read: int) -> int:
        """Index of the first source, after the embedding, that the read with this index looks at."""
        num_sources = 1 - (-read // self.block_size)
        return 1 if self.window is None else max(1, num_sources - self.window)

    def seen(self, read: int) -> list[int]:
        """Indices of the sources that the read with this index looks at, the partial sum's included."""
        return [0, *range(self.first_in_window(read), 1 - (-read // self.block_size))]

    def scale(self, num_sources: int) -> int:
        """The factor of a read that sees this number of sources, the partial sum included."""
        return num_sources if self.mix == "sum" else 1

    def reads_left(self, depth: int, num_reads: int) -> int:
        """The number of reads from read `depth` to the end of its group, of `num_reads` reads in all."""
        return min(self.group_size - depth % self.group_size, num_reads - depth)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of statistics and sums: float32, or its own if that is wider."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


FEW_ELEMENTS = 2**15


def key_scale(value: torch.Tensor, eps: float | None) -> torch.Tensor:
    """What a dot product `w . v` is multiplied with to be a logit: `[...]`, 1 / rms, or 1 if keys have no norm."""
    if eps is None:
        return upcast(value.new_ones(())).expand(value.shape[:-1])
    return inverse_rms(value, eps)


def inverse_rms(value: torch.Tensor, eps: float, keepdim: bool = False) -> torch.Tensor:
    """1 / rms over the last dimension, `rsqrt(mean(v^2) + eps)`.

    Args:
        value (`torch.Tensor`): `[..., hidden]`.
        eps (`float`): the epsilon under the root.
        keepdim (`bool`, defaults to `False`): whether the last dimension is kept, with size 1.

    Returns:
        `torch.Tensor`: `[...]` or `[..., 1]`, float32, or float64 for a float64 value.
    """
    if torch.compiler.is_compiling() or value.numel() <= FEW_ELEMENTS:
        # The norms of the backbone compute it like this. `vector_norm` takes fewer passes over memory, but rounds more.
        return torch.rsqrt(upcast(value).pow(2).mean(-1, keepdim) + eps)
    dtype = None if value.dtype.itemsize >= 4 else torch.float32
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=keepdim, dtype=dtype)
    return torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / value.shape[-1]).rsqrt_()


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, which a compiler has to keep in memory.

    Without this, a compiler that runs inference keeps all terms of a sum and adds them up wherever the sum is read. In
    training it keeps what the backward needs anyway.
    """
    if torch.compiler.is_compiling() and not tensor.requires_grad:
        return tensor.as_strided(tensor.shape, tensor.stride())
    return tensor


def normed(hidden_states: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """The hidden states `[..., hidden]` after the norm, in their dtype; unchanged if there is no norm."""
    if norm is None:
        return hidden_states
    return nn.functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.eps)


def scaled_and_normed(output: torch.Tensor, scale: int, norm: Norm | None, dtype: torch.dtype) -> torch.Tensor:
    """The hidden states of a read that has nothing to merge: `scale * output`, then the norm if there is one.

    Args:
        output (`torch.Tensor`): output of phase one, `[..., hidden]`, float32 or float64.
        scale (`int`): factor of the read.
        norm (`Norm`, *optional*): the RMSNorm that follows.
        dtype (`torch.dtype`): dtype of the result.
    """
    if norm is None:
        return (output if scale == 1 else output * scale).to(dtype)
    # A norm removes every factor. Only its epsilon has to know of it: rms(s * v)^2 + eps = s^2 * (rms(v)^2 + eps / s^2)
    return normed(output.to(dtype), Norm(norm.weight, norm.eps / scale**2))


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is computed from these tensors. If not, custom functions would only cost time."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refuse_second_derivatives() -> None:
    """Called by the backward of a custom function. Raises [`AttnResError`] if that is to be differentiated itself."""
    # Autograd runs a backward with gradients enabled only under `create_graph=True`. Compilers trace it in either mode.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise AttnResError(
            "This implementation of depth attention has no second derivatives (create_graph=True asked for them). "
            "Choose the implementation 'eager', which has."
        )
